"""Parts of a Tensor: `x[index]`, and `x.at[index]` for what differs there."""

from __future__ import annotations

from typing import Any

import numpy as np

from jhop import _asked, _compat
from jhop._lift import ARRAYS, apply
from jhop._static import Static
from jhop._tensor import Tensor


def _getitem(x: Any, index: Any) -> Any:
    _reach(x, index)
    return x[index]


def _reach(x: Any, index: Any) -> None:
    """Notes which places of `x` an index needs to be there."""
    items = [item for item in (index if isinstance(index, tuple) else (index,)) if item is not None]
    rest = [i for i, item in enumerate(items) if item is Ellipsis]
    for i, item in enumerate(items):
        axis = i - len(items) if rest and i > rest[0] else i
        if isinstance(item, (int, np.integer)) and not isinstance(item, bool) and -x.ndim <= axis < x.ndim:
            _asked.reach(x.shape[axis], int(item))


def _index(self: Tensor, index: Any) -> Any:
    return apply(_getitem, (self, _places(index)), {})


def _assign(self: Tensor, index: Any, value: Any) -> None:
    raise TypeError(
        "Tensor: values cannot be assigned to a part of a Tensor, as arrays are immutable. Write "
        "`x = x.at[index].set(values)`: the new Tensor has the gradient of both."
    )


def _places(index: Any) -> Any:
    """An index, with positions in place of masks."""
    items = index if isinstance(index, tuple) else (index,)
    items = tuple(part for item in items for part in _positions(item))
    return items if len(items) != 1 else items[0]


def _positions(item: Any) -> tuple[Any, ...]:
    """A mask as the positions of its true entries, one array per dimension: their number must be known."""
    mask = item._value if isinstance(item, Tensor) else item
    if isinstance(mask, ARRAYS) and mask.dtype == bool and np.ndim(mask) and not isinstance(mask, _compat.Tracer):
        return np.nonzero(np.asarray(mask))
    return (item,)


class _At:
    """`x.at[index].set(values)` and the like, as of a `jax.Array`: a new Tensor, with the gradient of both.

    The methods are those of `jax.numpy.ndarray.at`, with its options: `set`, `add`, `subtract`, `multiply`, `divide`,
    `power`, `min`, `max` and `get`. `index` is what JAX takes, or a mask whose values are known; `values` is a Tensor,
    an array or a number that broadcasts to the shape of `x[index]`. The result has the shape and dtype of `x`, that of
    `get` those of `x[index]`. `apply` has no derivative in JAX.

    Raises:
        Exception: JAX's own, for an index or values that do not fit.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> y = x.at[0].set(10.0)
        >>> (y * y).sum().backward()
        >>> x.grad.tolist()
        [0.0, 4.0, 6.0]
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def __getitem__(self, index: Any) -> _Places:
        return _Places(self._tensor, _places(index))


class _Places:
    """`x.at[index]`."""

    __slots__ = ("_index", "_tensor")

    def __init__(self, tensor: Tensor, index: Any):
        self._tensor = tensor
        self._index = index


def _update(name: str) -> Any:
    def call(x: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(fill := kwargs.get("fill_value"), Static):
            kwargs["fill_value"] = fill.value
        _reach(x, index)
        return getattr(x.at[index], name)(*args, **kwargs)

    def method(self: _Places, *args: Any, **kwargs: Any) -> Any:
        if isinstance(fill := kwargs.get("fill_value"), (float, complex)):
            kwargs["fill_value"] = Static(fill)  # which JAX needs to know, and `apply` would pass as an array
        return apply(call, (self._tensor, self._index, *args), kwargs)

    call.__name__ = f"at_{name}"
    method.__name__ = name
    return method


for _name in "add apply divide get max min mul multiply power set subtract".split():
    setattr(_Places, _name, _update(_name))


for _name, _member in {"__getitem__": _index, "__setitem__": _assign, "at": property(_At)}.items():
    setattr(Tensor, _name, _member)
