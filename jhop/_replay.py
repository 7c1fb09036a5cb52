"""Numbers that control flow changes: the host does again what loops and branches did, and asks the device how.

A hook in the body of a `scan` runs once per iteration, one in a branch of a `cond` runs if the branch is taken. What it
does to a lifted Python number is an expression (`repeat`, `choose`) that the host evaluates at each run: exact, as all
arithmetic on such numbers. Where it depends on the data, say which branch was taken, it reads that from the device
after the run. In the graph, such an expression is one `replay` equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp

from jhop import _compat
from jhop._expr import (
    CODE_NAMES,
    OUT_OF_REACH,
    Expr,
    added,
    adds_int,
    const,
    cut,
    cuts_of,
    folded,
    free,
    parts_of,
    repeated,
    substitute,
    to_code,
)
from jhop._scalar import (
    Scalar,
    apply_step,
    device_kind,
    is_scalar,
    largest_int,
    need_of,
    on_device,
    register_transforms,
    step,
    weak_aval,
)

replay_p = jex_core.Primitive("replay")


def _replay_impl(*args: Any, expr: Expr, kind: type, python: type) -> Any:
    if not any(isinstance(arg, jax.Array) for arg in args):
        return host_function(expr, len(args))(*args)
    with jax.numpy_dtype_promotion("standard"):  # every number is weakly typed on the device, arrays of them are not
        return as_number(_on_device([expr], args, {})[0], kind)


def _replay_abstract_eval(*avals: Any, expr: Expr, kind: type, python: type) -> Any:
    return weak_aval(kind)


def as_number(value: Any, kind: type) -> Any:
    """An array as the device has a lifted number of a kind: a weakly typed scalar."""
    aval = weak_aval(kind)
    return _compat.with_weak_type(jax.lax.convert_element_type(value, aval.dtype), True)


def host_function(expr: Expr, n: int) -> Callable[..., Any]:
    """A function of the `n` operands that evaluates an expression whose leaves are those."""
    code = to_code(expr, lambda i: f"n{i}")
    return eval(f"lambda {', '.join(f'n{i}' for i in range(n))}: {code}", dict(CODE_NAMES))


def _on_device(exprs: Sequence[Expr], args: Sequence[Any], known: dict[Any, Any]) -> list[Any]:
    """Evaluates expressions on arrays; `known` has what loops around them have, and the parts that are known."""
    known = dict(known)
    for part in cuts_of(*exprs, known=lambda part: Expr("cut", (part,)) in known):
        known[Expr("cut", (part,))] = _part_on_device(part.expr, args, known)
    return [_part_on_device(expr, args, known) for expr in exprs]


def _part_on_device(expr: Expr, args: Sequence[Any], known: dict[Any, Any]) -> Any:
    def value(part: Expr) -> Any:
        return _part_on_device(part, args, known)

    if expr.op == "leaf":
        return args[expr.args[0]]
    if expr.op in ("loop", "each", "cut"):
        return known[expr]
    if expr.op == "const":
        return jnp.asarray(on_device(expr.args[0]))
    if expr.op in ("extent", "lost", "check"):  # what the host looks at
        return jnp.zeros((), jnp.int32)
    if expr.op == "choose":
        which, *branches = map(value, expr.args[1:])
        return jax.lax.select_n(jnp.int32(which), *jnp.broadcast_arrays(*jnp.asarray(branches)))
    if expr.op != "repeat":
        return apply_step(expr.op, [value(part) for part in expr.args])
    _, loop, length, index, inits, updates, each = expr.args
    start = [jnp.asarray(value(part)) for part in inits]
    arrays = [jnp.asarray(value(part)) for part in each]

    def body(i: Any, carry: list[Any]) -> list[Any]:
        inner = dict(known)
        inner.update((Expr("loop", (loop, j)), item) for j, item in enumerate(carry))
        inner.update((Expr("each", (loop, j)), array[i]) for j, array in enumerate(arrays))
        new = _on_device(updates, args, inner)
        return [jnp.asarray(item).astype(old.dtype) for item, old in zip(new, carry, strict=True)]

    return jax.lax.fori_loop(0, len(arrays[0]) if arrays else value(length), body, start)[index]


replay_p.def_impl(_replay_impl)
replay_p.def_abstract_eval(_replay_abstract_eval)
_compat.register_lowering(replay_p, _replay_impl, multiple_results=False)
register_transforms(replay_p, _replay_impl)


def number_of(session: Any, expr: Expr) -> Any:
    """What stands for the number that an expression gives, in the present trace: a `Scalar`, or a Python number.

    Args:
        session: knows what stands for what the expression reads.
    """
    for part in cuts_of(expr, known=lambda part: Expr("cut", (part,)) in session.symbols):
        name = Expr("cut", (part,))
        session.symbols[name] = _part_number(session, part.expr)
    return _part_number(session, expr)


def value_of(session: Any, expr: Expr) -> Any:
    """The number that an expression gives for the present values; None where it depends on the device."""
    if not all(part in session.symbols for part in free(expr)):
        return None
    closed, read = _closed(session, expr)
    operands = [session.symbols[part] for part in read]
    return host_function(closed, len(read))(*(item._value if is_scalar(item) else item for item in operands))


def _closed(session: Any, expr: Expr) -> tuple[Expr, list[Expr]]:
    """(an expression of operands, what these are), with the parts that are numbers already among the operands."""
    names: dict[Expr, Expr] = {}

    def name(part: Expr) -> Expr | None:
        if part.op != "cut" or part not in session.symbols:
            return None
        return names.setdefault(part, Expr("device", (part,)))

    (opened,) = substitute([expr], name)
    read = list(free(opened))
    places = {part: Expr("leaf", (i,)) for i, part in enumerate(read)}
    (closed,) = substitute([opened], places.get)
    return closed, [part.args[0] if isinstance(part.args[0], Expr) else part for part in read]


def fits_device(session: Any, *exprs: Expr) -> bool:
    """Whether ints are such that the device has as ints; if so, that this stays so is guarded."""
    extents = Expr("extent", tuple(dict.fromkeys(exprs)))
    if (value_of(session, extents) or 0) > largest_int():
        return False
    if free(extents):
        session.guard(Expr("le", (extents, const(largest_int()))), True)
    return True


def _stand_in(session: Any, expr: Expr) -> Any:
    """A number in place of one that is not known yet. Nobody may ask for it; it is as large as that one may be."""
    python = expr.args[0] if expr.op in ("choose", "repeat") else int  # as often as a loop ran, times an int
    if expr.op != "repeat" and python is int:
        known = [part for part in parts_of(expr) if is_known(part)]
        if not fits_device(session, *known):
            return largest_int() + 1
    return python(1)


def _part_number(session: Any, expr: Expr) -> Any:
    if expr in session.symbols:
        return session.symbols[expr]
    if expr.op == "const":
        return expr.args[0]
    if expr.op not in ("repeat", "choose") and not any(read.op == "device" for read in free(expr)):
        operands = [_part_number(session, part) for part in expr.args]
        return step(expr.op, *operands) if any(map(is_scalar, operands)) else apply_step(expr.op, operands)
    value = value_of(session, expr)
    if not free(expr):
        return value
    if value is None:
        value = _stand_in(session, expr)
    closed, read = _closed(session, expr)
    operands = [session.symbols[part] if part in session.symbols else session.arrays[part] for part in read]
    known = is_known(expr)
    numbers = [item for item in operands if is_scalar(item)]
    twins = iter([item._twin for item in numbers] if known else session.twins_of(numbers))
    twins = [next(twins) if is_scalar(item) else item for item in operands]
    kind = device_kind(value, [twin for twin, item in zip(twins, operands, strict=True) if is_scalar(item)])
    twin = replay_p.bind(*twins, expr=closed, kind=kind, python=type(value))
    needs: Any = None
    if not known:
        rounded = type(value) is int and kind is float
        inner = inner_needs(expr, lambda part: part in session.symbols, rounded=rounded)
        needs = (tuple(inner), *(item._needs for item in numbers if item._needs is not None))
    result = Scalar(session, cut(expr), value, twin, needs)
    session.symbols[result._expr] = result
    session.note_step(result)
    return result


def on_top(session: Any, scalar: Scalar) -> Any:
    """What stands for a number that the host knows, in the graph itself and not in a body inside: exact."""
    if session.top is None or _compat.is_of(scalar._twin, session.top):
        return scalar._twin
    twin = session.on_top.get(scalar._expr)
    if twin is None:
        expr = scalar._expr
        closed, read = _closed(session, expr.args[0].expr if expr.op == "cut" else expr)
        kind = float if jnp.issubdtype(scalar._twin.dtype, jnp.inexact) else int
        with _compat.under(session.top):
            operands = [on_top(session, session.symbols[part]) for part in read]
            twin = replay_p.bind(*operands, expr=closed, kind=kind, python=type(scalar._value))
        session.on_top[scalar._expr] = twin
    return twin


def put_check(session: Any, value: Expr, text: str) -> None:
    """An equation that raises an error with a text, on the host, if the device's ints do not go as far."""
    closed, read = _closed(session, Expr("check", (text, value, largest_int())))
    operands = [session.symbols[part]._twin if part in session.symbols else session.arrays[part] for part in read]
    replay_p.bind(*operands, expr=closed, kind=int, python=int)


