"""Python state through control flow: what hooks write in loops, branches and calls goes along and out as values.

The body of a higher-order equation is traced with symbols for the state that its hooks write, and afterwards the
objects are put back. What was written becomes further carries of a loop and further results of a branch or a call; a
number becomes an expression that the host evaluates (`_replay`). Then the new values are written to the objects, as a
hook outside would have done, so that hooks which come later see them.

A `scan` whose hooks do more than that (Python control flow on what changes, new keys, flags) is unrolled.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._container import MISSING, Container
from jhop._errors import Unsupported
from jhop._interp import evaluate
from jhop._lifted import Session
from jhop._rebuild import RUNS_IN_PLACE, RUNS_ONCE, rebuild
from jhop._replay import as_number, number_of, replay_p
from jhop._scalar import Expr, Scalar, device_kind, free, is_scalar, scalar_p, substitute, weak_aval
from jhop._state import APPEND, Lift, Mark, Write
from jhop._walk import is_number

MAX_UNROLL = 64  # iterations
_MAX_TRIES = 8  # traces of a body until the types of its state have settled

Run = Callable[[Any, list[Any]], list[Any]]


class _DoesNotThread(Exception):
    """What a body does to state cannot be a carry of a loop."""


@dataclasses.dataclass
class _Slot:
    """A slot that a body writes.

    Attributes:
        init: what it holds before.
        number: the Python type of a number; None for an array.
        aval: of what stands for it in the body.
    """

    container: Container
    key: Any
    init: Any
    number: type | None
    aval: Any

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.container), self.key

    def on_device(self, value: Any) -> Any:
        """A value of the slot as the device has it."""
        if self.number is not None:
            twin = value._twin if is_scalar(value) else jnp.asarray(value)
            return as_number(twin, float if jnp.issubdtype(self.aval.dtype, jnp.inexact) else int)
        value = jnp.asarray(value._twin if is_scalar(value) else value)
        value = _compat.with_weak_type(jax.lax.convert_element_type(value, self.aval.dtype), self.aval.weak_type)
        return _compat.as_varying_as(value, self.aval)


class _Body(NamedTuple):
    """A body that was traced.

    Attributes:
        jaxpr: closed. It takes the slots, then the body's own inputs; it returns the slots, the body's own results,
            what was appended to lists, and the arrays of `device`.
        slots: the slots, as they should be.
        settled: whether these are the slots that it was traced with.
        updates: what a number becomes, per slot.
        appended: (list, how many items).
        device: the arrays in `updates`.
    """

    jaxpr: Any
    slots: list[_Slot]
    settled: bool
    updates: list[Expr]
    appended: list[tuple[Container, int]]
    device: list[Expr]


class Threads:
    """Threads state through the higher-order equations of one graph.

    Args:
        run: evaluates a jaxpr and inlines the hooks in it.
    """

    def __init__(self, lift: Lift, session: Session, run: Run):
        self._lift = lift
        self._session = session
        self._run = run
        self._noted: list[Write] = []

    def inline(self, eqn: Any, values: list[Any], ordinary: Callable[..., list[Any]]) -> list[Any]:
        """Inlines the hooks inside an equation.

        Args:
            ordinary: `ordinary(eqn, values, apart)` does it where the hooks write no state.

        Raises:
            Unsupported: what they write cannot be threaded.
        """
        start, answers, outer = self._lift.mark(), len(self._session.answers), self._noted
        changes = self._noted = []
        try:
            with self._session.inner_trace():
                trial = jax.make_jaxpr(lambda *args: ordinary(eqn, list(args), self._apart))(*map(jax.typeof, values))
            changes += self._lift.changes(start)
        finally:
            self._lift.back_to(start)
            self._noted = outer
        if not changes:
            return evaluate(trial, values)
        name = eqn.primitive.name
        if name == "scan" and eqn.params["length"] == 0:
            return evaluate(trial, values)
        del self._session.answers[answers:]
        if name in RUNS_IN_PLACE:
            return rebuild(eqn, values, self._run)
        if name in RUNS_ONCE:
            return self._once(eqn, values, changes)
        for known, rule in (("scan", self._scan), ("while", self._while), ("cond", self._cond)):
            if name == known:
                with _compat.in_place_of(eqn):
                    return rule(eqn, values)
        raise self._refused(eqn, changes[0])

    def _apart(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Calls a function that runs hooks, and puts back what they wrote: it belongs to the trace of that call."""
        start = self._lift.mark()
        try:
            return fn(*args)
        finally:
            self._noted += self._lift.changes(start)
            self._lift.back_to(start)

    def _refused(self, eqn: Any, change: Write | _Slot, why: str = "") -> Unsupported:
        place = change.container.path if change.key is None else change.container.path_of(change.key)
        if change.key is APPEND:
            place = change.container.path
        return Unsupported(
            f"a hook inside `{eqn.primitive}` writes Python state (`{place}`){why and f', {why}'}. Keep there what "
            "changes in numbers and arrays of one shape and dtype, move the hooked value out, or carry the state "
            "through it as an array."
        )

    # -- bodies ---------------------------------------------------------------------------------------------------------

    def _trace_body(self, jaxpr: Any, consts: list[Any], avals: list[Any], slots: list[_Slot], loop: int) -> _Body:
        """Traces a body once.

        Args:
            consts: the first inputs of the body, which may belong to traces around it.
            avals: the avals of the others.
            loop: what numbers in slots are called by.

        Raises:
            _DoesNotThread: hooks do something else to state than to give slots new numbers and arrays.
        """
        start = self._lift.mark()

        def traced(*flat: Any) -> tuple[_Body, list[Any]]:
            with self._putting_back(start):
                symbols = self._put_symbols(slots, flat, loop)
                before = self._lift.mark()
                outs = self._run(jaxpr, [*consts, *flat[len(slots) :]])
                body, (state, appended, device) = self._ends(slots, symbols, self._lift.changes(before), start)
            return body, [*state, *outs, *appended, *device]

        closed, body = _traced(traced, [*(slot.aval for slot in slots), *avals])
        if loop in self._session.varied:
            raise _DoesNotThread("Python control flow depends on it")
        return body._replace(jaxpr=closed)

    @contextlib.contextmanager
    def _putting_back(self, start: list[Mark]) -> Iterator[None]:
        """A trace of a body: afterwards, objects hold again what they did, and the session's numbers are let go of."""
        with self._session.inner_trace():
            try:
                yield
            finally:
                self._lift.back_to(start)

    def _put_symbols(self, slots: list[_Slot], values: Sequence[Any], loop: int) -> list[Any]:
        symbols = []
        for j, (slot, value) in enumerate(zip(slots, values, strict=False)):
            symbol = value
            if slot.number is not None:
                expr = Expr("loop", (loop, j))
                now = slot.init._value if is_scalar(slot.init) else slot.init
                symbol = self._session.symbols[expr] = Scalar(self._session, expr, slot.number(now), value)
                self._session.note_step(symbol)
            self._lift.put(slot.container, slot.key, symbol)
            symbols.append(symbol)
        return symbols

    def _ends(
        self, slots: list[_Slot], symbols: list[Any], changes: list[Write], start: list[Mark]
    ) -> tuple[_Body, tuple[list[Any], list[Any], list[Any]]]:
        """What a body made of state: what is known of it, and (the slots' values, what was appended, other arrays)."""
        changed = {(id(change.container), change.key): change for change in changes}
        wanted, finals, updates = [], [], []
        for slot, symbol in zip(slots, symbols, strict=True):
            change = changed.pop(slot.place, None)
            final = symbol if change is None else change.value
            wanted.append(_fitting(slot, final))
            finals.append(final)
            updates.append(final._expr if is_scalar(final) else Expr("const", (final if is_number(final) else 0,)))
        appended, lists = [], []
        for change in changed.values():
            if change.key is APPEND:
                if not all(isinstance(value, jax.Array) for value in change.value):
                    raise _DoesNotThread("where it appends what is no array to a list")
                appended += change.value
                lists.append((change.container, len(change.value)))
            else:
                wanted.append(_new_slot(change, start))
        settled = len(wanted) == len(slots) and all(map(_alike, wanted, slots))
        device = list({part: None for expr in updates for part in free(expr) if part.op == "device"})
        arrays = [self._session.arrays[part] for part in device]
        state = [slot.on_device(final) for slot, final in zip(slots, finals, strict=True)] if settled else []
        return _Body(None, wanted, settled, updates, lists, device), (state, appended, arrays)

    def _settled_body(self, jaxpr: Any, consts: list[Any], avals: list[Any]) -> tuple[_Body, int]:
        """The body of a loop, traced until the types of its slots stay the same; and what its numbers are called by."""
        slots: list[_Slot] = []
        for _ in range(_MAX_TRIES):
            answers, loop = len(self._session.answers), self._session.new_key()
            body = self._trace_body(jaxpr, consts, avals, slots, loop)
            if body.settled:
                return _less_what_nobody_reads(body), loop
            del self._session.answers[answers:]
            slots = body.slots
        raise _DoesNotThread("whose type changes at each iteration")

    # -- loops ----------------------------------------------------------------------------------------------------------

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_consts, n_carry = _compat.scan_split(params)
        consts, carry, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
        avals = [v.aval for v in _compat.open_jaxpr(params["jaxpr"])[0].invars[n_consts:]]
        answers = len(self._session.answers)
        try:
            body, loop = self._settled_body(params["jaxpr"], consts, avals)
        except _DoesNotThread as error:
            del self._session.answers[answers:]
            if params["length"] > MAX_UNROLL:
                raise Unsupported(
                    f"a hook inside a `scan` of {params['length']} iterations writes Python state, and {error}: such a "
                    f"scan is unrolled, up to {MAX_UNROLL} iterations. Keep what changes in numbers and arrays of one "
                    "shape and dtype, and use jnp.where on them."
                ) from None
            return self._unrolled(params, consts, carry, xs)
        carried = [slot for slot in body.slots if slot.aval is not None]
        n_state, n_own = len(carried), len(eqn.outvars) - n_carry

        def step(state_and_carry: Any, x: Any) -> Any:
            outs = evaluate(body.jaxpr, [*state_and_carry[0], *state_and_carry[1], *x])
            state, own = outs[:n_state], outs[n_state : n_state + n_carry]
            return (state, own), outs[n_state + n_carry :]

        options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
        start = [slot.on_device(slot.init) for slot in carried]
        (state, carry), ys = jax.lax.scan(step, (start, carry), xs, **options)
        appended, device = ys[n_own : len(ys) - len(body.device)], ys[len(ys) - len(body.device) :]
        if params["reverse"]:
            device = [jnp.flip(array, 0) for array in device]
        self._leave_loop(body, loop, Expr("const", (params["length"],)), state, device)
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

    def _while(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond, consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
        try:
            # What hooks in the condition write is no state of the body: that is refused below.
            body, loop = self._settled_body(params["body_jaxpr"], consts, [jax.typeof(value) for value in init])
        except _DoesNotThread as error:
            raise Unsupported(
                f"a hook inside a `while` loop writes Python state, and {error}. Keep what changes in numbers and "
                "arrays of one shape and dtype, and use jnp.where on them."
            ) from None
        if body.appended or body.device:
            raise Unsupported(
                "a hook inside a `while` loop appends to a list, or counts in a branch: nobody knows how often the "
                "loop will run. Write numbers and arrays there, or use lax.scan."
            )
        carried = [slot for slot in body.slots if slot.aval is not None]
        n_state = len(carried)

        def step(carry: Any) -> Any:
            outs = evaluate(body.jaxpr, [*carry[1], *carry[2]])
            return carry[0] + 1, outs[:n_state], outs[n_state:]

        def goes_on(carry: Any) -> Any:
            before = self._lift.mark()
            (answer,) = self._run(params["cond_jaxpr"], [*cond, *carry[2]])
            if changes := self._lift.changes(before):
                self._lift.back_to(before)
                raise self._refused(eqn, changes[0], "in the loop's condition")
            return answer

        start = [slot.on_device(slot.init) for slot in carried]
        count, state, outs = jax.lax.while_loop(goes_on, step, (jnp.int32(0), start, init))
        self._leave_loop(body, loop, self._session.array(count), state, [])
        return outs

    def _leave_loop(self, body: _Body, loop: int, length: Expr, state: list[Any], device: list[Any]) -> None:
        """Writes what slots hold after a loop."""
        keys = tuple(map(self._session.array, device))
        places = {part: Expr("each", (loop, m)) for m, part in enumerate(body.device)}
        updates = tuple(substitute(expr, places.get) for expr in body.updates)
        zero = Expr("const", (0,))
        inits = tuple(zero if slot.number is None else _expr_of(slot.init) for slot in body.slots)
        arrays = iter(state)
        finals: list[Any] = []
        for j, slot in enumerate(body.slots):
            value = next(arrays) if slot.aval is not None else None
            if slot.number is not None:
                expr = _repeated(slot.number, loop, length, j, inits, updates, keys)
                value = number_of(self._session, expr)
            finals.append(value)
        for slot, value in zip(body.slots, finals, strict=True):
            self._lift.put(slot.container, slot.key, value)

    # -- branches and calls ---------------------------------------------------------------------------------------------

    def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
        branches, (index, *operands) = eqn.params["branches"], values
        avals = list(map(jax.typeof, operands))
        try:
            slots = self._slots_of_branches(branches, avals)
            bodies = [self._trace_branch(branch, avals, slots) for branch in branches]
        except _DoesNotThread as error:
            raise Unsupported(
                f"a hook inside `cond` writes Python state, and {error}. Keep what changes in numbers and arrays of "
                "one shape and dtype."
            ) from None
        arrays = [slot for slot in slots if slot.number is None]
        device = [part for _, _, parts in bodies for part in parts]
        shapes = [aval for _, avals, _ in bodies for aval in avals]
        n_outs, n_arrays = len(eqn.outvars), len(arrays)
        made, done = [], 0
        for closed, own, _ in ((closed, avals, parts) for (closed, _), avals, parts in bodies):
            made.append(_padded(closed, n_outs + n_arrays, shapes, done))
            done += len(own)
        functions = [lambda *args, jaxpr=jaxpr: evaluate(jaxpr, list(args)) for jaxpr in made]
        outs = jax.lax.switch(index, functions, *operands)
        own, new, decisions = outs[:n_outs], iter(outs[n_outs : n_outs + n_arrays]), outs[n_outs + n_arrays :]
        keys = dict(zip(device, map(self._session.array, decisions), strict=True))
        which = self._session.array(index)
        finals = []
        for j, slot in enumerate(slots):
            if slot.number is None:
                finals.append(next(new))
                continue
            exprs = [substitute(updates[j], keys.get) for (_, updates), _, _ in bodies]
            same = all(expr == exprs[0] for expr in exprs)
            finals.append(
                number_of(self._session, exprs[0] if same else Expr("choose", (slot.number, which, *exprs)))
            )
        for slot, value in zip(slots, finals, strict=True):
            self._lift.put(slot.container, slot.key, value)
        return list(own)

    def _slots_of_branches(self, branches: Sequence[Any], avals: list[Any]) -> list[_Slot]:
        """The slots that any branch writes, each of a type that all branches can give it."""
        slots: dict[Any, _Slot] = {}
        for branch in branches:
            answers = len(self._session.answers)
            body = self._trace_body(branch, [], avals, [], -1)
            del self._session.answers[answers:]
            if body.appended:
                raise _DoesNotThread("it appends to a list")
            for slot in body.slots:
                known = slots.setdefault(slot.place, slot)
                if known.number is not None and slot.number is None:
                    slots[slot.place] = slot
                elif known.number is None and slot.number is None:
                    _same_shape(known, slot.aval)
        return list(slots.values())

    def _trace_branch(self, branch: Any, avals: list[Any], slots: list[_Slot]) -> Any:
        """((jaxpr that returns results, new arrays, arrays of expressions; what numbers become), their avals, they)."""
        start, outside = self._lift.mark(), set(self._session.arrays)

        def traced(*flat: Any) -> tuple[Any, list[Any]]:
            with self._putting_back(start):
                outs = self._run(branch, list(flat))
                changed = {(id(c.container), c.key): c.value for c in self._lift.changes(start)}
                finals = [changed.get(slot.place, slot.init) for slot in slots]
                for slot, final in zip(slots, finals, strict=True):
                    if slot.number is not None and _number_type(final) is not slot.number:
                        raise _DoesNotThread("a number becomes one of another type")
                updates = [Expr("const", (0,)) if s.number is None else _expr_of(f) for s, f in zip(slots, finals)]
                parts = list({p: None for expr in updates for p in free(expr) if p in self._session.arrays})
                parts = [part for part in parts if part not in outside]
                arrays = [self._session.arrays[part] for part in parts]
                new = [slot.on_device(final) for slot, final in zip(slots, finals, strict=True) if slot.number is None]
                return (updates, list(map(jax.typeof, arrays)), parts), [*outs, *new, *arrays]

        closed, (updates, shapes, parts) = _traced(traced, avals)
        return (closed, updates), shapes, parts

    def _once(self, eqn: Any, values: list[Any], changes: list[Write]) -> list[Any]:
        """An equation whose body runs once: what was written there is among its results."""
        start, found = self._lift.mark(), []
        outside = set(self._session.arrays)

        def run(jaxpr: Any, args: list[Any]) -> list[Any]:
            with self._putting_back(start):
                outs = self._run(jaxpr, args)
                found[:] = [_Written(self._lift.changes(start), self._session, outside)]
                return [*outs, *found[0].take()]

        outs = rebuild(eqn, values, run, more=_count_arrays(changes))
        n = len(eqn.outvars)
        for change in found[0].filled(outs[n:]):
            if change.key is None:
                raise self._refused(eqn, change, "whose entries are no longer the same")
            self._lift.put(*change)
        return outs[:n]


def _traced(fn: Callable[..., tuple[Any, list[Any]]], avals: list[Any]) -> tuple[Any, Any]:
    """(jaxpr, what else the function returned) for a function that returns that and the results."""
    found: list[Any] = []

    def run(*flat: Any) -> list[Any]:
        try:
            known, outs = fn(*flat)
        except _DoesNotThread as error:  # raised in a trace, JAX would keep the trace's values
            known, outs = error.with_traceback(None), []
        found.append(known)
        return outs

    closed = jax.make_jaxpr(run)(*avals)
    if isinstance(found[0], _DoesNotThread):
        raise found[0]
    return closed, found[0]


class _Written:
    """What a body wrote, and how it is told outside: arrays are results of the body, numbers are expressions."""

    def __init__(self, changes: list[Write], session: Session, outside: set[Expr]):
        self._changes = changes
        self._session = session
        self._tracers: list[Any] = []
        numbers = [v for c in changes for v in _values_of(c) if is_scalar(v)]
        self._parts = [p for p in dict.fromkeys(p for v in numbers for p in free(v._expr)) if p.op == "device"]
        self._parts = [part for part in self._parts if part not in outside]
        self._specs = [(c.container, c.key, self._spec(c)) for c in changes]
        self._tracers += [session.arrays[part] for part in self._parts]

    def _spec(self, change: Write) -> Any:
        return [self._spec_of(value) for value in _values_of(change)]

    def _spec_of(self, value: Any) -> Any:
        if is_scalar(value):
            return ("number", value._expr)
        if isinstance(value, _compat.Tracer):
            self._tracers.append(value)
            return ("array", len(self._tracers) - 1)
        return ("const", value)

    def take(self) -> list[Any]:
        """The tracers, which are let go of."""
        tracers, self._tracers = self._tracers, []
        self._changes = []
        return tracers

    def filled(self, arrays: list[Any]) -> list[Write]:
        """The changes, with values of the trace around the body."""
        first = len(arrays) - len(self._parts)
        keys = dict(zip(self._parts, map(self._session.array, arrays[first:]), strict=True))

        def value(kind: str, content: Any) -> Any:
            if kind == "number":
                return number_of(self._session, substitute(content, keys.get))
            return arrays[content] if kind == "array" else content

        changes = []
        for container, key, specs in self._specs:
            values = [value(*spec) for spec in specs]
            changes.append(Write(container, key, values if key is APPEND else values[0] if values else None))
        return changes


def _values_of(change: Write) -> list[Any]:
    if change.key is None:
        return []
    return list(change.value) if change.key is APPEND else [change.value]


def _count_arrays(changes: list[Write]) -> int:
    return sum(isinstance(value, _compat.Tracer) for change in changes for value in _values_of(change))


def _number_type(value: Any) -> type | None:
    """The type of a number, lifted or not; None for anything else."""
    if is_scalar(value):
        return type(value._value)
    return type(value) if is_number(value) else None


def _expr_of(number: Any) -> Expr:
    return number._expr if is_scalar(number) else Expr("const", (number,))


def _new_slot(change: Write, start: list[Mark]) -> _Slot:
    """The slot for something that was found to be written."""
    if change.key is None or change.value is MISSING:
        raise _DoesNotThread("what it holds gets other entries")
    items = next(dict(mark.items) for mark in start if mark.container is change.container)
    if change.key not in items:
        raise _DoesNotThread("what it holds gets other entries")
    init = items[change.key]
    number = _number_type(init)
    if number is None and not isinstance(init, (jax.Array, np.ndarray)):
        raise _DoesNotThread(f"it holds a {type(init).__name__}")
    value = init._value if is_scalar(init) else init
    aval = weak_aval(device_kind(value)) if number is not None else jax.typeof(init)
    return _fitting(_Slot(change.container, change.key, init, number, aval), change.value)


def _fitting(slot: _Slot, value: Any) -> _Slot:
    """A slot that can hold a value too which a body put there."""
    number = _number_type(value)
    if slot.number is not None and number is not None:
        kind = float if float in (slot.number, number) else int
        return slot if kind is slot.number else dataclasses.replace(slot, number=kind, aval=weak_aval(kind))
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise _DoesNotThread(f"it holds a {type(value).__name__} then")
    aval = jax.typeof(value)
    if slot.number is not None:
        if aval.shape:
            raise _DoesNotThread("a number becomes an array")
        return dataclasses.replace(slot, number=None, aval=aval)
    _same_shape(slot, aval)
    return slot if slot.aval == aval else dataclasses.replace(slot, aval=aval)


def _same_shape(slot: _Slot, aval: Any) -> None:
    if slot.aval.shape != aval.shape:
        raise _DoesNotThread(f"its shape changes from {slot.aval.shape} to {aval.shape}")


def _alike(one: _Slot, other: _Slot) -> bool:
    return (one.place, one.number, one.aval) == (other.place, other.number, other.aval)


def _repeated(number: type, loop: int, length: Expr, j: int, inits: Any, updates: Any, each: Any) -> Expr:
    """What the j-th of several numbers is after a loop."""
    update, me = updates[j], Expr("loop", (loop, j))
    if update == me:
        return inits[j]
    if not each and number is int and update.op == "add" and update.args[0] == me and update.args[1].op == "const":
        (by,) = update.args[1].args
        if type(by) is int:
            total = Expr("const", (by * length.args[0],)) if length.op == "const" else Expr("mul", (length, update.args[1]))
            if length.op == "const":
                return Expr("add", (inits[j], total))
    return Expr("repeat", (number, loop, length, j, inits, updates, each))


def _less_what_nobody_reads(body: _Body) -> _Body:
    """Numbers that nothing on the device depends on are left to the host: their slots get no aval."""
    opened, consts = _compat.open_jaxpr(body.jaxpr)
    n = len(body.slots)
    live = {v for v in opened.outvars[n:] if not isinstance(v, jex_core.Literal)}
    kept = [slot.number is None for slot in body.slots]
    while True:
        live.update(v for v, keep in zip(opened.outvars, kept, strict=False) if keep)
        for eqn in reversed(opened.eqns):
            if eqn.effects or not live.isdisjoint(eqn.outvars):
                live.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
        now = [keep or v in live for v, keep in zip(opened.invars, kept, strict=False)]
        if now == kept:
            break
        kept = now
    eqns = [eqn for eqn in opened.eqns if eqn.effects or not live.isdisjoint(eqn.outvars)]
    pick = [i for i, keep in enumerate(kept) if keep]
    jaxpr = opened.replace(
        invars=[*(opened.invars[i] for i in pick), *opened.invars[n:]],
        outvars=[*(opened.outvars[i] for i in pick), *opened.outvars[n:]],
        eqns=eqns,
        debug_info=opened.debug_info._replace(arg_names=None, result_paths=None),
    )
    slots = [
        slot if keep else dataclasses.replace(slot, aval=None) for slot, keep in zip(body.slots, kept, strict=True)
    ]
    return body._replace(jaxpr=jex_core.ClosedJaxpr(jaxpr, consts), slots=slots)


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
