"""How equations that hold functions are written: a nested `def`, and a call of `jax.jit`, `lax.scan` and so on.

Each writer of `WRITERS` takes (writer, equation) and returns a `Call`, which `Writer` checks as it checks every other
spelling. It raises where there is nothing to say; the equation is then written by the general means.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._interp import is_jaxpr
from jhop._text._jax_ops import home_of, same, subject
from jhop._text._jax_source import identifier, literal, tuple_of


@dataclasses.dataclass(kw_only=True)
class Call:
    """An expression, and the rows of the functions that it calls.

    Attributes:
        expression: the call.
        rows: nested functions, that stand before it.
        groups: how its result is nested: sizes of tuples of outputs; None for a flat result.
        texts: of the operands, as the check names them.
        index: the equation that the call makes too, of its first operand.
    """

    expression: str
    rows: list[Any]
    groups: tuple[int, ...] | None = None
    texts: list[str]
    index: Any = None


def define(
    writer: Any, wanted: str, jaxpr: Any, *, closed: Sequence[Any] = (), groups: Any = None, returns: Any = None
) -> tuple[str, list[Any]]:
    """Writes a nested function.

    Args:
        wanted: its name.
        jaxpr: its body.
        closed: the values outside that its first inputs are; it closes over them.
        groups: (parameter, count) pairs, for parameters that are tuples of inputs; None for one parameter per input.
        returns: makes the returned expression of the outputs; by default one value, or a tuple.

    Returns:
        (the name, its rows).
    """
    name = writer.names.make_function(function_word(wanted))
    child = writer.child()
    opened, consts = _compat.open_jaxpr(jaxpr)
    child.bind(opened.invars[: len(closed)], closed, writer)
    rest, params = opened.invars[len(closed) :], []
    hints = argument_names(opened)
    if groups is None:
        params = [child.name_of(v, hints.get(v, "arg")) for v in rest]
    else:
        left = iter(rest)
        for group, count in groups:
            params.append(child.names.make(group))
            parts = [child.name_of(v, hints.get(v, group)) for v in (next(left) for _ in range(count))]
            if parts:
                child.add("step", f"{tuple_of(parts)} = {params[-1]}")
    outs = child.run(opened, consts)
    result = returns(outs) if returns is not None else outs[0] if len(outs) == 1 else tuple_of(outs)
    child.add("return", f"return {result}")
    head = writer.row("def", f"def {name}({', '.join(params)}):", names=name)
    return name, [head, *child.rows]


def function_word(name: Any) -> str:
    return "fun" if name == "<lambda>" else str(name)


def argument_names(jaxpr: Any) -> dict[Any, str]:
    """The user's parameter names of a jaxpr's inputs, where JAX kept them and they are plain names."""
    names = getattr(jaxpr.debug_info, "arg_names", None) or ()
    if len(names) != len(jaxpr.invars):
        return {}
    pairs = zip(jaxpr.invars, names, strict=True)
    return {v: name for v, name in pairs if isinstance(name, str) and name.isidentifier()}


def _jit(writer: Any, eqn: Any) -> Call:
    params = eqn.params
    wanted = params["name"]
    name, rows = define(writer, wanted, params["jaxpr"])
    texts = writer.operands(eqn)
    options = [f"{option}=True" for option in ("inline", "keep_unused") if params[option] is True]
    donated = tuple(i for i, given in enumerate(params["donated_invars"]) if given)
    if donated:
        options.append(f"donate_argnums={donated}")
    if name != wanted:
        rows.append(writer.row("step", f"{name}.__name__ = {wanted!r}"))
        call = f"jax.jit({', '.join([name, *options])})({', '.join(texts)})"
    else:
        decorator = f"@functools.partial(jax.jit, {', '.join(options)})" if options else "@jax.jit"
        rows.insert(0, writer.row("step", decorator))
        call = f"{name}({', '.join(texts)})"
    return Call(expression=call, rows=rows, texts=texts)


def _scan(writer: Any, eqn: Any) -> Call:
    params = eqn.params
    n_consts, n_carry = _compat.scan_split(params)
    texts = writer.operands(eqn)
    n_xs, n_ys = len(texts) - n_consts - n_carry, len(eqn.outvars) - n_carry

    def returns(outs: list[str]) -> str:
        return f"{tuple_of(outs[:n_carry])}, {tuple_of(outs[n_carry:])}"

    groups = (("carry", n_carry), ("xs", n_xs))
    name, rows = define(writer, "body", params["jaxpr"], closed=eqn.invars[:n_consts], groups=groups, returns=returns)
    usual = inspect.signature(jax.lax.scan).parameters
    # JAX takes no symbol for the length: it is that of the inputs, of empty ones where there are none.
    symbolic = _compat.is_dim_expr(params["length"])
    options = [] if symbolic else [f"length={literal(params['length'])}"]
    for key in ("reverse", "unroll", "_split_transpose"):
        if key in params and key in usual and not same(params[key], usual[key].default):
            value = params[key]
            if key == "unroll" and value == 1:
                continue
            options.append(f"{key}={literal(value)}")
    init, xs = texts[n_consts : n_consts + n_carry], texts[n_consts + n_carry :]
    xs = xs or ([f"jnp.zeros(({literal(params['length'])}, 0))"] if symbolic else [])
    call = f"lax.scan({', '.join([name, tuple_of(init), tuple_of(xs), *options])})"
    return Call(expression=call, rows=rows, groups=(n_carry, n_ys), texts=texts)


def _while(writer: Any, eqn: Any) -> Call:
    params = eqn.params
    texts = writer.operands(eqn)
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    carry = texts[n_cond + n_body :]
    groups = (("carry", len(carry)),)
    test, rows = define(writer, "cond_fun", params["cond_jaxpr"], closed=eqn.invars[:n_cond], groups=groups)
    closed = eqn.invars[n_cond : n_cond + n_body]
    body, more = define(writer, "body_fun", params["body_jaxpr"], closed=closed, groups=groups, returns=tuple_of)
    call = f"lax.while_loop({test}, {body}, {tuple_of(carry)})"
    return Call(expression=call, rows=rows + more, groups=(len(carry),), texts=texts)


def _cond(writer: Any, eqn: Any) -> Call:
    """`lax.cond` on what the index was converted from, `lax.switch` on what it was clamped from."""
    branches = eqn.params["branches"]
    index = writer.folded.get(eqn.invars[0])
    if index is None:
        raise ValueError("the index is no conversion that the call would make")
    texts = [writer.atom(atom) for atom in eqn.invars[1:]]
    before = writer.atom(index.invars[subject(index)])
    rows, names = [], []
    for number, branch in enumerate(branches):
        wanted = ("false_fun", "true_fun")[number] if len(branches) == 2 else f"branch_{number}"
        name, more = define(writer, wanted, branch, returns=tuple_of)
        rows += more
        names.append(name)
    operands = "".join(f", {text}" for text in texts)
    if index.primitive.name == "convert_element_type":
        call = f"lax.cond({before}, {', '.join(reversed(names))}{operands})"
    else:
        call = f"lax.switch({before}, [{', '.join(names)}]{operands})"
    return Call(expression=call, rows=rows, groups=(len(eqn.outvars),), texts=[before, *texts], index=index)


def foldable(eqns: list[Any]) -> dict[Any, Any]:
    """The equations that `lax.cond` and `lax.switch` make of their index, by the index, where nothing else reads it."""
    reads: dict[Any, int] = {}
    made = {}
    for eqn in eqns:
        for atom in eqn.invars:
            if hasattr(atom, "val"):
                continue
            reads[atom] = reads.get(atom, 0) + 1
        if len(eqn.outvars) == 1:
            made[eqn.outvars[0]] = eqn
    found = {}
    for eqn in eqns:
        if eqn.primitive.name != "cond" or hasattr(eqn.invars[0], "val") or reads[eqn.invars[0]] != 1:
            continue
        index = made.get(eqn.invars[0])
        if index is None:
            continue
        if index.primitive.name == "convert_element_type" and index.invars[0].aval.dtype == bool:
            found[eqn.invars[0]] = index
        elif index.primitive.name == "clamp" and _is_bound(index, len(eqn.params["branches"])):
            found[eqn.invars[0]] = index
    return found


def _is_bound(clamp: Any, count: int) -> bool:
    low, middle, high = clamp.invars
    if hasattr(middle, "val") or not hasattr(low, "val") or not hasattr(high, "val"):
        return False
    return (int(low.val), int(high.val)) == (0, count - 1)


def _remat(writer: Any, eqn: Any) -> Call:
    params = eqn.params
    name, rows = define(writer, "block", params["jaxpr"], returns=tuple_of)
    texts = writer.operands(eqn)
    options = "" if params["prevent_cse"] is True else f", prevent_cse={literal(params['prevent_cse'])}"
    if params["policy"] is not None:
        options += f", policy={writer.opaque(params['policy'], f'{name}_policy', 'a checkpoint policy')}"
    call = f"jax.checkpoint({name}{options})({', '.join(texts)})"
    return Call(expression=call, rows=rows, groups=(len(eqn.outvars),), texts=texts)


def bind_with_functions(writer: Any, eqn: Any) -> Call:
    """Any primitive that is public, its jaxprs traced from nested functions."""
    home = home_of(eqn.primitive)
    if home is None:
        raise ValueError("no public name")
    rows: list[Any] = []

    def source(value: Any, key: str) -> str:
        if isinstance(value, (tuple, list)) and any(map(is_jaxpr, value)):
            # One name each: all the functions stand before the call.
            return tuple_of([source(item, f"{key}_{i}") for i, item in enumerate(value)])
        if not is_jaxpr(value):
            return literal(value)
        opened, _ = _compat.open_jaxpr(value)
        name, more = define(writer, identifier(key), value, returns=tuple_of)
        rows.extend(more)
        avals = [_shape_text(v.aval) for v in opened.invars]
        closed = f"jax.make_jaxpr({name})({', '.join(avals)})"
        return closed if isinstance(value, jex_core.ClosedJaxpr) else f"{closed}.jaxpr"

    params = [f"{key}={source(value, key)}" for key, value in eqn.params.items()]
    texts = writer.operands(eqn)
    call = f"{home[1]}.bind({', '.join(texts + params)})"
    groups = (len(eqn.outvars),) if eqn.primitive.multiple_results else None
    return Call(expression=call, rows=rows, groups=groups, texts=texts)


def _shape_text(aval: Any) -> str:
    weak = ", weak_type=True" if aval.weak_type else ""
    return f"jax.ShapeDtypeStruct({literal(aval.shape)}, {literal(aval.dtype)}{weak})"


WRITERS: dict[str, Callable[[Any, Any], Call]] = {
    "jit": _jit, "pjit": _jit, "scan": _scan, "while": _while, "cond": _cond, "checkpoint": _remat, "remat2": _remat,
}  # fmt: skip
