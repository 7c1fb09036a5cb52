"""What a hook may not call while it is traced, and a record of the Python operators it applies to tracers.

A backward pass is traced once and replayed. A call that does something outside the trace (prints, reads a clock, draws
a random number, opens a file) would happen once, at trace time, and never again. `watch` turns such a call, made by
user code, into `Unsupported` before it happens. User code makes a call if the innermost frame that is not of the
standard library is a user's: what JAX, NumPy or jhop call for their own ends, or an import runs, is their business.

Calls are seen through `sys.monitoring` where Python has it (3.12 and later): its events are set on user code as that
starts to run, and cost JAX's own code next to nothing. Python 3.11 has only `sys.setprofile`, which is slower, and
blind to a call made by a C function (`map(print, xs)`), through a C object (`partial(print)()`) or to a compiled
function of another kind (all of `numpy.random`). So a function that *mentions* something banned is stepped through by
instruction (`sys.settrace`).

What stays unseen:

- on 3.11, such a hidden call of something that the function never mentions (`self.callbacks["log"]()`, with a
  `partial(print)` in it), or while a debugger or coverage holds `sys.settrace`; profilers written in C see nothing of
  the watched stretch (cProfile is paused and goes on after it);
- on 3.12 and later, before it happens, a call `callbacks["log"](*xs)` whose text does not name what it calls: it is an
  error at the end of the watch only;
- everywhere, iteration over an open file, a banned function that C code gets other than as an argument of the call
  that runs it (`sorted(xs, **options)`), and calls in a frame that was running before the watch began.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jhop import _banned, _compat
from jhop._errors import Unsupported
from jhop._source import FileKind, describe_hook, file_kind, origin_of

_USER, _STDLIB, _JHOP = FileKind.USER, FileKind.STDLIB, FileKind.JHOP  # enum members are slow to look up


class OperatorRecord(NamedTuple):
    """One Python operator that user code applied to a tracer."""

    name: str  # as in the method's name: "mul", "rmul", "neg", "getitem"
    operands: tuple[Any, ...]  # the tracer whose method ran, then the rest as Python had them: `3` stays an int
    result: Any
    code: types.CodeType  # the user's code and
    lasti: int  # the byte offset in it of the operator's instruction


class Watch:
    """What `watch` saw: `operators`, in order. Holds tracers, so do not keep it longer than the trace."""

    def __init__(self, hook: Any, remedy: str | None, trace: Any):
        self.hook = hook
        self.remedy = remedy
        self.trace = trace
        self.operators: list[OperatorRecord] = []
        self.error: Unsupported | None = None
        self.imports = _banned.count_imports(sys._getframe())


class _Thread(threading.local):
    current: Watch | None = None
    profiler: Callable[..., None] | None = None  # the profile function of the current watch, on Python 3.11


_thread = _Thread()


@contextlib.contextmanager
def watch(hook: Any, *, remedy: str | None = None, trace: Any = None) -> Iterator[Watch]:
    """Refuses calls that cannot be replayed, and records operators, on this thread while the block runs.

    Watches nest; the innermost one gets the records and the errors. Frames that run already when the block is entered
    are not watched, so call the hook in it rather than write its body there.

    Args:
        hook: whom errors name.
        remedy: what errors recommend as the last resort; by default, `fullgraph=False`.
        trace: what `_compat.staging` gave, to record only operators on tracers of that trace.

    Raises:
        Unsupported: user code was about to make a banned call. Raised at the call, and again at the end of the block
            if the code caught it, or turned it into another error.
    """
    seen, outer = Watch(hook, remedy, trace), _thread.current
    if (label := _banned.label_of(hook)) is not None:  # a hook that is `print` itself is called by us, not by user code
        raise Unsupported(_message(label, hook, "", remedy))
    collecting = gc.isenabled()
    gc.disable()  # what others do when garbage is collected would look like the hook's own doing
    try:
        with _seeing():
            _thread.current = seen
            try:
                yield seen
            finally:
                _thread.current = outer
        if seen.error is not None:
            raise seen.error
    except Exception as error:
        if seen.error is not None and error is not seen.error:
            raise seen.error from None
        raise
    finally:
        if collecting:
            gc.enable()
        seen.error = None  # its traceback leads back here


# Refusing a call

_LAST_RESORT = "pass `fullgraph=False`, which runs this hook on the host each time"


def _message(label: str, hook: Any, place: str, remedy: str | None) -> str:
    """What `Unsupported` says of a call of `label` at `place`, which is empty where the hook is the callee itself."""
    remedies = [each for each in (_banned.remedy_for(label), remedy or _LAST_RESORT) if each]
    return (
        f"cannot trace a call to `{label}` in {describe_hook(hook)}\n{place}"
        f"The backward is traced once and replayed, so `{label}` would run once, at trace time, and never again.\n"
        f"Instead, {'; or '.join(remedies)}."
    )


def _refuse(label: str | None, frame: types.FrameType | None) -> None:
    """Raises `Unsupported` if the call of `label`, found in `frame`, is user code's."""
    user, seen = _banned.blamed_frame(frame), _thread.current
    if label is None or seen is None or user is None or (label in _banned.BUFFER_WRITES and user is not frame):
        return
    if _banned.count_imports(user) > seen.imports:
        return  # in a module that the hook imports, which is run but once in any case
    where = origin_of(user.f_code, user.f_lasti)
    place = f'  File "{where.file}", line {where.line}, in {where.function}\n    {where.text}\n'
    error = Unsupported(_message(label, seen.hook, place, seen.remedy))
    seen.error = seen.error or error
    try:
        raise error
    finally:
        del error  # else this frame and the error hold each other, and the tracers in its traceback


