"""`trace_wrapped`: a call that stays opaque while a backward pass is captured.

The contract of `fn`:

1. It gets the cotangent (and any further arguments given to `trace_wrapped`).
2. It returns a value of the same structure, shapes and dtypes, or None for "leave the cotangent as it is".
3. It may touch Python state: `jhop.jit` and `jhop.compile` lift that state when they inline the call. Plain
   `jax.jit`, which has no hand on the call, refuses a hook that writes state rather than run it once.

On concrete values `fn` is just called. On tracers it is not: one `trace_wrapped` equation stands for it, whose
outputs have the avals of its cotangents. The rules below keep the equation opaque under every transformation: JVP,
transposition and batching each give another `trace_wrapped` over a derived function, so derivatives of any order
work and `fn` runs only when the equation is inlined or lowered.

The counterpart in PyTorch is `torch/_dynamo/_trace_wrapped_higher_order_op.py`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jhop import _compat, _state
from jhop._effects import watch
from jhop._errors import HookError, Unsupported
from jhop._source import describe_hook, hook_name
from jhop._walk import Leaf, Walk, closed_over_tracers

trace_wrapped_p = jex_core.Primitive("trace_wrapped")
trace_wrapped_p.multiple_results = True

_mode = threading.local()


class HookFn:
    """The function behind a `trace_wrapped` equation: takes the flat inputs, returns the flat outputs.

    Attributes:
        base: the user's callable, whose Python state is lifted.
        call: runs it on flat inputs.
        name: shown in jaxprs and messages, e.g. `jvp[clip]`.
        kind: which of PyTorch's hook kinds it is, for the printed text.
    """

    __slots__ = ("base", "call", "key", "kind", "name")

    def __init__(self, base: Any, call: Callable[..., Any], name: str, key: tuple[Any, ...], kind: str = "hook"):
        self.base = base
        self.call = call
        self.name = name
        self.key = key
        self.kind = kind

    def derive(self, rule: str, call: Callable[..., Any], *key: Any) -> HookFn:
        """A function derived from this one by a transformation; its state stays that of the same hook."""
        return HookFn(self.base, call, f"{rule}[{self.name}]", (rule, self.key, *key), self.kind)

    # JAX caches by parameters: equal keys mean that one trace may serve both.
    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookFn) and self.key == other.key

    def __repr__(self) -> str:
        return self.name


# -- contract ----------------------------------------------------------------------------------------------------------


def _type_of(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def check_contract(fn: Any, out: Any, aval: Any) -> Any:
    """Returns the array that a hook returned, once it is known to have its cotangent's shape and dtype.

    Args:
        fn: the hook, for the message.
        out: what it returned for one cotangent; None is not allowed here.
        aval: the cotangent's aval.

    Raises:
        HookError: it is no array, or has another shape or dtype.
    """
    out = getattr(out, "__jhop_array__", out)  # a Tensor returned by a hook counts as its array
    is_array = isinstance(out, (jax.Array, np.ndarray, np.generic))
    if not is_array or (jnp.shape(out), out.dtype) != (aval.shape, aval.dtype):
        raise HookError(
            f"{describe_hook(fn)} must return an array of type {aval.str_short()}, the shape and dtype of its "
            f"cotangent, but returned {_type_of(out)}. A hook may change values, never shape, dtype or type. "
            "Return None to leave the cotangent as it is."
        )
    out = jnp.asarray(out)
    if not isinstance(out, _compat.Tracer):
        return out
    missing = _compat.varying_axes(aval) - _compat.varying_axes(jax.typeof(out))
    if missing:  # a psum in the hook makes its result the same on every device; its cotangent's type is not
        out = jax.lax.pcast(out, tuple(sorted(missing)), to="varying")
    extra = _compat.varying_axes(jax.typeof(out)) - _compat.varying_axes(aval)
    if extra:
        raise HookError(
            f"{describe_hook(fn)} returned a value that varies over mesh axes {sorted(extra)} over which its "
            "cotangent does not vary. Reduce over them (jax.lax.psum or pmean) before returning."
        )
    if jax.typeof(out).weak_type and not aval.weak_type:
        out = jax.lax.convert_element_type(out, aval.dtype)
    return out


def flat_caller(
    fn: Any, tree: Any, *, still: dict[int, Any] | None = None, n_extra: int = 0, kwargs: dict[str, Any] | None = None
) -> Callable[..., list[Any]]:
    """`fn` as a function of flat inputs and outputs, with the contract checked.

    Args:
        fn: takes a pytree of cotangents, then `n_extra` arguments and `kwargs`.
        tree: the pytree's structure.
        still: leaves, by index, that carry no gradient: `fn` gets these zeros and what it returns there is ignored.
    """
    zeros = still or {}
    moving = [i for i in range(tree.num_leaves) if i not in zeros]

    def call(*flat: Any) -> list[Any]:
        cts, extra = list(flat[: len(moving)]), flat[len(moving) : len(moving) + n_extra]
        given: list[Any] = [zeros.get(i) for i in range(tree.num_leaves)]
        for i, ct in zip(moving, cts, strict=True):
            given[i] = ct
        out = fn(jax.tree.unflatten(tree, given), *extra, **(kwargs or {}))
        if out is None:
            return cts
        leaves, out_tree = jax.tree.flatten(out, is_leaf=lambda leaf: leaf is None)
        if out_tree != tree:
            if tree != jax.tree.structure(0):
                raise HookError(
                    f"{describe_hook(fn)} must return a pytree like its cotangent, {tree}, but returned {out_tree}. "
                    "Return None to leave the cotangent as it is."
                )
            leaves = [out]  # one array was expected: report what came as it is
        pairs = zip((leaves[i] for i in moving), cts, strict=True)
        return [ct if leaf is None else check_contract(fn, leaf, jax.typeof(ct)) for leaf, ct in pairs]

    return call


@contextlib.contextmanager
def substituted(slots: Sequence[Leaf], values: Sequence[Any]) -> Iterator[None]:
    """Inside the block, slots hold other values; afterwards, what they held before."""
    with _state.LOCK:
        before = [slot.container.get(slot.key) for slot in slots]
        try:
            for slot, value in zip(slots, values, strict=True):
                slot.container.put(slot.key, value)
            yield
        finally:
            for slot, value in zip(slots, before, strict=True):
                slot.container.put(slot.key, value)


def _with_operands(call: Callable[..., Any], slots: Sequence[Leaf], n: int) -> Callable[..., Any]:
    """`call`, whose inputs beyond the first `n` go where the hook's closure held tracers."""

    def with_operands(*flat: Any) -> Any:
        with substituted(slots, flat[n:]):
            return call(*flat[:n])

    return with_operands


