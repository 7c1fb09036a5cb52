"""What code asks of symbolic dimensions, where JAX's answer holds for some sizes only.

JAX says of two dimensions that it cannot compare that they differ, that any dimension is true, and it hashes and prints
them. Code of the user's that asks so takes one way for all sizes, though it would take another for some. So these
questions are noted, and a graph that was traced with symbols is used only for sizes for which the answers are right.
JAX's own code asks them too, but is right whatever the answer, except of remainders (`if n % 2` in rules for FFTs).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jhop import _compat
from jhop._errors import Unsupported


class Asked:
    """The questions that were asked.

    Attributes:
        differ: pairs (dimension, dimension or number) that were said to differ.
        told: dimensions that were hashed or printed, stored in Python state, or asked for what only numbers can tell.
        reached: (dimension, number) for places in a dimension: it must be at least so large.
    """

    def __init__(self) -> None:
        self.differ: list[tuple[Any, Any]] = []
        self.told: list[Any] = []
        self.reached: list[tuple[Any, int]] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what this thread asks; while it is active, nobody else notes it."""
        before = getattr(_notes, "asked", None)
        _notes.asked = self
        _change_class(+1)
        try:
            yield
        finally:
            _change_class(-1)
            _notes.asked = before

    def wrong(self, sizes: dict[str, int]) -> tuple[frozenset[str], str]:
        """(symbols that have to be numbers for the answers to be right at these sizes, why in words)."""
        found: dict[frozenset[str], str] = {}
        for left, right in self.differ:
            if _compat.evaluate_dim(left, sizes) == _compat.evaluate_dim(right, sizes):
                symbols = _compat.dim_symbols(left) | _compat.dim_symbols(right)
                found.setdefault(symbols, f"code asks whether {left} is {right}")
        for dim, least in self.reached:
            if _compat.evaluate_dim(dim, sizes) < least:
                found.setdefault(_compat.dim_symbols(dim), f"an index needs {dim} to be at least {least}")
        for dim in self.told:
            found.setdefault(_compat.dim_symbols(dim), f"code hashes, prints, stores or needs to know {dim}")
        return frozenset().union(*found), "; ".join(found.values())


_notes = threading.local()
_lock = threading.Lock()
_active = 0
_TELLING = ("__hash__", "__str__", "__repr__")
_REFUSING = ("__int__", "__lt__", "__le__", "__gt__", "__ge__")
_KEPT = ("__eq__", "__ne__", *_TELLING, *_REFUSING)
_own: dict[str, Any] = {name: _compat.DimExpr.__dict__.get(name) for name in _KEPT}


def _change_class(by: int) -> None:
    """Has the class of dimensions note what is asked as long as anyone wants to know."""
    global _active
    with _lock:
        before, _active = _active, _active + by
        if not before:
            for name, noting in _NOTING.items():
                setattr(_compat.DimExpr, name, noting)
        elif not _active:
            for name in _NOTING:
                own = _own.get(name)
                delattr(_compat.DimExpr, name) if own is None else setattr(_compat.DimExpr, name, own)


def reach(dim: Any, index: int) -> None:
    """To be called of an integer index into a dimension: where it is a symbol, JAX does else with one out of range."""
    asked: Asked | None = getattr(_notes, "asked", None)
    if asked is not None and _compat.is_dim_expr(dim):
        asked.reached.append((dim, index + 1 if index >= 0 else -index))


def stored(dim: Any, where: str) -> None:
    """To be called of a dimension that a hook left in Python state at `where`: a number belongs there.

    Raises:
        Unsupported: nobody notes it.
    """
    asked: Asked | None = getattr(_notes, "asked", None)
    if asked is None:
        raise Unsupported(
            f"a hook stored the size {_own['__str__'](dim)} in `{where}`: it is a symbol here, and no number. Store it "
            "where sizes are numbers, or not at all."
        )
    asked.told.append(dim)


def _asker(dim: Any = None) -> Asked | None:
    """Who wants to know of the question under way; None if it is one of jhop's own, or of JAX's and of no remainder."""
    asked: Asked | None = getattr(_notes, "asked", None)
    if asked is None:
        return None
    package = str(sys._getframe(2).f_globals.get("__name__", "")).partition(".")[0]
    if package in ("jax", "jaxlib"):
        return asked if dim is not None and "mod(" in _own["__str__"](dim) else None
    return None if package == "jhop" else asked


def _differs(asked: Asked | None, left: Any, right: Any) -> None:
    if asked is None:
        return
    if _compat.is_dim_expr(right) and right.scope is not left.scope:
        asked.told.append(left)
    elif _compat.is_dim_expr(right):
        asked.differ.append((left, right))
    elif isinstance(right, (int, float, np.integer, np.floating)) and right % 1 == 0:
        asked.differ.append((left, int(right)))


def _eq(self: Any, other: Any) -> bool:
    same: bool = _own["__eq__"](self, other)
    if not same:
        _differs(_asker(self), self, other)
    return same


def _ne(self: Any, other: Any) -> bool:
    same: bool = _own["__eq__"](self, other)
    if not same:
        _differs(_asker(self), self, other)
    return not same


def _bool(self: Any) -> bool:
    _differs(_asker(self), self, 0)
    return True


def _telling(name: str) -> Callable[[Any], Any]:
    def tell(self: Any) -> Any:
        asked = _asker()
        if asked is not None:
            asked.told.append(self)
        return _own[name](self)

    return tell


def _refusing(name: str) -> Callable[..., Any]:
    def ask(self: Any, *others: Any) -> Any:
        try:
            return _own[name](self, *others)
        except Exception:  # which whoever asks may catch, to go on in a way that is right for no size
            asked = _asker()
            if asked is not None:
                asked.told.append(self)
            raise

    return ask


def _index(self: Any) -> int:
    asked = _asker()
    if asked is not None:
        asked.told.append(self)
    raise TypeError(f"the size {_own['__str__'](self)} is a symbol, and is used as a number")


_NOTING: dict[str, Callable[..., Any]] = {
    "__eq__": _eq, "__ne__": _ne, "__bool__": _bool, "__index__": _index,
    **{name: _telling(name) for name in _TELLING},
    **{name: _refusing(name) for name in _REFUSING},
}  # fmt: skip
