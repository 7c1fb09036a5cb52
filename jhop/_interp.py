"""Walks jaxprs equation by equation: the one interpreter behind capture, inlining and running.

`evaluate` binds each equation again under the current trace. `rewrite` maps a function over the jaxprs inside an
equation's parameters and keeps everything else of the equation (shardings, donation, remat's barrier, source, mesh
context), so higher-order primitives need no rules of their own as long as their inputs and outputs stay the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat

Rule = Callable[[Any, list[Any]], "list[Any] | None"]


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter is a jaxpr, open or closed."""
    return isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs in an equation's parameters, those in tuples, dicts, dataclasses and JAX's "hi" primitives too."""
    found: list[Any] = []

    def find(values: Iterable[Any]) -> None:
        for value in values:
            kind: Any = type(value)
            if not _may_hold_jaxprs(kind):  # most are numbers and names, and this is asked of every equation
                continue
            if is_jaxpr(value):
                found.append(value)
            elif isinstance(value, (tuple, list)):
                find(value)
            else:
                find(value.values() if isinstance(value, dict) else _fields_of(value).values())

    find(eqn.params.values())
    if "_prim" in eqn.params:
        find(vars(eqn.params["_prim"]).values())
    return found


@functools.lru_cache(maxsize=1024)
def _may_hold_jaxprs(cls: Any) -> bool:
    """Whether a parameter of a class is a jaxpr, or may have jaxprs in it."""
    kinds = (jex_core.Jaxpr, jex_core.ClosedJaxpr, tuple, list, dict)
    return issubclass(cls, kinds) or dataclasses.is_dataclass(cls)


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _map_parts(value: Any, visit: Callable[[Any], Any]) -> Any:
    """A parameter with `visit(jaxpr)` in place of each jaxpr in it; itself where it has none."""
    kind: Any = type(value)
    if not _may_hold_jaxprs(kind):
        return value
    if is_jaxpr(value):
        return visit(value)
    if isinstance(value, (tuple, list)):
        parts = [_map_parts(item, visit) for item in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        parts = [_map_parts(item, visit) for item in value.values()]
        if all(new is old for new, old in zip(parts, value.values(), strict=True)):
            return value
        return type(value)(zip(value, parts, strict=True))
    changed = {key: new for key, old in _fields_of(value).items() if (new := _map_parts(old, visit)) is not old}
    return dataclasses.replace(value, **changed) if changed else value


def evaluate(jaxpr: Any, args: list[Any], rule: Rule | None = None, *, note: Callable[..., None] | None = None) -> Any:
    """Evaluates a jaxpr on values or tracers.

    Args:
        jaxpr: closed, or open without constants.
        args: one value per input.
        rule: asked first for every equation; returns its outputs, or None for the ordinary treatment.
        note: called as `note(variable, value)` for every variable that gets a value.

    Returns:
        The list of outputs.
    """
    opened, consts = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = {}

    def write(variables: Iterable[Any], values: Iterable[Any]) -> None:
        for variable, value in zip(variables, values, strict=True):
            env[variable] = value
            if note is not None:
                note(variable, value)

    read = reader(env)

    write(opened.constvars, consts)
    write(opened.invars, args)
    for eqn in opened.eqns:
        values = [read(atom) for atom in eqn.invars]
        outs = rule(eqn, values) if rule is not None else None
        if outs is None:
            outs = _compat.stage_again(eqn, values)
        write(eqn.outvars, _compat.bind_eqn(eqn, values) if outs is None else outs)
    return [read(atom) for atom in opened.outvars]


def reader(env: dict[Any, Any]) -> Callable[[Any], Any]:
    """A function that says what an atom of a jaxpr stands for, variables by `env`."""
    return lambda atom: atom.val if isinstance(atom, jex_core.Literal) else env[atom]


class ClosesOverTracer(Exception):
    """A jaxpr that was traced anew uses values from around it, which parameters of its equation cannot hold."""


def rewrite(
    eqn: Any,
    values: list[Any],
    change: Callable[[Any], Any],
    params: dict[str, Any] | None = None,
    *,
    constants: bool = True,
) -> Any:
    """Binds a higher-order equation again with `change(jaxpr)` in place of each jaxpr in its parameters.

    Args:
        change: returns a closed jaxpr with the same inputs and outputs.
        params: the equation's parameters, if they are to differ otherwise too.
        constants: whether the equation's jaxprs may have constants.

    Raises:
        ClosesOverTracer: a changed jaxpr has constants that do not fit into a parameter.
    """
    given = eqn.params if params is None else params
    if _compat.binds_axes(eqn):
        renewed = eqn.replace(params=given)
        return _compat.bind_with_body(renewed, values, lambda args: evaluate(change(given["jaxpr"]), args))

    def changed(jaxpr: Any) -> Any:
        closed = change(jaxpr)
        opened, consts = _compat.open_jaxpr(closed)
        if any(isinstance(const, _compat.Tracer) for const in consts) or (consts and not constants):
            raise ClosesOverTracer
        if isinstance(jaxpr, jex_core.ClosedJaxpr):
            return closed
        if consts:
            raise ClosesOverTracer
        return opened

    params = {key: _map_parts(value, changed) for key, value in given.items()}
    return _compat.bind_eqn(eqn.replace(params=params), values)


# -- symbolic dimensions -----------------------------------------------------------------------------------------------


def symbols_in(value: Any) -> frozenset[str]:
    """The names of the symbols of symbolic dimensions that a parameter mentions."""
    if isinstance(value, (tuple, list)):
        return frozenset[str]().union(*map(symbols_in, value))
    if is_jaxpr(value):
        opened, _ = _compat.open_jaxpr(value)
        params = [param for eqn in opened.eqns for param in eqn.params.values()]
        return symbols_in([*(v.aval for v in opened.invars), *params])
    if isinstance(value, jax.core.ShapedArray):
        return symbols_in(value.shape)
    return _compat.dim_symbols(value)


def symbol_places(avals: list[Any]) -> tuple[tuple[str, int, int], ...]:
    """Where the sizes of symbols can be read: (symbol, index of the input, axis).

    A symbol that is a dimension by itself is read at each place where it is; another one at the first place from which
    it can be computed, as `b` can from `2*b + 1`.
    """
    dims = [(dim, i, axis) for i, aval in enumerate(avals) for axis, dim in enumerate(getattr(aval, "shape", ()))]
    dims = [place for place in dims if _compat.is_dim_expr(place[0])]
    found = [(str(dim), i, axis) for dim, i, axis in dims if str(dim) in _compat.dim_symbols(dim)]
    for dim, i, axis in dims:
        names = _compat.dim_symbols(dim)
        if len(names) == 1 and names.isdisjoint(name for name, _, _ in found) and linear(dim):
            found.extend((name, i, axis) for name in names)
    return tuple(found)


def linear(dim: Any) -> tuple[int, int] | None:
    """(a, c) of a dimension `a*b + c` of one symbol; None for any other."""
    (name,) = _compat.dim_symbols(dim)
    first, second = (_compat.evaluate_dim(dim, {name: size}) for size in (1, 2))
    factor = second - first
    constant = first - factor
    # Whether two points are enough to know it by is what JAX's own arithmetic says.
    return (factor, constant) if factor and str((dim - constant) // factor) == name else None


def solve(dim: Any, size: Any) -> Any:
    """The size of the one symbol of a dimension that `symbol_places` names."""
    factor, constant = linear(dim) or (1, 0)
    return (size - constant) // factor


def sizes_of(avals: list[Any], places: Iterable[tuple[str, int, int]], shapes: list[Any]) -> dict[str, Any]:
    """The sizes of symbols, where inputs of these avals have these shapes; `places` as from `symbol_places`."""
    sizes: dict[str, Any] = {}
    for symbol, index, axis in places:
        if symbol not in sizes:
            sizes[symbol] = solve(avals[index].shape[axis], shapes[index][axis])
    return sizes


def inputs_for_sizes(jaxpr: Any, avals: list[Any]) -> list[Any]:
    """Inputs of a forward that its backward needs to read symbolic sizes from, given what else it takes."""
    found: list[Any] = []
    for variable in jaxpr.invars if symbol_places([v.aval for v in jaxpr.invars]) else ():
        known = {symbol for symbol, _, _ in symbol_places([*avals, *(v.aval for v in found)])}
        if {symbol for symbol, _, _ in symbol_places([variable.aval])} - known:
            found.append(variable)
    return found


def with_sizes(sizes: dict[str, Any], *, derivatives: bool = False) -> Rule:
    """A rule that gives every symbolic dimension in an equation's parameters its size.

    Args:
        sizes: of the symbols.
        derivatives: whether the result is to be differentiated: rules of `custom_jvp` functions are kept then, which
            are made for the types of their trace.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(fill(item) for item in value)
        if hasattr(value, "_fields"):
            return type(value)(*(fill(item) for item in value))
        if is_jaxpr(value):
            return value
        if isinstance(value, jax.core.ShapedArray):
            return value.update(shape=tuple(_compat.evaluate_dim(dim, sizes) for dim in value.shape))
        return _compat.evaluate_dim(value, sizes) if _compat.is_dim_expr(value) else value

    def change(jaxpr: Any) -> Any:
        opened, _ = _compat.open_jaxpr(jaxpr)
        return jax.make_jaxpr(lambda *args: evaluate(jaxpr, list(args), rule))(*(fill(v.aval) for v in opened.invars))

    def rule(eqn: Any, values: list[Any]) -> list[Any] | None:
        if not symbols_in(list(eqn.params.values())):
            return None
        if derivatives and eqn.primitive.name == "custom_jvp_call":
            return _with_jvp(eqn, values, rule)
        params = {key: fill(param) for key, param in eqn.params.items()}
        if eqn.primitive.name == "dim_as_value":
            return [jax.numpy.asarray(params["dim"], dtype=eqn.outvars[0].aval.dtype)]
        return rewrite(eqn, values, change, params)

    return rule


