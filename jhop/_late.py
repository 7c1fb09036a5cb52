"""Flags, strings and the like that hooks write in branches and loops: which one it is, the host knows after the run.

A slot that holds such values has a table of them, and what stands for its value is a number, the place in that table.
So it goes through control flow as any number does. A `Late` is what hooks meet in the slot meanwhile: they may put
another value there, or copy it, but whatever asks for the value asks for the number.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._expr import Expr, const
from jhop._replay import number_of
from jhop._scalar import is_scalar
from jhop._source import with_nested

_PLAIN = (str, bytes, complex, int, float)  # that nobody compares by `is`


class Late:
    """A value of a table, at a place that a `Scalar` stands for. Arithmetic gives one with another table."""

    __slots__ = ("_number", "_table")

    def __init__(self, number: Any, table: list[Any]):
        self._number = number
        self._table = table

    @property  # type: ignore[misc]
    def __class__(self):
        kinds = {type(value) for value in self._table}
        return kinds.pop() if len(kinds) == 1 else type(_asked(self))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):  # NumPy computes at once
            raise AttributeError(name)
        return getattr(_asked(self), name)

    def __jax_array__(self) -> Any:
        values = [np.asarray(value) for value in self._table]
        if len({value.dtype for value in values}) > 1 or not all(map(_is_numpy, self._table)):
            return np.asarray(_asked(self))
        return jnp.stack(values)[self._number._session.used(self._number)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _asked(self).__reduce_ex__(protocol)


def _is_numpy(value: Any) -> bool:
    return isinstance(value, (bool, np.generic))


def is_late(value: Any) -> bool:
    """Whether a value is a `Late`."""
    return type(value) is Late


def _asked(value: Any) -> Any:
    """The present value; asking for it is noted as a question of the number."""
    number = value._number
    number._session.guard(Expr("eq", (number._expr, const(number._value))), True)
    return value._table[number._value if number._value < len(value._table) else 0]


def _question(apply: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        return apply(_asked(self), *others)

    return method


def _operator(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An operation, done to each value of the table."""

    def method(self: Any, *others: Any) -> Any:
        if any(isinstance(other, jax.Array) for other in others):
            return apply(self.__jax_array__(), *others)
        if all(map(_is_plain, others)):
            with contextlib.suppress(Exception):
                return Late(self._number, [apply(value, *others) for value in self._table])
        return apply(_asked(self), *others)

    return method


def _swapped(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, other: apply(other, value)


_QUESTIONS: dict[str, Callable[..., Any]] = {
    "bool": bool, "hash": hash, "str": str, "repr": repr, "len": len, "iter": iter, "int": int, "float": float,
    "complex": complex, "index": operator.index, "format": format, "round": round, "bytes": bytes, "array": np.asarray,
    "contains": operator.contains, "call": operator.call,
}  # fmt: skip
_OPERATORS = "lt le eq ne gt ge neg pos invert abs getitem".split()
_INFIX = "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift".split()
for _name, _apply in _QUESTIONS.items():
    setattr(Late, f"__{_name}__", _question(_apply))
for _name in _OPERATORS:
    setattr(Late, f"__{_name}__", _operator(getattr(operator, _name)))
for _name in _INFIX:
    setattr(Late, f"__{_name.rstrip('_')}__", _operator(getattr(operator, _name)))
    setattr(Late, f"__r{_name.rstrip('_')}__", _operator(_swapped(getattr(operator, _name))))


def _is_plain(value: Any) -> bool:
    return type(value) is bool or type(value) in _PLAIN or isinstance(value, np.generic)


def may_be_late(value: Any, asks_identity: Callable[[], bool]) -> bool:
    """Whether a value may be one of a table's.

    Args:
        asks_identity: whether hooks' code compares by `is`, which a `Late` does not notice.
    """
    if is_late(value):
        return True
    if is_scalar(value):
        return False
    if type(value) is tuple:
        return all(may_be_late(item, lambda: False) for item in value) and not asks_identity()
    if type(value) in _PLAIN or isinstance(value, np.generic):
        return True
    return (value is None or isinstance(value, (bool, enum.Enum))) and not asks_identity()


def place_in(table: list[Any], value: Any) -> Any:
    """The number of a value: its place in the table, where it is put if it is new."""
    if is_late(value):
        number, places = value._number, [place_in(table, item) for item in value._table]
        if places == list(range(len(places))):
            return number
        return number_of(number._session, Expr("choose", (int, number._expr, *map(const, places))))
    for place, known in enumerate(table):
        if known is value or (type(known) is type(value) and repr(known) == repr(value)):
            return place
    table.append(value)
    return len(table) - 1


def at_place(table: list[Any], number: Any) -> Any:
    """What stands for the value at a place."""
    return Late(number, table) if is_scalar(number) else table[int(number)]


def compares_identity(codes: Iterable[types.CodeType]) -> bool:
    """Whether code has `is` in it, or a pattern of `True`, `False` or `None`."""
    return any(
        step.opname == "IS_OP" or ("JUMP" in step.opname and step.opname.endswith("_NONE"))
        for code in with_nested(codes)
        for step in dis.get_instructions(code)
    )


_compat.register_value(Late, Late.__jax_array__)
