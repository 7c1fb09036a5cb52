"""What leaves the tape: a Tensor's type, and itself as NumPy array, Python number or list; what may have a gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._append import class_name
from jhop._errors import JhopError


class Values:
    """The plain values of a Tensor, where they cost no gradient without a word."""

    __slots__ = ()

    _value: Any
    _requires_grad: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self._value.shape

    @property
    def dtype(self) -> Any:
        return self._value.dtype

    @property
    def ndim(self) -> int:
        return self._value.ndim

    @property
    def size(self) -> int:
        return self._value.size

    def _plain(self, what: str) -> Any:
        if self._requires_grad:
            raise JhopError(
                f"{what} on a Tensor that requires grad would lose its gradient without a word. Use jhop.numpy (or "
                "jhop.lift(fn)) in place of jax.numpy, or .value or .detach() if no gradient is wanted."
            )
        return self._value

    @property
    def __jax_array__(self) -> Any:
        # JAX asks whether this exists before it takes an unknown object for an array; an operator (`array * tensor`)
        # asks too, and comes to our reflected method when it does not.
        if _compat.asked_by_operator():
            raise AttributeError("__jax_array__")
        raise JhopError(
            "A jax.numpy or other JAX function was given a jhop.Tensor, which would lose its gradient without a word. "
            "Use jhop.numpy (or jhop.lift(fn)) in place of jax.numpy, or .value if no gradient is wanted."
        )

    @property
    def __jhop_array__(self) -> Any:
        """What a hook that returns a Tensor returns."""
        return self._value

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self._plain("numpy.asarray"), dtype=dtype)

    def numpy(self) -> np.ndarray:
        """The value as a NumPy array."""
        return np.asarray(self._plain("Tensor.numpy()"))

    def item(self) -> Any:
        """The value of a one-element Tensor as a Python number."""
        return self._value.item()

    def tolist(self) -> Any:
        return self._value.tolist()

    def __float__(self) -> float:
        return float(self._value)

    def __int__(self) -> int:
        return int(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __len__(self) -> int:
        return len(self._value)


def array_of(given: Any, expected: str) -> Any:
    """The array that was given, or that of a Tensor.

    Raises:
        JhopError: it is something else; `expected` says what was.
    """
    array = given.value if isinstance(given, Values) else given  # type: ignore[attr-defined]
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise JhopError(f"{expected}, got {class_name(given)}.")
    return array


def check_like(array: Any, like: Any, where: str) -> None:
    """Raises JhopError for an array of another shape or dtype than a Tensor has."""
    if array.shape != like.shape or array.dtype != like.dtype:
        raise JhopError(
            f"{where}: expected shape {like.shape} and dtype {like.dtype}, as the Tensor has, "
            f"got shape {array.shape} and dtype {array.dtype}."
        )


def check_floating(dtype: Any, where: str) -> None:
    """Raises JhopError for dtypes that have no gradients."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise JhopError(f"{where}: only floating and complex values can require grad, got dtype {dtype}.")
