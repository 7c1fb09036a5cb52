"""Hook points: where a value's summed cotangent passes through hooks.

Two identities put a hook on a value; both send the cotangent through `trace_wrapped`, so both enter one pipeline:

- `hook_p`, behind `jhop.hook`: a linear identity whose transpose runs the hook. Forward mode passes through it.
- `tensor_point`, behind a Tensor inside a compiled function: a `jax.custom_vjp` identity whose backward rule reads the
  Tensor's hook list when the backward is traced, so that a hook registered after a use still sees the whole sum.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jhop import _compat
from jhop._contract import HookFn, flat_caller, hook_fn, identity_key, is_inexact
from jhop._errors import HookError, JhopError
from jhop._source import describe_hook
from jhop._trace_wrapped import bind_hook, trace_wrapped

_ids = itertools.count()
_changes = threading.local()


def changes() -> int:
    """How often this thread has changed hook lists: a trace in which a hook did that must not serve another run."""
    return getattr(_changes, "count", 0)


class HookList:
    """Hooks of one value, in order of registration. Compared by identity: it is a parameter of JAX functions.

    Attributes:
        groups: hooks that it shares with other values (`_gates.Group`), by the ids of their handles; None before.
    """

    __slots__ = ("__weakref__", "_hooks", "groups")

    def __init__(self) -> None:
        self._hooks: dict[int, Callable[..., Any]] = {}
        self.groups: dict[int, Any] | None = None

    def add(self, fn: Callable[..., Any], where: str = "register_hook") -> RemovableHandle:
        """Registers a hook; the same function may be registered twice and then runs twice.

        Raises:
            HookError: `fn` is not callable.
        """
        if not callable(fn):
            raise HookError(f"{where}: expected a callable hook, got {type(fn).__name__} ({fn!r}).")
        handle = RemovableHandle(self)
        self._hooks[handle.id] = fn
        _changes.count = changes() + 1
        return handle

    def remove(self, handle_id: int) -> None:
        if self._hooks.pop(handle_id, None) is not None:
            _changes.count = changes() + 1

    def ids(self) -> tuple[int, ...]:
        """The ids of the hooks' handles."""
        return tuple(self._hooks)

    def snapshot(self) -> tuple[Callable[..., Any], ...]:
        """The hooks as of now: one removed or added by a running hook counts from the next backward on."""
        return tuple(self._hooks.values())

    def split(self, handle_id: int) -> tuple[HookList, HookList]:
        """Those that were registered before and those that were after a handle was made."""
        before, after = HookList(), HookList()
        for own, fn in self._hooks.items():
            (before if own < handle_id else after)._hooks[own] = fn
        return before, after

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)


class RemovableHandle:
    """Removes its hook with `remove()`, or at the end of a `with` block.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([3.0], requires_grad=True)
        >>> with x.register_hook(lambda ct: ct * 10.0):
        ...     (x * 2.0).backward(jax.numpy.ones(1))
        >>> x.grad.tolist()
        [20.0]
    """

    __slots__ = ("__weakref__", "_hooks", "id")

    def __init__(self, hooks: Any):
        self._hooks: Callable[[], Any] = weakref.ref(hooks)  # what has `remove(id)`
        self.id = next(_ids)

    def follow(self, other: RemovableHandle) -> None:
        """From now on this handle removes what another one does."""
        self._hooks, self.id = other._hooks, other.id

    def refuse(self, message: str) -> None:
        """From now on `remove` raises JhopError."""

        class Compiled:
            @staticmethod
            def remove(handle_id: int) -> None:
                raise JhopError(message)

        self._hooks = Compiled

    def remove(self) -> None:
        """Removes the hook; a second call does nothing.

        Raises:
            JhopError: outside of a compiled function, for a hook that the function put on a value inside it.
        """
        hooks = self._hooks()
        if hooks is not None:
            hooks.remove(self.id)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def run_hooks(ct: Any, hooks: HookList, *, kind: str = "tensor_pre_hook") -> Any:
    """Sends a cotangent through hooks in order of registration."""
    for fn in hooks.snapshot():
        ct = trace_wrapped(ct, fn=fn, kind=kind)
    return ct


