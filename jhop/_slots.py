"""What hooks write inside the body of a loop, a branch or a call, and how it is told outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._append import class_name
from jhop._container import MISSING, Container
from jhop._errors import Unsupported
from jhop._expr import Expr, const, free, substitute
from jhop._late import at_place, is_late, may_be_late, place_in
from jhop._leaves import is_number
from jhop._lifted import Need, Session
from jhop._replay import as_number, number_of
from jhop._scalar import device_kind, is_scalar, weak_aval
from jhop._state import APPEND, WHOLE, Mark, Write
from jhop._template import Templates, rebuild


class DoesNotThread(Exception):
    """What a body does to state cannot be a carry of a loop."""


@dataclasses.dataclass
class Slot:
    """A slot that a body writes.

    Attributes:
        init: what it holds before.
        number: the Python type of a number; None for an array.
        aval: of what stands for it in the body.
        table: of the values that it holds at times, where these are neither: its number is the place of one.
    """

    container: Container
    key: Any
    init: Any
    number: type | None
    aval: Any
    table: list[Any] | None = None

    def taken(self, value: Any) -> Any:
        """The number or array for a value of the slot."""
        if self.table is None:
            return value
        if not may_be_late(value, lambda: False):
            raise DoesNotThread(f"it holds a {class_name(value)} then")
        return place_in(self.table, value)

    def held(self, value: Any) -> Any:
        """What the slot holds for a number or array."""
        return value if self.table is None else at_place(self.table, value)

    @property
    def kind(self) -> Any:
        """What else must be the same when a body is traced again."""
        return self.number, self.aval, self.table and len(self.table)

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.container), self.key

    def on_device(self, value: Any) -> Any:
        """A value of the slot as the device has it."""
        if self.number is None:
            check_holds(self.aval, value)
        value = jnp.asarray(value._session.twins_of([value])[0] if is_scalar(value) else value)
        if jax.typeof(value) == self.aval:
            return value
        if self.number is not None:
            return as_number(value, float if jnp.issubdtype(self.aval.dtype, jnp.inexact) else int)
        value = _compat.with_weak_type(jax.lax.convert_element_type(value, self.aval.dtype), self.aval.weak_type)
        return _compat.as_varying_as(value, self.aval)


class Written:
    """What a body wrote, and how it is told outside: arrays are results of the body, numbers are expressions.


    Args:
        known: tells what was there before the body ran.
        needs: those of the body; they become the session's.
    """

    def __init__(
        self,
        changes: list[Write],
        session: Session,
        outside: set[Expr],
        known: Callable[[Any], bool],
        needs: list[Need],
    ):
        self._needs = needs
        self._session = session
        self._numbers: list[Expr] = []
        self._tracers: list[Any] = []
        templates, places = Templates(known, self._note, inside=True), []
        for change in changes:
            made = [templates.make(value, change.where()) for value in values_of(change)]
            places.append((change._replace(value=None), change.value is MISSING, made))
        self._places = places
        self._parts = arrays_of([*self._numbers, *(need.expr for need in needs)], outside)
        self._tracers += [session.arrays[part] for part in self._parts]

    def _note(self, value: Any, where: str) -> int:
        """Numbers are told by places from -1 down, arrays by those from 0 up."""
        if is_scalar(value):
            self._numbers.append(value._expr)
            return -len(self._numbers)
        self._tracers.append(value)
        return len(self._tracers) - 1

    def take(self) -> list[Any]:
        """The tracers, which are let go of."""
        tracers, self._tracers = self._tracers, []
        return tracers

    def filled(self, arrays: list[Any]) -> list[Write]:
        """The changes, with values of the trace around the body."""
        first = len(arrays) - len(self._parts)
        keys = dict(zip(self._parts, map(self._session.array, arrays[first:]), strict=True))

        self._session.needs += renamed(self._needs, keys.get)
        numbers = [number_of(self._session, expr) for expr in substitute(self._numbers, keys.get)]
        outs, made, changes = [*arrays[:first], *reversed(numbers)], dict[int, Any](), []
        for change, gone, templates in self._places:
            values = [rebuild(template, outs, made) for template in templates]
            many = change.key is APPEND or change.key is WHOLE
            changes.append(change._replace(value=MISSING if gone else values if many else values[0]))
        return changes


def values_of(change: Write) -> list[Any]:
    if change.key is APPEND or change.key is WHOLE:
        return list(change.value)
    return [] if change.value is MISSING else [change.value]


ZERO = const(0)


def arrays_of(exprs: Iterable[Expr], outside: Collection[Expr] = ()) -> list[Expr]:
    """What expressions read from the device, less what is known `outside`."""
    parts = dict.fromkeys(part for expr in exprs for part in free(expr))
    return [part for part in parts if part.op == "device" and part not in outside]


def renamed(needs: list[Need], change: Callable[[Expr], Expr | None]) -> list[Need]:
    """Needs with other names for what they read."""
    exprs = substitute([need.expr for need in needs], change)
    return [need._replace(expr=expr) for need, expr in zip(needs, exprs, strict=True)]


def number_type(value: Any) -> type | None:
    """The type of a number, lifted or not; None for anything else."""
    if is_scalar(value):
        return type(value._value)
    return type(value) if is_number(value) else None


def expr_of(number: Any) -> Expr:
    return number._expr if is_scalar(number) else const(number)


def new_slot(change: Write, start: list[Mark], session: Session) -> Slot:
    """The slot for something that was found to be written."""
    if change.key is WHOLE or change.value is MISSING:
        raise DoesNotThread("what it holds gets other entries")
    slot = slot_before(change.container, change.key, start, session)
    if slot is None:
        raise DoesNotThread("what it holds gets other entries")
    return fitting(slot, change.value, session)


def slot_before(container: Container, key: Any, start: list[Mark], session: Session) -> Slot | None:
    """A slot as it is at a mark; None where there is none.

    Raises:
        DoesNotThread: it holds what can only be known in advance.
    """
    items = next(dict(mark.items) for mark in start if mark.container is container)
    if key not in items:
        return None
    init = items[key]
    number = number_type(init)
    if number is None and not _is_array(init):
        if not may_be_late(init, session.asks_identity):
            raise DoesNotThread(f"it holds a {class_name(init)}{_if_identity(session)}")
        return Slot(container, key, init, int, weak_aval(int), session.tables.setdefault((id(container), key), []))
    if number is not None and session.asks_type():
        raise DoesNotThread("hooks ask for types by `type(...)`, not isinstance")
    if number is None or is_scalar(init):
        return Slot(container, key, init, number, jax.typeof(init if number is None else init._twin))
    return Slot(container, key, init, number, weak_aval(device_kind(init)))


class Expected:
    """The slots that bodies wrote when they were traced before, say for the loop around them: they need no search."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._known: dict[int, tuple[Any, list[tuple[Any, Any]]]] = {}  # by id of what is kept here

    def slots(self, body: Any, start: list[Mark]) -> list[Slot]:
        """Those of a body that were noted, if what they hold at a mark is of the types that it was then; else none."""
        _, noted = self._known.get(id(body), (body, []))
        slots = []
        for (container, key, *before), after in noted:
            try:
                slot = slot_before(container, key, start, self._session)
            except DoesNotThread:
                return []
            if slot is None or [slot.number, slot.aval] != before:
                return []
            slots.append(dataclasses.replace(slot, number=after[0], aval=after[1]))
        return slots

    def note(self, body: Any, slots: list[Slot], start: list[Mark]) -> None:
        noted = []
        for slot in slots:
            before = slot_before(slot.container, slot.key, start, self._session)
            assert before is not None
            noted.append(((slot.container, slot.key, before.number, before.aval), (slot.number, slot.aval)))
        self._known[id(body)] = body, noted


