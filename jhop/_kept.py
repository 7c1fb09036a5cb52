"""What nodes keep for their backward, as `autograd.saved_tensors_hooks` would have it kept."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._errors import HookError
from jhop._source import describe_hook


class Hooks(NamedTuple):
    """How arrays are kept: `pack(array) -> anything`, and `unpack` makes the array of that again."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


class _Context(threading.local):
    hooks: Hooks | None = None  # of this thread; the innermost block's


context = _Context()


@contextlib.contextmanager
def keeping(hooks: Hooks | None) -> Iterator[None]:
    """Inside the block, nodes of this thread keep arrays with these hooks; None for as they are."""
    before, context.hooks = context.hooks, hooks
    try:
        yield
    finally:
        context.hooks = before


class Kept:
    """Values of which the arrays are packed.

    Args:
        hooks: how.
        values: arrays and numbers.
        known: by id, what was packed before and is shared; by default, each place is packed.

    Attributes:
        avals: the values' avals.
    """

    __slots__ = ("_hooks", "_items", "avals")

    def __init__(self, hooks: Hooks, values: list[Any], known: dict[int, Any] | None = None):
        self._hooks = hooks
        self.avals = tuple(map(jax.typeof, values))
        with keeping(None):  # what `pack` itself records is not packed
            self._items = [self._pack(value, known) for value in values]

    def _pack(self, value: Any, known: dict[int, Any] | None) -> tuple[bool, Any]:
        if not isinstance(value, (jax.Array, np.ndarray)):
            return False, value
        if known is None or id(value) not in known:
            packed = self._hooks.pack(jnp.asarray(value))
            if known is None:
                return True, packed
            known[id(value)] = packed
        return True, known[id(value)]

    def values(self) -> list[Any]:
        """The values, each array unpacked.

        Raises:
            HookError: `unpack` gave something that is not like what was packed.
        """
        pairs = zip(self._items, self.avals, strict=True)
        return [self._unpack(item, aval) if packed else item for (packed, item), aval in pairs]

    def _unpack(self, item: Any, aval: Any) -> Any:
        found = self._hooks.unpack(item)
        found = getattr(found, "__jhop_array__", found)  # a Tensor counts as its array
        if not isinstance(found, (jax.Array, np.ndarray)) or (found.shape, found.dtype) != (aval.shape, aval.dtype):
            told = f"shape {found.shape} and dtype {found.dtype}" if hasattr(found, "dtype") else type(found).__name__
            raise HookError(
                f"autograd.saved_tensors_hooks: unpack {describe_hook(self._hooks.unpack)} must return an array of "
                f"shape {aval.shape} and dtype {aval.dtype}, as was packed, but returned {told}."
            )
        return _compat.with_weak_type(jnp.asarray(found), aval.weak_type)


def keep(values: list[Any], known: dict[int, Any]) -> list[Any] | Kept:
    """What a node keeps of its values; `known` has, by id, what was packed before and is shared."""
    return values if context.hooks is None else Kept(context.hooks, values, known)


def values_of(kept: list[Any] | Kept) -> list[Any]:
    """The values that a node kept."""
    return kept.values() if type(kept) is Kept else kept  # type: ignore[return-value]
