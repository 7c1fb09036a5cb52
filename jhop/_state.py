"""Python state that hooks can reach: found, swapped for symbols while a hook is traced, restored, written back.

`Walk` follows what a hook's code can touch: partials, closures, defaults, bound objects, the globals it names,
attributes whose names occur in reachable code, dicts, lists. Each place that holds a value is a slot (container, key):

- ints, floats and arrays are *lifted*: they become inputs of the graph;
- JAX tracers are *operands* (a hook may close over a value of the function that is being traced);
- everything else is a constant, and a guard says when it changed.

`Lift` swaps the lifted slots in place, runs the hooks, finds what they wrote, and restores every container in
`finally`. What was written is a `Write` per slot, applied to the real objects after the compiled graph ran.
"""

from __future__ import annotations

import collections
import dis
import enum
import functools
import threading
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jhop import _compat
from jhop._errors import Unsupported
from jhop._scalar import is_scalar
from jhop._source import hook_name, is_user_file

MAX_CONTAINERS = 10_000
_MISSING = object()
# Code that uses one of these can reach any attribute, so names say nothing about what it reads.
_REFLECTION = {"__dict__", "vars", "setattr", "getattr", "delattr", "eval", "exec", "globals", "asdict", "fields"}


class Container:
    """A mutable object whose slots a hook can read or write.

    Attributes:
        obj: the object: a dict, list, cell, partial, function, class, or instance.
        kind: how its slots are read and written.
        path: Python source that reaches it from the hooks, e.g. `L['hooks'][0].keywords['box']`.
        names: the keys that matter, or None for all.
    """

    __slots__ = ("kind", "names", "obj", "path")

    def __init__(self, obj: Any, kind: str, path: str, names: set[str] | None = None):
        self.obj = obj
        self.kind = kind
        self.path = path
        self.names = names

    def items(self) -> list[tuple[Any, Any]]:
        """The slots as they are now, restricted to `names`."""
        obj = self.obj
        if self.kind == "list":
            return list(enumerate(obj))
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
            return [(n, getattr(obj, n)) for n in sorted(self.names or ()) if hasattr(obj, n)]
        table = obj.__dict__ if self.kind in ("attrs", "class") else obj
        if self.names is None:
            return list(table.items())
        return [(name, value) for name, value in list(table.items()) if name in self.names]

    def get(self, key: Any) -> Any:
        """One slot, or a private marker where it does not exist."""
        obj = self.obj
        try:
            if self.kind in ("dict", "list"):
                return obj[key]
            if self.kind == "attrs":
                return obj.__dict__[key]
            if self.kind == "cell":
                return obj.cell_contents
            if self.kind == "partial":
                return obj.args[key]
            if self.kind == "defaults":
                return obj.__defaults__[key]
            return obj.__dict__[key] if self.kind == "class" else getattr(obj, key)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError):
            return _MISSING

    def put(self, key: Any, value: Any) -> None:
        """Writes one slot, past any `__setattr__` of the user's (reading went past `__getattr__` too)."""
        obj = self.obj
        if self.kind in ("dict", "list"):
            obj[key] = value
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
            object.__setattr__(obj, key, value)

    def remove(self, key: Any) -> None:
        """Deletes one slot."""
        if self.kind == "dict":
            del self.obj[key]
        elif self.kind == "attrs":
            del self.obj.__dict__[key]
        elif self.kind == "cell":
            del self.obj.cell_contents
        elif self.kind == "class":
            type.__delattr__(self.obj, key)
        else:
            object.__delattr__(self.obj, key)

    def restore(self, snapshot: list[tuple[Any, Any]]) -> None:
        """Puts the slots back exactly as `items()` gave them earlier."""
        if self.kind == "list":
            self.obj[:] = [value for _, value in snapshot]
            return
        before, now = dict(snapshot), dict(self.items())
        for key in now:
            if key not in before:
                self.remove(key)
        for key, value in before.items():
            if now.get(key, _MISSING) is not value:
                self.put(key, value)

    def path_of(self, key: Any) -> str:
        """Python source that reaches a slot from the hooks."""
        if self.kind == "cell":
            return f"{self.path}.cell_contents"
        if self.kind == "partial":
            return f"{self.path}.args[{key}]"
        if self.kind == "defaults":
            return f"{self.path}.__defaults__[{key}]"
        if self.kind in ("attrs", "slots", "class"):
            return f"{self.path}.{key}"
        return f"{self.path}[{key!r}]"


