"""State that is replaced as a whole: tuples, and dicts, lists and value objects that others of their kind succeed.

Optimizers written as functions hand back a new pytree at each step, and a hook stores it: `self.state = update(...)`.
To go by the identity of such an object would mean a trace per step. So

- numbers and arrays in a tuple are lifted like those in a list. A tuple cannot be written to: to put something in one
  of its slots is to put another tuple where it was (`Container.put`);
- once the hooks were traced, an object that is reached by one slot alone is no longer told by its identity, but by its
  type and what is in it.

That is sound where nobody can tell one object from another that is equal: nothing else that hooks reach refers to it,
its class does not compare or hash by identity, and no code asks for `id`. Guards see to it that no two such places
come to hold one object.
"""

from __future__ import annotations

import collections
import gc
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from jhop import _compat
from jhop._classes import keeps_all_in_attributes
from jhop._container import Container
from jhop._leaves import Fixed, Leaf, is_array, is_number
from jhop._stored import may_change
from jhop._walk import Walk

_HOLDERS = frozenset({"dict", "list", "deque", "cell", "partial", "defaults", "attrs", "slots", "class", "tuple"})
_MAX_SEARCHED = 10_000  # objects


def lift_tuples(walk: Walk) -> None:
    """Makes slots of the items of tuples that hold arrays, or that hooks may replace by others.

    Such tuples are no longer among what is fixed; their numbers and arrays are among the leaves.

    Raises:
        Unsupported: a NumPy array is in a tuple that cannot be lifted.
    """
    held = collections.Counter(id(slot.value) for slot in walk.fixed)
    fixed: list[Fixed] = []
    lifted: set[int] = set()
    changes: Callable[[Container, Any], bool] | None = None
    for slot in walk.fixed:
        value = slot.value
        once = _is_record(value) and held[id(value)] == walk.arrivals[id(value)] == 1
        if once and slot.container.kind in _HOLDERS and not slot.container.weak and not _holds(value, _is_tracer):
            changes = changes or may_change(walk)
            if _holds(value, is_array) or changes(slot.container, slot.key):
                lifted |= _lift(walk, slot, fixed)
                continue
        fixed.append(slot)
    walk.fixed = fixed
    walk.attributes = [found for found in walk.attributes if id(found[0]) not in lifted]
    taken = {id(leaf.value) for leaf in walk.leaves}
    for array, path, root in walk.unlifted:
        if id(array) not in taken:
            walk.refuse(
                f"a hook reads `{path}`, a NumPy array in a tuple or set that other objects hold too, or that has no "
                "place of its own. Keep it in an attribute, a list or a dict.",
                path,
                root,
            )


def _lift(walk: Walk, slot: Fixed, fixed: list[Fixed]) -> set[int]:
    """Makes slots of the items of the tuple in a slot, and of tuples in it; returns the ids of these."""
    path = slot.container.path_of(slot.key)
    record = Container(None, "tuple", path, place=(slot.container, slot.key))
    walk.records.append(record)
    walk.shapes.append(slot)
    lifted = {id(slot.value)}
    for index, item in enumerate(tuple.__iter__(slot.value)):
        if is_number(item) or is_array(item):
            walk.leaves.append(Leaf(record, index, record.path_of(index), item))
        elif _is_record(item) and walk.arrivals[id(item)] == 1:
            lifted |= _lift(walk, Fixed(record, index, item), fixed)
        else:
            fixed.append(Fixed(record, index, item))
    return lifted


def loosen(walk: Walk, stored: Iterable[Any] = ()) -> None:
    """Keeps no object alive of which hooks can see by a weak reference that it is gone.

    Args:
        walk: what they can reach.
        stored: objects that they stored somewhere as they are, weak references for one.
    """
    walk.note_weak(value for value in stored if isinstance(value, weakref.ref))
    for container in walk.containers:
        if walk.is_weak(container.obj):
            container.loosen()
    walk.attributes = [found for found in walk.attributes if found[1] != "__class__" or not walk.is_weak(found[0])]


def let_go(walk: Walk, stored: Iterable[Any]) -> None:
    """Of objects that equal ones may replace, keeps the places instead of the objects.

    To be called once the hooks were traced.

    Args:
        walk: what they can reach.
        stored: objects that they stored somewhere as they are.
    """
    if walk.mentions("id"):
        return
    parts: dict[int, list[Container]] = collections.defaultdict(list)
    for container in walk.containers:
        parts[id(container.obj)].append(container)
    held = collections.Counter(id(slot.value) for slot in walk.fixed if slot.container.kind != "tuple")
    inside = {id(slot.value) for slot in walk.fixed if slot.container.kind == "tuple"}
    found = []
    for slot in walk.fixed:
        key = id(slot.value)
        once = walk.arrivals[key] == 1 and held[key] + (key in inside) == 1
        if once and key in parts and _can_go(slot.value, parts[key]) and _can_hold(slot.container):
            found.append(slot)
    if not found:
        return
    kept = _reached(stored, {id(slot.value) for slot in found}, walk.knows)
    found = [slot for slot in found if id(slot.value) not in kept]
    gone = {id(slot.value) for slot in found}
    for slot in found:
        for container in parts[id(slot.value)]:
            container.let_go((slot.container, slot.key))
        walk.records.append(parts[id(slot.value)][0])
    walk.shapes += found
    walk.fixed = [slot for slot in walk.fixed if id(slot.value) not in gone]
    walk.attributes = [attribute for attribute in walk.attributes if id(attribute[0]) not in gone]


def _can_hold(container: Container) -> bool:
    return container.kind in _HOLDERS and not container.weak


def _can_go(value: Any, parts: list[Container]) -> bool:
    cls: Any = type(value)
    if any(part.weak for part in parts):
        return False
    if cls is dict or cls is list:
        return True
    by_value = cls.__eq__ is not object.__eq__ and cls.__hash__ is not object.__hash__
    return by_value and keeps_all_in_attributes(cls) and all(part.kind in ("attrs", "slots") for part in parts)


def _is_record(value: Any) -> bool:
    """Whether a value is a tuple, or a named tuple, with nothing in it but its items."""
    if type(value) is tuple:
        return len(value) > 0  # there is only one empty tuple
    return isinstance(value, tuple) and hasattr(type(value), "_make") and not hasattr(value, "__dict__")


def _is_tracer(value: Any) -> bool:
    return isinstance(value, _compat.Tracer)


def _holds(value: Any, what: Callable[[Any], bool]) -> bool:
    """Whether something is in a tuple, or in tuples in it."""
    if isinstance(value, tuple):
        return any(_holds(item, what) for item in tuple.__iter__(value))
    return what(value)


def _reached(values: Iterable[Any], ids: set[int], known: Callable[[Any], bool]) -> set[int]:
    """Which objects, of those with these ids, something refers to; all of them where that takes long to find out.

    What is `known` was looked at: it is passed over.
    """
    seen: dict[int, Any] = {}  # alive, so that ids stay their own
    work, found = list(values), set()
    while work:
        value = work.pop()
        if id(value) in ids:
            found.add(id(value))
        if id(value) in seen or known(value) or isinstance(value, (type, types.ModuleType)):
            continue
        if len(seen) >= _MAX_SEARCHED:
            return ids
        seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            work += [*(value.__closure__ or ()), *(value.__defaults__ or ()), value.__kwdefaults__]
        else:
            work += gc.get_referents(value)
    return found
