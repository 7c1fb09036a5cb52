"""What a traced function itself looks up: it is run once, so whatever it read then is part of its graphs.

Hooks are another matter. Their bodies run when a graph is inlined, and the numbers and arrays that they use are inputs:
the code of hooks is left out here, or a hook that counts would have its function traced again at every call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

from jhop._container import MISSING
from jhop._guards import Guards
from jhop._walk import Walk

_Place = tuple[int, str]  # a container: the id of its object, and its kind


class Lookups:
    """What can be read from some roots, before and after a function is traced.

    Args:
        roots: pairs of (path, object): the function, and arguments that are not traced.
    """

    def __init__(self, roots: list[tuple[str, Any]]):
        self._roots = roots
        self.walk = Walk(roots, strict=False, without=frozenset())
        self._before: dict[_Place, list[tuple[Any, Any]]] = {
            (id(container.obj), container.kind): container.items() for container in self.walk.containers
        }

    def guards(self, hooks: Iterable[Any]) -> Guards:
        """When what was traced since may be used again; `hooks` are the callables that it left opaque."""
        walk = Walk(self._roots, strict=False, without=frozenset(code for hook in hooks for code in code_of(hook)))
        changed: list[tuple[int, Any]] = []
        for container in walk.containers:
            before = self._before.get((id(container.obj), container.kind), [])
            changed += ((id(container), key) for key in _changed(container.kind, before, container.items()))
        return Guards(walk, [], frozen=True, ignore_slots=changed)


def _changed(kind: str, before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> list[Any]:
    """Keys that the function itself changed while it was traced: its effects, not what it depends on."""
    old, now = dict(before), dict(after)
    if kind == "set":
        return list(old.keys() ^ now.keys())
    return [key for key in {**old, **now} if old.get(key, MISSING) is not now.get(key, MISSING)]


def code_of(fn: Any) -> Iterable[types.CodeType]:
    """The code that a call of `fn` begins with, through partials, methods and wrappers."""
    seen: set[int] = set()
    while id(fn) not in seen:
        seen.add(id(fn))
        if isinstance(fn, types.FunctionType):
            yield fn.__code__
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, types.MethodType):
            fn = fn.__func__
        elif getattr(fn, "__wrapped__", None) is not None:
            fn = fn.__wrapped__
        elif not isinstance(fn, (types.FunctionType, type)):
            fn = getattr(type(fn), "__call__", fn)
