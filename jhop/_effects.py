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
  `partial(print)` in it), what `operator.methodcaller("write", "x")(file)` calls unless that has a name, or while a
  debugger or coverage holds `sys.settrace`; profilers written in C see nothing of the watched stretch (cProfile is
  paused and goes on after it);
- on 3.11, before it happens, what a hook calls after it caught the refusal of an earlier call (Python takes a profile
  function that raised away), and an error of JAX's about a value that was read, if it is one of Python's own types;
- on 3.12 and later, before it happens, a call `callbacks["log"](*xs)` whose text does not name what it calls: it is an
  error at the end of the watch only;
- everywhere, iteration over an open file, a banned function that C code gets other than as an argument of the call
  that runs it (`sorted(xs, **options)`) or calls with no call in the text (`property(print)`; but the factory of a
  defaultdict is seen, as state and where one is made), what `map` has a `methodcaller` call, and calls in a frame that
  was running before the watch began.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from jhop import _banned, _compat, _mentions, _reads
from jhop._errors import Unsupported
from jhop._profiling import profiling
from jhop._source import file_kind
from jhop._watched import (
    OPERATOR_CODE,
    STDLIB,
    USER,
    Watch,
    check_python_call,
    message,
    monitoring,
    record_operator,
    refuse,
    refuse_text,
    take_tool,
    thread,
)


@contextlib.contextmanager
def watch(hook: Any, *, trace: Any = None) -> Iterator[Watch]:
    """Refuses calls that cannot be replayed, and records operators, on this thread while the block runs.

    Watches nest; the innermost one gets the records and the errors. Frames that run already when the block is entered
    are not watched, so call the hook in it rather than write its body there.

    Args:
        hook: whom errors name.
        trace: record operators of this trace alone, and keep nothing of those that the hook begins and ends.

    Raises:
        Unsupported: user code was about to make a banned call. Raised at the call, and again at the end of the block
            if the code caught it, or turned it into another error.
    """
    seen, outer = Watch(hook, trace), thread.current
    if (label := _banned.label_of(hook)) is not None:  # a hook that is `print` itself is called by us, not by user code
        raise Unsupported(message(label, hook, ""))
    collecting = gc.isenabled()
    gc.disable()  # what others do when garbage is collected would look like the hook's own doing
    try:
        with _seeing():
            thread.current = seen
            try:
                yield seen
            finally:
                thread.current = outer
        if seen.error is not None:
            raise seen.error
        if seen.caught is not None:
            raise _caught(seen)
    except Exception as error:
        if seen.error is not None and error is not seen.error:
            raise seen.error from None
        raise
    finally:
        if collecting:
            gc.enable()
        seen.error = seen.caught = None  # their tracebacks lead back here


def _caught(seen: Watch) -> Unsupported:
    """The error for a hook that read a value and caught what JAX raised: on values it would go on in another way."""
    assert seen.caught is not None
    text = _reads.explain(seen.hook, seen.caught, caught=True)
    error = Unsupported(text)
    error.__cause__ = seen.caught
    return error


# Python 3.12 and later: one tool of `sys.monitoring` for all threads, taken while any of them watches

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
        tool = take_tool()
        if tool is None:
            raise Unsupported("cannot trace a hook: every tool of `sys.monitoring` is in use")
        self._tool, events = tool, monitoring.events
        for event, callback in self._callbacks().items():
            monitoring.register_callback(tool, event, callback)
        if OPERATOR_CODE is not None:
            self._mark(OPERATOR_CODE, events.PY_RETURN)
        monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.EXCEPTION_HANDLED)

    def _stop(self) -> None:
        monitoring.set_events(self._tool, 0)
        for code in self._marked.values():
            monitoring.set_local_events(self._tool, code, 0)
        self._marked.clear()
        for event in self._callbacks():
            monitoring.register_callback(self._tool, event, None)
        monitoring.free_tool_id(self._tool)

    def _callbacks(self) -> dict[int, Callable[..., Any]]:
        events = monitoring.events
        return {
            events.PY_START: self._on_start,
            events.PY_RESUME: self._on_start,
            events.CALL: self._on_call,
            events.INSTRUCTION: self._on_instruction,
            events.PY_RETURN: self._on_return,
            events.EXCEPTION_HANDLED: self._on_handled,
        }

    def _mark(self, code: types.CodeType, events: int) -> None:
        self._marked[id(code)] = code
        monitoring.set_local_events(self._tool, code, events)

    def _on_start(self, code: types.CodeType, _offset: int) -> Any:
        if code is _reads.TEXT_CODE:
            refuse_text(sys._getframe(1).f_back)
            return None
        kind = file_kind(code.co_filename)
        if (kind is not USER and kind is not STDLIB) or id(code) in _banned.HARMLESS:
            return monitoring.DISABLE
        # Not disabled from here on: what is disabled stays so for the next watch, which has to mark anew.
        if (seen := thread.current) is None:
            return None
        frame = sys._getframe(1)
        if kind is USER:
            seen.nested = seen.nested or _banned.is_staged_within(frame, seen.staging)
        else:
            if _banned.blamed_frame(frame) is None:
                return None
            check_python_call(frame)
        if id(code) not in self._marked:
            events = monitoring.events
            self._mark(code, events.CALL | (events.INSTRUCTION if _mentions.starred_calls(code) else 0))
        return None

    def _on_instruction(self, code: types.CodeType, offset: int) -> Any:
        if offset not in _mentions.starred_calls(code):
            return monitoring.DISABLE
        if thread.current is not None:
            refuse(_mentions.label_in_call(sys._getframe(1), offset), sys._getframe(1))
        return None

    def _on_call(self, code: types.CodeType, offset: int, callee: Any, arg: Any) -> None:
        seen = thread.current
        if seen is None or id(callee) in seen.jitted:
            return
        label, frame = _banned.label_of(callee, arg), sys._getframe(1)
        if label is None:
            label = _banned.label_of(arg) if _mentions.calls_its_argument(callee) else None
            label = label or _mentions.label_given(frame, offset, callee)
        if label is None:
            if _compat.is_jitted(callee):  # called often, and by any arguments it is the same
                seen.jitted[id(callee)] = callee
            return
        # CPython (3.12 and 3.13 at least) releases `xs` once too often if the callback of `f(*xs)` raises, and crashes
        # later. `_on_instruction` has looked at that call before; what it missed is an error at the end of the watch.
        with contextlib.suppress(Unsupported) if offset in _mentions.starred_calls(code) else contextlib.nullcontext():
            refuse(label, frame)

    def _on_handled(self, _code: types.CodeType, _offset: int, error: BaseException) -> None:
        seen = thread.current
        if seen is None or seen.caught is not None or not _reads.is_read(error):
            return
        if _banned.blamed_frame(sys._getframe(1)) is not None:  # what JAX catches is its business
            seen.caught = error

    def _on_return(self, _code: types.CodeType, _offset: int, result: Any) -> None:
        record_operator(sys._getframe(1), result)


# `_compat` alone may ask for a version; this asks for the feature.
_seeing = profiling if monitoring is None else _Monitor().seeing
# In this block `watch` is quick to enter: Python instruments code anew whenever events are turned on.
many_watches = contextlib.nullcontext if monitoring is None else _seeing
