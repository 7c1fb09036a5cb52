"""Symbolic sizes and numbers: their arithmetic, how they print, and which symbol stands for which value.

The text of an expression depends on its canonical form, so arithmetic keeps that form: an expression is a sum of
terms, each a coefficient times powers of symbols, of calls such as `PythonMod(s80, 5)`, or of sums left unexpanded.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

from jhop._text._namespace import SymbolNames

Number: TypeAlias = int | float
# A symbol is its name alone, a call its function and arguments, a sum that is a factor stands behind `_SUM_FACTOR`.
Base: TypeAlias = tuple[Any, ...]
Monomial: TypeAlias = tuple[tuple[Base, int], ...]  # powers, in printed order; empty for the constant term
Term: TypeAlias = tuple[Monomial, Number]
Resolve: TypeAlias = "Callable[[str], SymExpr | str | Number]"

_SUM_FACTOR = ""
_FLOAT_CALLS = ("ToFloat", "IntTrueDiv", "FloatTrueDiv", "FloatPow")
_DIVIDE = {False: "IntTrueDiv", True: "FloatTrueDiv"}
_ON_NUMBERS: Mapping[str, Callable[..., Number]] = {
    "ToFloat": float, "FloorToInt": math.floor, "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "IntTrueDiv": operator.truediv, "FloatTrueDiv": operator.truediv, "FloatPow": math.pow,
}  # fmt: skip


class _SizeName(str):
    """The name of a symbol that is never negative; equal to the same name of any other kind."""


def _operator(rule: Callable[[SymExpr, SymExpr], SymExpr]) -> tuple[Callable[[Any, Any], SymExpr], ...]:
    """Methods for `a op b` and its mirror image that take numbers too, and make ints floats where they meet a float."""

    def apply(left: SymExpr, right: SymExpr) -> SymExpr:
        if left.is_float != right.is_float:
            left, right = (e if e.is_float else _call("ToFloat", e) for e in (left, right))
        return rule(left, right)

    return (lambda a, b: apply(a, _lift(b))), (lambda a, b: apply(_lift(b), a))


@dataclass(frozen=True)
class SymExpr:
    """A sum of terms. Make one with `symbol`, `constant` and Python's arithmetic operators."""

    terms: tuple[Term, ...]

    # The rules stand below, so each is looked up when it is called.
    __add__, __radd__ = _operator(lambda a, b: _collect(*a.terms, *b.terms))
    __sub__, __rsub__ = _operator(lambda a, b: a + -b)
    __mul__, __rmul__ = _operator(lambda a, b: _multiply(a, b))
    __truediv__, __rtruediv__ = _operator(lambda a, b: _call(_DIVIDE[a.is_float], a, b))
    __floordiv__, __rfloordiv__ = _operator(lambda a, b: _floor_divide(a, b))
    __mod__, __rmod__ = _operator(lambda a, b: _remainder(a, b))
    __pow__, __rpow__ = _operator(lambda a, b: _raise(a, b))

    def __neg__(self) -> SymExpr:
        return _scale(self, lambda coefficient: -coefficient)

    def __str__(self) -> str:
        return _text(self, full_precision=True)

    @property
    def value(self) -> Number | None:
        """The number that this is, None where a symbol is left."""
        return None if any(monomial for monomial, _ in self.terms) else sum(number for _, number in self.terms)

    @property
    def name(self) -> str | None:
        """The name of the symbol that this is, None for anything else."""
        base = _only_base(self)
        return str(base[0]) if base is not None and len(base) == 1 else None

    @property
    def symbols(self) -> frozenset[str]:
        """The names of all symbols in it."""
        return frozenset(base[0] for base in _bases(self) if len(base) == 1)

    @property
    def is_float(self) -> bool:
        """Whether it stands for a Python float, as symbols in `z` do (`zf70`)."""
        return any(isinstance(c, float) or any(_is_float(base) for base, _ in monomial) for monomial, c in self.terms)

    @property
    def is_nonnegative(self) -> bool:
        """Whether it is known never to be negative."""
        return all(c >= 0 and all(_is_nonnegative(base) for base, _ in monomial) for monomial, c in self.terms)


def symbol(name: str, *, nonnegative: bool = False) -> SymExpr:
    """The expression that is one symbol; `nonnegative` decides between `Mod` and `PythonMod` and nothing else."""
    return _of((_SizeName(name) if nonnegative else name,))


def constant(value: Number) -> SymExpr:
    """The expression that is one number."""
    return _collect(((), value))


