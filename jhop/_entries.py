"""The entries of an explicit state: places in Python objects by access path, and their values after a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._container import MISSING, Container
from jhop._errors import Unsupported
from jhop._leaves import Leaf, is_number
from jhop._scalar import weak_aval
from jhop._state import APPEND, Write
from jhop._stored import may_change
from jhop._template import ONE_OUTPUT
from jhop._walk import Walk
from jhop._wording import is_plain

Place = Any  # as `Container.slot` gives it


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A place for state.

    Attributes:
        path: what the entry is called.
        container: whose slot it is, at `key`.
        first: what was there when it was found.
        number: whether that is a Python number, and not an array.
    """

    path: str
    container: Container
    key: Any
    first: Any

    @property
    def number(self) -> bool:
        return is_number(self.first)

    @property
    def place(self) -> Place:
        return self.container.slot(self.key)

    def get(self) -> Any:
        return self.container.get(self.key)

    def put(self, value: Any) -> None:
        self.container.put(self.key, value)

    def start(self) -> Any:
        """What a state begins with here: a copy, which may be donated."""
        return self.first if self.number else self.first.copy()

    def kind(self) -> str:
        return f"a Python {type(self.first).__name__}" if self.number else _array_kind(jax.typeof(self.first))

    def fault(self, value: Any) -> str | None:
        """What a value is, in words, if it does not fit here."""
        if is_number(value):
            return None if self.number else f"the number {value!r}"
        if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
            return f"a {type(value).__name__}"
        if self.number:
            number = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
            return None if number and value.shape == () else _array_kind(value)
        aval, dtype = jax.typeof(self.first), jax.dtypes.canonicalize_dtype(value.dtype, allow_extended_dtype=True)
        return None if (value.shape, dtype) == (aval.shape, aval.dtype) else _array_kind(value)


def entries_of(walk: Walk) -> list[Entry]:
    """The entries for what a walk met: all arrays, and the numbers in places that code may write."""
    changes = may_change(walk)
    leaves = [leaf for leaf in walk.leaves if not is_number(leaf.value) or changes(leaf.container, leaf.key)]
    taken: dict[str, int] = {}
    return [Entry(_unlike(leaf, taken), leaf.container, leaf.key, leaf.value) for leaf in leaves]


def _unlike(leaf: Leaf, taken: dict[str, int]) -> str:
    """A path unlike those `taken`: globals of two modules may have one."""
    taken[leaf.path] = count = taken.get(leaf.path, 0) + 1
    return leaf.path if count == 1 else f"{leaf.path}#{count}"


class NewState:
    """The state after a step: what was given, with what hooks wrote over it.

    Args:
        entries: the places.
        given: a value for each.
        known: containers as the function reaches them, by id of the object and kind, for messages.
    """

    def __init__(self, entries: Sequence[Entry], given: Sequence[Any], known: dict[tuple[int, str], Container]):
        self._known = known
        self._entries = {entry.place: entry for entry in entries}
        self._given = {entry.place: value for entry, value in zip(entries, given, strict=True)}
        self._written: dict[Place, Any] = {}
        self._paths: dict[Place, str] = {}

    def write(self, writes: Sequence[Write], outs: Sequence[Any]) -> None:
        """Takes over what hooks wrote.

        Args:
            writes: slots, with templates as values.
            outs: the graph's outputs.

        Raises:
            Unsupported: a write changes what there is, or is to a place without an entry.
        """
        for container, key, template in writes:
            named = self._known.get((id(container.obj), container.kind), container)
            if key is APPEND:
                raise _refusal(named.path, "appends to a list")
            if template is MISSING:  # also where it comes back: in another order
                raise _refusal(named.path_of(key), "takes away what was there")
            for at, part in _parts(named, template) if container.whole else [(key, template)]:
                self._note(named, at, part)
        for place, template in self._written.items():
            self._written[place] = self._fitting(place, self._paths[place], template, outs)

    def _note(self, container: Container, key: Any, template: Any) -> None:
        """Notes what is written to a slot; of something that takes the place of its like, what is in it."""
        place = container.slot(key)
        if place not in self._entries:
            now = container.get(key)
            if template[0] == "const" and is_plain(now) and type(template[1]) is type(now) and template[1] == now:
                return
            inside = _inside(container, key, now, template)
            if inside is not None:
                for part in inside:
                    self._note(*part)
                return
        self._written[place], self._paths[place] = template, container.path_of(key)

    def _fitting(self, place: Place, path: str, template: Any, outs: Sequence[Any]) -> Any:
        entry = self._entries.get(place)
        kind, content = template[0], template[1]
        if entry is None:
            if self._is_setting(place):
                raise _refusal(
                    path, "changes a number of which jhop saw no code that stores it, and took for a setting (an array "
                    "there would be state)"
                )  # fmt: skip
            what = type(content).__name__ if kind in ("const", "copy") else kind
            raise _refusal(path, f"puts a {what} where there was none")
        value = content if kind == "const" else outs[content] if kind in ONE_OUTPUT else template
        if not is_number(value) and not isinstance(value, (jax.Array, np.ndarray, np.generic)):
            raise _refusal(path, f"puts a {type(value).__name__ if value is not template else kind} there")
        return _like(entry, value, self._given[place])

    def _is_setting(self, place: Place) -> bool:
        container = self._known.get(place[:2]) if len(place) == 3 else None
        return container is not None and is_number(container.get(place[2]))

    def values(self) -> dict[str, Any]:
        """The new state."""
        return {
            entry.path: self._written.get(place, self._given[place]) for place, entry in self._entries.items()
        }


