"""Results of a compiled function that retain their gradients: what its backward returns for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.extend.core as jex_core

from jhop import _compat
from jhop._hook import retained_p


class Retained(NamedTuple):
    """A result that retains its gradient.

    Attributes:
        result: its index.
        slot: which of the cotangents that the backward takes is its own.
        edges: of the node of a call, those to inputs that the result depends on.
    """

    result: int
    slot: int
    edges: frozenset[int]


def behind(jaxpr: Any, atoms: list[Any]) -> set[Any]:
    """What values depend on, past what is detached, and they."""
    found = {v for v in atoms if not isinstance(v, jex_core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if found.intersection(eqn.outvars) and eqn.primitive.name != "stop_gradient":
            found.update(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
    return found


def with_retained(closed: Any, slots: list[int], n_cts: int) -> Any:
    """A backward that returns the retained gradients, too: those that are marked in it.

    One that is not marked is that of a result with which nothing moves: what comes from outside.
    """
    jaxpr, consts = _compat.open_jaxpr(closed)
    cts = jaxpr.invars[len(jaxpr.invars) - n_cts :]
    found = {place: cts[slot] for place, slot in enumerate(slots)}
    same: dict[Any, Any] = {}
    eqns = []

    def atom(item: Any) -> Any:
        return item if isinstance(item, jex_core.Literal) else same.get(item, item)

    for eqn in jaxpr.eqns:
        invars = [atom(item) for item in eqn.invars]
        if eqn.primitive is retained_p:
            found[eqn.params["place"]] = same[eqn.outvars[0]] = invars[0]
        else:
            eqns.append(eqn.replace(invars=invars))
    outs = [*map(atom, jaxpr.outvars), *(found[place] for place in range(len(slots)))]
    debug_info = jaxpr.debug_info._replace(result_paths=None)
    return jex_core.ClosedJaxpr(jaxpr.replace(eqns=eqns, outvars=outs, debug_info=debug_info), consts)