def _with_jvp(eqn: Any, values: list[Any], rule: Rule) -> list[Any]:
    """Binds a call of a `custom_jvp` function with sizes filled in, in its derivative too, which has symbols."""
    avals = [atom.aval for atom in eqn.invars]
    moving = [i for i, aval in enumerate(avals) if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)]
    n = len(eqn.outvars)
    still = [not jax.numpy.issubdtype(v.aval.dtype, jax.numpy.inexact) for v in eqn.outvars]

    def derivative(*flat: Any) -> list[Any]:
        fixed = list(flat[: len(avals)])

        def of_moving(*parts: Any) -> list[Any]:
            for i, part in zip(moving, parts, strict=True):
                fixed[i] = part
            return _compat.bind_eqn(eqn, fixed)

        outs, dots = jax.jvp(of_moving, tuple(fixed[i] for i in moving), flat[len(avals) :])
        return [*outs, *(dot for dot, fixed_out in zip(dots, still, strict=True) if not fixed_out)]

    jaxpr = jax.make_jaxpr(derivative)(*avals, *(avals[i].to_tangent_aval() for i in moving))

    @jax.custom_jvp
    def again(*args: Any) -> tuple[Any, ...]:
        return tuple(evaluate(eqn.params["call_jaxpr"], list(args), rule))

    @again.defjvp
    def again_jvp(primals: Any, tangents: Any) -> Any:
        found = evaluate(jaxpr, [*primals, *(tangents[i] for i in moving)], rule)
        outs, rest = tuple(found[:n]), iter(found[n:])
        zeros = [np.zeros(jax.numpy.shape(out), jax.dtypes.float0) for out in outs]
        return outs, tuple(zero if fixed else next(rest) for zero, fixed in zip(zeros, still, strict=True))

    return list(again(*values))
