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

    after: dict[int | None, int | None] = dict(zip([None, *order], [*order, None], strict=True))
    before = {b: a for a, b in after.items()}
    rank = {index: float(index) for index in order}  # place in the present order, as a number to compare

    def move_after(index: int, anchor: int) -> None:
        left, right = before[index], after[index]
        after[left], before[right] = right, left
        right = after[anchor]
        after[anchor], after[index], before[index], before[right] = index, right, anchor, index
        # Halving a gap many times runs out of digits; then everything gets a whole number again.
        rank[index] = (rank[anchor] + (rank[right] if right is not None else rank[anchor] + 2)) / 2
        if not rank[anchor] < rank[index] or (right is not None and not rank[index] < rank[right]):
            rank.update((i, float(k)) for k, i in enumerate(_walk_list(after)))

    for kind in ("tensor_pre_hook", "accumulate", "post_acc_grad_hook"):
        for index in _walk_list(after):
            eqn = eqns[index]
            if kind == "accumulate":
                if eqn.primitive is not accumulate_grad_p:
                    continue
            elif eqn.primitive is not trace_wrapped_p or eqn.params["fn"].kind != kind:
                continue
            needs = [maker[v] for v in eqn.invars if not isinstance(v, jex_core.Literal) and v not in inputs]
            anchor = max(needs, key=rank.__getitem__, default=None)
            if anchor is not None and after[anchor] != index:
                move_after(index, anchor)
    order = _walk_list(after)
    reordered = jaxpr.replace(eqns=[eqns[i] for i in order])
    return jex_core.ClosedJaxpr(reordered, consts), order


def _walk_list(after: dict[int | None, int | None]) -> list[int]:
    """The items of a linked list that starts behind None."""
    items: list[int] = []
    item = after[None]
    while item is not None:
        items.append(item)
        item = after[item]
    return items
