"""`lift`: any JAX function, made to accept Tensors.

A call records one node. What it is made of (`_op.Op`) is cached per function, structure of arguments and static values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._contract import is_inexact
from jhop._errors import JhopError
from jhop._hook import HookList, tensor_point
from jhop._node import ARRAY, Edge, OpNode, edge_of, grad_enabled, inside, mode
from jhop._numbers import on_device, reset_numbers
from jhop._op import CACHE_SIZE, DYNAMIC, Op, carries, make_op
from jhop._static import Static
from jhop._tensor import Tensor

ARRAYS = (jax.Array, np.ndarray, np.generic)
_cache: dict[Any, Op] = {}


def lift(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a JAX function accept Tensors anywhere in its arguments, one tape node per call.

    Args:
        fn: a function of arrays and pytrees that JAX can trace. Python ints, strings and other objects among the
            arguments are static; floats and arrays are not.
            What it reads besides counts as it was when it was traced, as under `jax.jit`: pass what changes.

    Returns:
        A function of the same arguments. With no Tensor among them it is `fn` itself; otherwise the arrays in its
        result are Tensors, which require grad if a Tensor argument does.

    Example:
        >>> import jax, jhop
        >>> x = jhop.tensor([0.0, 1.0], requires_grad=True)
        >>> y = jhop.lift(jax.nn.softplus)(x)
        >>> y.sum().backward()
        >>> [round(g, 3) for g in x.grad.tolist()]
        [0.5, 0.731]

    Raises:
        JhopError: `fn` is not callable.
    """
    if not callable(fn):
        raise JhopError(f"jhop.lift: expected a function, got {type(fn).__name__}.")

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        found = _apply_flat(fn, args, False) if not kwargs else None
        return _apply(fn, args, kwargs, False) if found is None else found

    return lifted


def apply(fn: Callable[..., Any], args: Any, kwargs: Any, *, dynamic_ints: bool = False) -> Any:
    """Calls a lifted function. `dynamic_ints` passes Python ints as values, for operators."""
    found = _apply_flat(fn, args, dynamic_ints) if not kwargs else None
    return _apply(fn, args, kwargs, dynamic_ints) if found is None else found


def _apply(fn: Callable[..., Any], args: Any, kwargs: Any, dynamic_ints: bool) -> Any:
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_leaf)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return fn(*args, **kwargs)
    if inside() is not None or any(leaf._trace is not None for leaf in tensors):
        return _apply_traced(fn, leaves, tree)
    static: list[Any] = []
    dynamic: list[Any] = []
    diff: list[int] = []
    recording = grad_enabled()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if recording and leaf._requires_grad:
                diff.append(len(dynamic))
            static.append(DYNAMIC)
            dynamic.append(leaf._value)
        elif _is_dynamic(leaf) or (dynamic_ints and type(leaf) is int):
            static.append(DYNAMIC)
            dynamic.append(leaf)
        else:
            static.append(Static(leaf))
    op = _op_for(fn, tree, tuple(static), tuple(diff))
    out = op.forward(*dynamic)
    return _wrap(fn, op, out, dynamic, [leaf._edge("lift") for leaf in tensors if recording and leaf._requires_grad])


class _Flat:
    """What is known of calls with one kind of arguments.

    Attributes:
        fn: the function, which is kept, so that the id in the key stays its own.
        avals: that of the last result with a gradient, alone: the results of one program have one, and the same.
    """

    __slots__ = ("avals", "fn", "forward", "op")

    def __init__(self, fn: Any, op: Op):
        self.fn = fn
        self.op = op
        self.forward = op.forward
        self.avals: tuple[Any, ...] = (None,)


# By id of the function and kinds of arguments. To hash a function may take long (`jnp.ufunc`).
_flat_cache: dict[Any, _Flat] = {}


