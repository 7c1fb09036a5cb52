"""What may be asked of a hook besides its function: `jhop.hook(x, fn, zeros=..., stop=..., torch_complex=...)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop._append import class_name
from jhop._errors import HookError
from jhop._leaves import declare_state
from jhop._source import describe_hook


class HookOptions(NamedTuple):
    """Options of a hook.

    Attributes:
        zeros: what it is given for a leaf without gradient: "materialize" (zeros) or "none"; with "skip" it does not
            run then.
        stop: whether what it returns has no history under a further derivative.
        torch_complex: whether it gets and returns gradients in PyTorch's convention, the conjugates of JAX's.
        extra: how many of its last values are no gradients that anybody asks for, but shown to it.
        around: whether it is on what one function takes or returns (`jhop.hook_fn`), so that other uses of these values
            are as meant.
    """

    zeros: str = "materialize"
    stop: bool = False
    torch_complex: bool = False
    extra: int = 0
    around: bool = False


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


class MayTakeNone:
    """A hook of jhop's own that may be there also for values without gradient."""

    __slots__ = ()
    takes_none: bool


def takes_none(fn: Any) -> bool:
    """Whether a hook is called with None where nothing reaches its Tensor but its node runs."""
    return isinstance(fn, MayTakeNone) and fn.takes_none


class Adapted(MayTakeNone):
    """A hook that was written for PyTorch, as one of JAX's convention.

    Args:
        fn: the hook: on gradients, or on tuples or other pytrees of them.
        torch_complex: whether gradients are conjugated for it, and what it returns is conjugated back.
        takes_none: see `takes_none`.
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


def adapted(where: str, fn: Any, zeros: str, torch_complex: bool) -> Any:
    """A Tensor's hook with options.

    Raises:
        HookError: the hook is not callable, or an option is something else; `where` says whose.
    """
    checked_options(where, ("skip", "none"), zeros=zeros, torch_complex=torch_complex)
    if not callable(fn):
        raise HookError(f"{where}: expected a callable hook, got {type(fn).__name__} ({fn!r}).")
    return Adapted(fn, torch_complex=torch_complex, takes_none=zeros == "none")


def call_with_none(fn: Any) -> None:
    """Calls a Tensor's hook where nothing reaches the Tensor.

    Raises:
        HookError: it returned something.
    """
    returned = fn(None)
    if returned is not None:
        raise HookError(
            f"{describe_hook(fn)} returned a {class_name(returned)} where it was given None: nothing flows there. "
            "Return None."
        )


def _conjugate(leaf: Any) -> Any:
    # What is no array is an error for whoever checks what the hook returned.
    is_complex = jnp.issubdtype(getattr(leaf, "dtype", float), jnp.complexfloating)
    return leaf.conj() if is_complex else leaf
