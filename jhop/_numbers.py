"""Python floats as arrays: a constant of the program is sent to the device once, and not at each operation."""

from __future__ import annotations

from typing import Any

import jax

from jhop import _compat
from jhop._node import ARRAY

_MOST = 256  # numbers that are kept; those which change all the time must not fill the memory


class _Known:
    """Numbers that came before, and arrays for those that came again, all in one context of JAX's (x64, device ...)."""

    __slots__ = ("arrays", "context", "seen")

    def __init__(self, context: Any):
        self.context = context
        self.arrays: dict[float, Any] = {}
        self.seen: set[float] = set()


_known = _Known(None)


def on_device(values: list[Any]) -> list[Any]:
    """Values for a function under `jax.jit`: a float that came before is an array of its type, which is there already.

    Args:
        values: arrays and numbers. Beside an array that is committed to a device all stay what they are: numbers may
            be on another.
    """
    global _known
    known, context = _known, _compat.trace_context()
    if known.context != context:
        known = _known = _Known(context)
    arrays, found = known.arrays, []
    for value in values:
        cls = type(value)
        if cls is float:
            array = arrays.get(value)
            found.append(_add(known, value) if array is None else array)
        elif cls is ARRAY and not value.committed:
            found.append(value)
        else:
            return values
    return found


def _add(known: _Known, value: float) -> Any:
    """What stands for a number that has no array yet: from the second time on, that is an array."""
    if value == 0.0 or _compat.staging() is not None:  # there are two zeros, which are equal; a trace has no arrays
        return value
    if value not in known.seen:
        if len(known.seen) >= _MOST:
            known.seen.clear()
        known.seen.add(value)
        return value
    if len(known.arrays) >= _MOST:
        known.arrays.clear()
    found = known.arrays[value] = jax.device_put(value)
    return found


def reset_numbers() -> None:
    """Forgets all numbers."""
    global _known
    _known = _Known(None)
