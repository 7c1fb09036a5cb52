"""What the printer must know of a whole graph before it prints one statement."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._boundary import aot_prologue_p
from jhop._container import MISSING
from jhop._graph import NO_INFO, GraphModule
from jhop._template import outputs_in
from jhop._text._steps import Step, is_literal, resolve


def needed_values(gm: GraphModule, steps: list[Step], same: dict[Any, Any]) -> set[Any]:
    """Values that appear in print: those that outputs need when operators are shown with the user's own operands.

    A cast that JAX put before an operator is then needed by nobody.
    """
    outs = _compat.open_jaxpr(gm.jaxpr)[0].outvars
    needed = {v for v in (resolve(v, same) for v in outs) if not is_literal(v)}
    for step in reversed(steps):
        if not step.outvars:  # an effect
            needed.update(v for v in step.invars if not is_literal(v))
            continue
        info = gm.info.get(step.outvars[0], NO_INFO)
        if not needed.intersection(step.outvars) and info.operator is None and info.stage != "captured":
            continue
        if info.operator is not None:
            needed.add(step.outvars[0])
            operands = (resolve(v, same) for v in info.operator.operands if isinstance(v, jex_core.Var))
            needed.update(v for v in operands if not is_literal(v))
        else:
            needed.update(v for v in step.invars if not is_literal(v))
    return needed


def tangent_values(steps: list[Step]) -> set[Any]:
    """Values of compiled backwards that depend on incoming gradients."""
    moving: set[Any] = set()
    for step in steps:
        if step.primitive is aot_prologue_p:
            moving.update(step.outvars[step.params["n_saved"] :])
        elif moving.intersection(v for v in step.invars if not is_literal(v)):
            moving.update(step.outvars)
    return moving


def state_outputs(gm: GraphModule, steps: list[Step], n: int) -> list[int]:
    """Outputs after the first `n` that are new state: objects in the order met; within one, the last written first."""
    if gm.lifted is None:
        return []
    outs = _compat.open_jaxpr(gm.jaxpr)[0].outvars
    made = {v: i for i, step in enumerate(steps) for v in step.outvars}
    groups: dict[int, list[int]] = {}
    for write in gm.lifted.writes:
        group = groups.setdefault(id(write.container.obj), [])
        group += [] if write.value is MISSING else outputs_in(write.value)
    order: list[int] = []
    for group in groups.values():
        order += sorted(group, key=lambda i: -1 if is_literal(outs[i]) else made.get(outs[i], -1), reverse=True)
    return [i for i in dict.fromkeys(order) if i >= n]