# -- tensor_point ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tensor_point(hooks: HookList, x: Any) -> Any:
    """Identity on a Tensor's array; its cotangent passes through the Tensor's hooks."""
    return x


def _tensor_point_fwd(hooks: HookList, x: Any) -> tuple[Any, None]:
    return x, None


def _tensor_point_bwd(hooks: HookList, _: None, ct: Any) -> tuple[Any]:
    # Runs when the backward is traced, which is after the whole forward function has run.
    return (run_hooks(ct, hooks),)


tensor_point.defvjp(_tensor_point_fwd, _tensor_point_bwd)


def is_tensor_point(eqn: Any) -> bool:
    """Whether an equation is a `tensor_point`."""
    return getattr(eqn.params.get("bwd"), "f", None) is _tensor_point_bwd


# -- hook_p ------------------------------------------------------------------------------------------------------------

hook_p = jex_core.Primitive("hook")
hook_p.multiple_results = True


def hook(x: Any, fn: Callable[[Any], Any], *, name: str | None = None) -> Any:
    """Returns `x`, such that `fn` runs on the cotangent of all later uses of the returned value.

    Args:
        x: an array or a pytree of arrays, of any shapes and dtypes. Leaves that carry no gradient (integers, bools)
            pass untouched.
        fn: called once per backward pass with the summed cotangent of the floating leaves, in the structure of `x`
            (`numpy.zeros` of dtype float0 stand for leaves without gradient). It returns a cotangent of the same
            structure, shapes and dtypes, or None to keep it.
        name: shown in printed graphs and errors; by default the function's own name.

    Returns:
        A value equal to `x`. Only uses of it are hooked; uses of `x` itself are not.

    Raises:
        HookError: `fn` is not callable, or `x` has no floating leaf, or a leaf that is no array. During the backward
            pass: what `fn` returned has another structure, shape, dtype or type.

    Forward-mode derivatives ignore the hook, as in PyTorch. Under `jax.vmap` the hook sees one example's cotangent.
    Where a hook closes over values that JAX is tracing, it gets those, and the containers that hold them, as they are
    when `hook` is called; so it does an object that holds them and is gone when the backward pass is traced.

    Example:
        >>> import jax, jhop
        >>> def loss(x):
        ...     x = jhop.hook(x, lambda ct: ct.clip(-1.0, 1.0))
        ...     return (x ** 2).sum()
        >>> jax.grad(loss)(jax.numpy.array([0.25, 3.0])).tolist()
        [0.5, 1.0]
    """
    if not callable(fn):
        raise HookError(f"jhop.hook: expected a callable hook, got {type(fn).__name__} ({fn!r}).")
    leaves, tree = jax.tree.flatten(x)
    for leaf in leaves:
        if not _is_array_like(leaf):
            raise HookError(f"jhop.hook: expected an array or a pytree of arrays, got a leaf {_type_of(leaf)}.")
    moving = [i for i, leaf in enumerate(leaves) if _carries_gradient(leaf)]
    if not moving:
        found = ", ".join(str(jnp.result_type(leaf)) for leaf in leaves) or "no array"
        raise HookError(
            f"jhop.hook: only floating and complex values have gradients, got {found}. "
            "Hook the floating value that is computed from this one."
        )
    if not any(isinstance(leaves[i], _compat.Tracer) for i in moving):
        return x  # nothing is being differentiated or traced here
    still = {i: np.zeros(jnp.shape(leaf), jax.dtypes.float0) for i, leaf in enumerate(leaves) if i not in moving}
    make_call = functools.partial(flat_caller, tree=tree, still=still)
    key = ("point", identity_key(fn), tree, tuple((i, zero.shape) for i, zero in still.items()), name)
    point, operands = hook_fn(fn, make_call, len(moving), key, name=name or "")
    outs = hook_p.bind(*(leaves[i] for i in moving), *operands, fn=point, n=len(moving))
    for i, out in zip(moving, outs, strict=True):
        leaves[i] = out
    return jax.tree.unflatten(tree, leaves)


