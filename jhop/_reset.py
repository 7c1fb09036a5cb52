"""`jhop.reset`: one place that knows every cache."""

from __future__ import annotations

from jhop import _logs, compiled_autograd
from jhop._compile import reset_compiled
from jhop._forward import reset_functions
from jhop._jit import reset_jitted
from jhop._lift import reset_ops


def reset() -> None:
    """Drops everything that was captured, traced or compiled, and every guard. Tensors, hooks and state stay.

    Example:
        >>> import jhop
        >>> jhop.reset()
    """
    compiled_autograd.reset()
    reset_compiled()
    reset_functions()
    reset_jitted()
    reset_ops()
    _logs.forget()
