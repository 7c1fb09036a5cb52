"""Names for the statements and the symbols of a printed graph.

The names that PyTorch prints come from a namespace with a history: a name is never given back, and the counter of a
stem remembers the last number that it handed out. The gaps and jumps in printed names (`getitem_9` straight after
`getitem_2`) follow from that history, so `Namespace` keeps it exactly, quirks included.
"""

from __future__ import annotations

import builtins
import hashlib
import keyword
import re

# Notebooks put names of their own into `builtins`; a printed graph must not depend on where it is printed.
_NOTEBOOK_NAMES = {"_", "display", "get_ipython", "__IPYTHON__"}
# Names that printed code reads as globals.
_PRINTED_GLOBALS = {"inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree"}
_RESERVED = frozenset((set(vars(builtins)) - _NOTEBOOK_NAMES) | set(keyword.kwlist) | _PRINTED_GLOBALS)

_STEM_AND_NUMBER = re.compile(r"(\w*?)(?:_(\d+))?", re.ASCII)


def snake_case(target: str) -> str:
    """The name that a placeholder or a call of `target` asks for: `L_inputs_` gives `l_inputs_`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target).lower()


class Namespace:
    """Hands out names, each once."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._counts: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def __repr__(self) -> str:
        return f"{type(self).__name__}({sorted(self._used)})"

    def make(self, candidate: str) -> str:
        """Takes `candidate`, or the next free name of its stem, into use.

        Args:
            candidate: the name wanted; characters that no name may have become underscores.

        Returns:
            A name that no earlier call returned.
        """
        name = re.sub(r"[^0-9A-Za-z_]+", "_", candidate) or "_unnamed"
        if name[0].isdigit():
            name = f"_{name}"
        match = _STEM_AND_NUMBER.fullmatch(name)
        assert match is not None
        stem, suffix = match.groups()

        if suffix is None or name in self._used:
            # The counter is read under the whole name but written under the stem. So a taken `getitem_14` starts over
            # at `getitem_1` and leaves the counter of `getitem` at whatever was free: printed names depend on it.
            number = self._counts.get(name, 0)
            if name in _RESERVED:
                number += 1
                name = f"{stem}_{number}"
        else:
            number = int(suffix)
        while name in self._used:
            number += 1
            name = f"{stem}_{number}"

        self._used.add(name)
        self._counts[stem] = number
        return name

    def rename(self, old: str, want: str) -> str:
        """A name like `want` for what was called `old` so far; `old` stays in use, which leaves a gap."""
        return old if old == want else self.make(want)


class SymbolNames:
    """Hands out names of symbols, each once."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def hashed(self, source_name: str, prefix: str) -> str:
        """`prefix` and a number hashed from the Python expression that reaches the value, moved up while taken."""
        number = int(hashlib.sha256(source_name.encode()).hexdigest(), 16) % 100
        while number in self._taken:
            number += 1
        self._taken.add(number)
        return f"{prefix}{number}"