def _apply_flat(fn: Any, args: tuple[Any, ...], dynamic_ints: bool) -> Any:
    """`apply` for the common case, at a fraction of its cost: only Tensors, arrays and numbers. None: not that case."""
    if not mode.recording or mode.inside is not None:
        return None
    key: list[Any] = [id(fn)]
    dynamic: list[Any] = []
    edges: tuple[Edge, ...] = ()
    has_number = False
    for arg in args:
        cls = type(arg)
        if cls is Tensor:
            if arg._trace is not None:
                return None
            dynamic.append(arg._value)
            if arg._requires_grad:
                key.append(True)
                node = arg._node
                edges += (edge_of((node, arg._slot)) if node is not None else arg._edge("lift"),)
            else:
                key.append(False)
        elif cls is float or cls is ARRAY or (cls is int and dynamic_ints):
            has_number |= cls is float
            key.append(cls)
            dynamic.append(arg)
        else:
            return None
    if not edges:
        return None
    found = _flat_cache.get(tuple(key)) or _flat(fn, tuple(key))
    value = found.forward(*(on_device(dynamic) if has_number else dynamic))
    if type(value) is ARRAY:
        aval, avals = value.aval, found.avals
        if avals[0] is not aval and is_inexact(aval.dtype):
            avals = found.avals = (aval,)
        if avals[0] is aval:
            return Tensor(value, True, OpNode(edges, avals, found.op, dynamic, fn, has_number))
    return _wrap(fn, found.op, value, dynamic, edges)


def _flat(fn: Any, key: tuple[Any, ...]) -> _Flat:
    """What is to be known of a key that is not in `_flat_cache`."""
    tree = jax.tree.structure((tuple(0 for _ in key[1:]), {}))
    op = _op_for(fn, tree, (DYNAMIC,) * (len(key) - 1), tuple(i for i, moves in enumerate(key[1:]) if moves is True))
    if len(_flat_cache) >= CACHE_SIZE:
        _flat_cache.clear()
    found = _flat_cache[key] = _Flat(fn, op)
    return found


def _is_dynamic(leaf: Any) -> bool:
    if isinstance(leaf, (np.integer, np.bool_)):
        return False  # an axis or a size
    return isinstance(leaf, ARRAYS) or type(leaf) in (float, complex)


def _wrap(fn: Any, op: Op, out: Any, dynamic: list[Any], edges: Sequence[Edge]) -> Any:
    outs, out_tree = (([out], None) if isinstance(out, jax.Array) else jax.tree.flatten(out))
    moving = [i for i, value in enumerate(outs) if carries(value)] if edges else []
    results = [Tensor(value) if isinstance(value, jax.Array) else value for value in outs]
    if moving:
        avals = tuple(jax.typeof(outs[i]) for i in moving)
        has_number = any(type(value) is float for value in dynamic)
        node = OpNode(tuple(edges), avals, op, dynamic, fn, has_number)
        for slot, i in enumerate(moving):
            results[i] = Tensor(outs[i], requires_grad=True, node=node, slot=slot)
    return results[0] if out_tree is None else jax.tree.unflatten(out_tree, results)


def _apply_traced(fn: Any, leaves: list[Any], tree: Any) -> Any:
    """Inside a compiled function: call `fn` on tracers; each differentiable result is a hook point."""
    own = (leaf._trace for leaf in leaves if isinstance(leaf, Tensor) and leaf._trace is not None)
    trace = inside() or next(own)
    leaves = [trace.enter(leaf) if isinstance(leaf, Tensor) and leaf._trace is None else leaf for leaf in leaves]
    values = [leaf._value if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    moving = grad_enabled() and any(isinstance(leaf, Tensor) and leaf._requires_grad for leaf in leaves)
    args, kwargs = jax.tree.unflatten(tree, values)
    outs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
    results = [trace.result(value, moving) for value in outs]
    for hooks in (result._hooks for result in results if isinstance(result, Tensor) and len(outs) > 1):
        if hooks is not None:
            hooks.of_several = True
    return jax.tree.unflatten(out_tree, results)


def traced_result(trace: Any, value: Any, moving: bool) -> Any:
    """A Tensor for a value computed inside a compiled function."""
    if not isinstance(value, jax.Array):
        return value
    moving = moving and jnp.issubdtype(value.dtype, jnp.inexact)
    result = Tensor(value, requires_grad=moving)
    result._trace = trace
    if moving:
        result._hooks = HookList()
        result._value = tensor_point(result._hooks, value)
    return result


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor)


