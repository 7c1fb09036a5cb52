"""Mutable Python objects as sets of slots that can be read, written and put back."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import weakref
from typing import Any

import numpy as np

from jhop._names import slot_member

MISSING: Any = object()  # what stands for the value of a slot that does not exist

# Kinds whose slots are positions: they are compared and put back as a whole.
_SEQUENCES = ("list", "deque", "set")


class Container:
    """An object whose slots a hook can read or write.

    Attributes:
        obj: the object: a dict, list, set, deque, cell, partial, function, class, instance or tuple.
        kind: "dict", "list", "deque", "set", "cell", "partial" (its positional arguments), "defaults" (of a function),
            "attrs" (an instance's `__dict__`), "slots" (its `__slots__`), "class" or "tuple" (of which a slot is
            written by putting another tuple in its place).
        path: Python source that reaches it from the hooks, e.g. `L['hooks'][0].keywords['box']`.
        names: the keys that matter, or None for all.
        weak: whether hooks reach the object through a weak reference, so that we must not keep it alive either.
        place: (container, key) of the slot whose object it is, whichever that is by now; None where it is always the
            same object.
        cls: the class of the object when the container was made; where it has a place, another's may be there by now.
    """

    __slots__ = ("_obj", "cls", "kind", "names", "path", "place", "weak")

    def __init__(
        self,
        obj: Any,
        kind: str,
        path: str,
        names: set[str] | None = None,
        *,
        weak: bool = False,
        place: tuple[Container, Any] | None = None,
    ):
        self._obj: Any = weakref.ref(obj) if weak else None if place is not None else obj
        self.cls = type(obj)
        self.place = place
        self.weak = weak
        self.kind = kind
        self.path = path
        self.names = names

    @property
    def obj(self) -> Any:
        if self.place is not None:
            return self.place[0].get(self.place[1])
        return self._obj() if self.weak else self._obj

    def let_go(self, place: tuple[Container, Any]) -> None:
        """From now on, the object is the one in that slot."""
        self._obj, self.place = None, place

    def loosen(self) -> None:
        """From now on, it does not keep the object alive."""
        self._obj, self.weak = weakref.ref(self.obj), True

    def as_of_now(self) -> Container:
        """A container that stays with the object that this one has now."""
        return self if self.place is None else Container(self.obj, self.kind, self.path, self.names)

    def slot(self, key: Any) -> Any:
        """What tells a slot from all others, now: by whatever way the object is reached that it belongs to."""
        if self.kind == "tuple":
            assert self.place is not None
            return self.place[0].slot(self.place[1]), key
        return id(self.obj), self.kind, key

    @property
    def whole(self) -> bool:
        """Whether the container is written as a whole and not slot by slot."""
        return self.kind in _SEQUENCES

    @property
    def ordered(self) -> bool:
        """Whether the order of the slots counts: hooks can go through them all."""
        return self.kind in ("dict", "attrs") and self.names is None

    def items(self) -> list[tuple[Any, Any]]:
        """The slots as they are now, restricted to `names`."""
        obj = self.obj
        if self.kind == "list":
            return list(enumerate(list.__iter__(obj)))
        if self.kind == "deque":
            return list(enumerate(collections.deque.__iter__(obj)))
        if self.kind == "tuple":
            return list(enumerate(tuple.__iter__(obj)))
        if self.kind == "set":
            return [(item, item) for item in set.__iter__(obj)]
        if self.kind == "cell":
            try:
                return [(None, obj.cell_contents)]
            except ValueError:  # an empty cell: a variable not assigned yet
                return []
        if self.kind == "partial":
            return list(enumerate(obj.args))
        if self.kind == "defaults":
            return list(enumerate(obj.__defaults__ or ()))
        if self.kind == "slots":
            found = [(name, self.get(name)) for name in sorted(self.names or ())]
            return [(name, value) for name, value in found if value is not MISSING]
        if obj is None:
            return []  # weakly held, and gone
        table = obj.__dict__ if self.kind in ("attrs", "class") else obj
        items = list(_methods(table).items(table) if isinstance(table, dict) else table.items())
        return items if self.names is None else [(name, value) for name, value in items if name in self.names]

    def get(self, key: Any) -> Any:
        """One slot, or MISSING."""
        obj = self.obj
        try:
            # Methods of the built-in classes themselves: a subclass may do anything in its own.
            if self.kind == "dict":
                return _methods(obj).get(obj, key, MISSING)
            if self.kind == "list":
                return list.__getitem__(obj, key)
            if self.kind == "deque":
                return collections.deque.__getitem__(obj, key)
            if self.kind == "tuple":
                return tuple.__getitem__(obj, key)
            if self.kind in ("attrs", "class"):
                return obj.__dict__[key]
            if self.kind == "cell":
                return obj.cell_contents
            if self.kind == "set":
                return key if set.__contains__(obj, key) else MISSING
            if self.kind == "slots":
                return self._member(key).__get__(obj)
            return (obj.args if self.kind == "partial" else obj.__defaults__)[key]
        except (KeyError, IndexError, AttributeError, ValueError, TypeError):
            return MISSING

    def put(self, key: Any, value: Any) -> None:
        """Writes one slot, past any `__setattr__` of the user's (reading went past `__getattr__` too)."""
        obj = self.obj
        if self.kind == "dict":
            _methods(obj).__setitem__(obj, key, value)
        elif self.kind == "list":
            list.__setitem__(obj, key, value)
        elif self.kind == "deque":
            collections.deque.__setitem__(obj, key, value)
        elif self.kind == "tuple":
            assert self.place is not None
            items = [value if at == key else item for at, item in self.items()]
            self.place[0].put(self.place[1], tuple.__new__(type(obj), items))
        elif self.kind == "attrs":
            obj.__dict__[key] = value
        elif self.kind == "cell":
            obj.cell_contents = value
        elif self.kind == "partial":
            args = (*obj.args[:key], value, *obj.args[key + 1 :])
            obj.__setstate__((obj.func, args, obj.keywords, obj.__dict__))
        elif self.kind == "defaults":
            obj.__defaults__ = (*obj.__defaults__[:key], value, *obj.__defaults__[key + 1 :])
        elif self.kind == "class":
            type.__setattr__(obj, key, value)
        else:
            self._member(key).__set__(obj, value)

    def remove(self, key: Any) -> None:
        """Deletes one slot."""
        obj = self.obj
        if self.kind == "dict":
            _methods(obj).__delitem__(obj, key)
        elif self.kind == "attrs":
            del obj.__dict__[key]
        elif self.kind == "cell":
            del obj.cell_contents
        elif self.kind == "class":
            type.__delattr__(obj, key)
        else:
            self._member(key).__delete__(obj)

    def _member(self, key: Any) -> Any:
        return slot_member(type(self.obj), key)

    def put_back(self, key: Any, before: Any) -> None:
        """Gives one slot what `get` said earlier: where that was MISSING, it goes."""
        if before is not MISSING:
            self.put(key, before)
        elif self.get(key) is not MISSING:
            self.remove(key)

    def replace(self, values: list[Any]) -> None:
        """Gives a container that is written as a whole its new contents."""
        if self.kind == "list":
            list.__setitem__(self.obj, slice(None), values)
        elif self.kind == "set":
            set.clear(self.obj)
            set.update(self.obj, values)
        else:
            collections.deque.clear(self.obj)
            collections.deque.extend(self.obj, values)

    def restore(self, snapshot: list[tuple[Any, Any]]) -> None:
        """Puts the slots back exactly as `items()` gave them earlier, and in that order."""
        now = self.items()
        if len(now) == len(snapshot) and all(
            key is old_key and value is old for (key, value), (old_key, old) in zip(now, snapshot, strict=True)
        ):
            return
        if self.whole:
            self.replace([value for _, value in snapshot])
            return
        before = dict(snapshot)
        if self.ordered and [key for key, _ in now] != [key for key, _ in snapshot]:
            table = self.obj if self.kind == "dict" else self.obj.__dict__
            _methods(table).clear(table)
            for key, value in snapshot:
                _methods(table).__setitem__(table, key, value)
            return
        for key, _ in now:
            if key not in before:
                self.remove(key)
        present = dict(self.items())
        for key, value in before.items():
            if present.get(key, MISSING) is not value:
                self.put(key, value)

    def path_of(self, key: Any) -> str:
        """Python source that reaches a slot from the hooks."""
        if self.kind == "cell":
            return f"{self.path}.cell_contents"
        if self.whole and not isinstance(key, int):
            return self.path
        if self.kind == "partial":
            return f"{self.path}.args[{key}]"
        if self.kind == "defaults":
            return f"{self.path}.__defaults__[{key}]"
        if self.kind == "slots" and "." in key:  # one that is hidden by another of its name
            return f"type({self.path}).{key}.__get__({self.path})"
        if self.kind in ("attrs", "slots", "class"):
            return f"{self.path}.{key}"
        if self.kind == "tuple" and hasattr(type(self.obj), "_fields"):
            return f"{self.path}.{type(self.obj)._fields[key]}"
        return f"{self.path}[{key!r}]"


