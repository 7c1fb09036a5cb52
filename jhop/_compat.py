"""Everything that depends on which JAX this is. No other module asks, and no other touches `jax._src`. Differences
are found by looking at the feature, not at the version number.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.extend.core as jex_core
from jax._src import checkify as _checkify  # its table of rules has no public name
from jax._src import config as _config  # what JAX itself puts into the keys of its caches
from jax._src import core as _core  # the current trace has no public name
from jax._src import dispatch as _dispatch
from jax._src import pjit as _pjit
from jax._src.interpreters import ad as _ad
from jax._src.lax import lax as _lax
from jax._src.sharding_impls import UNSPECIFIED as UNSPECIFIED  # what a jit says of shardings that it leaves open
from jax.extend import source_info_util
from jax.interpreters import mlir, xla
from jax.interpreters import partial_eval as pe

Tracer = jax.core.Tracer


def same_trace(a: Any, b: Any) -> bool:
    """Whether two tracers belong to one trace (it has no public name); then a function of one may return the other."""
    return getattr(a, "_trace", None) is getattr(b, "_trace", None)


def current_trace() -> Any:
    """What operations in this thread are handed to: compared by identity, and not to be kept."""
    return _core.trace_ctx.trace


def is_staged(value: Any) -> bool:
    """Whether a tracer is of a trace of the kind that is under way, and of no batching or differentiation inside it."""
    return type(getattr(value, "_trace", None)) is type(current_trace())


def is_mapped(value: Any) -> bool:
    """Whether a tracer stands for one example of many under `jax.vmap`."""
    return type(getattr(value, "_trace", None)).__name__ == "BatchTrace"


def is_of(value: Any, trace: Any) -> bool:
    """Whether a value is a tracer of a trace."""
    return getattr(value, "_trace", None) is trace


DimExpr = type(jax.export.symbolic_shape("n")[0])  # a class without a public name


def staging() -> Any:
    """The trace that stages this thread's operations into a jaxpr, those on concrete arrays too; None if none does."""
    trace = _core.trace_ctx.trace
    while trace is not None and type(trace).__name__ != "DynamicJaxprTrace":
        trace = getattr(trace, "parent_trace", None)  # others hand on to what is around them
    return trace


def staging_rules() -> tuple[dict[Any, Any], Any]:
    """JAX's rules for staging operations, by primitive, and the primitive of jitted functions: it may have none."""
    return getattr(_pjit.pe, "custom_staging_rules", {}), getattr(_pjit, "jit_p", None)


def under(trace: Any) -> Any:
    """A context in which operations are handed to a trace around the present one."""
    return _core.set_current_trace(trace)


def transforming() -> bool:
    """Whether any transformation of JAX is under way in this thread."""
    return not _core.trace_state_clean()


_session_context = jax.make_user_context()
_hook_traces: Any = object()


def cache_of(owner: object) -> Any:
    """A context manager in which JAX finds only those traces of inner functions that were made in it before."""
    return _session_context(owner)


def hook_traces() -> Any:
    """A context manager in which functions that JAX jits find traces made in it, and none of those made outside."""
    return cache_of(_hook_traces)


def forget_hook_traces() -> None:
    """From now on, what was traced in `hook_traces` is not found again."""
    global _hook_traces
    _hook_traces = object()


def trace_context() -> Any:
    """All settings that change what a trace gives: x64, precision, meshes, axis names ..."""
    return _config.trace_context()


def is_dim_expr(value: Any) -> bool:
    """Whether a value is a symbolic dimension and not a number."""
    return isinstance(value, DimExpr)


def dim_symbols(dim: Any) -> frozenset[str]:
    """The names of the symbols in a dimension."""
    return frozenset(dim._get_vars()) if is_dim_expr(dim) else frozenset()  # the public way, str(), has to be parsed


