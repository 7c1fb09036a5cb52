"""Python source of names, types, numbers and parameters."""

from __future__ import annotations

import ast
import enum
import functools
import keyword
import math
import re
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jhop import _compat
from jhop._interp import linear

# What every printed text may read, and so no value is called.
GLOBALS = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "functools": functools, "primitives": primitives}
RESERVED = {*keyword.kwlist, *keyword.softkwlist, *GLOBALS, "jhop", "abs", "int", "float", "_"}
_SCALAR_TYPES = {"bool": "jnp.bool_"}
_SHORT = {"bfloat": "bf", "uint": "u", "float": "f", "int": "i", "complex": "c"}


class Names:
    """Hands out identifiers, each once.

    A child's names are free again for its siblings, and never hide one of its parents'. A global name is one that no
    scope uses, so that it means the same everywhere.
    """

    def __init__(self, parent: Names | None = None):
        # In the order in which they were taken, so that the last ones can be given back.
        self._values: dict[str, None] = dict(parent._values) if parent else dict.fromkeys(RESERVED)
        self._functions: dict[str, None] = dict(parent._functions) if parent else {}
        self._globals: set[str] = parent._globals if parent else set()
        self._ever: set[str] = parent._ever if parent else set(RESERVED)
        # Per kind of name and base: numbers below this one are taken. So many values of one name need no long search.
        self._next: dict[tuple[str, str], int] = {}

    def make(self, wanted: str) -> str:
        """`wanted` as an identifier, with a number added where it is taken."""
        name = self._first("value", identifier(wanted), self._values, self._functions, self._globals)
        self._values[name] = None
        self._ever.add(name)
        return name

    def make_function(self, wanted: str) -> str:
        """A name for a nested function, which is called at once: a later function may have the same."""
        plain = wanted.isidentifier() and not keyword.iskeyword(wanted)
        name = self._first("function", wanted if plain else identifier(wanted), self._values, self._globals)
        self._functions[name] = None
        self._ever.add(name)
        return name

    def make_global(self, wanted: str) -> str:
        name = self._first("global", identifier(wanted), self._ever)
        self.reserve(name)
        return name

    def reserve(self, name: str) -> bool:
        """Makes `name` a global; False if some scope uses it otherwise."""
        if name in self._ever and name not in self._globals:
            return False
        self._globals.add(name)
        self._ever.add(name)
        return True

    def _first(self, kind: str, base: str, *taken: Container[str]) -> str:
        count = self._next.get((kind, base), 0)
        while any((name := f"{base}_{count}" if count else base) in names for names in taken):
            count += 1
        self._next[kind, base] = count
        return name

    def snapshot(self) -> tuple[int, int]:
        return len(self._values), len(self._functions)

    def restore(self, snapshot: tuple[int, int]) -> None:
        """Gives back the names of values and functions that were taken since."""
        if (len(self._values), len(self._functions)) != snapshot:
            for names, size in zip((self._values, self._functions), snapshot, strict=True):
                while len(names) > size:
                    names.popitem()
            self._next.clear()


def identifier(wanted: str) -> str:
    """The nearest identifier: `<lambda>` gives `lambda_`, `jvp[clip]` gives `jvp_clip`."""
    name = re.sub(r"\W+", "_", wanted, flags=re.ASCII).strip("_") or "value"
    name = f"_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) else name


def type_text(aval: Any) -> str:
    """`f32[4,8]`; never fails."""
    try:
        short = re.sub(r"^(bfloat|float|uint|int|complex)(?=\d)", lambda match: _SHORT[match[0]], str(aval.dtype))
        return f"{short}[{','.join(map(str, aval.shape))}]"
    except Exception:
        return type(aval).__name__


