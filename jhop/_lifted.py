"""Python state that is lifted: what a graph knows of it, and what lifted numbers report to while hooks are traced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jhop import _state
from jhop._capture import Recorder
from jhop._errors import Unsupported
from jhop._expr import Expr, free
from jhop._guards import Guards
from jhop._late import compares_identity
from jhop._leaves import Leaf
from jhop._replay import fits_device, is_known, on_top, put_check
from jhop._scalar import Scalar, largest_int
from jhop._slotcode import SlotCode
from jhop._source import is_user_file, peeled
from jhop._walk import Walk
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


class Need(NamedTuple):
    """An int that the device computes, and may not have too large: an expression, and the hook that uses it."""

    expr: Expr
    hook: str


def too_large(hook: str) -> str:
    """What is wrong where ints are needed that the device does not have, for after "and"."""
    return (
        f"{hook} uses an int there that grows past {largest_int()}, or is computed from one which does: the device "
        "has none as large, and would count wrong. Keep it smaller, use a float or an array for it, or turn x64 on "
        "(JAX_ENABLE_X64=1)"
    )


class Session:
    """What `Scalar`s report to while hooks are traced.

    Attributes:
        answers: questions that were asked of numbers, with the answers.
        symbols: what stands for the numbers of lifted state and of the loops under way, by expression.
        arrays: arrays that numbers depend on, which are known once the graph ran.
        needs: what the device may not have too large, of the numbers that hooks used on it.
        hook: the one that runs, in words.
        varied: the loops by which a number changes of which a question was asked; `device`: it depends on the data.
    """

    def __init__(self, recorder: Recorder):
        self.answers: list[tuple[Expr, bool]] = []
        self.open = True
        self.symbols: dict[Expr, Scalar] = {}
        self.arrays: dict[Expr, Any] = {}
        self.varied: set[Any] = set()
        self.needs: list[Need] = []
        self.hook = ""
        self.top: Any = None  # the trace of the graph
        self.tables: dict[Any, list[Any]] = {}  # of the flags that slots hold at times, by id of the container and key
        self.asks_identity: Callable[[], bool] = lambda: False  # whether hooks compare by `is`
        self.asks_type: Callable[[], bool] = lambda: False  # whether hooks ask for types by `type`
        self.on_top: dict[Expr, Any] = {}  # what stands there for numbers that the host knows
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

    def mark(self) -> tuple[int, int]:
        """For `rewind`: how much was asked and needed so far."""
        return len(self.answers), len(self.needs)

    def rewind(self, mark: tuple[int, int]) -> None:
        """Forgets what was asked and needed since a mark, in a trace that is thrown away."""
        del self.answers[mark[0] :], self.needs[mark[1] :]

    def take_needs(self, mark: tuple[int, int]) -> list[Need]:
        """The needs since a mark, which are taken away."""
        taken = list(dict.fromkeys(self.needs[mark[1] :]))
        del self.needs[mark[1] :]
        return taken

    def used(self, scalar: Scalar) -> Any:
        """What the device takes for a number which it uses now."""
        if self.open:
            self.needs += self.needs_of(scalar)
        return self.twins_of([scalar])[0]

    def needs_of(self, scalar: Scalar) -> list[Need]:
        """What the device needs to compute a number."""
        found: dict[Need, None] = {}
        work, seen = [scalar._needs or ()], set()
        while work:
            part = work.pop()
            if isinstance(part, Expr):
                found[Need(part, self.hook)] = None
            elif id(part) not in seen:
                seen.add(id(part))
                work += part
        return list(found)

    def twins_of(self, scalars: Sequence[Scalar]) -> list[Any]:
        """What stands for numbers on the device: where the host knows one, it comes from there."""
        return [on_top(self, item) if self.open and item._needs is None else item._twin for item in scalars]

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
        self.on_top.clear()
        self.tables.clear()
        self.needs.clear()
        self.top = None
        self.asks_identity = self.asks_type = lambda: False  # what hooks reach is not kept alive


def check_needs(session: Session) -> None:
    """Puts into the graph that what the device needs is looked at, after it ran.

    Raises:
        Unsupported: it is known that the device has no ints as large.
    """
    needs = list(dict.fromkeys(session.needs))
    for hook in dict.fromkeys(need.hook for need in needs):
        exprs = [need.expr for need in needs if need.hook == hook]
        known = [expr for expr in exprs if is_known(expr)]
        late = [expr for expr in exprs if expr not in known]
        if not fits_device(session, *known):
            raise Unsupported(f"a hook counts in a loop or branch, and {too_large(hook)}.")
        if late:
            text = f"a hook counted in a loop or branch, and {too_large(hook)}. Nothing was written."
            put_check(session, Expr("extent", tuple(late)), text)


def runs_state_from_c(walk: Walk) -> bool:
    """Whether JAX could trace a callable with state in it, such as a partial, while no code of the user's runs."""

    def from_c(fn: Any) -> bool:
        fn = peeled(fn)
        return not (isinstance(fn, types.FunctionType) and is_user_file(fn.__code__.co_filename))

    def has_owner(fn: Any) -> bool:
        return fn.__self__ is not None and not isinstance(fn.__self__, types.ModuleType)

    return bool(
        walk.instances(functools.partial, from_c)
        or walk.instances(types.BuiltinMethodType, has_owner)
        or walk.instances(types.MethodWrapperType, has_owner)
    )


def asks_identity(walk: Walk) -> bool:
    """Whether hooks compare by `is`, or ask for types."""
    functions = walk.instances(types.FunctionType, lambda fn: is_user_file(fn.__code__.co_filename))
    return walk.mentions("type", "is_", "is_not") or compares_identity(fn.__code__ for fn in functions)
