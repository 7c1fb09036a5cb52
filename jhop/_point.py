"""`jhop.hook`: a hook on a value in a function of JAX.

Behind it is `hook_p`, a linear identity whose transpose runs the hook, as one `trace_wrapped` equation. Forward mode
passes through it.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.interpreters import ad, batching

from jhop import _compat
from jhop._contract import HookFn, flat_caller, flat_hook, identity_key, is_inexact
from jhop._errors import HookError
from jhop._hook_options import PLAIN, HookOptions, checked_options
from jhop._logs import INERT, inert
from jhop._source import describe_hook, origin_of, user_frame
from jhop._trace_wrapped import bind_hook

hook_p = jex_core.Primitive("hook")
hook_p.multiple_results = True


ZEROS = ("materialize", "none", "skip")


def hook(
    x: Any, fn: Callable[[Any], Any], *, name: str | None = None, zeros: str = "materialize", stop: bool = False,
    torch_complex: bool = False,
) -> Any:  # fmt: skip
    """Returns `x`, such that `fn` runs on the cotangent of all later uses of the returned value.

    Args:
        x: an array or a pytree of arrays, of any shapes and dtypes. Leaves that carry no gradient (integers, bools)
            pass untouched.
        fn: called once per backward pass with the summed cotangent of the floating leaves, in the structure of `x`
            (`numpy.zeros` of dtype float0 stand for leaves without gradient). It returns a cotangent of the same
            structure, shapes and dtypes, or None to keep it.
        name: shown in printed graphs and errors; by default the function's own name.
        zeros: what `fn` is given for a leaf of a pytree that nothing differentiated depends on, or by which nobody
            differentiates: "materialize" for an array (zeros, if nothing depends on it), "none" for None, for which it
            must return None. With "skip" it does not run unless every leaf has a gradient. It never runs if none has.
        stop: whether what `fn` returns is a constant for further derivatives, as in PyTorch, whose hooks run without
            recording; the hook is not run again for them. A cotangent that it keeps, or returns itself, is none.
            By default derivatives of any order go through the hook.
        torch_complex: whether `fn` gets and returns complex cotangents in PyTorch's convention, in which the gradient
            is the direction of steepest ascent: the conjugate of JAX's.

    Returns:
        A value equal to `x`. Only uses of it are hooked; uses of `x` itself are not.

    Raises:
        HookError: `fn` is not callable, or `x` has no floating leaf, or a leaf that is no array, or an option is none
            of those above. During the backward pass: what `fn` returned has another structure, shape, dtype or type.

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

        >>> def area(sides):
        ...     sides = jhop.hook(sides, lambda cts: [ct if ct is None else 10.0 * ct for ct in cts], zeros="none")
        ...     return sides[0] ** 2
        >>> [float(grad) for grad in jax.grad(area)([3.0, 5.0])]
        [60.0, 0.0]
    """
    options = PLAIN
    if stop or torch_complex or zeros != "materialize":
        options = checked_options("jhop.hook", ZEROS, zeros=zeros, stop=stop, torch_complex=torch_complex)
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
        if INERT.level:  # as it is once somebody set it
            inert(describe_hook(fn))
        return x  # nothing is being differentiated or traced here
    still = {i: np.zeros(jnp.shape(leaf), jax.dtypes.float0) for i, leaf in enumerate(leaves) if i not in moving}
    return jax.tree.unflatten(tree, put_point(leaves, tree, fn, still, options, name or ""))


def put_point(
    leaves: list[Any], tree: Any, fn: Callable[..., Any], still: dict[int, Any], options: HookOptions, name: str
) -> list[Any]:
    """The leaves of a pytree with a hook on them.

    Args:
        leaves, tree: the pytree.
        fn: the hook, on pytrees.
        still: leaves, by index, that have no hook, and what it is given for them, as for `flat_caller`.
        options: what was asked of it.
        name: of the hook; by default, its own.
    """
    moving = [i for i in range(len(leaves)) if i not in still]
    make_call = functools.partial(flat_caller, tree=tree, still=still, options=options)
    shapes = tuple((i, getattr(zero, "shape", None)) for i, zero in still.items())
    key = ("point", identity_key(fn), tree, shapes, name, options)
    point, operands = flat_hook(fn, make_call, len(moving), key, name=name, options=options)
    outs = hook_p.bind(*(leaves[i] for i in moving), *operands, fn=point, n=len(moving))
    leaves = list(leaves)
    for i, out in zip(moving, outs, strict=True):
        leaves[i] = out
    return leaves


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


def _hook_lowered(*args: Any, fn: HookFn, n: int) -> list[Any]:
    # One that is still here runs in no backward of this program: its transpose is another equation.
    if INERT.isEnabledFor(logging.INFO):
        frame = user_frame(types.SimpleNamespace(source_info=source_info_util.current()))
        origin = None if frame is None else origin_of(*frame)
        inert(describe_hook(fn.base), None if origin is None else (origin.file, origin.line))
    return list(args[:n])


def _hook_abstract_eval(*avals: Any, fn: HookFn, n: int) -> list[Any]:
    return list(avals[:n])


def _hook_jvp(primals: Any, tangents: Any, *, fn: HookFn, n: int) -> Any:
    # The primal needs no mark once its tangent has one.
    dots = list(tangents[:n])
    moves = _moving(fn, [type(dot) is not ad.Zero for dot in dots])
    return list(primals[:n]), dots if moves is None else _on_tangents(dots, list(primals[n:]), fn, moves)


def _hook_linearize(nonzero: Any, *primals: Any, fn: HookFn, n: int) -> Any:
    def linear(operands: list[Any], *tangents: Any) -> list[Any]:
        dots = list(tangents[:n])
        return dots if moves is None else _on_tangents(dots, operands, fn, moves)

    moves = _moving(fn, nonzero[:n])
    return list(primals[:n]), list(nonzero[:n] if moves is None else moves), list(primals[n:]), linear


def _moving(fn: HookFn, nonzero: Sequence[bool]) -> list[bool] | None:
    """Which values a hook point passes on, by which of them there are; None where its hook is not to run."""
    options = fn.options
    gradients = nonzero[: len(nonzero) - options.extra]
    if not any(gradients) or (options.zeros == "skip" and not all(gradients)):
        return None
    return [moves or options.zeros != "none" or i >= len(gradients) for i, moves in enumerate(nonzero)]


def _on_tangents(dots: list[Any], operands: list[Any], fn: HookFn, moves: list[bool]) -> list[Any]:
    """Tangents, through a hook point of those that move."""
    if not all(moves):
        fn = fn.reached(tuple(i for i, here in enumerate(moves) if not here), len(moves))
    given = [ad.instantiate_zeros(dot) for dot, here in zip(dots, moves, strict=True) if here]
    outs = iter(hook_p.bind(*given, *operands, fn=fn, n=len(given)))
    return [next(outs) if here else dot for dot, here in zip(dots, moves, strict=True)]


def _hook_transpose(cts: Any, *args: Any, fn: HookFn, n: int) -> list[Any]:
    operands = list(args[n:])
    there = [type(ct) is not ad.Zero for ct in cts]
    moves = _moving(fn, there)
    if moves is None:
        return [*cts, *(None for _ in operands)]  # nothing depends on the value: no call
    if any(ad.is_undefined_primal(operand) for operand in operands):
        raise HookError(
            f"{describe_hook(fn.base)} closes over an input by which jax.linear_transpose transposes the function: in "
            "the transpose, that has no value. Let it close over values from outside of the function."
        )
    if fn.options.zeros == "none":
        moves = there
    if not all(moves):
        fn = fn.reached(tuple(i for i, here in enumerate(moves) if not here), n)
    given = [ad.instantiate_zeros(ct) for ct, here in zip(cts, moves, strict=True) if here]
    outs = iter(bind_hook(fn, [*given, *operands], len(given)))
    return [*(next(outs) if here else ct for ct, here in zip(cts, moves, strict=True)), *(None for _ in operands)]


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
_compat.register_lowering(hook_p, _hook_lowered, multiple_results=True)
