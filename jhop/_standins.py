"""Hooks that are made anew at each pass: functions of the same code, with other values closed over.

A captured pass is for one structure of the tape, and what hooks close over is no part of it. So it is captured with
stand-ins for them: functions of the same code with cells of their own, which get the values of the present hooks before
each run. The values are inputs of the graph then, as other state of hooks is.

That is done for functions which cannot be told from their stand-ins: they write to no variable outside, and close over
plain values only. Other hooks are a part of the structure, by identity.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jhop import _state
from jhop._node import ARRAY

_PLAIN = frozenset({int, float, bool, complex, str, bytes, type(None), ARRAY})


def replaceable(fn: Any) -> bool:
    """Whether a hook may have a stand-in."""
    if type(fn) is not types.FunctionType or fn.__kwdefaults__ or fn.__dict__ or _writes(fn.__code__):
        return False
    try:
        values = [cell.cell_contents for cell in fn.__closure__ or ()]
    except ValueError:  # a cell that is empty
        return False
    return all(map(_is_plain, values)) and all(map(_is_plain, fn.__defaults__ or ()))


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, np.generic)


@functools.lru_cache(maxsize=1024)
def _writes(code: types.CodeType) -> bool:
    """Whether code, or code in it, writes to variables of the functions around it."""
    own = any(
        instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars
        for instruction in dis.get_instructions(code)
    )
    return own or any(_writes(const) for const in code.co_consts if isinstance(const, types.CodeType))


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
