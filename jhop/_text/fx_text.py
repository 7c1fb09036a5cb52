"""The text of a graph that is no backward pass, in the form of PyTorch's `make_fx`."""

from __future__ import annotations

import re
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._expr import INFIX, PREFIX
from jhop._graph import NO_INFO, GraphModule
from jhop._scalar import fill, scalar_p
from jhop._text._aten import aten_name, aten_target
from jhop._text._namespace import Namespace
from jhop._text._statements import Stmt, print_module
from jhop._text._steps import CALLS, steps_of
from jhop._text._words import call_of, extra_args, python_value, tensor_type
from jhop._trace_wrapped import trace_wrapped_p

_INVOKE = "torch__dynamo__trace_wrapped_higher_order_op_self_invoke"


def fx_text(gm: GraphModule) -> str:
    """Statements for inputs, equations and outputs, one each."""
    jaxpr, consts = _compat.open_jaxpr(gm.jaxpr)
    space = Namespace()
    values: dict[Any, Any] = {}
    stmts: list[Stmt] = []

    same: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        while not isinstance(atom, jex_core.Literal) and atom in same:
            atom = same[atom]
        return python_value(atom.val) if isinstance(atom, jex_core.Literal) else values[atom]

    def placeholder(variable: Any, name: str) -> None:
        name = space.make(name)
        values[variable] = Stmt("placeholder", name, name, annotation=tensor_type(variable.aval))
        stmts.append(values[variable])

    def add(name: str, target: str, args: tuple[Any, ...], aval: Any) -> Stmt:
        stmt = Stmt("call_function", space.make(name), target, args, annotation=aval and tensor_type(aval))
        stmts.append(stmt)
        return stmt

    for variable, given in zip(jaxpr.invars, gm.inputs, strict=True):
        placeholder(variable, given.name)
    for number, variable in enumerate(jaxpr.constvars):
        placeholder(variable, f"_tensor_constant{number}")
    steps, handed_on = steps_of(jaxpr)
    same.update(handed_on)
    for eqn in steps:
        args = tuple(read(atom) for atom in eqn.invars)
        one = len(eqn.outvars) == 1
        aval = eqn.outvars[0].aval if one else None
        if eqn.primitive is trace_wrapped_p:
            stmt = add("trace_wrapped", _INVOKE, args, aval)
        elif eqn.primitive is scalar_p:
            op = eqn.params["op"]
            operands = tuple(fill(eqn.params["template"], args))
            stmt = add(op.rstrip("_"), INFIX.get(op) or PREFIX.get(op) or f"torch.sym_{op}", operands, aval)
        else:
            name = eqn.params.get("name") if eqn.primitive.name in CALLS else None
            target = f"torch.{name.strip('_')}" if name else aten_target(eqn.primitive.name)
            if (call := call_of(eqn, args)) is not None:
                name, args = call
                target = "torch.einsum" if name == "einsum" else target
            stmt = add((name or aten_name(eqn.primitive.name)).strip("_"), target, args + extra_args(eqn), aval)
        wanted = gm.info.get(eqn.outvars[0], NO_INFO).name if one else None
        if wanted is not None:
            stmt.name = space.rename(stmt.name, wanted)
        for index, variable in enumerate(eqn.outvars):
            values[variable] = stmt if one else add("getitem", "getitem", (stmt, index), variable.aval)
    outs = [read(atom) for atom in jaxpr.outvars]
    stmts.append(Stmt("output", "output", "output", (outs[0] if len(outs) == 1 else tuple(outs),)))
    return print_module(stmts, class_name=re.sub(r"\W+", "_", gm.name))