def is_known(expr: Expr) -> bool:
    """Whether the host knows a number before the device runs."""
    return all(part.op == "leaf" for part in free(expr))


def inner_needs(expr: Expr, given: Callable[[Expr], bool], *, rounded: bool) -> list[Expr]:
    """What may not be too large where the device computes all of an expression, less its parts that are given.

    Args:
        rounded: whether it has floats for ints there.
    """
    if expr.op == "cut":
        return [] if given(expr) else inner_needs(expr.args[0].expr, given, rounded=rounded)
    if expr.op == "choose":
        python, which, *branches = expr.args
        inner = [Expr("extent", tuple(inner_needs(part, given, rounded=rounded))) for part in branches]
        return [Expr("choose", (python, which, *inner))] if any(extent.args for extent in inner) else []
    parts = parts_of(expr, updates=False)
    needs = [need for part in parts for need in inner_needs(part, given, rounded=rounded)]
    if expr.op == "repeat":
        if rounded:
            return [const(OUT_OF_REACH)]
        _, loop, length, _, inits, updates, each = expr.args
        inner = [need for part in updates for need in inner_needs(part, given, rounded=False)]
        return [*needs, *inits, *in_all_turns(loop, length, inits, updates, each, [*inner, *updates])]
    return [*needs, *need_of(expr.op, parts, expr, rounded=rounded)] if parts else []


def in_all_turns(loop: int, length: Expr, inits: Any, updates: Any, each: Any, exprs: Sequence[Expr]) -> list[Expr]:
    """What has the extent that expressions of a loop's numbers have in any of its turns."""
    found, rest = [], []
    for expr in dict.fromkeys(exprs):
        if not any(part.op in ("loop", "each") and part.args[0] == loop for part in free(expr)):
            found.append(expr)
            continue
        read, plus = (expr.args[0], expr.args[1].args[0]) if adds_int(expr) else (expr, 0)
        update = updates[read.args[1]] if read.op == "loop" and read.args[0] == loop else None
        steady = update is not None and (update == read or (adds_int(update) and update.args[0] == read))
        if update is not None and steady:  # the first and the last
            init, by = inits[read.args[1]], 0 if update == read else update.args[1].args[0]
            last = added(init, by, const(length.args[0] - 1) if length.op == "const" else length)
            found += [folded("add", [end, const(plus)]) for end in (init, last)]
        else:
            rest.append(expr)
    if rest:
        here = len(inits)
        most = Expr("extent", (Expr("loop", (loop, here)), *rest))
        found.append(repeated(int, loop, length, here, (*inits, const(0)), (*updates, most), each))
    return found
