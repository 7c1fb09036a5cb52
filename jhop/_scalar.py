"""Lifted Python numbers: exact on the host, a weakly typed scalar on the device.

While a hook is traced, each int and float that it reads from Python state is a `Scalar`. A `Scalar` behaves as the
number that it stands for, and remembers how it was computed:

- arithmetic with other Python numbers gives another `Scalar`, whose expression the host evaluates again at every run
  (so ints stay exact, of any size, and reading one never waits for the device);
- arithmetic with an array uses the number's device twin, a weakly typed scalar tracer;
- a question about its value (`if n > 3`, `range(n)`, `str(n)`) is answered for the present value and leaves a guard
  that holds for exactly the values that give the same answer.

Each arithmetic step is also one `scalar` equation, so that the traced graph shows it where it happened.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jhop import _compat
from jhop._errors import Unsupported
from jhop._expr import COMPARE, INFIX, MAX_SIZE, OUT_OF_REACH, Expr, const, cut, folded, free

NUMBERS = (bool, int, float)


# -- scalar_p: one step of host arithmetic, visible in the graph -------------------------------------------------------

scalar_p = jex_core.Primitive("scalar")


def apply_step(op: str, operands: Sequence[Any]) -> Any:
    """Runs one arithmetic step on numbers or on scalar arrays."""
    if op in ("abs", "int", "float"):
        if op == "abs":
            return abs(operands[0])
        if isinstance(operands[0], NUMBERS):
            return {"int": int, "float": float}[op](operands[0])
        return jnp.trunc(operands[0]) if op == "int" else operands[0] * 1.0
    return getattr(operator, op)(*operands)


def fill(template: tuple[Any, ...], values: Sequence[Any]) -> list[Any]:
    """Puts `values`, in order, where `template` has None."""
    rest = iter(values)
    return [next(rest) if item is None else item for item in template]


def device_kind(value: Any, twins: Sequence[Any] = ()) -> type:
    """The type that a number has on the device: ints too large for JAX's are rounded to floats, as where JAX itself
    meets such an int and a floating array.
    """
    if type(value) is not int:
        return type(value)
    large = max(value, ~value) > largest_int()
    return float if large or any(jnp.issubdtype(twin.dtype, jnp.inexact) for twin in twins) else int


def largest_int() -> int:
    """The largest int that the device counts to: that of int64 with x64 on."""
    return 2 ** (8 * weak_aval(int).dtype.itemsize - 1) - 1


def on_device(value: Any) -> Any:
    """A Python number as the device can have it."""
    return float(value) if device_kind(value) is float else value


def need_of(op: str, args: Sequence[Expr], expr: Expr, *, rounded: bool) -> tuple[Expr, ...]:
    """What the device may not have too large, to compute an int.

    Args:
        rounded: whether it has floats for ints there. These may be added, less what leaves little of them.
    """
    if not rounded:
        return (expr,)
    if op in ("add", "sub"):
        return (Expr("lost", (*args, expr)),)
    return (const(OUT_OF_REACH),) if op in _OF_INTS else ()


_OF_INTS = frozenset({"floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift", "invert"})


def _scalar_impl(*args: Any, op: str, template: tuple[Any, ...], kind: type, python: type) -> Any:
    if any(isinstance(arg, jax.Array) for arg in args):
        template = tuple(item if item is None else on_device(item) for item in template)
    return _as_weak(apply_step(op, fill(template, args)), kind)


def _as_weak(value: Any, kind: type) -> Any:
    return jax.lax.convert_element_type(value, weak_aval(kind).dtype) if isinstance(value, jax.Array) else value


def _scalar_abstract_eval(*avals: Any, op: str, template: tuple[Any, ...], kind: type, python: type) -> Any:
    return weak_aval(kind)


def weak_aval(kind: type) -> Any:
    """The aval that JAX gives a Python number of this type."""
    return jax.typeof(kind(0))


def register_transforms(primitive: Any, fun: Callable[..., Any]) -> None:
    """Batches and differentiates a primitive with one result as `fun`, which computes the same with JAX."""

    def batch(args: Any, dims: Any, **params: Any) -> Any:
        return jax.vmap(functools.partial(fun, **params), in_axes=tuple(dims))(*args), 0

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        return jax.jvp(functools.partial(fun, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp


scalar_p.def_impl(_scalar_impl)
scalar_p.def_abstract_eval(_scalar_abstract_eval)
_compat.register_lowering(scalar_p, _scalar_impl, multiple_results=False)
register_transforms(scalar_p, _scalar_impl)


# -- Scalar: what the hook holds ---------------------------------------------------------------------------------------


class Scalar:
    """A lifted int, float or bool while a hook is traced. `isinstance(s, int)` answers as for the number itself."""

    __slots__ = ("_expr", "_needs", "_session", "_size", "_twin", "_value")

    def __init__(self, session: Any, expr: Expr, value: Any, twin: Any, needs: Any = None):
        self._session = session  # has .guard(expr, answer)
        # What the device may not have too large when it computes the twin: expressions, in tuples, as deep as the
        # steps. None where the host knows the number before the device runs: it need not compute it there.
        self._needs = needs
        self._expr = expr
        self._value = value
        self._twin = twin  # the device scalar
        self._size = 1  # of the expression

    @property  # type: ignore[misc]
    def __class__(self):  # isinstance must answer as for the number: hooks check types
        return type(self._value)

    def _specialise(self) -> Any:
        """The present value, with a guard that it stays the same."""
        value = self._value
        if value != value:
            self._session.guard(Expr("is_nan", (self._expr,)), True)
        else:
            self._session.guard(Expr("eq", (self._expr, const(value))), True)
            if type(value) is float and value == 0.0:  # there are two zeros
                self._session.guard(Expr("is_minus_zero", (self._expr,)), str(value) == "-0.0")
        return value

    def _cut(self) -> None:
        """Makes it a part of larger expressions."""
        self._expr, self._size = cut(self._expr), 1
        self._session.symbols.setdefault(self._expr, self)

    def __jax_array__(self) -> Any:
        return self._session.used(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Whether a number fits into its twin's dtype, or any floating one, is looked at before each run.
        known = dtype is None or not jnp.issubdtype(dtype, jnp.integer) or dtype == self._twin.dtype
        free = known and _compat.asked_whether_it_fits()
        return np.array(self._value if free else self._specialise(), dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        # NumPy computes at once: with the number itself, and so with the dtypes that it gives a Python number.
        return getattr(ufunc, method)(*(item._specialise() if is_scalar(item) else item for item in inputs), **kwargs)

    def __bool__(self) -> bool:
        answer = bool(self._value)
        self._session.guard(self._expr, answer)
        return answer

    def __index__(self) -> int:
        return operator.index(self._specialise())

    def __int__(self) -> int:
        return int(self._specialise())

    def __float__(self) -> float:
        return float(self._specialise())

    def __hash__(self) -> int:
        return hash(self._specialise())

    def __repr__(self) -> str:
        return repr(self._specialise())

    def __str__(self) -> str:
        return str(self._specialise())

    def __format__(self, spec: str) -> str:
        return format(self._specialise(), spec)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._specialise(), digits)

    def __trunc__(self) -> Any:
        return math.trunc(self._specialise())

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __pos__(self) -> Scalar:
        return self

    def __copy__(self) -> Scalar:  # as with any number, a copy is the number itself
        return self

    def __deepcopy__(self, memo: Any) -> Scalar:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # pickled, it is text
        value = self._specialise()
        return type(value), (value,)

    def __getattr__(self, name: str) -> Any:
        # Anything else that a number has (is_integer, bit_length, real) depends on the value.
        if name.startswith("__array"):
            raise AttributeError(name)
        # JAX knows them of a Python number, by its exact type.
        if name in ("dtype", "aval") and _compat.asked_by_jax():
            return getattr(self._twin, name)
        if not hasattr(type(self._value), name):
            raise AttributeError(f"{type(self._value).__name__!r} object has no attribute {name!r}")
        return getattr(self._specialise(), name)


def is_scalar(value: Any) -> bool:
    """Whether a value is a `Scalar` (its `__class__` says that it is a number)."""
    return type(value) is Scalar


def _unary(op: str) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        return step(op, self)

    return method


def _any_late(operands: Sequence[Any]) -> bool:
    """Whether one is known only once the graph ran: what stands for its value need not be fit for a step."""
    return any(part.op == "device" for item in operands if is_scalar(item) for part in free(item._expr))


def step(op: str, *operands: Any) -> Any:
    """One arithmetic step, at least one of whose operands is a `Scalar`: computed, recorded, and put in the graph."""
    session = next(item._session for item in operands if is_scalar(item))
    values = [item._value if is_scalar(item) else item for item in operands]
    stand_in = 1.0 if op == "truediv" or float in map(type, values) else 1
    try:
        value = apply_step(op, values)
    except Exception:
        if not _any_late(operands):
            # The hook may catch this; it then depends on these very values.
            for item in operands:
                if is_scalar(item):
                    item._specialise()
            raise
        value = stand_in
    if not isinstance(value, NUMBERS) and _any_late(operands):
        value = stand_in
    if not isinstance(value, NUMBERS):  # complex roots: not representable as a lifted number
        return apply_step(op, [item._specialise() if is_scalar(item) else item for item in operands])
    size = 1 + sum(item._size for item in operands if is_scalar(item))
    if size > MAX_SIZE:
        for item in operands:
            if is_scalar(item):
                item._cut()
        size = 1 + len(operands)
    exprs = [item._expr if is_scalar(item) else const(item) for item in operands]
    expr = folded(op, exprs) if type(value) is int else Expr(op, tuple(exprs))
    if expr.args[0] is not exprs[0]:
        size -= 1
    template = tuple(None if is_scalar(item) else item for item in operands)
    twins = session.twins_of([item for item in operands if is_scalar(item)])
    kind = device_kind(value, twins)
    twin = scalar_p.bind(*twins, op=op, template=template, kind=kind, python=type(value))
    needs = [item._needs for item in operands if is_scalar(item) and item._needs is not None]
    if needs and type(value) is int:
        needs.append(need_of(op, exprs, expr, rounded=kind is float))
    result = Scalar(session, expr, value, twin, tuple(needs) or None)
    result._size = size
    session.note_step(result)
    return result


def _binary(op: str, *, swapped: bool = False) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, op)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, np.generic):
            other = other.item()
        if is_scalar(other) or type(other) in NUMBERS:
            return step(op, other, self) if swapped else step(op, self, other)
        if isinstance(other, (jax.Array, np.ndarray)):
            twin = self._session.used(self)
            return apply(other, twin) if swapped else apply(twin, other)
        return NotImplemented

    return method


def _ask_one_nan(number: Scalar, other: Any) -> None:
    """Guards that two floats are not one NaN: it does not equal itself, but a list would not ask, and say yes."""
    known = is_scalar(other)
    if not (type(number._value) is type(other._value if known else other) is float and number._expr.op == "leaf"):
        return
    if known and other is not number and other._expr.op == "leaf":
        number._session.guard(Expr("one_nan", (number._expr, other._expr)), False)
    elif not known and other != other:
        if number._value is other:
            raise Unsupported(
                f"{number._session.hook} compares a NaN with itself: by `==` it differs, in a list or tuple it does "
                "not, and which of them asks cannot be told while a hook is traced. Use `math.isnan`."
            )
        number._session.guard(Expr("one_nan", (number._expr, other)), False)


def _comparison(op: str) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, op)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, np.generic):
            other = other.item()
        if is_scalar(other) or type(other) in NUMBERS:
            known = is_scalar(other)
            answer = bool(apply(self._value, other._value if known else other))
            right = other._expr if known else const(other)
            if op in ("eq", "ne"):
                _ask_one_nan(self, other)
            self._session.guard(Expr(op, (self._expr, right)), answer)
            return answer
        if isinstance(other, (jax.Array, np.ndarray)):
            return apply(self._session.used(self), other)
        return NotImplemented

    return method


for _name in INFIX:
    _dunder = _name.rstrip("_")
    setattr(Scalar, f"__{_dunder}__", _binary(_name))
    setattr(Scalar, f"__r{_dunder}__", _binary(_name, swapped=True))
for _name in COMPARE:
    setattr(Scalar, f"__{_name}__", _comparison(_name))
for _name in ("neg", "abs", "invert"):
    setattr(Scalar, f"__{_name}__", _unary(_name))


# A Scalar passed to a primitive or to a jitted function is its device twin there. It is no pytree: like the number, it
# is a leaf, which `jax.tree.map` hands to the function as it is.
_compat.register_value(Scalar, lambda s: s._session.used(s))
