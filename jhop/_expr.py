"""Expressions over lifted Python numbers: what the host evaluates at each run, and what guards ask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
}  # fmt: skip
COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
PREFIX = {"neg": "-", "invert": "~"}
MAX_SIZE = 64  # operations in one expression, less those of its parts


class Expr(NamedTuple):
    """A host expression.

    `op` is one of:

    - `leaf` (index,): a lifted value; `device` (key,): an array that is known once the graph ran;
    - `const` (value,);
    - `repeat` (type, loop, length, index, inits, updates, each): one of the values that are updated together `length`
      times. The updates read them as `loop` (loop, index), and from each array in `each` its items in turn as `each`
      (loop, index); where there are arrays, they have the length;
    - `choose` (type, which, first, second, ...): one of several expressions;
    - `cut` (Cut,): an expression that is a part of a larger one, or of several;
    - an operator over expressions.
    """

    op: str
    args: tuple[Any, ...]


class Cut:
    """An expression as a part of others: these stay small, and what they share is there once. Equal only to itself."""

    __slots__ = ("expr", "free", "within")

    def __init__(self, expr: Expr):
        self.expr = expr
        self.within = list(_cuts_in(expr))
        self.free = free(expr)


def cut(expr: Expr) -> Expr:
    """An expression as a part."""
    return expr if not parts_of(expr) else Expr("cut", (Cut(expr),))


def folded(op: str, args: Sequence[Expr]) -> Expr:
    """An operator over expressions; of what is added to an int, only the sum."""
    made = Expr(op, tuple(args))
    if op == "add" and _adds_int(made) and _adds_int(args[0]):
        return Expr("add", (args[0].args[0], Expr("const", (args[0].args[1].args[0] + args[1].args[0],))))
    return made


def _adds_int(expr: Expr) -> bool:
    """Whether an int is added to something. To what, is not asked: where it is a float, sums are not the same."""
    return expr.op == "add" and expr.args[1].op == "const" and type(expr.args[1].args[0]) is int


def _cuts_in(expr: Expr) -> dict[Cut, None]:
    """The parts of an expression that are cut off from it."""
    if expr.op == "cut":
        return {expr.args[0]: None}
    found: dict[Cut, None] = {}
    for part in parts_of(expr, updates=False):
        found.update(_cuts_in(part))
    return found


def cuts_of(expr: Expr) -> list[Cut]:
    """All of them, those of the parts first. There may be as many as a hook runs: this does not recurse."""
    done: dict[Cut, None] = {}
    work = [(found, False) for found in _cuts_in(expr)]
    while work:
        part, ready = work.pop()
        if ready:
            done.setdefault(part)
        elif part not in done:
            work.append((part, True))
            work += [(inner, False) for inner in part.within]
    return list(done)


def to_code(expr: Expr, leaf: Callable[[Any], str]) -> str:
    """Python source of an expression; `leaf(i)` is the source of the i-th lifted value."""
    cuts = cuts_of(expr)
    if not cuts:
        return _code(expr, leaf, {})
    names = {part: f"c{i}" for i, part in enumerate(cuts)}
    lines = [f"({names[part]} := {_code(part.expr, leaf, names)})" for part in cuts]
    return f"({', '.join(lines)}, {_code(expr, leaf, names)})[-1]"


def _code(expr: Expr, leaf: Callable[[Any], str], names: dict[Cut, str]) -> str:
    if expr.op in ("leaf", "device"):
        return leaf(expr.args[0])
    if expr.op in ("loop", "each"):
        return f"{'v' if expr.op == 'loop' else 'e'}{expr.args[0]}[{expr.args[1]}]"
    if expr.op == "cut":
        return names[expr.args[0]]
    if expr.op == "const":
        value = expr.args[0]
        if isinstance(value, float) and not math.isfinite(value):
            return f"float({str(value)!r})"
        return repr(value) if str(value)[0].isdigit() else f"({value!r})"
    if expr.op == "repeat":
        _, loop, length, index, inits, updates, each = expr.args
        start = f"({''.join(f'{_code(part, leaf, names)}, ' for part in inits)})"
        after = f"({''.join(f'{to_code(part, leaf)}, ' for part in updates)})"  # parts of these are theirs
        items = ", ".join(_code(part, leaf, names) for part in each)
        turns = f"zip({items})" if each else f"range({_code(length, leaf, names)})"
        return f"reduce(lambda v{loop}, e{loop}: {after}, {turns}, {start})[{index}]"
    if expr.op == "choose":
        which, *branches = (_code(part, leaf, names) for part in expr.args[1:])
        chosen = [f"{branch} if {which} == {i} else " for i, branch in enumerate(branches[:-1])]
        return f"({''.join(chosen)}{branches[-1]})"
    return step_code(expr.op, [_code(arg, leaf, names) for arg in expr.args])


CODE_NAMES = {"reduce": functools.reduce}  # what that source uses besides Python's own


def step_code(op: str, args: Sequence[str]) -> str:
    """Python source of one operation."""
    if op in PREFIX:
        return f"({PREFIX[op]}{args[0]})"
    if op == "is_nan":
        return f"({args[0]} != {args[0]})"
    if op == "is_minus_zero":
        return f"(str({args[0]}) == '-0.0')"
    if len(args) == 1:
        return f"{op}({args[0]})"  # abs, int, float: builtins under their own names
    return f"({args[0]} {INFIX.get(op) or COMPARE[op]} {args[1]})"


def free(expr: Expr) -> dict[Expr, None]:
    """What an expression reads from around it, in order: leaves, arrays, and the variables of loops around it."""
    if expr.op in ("leaf", "device", "loop", "each"):
        return {expr: None}
    if expr.op == "const":
        return {}
    if expr.op == "cut":
        return expr.args[0].free
    found: dict[Expr, None] = {}
    for part in parts_of(expr):
        found.update(free(part))
    if expr.op == "repeat":
        return {part: None for part in found if part.op in ("leaf", "device") or part.args[0] != expr.args[1]}
    return found


def parts_of(expr: Expr, *, updates: bool = True) -> list[Expr]:
    """The expressions that one consists of, with those that a loop repeats or without."""
    if expr.op == "repeat":
        _, _, length, _, inits, repeated, each = expr.args
        return [length, *inits, *(repeated if updates else ()), *each]
    return [part for part in expr.args if isinstance(part, Expr)]


def reads_device(expr: Expr) -> bool:
    """Whether an expression asks which branch was taken, or goes through an array with a loop."""
    if expr.op == "choose" or (expr.op == "repeat" and expr.args[-1]):
        return True
    return any(map(reads_device, (part for part in parts_of(expr)))) or any(
        reads_device(part.expr) for part in _cuts_in(expr)
    )


def substitute(expr: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """An expression with `change(part)` in place of each part for which that is not None."""
    done: dict[Cut, Expr] = {}

    def within(expr: Expr) -> Expr:
        new = change(expr)
        if new is not None:
            return new
        if expr.op == "cut":
            return done[expr.args[0]]
        if expr.op == "repeat":
            python, loop, length, index, inits, updates, each = expr.args
            changed = tuple(substitute(part, change) for part in updates)
            inits, each = (tuple(map(within, group)) for group in (inits, each))
            return Expr("repeat", (python, loop, within(length), index, inits, changed, each))
        return Expr(expr.op, tuple(within(arg) if isinstance(arg, Expr) else arg for arg in expr.args))

    for part in cuts_of(expr):
        new = within(part.expr)
        done[part] = Expr("cut", (part if new == part.expr else Cut(new),))
    return within(expr)


def leaves(expr: Expr) -> set[int]:
    """Indices of the lifted values that an expression reads."""
    return {part.args[0] for part in free(expr) if part.op == "leaf"}
