"""Which slots the code that a `Walk` met may write, read off that code without running it.

The answer is on the safe side: an attribute counts wherever code stores to one of that name, an item of a list or dict
wherever code stores to items at all. What constructors do does not count: it is done by the time anybody walks.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from typing import Any

from jhop._container import Container
from jhop._names import CONSTRUCTORS, names_in_code
from jhop._source import is_user_file, with_nested
from jhop._walk import Walk

# Code that uses one of these may write any attribute.
_ANY = frozenset("__dict__ vars setattr delattr eval exec globals __setattr__ __setstate__ __reduce__ __set__".split())
# Code that uses one of these may write items without a statement that says so.
_ITEMS = frozenset(
    """append appendleft extend extendleft insert pop popleft popitem remove clear update setdefault sort reverse rotate
    __setitem__ __delitem__ setitem delitem iconcat heappush heappop heapify heapreplace heappushpop insort shuffle
    insort_left insort_right""".split()
)
# Code that uses one of these may get hold of the class of an object.
_CLASSES = frozenset("type __class__ mro __mro__ __base__ __bases__ __subclasses__".split())
_NAMED = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"})
_SUBSCRIPTS = frozenset({"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})


def may_change(walk: Walk) -> Callable[[Container, Any], bool]:
    """A function that says of a slot of `walk` whether code may write it, or one by which its container is reached."""
    stores = may_store(walk)
    leads = {id(slot.value): (slot.container, slot.key) for slot in walk.fixed}
    answers: dict[Any, bool] = {}

    def answer(container: Container, key: Any) -> bool:
        path: list[Any] = []
        at: tuple[Container, Any] | None = (container, key)
        found = False
        while at is not None and not found:
            slot = at[0].slot(at[1])
            if slot in answers:  # also where a circle closes
                found = answers[slot]
                break
            path.append(slot)
            answers[slot] = found = stores(*at)
            at = at[0].place or leads.get(id(at[0].obj))
        answers.update(dict.fromkeys(path, found))
        return found

    return answer


def may_store(walk: Walk) -> Callable[[Container, Any], bool]:
    """A function that says of a slot of `walk` whether code that the walk met may write it."""
    functions = walk.instances(
        types.FunctionType,
        lambda fn: fn.__name__ not in CONSTRUCTORS and is_user_file(fn.__code__.co_filename),
    )
    stored: set[str] = set()
    items = anything = False
    for code in {code for fn in functions for code in with_nested([fn.__code__])}:
        anything |= not _ANY.isdisjoint(code.co_names)
        items |= not _ITEMS.isdisjoint(code.co_names)
        for instruction in dis.get_instructions(code):
            if instruction.opname in _NAMED:
                stored.add(instruction.argval)
            items |= instruction.opname in _SUBSCRIPTS
    cells = {
        id(cell)
        for fn in functions
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        if name in stored
    }

    on_class = _may_be_held(walk)

    def answer(container: Container, key: Any) -> bool:
        if container.kind == "class" and not on_class(container.obj):
            return False  # what code stores to its instances is theirs
        if container.kind == "tuple":
            return False  # but another tuple may take its place
        if container.kind == "cell":
            return id(container.obj) in cells
        holds_items = container.kind in ("dict", "list", "deque") and container.names is None  # no module's globals
        return anything or (items and holds_items) or (isinstance(key, str) and key.rpartition(".")[2] in stored)

    return answer


def _may_be_held(walk: Walk) -> Callable[[Any], bool]:
    """A function that says of a class whether code that the walk met may get hold of it, to write to it."""
    held = {id(slot.value) for slot in walk.fixed} | walk.pinned
    functions = walk.instances(types.FunctionType, lambda fn: is_user_file(fn.__code__.co_filename))
    codes = {fn.__code__ for fn in functions} - walk.generated
    asked = any(not _CLASSES.isdisjoint(names_in_code(code).attributes) for code in codes)
    given: list[Any] = walk.instances(classmethod, lambda _: True)
    given += walk.instances(type, lambda cls: issubclass(cls, type))
    return lambda cls: bool(asked or given or id(cls) in held)