def tuple_of(texts: list[str]) -> str:
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def literal(value: Any) -> str:
    """Python source of a parameter.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, enum.Enum):
        cls = type(value)
        if getattr(lax, cls.__name__, None) is cls:
            return f"lax.{cls.__name__}.{value.name}"
    elif isinstance(value, (bool, np.bool_, int, np.integer, str, bytes)) or value is None or value is Ellipsis:
        return repr(value.item() if isinstance(value, np.generic) else value)
    elif isinstance(value, (float, complex, np.inexact)):
        return number(value)
    elif isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return dtype_text(np.dtype(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return _from_lax(value, value._fields)
    elif isinstance(value, tuple):
        return tuple_of([literal(item) for item in value])
    elif isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    elif isinstance(value, jax.sharding.PartitionSpec):
        return f"jax.sharding.PartitionSpec({', '.join(map(literal, value))})"
    elif _compat.is_dim_expr(value):
        return dim_text(value)
    elif value in (bool, int, float, complex, str):
        return str(value.__name__)
    elif hasattr(value, "__dataclass_fields__"):
        return _from_lax(value, value.__dataclass_fields__)
    raise ValueError(f"no source for {type(value).__name__}")


def _from_lax(value: Any, fields: Any) -> str:
    """A record whose class `lax` makes public, such as `lax.GatherDimensionNumbers`."""
    cls = type(value)
    if getattr(lax, cls.__name__, None) is not cls:
        raise ValueError(f"no source for {cls.__name__}")
    return f"lax.{cls.__name__}({', '.join(f'{name}={literal(getattr(value, name))}' for name in fields)})"


def dim_text(dim: Any) -> str:
    """A symbolic dimension as Python computes it from its symbols."""

    class Python(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name in ("floordiv", "mod"):
                return ast.BinOp(node.args[0], ast.FloorDiv() if name == "floordiv" else ast.Mod(), node.args[1])
            if name not in ("max", "min"):
                raise ValueError(f"no source for dimension {dim}")
            # Python's own compare, which dimensions may refuse.
            return ast.Call(ast.parse(f"jax.core.{name}_dim", mode="eval").body, node.args, [])

    return ast.unparse(Python().visit(ast.parse(str(dim).replace("^", "**"), mode="eval")))


def size_text(dim: Any, size: str) -> str:
    """The one symbol of a dimension, computed from the source of a size: `(x.shape[0] - 1) // 2` for `2*b + 1`."""
    factor, constant = linear(dim) or (1, 0)
    if constant:
        size = f"{size} {'-' if constant > 0 else '+'} {abs(constant)}"
    return size if factor == 1 else f"({size}) // {factor}" if constant else f"{size} // {factor}"


def dtype_text(dtype: Any) -> str:
    name = _SCALAR_TYPES.get(str(dtype), f"jnp.{dtype}")
    if not name.removeprefix("jnp.").isidentifier() or getattr(jnp, name.removeprefix("jnp."), None) is None:
        raise ValueError(f"no source for dtype {dtype}")
    return name


def number(value: Any) -> str:
    """A number as Python writes it."""
    item = value.item() if hasattr(value, "item") else value
    if isinstance(item, float) and not math.isfinite(item):
        return "jnp.nan" if math.isnan(item) else "jnp.inf" if item > 0 else "-jnp.inf"
    if isinstance(item, complex) and not (math.isfinite(item.real) and math.isfinite(item.imag)):
        return f"complex(float({str(item.real)!r}), float({str(item.imag)!r}))"
    return repr(item)


def literal_texts(atom: Any) -> tuple[str, ...]:
    """Spellings of a scalar in a jaxpr: plain, and with its dtype where it has one of its own."""
    plain = _shortest(np.asarray(atom.val)[()])
    if getattr(atom.aval, "weak_type", False):
        return (plain,)
    return plain, f"{dtype_text(atom.aval.dtype)}({plain})"


def _shortest(value: Any) -> str:
    """The shortest digits that give a number of its dtype back: `0.1`, where Python has more digits of a float32."""
    try:
        short = float(str(value))
        if value.dtype.type(short) == value:
            return number(short) if value.dtype.kind in "fV" else number(value)
    except (TypeError, ValueError):
        pass
    return number(value)


def elements_text(value: Any) -> str:
    """Nested lists of numbers."""
    return f"[{', '.join(map(elements_text, value))}]" if isinstance(value, list) else number(value)