def evaluate_dim(dim: Any, sizes: dict[str, Any]) -> Any:
    """The number that a symbolic dimension stands for once its symbols have sizes; symbolic where those are."""
    if not is_dim_expr(dim):
        return int(dim)
    size = dim._evaluate(sizes)  # the public way works only inside an exported call
    return size if is_dim_expr(size) else int(size)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Splits any jaxpr, closed or open, into (jaxpr, constants)."""
    consts = getattr(jaxpr, "consts", None)  # from jax 0.12 there is one class for both; before, open ones had none
    return (jaxpr, []) if consts is None else (jaxpr.jaxpr, list(consts))


def inputs_used(jaxpr: Any, outputs: list[bool]) -> list[bool]:
    """Which inputs of a jaxpr, closed or open, these of its outputs are computed from."""
    return list(pe.dce_jaxpr(open_jaxpr(jaxpr)[0], outputs)[1])


@contextlib.contextmanager
def in_place_of(eqn: Any, *, scope: str | None = None, source: bool = True) -> Iterator[None]:
    """While active, new equations are where an equation is: its name stack, with `scope` on it, its mesh and other
    context and, unless they are to tell of the code that makes them, its source.
    """
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    names = names if scope is None else names.extend(scope)
    traceback = eqn.source_info.traceback if source else None
    with source_info_util.user_context(traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind_eqn(eqn: Any, args: list[Any]) -> list[Any]:
    """Binds an equation's primitive again, with the same parameters, in the equation's own place."""
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)  # before jax 0.11, call primitives'
    with in_place_of(eqn):
        outs = eqn.primitive.bind(*subfuns, *args, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def stage_again(eqn: Any, args: list[Any]) -> list[Any] | None:
    """Adds an equation as it is to the jaxpr that is being made: as `bind_eqn` does, in a third of the time.

    Binding asks for the types of the results again, which are known where those of the arguments are the equation's.

    Returns:
        The results; None where nothing was added, because the equation has to be bound.
    """
    trace, primitive = current_trace(), eqn.primitive
    if eqn.effects or getattr(primitive, "ref_allocating", False) or not hasattr(trace, "emit_eqn"):
        return None
    names, source = source_info_util.current_name_stack(), eqn.source_info
    if names.stack:
        source = source.replace(name_stack=names + source.name_stack)
    tracers = []
    for atom, arg in zip(eqn.invars, args, strict=True):
        if type(arg) in (bool, int, float, complex):
            return None  # only binding makes arrays of them
        tracer = arg if is_of(arg, trace) else trace.to_jaxpr_tracer(arg, source)
        if tracer.aval is not atom.aval and tracer.aval != atom.aval:
            return None
        tracers.append(tracer)
    trace.frame.is_high |= primitive.is_high(*(tracer.aval for tracer in tracers), **eqn.params)
    avals = [variable.aval for variable in eqn.outvars]
    return trace.emit_eqn(tracers, avals, primitive, eqn.params, eqn.effects, source, eqn.ctx)


def variable_of(value: Any, trace: Any) -> Any:
    """The variable of a tracer of a trace; None for constants and other values."""
    known = is_of(value, trace) and isinstance(value.val, jex_core.Var) and trace.get_const(value) is None
    return value.val if known else None


def equations_of(trace: Any, start: int | None = None) -> Any:
    """How many equations a trace has made, or those from the `start`th on; None where one of them has effects."""
    made = trace.frame.tracing_eqns
    if start is None:
        return len(made)
    if any(getattr(eqn, "effects", True) or getattr(eqn.primitive, "ref_allocating", False) for eqn in made[start:]):
        return None
    rest = ("outvars", "primitive", "params", "effects", "source_info", "ctx")
    taken = [([tracer.val for tracer in eqn.in_tracers], *(getattr(eqn, key) for key in rest)) for eqn in made[start:]]
    return list(itertools.starmap(jex_core.JaxprEqn, taken))


def reads_after(value: Any, result: Any) -> bool:
    """Whether the present trace has an equation that reads a value, after the one which made a result."""
    eqns = current_trace().frame.tracing_eqns
    later = itertools.dropwhile(lambda eqn: all(v is not result.val for v in eqn.outvars), eqns)
    return any(tracer.val is value.val for eqn in itertools.islice(later, 1, None) for tracer in eqn.in_tracers)


def binds_axes(eqn: Any) -> bool:
    """Whether an equation's body has mesh axes in scope, so that it can be traced only while the equation is bound."""
    return eqn.primitive.name == "shard_map"


