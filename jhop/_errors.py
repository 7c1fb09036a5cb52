"""The exceptions that users of jhop catch, and what they advise where nothing else helps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


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
        hooks: otherwise those that share in it, where that is known: they write state in one loop or branch.

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
    hooks: tuple[object, ...] = ()


def let_go_of_frames(error: BaseException | None) -> None:
    """Makes an error that is kept, and those that led to it, keep no frame of a trace alive, nor the tracers in it."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


FULLGRAPH = "pass `fullgraph=False`, which runs this hook on the host each time"
TO_JIT = "compile with `jhop.jit`, which runs this hook on the host each time"
AHEAD = "call the function, not ahead of time, with `fullgraph=False`, which runs this hook on the host each time"


class _Advice(threading.local):
    text: str | None = None


_advice = _Advice()


def last_resort() -> str:
    """What to do about a hook that cannot be traced, for after "or"."""
    return _advice.text or FULLGRAPH


@contextlib.contextmanager
def advising(text: str) -> Iterator[None]:
    """Has errors advise what fits the function that the user called: the outermost one."""
    before = _advice.text
    _advice.text = before or text
    try:
        yield
    finally:
        _advice.text = before
