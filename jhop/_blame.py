"""What to call the equation that made a NaN, and where it stands: for `jhop.nan_guard` and `detect_anomaly`."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from jhop._contract import HookFn
from jhop._source import Origin, describe_hook


def what(eqn: Any) -> str:
    """An equation in words: its primitive, or the hook that it stands for."""
    hook = eqn.params.get("fn")
    return describe_hook(hook.base) if isinstance(hook, HookFn) else f"`{eqn.primitive.name}`"


def where(origin: Any) -> str:
    """A place in the user's source, in brackets; "" if there is none."""
    if type(origin) is not Origin:
        return ""
    text = f": {origin.text}" if origin.text else ""
    return f" ({os.path.basename(origin.file)}:{origin.line}{text})"


def is_floating(value: Any) -> bool:
    """Whether a value may have NaN in it."""
    return value is not None and jnp.issubdtype(value.dtype, jnp.inexact)