def _is_array_like(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _compat.has_arrays_of(leaf.dtype)
    return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def _type_of(leaf: Any) -> str:
    return f"{type(leaf).__name__} of {leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _carries_gradient(leaf: Any) -> bool:
    return is_inexact(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


# Inputs of `hook_p`: `n` values that pass through, then tracers that the hook closes over.


def _hook_impl(*args: Any, fn: HookFn, n: int) -> list[Any]:
    return list(args[:n])


def _hook_abstract_eval(*avals: Any, fn: HookFn, n: int) -> list[Any]:
    return list(avals[:n])


def _hook_jvp(primals: Any, tangents: Any, *, fn: HookFn, n: int) -> Any:
    # The primal needs no mark once its tangent has one.
    dots = tangents[:n]
    if all(type(dot) is ad.Zero for dot in dots):
        return list(primals[:n]), list(dots)
    dots = [ad.instantiate_zeros(dot) for dot in dots]
    return list(primals[:n]), hook_p.bind(*dots, *primals[n:], fn=fn, n=n)


def _hook_linearize(nonzero: Any, *primals: Any, fn: HookFn, n: int) -> Any:
    def linear(operands: list[Any], *tangents: Any) -> list[Any]:
        dots = tangents[:n]
        if not moves:
            return list(dots)
        return list(hook_p.bind(*(ad.instantiate_zeros(dot) for dot in dots), *operands, fn=fn, n=n))

    moves = any(nonzero[:n])
    return list(primals[:n]), [moves] * n, list(primals[n:]), linear


def _hook_transpose(cts: Any, *args: Any, fn: HookFn, n: int) -> list[Any]:
    operands = list(args[n:])
    if all(type(ct) is ad.Zero for ct in cts):
        return [*cts, *(None for _ in operands)]  # nothing depends on the value: no call
    if any(ad.is_undefined_primal(operand) for operand in operands):
        raise HookError(
            f"{describe_hook(fn.base)} closes over an input by which jax.linear_transpose transposes the function: in "
            "the transpose, that has no value. Let it close over values from outside of the function."
        )
    outs = bind_hook(fn, [*(ad.instantiate_zeros(ct) for ct in cts), *operands], n)
    return [*outs, *(None for _ in operands)]


def _hook_batch(axis_data: Any, args: Any, dims: Any, *, fn: HookFn, n: int) -> Any:
    mapped = any(d is not None for d in dims)
    kwargs = _compat.vmap_kwargs(axis_data, mapped=mapped)
    if not mapped:
        # The cotangent will be the sum over examples. The hook may still use a named axis.
        named = fn.derive("vmap", _over_axis(fn, kwargs), str(kwargs)) if "axis_name" in kwargs else fn
        return hook_p.bind(*args, fn=named, n=n), dims[:n]
    in_axes = tuple(0 if i < n or d is not None else None for i, d in enumerate(dims))
    args = [
        arg if axis is None else batching.bdim_at_front(arg, d, axis_data.size)
        for arg, d, axis in zip(args, dims, in_axes, strict=True)
    ]
    return hook_p.bind(*args, fn=fn.batched(in_axes, kwargs), n=n), [0] * n


def _over_axis(fn: HookFn, kwargs: dict[str, Any]) -> Any:
    """A hook's call on values that are the same for all examples, inside the examples' named axis."""

    def call(*flat: Any) -> list[Any]:
        def once(_: Any) -> list[Any]:
            return fn.call(*flat)

        try:
            return jax.vmap(once, in_axes=None, out_axes=None, **kwargs)(None)
        except ValueError as error:
            if "out_axes is None" not in str(error):
                raise
            raise HookError(
                f"{describe_hook(fn.base)} returned a value that varies over the axis {kwargs['axis_name']!r} of "
                "jax.vmap, over which its cotangent does not vary. Reduce over it (jax.lax.psum or pmean) before "
                "returning, or hook a value that differs from example to example."
            ) from None

    return call


hook_p.def_impl(_hook_impl)
hook_p.def_abstract_eval(_hook_abstract_eval)
ad.primitive_jvps[hook_p] = _hook_jvp
ad.primitive_transposes[hook_p] = _hook_transpose
_compat.def_linearize(hook_p, _hook_linearize)
batching.fancy_primitive_batchers[hook_p] = _hook_batch
_compat.register_lowering(hook_p, _hook_impl, multiple_results=True)
