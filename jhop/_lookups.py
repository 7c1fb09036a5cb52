"""What a traced function itself looks up: it is run once, so whatever it read then is part of its graphs.

Hooks are another matter. Their bodies run when a graph is inlined, and the numbers and arrays that they use are inputs:
the code of hooks is left out here, or a hook that counts would have its function traced again at every call.

JAX keeps traces of inner functions too (of `jax.jit`, the body of a `scan`), and finds them again by function and types
alone. So every trace here is made in an *epoch*, a value in the key of JAX's caches, that ends when anything that was
looked up in it has changed, or can no longer be checked.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from jhop import _compat
from jhop._container import MISSING, Container
from jhop._guards import Guards
from jhop._interp import inner_jaxprs
from jhop._leaves import DECLARED
from jhop._names import CONSTRUCTORS, stores_outside
from jhop._ran import note_code_that_runs
from jhop._records import loosen
from jhop._source import is_user_file, layers, warn
from jhop._walk import MAX_CONTAINERS, REFLECTION, Walk


class _Epoch:
    """Traces that may share those of inner functions: nothing that they looked up has changed."""

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[Guards], list[weakref.ref[Any]]]] = []
        self.ran: set[types.CodeType] = set()  # code that ran in its traces

    def add(self, guards: Guards, inner: list[Any]) -> None:
        """Notes what a trace looked up, and the inner functions whose traces JAX keeps for as long as they live."""
        self._entries.append((weakref.ref(guards), [weakref.ref(fn) for fn in inner]))

    def holds(self) -> bool:
        """Whether each such trace is still right, or cannot be found again."""
        kept = []
        for found, inner in self._entries:
            guards, alive = found(), any(fn() is not None for fn in inner)
            if (guards is None and alive) or (guards is not None and not guards.hold()):
                return False
            if alive:
                kept.append((found, inner))
        self._entries = kept
        return True


_epoch = _Epoch()
_Place = tuple[int, str]  # a container: the id of its object, and its kind


class Lookups:
    """What can be read from some roots, before and after a function is traced.

    Args:
        roots: pairs of (path, object): the function, and arguments that are not traced.
    """

    def __init__(self, roots: list[tuple[str, Any]]):
        self._roots = roots
        self.walk = Walk(roots, strict=False, without=frozenset())
        self._functions = self.walk.instances(types.FunctionType, lambda fn: is_user_file(fn.__code__.co_filename))
        self._before: dict[_Place, list[tuple[Any, Any]]] = {
            (id(container.obj), container.kind): container.items() for container in self.walk.containers
        }

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Where the function is traced: what JAX kept of inner functions is used only if it still holds."""
        global _epoch
        if not _epoch.holds():
            _epoch = _Epoch()
        codes = [fn.__code__ for fn in self._functions]
        # What reads no number and writes nothing may as well count as a part of the function: it makes no difference.
        roughly = not _may_hold_state(self.walk) and not any(map(stores_outside, codes))
        with _compat.cache_of(_epoch), note_code_that_runs(codes, roughly=roughly) as ran:
            yield
        _epoch.ran |= ran

    def guards(self, hooks: Iterable[Any], *jaxprs: Any, inputs: Iterable[Any] = ()) -> Guards:
        """When what was traced since may be used again.

        Args:
            hooks: the callables that were left opaque.
            jaxprs: what was traced.
            inputs: Tensors whose arrays are inputs of that: they may have others each time.
        """
        given = {id(tensor) for tensor in inputs}
        # A hook that the function also calls itself is a part of it like any other. So are classes that it makes
        # objects of: how those were made that it found does not count.
        makers = {fn.__code__ for fn in self._functions if fn.__name__ in CONSTRUCTORS}
        without = makers.union(code for hook in hooks for code in code_of(hook)) - _epoch.ran
        walk = Walk(self._roots, strict=False, without=frozenset(without))
        loosen(walk)
        reads_gradients = walk.mentions("grad", "_grad", *REFLECTION)
        changed: list[tuple[int, Any]] = []
        grown = []
        for container in walk.containers:
            before = self._before.get((id(container.obj), container.kind), [])
            if container.names is not None:  # fewer than before: those that only hooks use are left out
                before = [(name, value) for name, value in before if name in container.names]
            after = container.items()
            keys = _changed(container.kind, before, after)
            if keys:
                grown.append(container)
            if not container.whole:  # put where there was nothing, it may be a cache that is read the next time
                old, now = dict(before), dict(after)
                keys = [key for key in keys if key not in now or old.get(key) is not None]
            if id(container.obj) in given:
                keys = ["_value"]
            if type(container.obj) in DECLARED and not reads_gradients:  # each backward pass writes them
                keys = [*keys, "_grad"]
            changed += ((id(container), key) for key in keys)
        if walk.truncated:
            warn(
                f"jhop: `{self._roots[0][0]}` can reach more than {MAX_CONTAINERS} Python objects. A change in one "
                "that was not looked at is not seen after the function was traced: pass it what it uses."
            )
        guards = Guards(walk, [], frozen=True, ignore_slots=changed, ignore_keys=grown)
        if inner := _inner_functions(self.walk, jaxprs):
            _epoch.add(guards, inner)
        return guards


def _may_hold_state(walk: Walk) -> bool:
    """Whether there is more in reach than functions, modules and what is neither a number nor mutable."""

    def is_namespace(container: Container) -> bool:
        return container.kind in ("cell", "defaults") or (container.kind == "dict" and container.names is not None)

    return walk.mentions(*REFLECTION) or bool(walk.leaves) or not all(map(is_namespace, walk.containers))


def _inner_functions(walk: Walk, jaxprs: Iterable[Any]) -> list[Any]:
    """Functions that outlive a trace, and that JAX may have traced in it as parts: it would find those again."""
    places = {place for jaxpr in jaxprs for eqn in _compat.open_jaxpr(jaxpr)[0].eqns for place in _places_in(eqn)}
    jitted: list[Any] = walk.instances(object, _compat.is_jitted)
    return [
        *walk.instances(types.FunctionType, lambda fn: _place_of(fn) in places or None in places),
        *(fn.__wrapped__ for fn in jitted if isinstance(fn.__wrapped__, types.FunctionType)),
    ]


def _place_of(fn: types.FunctionType) -> str:
    return f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}"


def _places_in(eqn: Any) -> Iterator[str | None]:
    """Where the functions stand that the jaxprs in an equation were traced from; None where that is not known."""
    for inner in inner_jaxprs(eqn):
        opened, _ = _compat.open_jaxpr(inner)
        name = getattr(opened.debug_info, "func_src_info", None)  # "name at file:line"
        yield name.partition(" at ")[2] or None if name else None
        for nested in opened.eqns:
            yield from _places_in(nested)


def _changed(kind: str, before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> list[Any]:
    """Keys that the function itself changed while it was traced: its effects, not what it depends on."""
    old, now = dict(before), dict(after)
    if kind == "set":
        return list(old.keys() ^ now.keys())
    return [key for key in {**old, **now} if old.get(key, MISSING) is not now.get(key, MISSING)]


def code_of(fn: Any) -> Iterable[types.CodeType]:
    """The code that a call of `fn` begins with, through partials, methods and wrappers."""
    return [layer.__code__ for layer in layers(fn) if isinstance(layer, types.FunctionType)]
