"""Python state that hooks write in the bodies of loops: it becomes carries, and numbers that the host counts on.

A `scan` whose hooks do more than that (Python control flow on what changes, new keys, flags) is unrolled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop import _compat
from jhop._container import Container
from jhop._errors import Unsupported, last_resort
from jhop._expr import OUT_OF_REACH, Expr, const, repeated, substitute
from jhop._interp import evaluate
from jhop._late import is_late
from jhop._leaves import is_number
from jhop._lifted import Need, Session, too_large
from jhop._replay import fits_device, in_all_turns, is_known, number_of
from jhop._scalar import Scalar, is_scalar
from jhop._slots import (
    ZERO,
    DoesNotThread,
    Expected,
    Slot,
    alike,
    arrays_of,
    expr_of,
    fitting,
    less_dead,
    new_slot,
    refusal,
    renamed,
    traced_with,
    variables,
)
from jhop._state import APPEND, Lift, Mark, Write

MAX_UNROLL = 64  # iterations
_UNKNOWN = Expr("device", ("?",))  # how often a while loop will run
_MAX_TRIES = 8  # traces of a body until the types of its state have settled

Run = Callable[[Any, list[Any]], list[Any]]
Reads = Callable[[list[Slot], int], Collection[int]]


class Body(NamedTuple):
    """A body that was traced.

    Attributes:
        jaxpr: closed. It takes the slots, then the body's own inputs; it returns the slots, the body's own results,
            what was appended to lists, and the arrays of `device`.
        slots: the slots, as they should be.
        settled: whether these are the slots that it was traced with.
        updates: what a number becomes, per slot.
        appended: (list, how many items).
        device: the arrays in `updates` and `needs`.
        needs: what the body needs, and per slot, what it needs to have its number ready for the next turn.
    """

    jaxpr: Any
    slots: list[Slot]
    settled: bool
    updates: list[Expr]
    appended: list[tuple[Container, int]]
    device: list[Expr]
    needs: tuple[list[Need], list[list[Need]]]


class Loops:
    """Threads state through the loops of one graph.

    Args:
        run: evaluates a jaxpr and inlines the hooks in it.
    """

    def __init__(self, lift: Lift, session: Session, run: Run):
        self._lift = lift
        self._session = session
        self._run = run
        self.expected = Expected(session)

    def trace_body(self, jaxpr: Any, consts: list[Any], avals: list[Any], slots: list[Slot], loop: int) -> Body:
        """Traces a body once.

        Args:
            consts: the first inputs of the body, which may belong to traces around it.
            avals: the avals of the others.
            loop: what numbers in slots are called by.

        Raises:
            DoesNotThread: hooks do something else to state than to give slots new numbers and arrays.
        """
        start, outside, asked = self._lift.mark(), set(self._session.arrays), self._session.mark()
        kinds = [slot.kind for slot in slots]

        def traced(*flat: Any) -> tuple[Body, list[Any]]:
            with self.putting_back(start):
                symbols = self._put_symbols(slots, flat, loop)
                before = self._lift.mark()
                outs = self._run(jaxpr, [*consts, *flat[len(slots) :]])
                body, (state, appended, device) = self._ends(
                    slots, symbols, self._lift.changes(before), start, outside, self._session.take_needs(asked)
                )
            return body, [*state, *outs, *appended, *device]

        closed, body = traced_with(traced, [*(slot.aval for slot in slots), *avals])
        if loop in self._session.varied:
            raise DoesNotThread("Python control flow depends on it")
        return body._replace(jaxpr=closed, settled=body.settled and kinds == [slot.kind for slot in slots])

    @contextlib.contextmanager
    def putting_back(self, start: list[Mark]) -> Iterator[None]:
        """A trace of a body: afterwards, objects hold again what they did, and the session's numbers are let go of."""
        with self._session.inner_trace():
            try:
                yield
            finally:
                self._lift.back_to(start)

    def _put_symbols(self, slots: list[Slot], values: Sequence[Any], loop: int) -> list[Any]:
        symbols = []
        for j, (slot, value) in enumerate(zip(slots, values, strict=False)):
            symbol = value
            if slot.number is not None:
                expr = Expr("loop", (loop, j))
                now = slot.taken(slot.init)
                now = now._value if is_scalar(now) else now
                rounded = slot.number is int and jnp.issubdtype(slot.aval.dtype, jnp.inexact)
                needs = (const(OUT_OF_REACH) if rounded else expr,)
                symbol = self._session.symbols[expr] = Scalar(self._session, expr, slot.number(now), value, needs)
                self._session.note_step(symbol)
            self._lift.put(slot.container, slot.key, slot.held(symbol))
            symbols.append(symbol)
        return symbols

    def _ends(
        self, slots: list[Slot], symbols: list[Any], changes: list[Write], start: list[Mark], outside: set[Expr],
        needs: list[Need],
    ) -> tuple[Body, tuple[list[Any], list[Any], list[Any]]]:  # fmt: skip
        """What a body made of state: what is known of it, and (the slots' values, what was appended, other arrays)."""
        changed = {(id(change.container), change.key): change for change in changes}
        wanted, finals, updates = [], [], []
        for slot, symbol in zip(slots, symbols, strict=True):
            change = changed.pop(slot.place, None)
            final = slot.held(symbol) if change is None else change.value
            wanted.append(fitting(slot, final, self._session))
            final = slot.taken(final)
            finals.append(final)
            updates.append(final._expr if is_scalar(final) else const(final if is_number(final) else 0))
        appended, lists = [], []
        for change in changed.values():
            if change.key is APPEND:
                if not all(not is_late(value) and isinstance(value, jax.Array) for value in change.value):
                    raise DoesNotThread("where it appends what is no array to a list")
                appended += change.value
                lists.append((change.container, len(change.value)))
            else:
                wanted.append(new_slot(change, start, self._session))
        settled = len(wanted) == len(slots) and all(map(alike, wanted, slots))
        of_slots = [self._session.needs_of(final) if is_scalar(final) else [] for final in finals]
        device = arrays_of([*updates, *(need.expr for group in [needs, *of_slots] for need in group)], outside)
        arrays = [self._session.arrays[part] for part in device]
        state = [slot.on_device(final) for slot, final in zip(slots, finals, strict=True)] if settled else []
        return Body(None, wanted, settled, updates, lists, device, (needs, of_slots)), (state, appended, arrays)

    def _settled_body(
        self, jaxpr: Any, consts: list[Any], avals: list[Any], length: Expr, reads: Reads = lambda *_: ()
    ) -> tuple[Body, int]:
        """The body of a loop, traced until the types of its slots stay the same; and what its numbers are called by.

        Args:
            length: how often the loop will run.
            reads: the places of slots that something else than the body reads at each turn.
        """
        start = self._lift.mark()
        slots = self.expected.slots(jaxpr, start)
        for _ in range(_MAX_TRIES):
            asked, loop = self._session.mark(), self._session.new_key()
            body = self.trace_body(jaxpr, consts, avals, slots, loop)
            if body.settled:
                self.expected.note(jaxpr, body.slots, start)
                body = _less_what_nobody_reads(body, reads(body.slots, loop))
                self._check_needs(body, loop, length)
                return body, loop
            self._session.rewind(asked)
            slots = body.slots
        raise DoesNotThread("whose type changes at each iteration")

    def _check_needs(self, body: Body, loop: int, length: Expr) -> None:
        """Raises where a body needs larger ints than the device has, if that is known."""
        needs = self._needs_after(body, loop, length, tuple(body.updates), (), lambda _: None)
        known = [need for need in needs if is_known(need.expr)]
        if not fits_device(self._session, *(need.expr for need in known)):
            raise DoesNotThread(too_large(known[0].hook))

    def _needs_after(
        self, body: Body, loop: int, length: Expr, updates: Any, keys: Any, change: Callable[[Expr], Expr | None]
    ) -> list[Need]:
        """What a body needs in all its turns, of what is around the loop."""
        carried = [j for j, slot in enumerate(body.slots) if slot.aval is not None]
        inner = renamed([*body.needs[0], *(need for j in carried for need in body.needs[1][j])], change)
        needs = []
        for hook in dict.fromkeys(need.hook for need in inner):
            exprs = [need.expr for need in inner if need.hook == hook]
            needs += [Need(e, hook) for e in in_all_turns(loop, length, _inits(body), updates, keys, exprs)]
        return needs

    def scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_consts, n_carry = _compat.scan_split(params)
        consts, carry, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
        avals = [v.aval for v in _compat.open_jaxpr(params["jaxpr"])[0].invars[n_consts:]]
        asked = self._session.mark()
        try:
            length = const(params["length"])
            body, loop = self._settled_body(params["jaxpr"], consts, avals, length)
        except DoesNotThread as error:
            self._session.rewind(asked)
            if params["length"] > MAX_UNROLL:
                raise Unsupported(
                    f"a hook inside a `scan` of {params['length']} iterations writes Python state, and {error}: such a "
                    f"scan is unrolled, up to {MAX_UNROLL} iterations. Keep what changes in numbers and arrays of one "
                    f"shape and dtype, and use jnp.where on them, or {last_resort()}."
                ) from None
            return self._unrolled(params, consts, carry, xs)
        carried = [slot for slot in body.slots if slot.aval is not None]
        n_state, n_own = len(carried), len(eqn.outvars) - n_carry

        def step(state_and_carry: Any, x: Any) -> Any:
            outs = evaluate(body.jaxpr, [*state_and_carry[0], *state_and_carry[1], *x])
            state, own = outs[:n_state], outs[n_state : n_state + n_carry]
            return (state, own), outs[n_state + n_carry :]

        options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
        start = [slot.on_device(slot.taken(slot.init)) for slot in carried]
        (state, carry), ys = jax.lax.scan(step, (start, carry), xs, **options)
        appended, device = ys[n_own : len(ys) - len(body.device)], ys[len(ys) - len(body.device) :]
        if params["reverse"]:
            device = [jnp.flip(array, 0) for array in device]
        self._leave_loop(body, loop, length, state, device)
        turns = range(params["length"])
        for i in reversed(turns) if params["reverse"] else turns:
            rest = iter(appended)
            for container, count in body.appended:
                items = [jax.lax.index_in_dim(next(rest), i, keepdims=False) for _ in range(count)]
                self._lift.put(container, APPEND, items)
        return [*carry, *ys[:n_own]]

    def _unrolled(self, params: Any, consts: list[Any], carry: list[Any], xs: list[Any]) -> list[Any]:
        turns = range(params["length"])
        rows: list[Any] = [None] * len(turns)
        for i in reversed(turns) if params["reverse"] else turns:
            x = [jax.lax.index_in_dim(array, i, keepdims=False) for array in xs]
            outs = self._run(params["jaxpr"], [*consts, *carry, *x])
            carry, rows[i] = outs[: len(carry)], outs[len(carry) :]
        return [*carry, *(jnp.stack(column) for column in zip(*rows, strict=True))]

    def while_(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond, consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
        avals = list(map(jax.typeof, init))
        condition: list[Any] = []
        needs: list[Need] = []

        def reads(slots: list[Slot], loop: int) -> Collection[int]:
            condition[:], needs[:] = self._trace_condition(eqn, cond, avals, slots, loop)
            opened, _ = _compat.open_jaxpr(condition[0])
            live = variables([*opened.outvars, *(atom for inner in opened.eqns for atom in inner.invars)])
            return [j for j in range(len(slots)) if opened.invars[j] in live]

        try:
            body, loop = self._settled_body(params["body_jaxpr"], consts, avals, _UNKNOWN, reads)
            body.needs[0].extend(needs)
        except DoesNotThread as error:
            raise Unsupported(
                f"a hook inside a `while` loop writes Python state, and {error}. Keep what changes in numbers and "
                f"arrays of one shape and dtype, and use jnp.where on them, or {last_resort()}."
            ) from None
        if body.appended or body.device:
            raise Unsupported(
                "a hook inside a `while` loop appends to a list, or counts in a branch: nobody knows how often the "
                f"loop will run. Write numbers and arrays there, use lax.scan, or {last_resort()}."
            )
        carried = [slot for slot in body.slots if slot.aval is not None]
        n_state = len(carried)

        def step(carry: Any) -> Any:
            outs = evaluate(body.jaxpr, [*carry[1], *carry[2]])
            return carry[0] + 1, outs[:n_state], outs[n_state:]

        unread = [jnp.zeros((), v.aval.dtype) for v in _compat.open_jaxpr(condition[0])[0].invars[: len(body.slots)]]

        def goes_on(carry: Any) -> Any:
            state = iter(carry[1])
            held = [zero if slot.aval is None else next(state) for slot, zero in zip(body.slots, unread, strict=True)]
            return evaluate(condition[0], [*held, *carry[2]])[0]

        start = [slot.on_device(slot.taken(slot.init)) for slot in carried]
        count, state, outs = jax.lax.while_loop(goes_on, step, (jnp.int32(0), start, init))
        self._leave_loop(body, loop, self._session.array(count), state, [])
        return outs

    def _trace_condition(
        self, eqn: Any, consts: list[Any], avals: list[Any], slots: list[Slot], loop: int
    ) -> tuple[list[Any], list[Need]]:
        """A loop's condition as a jaxpr of what the slots hold and the loop's carries, in a list, and what it needs.

        It may read state, not write.
        """
        start, asked = self._lift.mark(), self._session.mark()

        def traced(*flat: Any) -> tuple[None, list[Any]]:
            with self.putting_back(start):
                self._put_symbols(slots, flat, loop)
                before = self._lift.mark()
                outs = self._run(eqn.params["cond_jaxpr"], [*consts, *flat[len(slots) :]])
                if changes := self._lift.changes(before):
                    raise refusal(eqn, changes[0], "in the loop's condition")
            return None, outs

        closed, _ = traced_with(traced, [*(slot.aval for slot in slots), *avals])
        if loop in self._session.varied:
            raise DoesNotThread("Python control flow in the loop's condition depends on it")
        return [closed], self._session.take_needs(asked)

    def _leave_loop(self, body: Body, loop: int, length: Expr, state: list[Any], device: list[Any]) -> None:
        """Writes what slots hold after a loop."""
        keys = tuple(map(self._session.array, device))
        places = {part: Expr("each", (loop, m)) for m, part in enumerate(body.device)}
        updates = tuple(substitute(body.updates, places.get))
        inits = _inits(body)
        arrays = iter(state)
        finals: list[Any] = []
        for j, slot in enumerate(body.slots):
            value = next(arrays) if slot.aval is not None else None
            if slot.number is not None:
                expr = repeated(slot.number, loop, length, j, inits, updates, keys)
                value = slot.init if expr is inits[j] else slot.held(number_of(self._session, expr))
            finals.append(value)
        for slot, value in zip(body.slots, finals, strict=True):
            self._lift.put(slot.container, slot.key, value)
        needs = self._needs_after(body, loop, length, updates, keys, places.get)
        self._session.needs += [need for need in needs if not is_known(need.expr)]


def _inits(body: Body) -> tuple[Expr, ...]:
    return tuple(ZERO if slot.number is None else expr_of(slot.taken(slot.init)) for slot in body.slots)


def _less_what_nobody_reads(body: Body, read: Collection[int]) -> Body:
    """Numbers that nothing on the device depends on are left to the host: their slots get no aval."""
    opened, _ = _compat.open_jaxpr(body.jaxpr)
    n = len(body.slots)
    live = variables(opened.outvars[n:])
    kept = [slot.number is None or j in read for j, slot in enumerate(body.slots)]
    while True:
        live |= variables(v for v, keep in zip(opened.outvars, kept, strict=False) if keep)
        for eqn in reversed(opened.eqns):
            if eqn.effects or not live.isdisjoint(eqn.outvars):
                live |= variables(eqn.invars)
        now = [keep or v in live for v, keep in zip(opened.invars, kept, strict=False)]
        if now == kept:
            break
        kept = now
    slots = [
        slot if keep else dataclasses.replace(slot, aval=None) for slot, keep in zip(body.slots, kept, strict=True)
    ]
    dead = [i for i, keep in enumerate(kept) if not keep]
    return body._replace(jaxpr=less_dead(body.jaxpr, dead), slots=slots)
