"""What one watch of a hook knows, how it refuses a call and how it records an operator. See `_effects`."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jhop import _banned, _compat, _reads
from jhop._errors import Unsupported, last_resort
from jhop._source import FileKind, describe_hook, file_kind, origin_of

monitoring: Any = getattr(sys, "monitoring", None)  # Python 3.12 and later

USER, STDLIB, JHOP = FileKind.USER, FileKind.STDLIB, FileKind.JHOP  # enum members are slow to look up


class OperatorRecord(NamedTuple):
    """One Python operator that user code applied to a tracer."""

    name: str  # as in the method's name: "mul", "rmul", "neg", "getitem"
    operands: tuple[Any, ...]  # the tracer whose method ran, then the rest as Python had them: `3` stays an int
    result: Any
    code: types.CodeType  # the user's code and
    lasti: int  # the byte offset in it of the operator's instruction


_record = functools.partial(tuple.__new__, OperatorRecord)  # with no Python code of its own, which would be watched


class Watch:
    """What `watch` saw: `operators`, in order. Holds tracers, so do not keep it longer than the trace."""

    def __init__(self, hook: Any, trace: Any):
        self.hook = hook
        self.trace = trace
        self.operators: list[OperatorRecord] = []
        self.staging, self.nested = _compat.staging(), False  # nested: a transformation in the hook traced user code
        self.jitted: dict[int, Any] = {}  # functions that may be called, by id
        self.error: Unsupported | None = None
        self.caught: BaseException | None = None  # that a value was read, which the hook caught
        self.imports = _banned.count_imports(sys._getframe())


class _Thread(threading.local):
    current: Watch | None = None
    profiler: Callable[..., None] | None = None  # the profile function of the current watch, on Python 3.11


thread = _Thread()


# Refusing a call

def message(label: str, hook: Any, place: str) -> str:
    """What `Unsupported` says of a call of `label` at `place`, which is empty where the hook is the callee itself."""
    remedies = [each for each in (_banned.remedy_for(label), last_resort()) if each]
    return (
        f"cannot trace a call to `{label}` in {describe_hook(hook)}\n{place}"
        f"The backward is traced once and replayed, so `{label}` would run once, at trace time, and never again.\n"
        f"Instead, {'; or '.join(remedies)}."
    )


def refuse(label: str | None, frame: types.FrameType | None) -> None:
    """Raises `Unsupported` if the call of `label`, found in `frame`, is user code's."""
    user, seen = _banned.blamed_frame(frame), thread.current
    if label is None or seen is None or user is None or (label in _banned.BUFFER_WRITES and user is not frame):
        return
    if _banned.count_imports(user) > seen.imports:
        return  # in a module that the hook imports, which is run but once in any case
    where = origin_of(user.f_code, user.f_lasti)
    place = f'  File "{where.file}", line {where.line}, in {where.function}\n    {where.text}\n'
    error = Unsupported(message(label, seen.hook, place))
    seen.error = seen.error or error
    try:
        raise error
    finally:
        del error  # else this frame and the error hold each other, and the tracers in its traceback


def refusing(label: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A banned function as one that C code may call, which nobody sees: for user code it is refused."""

    def call(*args: Any) -> Any:
        refuse(label, sys._getframe(1))
        return fn(*args)

    return call


def refuse_text(frame: types.FrameType | None) -> None:
    """Raises `Unsupported` if user code makes text of a tracer in a call that `frame` makes."""
    seen = thread.current
    error = None if seen is None else _reads.text_read(frame, seen.hook)
    if seen is not None and error is not None:
        seen.error = seen.error or error
        try:
            raise error
        finally:
            del error


def check_python_call(frame: types.FrameType) -> None:
    """Refuses the function that `frame` has just entered, if it is one of the standard library's banned ones."""
    code, caller = frame.f_code, frame.f_back
    if id(code) in _banned.ENVIRON_CODES:  # `os.environ[name]` makes no call that could be seen
        refuse("os.environ", caller)
    elif caller is not None and file_kind(caller.f_code.co_filename) is USER:
        refuse(_banned.label_of_name(frame.f_globals.get("__name__", ""), code.co_qualname), caller)


# Operators: all of them are one function of JAX, `def op(self, *args)`, that closes over `name`


def _find_operator_code() -> types.CodeType | None:
    mul: Any = getattr(getattr(jax.core.Tracer, "__mul__", None), "__code__", None)
    neg: Any = getattr(getattr(jax.core.Tracer, "__neg__", None), "__code__", None)
    if mul is None or mul is not neg or mul.co_freevars != ("name",) or mul.co_varnames[:2] != ("self", "args"):
        return None
    return mul


OPERATOR_CODE = _find_operator_code()  # None where JAX differs: then nothing is recorded


def record_operator(frame: types.FrameType, result: Any) -> None:
    """Records that the operator which runs in `frame` returned `result`, if user code applied it."""
    seen = thread.current
    if seen is None or result is NotImplemented or (seen.trace and not _compat.is_of(result, seen.trace)):
        return
    caller = frame.f_back
    while caller is not None:
        kind = file_kind(caller.f_code.co_filename)
        if kind is USER:
            local = frame.f_locals
            operands = (local["self"], *local["args"])
            seen.operators.append(_record((local["name"], operands, result, caller.f_code, caller.f_lasti)))
            return
        if kind is not STDLIB and kind is not JHOP:
            return
        caller = caller.f_back


def take_tool() -> int | None:
    """Registers a tool of `sys.monitoring` and returns its number; None where others have them all."""
    for tool in (4, 3, 5, 2, 1, 0):  # 3 and 4 have no set purpose
        with contextlib.suppress(ValueError):  # taken
            monitoring.use_tool_id(tool, "jhop")
            return tool
    return None
