"""Higher-order equations made anew, for hooks inside them that read lifted state.

`_interp.rewrite` keeps an equation as it is but for its jaxprs. Where a new jaxpr uses a value from around it, which a
parameter cannot hold, the equation is made again through JAX's own function for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jhop import _compat
from jhop._errors import Unsupported
from jhop._interp import evaluate


def rebuild(eqn: Any, values: list[Any], run: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """A higher-order equation made anew through JAX's own functions, whose bodies may use values around them.

    Args:
        run: `run(jaxpr, values)` evaluates a jaxpr of the equation under the present trace.

    Raises:
        Unsupported: there is no such function, or it would lose what the equation says (shardings, donation).
    """
    maker = _REBUILD.get(eqn.primitive.name)
    if maker is None:
        raise Unsupported(
            f"jhop cannot inline a hook that reads Python state inside `{eqn.primitive}`. Pass what it reads to the "
            "function as an argument and close over that, or move the hooked value out."
        )
    with eqn.ctx.manager:
        return list(maker(eqn, values, run))


def is_plain_call(eqn: Any) -> bool:
    """Whether an equation is a `jax.jit` that says nothing but what to compute."""
    return (
        eqn.primitive.name in ("jit", "pjit")
        and not any(eqn.params.get("donated_invars", ()))
        and all(
            type(sharding).__name__ == "UnspecifiedValue"
            for key in ("in_shardings", "out_shardings")
            for sharding in eqn.params.get(key, ())
        )
    )


def _rebuild_custom(eqn: Any, values: list[Any], run: Any) -> list[Any]:
    # After differentiation only the function itself matters, not its rules.
    return run(eqn.params["call_jaxpr"], values)


def _rebuild_scan(eqn: Any, values: list[Any], run: Any) -> list[Any]:
    params = eqn.params
    n_consts, n_carry = _compat.scan_split(params)
    consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]

    def body(carry: Any, x: Any) -> Any:
        outs = run(params["jaxpr"], [*consts, *carry, *x])
        return outs[:n_carry], outs[n_carry:]

    carry, ys = jax.lax.scan(
        body, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys]


def _rebuild_while(eqn: Any, values: list[Any], run: Any) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    return jax.lax.while_loop(
        lambda carry: run(params["cond_jaxpr"], [*cond, *carry])[0],
        lambda carry: run(params["body_jaxpr"], [*body, *carry]),
        init,
    )


def _rebuild_cond(eqn: Any, values: list[Any], run: Any) -> list[Any]:
    index, *operands = values
    branches = [lambda *args, branch=branch: run(branch, list(args)) for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *operands)


def _rebuild_remat(eqn: Any, values: list[Any], run: Any) -> list[Any]:
    # `jax.checkpoint` would forget that the equation was differentiated, and with it the barrier: bind it again, with
    # what its body uses from around it as further inputs.
    inner = eqn.params["jaxpr"]
    closed = jax.make_jaxpr(lambda *args: run(inner, list(args)))(*(v.aval for v in inner.invars))
    opened, consts = _compat.open_jaxpr(closed)
    n = len(consts)
    inputs = [*opened.constvars, *opened.invars]
    lifted = opened.replace(constvars=[], invars=inputs, debug_info=opened.debug_info._replace(arg_names=None))
    hoisted = jax.make_jaxpr(lambda *args: evaluate(lifted, list(args)))(*(v.aval for v in inputs))
    flat, rest = _compat.open_jaxpr(hoisted)
    if rest:
        raise Unsupported(f"jhop cannot inline a hook inside `{eqn.primitive}` that reads an array of Python state.")
    assert len(flat.invars) == n + len(values)
    return _compat.bind_eqn(eqn.replace(params={**eqn.params, "jaxpr": flat}), [*consts, *values])


_REBUILD = {
    "custom_jvp_call": _rebuild_custom, "custom_vjp_call": _rebuild_custom,
    "scan": _rebuild_scan, "while": _rebuild_while, "cond": _rebuild_cond,
    "remat": _rebuild_remat, "remat2": _rebuild_remat, "checkpoint": _rebuild_remat,
}  # fmt: skip
