"""Copies of hooks with other values in place of the JAX tracers that they close over.

Copied is only what leads to a tracer: functions and their cells, partials, bound methods and built-in containers anew
for each run, so that nothing which JAX remembers of one run is found in the next. All else is shared with the hook, so
that its Python state is the same. An object with state of its own is filled in place while others may still look at
it, and is a copy once they are gone.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from jhop import _compat
from jhop._container import MISSING, Container, builtin_kind
from jhop._leaves import DECLARED, Leaf
from jhop._library import attributes_of, bare, built_in, copied, held, is_jaxs, without_rules
from jhop._walk import Walk


class _Hole:
    """Stands where a hook closed over a tracer, as long as the hook does not run."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<traced value>"


HOLE = _Hole()


class Run:
    """One run of a hook: the values in place of its tracers, or None for holes, and the objects made for it."""

    def __init__(self, values: Sequence[Any] | None):
        self._values = values
        self.made: dict[int, Any] = {}
        self._kept: list[tuple[Container, list[tuple[Any, Any]]]] = []

    def value(self, index: int) -> Any:
        return HOLE if self._values is None else self._values[index]

    def keep(self, container: Container) -> None:
        """Remembers what an object made for this run holds: nobody would see what the hook writes to it."""
        self._kept.append((container, container.items()))

    def written(self) -> str | None:
        """Which of the objects made for this run the hook wrote to, in words."""
        for container, before in self._kept:
            now = container.items()
            if len(now) != len(before) or any(a[1] is not b[1] for a, b in zip(now, before, strict=True)):
                return "a variable" if container.kind == "cell" else f"a {type(container.obj).__name__}"
        return None


Make = Callable[[Run], Any]