def _op_for(fn: Any, tree: Any, static: tuple[Static, ...], diff: tuple[int, ...]) -> Op:
    key = (fn, tree, static, diff)
    try:
        op = _cache.get(key)
    except TypeError:  # an unhashable callable object
        return make_op(fn, tree, static, diff)
    if op is None:
        if len(_cache) >= CACHE_SIZE:
            _cache.clear()
        op = _cache[key] = make_op(fn, tree, static, diff)
    return op


def reset_ops() -> None:
    """Forgets the compiled forwards and pullbacks, and numbers on the device."""
    _cache.clear()
    _flat_cache.clear()
    reset_numbers()


# -- operators and methods ---------------------------------------------------------------------------------------------

_BINARY = {
    "add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "truediv": jnp.divide, "floordiv": jnp.floor_divide,
    "mod": jnp.mod, "matmul": jnp.matmul, "and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor,
}  # fmt: skip
_COMPARE = {
    "lt": jnp.less, "le": jnp.less_equal, "gt": jnp.greater, "ge": jnp.greater_equal, "eq": jnp.equal,
    "ne": jnp.not_equal,
}  # fmt: skip
_OPERANDS = (Tensor, jax.Array, np.ndarray, np.generic, int, float, complex, bool, _compat.DimExpr)


def _binary(fn: Any, *, swapped: bool = False) -> Any:
    def method(self: Tensor, other: Any) -> Any:
        args = (other, self) if swapped else (self, other)
        found = _apply_flat(fn, args, True)
        if found is not None:
            return found
        return _apply(fn, args, {}, True) if isinstance(other, _OPERANDS) else NotImplemented

    return method


for _name, _fn in _BINARY.items():
    setattr(Tensor, f"__{_name}__", _binary(_fn))
    setattr(Tensor, f"__r{_name}__", _binary(_fn, swapped=True))
for _name, _fn in _COMPARE.items():
    setattr(Tensor, f"__{_name}__", _binary(_fn))


def _method(name: str) -> Any:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    call.__name__ = name
    doc = getattr(getattr(jnp.ndarray, name, None), "__doc__", None)

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return apply(call, (self, *args), kwargs)

    method.__name__ = name
    method.__doc__ = doc
    return method


def _unary(fn: Any) -> Any:
    return lambda self: apply(fn, (self,), {})


_SPECIAL = {
    # Static exponents keep `x ** 2` an integer power, whose derivative at 0 is defined.
    "__pow__": lambda self, other: apply(operator.pow, (self, other), {}),
    "__rpow__": lambda self, other: apply(operator.pow, (other, self), {}),
    "__neg__": _unary(jnp.negative),
    "__pos__": lambda self: self,
    "__abs__": _unary(jnp.abs),
    "__invert__": _unary(jnp.invert),
    "T": property(_unary(jnp.transpose)),
    "real": property(_unary(jnp.real)),
    "imag": property(_unary(jnp.imag)),
    "mT": property(_unary(jnp.matrix_transpose)),
}
for _name, _fn in _SPECIAL.items():
    setattr(Tensor, _name, _fn)
_METHODS = """all any argmax argmin argsort astype clip conj cumprod cumsum diagonal dot flatten max mean min nonzero
prod ptp ravel repeat reshape round searchsorted sort squeeze std sum swapaxes take trace transpose var"""
for _name in _METHODS.split():
    setattr(Tensor, _name, _method(_name))
