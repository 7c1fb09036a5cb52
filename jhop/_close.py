"""Hooks that close over JAX tracers, made into hooks that take them as operands.

A hook outlives the trace in which it was put on a value: its equation stays in jaxprs that JAX keeps, and its body runs
when the backward pass is lowered. So the tracers that it closes over are taken out. A `Husk` is the hook with holes
where tracers were; each run fills them with that run's values.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jhop import _state
from jhop._copier import Copier, Run
from jhop._errors import Unsupported
from jhop._leaves import Leaf
from jhop._source import describe_hook, hook_name
from jhop._walk import Walk


def closed_over_tracers(fn: Any) -> list[Leaf]:
    """Slots reachable from a function that hold JAX tracers, and can be made to hold something else."""
    return Walk([(hook_name(fn), fn)], strict=False).tracers


def closes_over_tracer(fn: Any) -> bool:
    """Whether a JAX tracer is reachable from a function."""
    walk = Walk([(hook_name(fn), fn)], strict=False)
    return bool(walk.tracers) or walk.holds_tracer


@contextlib.contextmanager
def substituted(slots: Sequence[Leaf], values: Sequence[Any]) -> Iterator[None]:
    """Inside the block, slots hold other values; afterwards, what they held before."""
    with _state.LOCK:
        places = [(slot, value, slot.container.get(slot.key)) for slot, value in zip(slots, values, strict=True)]
        try:
            for slot, value, _ in places:
                slot.container.put(slot.key, value)
            yield
        finally:
            for slot, _, before in places:
                slot.container.put_back(slot.key, before)


_apart = threading.local()


@contextlib.contextmanager
def kept_apart(objects: Iterable[Any]) -> Iterator[None]:
    """While active in this thread, tracers in these objects are lifted state, none that a hook closes over."""
    before: frozenset[int] = getattr(_apart, "ids", frozenset())
    _apart.ids = frozenset(map(id, objects))
    try:
        yield
    finally:
        _apart.ids = before


class Husk:
    """A hook without the tracers that it closed over. Made by `Husk.of`."""

    __slots__ = ("_base", "_places", "_root")

    def __init__(self, copier: Copier, fn: Any):
        self._root = copier.make(fn)
        self._places = [*copier.places, *copier.in_place()]
        self._base: Any = None

    @staticmethod
    def of(fn: Any) -> tuple[Husk | None, list[Any]]:
        """(the husk, the tracers that belong into it); (None, []) for a hook that closes over none."""
        walk = Walk([(hook_name(fn), fn)], strict=False)
        apart: frozenset[int] = getattr(_apart, "ids", frozenset())
        if not walk.holds_tracer and all(id(leaf.container.obj) in apart for leaf in walk.tracers):
            return None, []
        copier = Copier(fn, walk, apart)
        return Husk(copier, fn), copier.operands

    @property
    def base(self) -> Any:
        """The hook with holes, for whoever looks at its code and its state."""
        if self._base is None:
            self._base = self._root(Run(None))
        return self._base

    @contextlib.contextmanager
    def filled(self, values: Sequence[Any]) -> Iterator[Any]:
        """The hook as it was, with `values` in place of the tracers.

        Raises:
            Unsupported: the hook wrote to an object that leads to a tracer, of which it only has a copy.
        """
        run = Run(values)
        with _state.LOCK:
            fn = self._root(run)
            places = [(place(), make) for place, make in self._places]
            slots = [(slot, make(run)) for slot, make in places if slot.container.obj is not None]  # not weak, and gone
            with substituted([slot for slot, _ in slots], [value for _, value in slots]):
                yield fn
                written = run.written()
                for slot, value in slots:
                    if slot.container.get(slot.key) is not value:
                        written = f"`{slot.path}`"
        if written is not None:
            raise Unsupported(
                f"{describe_hook(self.base)} writes to {written}, which held a value that JAX is tracing in the "
                "function around the hook. Keep what a hook writes in an object of its own, without traced values."
            )
