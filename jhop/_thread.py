"""Python state through control flow: what hooks write in loops, branches and calls goes along and out as values.

The body of a higher-order equation is traced with symbols for the state that its hooks write, and afterwards the
objects are put back. What was written becomes further carries of a loop and further results of a branch or a call; a
number becomes an expression that the host evaluates (`_replay`). Then the new values are written to the objects, as a
hook outside would have done, so that hooks which come later see them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat
from jhop._errors import Unsupported, last_resort
from jhop._expr import Expr, free, substitute
from jhop._graph import hooks_in
from jhop._interp import evaluate, inner_jaxprs
from jhop._late import is_late
from jhop._lifted import Need, Session
from jhop._loops import Loops, Run
from jhop._rebuild import RUNS_IN_PLACE, RUNS_ONCE, rebuild
from jhop._replay import number_of
from jhop._slots import (
    ZERO,
    DoesNotThread,
    Slot,
    Written,
    arrays_of,
    expr_of,
    number_type,
    refusal,
    renamed,
    same_type,
    traced_with,
    values_of,
)
from jhop._source import hook_name
from jhop._state import Lift, Write, explain_leak
from jhop._walk import Walk

_RULES = frozenset({*RUNS_IN_PLACE, *RUNS_ONCE, "scan", "while", "cond"}) - {"shard_map"}


class Threads:
    """Threads state through the higher-order equations of one graph.

    Args:
        run: evaluates a jaxpr and inlines the hooks in it.
    """

    def __init__(self, lift: Lift, session: Session, run: Run):
        self._lift = lift
        self._session = session
        self._run = run
        self._noted: list[tuple[Write, int]] = []  # what hooks wrote, and how many arrays there are in all of it
        self._loops = Loops(lift, session, run)
        self._write: dict[int, Any] = {}  # equations inside of which hooks were found to write, by id

    def inline(self, eqn: Any, values: list[Any], ordinary: Callable[..., list[Any]]) -> list[Any]:
        """Inlines the hooks inside an equation.

        Args:
            ordinary: `ordinary(eqn, values, apart)` does it where the hooks write no state.

        Raises:
            Unsupported: what they write cannot be threaded.
        """
        name, runs = eqn.primitive.name, eqn.params.get("length") != 0
        if id(eqn) in self._write and name in _RULES and runs:
            return self._threaded(eqn, values)
        asked, outer, self._noted = self._session.mark(), self._noted, []
        try:
            trial = jax.make_jaxpr(lambda *args: ordinary(eqn, list(args), self._apart))(*map(jax.typeof, values))
            changes = self._noted
        finally:
            self._noted = outer
        if not changes:
            return evaluate(trial, values)
        if name == "scan" and not runs:
            return evaluate(trial, values)
        self._session.rewind(asked)
        self._write[id(eqn)] = eqn
        if name == "shard_map":
            return self._once(eqn, values, changes[-1][1])
        if name in _RULES:
            return self._threaded(eqn, values)
        raise refusal(eqn, changes[0][0])

    def _threaded(self, eqn: Any, values: list[Any]) -> list[Any]:
        try:
            return self._by_rule(eqn, values)
        except Unsupported as error:
            if error.hook is None and not error.hooks:
                error.hooks = self._with_state(eqn)
            raise

    def _with_state(self, eqn: Any) -> tuple[Any, ...]:
        """The hooks inside an equation that can reach Python state."""
        bases = list({id(hook.base): hook.base for jaxpr in inner_jaxprs(eqn) for hook, _ in hooks_in(jaxpr)}.values())
        return tuple(base for base in bases if Walk([(hook_name(base), base)], strict=False).containers)

    def _by_rule(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in RUNS_IN_PLACE:
            return rebuild(eqn, values, self._run)
        if name in RUNS_ONCE:
            return self._once(eqn, values)
        rule = {"scan": self._loops.scan, "while": self._loops.while_, "cond": self._cond}[name]
        with _compat.in_place_of(eqn):
            return rule(eqn, values)

    def _apart(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Calls a function that runs hooks in a trace of their own, and puts back what they wrote."""
        start, outside, asked = self._lift.mark(), set(self._session.arrays), self._session.mark()
        with self._loops.putting_back(start):
            result = fn(*args)
            changes = self._lift.changes(start)
            for change in changes:
                tracers = [v for v in values_of(change) if not is_late(v) and isinstance(v, _compat.Tracer)]
                if (stray := next((v for v in tracers if not _compat.is_staged(v)), None)) is not None:
                    raise explain_leak(change.where(), stray)
            needs = self._session.needs[asked[1] :]
            arrays = len(Written(changes, self._session, outside, self._lift.knew(start), needs).take())
            self._noted += [(change._replace(value=None), arrays) for change in changes]
        return result

    def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
        branches, (index, *operands) = eqn.params["branches"], values
        avals = list(map(jax.typeof, operands))
        try:
            slots, bodies = self._settled_branches(branches, avals)
        except DoesNotThread as error:
            raise Unsupported(
                f"a hook inside `cond` writes Python state, and {error}. Keep what changes in numbers and arrays of "
                f"one shape and dtype, or {last_resort()}."
            ) from None
        arrays = [slot for slot in slots if slot.number is None]
        device = [part for _, _, parts, _ in bodies for part in parts]
        shapes = [aval for _, avals, _, _ in bodies for aval in avals]
        n_outs, n_arrays = len(eqn.outvars), len(arrays)
        made, done = [], 0
        for closed, own, _ in ((closed, avals, parts) for (closed, _), avals, parts, _ in bodies):
            made.append(_padded(closed, n_outs + n_arrays, shapes, done))
            done += len(own)
        functions = [lambda *args, jaxpr=jaxpr: evaluate(jaxpr, list(args)) for jaxpr in made]
        outs = jax.lax.switch(index, functions, *operands)
        own, new, decisions = outs[:n_outs], iter(outs[n_outs : n_outs + n_arrays]), outs[n_outs + n_arrays :]
        keys = dict(zip(device, map(self._session.array, decisions), strict=True))
        which = self._session.array(index)
        known = [substitute(updates, keys.get) for (_, updates), _, _, _ in bodies]
        self._session.needs += _needs_after(which, [renamed(needs, keys.get) for *_, needs in bodies])
        finals = []
        for j, slot in enumerate(slots):
            if slot.number is None:
                finals.append(next(new))
                continue
            exprs = [updates[j] for updates in known]
            same = all(expr == exprs[0] for expr in exprs)
            expr = exprs[0] if same else Expr("choose", (slot.number, which, *exprs))
            finals.append(slot.held(number_of(self._session, expr)))
        for slot, value in zip(slots, finals, strict=True):
            self._lift.put(slot.container, slot.key, value)
        return list(own)

    def _settled_branches(self, branches: Sequence[Any], avals: list[Any]) -> tuple[list[Slot], list[Any]]:
        start, asked = self._lift.mark(), self._session.mark()
        if slots := self._loops.expected.slots(branches, start):
            with contextlib.suppress(DoesNotThread):
                return slots, [self._trace_branch(branch, avals, slots) for branch in branches]
            self._session.rewind(asked)
        slots = self._slots_of_branches(branches, avals)
        bodies = [self._trace_branch(branch, avals, slots) for branch in branches]
        self._loops.expected.note(branches, slots, start)
        return slots, bodies

    def _slots_of_branches(self, branches: Sequence[Any], avals: list[Any]) -> list[Slot]:
        """The slots that any branch writes, each of a type that all branches can give it."""
        slots: dict[Any, Slot] = {}
        for branch in branches:
            asked = self._session.mark()
            body = self._loops.trace_body(branch, [], avals, [], -1)
            self._session.rewind(asked)
            if body.appended:
                raise DoesNotThread("it appends to a list")
            for slot in body.slots:
                known = slots.setdefault(slot.place, slot)
                if known.number is not None and slot.number is None:
                    slots[slot.place] = slot
                elif known.number is None and slot.number is None:
                    same_type(known, slot.aval)
        return list(slots.values())

    def _trace_branch(self, branch: Any, avals: list[Any], slots: list[Slot]) -> Any:
        """((jaxpr that returns results, new arrays, arrays of expressions; what numbers become), their avals, they,
        what the branch needs).
        """
        start, outside, asked = self._lift.mark(), set(self._session.arrays), self._session.mark()

        def traced(*flat: Any) -> tuple[Any, list[Any]]:
            with self._loops.putting_back(start):
                outs = self._run(branch, list(flat))
                changed = {(id(c.container), c.key): c.value for c in self._lift.changes(start)}
                finals = [slot.taken(changed.pop(slot.place, slot.init)) for slot in slots]
                if changed:
                    raise DoesNotThread("it is written at times only")
                for slot, final in zip(slots, finals, strict=True):
                    if slot.number is not None and number_type(final) is not slot.number:
                        raise DoesNotThread("a number becomes one of another type")
                pairs = zip(slots, finals, strict=True)
                updates = [ZERO if slot.number is None else expr_of(final) for slot, final in pairs]
                needs = self._session.take_needs(asked)
                parts = arrays_of([*updates, *(need.expr for need in needs)], outside)
                arrays = [self._session.arrays[part] for part in parts]
                new = [slot.on_device(final) for slot, final in zip(slots, finals, strict=True) if slot.number is None]
                return (updates, list(map(jax.typeof, arrays)), parts, needs), [*outs, *new, *arrays]

        closed, (updates, shapes, parts, needs) = traced_with(traced, avals)
        return (closed, updates), shapes, parts, needs

    def _once(self, eqn: Any, values: list[Any], more: int = 0) -> list[Any]:
        """An equation whose body runs once: what was written there is among its results.

        Args:
            more: as how many arrays, in a `shard_map`.
        """
        start = self._lift.mark()
        found: list[Written] = []
        outside, asked = set(self._session.arrays), self._session.mark()

        def run(jaxpr: Any, args: list[Any]) -> list[Any]:
            with self._loops.putting_back(start):
                outs = self._run(jaxpr, args)
                needs, known = self._session.take_needs(asked), self._lift.knew(start)
                found[:] = [Written(self._lift.changes(start), self._session, outside, known, needs)]
                arrays = found[0].take()
                if _compat.binds_axes(eqn):
                    check_the_same_everywhere(eqn, arrays)
                return [*outs, *arrays]

        outs = rebuild(eqn, values, run, more=more)
        n = len(eqn.outvars)
        for change in found[0].filled(outs[n:]):
            self._lift.put(*change)
        return outs[:n]


