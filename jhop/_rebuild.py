"""Higher-order equations made anew, for hooks inside them that use values from around them.

`_interp.rewrite` keeps an equation as it is but for its jaxprs. Where a new jaxpr uses a value from around it, such as
lifted state, which a parameter cannot hold, that value becomes a further input of the equation; loops, which count
their inputs in ways that differ between versions of JAX, are made again through JAX's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._errors import Unsupported
from jhop._interp import evaluate
from jhop._trace_wrapped import inlining

Run = Callable[[Any, list[Any]], list[Any]]


def rebuild(eqn: Any, values: list[Any], run: Run, *, more: int = 0) -> list[Any]:
    """A higher-order equation made anew, whose bodies may use values around them.

    Args:
        run: `run(jaxpr, values)` evaluates a jaxpr of the equation under the present trace.
        more: how many results its body has more than before, in a `shard_map`.

    Raises:
        Unsupported: it is not known how to make this one.
    """
    maker = _REBUILD.get(eqn.primitive.name)
    if maker is None:
        raise Unsupported(
            f"jhop cannot inline a hook that reads Python state inside `{eqn.primitive}`, or that makes an array "
            "there. Pass what it reads to the function as an argument and close over that, or move the hooked value "
            "out."
        )
    return list(maker(eqn, values, run, *[more] * bool(more)))


def is_plain_call(eqn: Any) -> bool:
    """Whether an equation is a `jax.jit` that says nothing but what to compute, and its name."""
    return (
        eqn.primitive.name in ("jit", "pjit")
        and not any(eqn.params.get("donated_invars", ()))
        and all(x is _compat.UNSPECIFIED for key in ("in_shardings", "out_shardings") for x in eqn.params[key])
        and all(x is None for key in ("in_layouts", "out_layouts") for x in eqn.params[key])
    )


def holds_constants(eqn: Any) -> bool:
    """Whether an array that a body makes may be a constant of the equation's jaxpr, and need not be an input."""
    return eqn.primitive.name not in (*_REMAT, "linear_call", "custom_partitioning")


def is_sealed(eqn: Any) -> bool:
    """Whether an equation's jaxprs are in an object that makes them itself, so that they cannot be replaced."""
    return eqn.primitive.name == "call_hi_primitive"


def _hoist(jaxpr: Any, run: Run) -> tuple[Any, list[Any]]:
    """A jaxpr evaluated by `run`, with what it then uses from around it as first inputs.

    Returns:
        (jaxpr without constants, the values of the further inputs).
    """
    given, _ = _compat.open_jaxpr(jaxpr)
    closed = jax.make_jaxpr(lambda *args: run(jaxpr, list(args)))(*(v.aval for v in given.invars))
    opened, consts = _compat.open_jaxpr(closed)
    inputs = [*opened.constvars, *opened.invars]
    lifted = opened.replace(constvars=[], invars=inputs, debug_info=opened.debug_info._replace(arg_names=None))
    # Traced once more, as effects on inputs are counted by their places.
    again = jax.make_jaxpr(lambda *args: evaluate(lifted, list(args)))(*(v.aval for v in inputs))
    flat, rest = _compat.open_jaxpr(again)
    assert not rest
    return flat, consts


def _bind(eqn: Any, values: list[Any], **params: Any) -> list[Any]:
    return _compat.bind_eqn(eqn.replace(params={**eqn.params, **params}), values)