def substitute(expr: SymExpr | Number, resolve: Resolve) -> SymExpr:
    """`expr` with what `resolve` says of each symbol in its place: a symbol's name, a number or an expression.

    Where a symbol changes, products of sums are multiplied out; where none does, `expr` comes back as it is.
    """
    expr = _lift(expr)
    found = {name: _lift(resolve(name)) for name in expr.symbols}
    changed = {name: new for name, new in found.items() if new.name != name}
    return _rebuild(expr, changed) if changed else expr


def render(expr: SymExpr | Number, resolve: Resolve | None = None) -> str:
    """The text of `expr` after all replacements: `2*s80 + 2`, `((s80 - 4)//3)`, `3`."""
    return str(_lift(expr) if resolve is None else substitute(expr, resolve))


class ShapeEnv:
    """Which symbol stands for which source, the value that it has now, and what it was found equal to."""

    def __init__(self) -> None:
        self.values: dict[str, Number] = {}
        self._names = SymbolNames()
        self._symbols: dict[str, SymExpr] = {}
        self._by_size: dict[int, SymExpr] = {}
        self._replacements: dict[str, SymExpr] = {}

    def symbol_for_source(self, source_name: str, *, prefix: str = "s") -> str:
        """The name of a new symbol for what the Python expression `source_name` reaches."""
        return self._names.hashed(source_name, prefix)

    def fresh(self, source_name: str, value: Number, prefix: str = "s", *, nonnegative: bool = False) -> SymExpr:
        """A symbol of its own (`s` for an int, `zf` for a float), 0 and 1 included, whatever others have that value."""
        return self._add(self.symbol_for_source(source_name, prefix=prefix), value, nonnegative)

    def input_dim(self, source_name: str, value: int) -> SymExpr:
        """A dimension of a tensor: 0 and 1 stay numbers, and equal dimensions share the first one's symbol."""
        if value in (0, 1):
            return constant(value)
        if value not in self._by_size:
            self._by_size[value] = self.fresh(source_name, value, nonnegative=True)
        return self._by_size[value]

    def resolve(self, name: str) -> SymExpr:
        """What symbol `name` stands for by now: itself, another symbol, a product of some, or a constant."""
        if name in self._replacements:
            return substitute(self._replacements[name], self.resolve)
        return self._symbols.get(name) or symbol(name)

    def unify(self, left: SymExpr | Number, right: SymExpr | Number) -> str | None:
        """Makes the two equal from here on, by replacing one symbol everywhere.

        The symbol with the largest value gives way; of several such, the last in string order. Returns its name, or
        None if nothing was replaced, as where it does not come out as a sum of products with whole coefficients.
        """
        gap = substitute(left, self.resolve) - substitute(right, self.resolve)
        if gap.value == 0:
            return None
        if gap.value is not None:
            now = f"{render(left, self.resolve)} and {render(right, self.resolve)}"
            raise ValueError(f"sizes {render(left)} and {render(right)} must be equal, but are {now}.")
        loser = max(gap.symbols, key=lambda name: (self.values.get(name, math.inf), name))
        factor = dict(gap.terms).get((((loser,), 1),), 0)
        rest = gap - symbol(loser) * factor
        stuck = loser in rest.symbols or any(base[0] != _SUM_FACTOR and len(base) > 1 for base in _bases(gap))
        if stuck or not factor or any(coefficient % factor for _, coefficient in rest.terms):
            return None
        self._replacements[loser] = _scale(rest, lambda coefficient: -coefficient // factor)
        return loser

    def _add(self, name: str, value: Number, nonnegative: bool = False) -> SymExpr:
        self.values[name] = value
        self._symbols[name] = symbol(name, nonnegative=nonnegative)
        return self._symbols[name]


# Canonical form.


def _lift(value: SymExpr | str | Number) -> SymExpr:
    return value if isinstance(value, SymExpr) else symbol(value) if isinstance(value, str) else constant(value)


def _of(base: Base) -> SymExpr:
    return SymExpr(((((base, 1),), 1),))


def _only_base(expr: SymExpr) -> Base | None:
    """What `expr` consists of, where that is one base and nothing else."""
    match expr.terms:
        # A coefficient of 1.0 is not left out, as in `1.0*zf70`.
        case ((((base, 1),), int(1)),):
            return base
    return None


def _bases(expr: SymExpr) -> Iterator[Base]:
    """All symbols, calls and sums in `expr`, those inside others as well."""
    for base in (base for monomial, _ in expr.terms for base, _ in monomial):
        yield base
        yield from (inner for part in base[1:] for inner in _bases(part))


def _is_float(base: Base) -> bool:
    if len(base) == 1:
        return str(base[0]).startswith("z")
    return base[0] in _FLOAT_CALLS or base[0] in (_SUM_FACTOR, "Mod", "PythonMod") and base[1].is_float


def _is_nonnegative(base: Base) -> bool:
    inherits = base[0] in (_SUM_FACTOR, "FloorDiv") and all(arg.is_nonnegative for arg in base[1:])
    return inherits or base[0] == "Mod" or isinstance(base[0], _SizeName)


def _collect(*terms: Term) -> SymExpr:
    """Adds like terms and puts what is left in printed order."""
    total: dict[Monomial, Number] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = {monomial: coefficient for monomial, coefficient in total.items() if coefficient}
    # Lexicographic in the exponents, as for polynomials: all powers of the first base before those of the second.
    bases = sorted({base for monomial in kept for base, _ in monomial}, key=_base_key)
    order = sorted(kept, key=lambda monomial: [dict(monomial).get(base, 0) for base in bases], reverse=True)
    return SymExpr(tuple((monomial, kept[monomial]) for monomial in order))


def _scale(expr: SymExpr, change: Callable[[Any], Number]) -> SymExpr:
    return _collect(*((monomial, change(coefficient)) for monomial, coefficient in expr.terms))


def _multiply(left: SymExpr, right: SymExpr, *, expand: bool = False) -> SymExpr:
    """The product; a sum times anything but a number stays a factor unless `expand`."""
    if not expand and left.value is None and right.value is None:
        left, right = (e if len(e.terms) == 1 else _of((_SUM_FACTOR, e)) for e in (left, right))
    return _collect(*((_join(a, b), c * d) for a, c in left.terms for b, d in right.terms))


def _join(left: Monomial, right: Monomial) -> Monomial:
    powers = Counter(dict(left))
    powers.update(dict(right))
    return tuple(sorted(powers.items(), key=lambda factor: _base_key(factor[0])))


def _raise(base: SymExpr, exponent: SymExpr) -> SymExpr:
    if not base.is_float and isinstance(exponent.value, int) and exponent.value >= 0:
        return reduce(_multiply, [base] * exponent.value, constant(1))
    return _call("FloatPow" if base.is_float else "PowByNatural", base, exponent)


def _floor_divide(left: SymExpr, right: SymExpr) -> SymExpr:
    """`left // right`, with all terms that divide evenly outside the division."""
    if left.is_float:
        return _call("ToFloat", _call("FloorToInt", left / right))
    if left == right or left.value == 0:
        return constant(1 if left.terms else 0)
    match _only_base(left):
        case ("FloorDiv", inner, divisor):
            return _floor_divide(inner, divisor * right)
    if (by := right.value) is not None:
        whole = _collect(*((monomial, c // by) for monomial, c in left.terms if c % by == 0))
        if whole.terms:
            return _floor_divide(left - whole * by, right) + whole
    common = math.gcd(*(int(c) for _, c in (*left.terms, *right.terms)))
    return _call("FloorDiv", *(_scale(e, lambda c: c // common) for e in (left, right)))


def _remainder(left: SymExpr, right: SymExpr) -> SymExpr:
    by = right.value
    if left in (constant(0), right, -right) or by and not left.is_float and all(c % by == 0 for _, c in left.terms):
        return constant(0)
    return _call("Mod" if left.is_nonnegative and right.is_nonnegative else "PythonMod", left, right)


def _call(function: str, *args: SymExpr) -> SymExpr:
    known = [value for arg in args if (value := arg.value) is not None]
    if len(known) == len(args) and function in _ON_NUMBERS:
        return constant(_ON_NUMBERS[function](*known))
    return _of((function, *args))


def _rebuild(expr: SymExpr, new: Mapping[str, SymExpr]) -> SymExpr:
    """`expr` with other expressions for some symbols, multiplied out."""

    def once_more(base: Base) -> SymExpr:
        if len(base) == 1:
            return new.get(base[0], _of(base))
        args = [_rebuild(arg, new) for arg in base[1:]]
        if base[0] == _SUM_FACTOR:
            return args[0]
        return _SIMPLIFY[base[0]](*args) if base[0] in _SIMPLIFY else _call(base[0], *args)

    total: list[Term] = []
    for monomial, coefficient in expr.terms:
        factors = [once_more(base) for base, exponent in monomial for _ in range(exponent)]
        total += reduce(lambda a, b: _multiply(a, b, expand=True), factors, constant(coefficient)).terms
    return _collect(*total)


_SIMPLIFY: Mapping[str, Callable[..., SymExpr]] = {
    "FloorDiv": _floor_divide, "Mod": _remainder, "PythonMod": _remainder, "PowByNatural": _raise,
}  # fmt: skip


# Printed order and text.

# How tightly a text binds; a name and any call not listed need no parentheses anywhere.
_SUM, _PRODUCT, _POWER, _ATOM = 40, 50, 60, 1000
_BINDING = {"FloorDiv": 35, "Mod": 35, "PythonMod": 35, "IntTrueDiv": 35, "FloatTrueDiv": 35, "PowByNatural": 50}
_BINDING |= {"FloatPow": _POWER, _SUM_FACTOR: _SUM}


def _base_key(base: Base) -> tuple[Any, ...]:
    """Sorts numbers (1), symbols by name (2), products (3), sums (4), calls (5); the ranks keep them apart."""
    if base[0] == _SUM_FACTOR:
        return 4, len(base[1].terms), tuple(map(_term_key, base[1].terms))
    return 2 if len(base) == 1 else 5, base[0], tuple(map(_expr_key, base[1:]))


def _expr_key(expr: SymExpr) -> tuple[Any, ...]:
    return _term_key(expr.terms[0]) if len(expr.terms) == 1 else (_base_key((_SUM_FACTOR, expr)), 1, 1)


def _term_key(term: Term) -> tuple[Any, ...]:
    monomial, coefficient = term
    if len(monomial) == 1:
        return _base_key(monomial[0][0]), monomial[0][1], coefficient
    factors = tuple((_base_key(base), exponent) for base, exponent in monomial)
    return (3, len(factors), factors) if factors else (1,), 1, coefficient


def _text(expr: SymExpr, *, full_precision: bool = False) -> str:
    if expr.value is not None:
        return _number_text(expr.value, full_precision)
    terms = expr.terms
    match terms:
        case ((((_, 1),), below), ((), above)) if below < 0 < above:
            terms = terms[::-1]  # `4 - s80`, though `-s80 - 4` and `-s24*s39 + 4`
    text = ""
    for term in terms:
        sign = " - " if term[1] < 0 else " + "
        text += sign + (f"({_term_text(*term)})" if len(terms) > 1 and _binding(term) < _SUM else _term_text(*term))
    return ("-" if text.startswith(" - ") else "") + text[3:]


def _term_text(monomial: Monomial, coefficient: Number) -> str:
    """The text of a term without its sign."""
    if _only_base(SymExpr(((monomial, coefficient),))) is not None:
        return _base_text(monomial[0][0])
    is_one = monomial and abs(coefficient) == 1 and isinstance(coefficient, int)
    factors = [] if is_one else [_number_text(abs(coefficient))]
    for base, exponent in monomial:
        limit, power = (_PRODUCT, "") if exponent == 1 else (_POWER, f"**{exponent}")
        loose = _binding((((base, 1),), 1)) <= limit
        factors.append((f"({_base_text(base)})" if loose else _base_text(base)) + power)
    return "*".join(factors)


def _base_text(base: Base) -> str:
    match base:
        case (name,):
            return str(name)
        case ("FloorDiv", *args):
            bare = [len(arg.terms) == 1 and _binding(arg.terms[0]) == _ATOM for arg in args]
            texts = [_text(arg) if atom else f"({_text(arg)})" for arg, atom in zip(args, bare, strict=True)]
            return f"({'//'.join(texts)})"
    args_text = ", ".join(map(_text, base[1:]))
    return args_text if base[0] == _SUM_FACTOR else f"{base[0]}({args_text})"


def _binding(term: Term) -> int:
    monomial, coefficient = term
    if coefficient < 0:
        return _SUM
    base = _only_base(SymExpr((term,)))
    if base is not None:
        return _BINDING.get(base[0], _ATOM)
    is_power = len(monomial) == 1 and coefficient == 1 and isinstance(coefficient, int)
    return _POWER if is_power else _PRODUCT if monomial else _ATOM


def _number_text(number: Number, full_precision: bool = False) -> str:
    """Floats have 15 digits; only a float on its own keeps the zeros at the end."""
    if isinstance(number, int):
        return str(number)
    digits, _, exponent = f"{number:#.15g}".partition("e")
    if not full_precision:
        digits = digits.rstrip("0") + ("0" if digits.rstrip("0").endswith(".") else "")
    return digits + (f"e{int(exponent):+d}" if exponent else "")
