"""Python state while hooks are traced: swapped for symbols, compared, restored; and written after each run.

`Lift` swaps the lifted slots of a `Walk` in place, lets the hooks run, and restores every container in `finally`. What
the hooks wrote is a `Write` per slot, whose value is a template over the graph's outputs; `commit` applies the writes
to the real objects after the compiled graph ran: all of them, or none.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jhop import _compat
from jhop._append import AppendList
from jhop._banned import label_of
from jhop._classes import is_opaque
from jhop._container import MISSING, Container, builtin_kind, put_attribute
from jhop._errors import Unsupported, last_resort
from jhop._late import Late
from jhop._names import slot_names
from jhop._scalar import Scalar
from jhop._template import Filling, plain
from jhop._walk import Walk
from jhop._watched import refusing
from jhop._wording import in_words

# One trace at a time: while hooks are traced, their objects hold symbols that another thread must not see.
LOCK = threading.RLock()


# Functions that read a list from C, past its methods: `AppendList` would not notice.
_READERS = """join heappush heappop heapify heapreplace heappushpop merge nlargest nsmallest array asarray stack
concatenate dumps dump fromiter pack type""".split()

APPEND: Any = object()  # the key of a write that appends to a list
WHOLE: Any = object()  # the key of one that gives a list, set or deque other contents; its value has them all

FILL: Any = object()  # in place of the key of one that gives a NumPy array other content

_PLAIN = frozenset({int, float, bool, str, type(None), Scalar, Late})
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinMethodType)
_NOT_MADE = (jax.Array, np.ndarray, AppendList, *_FUNCTIONS, types.ModuleType, type)


def _containers_of(value: Any, path: str) -> list[Container]:
    """The containers of an object that a hook made."""
    if is_opaque(type(value)):
        return []
    if (kind := builtin_kind(value)) is not None:
        return [Container(value, kind, path)]
    found = [Container(value, "attrs", path)] if isinstance(getattr(value, "__dict__", None), dict) else []
    slots = slot_names(type(value))
    return [*found, Container(value, "slots", path, set(slots))] if slots else found


class Write(NamedTuple):
    """A slot that the hooks changed, or `APPEND`, or `WHOLE`. The value is MISSING where the slot is gone."""

    container: Container
    key: Any
    value: Any

    def where(self) -> str:
        """Python source that reaches what was written."""
        whole = self.key is APPEND or self.key is WHOLE
        return self.container.path if whole else self.container.path_of(plain(self.key))


class Mark(NamedTuple):
    """What one container held at some moment; for a tuple, `obj` is the tuple."""

    container: Container
    stand_in: AppendList | None
    items: list[tuple[Any, Any]]
    reads: int
    obj: Any = None


class Lift:
    """Swaps lifted slots for symbols, and afterwards tells what was written.

    Use inside `LOCK`, as a context manager. `symbols[i]` stands for `walk.leaves[i]`.
    """

    def __init__(self, walk: Walk, symbols: list[Any]):
        self.walk = walk
        self._symbols = symbols
        self._snapshots: list[tuple[Container, list[tuple[Any, Any]]]] = []
        self._placed: list[list[tuple[Any, Any]]] = []
        self._lists: dict[int, AppendList] = {}  # by id of the list that each stands for
        self._factories: dict[int, Any] = {}  # by id of a defaultdict
        self._new: dict[int, list[Container]] = {}  # by id of an object that a hook made

    def __enter__(self) -> Lift:
        self._snapshots = [(container, container.items()) for container in self.walk.containers]
        try:
            for leaf, symbol in zip(self.walk.leaves, self._symbols, strict=True):
                leaf.container.put(leaf.key, symbol)
            self._place_lists()
            self._place_factories()
            self._placed = [container.items() for container in self.walk.containers]
        except BaseException:
            self.__exit__()
            raise
        return self

    def _place_lists(self) -> None:
        """Puts a list that tells of reads wherever a slot holds a list."""
        lists = {id(c.obj): c for c in self.walk.containers if c.kind == "list" and type(c.obj) is list}
        for pinned in self.walk.pinned:
            lists.pop(pinned, None)
        if self.walk.mentions(*_READERS):
            return
        # The innermost first, so that what holds a list is copied with the list's stand-in in it.
        for slot in self.walk.fixed:
            if slot.container.kind in ("set", "partial", "defaults"):  # tuples, as far as the hook can tell
                lists.pop(id(slot.value), None)
        for slot in reversed(self.walk.fixed):
            found = lists.get(id(slot.value))
            if found is None:
                continue
            stand_in = self._lists.get(id(slot.value))
            if stand_in is None:
                stand_in = self._lists[id(slot.value)] = AppendList(slot.value, list(slot.value))
            slot.container.put(slot.key, stand_in)
            if id(slot.container.obj) in self._lists:  # copied before: a list leads back to itself
                list.__setitem__(self._lists[id(slot.container.obj)], slot.key, stand_in)

    def _place_factories(self) -> None:
        """Has the factories of defaultdicts refuse to do what they may not: nobody would see them called."""
        for obj, name, value in self.walk.attributes:
            if name == "default_factory" and (label := label_of(value)) is not None:
                self._factories[id(obj)] = refusing(label, value)
                put_attribute(obj, name, self._factories[id(obj)])

    def mark(self, containers: list[Container] | None = None) -> list[Mark]:
        """What every container holds now, those that hooks made included, or each of some.

        For `changes` and `back_to`.
        """
        if containers is not None:
            return [self._mark(container) for container in containers]
        marks = [self._mark(container) for container in self.walk.containers]
        met = set[int]()
        for mark in marks:  # which grows
            for key, value in mark.items:
                if type(value) not in _PLAIN:
                    marks += map(self._mark, self._made(value, mark.container, key, met))
        # After what holds them, which is put back first.
        marks += [self._mark(record) for record in self.walk.records if self._holds_tuple(record)]
        return marks

    def _mark(self, container: Container) -> Mark:
        stand_in = self._lists.get(id(container.obj)) if container.kind == "list" else None
        items = container.items() if stand_in is None else list(enumerate(stand_in.raw()))
        obj = container.obj if container.kind == "tuple" else None
        return Mark(container, stand_in, items, 0 if stand_in is None else stand_in.reads, obj)

    def _holds_tuple(self, record: Container) -> bool:
        """Whether a tuple is where one was, and not in a list that another stands for."""
        at, key = record.place or (record, None)
        while at.place is not None:
            at = at.place[0]
        return id(at.obj) not in self._lists and isinstance(record.obj, tuple)

    def _made(self, value: Any, holder: Container, key: Any, met: set[int]) -> list[Container]:
        """The containers in a value, less those that were there before hooks ran; `met` grows by what was found."""
        if type(value) in _PLAIN or isinstance(value, _NOT_MADE) or self.walk.knows(value) or id(value) in met:
            return []
        if isinstance(value, tuple):
            return [found for item in value for found in self._made(item, holder, key, met)]
        met.add(id(value))
        if id(value) not in self._new:  # kept alive, so that ids stay their own
            self._new[id(value)] = _containers_of(value, holder.path_of(plain(key)))
        return self._new[id(value)]

    def knew(self, marks: list[Mark]) -> Callable[[Any], bool]:
        """A function that tells whether an object was there at a mark."""
        made = {id(mark.container.obj) for mark in marks}
        return lambda value: id(value) in made or self.walk.knows(value)

    def changes(self, since: list[Mark]) -> list[Write]:
        """What differs from a mark. Where a tuple took the place of another of its kind, it is the items that do."""
        found: list[Write] = []
        tuples = [mark for mark in since if mark.container.kind == "tuple"]
        other = {id(mark) for mark in tuples if not _alike(mark.obj, mark.container.obj)}
        places = [mark.container.place for mark in tuples if id(mark) not in other]
        inside = {place[0].slot(place[1]) for place in places if place is not None}
        for mark in since:
            if id(mark) in other:
                continue
            now = self._mark(mark.container)
            before, present = dict(mark.items), dict(now.items)
            if mark.container.whole and before.keys() != present.keys():
                kept = [value for _, value in now.items[: len(mark.items)]]
                grown = all(new is old for new, (_, old) in zip(kept, mark.items, strict=False))
                unread = now.stand_in is not None and now.reads == mark.reads
                appended = unread and grown and len(kept) == len(mark.items)
                added = [value for _, value in now.items[len(mark.items) :]]
                values = [value for _, value in now.items]
                found.append(Write(mark.container, APPEND, added) if appended else Write(mark.container, WHOLE, values))
                continue
            writes = _changed_slots(mark.container, before, present)
            found += [write for write in writes if not inside or write.container.slot(write.key) not in inside]
        return found

    def back_to(self, marks: list[Mark]) -> None:
        """Puts every container back to what it held at a mark."""
        for mark in marks:
            if mark.stand_in is None:
                mark.container.restore(mark.items)
            else:
                list.__setitem__(mark.stand_in, slice(None), [value for _, value in mark.items])

    def held_now(self, container: Container, key: Any) -> Any:
        """What a slot holds while hooks run; MISSING where it is gone."""
        stand_in = self._lists.get(id(container.obj)) if container.kind == "list" else None
        return container.get(key) if stand_in is None else dict(enumerate(stand_in.raw())).get(key, MISSING)

    def put(self, container: Container, key: Any, value: Any) -> None:
        """Writes as a hook would what `Write` says."""
        stand_in = self._lists.get(id(container.obj)) if container.kind == "list" else None
        if key is APPEND:
            list.extend(container.obj if stand_in is None else stand_in, value)
        elif key is WHOLE and stand_in is None:
            container.replace(value)
        elif key is WHOLE and stand_in is not None:
            stand_in[:] = value
        elif value is MISSING:
            container.put_back(key, MISSING)
        elif stand_in is not None:
            stand_in[key] = value  # more than appending
        else:
            container.put(key, value)

    def untouched(self) -> list[Container]:
        """Lists that hooks did not read: at most they appended to them."""
        return [
            container
            for container in self.walk.containers
            if id(container.obj) in self._lists and not self._lists[id(container.obj)].reads
        ]

    def __exit__(self, *exc_info: object) -> None:
        for obj, name, value in self._replaced():
            put_attribute(obj, name, value)
        for container, snapshot in self._snapshots:
            container.restore(snapshot)

    def _replaced(self) -> list[tuple[Any, str, Any]]:
        """(object, name, value before) for attributes that are no slots, such as `__class__`, and differ."""
        return [found for found in self.walk.attributes if getattr(*found[:2], MISSING) is not found[2]]

    def _dropped(self) -> list[Any]:
        """What slots held before hooks ran, hold no longer, and weak references refer to."""
        weak = {id(found): found for reference, _ in self.walk.alive if (found := reference()) is not None}
        if not weak:
            return []
        held = {id(value) for items in self._placed for _, value in items}
        now = {id(value) for mark in self.mark() for _, value in mark.items}
        return [value for key, value in weak.items() if key in held - now]

    def held(self) -> dict[tuple[int, str], dict[Any, Any]]:
        """What containers held before hooks ran, by id and kind."""
        return {(id(container.obj), container.kind): dict(items) for container, items in self._snapshots}

    def writes(self) -> Iterator[Write]:
        """The slots that differ from what was swapped in, containers in order of meeting.

        Raises:
            Unsupported: hooks replaced what is no slot, such as the class of an object.
        """
        for obj, name, _ in self._replaced():
            if id(obj) in self._factories and obj.default_factory is self._factories[id(obj)]:
                continue
            raise Unsupported(
                f"a hook replaces `{name}` of {in_words(obj)}, which is part of what is compiled. Keep what changes in "
                f"an attribute that the code reads, or {last_resort()}."
            )
        for value in self._dropped():
            raise Unsupported(
                f"a hook puts something else where {in_words(value)} was, which hooks reach by a weak reference too: "
                "while they are traced, it does not go away. Keep the object and change what is in it, or "
                f"{last_resort()}."
            )
        for container, before in zip(self.walk.containers, self._placed, strict=True):
            now = container.items()
            stand_in = self._lists.get(id(container.obj)) if container.kind == "list" else None
            if stand_in is not None:
                added = stand_in.appended()
                if added:
                    yield Write(container, APPEND, added)
                if added is not None:
                    continue
                now = list(enumerate(stand_in.raw()))
            if container.whole:
                same = len(now) == len(before) and all(
                    value is old for (_, value), (_, old) in zip(now, before, strict=True)
                )
                if not same:
                    yield Write(container, WHOLE, [value for _, value in now])
                continue
            yield from _changed_slots(container, dict(before), dict(now))


def _alike(one: Any, other: Any) -> bool:
    return isinstance(one, tuple) and type(one) is type(other) and len(one) == len(other)


def _changed_slots(container: Container, before: dict[Any, Any], now: dict[Any, Any]) -> Iterator[Write]:
    kept = [key for key in before if key in now]
    if container.ordered and kept != list(now)[: len(kept)]:
        for key in before:  # put in another order: written anew, from first to last
            yield Write(container, key, MISSING)
        before = {}
    for key, value in now.items():
        if before.get(key, MISSING) is not value:
            yield Write(container, key, value)
    for key in before:
        if key not in now:
            yield Write(container, key, MISSING)


def commit(writes: list[Write]) -> None:
    """Writes final values to the real objects; an error puts every object back and is raised again."""
    done: list[tuple[Container, Any, Any]] = []
    try:
        for container, key, value in writes:
            if key is APPEND:
                done.append((container, APPEND, len(container.obj)))
                container.obj.extend(value)
                continue
            if key is WHOLE:
                done.append((container, WHOLE, [item for _, item in container.items()]))
                container.replace(value)
                continue
            old = container.get(key)
            if type(value) is Filling:
                before = old.copy()
                old[...] = value.content  # which may be read-only
                done.append((container, FILL, (old, before)))
                continue
            done.append((container, key, old))
            if value is MISSING:
                container.remove(key)
            else:
                container.put(key, value)
    except BaseException:
        for container, key, old in reversed(done):
            if key is APPEND:
                del container.obj[old:]
            elif key is WHOLE:
                container.replace(old)
            elif key is FILL:
                old[0][...] = old[1]
            else:
                container.put_back(key, old)
        raise


def explain_leak(where: str, value: Any) -> Unsupported:
    """The error for a value of a transformation that a hook stored."""
    if _compat.is_mapped(value):
        return Unsupported(
            f"a hook under jax.vmap writes to `{where}` what differs from example to example, and there is one such "
            "object for all of them. Write what is the same for all, such as a count, or reduce over the examples "
            "(jax.lax.psum, pmean over an axis_name) before."
        )
    return Unsupported(
        f"a hook stored a value in `{where}` from inside a JAX transformation (jit, scan, grad ...) that it called "
        "itself. Return the value from there, and store it outside."
    )
