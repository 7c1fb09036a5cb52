"""All or nothing where hooks run on the host: what they reach is put back if anything is raised."""

from __future__ import annotations

import array
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jhop import _compat
from jhop._container import Container
from jhop._source import hook_name
from jhop._walk import IMMUTABLE, Walk

_WRITTEN_TO: Any = (np.ndarray, bytearray, array.array)  # of which no container has the items
_ENDS = (*IMMUTABLE, int, float, np.generic, jax.Array, *_WRITTEN_TO)


class Undo:
    """A block of code in which hooks run on the host.

    Args:
        hooks: the hooks.
        callbacks: those that a program calls back. Each has the `error` that came from it last.
        shares: whether hooks that reach this share state with the program, which reads it before and writes it after.

    Attributes:
        holds: whether they did not share any when `look` was called.
    """

    def __init__(
        self, hooks: list[Any], callbacks: Sequence[Any] = (), shares: Callable[[Walk], object] = lambda walk: False
    ):
        self._hooks = hooks
        self._callbacks = callbacks
        self._shares = shares
        self._walk = reach_of(hooks)
        self.holds = True

    def look(self) -> bool:
        """Finds what the hooks can reach now, which may be more than before; call it before a run. Returns `holds`."""
        known = self._walk.knows
        if not all(known(value) or _leads_nowhere(value) for value in _present(self._walk)[1].values()):
            self._walk = reach_of(self._hooks)
        self.holds = self.holds and not self._shares(self._walk)
        return self.holds

    @contextlib.contextmanager
    def on_error(self) -> Iterator[None]:
        """If the block raises anything, the Python state in reach is as before; a hook's error comes out as it is."""
        before, values = _present(self._walk)
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


def _present(walk: Walk) -> tuple[list[tuple[Container, list[tuple[Any, Any]]]], dict[int, Any]]:
    """What is in each container now; and, by id, all that is there and whose content may change."""
    before = [(container, container.items()) for container in walk.containers]
    values: dict[int, Any] = {id(value): value for _, items in before for _, value in items}
    values |= {id(value): value for value in walk.instances(_WRITTEN_TO, lambda value: True)}
    return before, values


def _leads_nowhere(value: Any) -> bool:
    """Whether there is no more in reach by a value."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_leads_nowhere, value))
    return isinstance(value, _ENDS)


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
