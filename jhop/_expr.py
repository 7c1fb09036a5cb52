"""Expressions over lifted Python numbers: what the host evaluates at each run, and what guards ask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jhop._errors import Unsupported

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
    - `const` (value, text): see `const`;
    - `repeat` (type, loop, length, index, inits, updates, each): one of the values that are updated together `length`
      times. The updates read them as `loop` (loop, index), and from each array in `each` its items in turn as `each`
      (loop, index); where there are arrays, they have the length;
    - `choose` (type, which, first, second, ...): one of several expressions;
    - `cut` (Cut,): an expression that is a part of a larger one, or of several;
    - `one_nan` (value, value): whether both are one NaN; the second may be that object itself;
    - `extent`: how far the ints among several numbers are from zero; `lost`: see there; `check` (text, extent): the
      extent, or an error with that text if the device's ints do not go as far;
    - an operator over expressions.
    """

    op: str
    args: tuple[Any, ...]


def const(value: Any) -> Expr:
    """A number in an expression. Its text is there as 1, 1.0 and True are equal, and so are 0.0 and -0.0."""
    return Expr("const", (value, repr(value)))


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
    """An operator over expressions whose result is an int; of what is added to an int, only the sum."""
    made = Expr(op, tuple(args))
    if op == "add" and adds_int(made) and adds_int(args[0]):
        return Expr("add", (args[0].args[0], const(args[0].args[1].args[0] + args[1].args[0])))
    return made


def added(start: Expr, each: int, times: Expr) -> Expr:
    """An int to which another is added a number of times."""
    if times.op == "const":
        return folded("add", [start, const(each * times.args[0])])
    return Expr("add", (start, Expr("mul", (times, const(each)))))


def adds_int(expr: Expr) -> bool:
    return expr.op == "add" and expr.args[1].op == "const" and type(expr.args[1].args[0]) is int


def _cuts_in(expr: Expr) -> dict[Cut, None]:
    """The parts of an expression that are cut off from it, less those that a loop in it computes at each turn."""
    if expr.op == "cut":
        return {expr.args[0]: None}
    found: dict[Cut, None] = {}
    for part in parts_of(expr, updates=False):
        found.update(_cuts_in(part))
    if expr.op == "repeat":
        found.update(_fixed_in(expr.args[1], expr.args[5]))
    return found


def _fixed_in(loop: int, updates: Iterable[Expr]) -> dict[Cut, None]:
    """The parts of what a loop repeats that are the same at each turn."""
    found: dict[Cut, None] = {}
    work, seen = [part for expr in updates for part in _cuts_in(expr)], set()
    while work:
        part = work.pop()
        if part in seen:
            continue
        seen.add(part)
        if any(read.op in ("loop", "each") and read.args[0] == loop for read in part.free):
            work += part.within
        else:
            found[part] = None
    return found


def cuts_of(*exprs: Expr, known: Callable[[Cut], bool] = lambda part: False) -> list[Cut]:
    """All of them, those of the parts first, less what is known. They may be many: this does not recurse."""
    done: dict[Cut, None] = {}
    work = [(found, False) for expr in exprs for found in _cuts_in(expr)]
    while work:
        part, ready = work.pop()
        if ready:
            done.setdefault(part)
        elif part not in done and not known(part):
            work.append((part, True))
            work += [(inner, False) for inner in part.within]
    return list(done)


def to_code(expr: Expr, leaf: Callable[[Any], str]) -> str:
    """Python source of an expression; `leaf(i)` is the source of the i-th lifted value."""
    return _block((expr,), leaf, {}, lambda codes: codes[0])


def _block(
    exprs: Sequence[Expr], leaf: Callable[[Any], str], known: dict[Cut, str], join: Callable[[list[str]], str]
) -> str:
    """Source of several expressions, of which `join` makes one. What they share is computed once."""
    cuts = cuts_of(*exprs, known=known.__contains__)
    names = dict(known)
    names.update((part, f"c{len(known) + i}") for i, part in enumerate(cuts))
    lines = [f"({names[part]} := {_code(part.expr, leaf, names)})" for part in cuts]
    result = join([_code(expr, leaf, names) for expr in exprs])
    return f"({', '.join(lines)}, {result})[-1]" if lines else result