def bind_with_body(
    eqn: Any, args: list[Any], body: Callable[[list[Any]], list[Any]], *, more: int = 0
) -> list[Any]:
    """Binds a `shard_map` equation again with `body` in place of its jaxpr, all else of it kept.

    `jax.shard_map` itself checks what the equation of a derivative need not keep to, such as the shardings of inputs.

    Args:
        body: takes and returns lists of per-device values, in the equation's mesh and axes. It may use values from
            around the equation.
        more: how many results the body has more than before; they are the same on every device.
    """
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    given = {**eqn.params, "out_specs": (*eqn.params["out_specs"], *(jax.sharding.PartitionSpec(),) * more)}
    params = eqn.primitive.get_bind_params(given)
    # How results are packed for the primitive has no public name: a jaxpr that hands its inputs on does it.
    identity, _ = open_jaxpr(jax.make_jaxpr(lambda *values: values)(*(0 for _ in range(len(jaxpr.outvars) + more))))
    (pack,) = eqn.primitive.get_bind_params({**given, "jaxpr": identity})["subfuns"]
    params["subfuns"] = (lambda *values: pack(*body(list(values))),)
    params["debug_info"] = jaxpr.debug_info._replace(result_paths=None)
    with eqn.ctx.manager:
        return list(eqn.primitive.bind(*args, **params))


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (len(tree) for tree in params["ft_in"].unpack())  # jax >= 0.11
    return consts, carry


def asked_by_operator() -> bool:
    """Whether the attribute lookup under way comes from a binary operator of JAX's arrays."""
    # jax._src.numpy.array_methods names them `_operator_mul` and so on, in all versions so far.
    return sys._getframe(2).f_code.co_name.startswith("_operator_")


def asked_by_jax() -> bool:
    """Whether the attribute lookup under way comes from code of JAX's own."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("jax.")


def asked_whether_it_fits() -> bool:
    """Whether the conversion to a NumPy array under way is that of `jax.numpy.array`, which only wants the error where
    a number is too large for its dtype, or one of NumPy's own that only wants the shape.
    """
    if (frame := sys._getframe(2)).f_code.co_name in ("ndim", "shape", "size"):
        return frame.f_globals.get("__name__", "").startswith("numpy.")
    caller = getattr(frame.f_back, "f_code", frame.f_code)
    return (frame.f_code.co_name, caller.co_name) == ("coerce_to_array", "array")


def register_value(kind: type, value_of: Callable[[Any], Any]) -> None:
    """Makes primitives and `jax.typeof` take objects of a class as what `value_of` returns for them."""
    xla.canonicalize_dtype_handlers[kind] = value_of
    # The public name of this table is deprecated, and nothing has replaced it.
    _core.pytype_aval_mappings[kind] = lambda value: _core.typeof(value_of(value))


_UNMAP_TAKES_MESH_AXIS = len(inspect.signature(jex_core.unmapped_aval).parameters) > 3


def batched_aval(axis_data: Any, aval: Any) -> Any:
    """The aval of a value batched at its front, under the `axis_data` that a batching rule receives."""
    if _UNMAP_TAKES_MESH_AXIS:
        return jex_core.unmapped_aval(axis_data.size, 0, aval, axis_data.explicit_mesh_axis)
    return jex_core.unmapped_aval(axis_data.size, 0, aval)


def vmap_kwargs(axis_data: Any, *, mapped: bool) -> dict[str, Any]:
    """The keywords that make `jax.vmap` repeat the batching which a batching rule was called for.

    Args:
        mapped: whether an argument is mapped. The size is then its own, also where it was a symbol in the rule.
    """
    kwargs: dict[str, Any] = {} if mapped else {"axis_size": axis_data.size}
    if isinstance(axis_data.name, (str, tuple)):
        kwargs["axis_name"] = axis_data.name
    if axis_data.spmd_name is not None:
        kwargs["spmd_axis_name"] = axis_data.spmd_name
    return kwargs


_LINEARIZED = _ad.fallback_linearize_rule(jax.lax.neg_p, True, [True], 0.0)  # what such a rule returns, by an example


def def_linearize(primitive: Any, rule: Callable[..., Any]) -> None:
    """Registers how a primitive with several results is linearized; without, JAX traces its JVP rule apart each time.

    Args:
        rule: `rule(nonzero, *primals, **params)`, in which `nonzero` says of which primals there are tangents, returns
            (results, of which results there are tangents, residuals, function). The function is called as
            `function(residuals, *tangents)` and returns the results' tangents.
    """
    # The public way registers JVP rules only.
    n_unused = len(_LINEARIZED) - 4  # later versions of JAX have "structured residuals" before the function

    def linearize(_is_vjp: bool, nonzero: Any, *primals: Any, **params: Any) -> Any:
        outs, nonzero_outs, residuals, function = rule(nonzero, *primals, **params)

        def linear(residuals: Any, *rest: Any) -> Any:
            return function(residuals, *rest[n_unused:])

        return outs, nonzero_outs, residuals, *[None] * n_unused, linear

    _ad.primitive_linearizations[primitive] = linearize


_Jitted = type(jax.jit(lambda: None))  # a class of jaxlib's without a public name


def is_jitted(value: Any) -> bool:
    """Whether a function was made by `jax.jit`."""
    # By its type first: an object of the user's may do anything when it is asked for an attribute.
    return type(value) is _Jitted and hasattr(value, "_jit_info")


def jit_again(jitted: Any) -> Callable[[Any], Any]:
    """`jax.jit` with the options that `jitted` was made with, for other functions of the same parameters."""
    info = jitted._jit_info  # the options have no public name
    return lambda fun: _pjit._cpp_pjit(fun, info)


def with_weak_type(value: Any, weak: bool) -> Any:
    """An array with or without JAX's mark of a Python scalar, which says how it promotes."""
    if jax.typeof(value).weak_type == weak:
        return value
    # The public function can only take the mark away.
    return _lax._convert_element_type(value, value.dtype, weak_type=weak)