def fitting(slot: Slot, value: Any, session: Session) -> Slot:
    """A slot that can hold a value too which a body put there."""
    if slot.table is not None:
        if not may_be_late(value, session.asks_identity):
            raise DoesNotThread(f"it holds a {class_name(value)} then")
        return slot
    number = number_type(value)
    if slot.number is not None and number is not None:
        kind = float if float in (slot.number, number) else int
        if is_scalar(value) and jnp.issubdtype(value._twin.dtype, jnp.inexact):  # an int that the device had to round
            return dataclasses.replace(slot, number=kind, aval=weak_aval(float))
        return slot if kind is slot.number else dataclasses.replace(slot, number=kind, aval=weak_aval(kind))
    if not _is_array(value):
        raise DoesNotThread(f"it holds a {class_name(value)} then")
    aval = jax.typeof(value)
    if slot.number is not None:
        if aval.shape:
            raise DoesNotThread("a number becomes an array")
        check_holds(aval, slot.init)
        return dataclasses.replace(slot, number=None, aval=aval)
    same_type(slot, aval)
    return slot if slot.aval == aval else dataclasses.replace(slot, aval=aval)


def _is_array(value: Any) -> bool:
    return not is_late(value) and isinstance(value, (jax.Array, np.ndarray))


def _if_identity(session: Session) -> str:
    return ", and hooks compare by `is`" if session.asks_identity() else ""


