"""Every `jax.numpy` function, accepting Tensors.

A name is looked up in `jax.numpy` and lifted on first use; what is no function there (dtypes, constants) is the same
object here. With no Tensor among its arguments a function is `jax.numpy`'s own.

Example:
    >>> import jhop, jhop.numpy as jnp
    >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
    >>> jnp.sin(x).sum().backward()
    >>> [round(g, 3) for g in x.grad.tolist()]
    [0.54, -0.416]
"""

from __future__ import annotations

from typing import Any

import jax.numpy as _jnp

from jhop._lift import lift as _lift


def __getattr__(name: str) -> Any:
    try:
        found = getattr(_jnp, name)
    except AttributeError:
        raise AttributeError(f"jhop.numpy has no attribute {name!r}, because jax.numpy has none.") from None
    if callable(found) and not isinstance(found, type) and not hasattr(found, "dtype"):
        found = _lift(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(dir(_jnp)))