@contextlib.contextmanager
def inlining() -> Iterator[None]:
    """While active in this thread, `trace_wrapped` runs its function even on tracers."""
    before = getattr(_mode, "inlining", False)
    _mode.inlining = True
    try:
        yield
    finally:
        _mode.inlining = before


def trace_wrapped(*args: Any, fn: Callable[..., Any], kind: str = "hook", **kwargs: Any) -> Any:
    """Calls `fn(*args, **kwargs)`, as one opaque equation while JAX is tracing.

    Args:
        *args: first the cotangent: an array, or a pytree of arrays; any further arrays are handed on to `fn`.
        fn: returns a value of the cotangent's structure, shapes and dtypes, or None to keep the cotangent.
        kind: the kind of hook, for printed graphs.
        **kwargs: handed on to `fn`.

    Returns:
        What `fn` returned, or the cotangent where it returned None; the cotangent's shapes and dtypes.

    Raises:
        HookError: `fn` is not callable, or what it returned has another structure, shape, dtype or type.

    Example:
        >>> import jax, jhop
        >>> def scale(ct):
        ...     return jhop.trace_wrapped(ct, fn=lambda ct: 3.0 * ct)
        >>> float(scale(jax.numpy.float32(2.0)))
        6.0
        >>> print(jax.make_jaxpr(scale)(2.0).eqns[0].primitive)
        trace_wrapped
    """
    if not callable(fn):
        raise HookError(f"jhop.trace_wrapped: `fn` must be callable, got {type(fn).__name__}.")
    if not args:
        raise HookError("jhop.trace_wrapped: expected the cotangent as first argument, got no arguments.")
    cts, tree = jax.tree.flatten(args[0])
    extra = list(args[1:])
    call = flat_caller(fn, tree, n_extra=len(extra), kwargs=kwargs)
    flat = [*cts, *extra]
    if getattr(_mode, "inlining", False) or not any(isinstance(value, _compat.Tracer) for value in flat):
        return jax.tree.unflatten(tree, call(*flat))
    base = functools.partial(fn, **kwargs) if kwargs else fn
    hook = HookFn(base, call, hook_name(fn), ("hook", identity_key(fn), tree, len(extra), Token(kwargs)), kind)
    hook, operands = close_over(hook, len(flat))
    return jax.tree.unflatten(tree, bind_hook(hook, [*flat, *operands], len(cts)))