class Leaf(NamedTuple):
    """A slot with a number or array that is lifted."""

    container: Container
    key: Any
    path: str
    value: Any


class Fixed(NamedTuple):
    """A slot whose value the traced graph takes for granted."""

    container: Container
    key: Any
    value: Any


def is_number(value: Any) -> bool:
    """Numbers that are lifted; bools are flags, and steer control flow too often to be worth lifting."""
    return type(value) in (int, float)


def is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, _compat.Tracer)


class Walk:
    """What a list of hooks can reach.

    Args:
        roots: pairs of (path, callable).

    Attributes:
        containers: every container met, in order of meeting.
        leaves: slots with ints, floats and arrays.
        tracers: slots with JAX tracers.
        fixed: slots with anything else.
    """

    def __init__(self, roots: list[tuple[str, Any]]):
        self._names: set[str] = set()
        self._everything = False
        # Code met late may name attributes of objects met early, so walk until no new names turn up.
        while True:
            known = (len(self._names), self._everything)
            self.containers: list[Container] = []
            self.leaves: list[Leaf] = []
            self.tracers: list[Leaf] = []
            self.fixed: list[Fixed] = []
            self.codes: list[tuple[Any, Any]] = []  # (function, its code): replaced code is noticed
            self._by_id: dict[tuple[int, str], Container] = {}
            self._seen: dict[int, Any] = {}
            self._work: collections.deque[tuple[Any, str]] = collections.deque()
            for path, fn in roots:
                self._work.append((fn, path))
                while self._work:
                    self._visit(*self._work.popleft())
            if (len(self._names), self._everything) == known:
                break

    def _attribute_names(self) -> set[str] | None:
        return None if self._everything else self._names

    def _add(self, obj: Any, kind: str, path: str, names: set[str] | None = None) -> None:
        container = self._by_id.get((id(obj), kind))
        new_names = names
        if container is not None:
            if container.names is None or names is None or names <= container.names:
                return
            new_names = names - container.names  # a globals dict, met again from other code
            container.names |= names
        else:
            if len(self.containers) >= MAX_CONTAINERS:
                raise Unsupported(
                    f"jhop walked more than {MAX_CONTAINERS} objects of Python state at {path}. A hook should reach "
                    "only the state that it uses: pass it the small object it needs."
                )
            container = Container(obj, kind, path, names if names is None else set(names))
            self._by_id[id(obj), kind] = container
            self.containers.append(container)
        for key, value in container.items():
            if new_names is None or key in new_names:
                self._slot(container, key, value)

    def _slot(self, container: Container, key: Any, value: Any) -> None:
        path = container.path_of(key)
        if isinstance(value, _compat.Tracer):
            self.tracers.append(Leaf(container, key, path, value))
        elif is_number(value) or is_array(value):
            self.leaves.append(Leaf(container, key, path, value))
        else:
            self.fixed.append(Fixed(container, key, value))
            self._work.append((value, path))

    def _visit(self, value: Any, path: str) -> None:
        if isinstance(value, (str, bytes, bool, complex, enum.Enum, np.dtype, type(None), type(Ellipsis))):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value  # also keeps it alive, so that ids stay its own
        if isinstance(value, types.FunctionType):
            self._visit_function(value, path)
        elif isinstance(value, types.MethodType):
            self._work.append((value.__self__, f"{path}.__self__"))
            self._work.append((value.__func__, f"{path}.__func__"))
        elif isinstance(value, functools.partial):
            self._work.append((value.func, f"{path}.func"))
            self._add(value, "partial", path)
            self._add(value.keywords, "dict", f"{path}.keywords")
        elif isinstance(value, dict):
            self._add(value, "dict", path)
        elif isinstance(value, list):
            self._add(value, "list", path)
        elif isinstance(value, (tuple, frozenset, set, collections.deque)):
            for index, item in enumerate(value):
                self._work.append((item, f"{path}[{index}]"))
        elif isinstance(value, types.ModuleType):
            self._visit_module(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, property):
            for name in ("fget", "fset"):
                self._work.append((getattr(value, name), f"{path}.{name}"))
        elif isinstance(value, (staticmethod, classmethod)):
            self._work.append((value.__func__, f"{path}.__func__"))
        else:
            self._visit_instance(value, path)

    def _visit_function(self, fn: types.FunctionType, path: str) -> None:
        if not is_user_file(fn.__code__.co_filename):
            return
        self.codes.append((fn, fn.__code__))
        loaded = self._note_names(fn.__code__)
        known = {name for name in loaded if name in fn.__globals__}
        for index, cell in enumerate(fn.__closure__ or ()):
            self._add(cell, "cell", f"{path}.__closure__[{index}]")
        if fn.__defaults__:
            self._add(fn, "defaults", path)
        if fn.__kwdefaults__:
            self._add(fn.__kwdefaults__, "dict", f"{path}.__kwdefaults__")
        if known:
            self._add(fn.__globals__, "dict", "G", known)
        if fn.__dict__:
            self._add(fn.__dict__, "dict", f"{path}.__dict__", self._attribute_names())

    def _note_names(self, code: types.CodeType) -> frozenset[str]:
        """Takes in the names that code uses; returns the globals it loads, those of nested functions too."""
        names, loaded = _code_names(code)
        self._names |= names
        self._everything |= not _REFLECTION.isdisjoint(names)
        return loaded

    def _visit_module(self, module: types.ModuleType) -> None:
        filename = getattr(module, "__file__", None)
        if filename is None or not is_user_file(filename):
            return
        names = {name for name in self._names if name in module.__dict__}
        if names:
            self._add(module.__dict__, "dict", f"G['{module.__name__}'].__dict__", names)

    def _visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not _is_user_class(base) or id(base) in self._seen and base is not cls:
                continue
            self._seen[id(base)] = base
            names = {
                name
                for name, value in base.__dict__.items()
                if (name in self._names or (name.startswith("__") and isinstance(value, types.FunctionType)))
                and name not in ("__init__", "__new__", "__dict__", "__weakref__", "__doc__", "__module__", "__slots__")
                and not isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
            }
            if names:
                self._add(base, "class", f"G['{base.__qualname__}']", names)

    def _visit_instance(self, value: Any, path: str) -> None:
        cls = type(value)
        if hasattr(cls, "__next__"):
            raise Unsupported(
                f"a hook reads `{path}`, a {cls.__name__}: an iterator keeps a position that cannot be lifted into a "
                "graph. Keep a counter and index with it, or use fullgraph=False."
            )
        if cls in _DECLARED:
            self._add(value, "slots", path, set(_DECLARED[cls]))
            return
        if not _is_user_class(cls):
            return
        self._work.append((cls, path))
        if isinstance(getattr(value, "__dict__", None), dict):
            self._add(value, "attrs", path, self._attribute_names())
        slots = {name for base in cls.__mro__ for name in _slot_names(base)} - {"__dict__", "__weakref__"}
        if not self._everything:
            slots &= self._names
        if slots:
            self._add(value, "slots", path, slots)


