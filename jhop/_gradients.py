"""What hooks of a captured backward pass may do with `.grad`: the pass writes gradients when it has run, not before."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from jhop._errors import JhopError


class GradientTooEarly(JhopError):
    """A hook of a captured pass uses a gradient that the pass writes."""

    def __init__(self, how: str):
        super().__init__(
            f"compiled_autograd: a hook {how} the .grad of a Tensor whose gradient the same backward pass computes. A "
            "captured pass writes gradients when it has run. Do it in a post-accumulate hook of that Tensor, or after "
            "backward(), for instance by jhop.autograd.queue_callback; or run this pass outside of "
            "compiled_autograd.enable."
        )


class _Running(threading.local):
    owners: frozenset[int] = frozenset()  # ids of Tensors of which captured passes of this thread write the gradient
    used: Any = None  # notes of the innermost of these passes
    own: Any = None  # the leaf of the post-accumulate hook that is running in it


_running = _Running()


class Used:
    """Tensors of which hooks of a captured pass used the gradient, when they were traced.

    They are not traced again where the capture serves another tape: the gradient is state of theirs like any other.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[Any]] = {}

    def note(self, tensor: Any) -> None:
        """Notes a Tensor."""
        self._tensors[id(tensor)] = weakref.ref(tensor)

    def any_of(self, tensors: Iterable[Any]) -> bool:
        """Whether one of these is among them."""
        known = self._tensors
        return bool(known) and any(id(t) in known and known[id(t)]() is t for t in tensors)


def use(tensor: Any, how: str) -> None:
    """To be called before the gradient of a Tensor is read or written by others than the engine.

    Raises:
        GradientTooEarly: a captured pass is running that will write it.
    """
    if _running.used is not None and tensor is not _running.own:
        if id(tensor) in _running.owners:
            raise GradientTooEarly(how)
        _running.used.note(tensor)


@contextlib.contextmanager
def to_come(tensors: Iterable[Any], used: Used) -> Iterator[None]:
    """Inside the block, a captured pass runs that will write the gradients of these Tensors.

    Raises:
        GradientTooEarly: a hook of another captured pass that will write one of them runs this one.
    """
    before = _running.owners, _running.used, _running.own
    owners = frozenset(map(id, tensors))
    if owners & before[0] - {id(before[2])}:
        raise GradientTooEarly("runs a backward pass that writes")
    _running.owners, _running.used, _running.own = before[0] | owners, used, None
    try:
        yield
    finally:
        _running.owners, _running.used, _running.own = before


@contextlib.contextmanager
def there(tensor: Any) -> Iterator[None]:
    """Inside the block, a hook runs that may use the gradient of this Tensor."""
    before, _running.own = _running.own, tensor
    try:
        yield
    finally:
        _running.own = before
