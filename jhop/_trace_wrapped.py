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
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from jhop import _compat, _state
from jhop._contract import HookFn, flat_caller, flat_hook, identity_key
from jhop._effects import watch
from jhop._errors import TO_JIT, HookError, Unsupported, advising
from jhop._reads import explain, is_read
from jhop._records import lift_tuples
from jhop._source import describe_hook, hook_name
from jhop._walk import Walk

_mode = threading.local()


class _TraceWrapped(jex_core.Primitive):
    """Binds no equation while hooks are being inlined: a hook that a hook uses becomes part of it."""

    multiple_results = True

    def bind(self, *args: Any, **params: Any) -> Any:
        run = getattr(_mode, "run", None)
        return super().bind(*args, **params) if run is None else run(params["fn"].call, args)


trace_wrapped_p = _TraceWrapped("trace_wrapped")


@contextlib.contextmanager
def inlining(run: Callable[[Callable[..., list[Any]], Sequence[Any]], list[Any]] | None) -> Iterator[None]:
    """While active in this thread, `run(call, flat inputs)` stands for each `trace_wrapped` equation.

    Args:
        run: None for equations as they are elsewhere.
    """
    before = getattr(_mode, "run", None)
    _mode.run = run
    try:
        yield
    finally:
        _mode.run = before


def calls_at_once() -> bool:
    """Whether `trace_wrapped` just calls a hook of concrete values in this thread now."""
    return getattr(_mode, "run", None) is None and _compat.staging() is None