def check_holds(aval: Any, value: Any) -> None:
    """Raises where an array is no place for a number which the slot holds at other times."""
    if number_type(value) is float and not jnp.issubdtype(aval.dtype, jnp.inexact):
        raise DoesNotThread(f"a float becomes an array of {aval.dtype}")


def same_type(slot: Slot, aval: Any) -> None:
    if slot.aval.dtype != aval.dtype:
        raise DoesNotThread(f"its dtype changes from {slot.aval.dtype} to {aval.dtype}")
    if slot.aval.shape != aval.shape:
        raise DoesNotThread(f"its shape changes from {slot.aval.shape} to {aval.shape}")


def alike(one: Slot, other: Slot) -> bool:
    return (one.place, one.number, one.aval) == (other.place, other.number, other.aval)


def traced_with(fn: Callable[..., tuple[Any, list[Any]]], avals: list[Any]) -> tuple[Any, Any]:
    """(jaxpr, what else the function returned) for a function that returns that and the results."""
    found: list[Any] = []

    def run(*flat: Any) -> list[Any]:
        try:
            known, outs = fn(*flat)
        except DoesNotThread as error:  # raised in a trace, JAX would keep the trace's values
            known, outs = error.with_traceback(None), []
        found.append(known)
        return outs

    closed = jax.make_jaxpr(run)(*avals)
    if isinstance(found[0], DoesNotThread):
        raise found[0]
    return less_dead(closed), found[0]


def less_dead(closed: Any, dead: Collection[int] = ()) -> Any:
    """A jaxpr less the equations and constants that no result depends on: numbers leave such steps behind.

    Args:
        dead: places of results, and inputs, that are left out too.
    """
    opened, consts = _compat.open_jaxpr(closed)
    outs = [v for i, v in enumerate(opened.outvars) if i not in dead]
    live, eqns = variables(outs), []
    for eqn in reversed(opened.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            eqns.append(eqn)
            live |= variables(eqn.invars)
    kept = [(v, const) for v, const in zip(opened.constvars, consts, strict=True) if v in live]
    jaxpr = opened.replace(
        constvars=[v for v, _ in kept],
        invars=[v for i, v in enumerate(opened.invars) if i not in dead],
        outvars=outs,
        eqns=eqns[::-1],
        debug_info=opened.debug_info._replace(arg_names=None, result_paths=None),
    )
    return jex_core.ClosedJaxpr(jaxpr, [const for _, const in kept])


def variables(atoms: Iterable[Any]) -> set[Any]:
    """The atoms that are no literals."""
    return {atom for atom in atoms if not isinstance(atom, jex_core.Literal)}


def refusal(eqn: Any, change: Write, why: str = "") -> Unsupported:
    return Unsupported(
        f"a hook inside `{eqn.primitive}` writes Python state (`{change.where()}`){why and f', {why}'}. Keep there "
        "what changes in numbers and arrays of one shape and dtype, move the hooked value out, or carry the state "
        "through it as an array."
    )