def _rebuild_remat(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    # `jax.checkpoint` would forget that the equation was differentiated, and with it the barrier.
    flat, consts = _hoist(eqn.params["jaxpr"], run)
    barred = eqn.params["prevent_cse"]
    if isinstance(barred, tuple):
        barred = (False,) * len(consts) + barred
    return _bind(eqn, [*consts, *values], jaxpr=flat, prevent_cse=barred)


def _rebuild_jit(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    flat, consts = _hoist(eqn.params["jaxpr"], run)
    n, more = len(consts), len(flat.outvars) - len(eqn.outvars)
    return _bind(
        eqn, [*consts, *values], jaxpr=jex_core.ClosedJaxpr(flat, []),
        donated_invars=(False,) * n + eqn.params["donated_invars"],
        in_shardings=(_compat.UNSPECIFIED,) * n + eqn.params["in_shardings"],
        in_layouts=(None,) * n + eqn.params["in_layouts"],
        out_shardings=eqn.params["out_shardings"] + (_compat.UNSPECIFIED,) * more,
        out_layouts=eqn.params["out_layouts"] + (None,) * more,
    )  # fmt: skip


def _rebuild_call(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    key = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    flat, consts = _hoist(eqn.params[key], run)
    return _bind(eqn, [*consts, *values], **{key: jex_core.ClosedJaxpr(flat, [])})


def _expand(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    """What JAX runs in place of a "hi" primitive when it compiles it. Its rules matter as little as a custom one's."""
    primitive = eqn.params["_prim"]

    def expanded(*args: Any) -> Any:
        return primitive.expand(*jax.tree.unflatten(primitive.in_tree, args))

    with _compat.in_place_of(eqn):
        with inlining(None):  # what it binds is for `run` to see
            closed = jax.make_jaxpr(expanded)(*map(jax.typeof, values))
        return run(closed, values)


def _rebuild_custom(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    # After differentiation only the function itself matters, not its rules.
    with _compat.in_place_of(eqn):
        return run(eqn.params["call_jaxpr"], values)


def _rebuild_scan(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    params = eqn.params
    n_consts, n_carry = _compat.scan_split(params)
    consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]

    def body(carry: Any, x: Any) -> Any:
        outs = run(params["jaxpr"], [*consts, *carry, *x])
        return outs[:n_carry], outs[n_carry:]

    options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
    with _compat.in_place_of(eqn):
        carry, ys = jax.lax.scan(body, init, xs, **options)
    return [*carry, *ys]


def _rebuild_while(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    with _compat.in_place_of(eqn):
        return jax.lax.while_loop(
            lambda carry: run(params["cond_jaxpr"], [*cond, *carry])[0],
            lambda carry: run(params["body_jaxpr"], [*body, *carry]),
            init,
        )


def _together(jaxprs: Any, run: Run) -> tuple[list[Any], list[Any]]:
    """`_hoist` of jaxprs that get the same inputs: each takes the further inputs of all."""
    flats, groups = zip(*(_hoist(jaxpr, run) for jaxpr in jaxprs), strict=True)
    consts = [const for group in groups for const in group]
    made = []
    start = 0
    for flat, group in zip(flats, groups, strict=True):
        avals = [*map(jax.typeof, consts), *(v.aval for v in flat.invars[len(group) :])]
        mine = slice(start, start + len(group))
        made.append(
            jax.make_jaxpr(
                lambda *args, flat=flat, mine=mine: evaluate(flat, [*args[mine], *args[len(consts) :]])
            )(*avals)
        )  # fmt: skip
        start += len(group)
    return made, consts


def _rebuild_cond(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    branches, consts = _together(eqn.params["branches"], run)
    return _bind(eqn, [values[0], *consts, *values[1:]], branches=tuple(branches))


def _rebuild_solve(eqn: Any, values: list[Any], run: Run) -> list[Any]:
    """Each of the four functions has its own first inputs."""
    jaxprs: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    inputs: list[Any] = []
    start = 0
    for name, jaxpr in eqn.params["jaxprs"]._asdict().items():
        n = getattr(eqn.params["const_lengths"], name)
        if jaxpr is None:
            jaxprs[name], lengths[name] = None, n
            continue
        flat, consts = _hoist(jaxpr, run)
        jaxprs[name], lengths[name] = jex_core.ClosedJaxpr(flat, []), n + len(consts)
        inputs += [*consts, *values[start : start + n]]
        start += n
    return _bind(
        eqn, [*inputs, *values[start:]],
        jaxprs=type(eqn.params["jaxprs"])(**jaxprs), const_lengths=type(eqn.params["const_lengths"])(**lengths),
    )  # fmt: skip


def _rebuild_shard_map(eqn: Any, values: list[Any], run: Run, more: int = 0) -> list[Any]:
    return _compat.bind_with_body(eqn, values, lambda args: run(eqn.params["jaxpr"], args), more=more)


_REMAT = ("remat", "remat2", "checkpoint")
_CALLS = ("closed_call", "eval_jaxpr", "compute_on", "xla_metadata_call")
RUNS_ONCE = frozenset({*_REMAT, *_CALLS, "jit", "pjit", "shard_map"})  # whose body may return more than before
RUNS_IN_PLACE = frozenset({"custom_jvp_call", "custom_vjp_call", "call_hi_primitive"})  # where `rebuild` runs the body
_REBUILD = {
    "custom_jvp_call": _rebuild_custom, "custom_vjp_call": _rebuild_custom,
    "scan": _rebuild_scan, "while": _rebuild_while, "cond": _rebuild_cond, "custom_linear_solve": _rebuild_solve,
    "call_hi_primitive": _expand, "jit": _rebuild_jit, "pjit": _rebuild_jit,
    **dict.fromkeys(_REMAT, _rebuild_remat),
    **dict.fromkeys(_CALLS, _rebuild_call), "shard_map": _rebuild_shard_map,
}  # fmt: skip