def trace_wrapped(*args: Any, fn: Callable[..., Any], kind: str = "hook", **kwargs: Any) -> Any:
    """Calls `fn(*args, **kwargs)`, as one opaque equation while JAX is tracing.

    Args:
        *args: first the cotangent: an array, or a pytree of arrays; any further ones are handed on to `fn`.
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
    extra, extra_tree = jax.tree.flatten(args[1:])
    fn = functools.partial(fn, **kwargs) if kwargs else fn
    make_call = functools.partial(flat_caller, tree=tree, extra_tree=extra_tree)
    flat = [*cts, *extra]
    staged = any(isinstance(value, _compat.Tracer) for value in flat) or _compat.staging() is not None
    run = getattr(_mode, "run", None)
    if run is not None or not staged:
        call = make_call(fn)
        return jax.tree.unflatten(tree, call(*flat) if run is None else run(call, flat))
    hook, operands = flat_hook(fn, make_call, len(flat), ("hook", identity_key(fn), tree, extra_tree), kind=kind)
    return jax.tree.unflatten(tree, bind_hook(hook, [*flat, *operands], len(cts)))


def bind_hook(hook: HookFn, flat: list[Any], n_cts: int) -> list[Any]:
    """Binds one equation on `n_cts` cotangents and further operands."""
    avals = tuple(jax.typeof(ct) for ct in flat[:n_cts])
    return trace_wrapped_p.bind(*flat, fn=hook, out_avals=avals * (2 if hook.options.stop else 1))[:n_cts]


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
    if fn.options.stop:  # what it kept moves as its cotangent does, all else stands still: it need not run again
        half = len(outs) // 2
        dots = [_where_kept(mark, dot) for mark, dot in zip(outs[half:], tangents, strict=False)]
        return outs, [*dots, *(ad.Zero(aval) for aval in tangent_avals[half:])]
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


def _where_kept(mark: Any, dot: Any) -> Any:
    """The tangent of a result of a hook that has `stop`, by its mark (see `HookFn`)."""
    return dot if type(dot) is ad.Zero else jnp.where(mark != 0, dot, jnp.zeros_like(dot))


def _trace_wrapped_transpose(cts: Any, *args: Any, fn: HookFn, out_avals: Any) -> list[Any]:
    linear = tuple(i for i, arg in enumerate(args) if ad.is_undefined_primal(arg))
    if all(type(ct) is ad.Zero for ct in cts):
        return [ad.Zero(args[i].aval) if i in linear else None for i in range(len(args))]
    cts = [ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cts]
    known = [arg for i, arg in enumerate(args) if i not in linear]
    avals = tuple(args[i].aval for i in linear)
    n, n_known = len(args), len(known)  # what is kept below must hold no tracer

    def transpose_call(*flat: Any) -> list[Any]:
        fixed, given = iter(flat[:n_known]), list(flat[n_known:])
        values = [None if i in linear else next(fixed) for i in range(n)]

        def of_linear(*parts: Any) -> list[Any]:
            filled = list(values)
            for i, part in zip(linear, parts, strict=True):
                filled[i] = part
            return fn.call(*filled)

        # The avals themselves, as they say over which mesh axes values vary and how they are sharded.
        return list(jax.linear_transpose(of_linear, *avals)(given))

    derived = fn.derive("transpose", transpose_call, linear, tuple(map(str, avals)))
    outs = iter(trace_wrapped_p.bind(*known, *cts, fn=derived, out_avals=avals))
    return [next(outs) if i in linear else None for i in range(n)]


def _trace_wrapped_batch(axis_data: Any, args: Any, dims: Any, *, fn: HookFn, out_avals: Any) -> Any:
    args = [
        arg if d is None else batching.bdim_at_front(arg, d, axis_data.size)
        for arg, d in zip(args, dims, strict=True)
    ]
    in_axes = tuple(None if d is None else 0 for d in dims)
    mapped = any(axis == 0 for axis in in_axes)
    kwargs = _compat.vmap_kwargs(axis_data, mapped=mapped)
    # A rule is also asked with nothing mapped; a hook may still ask a named axis for its index.
    if not mapped and "axis_name" not in kwargs:
        return trace_wrapped_p.bind(*args, fn=fn, out_avals=out_avals), [None] * len(out_avals)
    derived = fn.batched(in_axes, kwargs)
    avals = tuple(_compat.batched_aval(axis_data, aval) for aval in out_avals)
    outs = trace_wrapped_p.bind(*args, fn=derived, out_avals=avals)
    return outs, [0] * len(outs)


# Frames for one hook. To run into Python's limit is not safe: what `sys.monitoring` calls would raise, be handled and
# called again, without end.
_RESERVE = 300


def check_frames() -> None:
    """Raises RecursionError where few frames are left for a hook."""
    frame: Any = sys._getframe()
    left = sys.getrecursionlimit()
    while frame is not None:
        frame, left = frame.f_back, left - 1
    if left < _RESERVE:
        raise RecursionError


@contextlib.contextmanager
def no_endless_hooks(fn: HookFn) -> Iterator[None]:
    """Says which hook it was that ran itself again and again."""
    try:
        check_frames()
        yield
    except RecursionError:
        raise Unsupported(
            f"{describe_hook(fn.base)} recurses without end: each run of it, or of a hook that it uses, runs it "
            "again, and tracing follows them all. Make the inner value's hook another one, or bound the depth."
        ) from None


@contextlib.contextmanager
def _no_reads(fn: HookFn) -> Iterator[None]:
    """Says which hook it was that read a value."""
    try:
        yield
    except Exception as error:
        if not is_read(error):
            raise
        raise Unsupported(explain(fn.base, error)) from error


def _run_inner_hook(call: Callable[..., list[Any]], flat: Sequence[Any]) -> list[Any]:
    check_frames()
    return call(*flat)


def run_pure(fn: HookFn, args: Sequence[Any]) -> list[Any]:
    """Runs a hook whose equation is being lowered by plain `jax.jit`, where its state cannot be written back.

    Raises:
        Unsupported: the hook writes Python state, or does something that cannot be traced.
    """
    with _state.LOCK, advising(TO_JIT):
        walk = Walk([(hook_name(fn.base), fn.base)])
        lift_tuples(walk)
        # A NumPy array can be written to in place. That is to happen to another one, and to be seen.
        copies = {id(leaf.value): leaf.value.copy() for leaf in walk.leaves if isinstance(leaf.value, np.ndarray)}
        with _state.Lift(walk, [copies.get(id(leaf.value), leaf.value) for leaf in walk.leaves]) as lift:
            with (
                inlining(_run_inner_hook),
                watch(fn.base, trace=_compat.current_trace()),
                no_endless_hooks(fn),
                _no_reads(fn),
            ):
                outs = fn.call(*args)
            written = [write.where() for write in lift.writes()]
    arrays = ((leaf, copies.get(id(leaf.value))) for leaf in walk.leaves)
    written += [leaf.path for leaf, now in arrays if now is not None and now.tobytes() != leaf.value.tobytes()]
    if written:
        raise Unsupported(
            f"{describe_hook(fn.base)} writes Python state (`{written[0]}`), but the function that it hooks was "
            "compiled by plain `jax.jit`, which would run it once and never again. Compile with `jhop.jit` instead: it "
            "makes the state an input and an output of the graph and writes it back after every run."
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
