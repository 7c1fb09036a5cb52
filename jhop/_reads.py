"""Hooks that read values of arrays, which have none while a backward is traced: how that is told, and what is said.

JAX raises where a value is asked for. Two things get past that: a hook that catches the error, and would go on as it
never does on values; and text made of an array (`f"{g}"`), which would be that of a tracer.
"""

from __future__ import annotations

import dis
import re
import types
from typing import Any

import jax

from jhop import _banned, _compat
from jhop._errors import Unsupported, last_resort
from jhop._source import describe_hook, is_user_file, layers, origin_of, with_nested

NOT_TRACED = "While the backward is traced, arrays have no values."

VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_PLAIN = (TypeError, ValueError, IndexError, AttributeError)  # JAX says only in their text what is wrong
_OTHERS = (KeyError, StopIteration)  # Python's own, which JAX raises and catches all the time


def _code_of(cls: type, name: str) -> types.CodeType | None:
    return getattr(getattr(cls, name, None), "__code__", None)


_MADE = {_code_of(cls, "__init__") for cls in (*VALUE_ERRORS, jax.errors.TracerBoolConversionError)} - {None}
ERROR_CODES = {id(code): code for code in _MADE}  # by id: code objects are slow to hash
ERROR_FILES = frozenset(code.co_filename for code in _MADE if code is not None)
TEXT_CODE = _code_of(_compat.Tracer, "__repr__")


def is_read(error: BaseException) -> bool:
    """Whether an error says that a traced array has no value."""
    if type(error) in _OTHERS:
        return False
    if isinstance(error, VALUE_ERRORS):
        return True
    text = error.args[0] if type(error) in _PLAIN and error.args else None
    return isinstance(text, str) and ("Tracer" in text or "traced array" in text)


def explain(hook: Any, error: BaseException, *, caught: bool = False) -> str:
    """The message for an exception that left a hook while it was traced, or that the hook caught."""
    head = f"{describe_hook(hook)} cannot be traced"
    place = place_of(error)
    also = " and catches the error" if caught else ""
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            f"{head}: it branches on the value of an array{also}{place}. {NOT_TRACED} Use `jnp.where` or "
            f"`jax.lax.cond`, or {last_resort()}."
        )
    if is_read(error):
        return (
            f"{head}: it reads the value of an array{also}{place} (float(), int(), .item(), .tolist(), numpy, "
            f"text). {NOT_TRACED} Stay with jax.numpy, or {last_resort()}."
        )
    return f"{head}: it raised {type(error).__name__}: {error}{place}. Nothing was written."


def place_of(error: BaseException) -> str:
    """Where in the user's code an error was raised: file, line and text; "" if nowhere."""
    place, tb = "", error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if is_user_file(code.co_filename):
            place = _place(code, tb.tb_lasti)
        tb = tb.tb_next
    return place


def _place(code: types.CodeType, lasti: int) -> str:
    origin = origin_of(code, lasti)
    return f'\n  File "{origin.file}", line {origin.line}, in {origin.function}\n    {origin.text}\n'


def state_refused(hook: Any, message: str, path: str) -> Unsupported:
    """The error for state that cannot be lifted, with the line of the hook that names it, if there is one.

    Args:
        message: of "a hook".
        path: where the state is, as Python source.
    """
    fn = next((layer for layer in layers(hook) if isinstance(layer, types.FunctionType)), None)
    places = () if fn is None else (_named_in(fn.__code__, name) for name in _names(path, fn))
    place = next(filter(None, places), None)
    error = Unsupported(message.replace("a hook", describe_hook(hook), 1) + (place or "").rstrip())
    error.hook = hook
    return error


def _names(path: str, fn: types.FunctionType) -> list[str]:
    """The names by which a function may call what is at a path, the last in it first."""
    code = fn.__code__
    found = re.findall(r"__closure__\[(\d+)\]|__defaults__\[(\d+)\]|([A-Za-z_]\w*)", path)
    optional = code.co_varnames[code.co_argcount - len(fn.__defaults__ or ()) : code.co_argcount]
    names: list[str] = []
    for cell, default, name in found:  # of a cell or a default of another function, there may be none
        among, index = (code.co_freevars, cell) if cell else (optional, default)
        names += [name] if name else among[int(index) :][:1]
    return names[::-1]


def _named_in(code: types.CodeType, name: str) -> str | None:
    """The first place in a function, or one within it, that reads a name."""
    for each in with_nested([code]):
        for instruction in dis.get_instructions(each):
            value = instruction.argval
            named = value == name or (isinstance(value, tuple) and name in value)
            if named and instruction.opname.startswith("LOAD_"):
                return _place(each, instruction.offset)
    return None


def text_read(frame: types.FrameType | None, hook: Any) -> Unsupported | None:
    """The error for user code that makes text of a tracer, in a call that `frame` makes; None if it does not."""
    user = _banned.blamed_frame(frame)
    if user is None:
        return None
    return Unsupported(
        f"{describe_hook(hook)} cannot be traced: it makes text of an array (str(), repr(), f-strings)"
        f'{_place(user.f_code, user.f_lasti)}. {NOT_TRACED} Use `jax.debug.print("{{}}", x)`, or {last_resort()}.'
    )
