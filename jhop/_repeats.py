"""A hook that is used in many places: where running it once more would give the same equations, these are repeated.

That is known of a run where all that can tell two runs apart is the same:

- the hook (`HookFn`s are equal where one trace may serve both) and the types of its cotangents;
- the context: the trace, and everything that JAX has in the keys of its caches (mesh, axes, x64, precision ...);
- all Python state that the hook can reach: every slot holds what it held before any hook ran. So a hook that writes
  is run each time, and so is one that reads what another hook wrote;
- that its inputs are values of the graph, different from each other and from what the hook reads: it could ask.

A hook with effects on the device (`jax.debug.print`, references) is run each time too, as is one that closes over a
value of the function that is being traced.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import operator
from collections.abc import Collection, Sequence
from typing import Any

from jax.extend import source_info_util

from jhop import _compat
from jhop._container import MISSING
from jhop._contract import HookFn
from jhop._splice import Section, bind_section
from jhop._state import Lift
from jhop._walk import Walk

MAX_SLOTS = 256  # a hook that reaches more is run each time: looking at them would take as long


class _Reach:
    """The Python state that one hook can reach."""

    def __init__(self, walk: Walk):
        self._walk = walk
        self._before: list[Any] = []

    @staticmethod
    def of(hook: Any) -> _Reach | None:
        """None where a change of it could go unseen, or cost too much to see."""
        walk = Walk([("", hook)], strict=False, limit=MAX_SLOTS)
        return None if walk.truncated or walk.tracers or walk.holds_tracer else _Reach(walk)

    def begin(self, lift: Lift) -> None:
        """Notes what there is before any hook ran."""
        self._before = self._look(lift)

    def end(self) -> None:
        """Lets go of what there was."""
        self._before = []

    def is_as_before(self, lift: Lift) -> bool:
        now = self._look(lift)
        same = len(now) == len(self._before) and all(map(operator.is_, now, self._before))
        return same and all((reference() is not None) is there for reference, there in self._walk.alive)

    def _look(self, lift: Lift) -> list[Any]:
        found: list[Any] = []
        for mark in lift.mark(self._walk.containers):
            found.append(mark.container)
            for slot in mark.items:
                found += slot
        return found + [getattr(obj, name, MISSING) for obj, name, _ in self._walk.attributes]


@dataclasses.dataclass
class _Run:
    """What one run of a hook did."""

    section: Section
    outs: list[Any]  # results that are not variables of the section or its inputs, else None
    variables: list[Any]  # per result, the variable; None for others


class Repeats:
    """The hooks of one graph that are run once for many places, as long as the graph is being made.

    Args:
        hooks: (hook, equation) per place where a hook is inlined.
    """

    def __init__(self, hooks: Collection[tuple[HookFn, Any]]):
        places = ((hook, *(atom.aval for atom in eqn.invars)) for hook, eqn in hooks if not hook.closes_over_values)
        often = {place[0]: None for place, count in collections.Counter(places).items() if count > 1}
        self._reach = {hook: found for hook in often if (found := _Reach.of(hook.base)) is not None}
        self._runs: dict[Any, _Run] = {}
        self._lift: Lift | None = None
        self._trace: Any = None
        self._state: set[Any] = set()

    def begin(self, lift: Lift, state: Sequence[Any]) -> None:
        """From here on, hooks run. `state`: the values of the graph that stand for lifted state."""
        self._lift, self._trace = lift, _compat.current_trace()
        self._state = {_compat.variable_of(value, self._trace) for value in state}
        for reach in self._reach.values():
            reach.begin(lift)

    def end(self) -> None:
        """Lets go of the graph's values."""
        self._runs.clear()
        for reach in self._reach.values():
            reach.end()
        self._lift = self._trace = None

    def place(self, hook: HookFn, values: Sequence[Any]) -> Any:
        """What must be equal for runs to be alike; None where the hook has to be run, whatever ran before."""
        if hook not in self._reach or _compat.current_trace() is not self._trace:
            return None
        variables = [_compat.variable_of(value, self._trace) for value in values]
        if None in variables or len(set(variables)) < len(variables) or not self._state.isdisjoint(variables):
            return None
        if not self._is_as_before(hook):
            return None
        # The token changes where a class is registered with an abstract one, of which `isinstance` may ask.
        context = _compat.trace_context(), abc.get_cache_token()
        return hook, hook.kind, context, *(variable.aval for variable in variables)

    def again(self, place: Any, values: Sequence[Any]) -> list[Any] | None:
        """Repeats the equations of an earlier run that was alike; None where there is none."""
        run = self._runs.get(place)
        if run is None:
            return None
        made = dict(zip(run.section.ins, values, strict=True))
        made.update(zip(run.section.outs, bind_section(values, run.section), strict=True))
        return [
            out if variable is None else made[variable]
            for out, variable in zip(run.outs, run.variables, strict=True)
        ]

    def start(self) -> int:
        """Where the equations of a run will begin."""
        return _compat.equations_of(self._trace)

    def note(self, place: Any, start: int, values: Sequence[Any], outs: Sequence[Any]) -> None:
        """Notes a run, so that it can be repeated."""
        eqns = _compat.equations_of(self._trace, start)
        if eqns is None or not self._is_as_before(place[0]):
            return
        ins = [_compat.variable_of(value, self._trace) for value in values]
        made = {variable for eqn in eqns for variable in eqn.outvars}
        found = [_compat.variable_of(out, self._trace) for out in outs]
        variables = [variable if variable in made or variable in ins else None for variable in found]
        results = list(dict.fromkeys(variable for variable in variables if variable in made))
        section = Section(eqns, ins, results, source_info_util.current_name_stack())
        kept = [out if variable is None else None for out, variable in zip(outs, variables, strict=True)]
        self._runs[place] = _Run(section, kept, variables)

    def _is_as_before(self, hook: HookFn) -> bool:
        assert self._lift is not None
        return self._reach[hook].is_as_before(self._lift)
