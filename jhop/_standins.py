"""Hooks that are made anew at each pass: functions of the same code, with other values closed over.

A captured pass is for one structure of the tape, and what hooks close over is no part of it. So it is captured with
stand-ins for them: functions of the same code with cells of their own, which get the values of the present hooks before
each run. The values are inputs of the graph then, as other state of hooks is.

That is done for functions which cannot be told from their stand-ins: they write to no variable outside, and close over
plain values only, in variables that no other hook writes to. Other hooks are a part of the structure, by identity.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import gc
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jhop import _state
from jhop._classes import is_user_class
from jhop._leaves import DECLARED
from jhop._node import ARRAY

_PLAIN = frozenset({int, float, bool, complex, str, bytes, type(None), ARRAY})
_HOLDERS = (
    types.CellType, types.MethodType, functools.partial, tuple, list, dict, set, frozenset, collections.deque,
    staticmethod, classmethod, property,
)  # fmt: skip


def replaceable(fn: Any) -> bool:
    """Whether a hook may have a stand-in."""
    if type(fn) is not types.FunctionType or fn.__kwdefaults__ or fn.__dict__ or _written(fn.__code__):
        return False
    try:
        values = [cell.cell_contents for cell in fn.__closure__ or ()]
    except ValueError:  # a cell that is empty
        return False
    return all(map(_is_plain, values)) and all(map(_is_plain, fn.__defaults__ or ()))


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, np.generic)


@functools.lru_cache(maxsize=1024)
def _written(code: types.CodeType) -> frozenset[str]:
    """The variables of the functions around it that code, or code in it, writes to."""
    stores = ("STORE_DEREF", "DELETE_DEREF")
    own = frozenset[str](step.argval for step in dis.get_instructions(code) if step.opname in stores)
    inner = [_written(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return own.union(*inner) & frozenset(code.co_freevars)


def written_by(hooks: Iterable[Any]) -> set[int]:
    """Ids of the cells of closures that hooks may write to, also by functions that they hold in turn."""
    found: set[int] = set()
    rest = list(hooks)
    seen: dict[int, Any] = {}  # which also keeps what is made for us, such as bound methods
    while rest:
        obj = rest.pop()
        if id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if isinstance(obj, types.FunctionType):
            names = _written(obj.__code__)
            cells = dict(zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True))
            found |= {id(cell) for name, cell in cells.items() if name in names}
            rest += [*cells.values(), obj.__defaults__, obj.__kwdefaults__, obj.__dict__]
        elif isinstance(obj, _HOLDERS) or _of_user(obj):
            rest += [held for held in gc.get_referents(obj) if type(held) not in _PLAIN]
    return found


def _of_user(obj: Any) -> bool:
    cls = obj if isinstance(obj, type) else type(obj)
    return is_user_class(cls) and cls not in DECLARED


class StandIn:
    """A function in place of another one of its code.

    Attributes:
        fn: the function.
    """

    __slots__ = ("_cells", "fn")

    def __init__(self, fn: types.FunctionType):
        self._cells = tuple(types.CellType(cell.cell_contents) for cell in fn.__closure__ or ())
        self.fn = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, self._cells)
        self.fn.__qualname__, self.fn.__module__, self.fn.__doc__ = fn.__qualname__, fn.__module__, fn.__doc__

    @property
    def has_values(self) -> bool:
        """Whether there is anything to fill in."""
        return bool(self._cells or self.fn.__defaults__)

    def fill(self, fn: types.FunctionType) -> None:
        """Gives it the values of a function."""
        for mine, other in zip(self._cells, fn.__closure__ or (), strict=True):
            mine.cell_contents = other.cell_contents
        self.fn.__defaults__ = fn.__defaults__


@contextlib.contextmanager
def standing_in(stand_ins: Sequence[StandIn], functions: Sequence[types.FunctionType]) -> Iterator[None]:
    """Inside the block, stand-ins have the values of these functions; other threads wait for it."""
    with _state.LOCK:
        for stand_in, fn in zip(stand_ins, functions, strict=True):
            stand_in.fill(fn)
        yield