def _needs_after(which: Expr, branches: list[list[Need]]) -> list[Need]:
    """What branches need: where that depends on the data, only the branch that is taken counts."""
    found = []
    for i, needs in enumerate(branches):
        for need in needs:
            if any(part.op == "device" for part in free(need.expr)):
                others = [need.expr if i == j else ZERO for j in range(len(branches))]
                need = need._replace(expr=Expr("choose", (int, which, *others)))
            found.append(need)
    return found


def _padded(closed: Any, n: int, avals: list[Any], first: int) -> Any:
    """A branch that returns arrays in the places of those of all branches: zeros but for its own, from `first` on."""
    opened, _ = _compat.open_jaxpr(closed)

    def run(*args: Any) -> list[Any]:
        outs = evaluate(closed, list(args))
        own = outs[n:]
        before = [jnp.zeros(aval.shape, aval.dtype) for aval in avals[:first]]
        after = [jnp.zeros(aval.shape, aval.dtype) for aval in avals[first + len(own) :]]
        return [*outs[:n], *before, *own, *after]

    return jax.make_jaxpr(run)(*(v.aval for v in opened.invars))


def check_the_same_everywhere(eqn: Any, arrays: list[Any]) -> None:
    """Raises where hooks inside `shard_map` made arrays of state that may differ from device to device."""
    varying = sorted({axis for array in arrays for axis in _compat.varying_axes(jax.typeof(array))})
    if varying:
        raise Unsupported(
            f"a hook inside `shard_map` writes Python state that varies over the mesh axes {varying}, and there is one "
            "such object for all devices. Reduce what it keeps (jax.lax.psum, pmean) over them."
        )
    if arrays and not eqn.params["check_vma"]:
        raise Unsupported(
            "a hook inside `shard_map(..., check_vma=False)` writes an array to Python state, of which nobody knows "
            "whether it is the same on all devices. Use check_vma=True, or keep numbers there."
        )