def _inside(container: Container, key: Any, now: Any, template: Any) -> list[tuple[Container, Any, Any]] | None:
    """The slots of what is in a slot now, with the parts of a template that is of the same make; None for another."""
    kind, parts, path = template[0], template[1], container.path_of(key)
    cls = template[2] if len(template) > 2 else {"tuple": tuple, "list": list}.get(kind)
    if type(now) is not cls or kind in ("number", "array"):
        return None
    if kind in ("dict", "object"):
        table = now if kind == "dict" else getattr(now, "__dict__", {})
        if kind == "dict" and [*table] != [name for name, _ in parts]:
            return None
        own, slots = Container(now, "dict" if kind == "dict" else "attrs", path), Container(now, "slots", path)
        return [(own if name in table else slots, name, part) for name, part in parts]
    if len(parts) != len(now):
        return None
    place = (container, key) if isinstance(now, tuple) else None
    own = Container(now, "tuple" if isinstance(now, tuple) else kind, path, place=place)
    return [(own, index, part) for index, part in enumerate(parts)]


def _parts(container: Container, template: Any) -> list[tuple[int, Any]]:
    """(index, template) for the items of a list that is written as a whole, and that differ from what is there."""
    now = [item for _, item in container.items()]
    if container.kind == "set":
        raise _refusal(container.path, f"changes what is in a {container.kind}")
    parts = template[1]
    if len(parts) != len(now):
        raise _refusal(container.path, f"makes {len(parts)} items of {len(now)}")
    pairs = enumerate(zip(parts, now, strict=True))
    return [(i, part) for i, (part, old) in pairs if part[0] != "const" or part[1] is not old]


def _like(entry: Entry, value: Any, given: Any) -> Any:
    """A new value as one that a loop can carry in place of the one that was given."""
    path = entry.path
    if is_number(given):
        if not is_number(value) and value.shape != ():
            raise _refusal(path, f"makes {_array_kind(value)} of a number")
        return value
    aval = jax.typeof(given)
    if type(value) is int and jnp.issubdtype(aval.dtype, jnp.integer):
        info = jnp.iinfo(aval.dtype)
        if not info.min <= value <= info.max:
            raise Unsupported(
                f"jhop.functionalize: a hook writes the int {value} to `{path}`, which is {_array_kind(given)} in this "
                "state. Turn x64 on (JAX_ENABLE_X64=1), or keep it as a float."
            )
    found = weak_aval(type(value)) if is_number(value) else jax.typeof(value)
    # A number is one of any size; what is weakly typed takes the dtype of what it meets.
    converts = (entry.number or found.weak_type) and _rank(found.dtype) <= _rank(aval.dtype)
    if found.shape != aval.shape or not (found.dtype == aval.dtype or converts):
        raise _refusal(path, f"makes {_array_kind(found)} of {_array_kind(aval)}")
    value = jax.lax.convert_element_type(value, aval.dtype)
    if isinstance(given, (np.ndarray, np.generic)):
        return value if isinstance(value, _compat.Tracer) else np.array(value)
    return _compat.with_weak_type(value, aval.weak_type)


def _rank(dtype: Any) -> int:
    """Numbers of a kind can be had as those of a higher one."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next((i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind)), -1)


def _array_kind(value: Any) -> str:
    return f"an array {value.dtype}{list(value.shape)}"


def _refusal(path: str, what: str) -> Unsupported:
    return Unsupported(
        f"jhop.functionalize: a hook changes what state there is: at `{path}` it {what}. A state has the same entries "
        "after each step, numbers and arrays of one shape and dtype. Before functionalize is called, put there what "
        "will be there (jnp.zeros(shape, dtype) for an array), keep flags as ints, and logs in an array of fixed size."
    )