MAX_BYTES = 1 << 20  # larger arrays are compared by identity alone


def contents_of(value: Any) -> Any:
    """What is in an object that has no slots, as something to compare; None for all others, and for large ones."""
    if isinstance(value, np.ndarray):
        if value.nbytes > MAX_BYTES:
            return None
        return [id(item) for item in value.flat] if value.dtype.hasobject else np.asarray(value).tobytes()
    if isinstance(value, (bytearray, memoryview, array.array)):
        return bytes(value) if len(value) <= MAX_BYTES else None
    if isinstance(value, contextvars.ContextVar):
        return (value.get(MISSING),)
    return None


def _methods(obj: Any) -> Any:
    """The built-in class whose methods work on a dict: an OrderedDict keeps its order by itself."""
    return collections.OrderedDict if isinstance(obj, collections.OrderedDict) else dict


def put_attribute(obj: Any, name: str, value: Any) -> None:
    """Gives an object another class, a function other code and the like, past any `__setattr__` of the user's."""
    if isinstance(obj, functools.partial) and name == "func":
        part: Any = obj
        part.__setstate__((value, obj.args, obj.keywords, obj.__dict__))
    else:
        (type if isinstance(obj, type) else object).__setattr__(obj, name, value)


def builtin_kind(value: Any) -> str | None:
    """The kind of a built-in mutable container, or of an instance of a subclass."""
    if isinstance(value, dict):
        return "dict"
    if isinstance(value, list):
        return "list"
    if isinstance(value, set):
        return "set"
    return "deque" if isinstance(value, collections.deque) else None
