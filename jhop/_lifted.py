"""Python state that is lifted: what a graph knows of it, and what lifted numbers report to while hooks are traced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jhop import _state
from jhop._capture import Recorder
from jhop._expr import Expr, free
from jhop._guards import Guards
from jhop._leaves import Leaf
from jhop._scalar import Scalar
from jhop._slotcode import SlotCode
from jhop._writeback import write_back


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lifted:
    """The Python state of an inlined graph.

    Attributes:
        slots: where the values of the state inputs are read, in order of the inputs.
        n_outs: how many outputs are results; the rest are new values of state.
        writes: (container, key, template) per changed slot; see `_template`.
        guards: when the graph may be used again.
    """

    slots: tuple[Leaf, ...]
    n_outs: int
    writes: tuple[_state.Write, ...]
    guards: Guards

    @functools.cached_property
    def read(self) -> Callable[[], list[Any]]:
        """A function that gives the present values of the state inputs."""

        def one_by_one() -> list[Any]:
            return [slot.container.get(slot.key) for slot in self.slots]

        code = SlotCode(one_by_one=one_by_one)
        values = ", ".join(code.read(slot.container, slot.key) for slot in self.slots)
        lines = ["try:", f"    return [{values}]", "except Exception:", "    return one_by_one()"]
        return code.function("read()", lines)

    @functools.cached_property
    def commit(self) -> Callable[[Sequence[Any]], None]:
        """A function of the graph's outputs after the results, which writes the new state.

        It writes all of it, or none if anything is raised.
        """
        return write_back(self.writes, self.n_outs)


class Session:
    """What `Scalar`s report to while hooks are traced.

    Attributes:
        answers: questions that were asked of numbers, with the answers.
        symbols: what stands for the numbers of lifted state and of the loops under way, by expression.
        arrays: arrays that numbers depend on, which are known once the graph ran.
        varied: the loops by which a number changes of which a question was asked; `device`: it depends on the data.
    """

    def __init__(self, recorder: Recorder):
        self.answers: list[tuple[Expr, bool]] = []
        self.open = True
        self.symbols: dict[Expr, Scalar] = {}
        self.arrays: dict[Expr, Any] = {}
        self.varied: set[Any] = set()
        self._recorder = recorder
        self._scalars: list[Scalar] = []
        self._keys = itertools.count()

    def new_key(self) -> int:
        """A number for a loop or an array, unlike all others."""
        return next(self._keys)

    def array(self, value: Any) -> Expr:
        """An expression for an array that will be known once the graph ran."""
        expr = Expr("device", (f"d{self.new_key()}",))
        self.arrays[expr] = value
        return expr

    def guard(self, expr: Expr, answer: bool) -> None:
        if not self.open:  # JAX may keep a number as a cache key and ask it much later
            return
        asked = [part for part in free(expr) if part.op != "leaf"]
        self.varied.update("device" if part.op == "device" else part.args[0] for part in asked)
        if not asked:
            self.answers.append((expr, answer))

    def asked_too_early(self) -> bool:
        """Whether a question was asked of a number that is known only once the graph ran."""
        return "device" in self.varied

    def note_step(self, result: Scalar) -> None:
        self._recorder.add(result._twin)
        self._scalars.append(result)

    @contextlib.contextmanager
    def inner_trace(self) -> Iterator[None]:
        """While active, numbers belong to an inner trace: afterwards, they and their arrays are let go of."""
        symbols, arrays, count = dict(self.symbols), dict(self.arrays), len(self._scalars)
        try:
            yield
        finally:
            self.symbols, self.arrays = symbols, arrays
            for scalar in self._scalars[count:]:
                scalar._twin = None
            del self._scalars[count:]

    def close(self) -> None:
        """Ends the session: a number that lives on, say as a key in a cache of JAX's, holds no tracer."""
        self.open = False
        for scalar in self._scalars:
            scalar._twin = None
        self._scalars.clear()
        self.symbols.clear()
        self.arrays.clear()