@functools.lru_cache(maxsize=4096)
def _code_names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """(names and identifier-like strings that code mentions, globals that it loads), nested functions included."""
    names = set(code.co_names)
    loaded = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME")
    }
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner_names, inner_loaded = _code_names(const)
            names |= inner_names
            loaded |= inner_loaded
        elif isinstance(const, str) and const.isidentifier():
            names.add(const)
    return frozenset(names), frozenset(loaded)


def _slot_names(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_user_class(cls: type) -> bool:
    """Classes written in Python by someone other than JAX, NumPy, jhop and the standard library."""
    if cls.__module__ == "__main__":
        return True
    functions = [value for value in cls.__dict__.values() if isinstance(value, types.FunctionType)]
    if functions:
        return any(is_user_file(fn.__code__.co_filename) for fn in functions)
    module = cls.__module__.split(".")[0]
    return module not in _LIBRARIES and isinstance(cls.__dict__.get("__module__"), str) and cls is not object


_LIBRARIES = {"jax", "jaxlib", "numpy", "builtins", "functools", "collections", "jhop", "typing", "abc", "threading"}

# Library classes that hold state a hook may read, with the slots that hold it.
_DECLARED: dict[type, tuple[str, ...]] = {}


def declare_state(cls: type, *slots: str) -> None:
    """Says which slots of a library class hold state: jhop's own classes are not walked like a user's."""
    _DECLARED[cls] = slots


# One trace at a time: while hooks are traced, their objects hold symbols that another thread must not see.
LOCK = threading.RLock()


class Write(NamedTuple):
    """A slot that the hooks changed. `value` is a template, see `Lift.template`; `_MISSING` deletes."""

    container: Container
    key: Any
    value: Any


class Lift:
    """Swaps lifted slots for symbols, and afterwards tells what was written.

    Use inside `LOCK`, as a context manager. `symbols[i]` stands for `walk.leaves[i]`.
    """

    def __init__(self, walk: Walk, symbols: list[Any]):
        self._walk = walk
        self._symbols = symbols
        self._snapshots: list[tuple[Container, list[tuple[Any, Any]]]] = []
        self._placed: dict[int, dict[Any, Any]] = {}

    def __enter__(self) -> Lift:
        self._snapshots = [(container, container.items()) for container in self._walk.containers]
        try:
            for leaf, symbol in zip(self._walk.leaves, self._symbols, strict=True):
                leaf.container.put(leaf.key, symbol)
        except BaseException:
            self.__exit__()
            raise
        self._placed = {id(container): dict(container.items()) for container in self._walk.containers}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for container, snapshot in self._snapshots:
            container.restore(snapshot)

    def writes(self) -> Iterator[Write]:
        """The slots that differ from what was swapped in, containers in order of meeting."""
        for container in self._walk.containers:
            placed, now = self._placed[id(container)], dict(container.items())
            if container.kind == "list":
                if len(now) != len(placed) or any(now[i] is not placed[i] for i in now):
                    yield Write(container, None, list(now.values()))
                continue
            for key, value in now.items():
                if placed.get(key, _MISSING) is not value:
                    yield Write(container, key, value)
            for key in placed:
                if key not in now:
                    yield Write(container, key, _MISSING)


def commit(writes: list[Write]) -> None:
    """Writes final values to the real objects; an error puts every object back and is raised again."""
    done: list[tuple[Container, list[tuple[Any, Any]]]] = []
    try:
        for container, key, value in writes:
            done.append((container, container.items()))
            if container.kind == "list":
                container.obj[:] = value
            elif value is _MISSING:
                container.remove(key)
            else:
                container.put(key, value)
    except BaseException:
        for container, snapshot in reversed(done):
            container.restore(snapshot)
        raise


def is_missing(value: Any) -> bool:
    """Whether a `Write`'s value means that the slot was deleted."""
    return value is _MISSING


def template(value: Any, note_output: Any, where: str) -> Any:
    """Turns a value that a hook stored into one that can be rebuilt after each run: ("kind", ...).

    Kinds: ("number", i, type) and ("array", i) for the i-th output that `note_output` handed out, ("list" | "tuple" |
    "dict" | "set", parts) for new containers, ("const", value) for the rest.
    """
    if is_scalar(value):
        return ("number", note_output(value, where), value.__class__)
    if isinstance(value, _compat.Tracer):
        return ("array", note_output(value, where))
    if type(value) in (list, tuple, set):
        parts = [template(item, note_output, where) for item in value]
        if all(part[0] == "const" for part in parts) and type(value) is tuple:
            return ("const", value)
        return (type(value).__name__, parts)
    if type(value) is dict:
        return ("dict", [(key, template(item, note_output, where)) for key, item in value.items()])
    return ("const", value)


def rebuild(spec: Any, outs: list[Any]) -> Any:
    """The value that a `template` stands for, given the outputs of one run."""
    kind, content = spec[0], spec[1]
    if kind == "number":
        value = outs[content]
        # A backend that compiled the whole graph gives an array; the state is a Python number all the same.
        return value if type(value) is spec[2] else spec[2](value)
    if kind == "array":
        return outs[content]
    if kind == "const":
        return content
    if kind == "dict":
        return {key: rebuild(item, outs) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set}[kind](rebuild(item, outs) for item in content)


def closed_over_tracers(fn: Any) -> list[Leaf]:
    """Slots reachable from a hook that hold JAX tracers."""
    return Walk([(hook_name(fn), fn)]).tracers
