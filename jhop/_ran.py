"""Which of some functions run while a block does: seen as cheaply as Python can."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from jhop._source import FileKind, file_kind, with_nested
from jhop._watched import monitoring, take_tool


@contextlib.contextmanager
def note_code_that_runs(
    candidates: Iterable[types.CodeType], *, roughly: bool = False
) -> Iterator[set[types.CodeType]]:
    """Adds to a set the code that runs in the block, called by other than jhop, which runs hooks.

    Where another tool is in the way, the set has all candidates from the start.

    Args:
        roughly: whether all candidates will do where it is slow to see which of them run, as it is on Python 3.11.
    """
    asked = dict.fromkeys(with_nested(candidates))
    ran: set[types.CodeType] = set()
    with contextlib.ExitStack() as stack:
        begin = _profile if monitoring is None else _monitor
        if (roughly and monitoring is None) or not begin(asked, ran, stack):
            ran.update(asked)
        yield ran


def _note(frame: types.FrameType, ran: set[types.CodeType]) -> None:
    caller = frame.f_back
    if caller is None or file_kind(caller.f_code.co_filename) is not FileKind.JHOP:
        ran.add(frame.f_code)


def _monitor(asked: dict[types.CodeType, None], ran: set[types.CodeType], stack: contextlib.ExitStack) -> bool:
    """By events on that code alone: Python 3.12 and later."""
    event = monitoring.events.PY_START
    tool = take_tool()
    if tool is None:
        return False
    stack.callback(monitoring.free_tool_id, tool)
    stack.callback(monitoring.register_callback, tool, event, None)
    monitoring.register_callback(tool, event, lambda code, offset: _note(sys._getframe(1), ran))
    for code in asked:
        stack.callback(monitoring.set_local_events, tool, code, 0)
        monitoring.set_local_events(tool, code, event)
    return True


_own: weakref.WeakSet[Any] = weakref.WeakSet()  # profile functions of `_profile`


def _profile(asked: dict[types.CodeType, None], ran: set[types.CodeType], stack: contextlib.ExitStack) -> bool:
    """By a profile function, which sees everything, and passes it on to another of its kind: Python 3.11."""
    outer: Any = sys.getprofile()
    if outer is not None and outer not in _own:
        return False
    files = {code.co_filename for code in asked}  # code is slow to hash, and most of it is not the user's

    def profile(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and (code := frame.f_code).co_filename in files and code in asked:
            _note(frame, ran)
        if outer is not None:
            outer(frame, event, arg)

    _own.add(profile)
    stack.callback(sys.setprofile, outer)
    sys.setprofile(profile)
    return True