def _items(codes: list[str]) -> str:
    return f"({''.join(f'{code}, ' for code in codes)})"


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
        start = _items([_code(part, leaf, names) for part in inits])
        after = _block(updates, leaf, names, _items)
        items = ", ".join(_code(part, leaf, names) for part in each)
        turns = f"zip({items})" if each else f"range({_code(length, leaf, names)})"
        return f"reduce(lambda v{loop}, e{loop}: {after}, {turns}, {start})[{index}]"
    if expr.op == "one_nan":
        one, other = _code(expr.args[0], leaf, names), expr.args[1]
        if isinstance(other, Expr):
            return f"({one} is {_code(other, leaf, names)} and {one} != {one})"
        return f"(id({one}) == {id(other)})"
    if expr.op == "check":
        text, value, limit = expr.args
        return f"check({text!r}, {_code(value, leaf, names)}, {limit})"
    if expr.op == "choose":
        which, *branches = (_code(part, leaf, names) for part in expr.args[1:])
        chosen = [f"{branch} if {which} == {i} else " for i, branch in enumerate(branches[:-1])]
        return f"({''.join(chosen)}{branches[-1]})"
    return step_code(expr.op, [_code(arg, leaf, names) for arg in expr.args])


def extent(*numbers: Any) -> int:
    """How far the ints among some numbers are from zero."""
    return max((max(n, ~n) for n in numbers if type(n) is int), default=0)


def lost(a: Any, b: Any, total: Any) -> int:
    """An extent out of reach if a sum of rounded ints is so much smaller than they are that it means nothing."""
    return 0 if 2 * abs(total) >= max(abs(a), abs(b)) else OUT_OF_REACH


def check(text: str, value: int, limit: int) -> int:
    if value > limit:
        raise Unsupported(text)
    return value


OUT_OF_REACH = 2**200
# What that source uses besides Python's own.
CODE_NAMES = {"reduce": functools.reduce, "extent": extent, "lost": lost, "check": check}


def step_code(op: str, args: Sequence[str]) -> str:
    """Python source of one operation."""
    if op in PREFIX:
        return f"({PREFIX[op]}{args[0]})"
    if op in ("extent", "lost"):
        return f"{op}({', '.join(args)})"
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
    if expr.op in ("choose", "check") or (expr.op == "repeat" and expr.args[-1]):
        return True
    return any(map(reads_device, (part for part in parts_of(expr)))) or any(
        reads_device(part.expr) for part in _cuts_in(expr)
    )


def substitute(exprs: Sequence[Expr], change: Callable[[Expr], Expr | None]) -> list[Expr]:
    """Expressions with `change(part)` in place of each part for which that is not None. They share what they did."""
    return _substitute(exprs, change, {})


def _substitute(exprs: Sequence[Expr], change: Callable[[Expr], Expr | None], done: dict[Cut, Expr]) -> list[Expr]:
    def within(expr: Expr) -> Expr:
        new = change(expr)
        if new is not None:
            return new
        if expr.op == "cut":
            return done[expr.args[0]]
        if expr.op == "repeat":
            python, loop, length, index, inits, updates, each = expr.args
            changed = tuple(_substitute(updates, change, done))
            inits, each = (tuple(map(within, group)) for group in (inits, each))
            return Expr("repeat", (python, loop, within(length), index, inits, changed, each))
        return Expr(expr.op, tuple(within(arg) if isinstance(arg, Expr) else arg for arg in expr.args))

    for part in cuts_of(*exprs, known=lambda part: part in done or change(Expr("cut", (part,))) is not None):
        new = within(part.expr)
        done[part] = Expr("cut", (part if new == part.expr else Cut(new),))
    return list(map(within, exprs))


def repeated(number: type, loop: int, length: Expr, j: int, inits: Any, updates: Any, each: Any) -> Expr:
    """What the j-th of several numbers is after a loop."""
    update, me = updates[j], Expr("loop", (loop, j))
    if update == me:
        return inits[j]
    if number is int and update.op == "add" and update.args[0] == me and adds_int(update):
        return added(inits[j], update.args[1].args[0], length)
    # Only what it depends on goes through the loop with it.
    needed, work = {j}, [j]
    while work:
        read = [part.args[1] for part in free(updates[work.pop()]) if part.op == "loop" and part.args[0] == loop]
        work += set(read) - needed
        needed.update(read)
    kept = sorted(needed)
    places = {Expr("loop", (loop, old)): Expr("loop", (loop, new)) for new, old in enumerate(kept)}
    changed = tuple(substitute([updates[i] for i in kept], places.get))
    items = dict.fromkeys(part for expr in changed for part in free(expr) if part.op == "each" and part.args[0] == loop)
    if items:
        renamed = {part: Expr("each", (loop, new)) for new, part in enumerate(items)}
        changed = tuple(substitute(changed, renamed.get))
        each = tuple(each[part.args[1]] for part in items)
    else:
        each = ()
    return Expr("repeat", (number, loop, length, kept.index(j), tuple(inits[i] for i in kept), changed, each))


def leaves(expr: Expr) -> set[int]:
    """Indices of the lifted values that an expression reads."""
    return {part.args[0] for part in free(expr) if part.op == "leaf"}