class Token:
    """Equal only to itself; None-like for empty keywords, so that equal hooks share one trace."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value or None

    def __hash__(self) -> int:
        return hash(self.value is None)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Token) and self.value is None and other.value is None)


class _Identity:
    """Compares a hook by identity and keeps it alive, so that its id stays its own."""

    __slots__ = ("fn",)

    def __init__(self, fn: Any):
        self.fn = fn

    def __hash__(self) -> int:
        return id(self.fn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.fn is other.fn


def identity_key(fn: Any) -> Any:
    # `obj.method` makes a new object at each access; what it stands for is (object, function).
    if hasattr(fn, "__self__") and hasattr(fn, "__func__"):
        return (_Identity(fn.__self__), fn.__func__)
    return _Identity(fn)


def close_over(hook: HookFn, n: int) -> tuple[HookFn, list[Any]]:
    """A hook whose closure holds tracers, as one that takes them as operands after its `n` inputs.

    Returns:
        (the hook, the tracers); both as they were where it closes over none.
    """
    slots = closed_over_tracers(hook.base)
    if not slots:
        return hook, []
    operands = [leaf.value for leaf in slots]
    return hook.derive("closed", _with_operands(hook.call, slots, n), Token(operands)), operands


def bind_hook(hook: HookFn, flat: list[Any], n_cts: int) -> list[Any]:
    """Binds one equation on `n_cts` cotangents and further operands."""
    avals = tuple(jax.typeof(ct) for ct in flat[:n_cts])
    return trace_wrapped_p.bind(*flat, fn=hook, out_avals=avals)


# -- rules -------------------------------------------------------------------------------------------------------------


def _trace_wrapped_impl(*args: Any, fn: HookFn, out_avals: Any) -> list[Any]:
    return list(fn.call(*args))


def _trace_wrapped_abstract_eval(*avals: Any, fn: HookFn, out_avals: Any) -> Any:
    # The hook is not run here: its output avals are known from the contract.
    return list(out_avals)


def _trace_wrapped_jvp(primals: Any, tangents: Any, *, fn: HookFn, out_avals: Any) -> Any:
    outs = trace_wrapped_p.bind(*primals, fn=fn, out_avals=out_avals)
    moving = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    tangent_avals = tuple(aval.to_tangent_aval() for aval in out_avals)
    if not moving:
        return outs, [ad.Zero(aval) for aval in tangent_avals]
    n = len(primals)

    def jvp_call(*args: Any) -> list[Any]:
        fixed, dots = list(args[:n]), args[n:]

        def of_moving(*values: Any) -> list[Any]:
            for i, value in zip(moving, values, strict=True):
                fixed[i] = value
            return fn.call(*fixed)

        return jax.jvp(of_moving, tuple(fixed[i] for i in moving), dots)[1]

    derived = fn.derive("jvp", jvp_call, moving)
    dots = [tangents[i] for i in moving]
    return outs, trace_wrapped_p.bind(*primals, *dots, fn=derived, out_avals=tangent_avals)


def _trace_wrapped_transpose(cts: Any, *args: Any, fn: HookFn, out_avals: Any) -> list[Any]:
    linear = tuple(i for i, arg in enumerate(args) if ad.is_undefined_primal(arg))
    if all(type(ct) is ad.Zero for ct in cts):
        return [ad.Zero(args[i].aval) if i in linear else None for i in range(len(args))]
    cts = [ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cts]
    known = [arg for i, arg in enumerate(args) if i not in linear]
    avals = tuple(args[i].aval for i in linear)
    n = len(args)

    def transpose_call(*flat: Any) -> list[Any]:
        fixed, given = iter(flat[: len(known)]), list(flat[len(known) :])
        values = [None if i in linear else next(fixed) for i in range(n)]

        def of_linear(*parts: Any) -> list[Any]:
            filled = list(values)
            for i, part in zip(linear, parts, strict=True):
                filled[i] = part
            return fn.call(*filled)

        specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        return list(jax.linear_transpose(of_linear, *specs)(given))

    derived = fn.derive("transpose", transpose_call, linear, tuple(map(str, avals)))
    outs = iter(trace_wrapped_p.bind(*known, *cts, fn=derived, out_avals=avals))
    return [next(outs) if i in linear else None for i in range(n)]


def _trace_wrapped_batch(axis_data: Any, args: Any, dims: Any, *, fn: HookFn, out_avals: Any) -> Any:
    args = [
        arg if d is None else batching.bdim_at_front(arg, d, axis_data.size)
        for arg, d in zip(args, dims, strict=True)
    ]
    in_axes = tuple(None if d is None else 0 for d in dims)
    kwargs = _compat.vmap_kwargs(axis_data)
    mapped = any(axis == 0 for axis in in_axes)

    def batched_call(*flat: Any) -> list[Any]:
        return jax.vmap(fn.call, in_axes=in_axes, out_axes=0 if mapped else None, **kwargs)(*flat)

    # A rule is also asked with nothing mapped; the axis name must still be in scope for the hook's collectives.
    derived = fn.derive("vmap", batched_call, in_axes, str(kwargs)) if mapped or "axis_name" in kwargs else fn
    avals = tuple(_compat.batched_aval(axis_data, aval) for aval in out_avals) if mapped else out_avals
    outs = trace_wrapped_p.bind(*args, fn=derived, out_avals=avals)
    return outs, [0 if mapped else None] * len(outs)


def run_pure(fn: HookFn, args: Sequence[Any]) -> list[Any]:
    """Runs a hook whose equation is being lowered by plain `jax.jit`, where its state cannot be written back.

    Raises:
        Unsupported: the hook writes Python state, or does something that cannot be traced.
    """
    with _state.LOCK:
        walk = Walk([(hook_name(fn.base), fn.base)])
        with _state.Lift(walk, [leaf.value for leaf in walk.leaves]) as lift:
            with inlining(), watch(fn.base):
                outs = fn.call(*args)
            writes = list(lift.writes())
    if writes:
        place = writes[0].container.path_of(writes[0].key)
        raise Unsupported(
            f"{describe_hook(fn.base)} writes Python state (`{place}`), but the function that it hooks was compiled "
            "by plain `jax.jit`, which would run it once and never again. Compile with `jhop.jit` instead: it makes "
            "the state an input and an output of the graph and writes it back after every run."
        )
    return outs


def _trace_wrapped_lowered(*args: Any, fn: HookFn, out_avals: Any) -> list[Any]:
    return run_pure(fn, args)


trace_wrapped_p.def_impl(_trace_wrapped_impl)
trace_wrapped_p.def_abstract_eval(_trace_wrapped_abstract_eval)
ad.primitive_jvps[trace_wrapped_p] = _trace_wrapped_jvp
ad.primitive_transposes[trace_wrapped_p] = _trace_wrapped_transpose
batching.fancy_primitive_batchers[trace_wrapped_p] = _trace_wrapped_batch
_compat.register_lowering(trace_wrapped_p, _trace_wrapped_lowered, multiple_results=True)
