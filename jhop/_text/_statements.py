"""Statements of a graph, and the module text that they print as.

The text is what PyTorch's `print_readable` gives once comments are gone and runs of blank lines are one. It depends on
the statements alone: names and symbols are settled before they come here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INFIX = frozenset("+ - * / // % ** @ < <= > >= == != & | ^ << >>".split())
PREFIX = frozenset("+ - ~".split())
IN_PLACE = frozenset("+= -= *= /= //= %= **= @= &= |= ^= <<= >>=".split())
# Methods that ask a tensor for a number.
_ACCESSORS = frozenset(("size", "stride", "storage_offset", "item"))
_SYMBOLIC = re.compile(r"Sym\((.*)\)")


class RawCode(str):
    """A constant that prints as it stands: `device(type='cpu')`, `torch.float32`."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(eq=False)
class Stmt:
    """One statement of a graph. It stands for the value that it makes: others refer to it by having it in `args`.

    Attributes:
        op: `placeholder`, `call_function`, `call_method` or `output`.
        name: the name of its value. Uses print the name that it has when the module is printed.
        target: of a placeholder its name in the signature; of a call of a function an operator (`+`, `-` with one
            argument, `+=`, `getitem`, `setitem`) or a callable as it prints; of a call of a method the method's name.
        args: constants and statements, in tuples, lists, dicts and slices of any depth. The first is what a method
            is called on, the only one of `output` what is returned.
        kwargs: the same by keyword.
        annotation: the type (`f32[s21]`, `Sym(s21)`); if no string, an object whose `str`, taken when the module is
            printed, is the type.
        placeholder_kind: the Python type of a placeholder that has no annotation, such as `list`.
        origin: where it comes from. A blank line stands before a statement whose origin is not that of the one before
            it; None is an origin like any other.
    """

    op: str
    name: str
    target: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    annotation: object = None
    placeholder_kind: str | None = None
    origin: Hashable = None

    def __repr__(self) -> str:
        return f"<{self.op} {self.name}>"


def print_module(stmts: Sequence[Stmt], *, class_name: str = "GraphModule", outer: str = "torch.nn.Module") -> str:
    """The text of a module whose `forward` consists of `stmts`, without comments.

    Args:
        stmts: placeholders first, `output` last.
        class_name: what the module is called.
        outer: its base class.
    """
    signature = ["self"]
    body: list[str] = []
    deletions = _last_uses(stmts)
    previous: Hashable = object()  # the origin of no statement
    for stmt in stmts:
        if stmt.op == "placeholder":
            signature.append(stmt.target + _annotation(stmt))
            if stmt.name != stmt.target:
                body.append(f"{stmt.name} = {stmt.target}")
            continue
        if stmt.op != "output":
            # The blank line is what is left of a comment that names the origin; none opens a body.
            if body and stmt.origin != previous:
                body.append("")
            previous = stmt.origin
        names = [dead.name for dead in deletions[stmt]]
        body.append(_code(stmt) + (f";  {' = '.join([*names, 'None'])}" if names else ""))
    lines = [f"class {class_name}({outer}):", f"    def forward({', '.join(signature)}):"]
    lines += [f"        {line}" if line else "" for line in body]
    return "\n".join(lines) + "\n"


def remove_unused(
    stmts: Sequence[Stmt],
    *,
    pure: Callable[[Stmt], bool] | None = None,
    symbols_of: Callable[[Stmt], Iterable[str]] | None = None,
) -> list[Stmt]:
    """Drops statements that only pick values apart and that nobody uses, then placeholders that nobody uses.

    Args:
        stmts: placeholders first, `output` last.
        pure: says which statements may go; by default `is_bookkeeping`.
        symbols_of: the symbols that a placeholder other than a symbol's own carries; by default those in its
            annotation. Needed for a list, which carries its elements' symbols and has no annotation.

    Returns:
        What is left. A symbol's own placeholder stays also when no statement uses it but another placeholder that
        stays carries the symbol; of several for one symbol the first.
    """
    pure = pure or is_bookkeeping
    symbols_of = symbols_of or annotated_symbols
    used: set[Stmt] = set()
    kept: list[Stmt] = []
    for stmt in reversed(stmts):
        if stmt in used or stmt.op in ("placeholder", "output") or not pure(stmt):
            kept.append(stmt)
            used.update(inputs_of(stmt))
    kept.reverse()

    bound = {stmt: _bound_symbol(stmt) for stmt in kept if stmt.op == "placeholder"}
    wanted = {name for stmt, own in bound.items() if own is None and stmt in used for name in symbols_of(stmt)}
    for stmt, own in bound.items():
        if stmt in used:
            continue
        if own in wanted:
            wanted.remove(own)
        else:
            kept.remove(stmt)
    return kept