def has_arrays_of(dtype: Any) -> bool:
    """Whether JAX has arrays of a dtype: of NumPy's, none of strings, times, objects and records."""
    return getattr(dtype, "kind", "key") not in tuple("OSUMm") and getattr(dtype, "names", None) is None


def varying_axes(aval: Any) -> frozenset[str]:
    """The manual mesh axes over which a value inside shard_map may differ."""
    axes = getattr(aval, "manual_axis_type", None)
    if axes is not None:
        return frozenset(axes.varying)
    return frozenset(getattr(aval, "vma", ()))


def forget_failed_effects() -> None:
    """Lets ordered effects go on after one of them raised: on a GPU each later one would raise the same again."""
    _dispatch.runtime_tokens.clear()  # without a public name


def as_varying_as(value: Any, aval: Any) -> Any:
    """A value as one that may differ over the manual mesh axes over which an aval's may."""
    missing = varying_axes(aval) - varying_axes(jax.typeof(value))
    return jax.lax.pcast(value, tuple(sorted(missing)), to="varying") if missing else value


def register_lowering(primitive: Any, fun: Any, *, multiple_results: bool) -> None:
    """Lowers a primitive by tracing `fun` in its place."""
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=multiple_results))


def allow_effect(kind: type) -> None:
    """Lets an effect be wherever JAX has a list of those that may, and stay where a function is differentiated."""
    of = _core.effects
    for kinds in (of.lowerable_effects, of.control_flow_allowed_effects, of.custom_derivatives_allowed_effects,
                  of.remat_allowed_effects, of.partial_eval_kept_effects):  # fmt: skip
        kinds.add_type(kind)


_CHECKIFY_COUNTS = "ctx" in inspect.signature(_checkify.checkify_jaxpr).parameters


def register_checkify(primitive: Any, body: Callable[..., Any]) -> None:
    """What `checkify` sees in an equation's place: the jaxpr `body(*inputs, **params)`; itself where that is None."""

    def rule(*given: Any, **params: Any) -> Any:
        *counts, error, enabled = given[: 2 + _CHECKIFY_COUNTS]
        args = given[2 + _CHECKIFY_COUNTS :]
        closed = body(*args, **params)
        if closed is None:
            return error, primitive.bind(*args, **params)
        return _checkify.checkify_jaxpr(*counts, closed, enabled, error, *args)

    _checkify.error_checks[primitive] = rule