class Copier:
    """Makes, for each object that leads to a tracer, the function that makes its copy for a run.

    Args:
        root: the hook.
        walk: what it can reach.
        apart: ids of objects whose own tracers are none that a hook closes over.

    Attributes:
        operands: the tracers, each once.
        places: (the slot, what to put there) for slots that are filled in place at each run.
    """

    def __init__(self, root: Any, walk: Walk, apart: frozenset[int] = frozenset()):
        self.operands: list[Any] = []
        self.places: list[tuple[Callable[[], Leaf], Make]] = []
        self._walk = walk
        self._apart = apart
        self._index: dict[int, int] = {}
        self._makes: dict[int, Make] = {}
        self._copied: set[int] = set()  # ids of objects whose slots need no filling in place
        self._attributes: dict[int, list[Container]] = {}
        for container in walk.containers:
            if container.kind in ("attrs", "slots") and not container.weak:
                self._attributes.setdefault(id(container.obj), []).append(container)
        self._alive = [root]  # ids stay their own
        self._leading = self._find(root)

    def _find(self, root: Any) -> set[int]:
        """Ids of the objects that lead to a tracer."""
        parents: dict[int, list[int]] = {}
        seen, work, rest = {id(root)}, deque([root]), []
        while work:
            obj = work.popleft()
            for child in self._children(obj):
                parents.setdefault(id(child), []).append(id(obj))
                if id(child) in seen:
                    continue
                seen.add(id(child))
                self._alive.append(child)
                if isinstance(child, _compat.Tracer):
                    rest.append(id(child))
                elif isinstance(child, types.CellType) or self._walk.knows(child):
                    work.append(child)
        found = set(rest)
        while rest:
            new = set(parents.get(rest.pop(), ())) - found
            found |= new
            rest.extend(new)
        return found

    def _children(self, obj: Any) -> list[Any]:
        """What an object holds that may lead to a tracer."""
        held = self._held(obj)
        return [item for item in held if not isinstance(item, _compat.Tracer)] if id(obj) in self._apart else held

    def _held(self, obj: Any) -> list[Any]:
        """What an object holds, if it is of a kind that can be copied."""
        if isinstance(obj, types.FunctionType):
            named = [*(obj.__kwdefaults__ or {}).values(), *obj.__dict__.values()]
            return [*(obj.__closure__ or ()), *(obj.__defaults__ or ()), *named]
        if isinstance(obj, functools.partial):
            return [obj.func, *obj.args, *obj.keywords.values()]
        if isinstance(obj, types.MethodType):
            return [obj.__func__, obj.__self__]
        if _compat.is_jitted(obj):
            return [obj.__wrapped__]
        found: list[Any] = []
        if isinstance(obj, tuple):
            found += tuple.__iter__(obj)
        elif isinstance(obj, frozenset):
            found += frozenset.__iter__(obj)
        elif isinstance(obj, defaultdict):
            found.append(obj.default_factory)
        kind = "cell" if isinstance(obj, types.CellType) else builtin_kind(obj)
        if kind is not None:
            found += [value for _, value in Container(obj, kind, "").items()]
        if type(obj) not in DECLARED:
            found += [value for part in self._attributes.get(id(obj), ()) for _, value in part.items()]
        return found + without_rules(held(obj))

    def in_place(self) -> list[tuple[Callable[[], Leaf], Make]]:
        """Slots of objects that are not copied: modules, classes, what libraries keep."""
        rest = [leaf for leaf in self._walk.tracers if id(leaf.container.obj) not in self._copied | self._apart]
        return [(functools.partial(_itself, leaf._replace(value=None)), self.make(leaf.value)) for leaf in rest]

    def make(self, obj: Any) -> Make:
        """How to make what stands for an object in a run."""
        if isinstance(obj, _compat.Tracer):
            if id(obj) not in self._index:
                self._index[id(obj)] = len(self.operands)
                self.operands.append(obj)
            index = self._index[id(obj)]
            return lambda run: run.value(index)
        if id(obj) not in self._leading:
            return lambda run: obj
        key = id(obj)
        if key not in self._makes:
            how: list[Make] = []
            self._makes[key] = lambda run: run.made[key] if key in run.made else how[0](run)
            how.append(self._copy(obj, key))
        return self._makes[key]

    def _copy(self, obj: Any, key: int) -> Make:
        self._copied.add(key)
        if isinstance(obj, types.FunctionType):
            return self._function(obj, key)
        if isinstance(obj, functools.partial):
            return self._partial(obj, key)
        if isinstance(obj, types.MethodType):
            fn, owner = self.make(obj.__func__), self.make(obj.__self__)
            return lambda run: run.made.setdefault(key, types.MethodType(fn(run), owner(run)))
        if _compat.is_jitted(obj):
            # JAX keeps what it traced by the function's identity, which is another one in each run.
            inner, again = self.make(obj.__wrapped__), _compat.jit_again(obj)
            return lambda run: run.made.setdefault(key, again(inner(run)))
        if isinstance(obj, (tuple, frozenset)):
            return self._tuple(obj, key)
        kind = builtin_kind(obj)
        if kind is None and is_jaxs(obj):
            fill = copied(obj, self.make)
            return lambda run: fill(run, functools.partial(run.made.setdefault, key)) or run.made[key]
        return self._object(obj, key) if kind is None else self._container(obj, kind, key)

    def _function(self, fn: types.FunctionType, key: int) -> Make:
        self._copied |= {id(fn.__kwdefaults__), id(fn.__dict__)}
        code, scope, name = fn.__code__, fn.__globals__, fn.__name__
        about = {word: getattr(fn, word) for word in ("__qualname__", "__module__", "__doc__")}
        cells = [self._cell(cell) for cell in fn.__closure__ or ()]
        defaults = [self.make(value) for value in fn.__defaults__ or ()]
        named = {word: self.make(value) for word, value in (fn.__kwdefaults__ or {}).items()}
        # A function's attributes may be state: shared, unless they lead to a tracer.
        leads = any(id(value) in self._leading for value in fn.__dict__.values())
        attributes = {word: self.make(value) for word, value in fn.__dict__.items()} if leads else {}
        shared = None if leads else fn.__dict__

        def make_function(run: Run) -> Any:
            # The cells are filled once the function is there: it may be in one of them.
            closure = tuple(shell(run) for shell, _ in cells)
            made = run.made[key] = types.FunctionType(code, scope, name, None, closure or None)
            for word, value in about.items():
                setattr(made, word, value)
            for _, fill in cells:
                fill(run)
            made.__defaults__ = tuple(value(run) for value in defaults) or None
            made.__kwdefaults__ = {word: value(run) for word, value in named.items()} or None
            made.__dict__ = {word: value(run) for word, value in attributes.items()} if shared is None else shared
            if shared is None:
                run.keep(Container(made, "attrs", ""))
            return made

        return make_function

    def _cell(self, cell: types.CellType) -> tuple[Make, Callable[[Run], None]]:
        """(makes an empty cell, fills it); several functions may share one."""
        key = id(cell)
        if key not in self._leading:
            return lambda run: cell, lambda run: None
        self._copied.add(key)
        inside = self.make(cell.cell_contents)

        def fill(run: Run) -> None:
            container = Container(run.made[key], "cell", "")
            if container.get(None) is MISSING:
                container.put(None, HOLE)  # while what belongs here is made, which may lead back to here
                container.put(None, inside(run))
                run.keep(container)

        return lambda run: run.made.setdefault(key, types.CellType()), fill

    def _partial(self, obj: Any, key: int) -> Make:
        self._copied.add(id(obj.keywords))
        cls: Any = type(obj)
        attributes, fn = obj.__dict__, self.make(obj.func)
        args = [self.make(value) for value in obj.args]
        named = {word: self.make(value) for word, value in obj.keywords.items()}

        def make_partial(run: Run) -> Any:
            made = run.made[key] = cls.__new__(cls, _nothing)
            keywords = {word: value(run) for word, value in named.items()}
            # Past the constructor, which flattens a partial of a partial.
            made.__setstate__((fn(run), tuple(value(run) for value in args), keywords, attributes))
            run.keep(Container(made.keywords, "dict", ""))
            return made

        return make_partial

    def _tuple(self, obj: Any, key: int) -> Make:
        """A tuple or frozenset."""
        base: Any = tuple if isinstance(obj, tuple) else frozenset
        cls, items = type(obj), [self.make(item) for item in base.__iter__(obj)]
        named = {word: self.make(value) for word, value in getattr(obj, "__dict__", {}).items()}

        def make_tuple(run: Run) -> Any:
            made = run.made[key] = base.__new__(cls, [item(run) for item in items])
            for word, value in named.items():
                made.__dict__[word] = value(run)
            if hasattr(made, "__dict__"):
                run.keep(Container(made, "attrs", ""))
            return made

        return make_tuple

    def _container(self, obj: Any, kind: str, key: int) -> Make:
        """A list, dict, set or deque; of a subclass, with its attributes."""
        base, cls = built_in(obj), type(obj)
        first = ((), obj.maxlen) if kind == "deque" else ()
        factory = self.make(obj.default_factory) if isinstance(obj, defaultdict) else None
        parts = [
            (part.kind, part.names, [(None if part.whole else slot, self.make(value)) for slot, value in part.items()])
            for part in _slots(obj, kind)
        ]

        def make_container(run: Run) -> Any:
            made = run.made[key] = base.__new__(cls)
            base.__init__(made, *first)
            if factory is not None:
                made.default_factory = factory(run)
            for where, names, slots in parts:
                part = Container(made, where, "", names)
                if part.whole:
                    part.replace([value(run) for _, value in slots])
                else:
                    for slot, value in slots:
                        part.put(slot, value(run))
            for part in _slots(made, kind):
                run.keep(part)
            return made

        return make_container

    def _object(self, obj: Any, key: int) -> Make:
        """An object: itself as long as it is alive, and a copy that is kept from run to run afterwards."""
        twin = bare(obj)()
        try:
            original: Callable[[], Any] = weakref.ref(obj)
        except TypeError:
            original = _nothing

        def present() -> Any:
            return twin if (found := original()) is None else found

        used = {(part.kind, slot) for part in self._attributes[key] for slot, _ in part.items()}
        others: list[Container] = []
        for part in attributes_of(obj):
            names = set()
            for slot, value in part.items():
                leads = id(value) in self._leading
                if leads and (part.kind, slot) in used:
                    path = f"{type(obj).__name__}.{slot}"
                    self.places.append((functools.partial(_slot, present, part.kind, slot, path), self.make(value)))
                else:
                    names.add(slot)
                Container(twin, part.kind, "").put(slot, HOLE if leads or isinstance(value, _compat.Tracer) else value)
            others.append(Container(twin, part.kind, "", names))

        def make_object(run: Run) -> Any:
            if original is _nothing:  # others may look at it, and we could not know
                for part in others:
                    run.keep(part)
            made = run.made[key] = present()
            return made

        return make_object


def _slots(obj: Any, kind: str) -> list[Container]:
    """All that an object holds which is, or extends, a built-in container of that kind."""
    return [Container(obj, kind, ""), *attributes_of(obj)]


def _slot(owner: Callable[[], Any], kind: str, slot: str, path: str) -> Leaf:
    return Leaf(Container(owner(), kind, ""), slot, path, None)


def _itself(leaf: Leaf) -> Leaf:
    return leaf


def _nothing() -> None:
    """What a partial is made of at first; and what is found of an object that cannot be referred to weakly."""