def _check_python_call(frame: types.FrameType) -> None:
    """Refuses the function that `frame` has just entered, if it is one of the standard library's banned ones."""
    code, caller = frame.f_code, frame.f_back
    if id(code) in _banned.ENVIRON_CODES:  # `os.environ[name]` makes no call that could be seen
        _refuse("os.environ", caller)
    elif caller is not None and file_kind(caller.f_code.co_filename) is _USER:
        _refuse(_banned.label_of_name(frame.f_globals.get("__name__", ""), code.co_qualname), caller)


# Operators: all of them are one function of JAX, `def op(self, *args)`, that closes over `name`


def _find_operator_code() -> types.CodeType | None:
    mul: Any = getattr(getattr(jax.core.Tracer, "__mul__", None), "__code__", None)
    neg: Any = getattr(getattr(jax.core.Tracer, "__neg__", None), "__code__", None)
    if mul is None or mul is not neg or mul.co_freevars != ("name",) or mul.co_varnames[:2] != ("self", "args"):
        return None
    return mul


_OPERATOR_CODE = _find_operator_code()  # None where JAX differs: then nothing is recorded


def _record_operator(frame: types.FrameType, result: Any) -> None:
    """Records that the operator which runs in `frame` returned `result`, if user code applied it."""
    seen = _thread.current
    if seen is None or result is NotImplemented:
        return
    caller = frame.f_back
    while caller is not None:
        kind = file_kind(caller.f_code.co_filename)
        if kind is _USER:
            local = frame.f_locals
            operands = (local["self"], *local["args"])
            if seen.trace is not None and not _compat.belongs_to(result, seen.trace):
                return  # of a trace inside, such as that of a loop's body
            seen.operators.append(OperatorRecord(local["name"], operands, result, caller.f_code, caller.f_lasti))
            return
        if kind is not _STDLIB and kind is not _JHOP:
            return
        caller = caller.f_back


# Python 3.12 and later: one tool of `sys.monitoring` for all threads, taken while any of them watches

_monitoring: Any = getattr(sys, "monitoring", None)


