"""Functions on the tape, by the names that PyTorch has for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jhop import _engine
from jhop._errors import JhopError
from jhop._node import set_grad_enabled
from jhop._tensor import Tensor


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside the block, operations on Tensors of this thread are not recorded.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(1.0, requires_grad=True)
        >>> with jhop.autograd.no_grad():
        ...     y = x * 2.0
        >>> y.requires_grad
        False
    """
    with _recording(False):
        yield


@contextlib.contextmanager
def enable_grad() -> Iterator[None]:
    """Inside the block, operations on Tensors of this thread are recorded, also inside `no_grad`.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(1.0, requires_grad=True)
        >>> with jhop.autograd.no_grad(), jhop.autograd.enable_grad():
        ...     y = x * 2.0
        >>> y.requires_grad
        True
    """
    with _recording(True):
        yield


@contextlib.contextmanager
def _recording(enabled: bool) -> Iterator[None]:
    before = set_grad_enabled(enabled)
    try:
        yield
    finally:
        set_grad_enabled(before)


def backward(tensors: Tensor | Sequence[Tensor], gradients: Any = None, *, retain_graph: bool = False) -> None:
    """Runs one backward pass from several Tensors; a Tensor that is given twice counts twice.

    Args:
        tensors: where to start.
        gradients: per Tensor, its cotangent (same shape and dtype), or None for scalars.
        retain_graph: keep what was saved, so that backward can run again.

    Raises:
        JhopError: as for `Tensor.backward`, or another number of gradients than of Tensors.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(3.0, requires_grad=True)
        >>> jhop.autograd.backward([x * x, x * 5.0])
        >>> float(x.grad)
        11.0

    The counterpart in PyTorch is `torch.autograd.backward`.
    """
    roots = [tensors] if isinstance(tensors, Tensor) else tensors
    given = [gradients] if isinstance(tensors, Tensor) and not isinstance(gradients, (list, tuple)) else gradients
    if not isinstance(roots, (list, tuple)) or not all(isinstance(root, Tensor) for root in roots):
        raise JhopError(f"autograd.backward: expected Tensors to start from (one, or a list), got {tensors!r}.")
    given = [None] * len(roots) if given is None else given
    if not isinstance(given, (list, tuple)) or len(given) != len(roots):
        raise JhopError(
            "autograd.backward: expected one gradient (or None) for each Tensor, got "
            f"{len(roots)} and {len(given) if isinstance(given, (list, tuple)) else given!r}."
        )
    seeds = [(root._edge("autograd.backward"), root._seed(ct)) for root, ct in zip(roots, given, strict=True)]
    _engine.backward(seeds, keep_graph=retain_graph)
