"""Values in a few words, for messages and reports. No code of the user's runs for it, and no device is waited for."""

from __future__ import annotations

import enum
import types
from typing import Any

import jax
import numpy as np

from jhop._container import MISSING
from jhop._source import hook_name

MAX_LENGTH = 60  # characters
_PLAIN = (str, bytes, complex, bool, int, float, type(None), type(Ellipsis), range)


def is_plain(value: Any) -> bool:
    """Whether a value is best shown as itself."""
    if type(value) is tuple:
        return all(type(item) in _PLAIN for item in value)
    return type(value) in _PLAIN or isinstance(value, (enum.Enum, np.generic, np.dtype))


def in_words(value: Any) -> str:
    """A value in a few words: numbers and text as such, of other things what they are."""
    if value is MISSING:
        return "nothing"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value._name_}"
    if is_plain(value):
        text = repr(value)
        return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."
    if isinstance(value, (jax.Array, np.ndarray)):
        return type_in_words(value)
    if isinstance(value, types.ModuleType):
        return f"module `{value.__name__}`"
    if isinstance(value, types.CodeType):
        return f"the code of `{value.co_qualname}`"
    if isinstance(value, type):
        return f"class `{value.__qualname__}`"
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return f"function `{hook_name(value)}`"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def type_in_words(value: Any) -> str:
    """The type of a lifted value: "int", "float", "float32[3]" or "numpy float32[3]"."""
    if isinstance(value, jax.Array):
        return str(jax.typeof(value).str_short())
    if isinstance(value, np.ndarray):
        return f"numpy {value.dtype}[{','.join(map(str, value.shape))}]"
    return "nothing" if value is MISSING else type(value).__name__
