"""Every `jax.numpy` function, accepting Tensors.

A name is looked up in `jax.numpy` and lifted on first use; what is no function there (dtypes, constants) is the same
object here. With no Tensor among its arguments a function is `jax.numpy`'s own.

Example:
    >>> import jhop, jhop.numpy as jnp
    >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
    >>> jnp.sin(x).sum().backward()
    >>> print(x.grad)
    [ 0.5403023  -0.41614684]
"""

from __future__ import annotations

import types as _types
from typing import Any

import jax.numpy as _jnp

from jhop._lift import lift as _lift


def __getattr__(name: str) -> Any:
    found = globals()[name] = _lifted(_jnp, name)
    return found


def _lifted(module: Any, name: str) -> Any:
    try:
        found = getattr(module, name)
    except AttributeError:
        theirs = module.__name__
        ours = theirs.replace("jax", "jhop", 1)
        raise AttributeError(f"{ours} has no attribute {name!r}, because {theirs} has none.") from None
    if isinstance(found, _types.ModuleType):
        return _Lifted(found)
    if callable(found) and not isinstance(found, type) and not hasattr(found, "dtype"):
        return _lift(found)
    return found


class _Lifted:
    """A submodule of `jax.numpy` (`linalg`, `fft`), accepting Tensors."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = _lifted(self._module, name)
        return found

    def __dir__(self) -> list[str]:
        return dir(self._module)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(dir(_jnp)))
