"""Python 3.11 has no `sys.monitoring`: how `_effects` sees calls there, by a profile function on one thread."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jhop import _banned, _compat, _mentions, _reads
from jhop._source import file_kind
from jhop._watched import (
    JHOP,
    OPERATOR_CODE,
    STDLIB,
    USER,
    check_python_call,
    record_operator,
    refuse,
    refuse_text,
    thread,
)


@contextlib.contextmanager
def profiling() -> Iterator[None]:
    """Puts a profile function before the one there is, which goes on being called."""
    outer = thread.profiler
    old = getattr(outer, "before", None) if outer else sys.getprofile()
    pausable = None if old is None or callable(old) else old  # cProfile, which has no function to call
    if pausable is not None:
        pausable.disable()
    thread.profiler = _profiler(None if pausable is not None else old)
    sys.setprofile(thread.profiler)
    try:
        with _UNSEEN:
            yield
    finally:
        if outer is None and sys.gettrace() is _trace_nothing:  # a watch around this one still steps
            sys.settrace(None)
        thread.profiler = outer
        if pausable is not None:
            sys.setprofile(None)
            pausable.enable()
        else:
            # Python takes a profile function that raised away, so `sys.getprofile` does not tell what was there.
            sys.setprofile(outer or old)


class _Unseen:
    """While any thread watches, JAX puts in the equations of jitted functions unseen, `jnp.multiply` among them.

    That is nearly half of its calls and returns, and runs nothing of the user's: the equations are there already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches = 0
        self._rule: Callable[..., Any] | None = None  # JAX's own

    def __enter__(self) -> None:
        with self._lock:
            self._watches += 1
            rules, jit = _compat.staging_rules()
            if self._watches == 1 and jit in rules:
                self._rule, rules[jit] = rules[jit], functools.partial(_stage_unseen, rules[jit])

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._watches -= 1
            if self._watches == 0 and self._rule is not None:
                rules, jit = _compat.staging_rules()
                rules[jit], self._rule = self._rule, None


_UNSEEN = _Unseen()


def _stage_unseen(rule: Callable[..., Any], trace: Any, source: Any, *tracers: Any, **params: Any) -> Any:
    """JAX's `rule` for calls of jitted functions, run without the profile function where that has nothing to see."""
    profiler: Any = thread.profiler
    # A profiler that was there before is to see all. And Python takes a profile function that raised away.
    seen = profiler is None or profiler.before is not None or sys.getprofile() is not profiler
    if seen or not _only_puts_in(**params):
        return rule(trace, source, *tracers, **params)
    try:
        sys.setprofile(None)
        return rule(trace, source, *tracers, **params)
    finally:
        sys.setprofile(profiler)


def _only_puts_in(*, jaxpr: Any, inline: bool = False, **_: Any) -> bool:
    """Whether JAX adds the equations of a jitted function as they are, and asks no object of the user's about them:
    that may be an effect, or the type of a constant or (where the jaxpr is "high") of another value.
    """
    return inline and not jaxpr.effects and not jaxpr.consts and not getattr(jaxpr, "is_high", True)


# Files in which there is nothing to see while a library runs: JAX's own code makes nearly all calls and returns, and
# what it calls is its business. But code of JAX's is looked at where it is about to raise that a value was read.
_PASSED: set[str] = set()


def _profiler(before: Callable[..., Any] | None) -> Callable[..., None]:
    """Makes the profile function. It runs at each call and return of all code, so it does little for most of them."""
    c_names, text_code, nothing = _banned_c_names(), _reads.TEXT_CODE, frozenset[str]()
    reads: list[_Read] = []
    quiet = False  # in a library, until that returns or calls a function of the user's
    passed: set[str] | frozenset[str] = nothing  # files that are not looked at now
    top: types.FrameType | None = None  # the frame at whose return there is something to do
    outer: list[tuple[types.FrameType | None, bool]] = []  # `top` and `quiet` as they are from then on

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        nonlocal quiet, passed, top
        if event == "call":
            code = frame.f_code
            if code.co_filename in passed and code is not text_code:  # nearly always
                return
            within = _enter(frame, quiet, reads)
            if not quiet or not within:
                outer.append((top, quiet))
                top, quiet, passed = frame, within, _PASSED if within else nothing
        elif frame is top and event == "return":
            top, quiet = outer.pop()
            passed = _PASSED if quiet else nothing
            if arg is not None and frame.f_code is OPERATOR_CODE:
                record_operator(frame, arg)
            if reads and frame is reads[-1].entry:
                _leave(reads, arg)
        elif not quiet and event == "c_call":
            if arg.__name__ in c_names and (label := _banned.label_of(arg)) is not None:
                refuse(label, frame)

    def chained(frame: types.FrameType, event: str, arg: Any) -> None:
        before(frame, event, arg)  # type: ignore[misc]
        profile(frame, event, arg)

    made: Any = profile if before is None else chained
    made.before = before
    return made


