"""Sizes as symbols: which are, what a function is traced with then, and for which sizes the trace is right.

One trace with symbols serves every size that keeps to what the trace took for granted: sizes of 0 and 1 are numbers,
equal sizes share a symbol, and questions that code asked of a size have the same answer (`_asked`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax.export
import jax.numpy as jnp

from jhop import _compat
from jhop._asked import Asked
from jhop._interp import inner_jaxprs, sizes_of, symbols_in
from jhop._rebuild import is_sealed
from jhop._source import first_line
from jhop._text._symbols import ShapeEnv

Place = tuple[int, int]  # (index of an input, axis)
Places = tuple[tuple[str, int, int], ...]  # (symbol, index, axis), as `GraphModule.shapes`


class NeedsNumbers(Exception):
    """Code asked of a size what symbols cannot answer: these have to be numbers, `always` or for these sizes only."""

    def __init__(self, symbols: frozenset[str], why: str, always: bool):
        super().__init__(why)
        self.symbols = symbols
        self.always = always


class Symbolic(NamedTuple):
    """Types of inputs, of which some sizes are symbols."""

    avals: list[Any]
    places: Places

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(symbol for symbol, _, _ in self.places)

    def places_of(self, symbols: frozenset[str]) -> frozenset[Place]:
        """Where these symbols are."""
        return frozenset((index, axis) for symbol, index, axis in self.places if symbol in symbols)

    def mentioned(self, error: Exception) -> frozenset[str]:
        """The symbols that an error is about; all, if it names none."""
        if isinstance(error, NeedsNumbers):
            return error.symbols
        return self.symbols.intersection(re.findall(r"\w+", str(error))) or self.symbols


def with_symbols(avals: Sequence[Any], sources: Sequence[str], wanted: Callable[[Place], bool]) -> Symbolic:
    """Types in which sizes are symbols: equal sizes share one, sizes 0 and 1 stay numbers.

    Names follow PyTorch's: a hash of the expression that reads the size. See `_text._symbols.ShapeEnv`.

    Args:
        avals: of the inputs.
        sources: per input, the Python expression that reaches it.
        wanted: which sizes are to be symbols, if they can be.
    """
    env = ShapeEnv()
    names: list[list[Any]] = []
    places: list[tuple[str, int, int]] = []
    for index, (aval, source) in enumerate(zip(avals, sources, strict=True)):
        dims: list[Any] = []
        for axis, size in enumerate(aval.shape):
            symbol = None
            if not _compat.is_dim_expr(size) and wanted((index, axis)):
                symbol = env.input_dim(f"{source}.size()[{axis}]", size).name
            dims.append(symbol or size)
            if symbol is not None:
                places.append((symbol, index, axis))
        names.append(dims)
    if not places:
        return Symbolic(list(avals), ())
    scope = jax.export.SymbolicScope([f"{symbol} >= 2" for symbol in dict.fromkeys(name for name, _, _ in places)])
    found: list[Any] = []
    for aval, dims in zip(avals, names, strict=True):
        if any(isinstance(dim, str) for dim in dims):
            aval = aval.update(shape=jax.export.symbolic_shape(",".join(map(str, dims)), scope=scope))
        found.append(aval)
    return Symbolic(found, tuple(places))


def kind_of(aval: Any) -> Any:
    """What tells the type of an input from others, less its sizes."""
    return aval.ndim, aval.dtype, aval.weak_type, aval.sharding


def for_one_size(graphs: Iterable[Any]) -> str:
    """Why one of these graphs can be used for the sizes of its trace only, in words; "" if none need be."""
    for gm in graphs:
        if any(hook.rules() & {"transpose", "vmap"} for hook, _ in gm.hooks):
            return "a hook inside a function that is transposed or mapped is made for one size"
        if name := sealed_with_symbols(gm.jaxpr):
            return f"the operation `{name}` is made for one size"
    return ""


def sealed_with_symbols(jaxpr: Any) -> str:
    """An operation in a jaxpr on symbolic sizes which it keeps to itself, so that they cannot be filled in; or ""."""
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        if is_sealed(eqn) and symbols_in([atom.aval for atom in (*eqn.invars, *eqn.outvars)]):
            return type(eqn.params["_prim"]).__name__
        if name := next(filter(None, map(sealed_with_symbols, inner_jaxprs(eqn))), ""):
            return name
    return ""


class Fits:
    """For which sizes of its inputs a graph that was traced with symbols is right.

    Args:
        types: what it was traced with.
        asked: what code asked of the sizes meanwhile.
        names: of the inputs.
    """

    def __init__(self, types: Symbolic, asked: Asked, names: Sequence[str]):
        self._types = types
        self._asked = asked
        self._names = names
        self._values: dict[Any, int] = {}  # expressions of sizes that are values, and how large they may be

    def look(self, jaxpr: Any) -> None:
        """Notes which expressions of sizes a graph computes with: they must not outgrow what it keeps them in."""
        for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
            if eqn.primitive.name == "dim_as_value":
                self._values[eqn.params["dim"]] = int(jnp.iinfo(eqn.outvars[0].aval.dtype).max)
            for inner in inner_jaxprs(eqn):
                self.look(inner)

    def _outgrown(self, sizes: dict[str, Any]) -> str:
        found = [dim for dim, largest in self._values.items() if abs(_compat.evaluate_dim(dim, sizes)) > largest]
        return f"{found[0]} is too large a number for a graph to compute with" if found else ""

    def check(self, shapes: Sequence[Any]) -> None:
        """Raises NeedsNumbers if answers to what was asked are wrong for the very sizes that were traced with."""
        sizes = sizes_of(self._types.avals, self._types.places, list(shapes))
        symbols, why = self._asked.wrong(sizes)
        if symbols:
            raise NeedsNumbers(symbols, self.in_words(why), bool(self._asked.told))
        if why := self._outgrown(sizes):
            raise NeedsNumbers(self._types.symbols, self.in_words(why), False)

    def broken(self, shapes: Sequence[Any]) -> str | None:
        """Why it is not right for inputs of these shapes, in words; None if it is."""
        types = self._types
        sizes = sizes_of(types.avals, types.places, list(shapes))
        for symbol, size in sizes.items():
            if size < 2:
                return self.in_words(f"{symbol} is {size}, and sizes of 0 and 1 are traced apart")
        for aval, shape, name in zip(types.avals, shapes, self._names, strict=True):
            for axis, (dim, size) in enumerate(zip(aval.shape, shape, strict=True)):
                if not _compat.dim_symbols(dim) <= sizes.keys() or (then := _compat.evaluate_dim(dim, sizes)) != size:
                    if not _compat.is_dim_expr(dim):
                        return f"`{name}.shape[{axis}]` was {then} and is {size}"
                    return self.in_words(f"`{name}.shape[{axis}]` was equal to {dim}, which is {then}, and is {size}")
        return self.in_words(self._asked.wrong(sizes)[1] or self._outgrown(sizes)) or None

    def in_words(self, text: str) -> str:
        """Text with the places of symbols in place of their names."""
        known = {s: f"`{self._names[index]}.shape[{axis}]`" for s, index, axis in reversed(self._types.places)}
        return re.sub(r"\b[a-z]+\d+\b", lambda found: known.get(found[0], found[0]), text)


class Dynamic:
    """Which sizes of a function's arguments of one kind are symbols.

    Args:
        dynamic: True for all, False for none, None for those that were seen to change.
    """

    def __init__(self, dynamic: bool | None):
        self._dynamic = dynamic
        self._seen: dict[Place, int] = {}
        self._changed: set[Place] = set()
        self.numbers: set[Place] = set()  # those that turned out to be needed as numbers
        self.why = ""

    def see(self, shapes: Sequence[Any]) -> None:
        """Notes the sizes that a trace is made for."""
        for index, shape in enumerate(shapes):
            for axis, size in enumerate(shape):
                if self._seen.setdefault((index, axis), size) != size:
                    self._changed.add((index, axis))

    def wants(self, place: Place) -> bool:
        """Whether a size is to be a symbol."""
        if place in self.numbers or self._dynamic is False:
            return False
        return self._dynamic is True or place in self._changed

    def settle(self, places: frozenset[Place], why: str) -> None:
        """From now on these are numbers."""
        self.numbers |= places
        self.why = why


class Sized(Protocol):
    """One tracing, with symbols for some sizes of its inputs.

    Attributes:
        values: the inputs.
        types: what it is traced with.
        fits: for which sizes the result is, if some are symbols.
    """

    values: list[Any]
    types: Symbolic
    fits: Fits | None

    def run(self, dynamic: Dynamic, numbers: set[Place]) -> None:
        """Traces, with symbols for those of the wanted sizes that are not in `numbers`."""


_Sized = TypeVar("_Sized", bound=Sized)


def with_fewest_numbers(make: Callable[[], _Sized], dynamic: Dynamic) -> tuple[_Sized, str]:
    """A tracing with symbols where they are wanted and will do; why they will not, if so.

    Args:
        make: begins a tracing.
        dynamic: which sizes are wanted as symbols.
    """
    numbers: set[Place] = set()  # sizes that symbols do not do for
    why, always = "", False
    for retried in (False, True, True):
        tracing = make()
        dynamic.see([jnp.shape(value) for value in tracing.values])
        try:
            tracing.run(dynamic, numbers)
            break
        except Exception as error:
            types = tracing.types
            if not types.places:
                raise
            numbers |= types.places_of(types.symbols if retried else types.mentioned(error))
            words = first_line(error) if tracing.fits is None else tracing.fits.in_words(first_line(error))
            why = why or f"sizes cannot be symbols: {words}"
            always = always or getattr(error, "always", True)
    if always:
        dynamic.settle(frozenset(numbers), why)
    return tracing, why
