"""Values that hooks stored, as templates that are filled with each run's outputs.

A template is a tuple whose first item is its kind:

- ("number", i, type) and ("array", i): the i-th output of the graph;
- ("numpy", i): the same as a NumPy array, where one was before; ("filled", i): as the content of that one;
- ("choice", i, table): the item of a table at the place which the i-th output says;
- ("list" | "set" | "tuple", parts), ("deque", parts, maxlen), ("namedtuple", parts, class), ("dict", pairs, class),
  ("object", pairs, class): things that the hook made, made anew at each run;
- ("copy", value, known): something mutable without traced content that cannot be made, or is in itself: each run gets
  a copy of its own, but of what was there before (`known`);
- ("const", value): what was there before, and what cannot change.
"""

from __future__ import annotations

import copy
import enum
import gc
import types
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jhop import _compat
from jhop._append import AppendList
from jhop._classes import is_opaque, keeps_all_in_attributes
from jhop._errors import Unsupported, last_resort
from jhop._late import at_place, is_late
from jhop._library import attributes_of
from jhop._names import slot_member
from jhop._scalar import is_scalar
from jhop._walk import MAX_CONTAINERS

_SHARED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, np.dtype)
_FROZEN = (int, float, complex, str, bytes, bool, type(None), range, enum.Enum, np.generic, frozenset)
_DICTS = (dict, OrderedDict, Counter)
_SEQUENCES = {"list": list, "tuple": tuple, "set": set}
NUMBER_TYPES = (bool, int, float, complex)
ONE_OUTPUT = ("number", "array", "numpy", "filled")
_OUTPUTS = (*ONE_OUTPUT, "choice")


class Filling(NamedTuple):
    """What goes into the NumPy array that a slot holds."""

    content: np.ndarray


