"""Hooks that a compiled function registers, with the values of the forward that they close over: those of one call."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from jhop._close import substituted
from jhop._hook_options import MayTakeNone, takes_none
from jhop._leaves import Leaf, declare_state
from jhop._node import Edge
from jhop._tensor import Tensor


class BoundHook(MayTakeNone):
    """A hook that closes over values of the forward that registered it.

    Args:
        fn: the hook.
        slots: where in it the values belong.
        values: arrays.
    """

    __slots__ = ("__weakref__", "__wrapped__", "_history", "slots", "values")

    def __init__(self, fn: Any, slots: tuple[Leaf, ...], values: list[Any]):
        self.__wrapped__ = fn
        self.slots = slots
        self.values = values
        self._history: list[Any] = [None] * len(slots)

    @property
    def takes_none(self) -> bool:  # type: ignore[override]
        return takes_none(self.__wrapped__)

    def remember(self, edges: Sequence[Edge | None]) -> None:
        """Says where on the tape the values came from, for hooks that are differentiated; keeps no graph alive."""
        self._history = [None if edge is None else (weakref.ref(edge.node), edge.slot) for edge in edges]

    def __call__(self, ct: Any) -> Any:
        recorded = isinstance(ct, Tensor)
        with substituted(self.slots, self.values), self._on_tape() if recorded else contextlib.nullcontext():
            return self.__wrapped__(ct)

    @contextlib.contextmanager
    def _on_tape(self) -> Iterator[None]:
        """While active, Tensors of the forward's trace are Tensors of the tape."""
        places = [(slot.container.obj, past) for slot, past in zip(self.slots, self._history, strict=True)]
        found = [(tensor, past) for tensor, past in places if isinstance(tensor, Tensor)]
        before = [(tensor, tensor._trace, tensor._node, tensor._slot, tensor._requires_grad) for tensor, _ in found]
        try:
            for tensor, past in found:
                node = past[0]() if past is not None else None
                tensor._trace, tensor._requires_grad = None, node is not None
                tensor._node, tensor._slot = (node, past[1]) if node is not None else (None, 0)
            yield
        finally:
            for tensor, *kept in before:
                tensor._trace, tensor._node, tensor._slot, tensor._requires_grad = kept


declare_state(BoundHook, "__wrapped__", "values")
