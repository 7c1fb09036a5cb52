"""Source of functions that read Python state at every call: they do as little as can be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from jhop._container import Container

_TABLE = re.compile("\0(k[0-9]+)\0")  # no source has this character in it, not even in a string


class SlotCode:
    """Makes source in which objects have names; `function` makes the function.

    Args:
        names: what the source may use besides.
    """

    def __init__(self, **names: Any):
        self._names = names
        self._known: dict[int, str] = {}
        self._views: dict[tuple[str, str], Any] = {}
        self.absent: dict[str, set[Any]] = {}  # keys that must not be there, by the source of all that are

    def name(self, value: Any) -> str:
        """A name for an object; one for each, so that what is asked twice can be told."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = f"k{len(self._known)}"
            self._names[known] = value  # also keeps it, so that its id stays its own
        return known

    def table(self, obj: Any) -> str:
        """The `__dict__` of an object, which the function looks up but once; a class keeps the one that it has."""
        return self._view(obj, "table") if isinstance(obj, type) else f"\0{self.name(obj)}\0"

    def keys(self, container: Container) -> str:
        """The keys of a dict or of the `__dict__` of an object."""
        obj = container.obj
        live = container.kind == "dict" or isinstance(obj, type)
        return self._view(obj, "keys") if live else f"{self.table(obj)}.keys()"

    def _view(self, obj: Any, what: str) -> str:
        """The name of something that shows what is in a dict or a class, now and later."""
        place = self.name(obj), what
        view = self._views.get(place)
        if view is None:
            table = obj.__dict__ if isinstance(obj, type) else obj
            view = self._views[place] = table.keys() if what == "keys" else table
        return self.name(view)

    def read(self, container: Container, key: Any) -> str:
        """What reads a slot. Where there is none, it raises or gives `MISSING`."""
        if not container.weak:
            obj, kind = container.obj, container.kind
            if kind == "cell":
                return f"{self.name(obj)}.cell_contents"
            if kind in ("attrs", "class") and type(key) is str:
                return f"{self.table(obj)}[{key!r}]"
            if kind == "dict" and type(obj) is dict and type(key) in (str, int):
                return f"{self.name(obj)}[{key!r}]"
            if kind == "list" and type(obj) is list:
                return f"{self.name(obj)}[{key}]"
            if kind == "slots":
                return f"{self.name(object.__getattribute__)}({self.name(obj)}, {key!r})"
        return f"{self.name(type(container).get)}({self.name(container)}, {self.name(key)})"

    def function(self, signature: str, lines: Iterable[str]) -> Callable[..., Any]:
        """Makes a function of the lines of its body, which stand in the order in which they run."""
        body = "\n".join(f"    {line}" for line in lines)
        often = {name for name in _TABLE.findall(body) if body.count(f"\0{name}\0") > 1}
        seen: set[str] = set()

        def place(match: re.Match[str]) -> str:
            name = match[1]
            if name not in often or name in seen:
                return f"t{name}" if name in often else f"{name}.__dict__"
            seen.add(name)
            return f"(t{name} := {name}.__dict__)"

        exec(f"def {signature}:\n{_TABLE.sub(place, body)}\n", self._names)
        return self._names[signature.partition("(")[0]]
