"""A jaxpr's equations as a flat list of steps: calls of small jitted functions are replaced by what they do.

`jnp.clip` or `jnp.where` in a hook is one `jit` equation, whose name and order of operands are JAX's own affair. Print
shows the operations inside instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat

CALLS = ("jit", "pjit")


class Value:
    """A value inside a call; outside, variables of the jaxpr are used."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation. Inputs and outputs are variables, literals and `Value`s, all of which have an `aval`."""

    primitive: Any
    params: dict[str, Any]
    invars: list[Any]
    outvars: list[Any]


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex_core.Literal)


def resolve(atom: Any, same: dict[Any, Any]) -> Any:
    """What a value is that a call only hands on."""
    while not is_literal(atom) and atom in same:
        atom = same[atom]
    return atom


def steps_of(jaxpr: Any, keep: Callable[[Any], bool] = lambda eqn: False) -> tuple[list[Step], dict[Any, Any]]:
    """The steps of an open jaxpr.

    Args:
        keep: says of an equation that it is shown as it is.

    Returns:
        (steps, for outputs of calls that only hand on an input, what they are).
    """
    steps: list[Step] = []
    same: dict[Any, Any] = {}

    def add(eqns: Any, env: dict[Any, Any]) -> None:
        for eqn in eqns:
            invars = [resolve(atom if is_literal(atom) else env.get(atom, atom), same) for atom in eqn.invars]
            outvars = [env.setdefault(v, Value(v.aval)) if env else v for v in eqn.outvars]
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in CALLS else None
            opened, consts = _compat.open_jaxpr(inner) if inner is not None else (None, [])
            if opened is None or consts or opened.constvars or keep(eqn):
                steps.append(Step(eqn.primitive, eqn.params, invars, outvars))
                continue
            scope: dict[Any, Any] = dict(zip(opened.invars, invars, strict=True)) or {None: None}
            made = {v for inside in opened.eqns for v in inside.outvars}
            for inside, outside in zip(opened.outvars, outvars, strict=True):
                if not is_literal(inside) and inside in made and inside not in scope:
                    scope[inside] = outside
            add(opened.eqns, scope)
            for inside, outside in zip(opened.outvars, outvars, strict=True):
                found = inside if is_literal(inside) else scope[inside]
                if found is not outside:
                    same[outside] = found

    add(jaxpr.eqns, {})
    return steps, same