class _Read(NamedTuple):
    """JAX is about to raise because a value was read."""

    entry: types.FrameType  # what user code called; None comes back from it if the error reaches user code
    error: BaseException


def _leave(reads: list[_Read], result: Any) -> None:
    """What user code called returns: did the error come out of it, and was not caught by JAX?"""
    error, seen = reads.pop().error, thread.current
    if result is None and seen is not None and seen.caught is None:
        seen.caught = error


def _enter(frame: types.FrameType, quiet: bool, reads: list[_Read]) -> bool:
    """Looks at a function that has just been entered.

    Args:
        quiet: whether a library has called it, maybe through the standard library.

    Returns:
        The same for what it calls itself.
    """
    code = frame.f_code
    kind = file_kind(code.co_filename)
    if code is _reads.TEXT_CODE:
        refuse_text(frame.f_back)
    if id(code) in _reads.ERROR_CODES:
        entry = frame
        while entry.f_back is not None and file_kind(entry.f_back.f_code.co_filename) is not USER:
            entry = entry.f_back
        if not reads or reads[-1].entry is not entry:
            reads.append(_Read(entry, frame.f_locals["self"]))
    if kind is USER:
        if (seen := thread.current) is not None:
            seen.nested = seen.nested or _banned.is_staged_within(frame, seen.staging)
        _step_if_needed(frame)
        return False
    if code.co_filename not in _reads.ERROR_FILES:
        _PASSED.add(code.co_filename)
    if kind is STDLIB and not quiet:
        check_python_call(frame)
    return quiet or (kind is not STDLIB and kind is not JHOP)


@functools.cache
def _banned_c_names() -> frozenset[str]:
    """Names of the C functions that may be banned: most calls are told apart by this alone."""
    names = {"print", "input", "open", "breakpoint", "start_new_thread", "warn", "warn_explicit"}
    names |= {"now", "today", "utcnow", "tofile", "dump", "dlopen", "LoadLibrary"}
    for module_name in "time posix nt _io _random _socket _ssl _sqlite3 _queue select mmap _posixsubprocess".split():
        with contextlib.suppress(ImportError):
            space = vars(importlib.import_module(module_name))
            names |= {name for name, value in space.items() if isinstance(value, types.BuiltinFunctionType)}
            for cls in (value for value in space.values() if isinstance(value, type)):
                names |= {name for name, value in vars(cls).items() if isinstance(value, types.MethodDescriptorType)}
    # A method of a common type is called too often to be looked into for the few others of its name.
    return frozenset(names - (set(dir(dict)) - vars(os).keys()) - set(dir(tuple)))


def _step_if_needed(frame: types.FrameType) -> None:
    """Has `frame` stepped through by instruction if what it calls may be hidden from the profile function."""
    free = sys.gettrace() in (None, _trace_nothing)
    if free and thread.current is not None and _mentions.mentions_banned(frame):
        sys.settrace(_trace_nothing)
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        frame.f_trace = _trace_instruction


def _trace_nothing(_frame: types.FrameType, _event: str, _arg: Any) -> None:
    """The trace function of the thread: without one, Python would not call those of frames."""


def _trace_instruction(frame: types.FrameType, event: str, _arg: Any) -> Any:
    if event == "opcode" and frame.f_lasti in _mentions.calls_in(frame.f_code):
        label = _mentions.label_in_call(frame, frame.f_lasti)
        if label is not None:
            refuse(label, frame)
    return _trace_instruction
