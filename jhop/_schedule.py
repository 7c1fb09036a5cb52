"""Order of equations in a captured backward pass.

A pass is captured node by node, which puts hooks and gradient accumulation far from the gradients that they belong to.
Like PyTorch's compiled autograd, jhop moves each hook to directly after the gradient that it takes, and each
accumulation to directly after the later of its gradient and its leaf. Gradients are then finished, and their memory
freed, as early as can be; hooks that share Python state run in this order.
"""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._boundary import accumulate_grad_p
from jhop._trace_wrapped import trace_wrapped_p


def schedule(closed: Any) -> tuple[Any, list[int]]:
    """Reorders a captured backward pass.

    Args:
        closed: its closed jaxpr.

    Returns:
        (the jaxpr with moved equations, for each new position the old one).
    """
    jaxpr, consts = _compat.open_jaxpr(closed)
    eqns = list(jaxpr.eqns)
    order = list(range(len(eqns)))
    maker = {variable: i for i, eqn in enumerate(eqns) for variable in eqn.outvars}
    inputs = set(jaxpr.invars) | set(jaxpr.constvars)

    def move_after(index: int, anchor: int) -> None:
        order.remove(index)
        order.insert(order.index(anchor) + 1, index)

    for kind in ("tensor_pre_hook", "accumulate", "post_acc_grad_hook"):
        for index in list(order):
            eqn = eqns[index]
            if kind == "accumulate":
                if eqn.primitive is not accumulate_grad_p:
                    continue
            elif eqn.primitive is not trace_wrapped_p or eqn.params["fn"].kind != kind:
                continue
            needs = [maker[v] for v in eqn.invars if not isinstance(v, jex_core.Literal) and v not in inputs]
            anchor = max(needs, key=order.index, default=None)
            if anchor is not None and order[order.index(anchor) + 1] != index:
                move_after(index, anchor)
    reordered = jaxpr.replace(eqns=[eqns[i] for i in order])
    return jex_core.ClosedJaxpr(reordered, consts), order