def share_symbols(stmts: Sequence[Stmt], bound: Mapping[str, Stmt]) -> list[Stmt]:
    """Keeps one statement per symbolic expression, and points the uses of the others to it, in place.

    Args:
        stmts: placeholders first, `output` last.
        bound: the placeholders that stand for an expression already, by its text: those of symbols that nothing
            replaced.

    Returns:
        `stmts` without those that another one stands for now. Numbers (`Sym(3)`) are not shared.
    """
    known = dict(bound)
    instead: dict[Stmt, Stmt] = {}
    kept = []
    for stmt in stmts:
        replace_inputs(stmt, instead)
        found = _SYMBOLIC.fullmatch(str(stmt.annotation))
        if stmt.op != "placeholder" and found and re.search("[A-Za-z]", found[1]):
            first = known.setdefault(found[1], stmt)
            if first is not stmt:
                instead[stmt] = first
                continue
        kept.append(stmt)
    return kept


def is_bookkeeping(stmt: Stmt) -> bool:
    """Whether `stmt` only picks a value apart or computes a symbolic number, so that it may go once it is unused."""
    if stmt.op == "call_method":
        return stmt.target in _ACCESSORS
    if stmt.op != "call_function":
        return False
    computes = stmt.target in INFIX | PREFIX or stmt.target.startswith(("torch.sym_", "torch.ops.aten.sym_"))
    return stmt.target == "getitem" or computes and _SYMBOLIC.fullmatch(str(stmt.annotation)) is not None


def inputs_of(stmt: Stmt) -> list[Stmt]:
    """The statements whose values `stmt` uses, each once, in the order in which it mentions them."""
    return list(dict.fromkeys(_statements_in((stmt.args, stmt.kwargs))))


def replace_inputs(stmt: Stmt, instead: Mapping[Stmt, Stmt]) -> None:
    """Makes `stmt` use `instead[a]` wherever it uses `a`."""
    stmt.args = _mapped(stmt.args, instead)
    stmt.kwargs = _mapped(stmt.kwargs, instead)


def _statements_in(value: Any) -> Iterator[Stmt]:
    if isinstance(value, Stmt):
        yield value
    for part in _parts(value):
        yield from _statements_in(part)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (tuple, list)) else ()


def _mapped(value: Any, instead: Mapping[Stmt, Stmt]) -> Any:
    if isinstance(value, Stmt):
        return instead.get(value, value)
    parts = [_mapped(part, instead) for part in _parts(value)]
    if isinstance(value, slice):
        return slice(*parts)
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=True))
    return type(value)(parts) if isinstance(value, (tuple, list)) else value


def _last_uses(stmts: Sequence[Stmt]) -> dict[Stmt, list[Stmt]]:
    """Whose values die with each statement, in the order in which they are deleted."""
    dead: dict[Stmt, list[Stmt]] = {}
    alive: set[Stmt] = set()
    for stmt in reversed(stmts):
        inputs = inputs_of(stmt)
        # What is returned is used, but never deleted; a value that nobody uses dies at birth, after its inputs.
        own = [stmt] if stmt not in alive and stmt.op not in ("placeholder", "output") else []
        dead[stmt] = [] if stmt.op == "output" else [value for value in inputs if value not in alive] + own
        alive.update(inputs)
    return dead


def _code(stmt: Stmt) -> str:
    """The line of `stmt` without its deletions."""
    texts = [_text(arg) for arg in stmt.args]
    if stmt.op == "output":
        return f"return {texts[0]}"
    left = f"{stmt.name}{_annotation(stmt)} = "
    if stmt.op == "call_method":
        return f"{left}{texts[0]}.{stmt.target}({_arguments(texts[1:], stmt.kwargs)})"
    if stmt.op != "call_function":
        raise ValueError(f"statement `{stmt.name}` has op {stmt.op!r}, which does not print.")
    match stmt.target, texts:
        case "getitem", [value, index]:
            return f"{left}{value}[{index}]"
        case "setitem", [value, index, new]:
            return f"{value}[{index}] = {new};  {left}{value}"
        case token, [operand] if token in PREFIX:
            return f"{left}{token}{operand}"
        case token, [first, second] if token in INFIX:
            return f"{left}{first} {token} {second}"
        case token, [first, second] if token in IN_PLACE:
            return f"{first} {token} {second};  {left}{first}"
    return f"{left}{stmt.target}({_arguments(texts, stmt.kwargs)})"


def _arguments(texts: Sequence[str], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*texts, *(f"{name} = {_text(value)}" for name, value in kwargs.items())])


def _text(value: Any) -> str:
    if isinstance(value, Stmt):
        return value.name
    parts = [_text(part) for part in _parts(value)]
    if isinstance(value, tuple):
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    if isinstance(value, slice):
        return f"slice({', '.join(parts)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(value, parts, strict=True)) + "}"
    return repr(value)


def _annotation(stmt: Stmt) -> str:
    if stmt.annotation is not None:
        return f': "{stmt.annotation}"'
    return f" : {stmt.placeholder_kind}" if stmt.placeholder_kind else ""


def _bound_symbol(stmt: Stmt) -> str | None:
    """The symbol that a placeholder stands for: of `Sym(s21)`, though not of `Sym(3)` or `Sym(2*s21)`."""
    found = _SYMBOLIC.fullmatch(str(stmt.annotation))
    return found[1] if found and found[1].isidentifier() else None


def annotated_symbols(stmt: Stmt) -> list[str]:
    # What stands before the bracket is a dtype, and `u8` must not pass for a symbol.
    return re.findall(r"\b[suz][a-z]*\d+\b", str(stmt.annotation).partition("[")[2])
