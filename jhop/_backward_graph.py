"""`backward_graph`: the backward pass of a JAX function, alone, as a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from jhop import _compat
from jhop._capture import Recorder, parameter_names, trace
from jhop._errors import JhopError
from jhop._graph import GraphModule, Info, Input
from jhop._interp import inputs_for_sizes
from jhop._source import eqn_name, hook_name, user_frames


def backward_graph(fn: Callable[..., Any]) -> Callable[..., GraphModule]:
    """The VJP of a function as a graph: `jhop.backward_graph(fn)(*args)`.

    Args:
        fn: a JAX function of arrays and pytrees; it may contain hooks, which stay opaque.

    Returns:
        A function of the same arguments that returns a `GraphModule`. Its inputs are the cotangents of the floating
        outputs, then the residuals, each named after the value that it is: a parameter, or a local variable of `fn`.
        Its outputs are the cotangents of the floating arguments. Where sizes are symbols (`jax.export.symbolic_shape`)
        that no residual has, an argument that has them is an input too.

    Raises:
        JhopError: `fn` is not callable.

    Example:
        >>> import jax.numpy as jnp, jhop
        >>> def f(x):
        ...     y = jnp.sin(x)
        ...     return y * x
        >>> gm = jhop.backward_graph(f)(jnp.float32(1.0))
        >>> [given.name for given in gm.inputs]
        ['ct', 'x', 'cos', 'y']
    """
    if not callable(fn):
        raise JhopError(f"jhop.backward_graph: expected a function, got {type(fn).__name__}.")

    def captured(*args: Any, **kwargs: Any) -> GraphModule:
        flat, in_tree = jax.tree.flatten((args, kwargs))
        moving = [i for i, leaf in enumerate(flat) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
        n_outs = 0
        pull_tree: Any = None

        def forward(*values: Any) -> list[Any]:
            nonlocal n_outs, pull_tree

            def of_moving(*parts: Any) -> list[Any]:
                filled = list(values)
                for i, part in zip(moving, parts, strict=True):
                    filled[i] = part
                in_args, in_kwargs = jax.tree.unflatten(in_tree, filled)
                outs = jax.tree.leaves(fn(*in_args, **in_kwargs))
                return [out for out in outs if jnp.issubdtype(jnp.result_type(out), jnp.inexact)]

            outs, pull = jax.vjp(of_moving, *(values[i] for i in moving))
            n_outs = len(outs)
            residuals, pull_tree = jax.tree.flatten(pull)
            return [*outs, *residuals]

        closed, _ = trace(forward, [jax.typeof(leaf) for leaf in flat], Recorder())
        names = _value_names(closed, parameter_names(fn, args, kwargs))
        return _pull_graph(closed, n_outs, pull_tree, names, hook_name(fn))

    return captured


def _value_names(closed: Any, parameters: list[str]) -> dict[Any, str]:
    """The user's name for each value of a forward: a parameter, a local variable, or what computed it."""
    jaxpr, _ = _compat.open_jaxpr(closed)
    names = dict(zip(jaxpr.invars, parameters, strict=True))
    taken: set[Any] = set()
    for eqn in jaxpr.eqns:
        local, place = eqn_name(eqn), tuple(user_frames(eqn)[:1])
        # JAX computes a value and what its derivative needs at one place: the first is the user's.
        mine = local is not None and (local, place) not in taken
        taken.add((local, place))
        for variable in eqn.outvars:
            names[variable] = local if mine and local else eqn.primitive.name
    return names


def _pull_graph(closed: Any, n_outs: int, tree: Any, names: Any, name: str) -> GraphModule:
    jaxpr, _ = _compat.open_jaxpr(closed)
    wanted = jaxpr.outvars[n_outs:]
    kept = list(dict.fromkeys(v for v in wanted if not isinstance(v, jex_core.Literal)))
    kept += inputs_for_sizes(jaxpr, [v.aval for v in [*jaxpr.outvars[:n_outs], *kept]])
    place = {variable: n_outs + i for i, variable in enumerate(kept)}

    def pull(*values: Any) -> list[Any]:
        leaves = [v.val if isinstance(v, jex_core.Literal) else values[place[v]] for v in wanted]
        return list(jax.tree.unflatten(tree, leaves)(list(values[:n_outs])))

    avals = [v.aval for v in [*jaxpr.outvars[:n_outs], *kept]]
    backward, known = trace(pull, avals, Recorder())
    info = known()
    inputs = [Input(name="ct" if n_outs == 1 else f"ct_{i}") for i in range(n_outs)]
    inputs += [Input(name=names.get(variable, "residual")) for variable in kept]
    opened, _ = _compat.open_jaxpr(backward)
    for variable, given in zip(opened.invars, inputs, strict=True):
        info[variable] = dataclasses.replace(info.get(variable, Info()), name=given.name)
    return GraphModule(
        jaxpr=backward, inputs=tuple(inputs), info=info, name=f"{name}_backward", made_by="backward_graph"
    )