class Templates:
    """Makes templates of the values that one trace stored.

    Args:
        known: tells whether an object was there before the hooks ran; such objects stay themselves.
        note_output: hands out the number of the output that a tracer becomes.
        inside: whether hooks go on to run afterwards, for which lists have stand-ins that tell of reads.
    """

    def __init__(
        self, known: Callable[[Any], bool], note_output: Callable[[Any, str], int], *, inside: bool = False
    ):
        self._inside = inside
        self._known = known
        self._note = note_output
        self._made: dict[Any, Any] = {}  # by id: one object that is stored twice stays one
        self._open: set[int] = set()
        self.shared: list[Any] = []  # objects that were stored as they are, and what copies are made of
        self._kept: list[Any] = []  # what was made a template of, alive, so that ids stay their own

    def make(self, value: Any, where: str) -> Any:
        """The template of a value stored at `where`.

        Raises:
            Unsupported: it holds traced content in a place that cannot be filled anew.
        """
        if is_scalar(value):
            return ("number", self._note(value, where), value.__class__)
        if is_late(value):
            return ("choice", self._note(value._number, where), list(value._table))
        if isinstance(value, _compat.Tracer):
            return ("array", self._note(value, where))
        if isinstance(value, AppendList):
            self.shared.append(value.original)
            return ("const", value if self._inside else value.original)
        if self._known(value):
            self.shared.append(value)
            return ("const", value)
        if isinstance(value, weakref.ref):
            self._check_target(value, where)
            self.shared.append(value)
            return ("const", value)
        if isinstance(value, _FROZEN) and not self._look_into(value).symbol:
            self.shared.append(value)
            return ("const", value)
        if id(value) in self._made:
            return self._made[id(value)]
        if id(value) in self._open:
            raise Unsupported(f"a hook stored an object in `{where}` that contains itself; jhop cannot make it anew.")
        self._open.add(id(value))
        self._kept.append(value)
        try:
            made = self._made[id(value)] = self._make_new(value, where)
        finally:
            self._open.discard(id(value))
        return made

    def key(self, key: Any, where: str) -> Any:
        """A key of what is stored at `where`, without lifted numbers.

        Raises:
            Unsupported: it refers weakly to what the hook made.
        """
        if isinstance(key, weakref.ref):  # of a WeakKeyDictionary
            self._check_target(key, where)
            self.shared.append(key)
        return plain(key)

    def _check_target(self, ref: weakref.ref[Any], where: str) -> None:
        target = ref()
        ours = is_opaque(type(target))  # such as the list that a handle takes its hook from
        if target is not None and not ours and not self._known(target):
            raise Unsupported(
                f"a hook keeps a weak reference in `{where}` to a {type(target).__name__} that it made, which is made "
                f"anew after each run. Make that object outside of the hook, or {last_resort()}."
            )

    def _make_new(self, value: Any, where: str) -> Any:
        def parts_of(items: Any) -> list[Any]:
            return [self.make(item, where) for item in items]

        cls = type(value)
        if cls in _SEQUENCES.values():
            return (cls.__name__, parts_of(value))
        if cls is deque:
            return ("deque", parts_of(value), value.maxlen)
        if isinstance(value, tuple) and hasattr(cls, "_make"):
            return ("namedtuple", parts_of(value), cls)
        if cls in _DICTS:
            keys = [self.key(key, where) for key in value]
            return ("dict", list(zip(keys, parts_of(value.values()), strict=True)), cls)
        seen = self._look_into(value)
        held = [pair for container in attributes_of(value) for pair in container.items()]
        makes = held and keeps_all_in_attributes(cls)
        if not seen.symbol and not (makes and not seen.itself):
            self.shared.append(value)
            return ("const", value) if isinstance(value, _SHARED) else ("copy", value, seen.known)
        if not makes:
            raise Unsupported(
                f"a hook stored traced content in `{where}` inside a {cls.__name__}, which jhop cannot make anew after "
                "each run. Use a plain list, dict, tuple or an object of a class of your own."
            )
        names, values = zip(*held, strict=True)
        return ("object", list(zip(names, parts_of(values), strict=True)), cls)

    def _look_into(self, value: Any) -> _Inside:
        """What is inside a value, as far as it is new."""
        seen: dict[int, Any] = {}  # alive, so that ids stay their own
        known: list[Any] = []
        work, itself = [value], False
        while work and len(seen) < MAX_CONTAINERS:
            item = work.pop()
            if is_scalar(item) or is_late(item) or isinstance(item, _compat.Tracer):
                return _Inside(True, itself, known)
            itself = itself or (item is value and bool(seen))
            if id(item) in seen or isinstance(item, (type, types.ModuleType, str, bytes, int, float, np.dtype)):
                continue
            seen[id(item)] = item
            if self._known(item):
                known.append(item)
            elif isinstance(item, types.FunctionType):
                work += [*(item.__closure__ or ()), *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
            elif isinstance(item, np.ndarray):
                work += item.flat if item.dtype.hasobject else ()
            else:
                work += gc.get_referents(item)
        return _Inside(False, itself, known)


class _Inside(NamedTuple):
    """What was found in a value: whether a traced number or array, whether the value itself, what was there before."""

    symbol: bool
    itself: bool
    known: list[Any]


def plain(key: Any) -> Any:
    """A dict key that was a lifted number, as that number: hashing it specialised the graph on it."""
    if is_scalar(key):
        return key._value
    return tuple(map(plain, key)) if type(key) is tuple else key


def rebuild(spec: Any, outs: list[Any], made: dict[Any, Any]) -> Any:
    """The value that a template stands for in one run.

    Args:
        outs: the graph's outputs.
        made: by id of a template, what was made of it in this run: one object stored twice stays one.
    """
    kind, content = spec[0], spec[1]
    if kind == "const":
        return content
    if kind == "number":
        value = outs[content]
        # A backend that compiled the whole graph gives an array; the state is a Python number all the same.
        return value if type(value) in NUMBER_TYPES or is_scalar(value) else spec[2](value)
    if kind == "array":
        return outs[content]
    if kind == "numpy":
        return np.array(outs[content])
    if kind == "filled":
        return Filling(np.asarray(outs[content]))
    if kind == "choice":
        return at_place(spec[2], outs[content])
    if id(spec) not in made:
        made[id(spec)] = _rebuild_new(spec, outs, made)
    return made[id(spec)]


def _rebuild_new(spec: Any, outs: list[Any], made: dict[Any, Any]) -> Any:
    kind, content = spec[0], spec[1]
    if kind == "copy":
        memo = made.setdefault("copied", {})  # one for all: what is in two of them stays one
        memo.update((id(item), item) for item in spec[2])
        return copy.deepcopy(content, memo)
    if kind in ("dict", "object"):
        pairs = {key: rebuild(item, outs, made) for key, item in content}
        if kind == "dict":
            return spec[2](pairs)
        result = types.SimpleNamespace() if spec[2] is types.SimpleNamespace else object.__new__(spec[2])
        for name, value in pairs.items():
            member = slot_member(spec[2], name)
            if member is None:
                result.__dict__[name] = value
            else:
                member.__set__(result, value)
        return result
    values = [rebuild(item, outs, made) for item in content]
    if kind == "deque":
        return deque(values, maxlen=spec[2])
    return spec[2]._make(values) if kind == "namedtuple" else _SEQUENCES[kind](values)


def map_outputs(spec: Any, change: Callable[[int], int], done: dict[int, Any] | None = None) -> Any:
    """A template whose outputs are numbered otherwise."""
    done = {} if done is None else done
    kind, content = spec[0], spec[1]
    if kind in _OUTPUTS:
        return (kind, change(content), *spec[2:])
    if id(spec) not in done:
        done[id(spec)] = with_parts(spec, [map_outputs(item, change, done) for _, item in parts_of(spec)])
    return done[id(spec)]


def parts_of(spec: Any) -> list[tuple[Any, Any]]:
    """What a template consists of: (key, template)."""
    if spec[0] in _OUTPUTS or spec[0] in ("const", "copy"):
        return []
    return list(spec[1] if spec[0] in ("dict", "object") else enumerate(spec[1]))


def with_parts(spec: Any, parts: list[Any]) -> Any:
    """A template with others in place of its parts, in order; itself if they are the same."""
    before = parts_of(spec)
    if all(new is old for new, (_, old) in zip(parts, before, strict=True)):
        return spec
    content = [(key, new) for new, (key, _) in zip(parts, before, strict=True)]
    return (spec[0], content if spec[0] in ("dict", "object") else parts, *spec[2:])


def outputs_in(spec: Any) -> list[int]:
    """The outputs that a template uses."""
    found: list[int] = []

    def note(index: int) -> int:
        found.append(index)
        return index

    map_outputs(spec, note)
    return found
