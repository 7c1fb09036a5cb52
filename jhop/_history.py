"""Why graphs were traced: a record of each trace, in words. Records hold no object of the user's; only so many stay."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any

from jhop import _compat
from jhop._logs import recompiling

MAX_TRACES = 100  # records that are kept of one compiled object; the oldest give way
MAX_ARGUMENTS = 8  # of one record
MAX_REASON = 600  # characters
OTHER_SETTINGS = "JAX is set up in another way (x64, precision, mesh ...)"


@dataclasses.dataclass(frozen=True)
class Trace:
    """One trace of a graph.

    Attributes:
        number: 1 for the first trace of the compiled object that it belongs to.
        graph: name of the graph: of the function, with `_forward` or `_backward` for the two of `jhop.compile`.
        arguments: name and type of each argument, such as "x: float32[3]", static arguments last; the first eight.
        reason: why it was made: "first call", or what differs from the trace before.
    """

    number: int
    graph: str
    arguments: tuple[str, ...]
    reason: str

    def what(self) -> str:
        """What was traced."""
        return f"`{self.graph}` for {', '.join(self.arguments) or 'no arguments'}"

    def __str__(self) -> str:
        return f"{self.number}. {self.what()}: {self.reason}"


class Told:
    """What warnings were given about. Any thread may add to it."""

    def __init__(self) -> None:
        self._about: set[str] = set()
        self._lock = threading.Lock()

    def add(self, about: str) -> bool:
        """Whether it is new."""
        with self._lock:
            new = about not in self._about
            self._about.add(about)
        return new

    def clear(self) -> None:
        with self._lock:
            self._about.clear()


class History:
    """The traces of one compiled object. Any thread may add to it.

    Args:
        place: file and line of the function, for logs.
        told: what it has in common with others; by default, nothing.

    Attributes:
        count: how many there were, with those that are no longer kept.
    """

    def __init__(self, place: tuple[str, int] | None = None, *, told: Told | None = None) -> None:
        self._place = place
        self._kept: collections.deque[Trace] = collections.deque(maxlen=MAX_TRACES)
        self._lock = threading.Lock()
        self._forgot = False
        self._told = told or Told()
        self.count = 0

    def tell(self, about: str) -> bool:
        """Whether a warning about this is to be given: it was not yet."""
        return self._told.add(about)

    def add(
        self, name: str, gm: Any, reason: str | None, static: tuple[str, ...] = (), *, again: bool = False
    ) -> Trace:
        """Notes a trace.

        Args:
            name: of what was traced.
            gm: the graph that it gave.
            reason: why it was made; None for the first one.
            static: static arguments, in words.
            again: whether there was one before, so that this one is logged.
        """
        arguments = (*arguments_of(gm), *static)
        if len(arguments) > MAX_ARGUMENTS:
            arguments = (*arguments[:MAX_ARGUMENTS], f"and {len(arguments) - MAX_ARGUMENTS} more")
        reason = reason or self.first()
        if again:
            recompiling(f"`{name}`", self._place, reason)
        reason = reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 3]}..."
        with self._lock:
            self.count += 1
            trace = Trace(self.count, name, arguments, reason)
            self._kept.append(trace)
        return trace

    def first(self) -> str:
        """The reason of a first trace."""
        return "the first call since it was reset" if self._forgot else "first call"

    def traces(self) -> tuple[Trace, ...]:
        """The last ones, in order."""
        with self._lock:
            return tuple(self._kept)

    def nothing(self) -> str:
        """Why nothing is compiled, where nothing is."""
        if self._forgot:
            return "Nothing is compiled: it was reset, and not called since."
        return (
            "Nothing is compiled: it was not called yet, or only inside what JAX was transforming, where it is a part "
            "of the graph around it."
        )

    def clear(self) -> None:
        """Forgets them."""
        with self._lock:
            self._forgot = self._forgot or self.count > 0
            self._kept.clear()
            self._told.clear()
            self.count = 0


def arguments_of(gm: Any) -> tuple[str, ...]:
    """Name and type of each argument of a graph, less lifted state."""
    invars = _compat.open_jaxpr(gm.jaxpr)[0].invars
    return tuple(
        f"{given.name}: {variable.aval.str_short()}"
        for given, variable in zip(gm.inputs, invars, strict=True)
        if given.role == "array"
    )