class _Monitor:
    """Counts the watches; registers the tool at the first and gives it back, with all its events, at the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches = 0
        self._tool = -1
        self._marked: dict[int, types.CodeType] = {}  # code with local events, by identity: equal code is not the same

    @contextlib.contextmanager
    def seeing(self) -> Iterator[None]:
        with self._lock:
            if self._watches == 0:
                self._start()
            self._watches += 1
        try:
            yield
        finally:
            with self._lock:
                self._watches -= 1
                if self._watches == 0:
                    self._stop()

    def _start(self) -> None:
        for tool in (4, 3, 5, 2, 1, 0):  # 3 and 4 have no set purpose
            with contextlib.suppress(ValueError):  # taken
                _monitoring.use_tool_id(tool, "jhop")
                break
        else:
            raise Unsupported("cannot trace a hook: every tool of `sys.monitoring` is in use")
        self._tool, events = tool, _monitoring.events
        for event, callback in self._callbacks().items():
            _monitoring.register_callback(tool, event, callback)
        if _OPERATOR_CODE is not None:
            self._mark(_OPERATOR_CODE, events.PY_RETURN)
        _monitoring.set_events(tool, events.PY_START | events.PY_RESUME)

    def _stop(self) -> None:
        _monitoring.set_events(self._tool, 0)
        for code in self._marked.values():
            _monitoring.set_local_events(self._tool, code, 0)
        self._marked.clear()
        for event in self._callbacks():
            _monitoring.register_callback(self._tool, event, None)
        _monitoring.free_tool_id(self._tool)

    def _callbacks(self) -> dict[int, Callable[..., Any]]:
        events = _monitoring.events
        return {
            events.PY_START: self._on_start,
            events.PY_RESUME: self._on_start,
            events.CALL: self._on_call,
            events.INSTRUCTION: self._on_instruction,
            events.PY_RETURN: self._on_return,
        }

    def _mark(self, code: types.CodeType, events: int) -> None:
        self._marked[id(code)] = code
        _monitoring.set_local_events(self._tool, code, events)

    def _on_start(self, code: types.CodeType, _offset: int) -> Any:
        kind = file_kind(code.co_filename)
        if kind is not _USER and kind is not _STDLIB:
            return _monitoring.DISABLE
        # Not disabled from here on: what is disabled stays so for the next watch, which has to mark anew.
        if _thread.current is None:
            return None
        frame = sys._getframe(1)
        if kind is _STDLIB:
            if _banned.blamed_frame(frame) is None:
                return None
            _check_python_call(frame)
        if id(code) not in self._marked:
            events = _monitoring.events
            self._mark(code, events.CALL | (events.INSTRUCTION if _banned.starred_calls(code) else 0))
        return None

    def _on_instruction(self, code: types.CodeType, offset: int) -> Any:
        if offset not in _banned.starred_calls(code):
            return _monitoring.DISABLE
        if _thread.current is not None:
            _refuse(_banned.label_in_call(sys._getframe(1), offset), sys._getframe(1))
        return None

    def _on_call(self, code: types.CodeType, offset: int, callee: Any, arg: Any) -> None:
        if _thread.current is None:
            return
        label, frame = _banned.label_of(callee, arg), sys._getframe(1)
        if label is None and _banned.calls_its_argument(callee):
            label = _banned.label_of(arg) or _banned.label_mentioned(frame, offset)
        if label is None:
            return
        # CPython (3.12 and 3.13 at least) releases `xs` once too often if the callback of `f(*xs)` raises, and crashes
        # later. `_on_instruction` has looked at that call before; what it missed is an error at the end of the watch.
        with contextlib.suppress(Unsupported) if offset in _banned.starred_calls(code) else contextlib.nullcontext():
            _refuse(label, frame)

    def _on_return(self, _code: types.CodeType, _offset: int, result: Any) -> None:
        _record_operator(sys._getframe(1), result)


# Python 3.11: a profile function on this thread


@contextlib.contextmanager
def _profiling() -> Iterator[None]:
    """Puts a profile function before the one there is, which goes on being called."""
    outer = _thread.profiler
    old = getattr(outer, "before", None) if outer else sys.getprofile()
    pausable = None if old is None or callable(old) else old  # cProfile, which has no function to call
    if pausable is not None:
        pausable.disable()
    _thread.profiler = _profiler(None if pausable is not None else old)
    sys.setprofile(_thread.profiler)
    try:
        yield
    finally:
        if sys.gettrace() is _trace_nothing:
            sys.settrace(None)
        _thread.profiler = outer
        if pausable is not None:
            sys.setprofile(None)
            pausable.enable()
        else:
            # Python takes a profile function that raised away, so `sys.getprofile` does not tell what was there.
            sys.setprofile(outer or old)


def _profiler(before: Callable[..., Any] | None) -> Callable[..., None]:
    """Makes the profile function. It runs at each call and return of all code, so it does little for most of them."""
    c_names, operator_code = _banned_c_names(), _OPERATOR_CODE
    libraries: set[str] = set()

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            if frame.f_code.co_filename not in libraries:
                _enter(frame, libraries)
        elif event == "return":
            if frame.f_code is operator_code and arg is not None:
                _record_operator(frame, arg)
        elif event == "c_call" and arg.__name__ in c_names and (label := _banned.label_of(arg)) is not None:
            _refuse(label, frame)

    def chained(frame: types.FrameType, event: str, arg: Any) -> None:
        before(frame, event, arg)  # type: ignore[misc]
        profile(frame, event, arg)

    made: Any = profile if before is None else chained
    made.before = before
    return made


def _enter(frame: types.FrameType, libraries: set[str]) -> None:
    """Looks at a function that has just been entered; notes its file if there is never anything to see in it."""
    kind = file_kind(frame.f_code.co_filename)
    if kind is _USER:
        _step_if_needed(frame)
    elif kind is _STDLIB:
        _check_python_call(frame)
    else:
        libraries.add(frame.f_code.co_filename)


@functools.cache
def _banned_c_names() -> frozenset[str]:
    """Names of the C functions that may be banned: most calls are told apart by this alone."""
    names = {"print", "input", "open", "breakpoint", "start_new_thread", "warn", "warn_explicit"}
    names |= {"now", "today", "utcnow", "tofile", "dump"}
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
    if free and _thread.current is not None and _banned.mentions_banned(frame):
        sys.settrace(_trace_nothing)
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        frame.f_trace = _trace_instruction


def _trace_nothing(_frame: types.FrameType, _event: str, _arg: Any) -> None:
    """The trace function of the thread: without one, Python would not call those of frames."""


def _trace_instruction(frame: types.FrameType, event: str, _arg: Any) -> Any:
    if event == "opcode" and frame.f_lasti in _banned.calls_in(frame.f_code):
        label = _banned.label_in_call(frame, frame.f_lasti)
        if label is not None:
            _refuse(label, frame)
    return _trace_instruction


# The one file that may ask for a version is `_compat`; this asks for the feature.
_seeing = _profiling if _monitoring is None else _Monitor().seeing
