"""What jhop logs, with `logging`, if it is asked to by the environment, as with `JHOP_LOGS=recompiles,inert`.

- `recompiles`: each new trace with its reason.
- `inert`: each hook, once, on a value that nobody differentiates, where the value is computed or compiled.

In a program, `logging.getLogger("jhop.recompiles").setLevel(logging.INFO)` turns one on and `logging.WARNING` off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from jhop._errors import JhopError
from jhop._source import is_user_file

_recompiles = logging.getLogger("jhop.recompiles")
INERT = logging.getLogger("jhop.inert")
_KNOWN = {"recompiles": _recompiles, "inert": INERT}
_told: set[Any] = set()  # what was logged of hooks without effect
_mode = threading.local()


def configure(setting: str) -> None:
    """Turns on the logs that are named, with commas between, and shows them on stderr.

    Raises:
        JhopError: there is no such log.
    """
    names = [name.strip() for name in setting.split(",") if name.strip()]
    for name in names:
        if name not in _KNOWN:
            raise JhopError(f"JHOP_LOGS: unknown log {name!r}. Expected one of {', '.join(map(repr, _KNOWN))}.")
        _KNOWN[name].setLevel(logging.INFO)
    if names:
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logging.getLogger("jhop").addHandler(shown)
        logging.getLogger("jhop").propagate = False  # or a handler of the program's would show it once more


def logs_recompiles() -> bool:
    """Whether new traces are logged in this thread."""
    kept: bool | None = getattr(_mode, "recompiles", None)
    return _recompiles.isEnabledFor(logging.INFO) if kept is None else kept


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside the block, what this thread logs is what it logs now, whatever is set meanwhile."""
    before = getattr(_mode, "recompiles", None)
    _mode.recompiles = logs_recompiles()
    try:
        yield
    finally:
        _mode.recompiles = before


def recompiling(what: str, place: tuple[str, int] | None, reason: str) -> None:
    """Logs a new trace.

    Args:
        what: is traced, in words.
        place: where it stands; by default, where the user's code is that leads to it.
        reason: why, in words; several are separated by "; ".
    """
    if not logs_recompiles():
        return
    file, line = place or _caller()
    causes = "".join(f"\n    - {cause}" for cause in reason.split("; "))
    message = f"Recompiling {what} in {file}:{line}\n    triggered by:{causes}"
    # Not `info`, which would ask for the level of now.
    _recompiles.handle(_recompiles.makeRecord(_recompiles.name, logging.INFO, file, line, message, (), None))


def inert(hook: str, place: tuple[str, int] | None = None) -> None:
    """Logs that a hook has no effect, once for each hook and place.

    Args:
        hook: in words.
        place: where it was put on a value; by default, where the user's code is that leads here.
    """
    if not INERT.isEnabledFor(logging.INFO):
        return
    file, line = place or _caller()
    if (hook, file, line) not in _told:
        _told.add((hook, file, line))
        message = f"{hook} does not run: no backward pass goes through the value that it is on, in {file}:{line}"
        INERT.handle(INERT.makeRecord(INERT.name, logging.INFO, file, line, message, (), None))


def forget() -> None:
    """What was logged once is logged once more."""
    _told.clear()


def _caller() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


configure(os.environ.get("JHOP_LOGS", ""))
