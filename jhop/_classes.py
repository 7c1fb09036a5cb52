"""Whose a class is: the user's, whose code a hook may run, or a library's, whose state hooks do not read."""

from __future__ import annotations

import array
import contextvars
import ctypes
import functools
import inspect
import io
import sys
import types
from typing import Any

from jhop._source import is_user_file, layers

OPAQUE_ROOTS = {"jax", "jaxlib", "numpy", "ml_dtypes"}


def module_of(cls: type) -> str:
    """The name of the module that a class says it is from; "" where it says none, as that of Cython's functions."""
    module = cls.__module__
    return module if isinstance(module, str) else ""


def generated_code(cls: type, name: str) -> list[types.CodeType]:
    """The code in a method of which `dataclass` made it, out of the fields; it may be in a wrapper."""
    if "__dataclass_fields__" not in cls.__dict__:
        return []
    codes = [layer.__code__ for layer in layers(cls.__dict__[name]) if isinstance(layer, types.FunctionType)]
    return [code for code in codes if code.co_filename == "<string>"]


def is_opaque(cls: type) -> bool:
    """Whether a class is JAX's, NumPy's or jhop's own."""
    root = module_of(cls).split(".")[0]
    if root in OPAQUE_ROOTS:
        return True
    module = sys.modules.get(module_of(cls))
    if root != "jhop" or is_user_file(getattr(module, "__file__", None) or ""):
        return False
    # A class may say that it is from a module of ours without being in it: one made in a doctest does.
    found: Any = module
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def is_user_class(cls: type) -> bool:
    """Classes whose code a hook may run: written in Python by someone other than JAX, NumPy, jhop and the stdlib."""
    if is_opaque(cls) or module_of(cls) == "builtins":
        return False
    functions = [value for value in cls.__dict__.values() if isinstance(value, types.FunctionType)]
    if any(is_user_file(fn.__code__.co_filename) for fn in functions):
        return True
    filename = getattr(sys.modules.get(module_of(cls)), "__file__", None)
    return filename is None or is_user_file(filename) or module_of(cls).split(".")[0] == "jhop"


def keeps_all_in_attributes(cls: type) -> bool:
    """Whether all that an instance holds is in its attributes: it derives from no class that makes its own in C."""
    makers = (base.__dict__.get("__new__") for base in cls.__mro__[:-1])
    return cls is types.SimpleNamespace or not any(isinstance(maker, types.BuiltinFunctionType) for maker in makers)


_UNLIFTABLE = (
    bytearray, memoryview, array.array, functools._lru_cache_wrapper, contextvars.ContextVar, ctypes._SimpleCData,
    ctypes.Structure, ctypes.Array,
)  # fmt: skip
_LOCKS = {"_thread", "threading", "queue", "_queue", "multiprocessing"}
_NO_LOCKS = {"_local", "local", "Thread", "_MainThread"}


def why_not_lifted(cls: type) -> str | None:
    """Why the state of an instance cannot be lifted, and what to do; None where it can, or has none."""
    if cls.__dictoffset__ and isinstance(inspect.getattr_static(cls, "__dict__", None), property):
        return ": its class makes `__dict__` a property, which hides its attributes. Give the property another name"
    if issubclass(cls, io.IOBase):
        return ": reading and writing a file happens outside of the graph, once. Use `jax.debug.callback`"
    if hasattr(cls, "__next__"):
        return ": an iterator keeps a position that cannot be lifted into a graph. Keep a counter and index with it"
    if issubclass(cls, _UNLIFTABLE):
        return ", whose contents cannot be lifted into a graph. Use a list or an array"
    if module_of(cls).partition(".")[0] in _LOCKS and cls.__qualname__ not in _NO_LOCKS:
        return ": it would be asked once, when the hook is traced. Lock around the call of the compiled function"
    return None
