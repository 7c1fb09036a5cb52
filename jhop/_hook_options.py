"""What may be asked of a hook besides its function: `jhop.hook(x, fn, zeros=..., stop=..., torch_complex=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop._errors import HookError
from jhop._leaves import declare_state


class HookOptions(NamedTuple):
    """Options of a hook.

    Attributes:
        zeros: what it is given for a leaf without gradient: "materialize" (zeros) or "none"; with "skip" it does not
            run then.
        stop: whether what it returns has no history under a further derivative.
        torch_complex: whether it gets and returns gradients in PyTorch's convention, the conjugates of JAX's.
        extra: how many of its last values are no gradients that anybody asks for, but shown to it.
    """

    zeros: str = "materialize"
    stop: bool = False
    torch_complex: bool = False
    extra: int = 0


PLAIN = HookOptions()


def checked_options(where: str, choices: tuple[str, ...] = (), **given: Any) -> HookOptions:
    """Options as a user gave them.

    Args:
        where: the function that they were given to, for messages.
        choices: what `zeros` may be.

    Raises:
        HookError: one of them is something else.
    """
    for name, value in given.items():
        if name == "zeros" and not (isinstance(value, str) and value in choices):
            raise HookError(f"{where}: expected zeros to be one of {', '.join(map(repr, choices))}, got {value!r}.")
        if name != "zeros" and not isinstance(value, bool):
            raise HookError(f"{where}: expected {name} to be True or False, got {value!r}.")
    return HookOptions(**given)


class Adapted:
    """A hook that was written for PyTorch, as one of JAX's convention.

    Args:
        fn: the hook: on gradients, or on tuples or other pytrees of them.
        torch_complex: whether gradients are conjugated for it, and what it returns is conjugated back.
        takes_none: whether it is called with None where nothing reaches its Tensor but its node runs.
    """

    __slots__ = ("__wrapped__", "takes_none", "torch_complex")

    def __init__(self, fn: Callable[..., Any], *, torch_complex: bool = False, takes_none: bool = False):
        self.__wrapped__ = fn
        self.torch_complex = torch_complex
        self.takes_none = takes_none

    def __call__(self, *cts: Any) -> Any:
        if not self.torch_complex:
            return self.__wrapped__(*cts)
        return jax.tree.map(_conjugate, self.__wrapped__(*jax.tree.map(_conjugate, cts)))


declare_state(Adapted, "__wrapped__")


def _conjugate(leaf: Any) -> Any:
    # What is no array is an error for whoever checks what the hook returned.
    is_complex = jnp.issubdtype(getattr(leaf, "dtype", float), jnp.complexfloating)
    return leaf.conj() if is_complex else leaf
