"""All or nothing where hooks run on the host: what they reach is put back if anything is raised."""

from __future__ import annotations

import array
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jhop import _compat
from jhop._source import hook_name
from jhop._walk import Walk

_WRITTEN_TO: Any = (np.ndarray, bytearray, array.array)  # of which no container has the items


class Undo:
    """A block of code in which hooks run on the host.

    Args:
        hooks: the hooks.
        callbacks: those that a program calls back. Each has the `error` that came from it last.
    """

    def __init__(self, hooks: list[Any], callbacks: Sequence[Any] = ()):
        self._hooks = hooks
        self._callbacks = callbacks
        self._walk = reach_of(hooks)

    @contextlib.contextmanager
    def on_error(self) -> Iterator[None]:
        """If the block raises anything, the Python state that the hooks reach is as before; the hook's error comes out.

        It may run in several threads at once.
        """
        walk = self._walk
        if any(slot.container.get(slot.key) is not slot.value for slot in walk.fixed):
            walk = self._walk = reach_of(self._hooks)  # they may lead elsewhere now
        before = [(container, container.items()) for container in walk.containers]
        values: dict[int, Any] = {id(value): value for _, items in before for _, value in items}
        values |= {id(value): value for value in walk.instances(_WRITTEN_TO, lambda value: True)}
        contents = [put_back for value in values.values() for put_back in _contents_of(value)]
        for callback in self._callbacks:
            callback.error = None
        try:
            yield
        except BaseException:
            for container, items in before:
                container.restore(items)
            for put_back in contents:
                put_back()
            if self._callbacks:
                _compat.forget_failed_effects()
            error = next((callback.error for callback in self._callbacks if callback.error is not None), None)
            if error is not None:
                raise error from None
            raise


def reach_of(hooks: Any) -> Walk:
    """What hooks can reach that run on the host."""
    return Walk([(hook_name(hook), hook) for hook in hooks], strict=False)


def _contents_of(value: Any) -> list[Callable[[], None]]:
    """What puts back the content of something that a hook on the host may write to in place."""
    if isinstance(value, (bytearray, array.array)):
        items: Any = value[:]
        return [lambda: value.__setitem__(slice(None), items)]
    if not isinstance(value, np.ndarray):
        return []
    found: list[Callable[[], None]] = []
    if value.flags.writeable:
        raw = value.view(np.ndarray)  # past what a subclass, such as a masked array, does when it is written to
        content = raw.copy()
        found.append(lambda: raw.__setitem__(..., content))
    if type(value) is not np.ndarray and hasattr(value, "__dict__"):
        attributes = dict(vars(value))
        found += [put_back for held in attributes.values() for put_back in _contents_of(held)]
        found.append(lambda: _reset(vars(value), attributes))
    return found


def _reset(table: dict[str, Any], items: dict[str, Any]) -> None:
    table.clear()
    table.update(items)
