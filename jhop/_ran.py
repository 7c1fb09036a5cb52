"""Which of some functions run while a block does: seen as cheaply as Python can."""

from __future__ import annotations

import contextlib
import sys
import types
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


class _Profile:
    """A profile function that notes code, and passes on what it sees to another of its kind."""

    def __init__(self, asked: dict[types.CodeType, None], ran: set[types.CodeType], outer: _Profile | None):
        self._asked = asked
        self._ran = ran
        self._outer = outer

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code in self._asked:
            _note(frame, self._ran)
        if self._outer is not None:
            self._outer(frame, event, arg)


def _profile(asked: dict[types.CodeType, None], ran: set[types.CodeType], stack: contextlib.ExitStack) -> bool:
    """By a profile function, which sees everything: Python 3.11."""
    outer = sys.getprofile()
    if outer is not None and not isinstance(outer, _Profile):
        return False
    stack.callback(sys.setprofile, outer)
    sys.setprofile(_Profile(asked, ran, outer))
    return True
