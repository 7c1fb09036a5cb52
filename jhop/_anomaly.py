"""Passes that look for what made the first NaN: behind `jhop.autograd.detect_anomaly`.

They run node by node, and a compiled function's backward equation by equation, as only then a NaN has a place.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jhop import _compat, _engine
from jhop._blame import is_floating, what, where
from jhop._compiled import CompiledNode
from jhop._errors import JhopError
from jhop._graph import Info
from jhop._interp import evaluate
from jhop._node import Node, full_cts
from jhop._plan import Request, plan
from jhop._source import describe_hook


class CheckedPass(_engine.Pass):
    """The engine's pass over arrays; an error where NaN comes out of what got none."""

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        out = super().tensor_hooks(ct, hooks)
        if _is_nan(out) and not _is_nan(ct):
            raise _error(" or ".join(map(describe_hook, hooks.snapshot())), out)
        return out

    def compute(self, node: Node, cts: list[Any]) -> list[Any]:
        if any(map(_is_nan, cts)):
            return super().compute(node, cts)
        steps = isinstance(node, CompiledNode) and node.passes is None
        outs = self._step_by_step(node, cts) if steps else super().compute(node, cts)
        for i, out in enumerate(outs):
            if _is_nan(out):
                raise _error(f"{node.name()}, for input {i} of the operation,", out)
        return outs

    def _step_by_step(self, node: Any, cts: list[Any]) -> list[Any]:
        gm = node.compiled.backward_for(cts, self.asked(node)).gm
        makers = {variable: eqn for eqn in _compat.open_jaxpr(gm.jaxpr)[0].eqns for variable in eqn.outvars}

        def note(variable: Any, value: Any) -> None:
            eqn = makers.get(variable)
            if eqn is not None and _is_nan(value):
                place = where(gm.info.get(variable, Info()).origin)
                raise _error(f"{what(eqn)} in `{gm.name}`{place}", value)

        outs = evaluate(gm.jaxpr, [*node.saved(), *full_cts(node, cts)], note=note)
        return node.compiled.joint.sent(outs)


def _is_nan(value: Any) -> bool:
    return is_floating(value) and bool(jnp.isnan(value).any())


def _error(what: str, value: Any) -> JhopError:
    return JhopError(
        f"autograd.detect_anomaly: {what} made NaN of values without: {value.dtype}[{','.join(map(str, value.shape))}] "
        f"with {int(jnp.isnan(value).sum())} of {value.size}. No gradient was written."
    )


def run(request: Request) -> list[Any]:
    """Runs a backward pass with checks."""
    found = plan(request)
    for node in found.run:
        node.check()
    return CheckedPass(found, keep_graph=request.keep_graph).run(request.seeds)


_engine.CHECKED.append(run)
