"""The exceptions that users of jhop catch."""

from __future__ import annotations


class JhopError(Exception):
    """Base class of every error that jhop raises on its own account."""


class HookError(JhopError, TypeError):
    """A hook broke its contract: it must be callable, and keep the shape and dtype of its cotangent.

    Wrong:

        x = jhop.hook(x, lambda ct: ct.sum())       # f32[3] in, f32[] out

    Right:

        x = jhop.hook(x, lambda ct: ct / ct.size)   # same shape, same dtype
        x = jhop.hook(x, lambda ct: None)           # None keeps the cotangent
    """


class Unsupported(JhopError):
    """A hook does something that cannot be part of one traced graph.

    Raised before anything was printed, written or assigned. The message names the call, the hook and its
    source line, and what to use instead.

    Attributes:
        hook: the callable, where it is known which one it is.

    Example:
        >>> import jax, jhop
        >>> grad = jhop.jit(jax.grad(lambda x: jhop.hook(x, print) * 3.0), fullgraph=True)
        >>> try:
        ...     grad(2.0)
        ... except jhop.Unsupported as error:
        ...     print("print" in str(error))
        True
    """

    hook: object = None
