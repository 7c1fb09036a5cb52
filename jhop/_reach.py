"""Which hooks of a compiled backward take part in one pass.

The backward graph of a function gives the gradients of all its inputs from those of all its results. A pass may start
from some results only, or ask for some inputs only. A hook on a value that no cotangent comes to, or that leads to
nothing asked for, must not run then, as it would not if the function ran operation by operation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._graph import GraphModule
from jhop._trace_wrapped import trace_wrapped_p


def narrowed(gm: GraphModule, came: Sequence[bool], wanted: Sequence[bool]) -> GraphModule:
    """A backward graph without the hooks that have no part in a pass; the graph itself if all have.

    Args:
        gm: residuals, then cotangents -> cotangents.
        came: per cotangent that it takes, whether there is one: zeros stand for the others.
        wanted: per result, whether it is asked for.
    """
    jaxpr, consts = _compat.open_jaxpr(gm.jaxpr)
    cts = jaxpr.invars[len(jaxpr.invars) - len(came) :]
    # A hook that no cotangent could ever come to is part of how a residual is computed again.
    ever, now = _after(jaxpr, cts), _after(jaxpr, [v for v, here in zip(cts, came, strict=True) if here])
    needed = _before(jaxpr, [v for v, here in zip(jaxpr.outvars, wanted, strict=True) if here])
    eqns = []
    same: dict[Any, Any] = {}  # per result of a hook that is left out, the cotangent that it would have taken

    def atom(item: Any) -> Any:
        return item if isinstance(item, jex_core.Literal) else same.get(item, item)

    for eqn in jaxpr.eqns:
        outs = eqn.outvars
        if eqn.primitive is trace_wrapped_p and ever.intersection(outs) and not (now & needed).intersection(outs):
            taken = eqn.invars[: len(outs)]
            if [v.aval for v in taken] == [v.aval for v in outs]:  # not so for a derivative of a hook
                same.update((out, atom(ct)) for out, ct in zip(outs, taken, strict=True))
                continue
        eqns.append(eqn.replace(invars=[atom(v) for v in eqn.invars]))
    if not same:
        return gm
    jaxpr = jaxpr.replace(eqns=eqns, outvars=[atom(v) for v in jaxpr.outvars])
    return dataclasses.replace(gm, jaxpr=jex_core.ClosedJaxpr(jaxpr, consts))


def _after(jaxpr: Any, variables: Sequence[Any]) -> set[Any]:
    """What is computed from any of these variables, and they."""
    found = set(variables)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jex_core.Literal) and v in found for v in eqn.invars):
            found.update(eqn.outvars)
    return found


def _before(jaxpr: Any, atoms: Sequence[Any]) -> set[Any]:
    """What any of these is computed from, and they."""
    found = {v for v in atoms if not isinstance(v, jex_core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if found.intersection(eqn.outvars):
            found.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    return found
