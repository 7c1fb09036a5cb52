"""Static arguments: Python values that a traced function is specialised on."""

from __future__ import annotations

from typing import Any


class Static:
    """A static argument as a cache key: by type and value, or by identity where it cannot be hashed."""

    __slots__ = ("_hash", "key", "value")

    def __init__(self, value: Any):
        self.value = value
        if isinstance(value, slice):  # hashable only from Python 3.12
            self.key: Any = (slice, value.start, value.stop, value.step)
        else:
            self.key = (type(value), value)
        try:
            self._hash = hash(self.key)
        except TypeError:
            self.key = (type(value), id(value))
            self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key
