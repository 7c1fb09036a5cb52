"""What hooks ask of numbers that are traced themselves: nobody can answer, and the graph would fit one value only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jhop import _compat
from jhop._entries import Place
from jhop._errors import Unsupported
from jhop._expr import Expr
from jhop._graph import GraphModule
from jhop._guards import Answer
from jhop._interp import inner_jaxprs
from jhop._replay import replay_p
from jhop._scalar import largest_int, scalar_p, weak_aval


def refuse_questions(gm: GraphModule, places: dict[Place, str], name: str) -> None:
    """Raises where what hooks do depends on the values of numbers that are traced.

    Args:
        gm: an inlined graph.
        places: where such numbers are, with what they are called.
        name: of the function that has the hooks.
    """
    lifted: Any = gm.lifted
    if not places:
        return
    asked = None
    for answer in lifted.guards.answers:
        slots = [places.get(slot.container.slot(slot.key)) for slot in answer.slots]
        path = next((path for path in slots if path is not None), None)
        if path is not None and not _holds_on_device(answer):
            asked = f"asks for the value of the number `{path}` (`{answer.text}`)"
            break
    else:
        if _raises_int_to_number(gm.jaxpr):
            paths = listed(list(places.values()))
            asked = f"raises an int to a power whose sign says of what type the result is, and depends on {paths}"
    if asked is not None:
        raise Unsupported(
            f"jhop.functionalize: a hook of `{name}` {asked}, which is traced here (by jax.jit, lax.scan, vmap ...) "
            "and has no value. Keep it as an array (jnp.int32(0)), and use jnp.where or lax.cond on it; or call the "
            "pure function untraced, with Python numbers in the state."
        )


def _holds_on_device(answer: Answer) -> bool:
    """Whether a question is one whether ints fit into the device's, where they wrap."""
    bound = answer.expr.args[-1] if answer.expr.args else None
    asked = answer.expr.args[0] if answer.expr.args else None
    ints = all(type(slot.value) is int for slot in answer.slots)
    ints |= isinstance(asked, Expr) and asked.op == "extent"  # of which floats have none
    is_bound = isinstance(bound, Expr) and bound.op == "const" and bound.args[0] == largest_int()
    return ints and is_bound and answer.expr.op == "le" and answer.then and weak_aval(int).dtype.itemsize < 8


def _raises_int_to_number(jaxpr: Any) -> bool:
    """Whether there is a power of an int with an exponent that is no constant: its sign decides on the type."""

    def is_float(part: Any, operands: Sequence[Any]) -> bool:
        if part.op == "const":
            return type(part.args[0]) is float
        return part.op == "leaf" and jnp.issubdtype(operands[part.args[0]].aval.dtype, jnp.floating)

    def in_expr(expr: Any, operands: Sequence[Any]) -> bool:
        parts = [part for arg in expr.args for part in (arg if isinstance(arg, tuple) else (arg,))]
        exprs = [part for part in parts if isinstance(part, Expr)]
        power = expr.op == "pow" and exprs[1].op != "const" and not is_float(exprs[0], operands)
        return power or any(in_expr(part, operands) for part in exprs)

    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive is scalar_p and eqn.params["op"] == "pow":
            base, exponent = eqn.params["template"]
            floats = type(base) is float or base is None and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
            if exponent is None and not floats:
                return True
        if eqn.primitive is replay_p and in_expr(eqn.params["expr"], eqn.invars):
            return True
        if any(map(_raises_int_to_number, inner_jaxprs(eqn))):
            return True
    return False


def listed(paths: Sequence[str]) -> str:
    """Paths in words, not too many of them."""
    shown = [f"`{path}`" for path in paths[:8]]
    return ", ".join(shown) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "") if shown else "none"
