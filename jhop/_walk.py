"""What a hook can reach: the Python state that its code can read or write, found without running it.

`Walk` follows partials, closures, defaults, bound objects, the globals and modules that code names, attributes whose
names occur in reachable code, and containers. Each place that holds a value is a slot (container, key):

- ints, floats and arrays are *lifted*: they become inputs of the graph;
- JAX tracers are *operands* (a hook may close over a value of the function that is being traced);
- everything else is taken for granted, and a guard says when it changed.
"""

from __future__ import annotations

import abc
import builtins
import collections
import functools
import gc
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

from jhop import _compat
from jhop._classes import OPAQUE_ROOTS, generated_code, is_opaque, is_user_class, module_of, why_not_lifted
from jhop._container import Container, builtin_kind
from jhop._errors import Unsupported, last_resort
from jhop._leaves import DECLARED, Fixed, Leaf, is_array, is_number
from jhop._library import FUNCTIONS, cells_of, held, inside, names_of_bases
from jhop._names import TEXT, TEXT_METHODS, names_in_code, names_in_value, slot_names
from jhop._reads import state_refused
from jhop._source import is_user_file, peeled

MAX_CONTAINERS = 10_000
# Code that uses one of these can reach any attribute, so names say nothing about what it reads.
REFLECTION = set("__dict__ vars setattr getattr hasattr delattr eval exec globals asdict astuple fields".split())
IMMUTABLE = {str, bytes, bool, complex, range, type(None), type(Ellipsis), type(NotImplemented)}
_VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
# Their instances hold no Python state that a hook could read past JAX.
_STANDARD_CONTAINERS = {"collections", "types", "argparse", "weakref", "_weakrefset", "functools"}
_BUILTINS = frozenset(dir(builtins))  # those that Python comes with are taken for granted
_NEVER = ("__dict__", "__weakref__", "__doc__", "__module__", "__slots__", "__qualname__")
T = TypeVar("T")


class Walk:
    """What a list of hooks can reach.

    Args:
        roots: pairs of (path, callable).
        strict: whether state that cannot be lifted is an error; otherwise it is passed over.
        without: for a function that is run once, when it is traced: code that is not looked into. What code only
            stores does not count then either.
        limit: how many slots to look at, by default all; those left out count as `truncated`.

    Raises:
        Unsupported: there is state that cannot be lifted.

    Attributes:
        containers: every container met, in order of meeting.
        leaves: slots with ints, floats and arrays.
        tracers: slots with JAX tracers.
        fixed: slots with anything else.
        arrivals: by id of an object, how often it was come across, in slots and otherwise.
        shapes: slots of which only the type counts; what they hold is in other slots (`_records`).
        unlifted: NumPy arrays that are in no slot, their paths, and the roots that lead there.
        generated: the code of methods that `dataclass` made.
        records: tuples whose items are slots, and objects that may be replaced by others with the same slots.
        attributes: (object, attribute, value) for what is fixed besides slots: code, classes, functions of partials.
        alive: weak references, and whether what they refer to is there.
        pinned: ids of objects that something holds which cannot be made to hold another: a tuple, a bound method.
        holds_tracer: whether a tracer is held by such a thing.
        truncated: whether there was more than was looked at.
    """

    def __init__(
        self,
        roots: list[tuple[str, Any]],
        *,
        strict: bool = True,
        without: frozenset[types.CodeType] | None = None,
        limit: int | None = None,
    ):
        self._strict = strict
        self._root: Any = None  # the hook that is looked into
        self._slots = limit
        self._without = without
        self._names: set[str] = set()
        self._everything = False
        self.generated: set[types.CodeType] = set()
        while True:  # code met late may name attributes of objects met early: walk until no new names turn up
            known = (len(self._names), self._everything)
            self._filtered = False  # whether names decided what was looked at
            self._bare: list[Container] = []  # functions without attributes
            self.containers: list[Container] = []
            self.leaves: list[Leaf] = []
            self.tracers: list[Leaf] = []
            self.fixed: list[Fixed] = []
            self.arrivals: collections.Counter[int] = collections.Counter()
            self.shapes: list[Fixed] = []
            self.records: list[Container] = []
            self.unlifted: list[tuple[Any, str, Any]] = []
            self.attributes: list[tuple[Any, str, Any]] = []
            self._by_id: dict[tuple[int, str], Container] = {}
            self._seen: dict[int, Any] = {}
            self._inside: dict[int, Any] = {}
            self._inherited: dict[int, frozenset[str]] = {}  # by id of a class, what code in its bases reads
            self.alive: list[tuple[Any, bool]] = []
            self.pinned: set[int] = set()  # ids of objects that are reached by more than slots
            self.holds_tracer = self.truncated = False
            self._weak: set[int] = set()  # ids of objects reached through weak references
            self._work = collections.deque[tuple[Any, str]]()
            for path, fn in roots:
                self._limit = len(self.containers) + MAX_CONTAINERS  # per hook: of these there may be any number
                self._work.append((fn, path))
                self._root = fn
                while self._work:
                    self._visit_if_possible(*self._work.popleft())
            if (len(self._names), self._everything) == known:
                break
            if not (self._filtered or self._everything):
                for container in self._bare:
                    container.names = set(self._names)
                break
        self._root = None

    def note_weak(self, references: Iterable[weakref.ref[Any]]) -> None:
        """Takes note of what hooks reach by weak references, or will."""
        self._weak.update(id(reference()) for reference in references)

    def is_weak(self, value: Any) -> bool:
        """Whether hooks reach an object by a weak reference too: they can see when it is gone."""
        return value is not None and id(value) in self._weak

    def mentions(self, *names: str) -> bool:
        """Whether the hooks' code uses one of these names."""
        return not self._names.isdisjoint(names)

    @property
    def asks_abstract_classes(self) -> bool:
        """Whether the hooks ask for a class that others can be registered with."""
        asks = self.mentions("isinstance", "issubclass")
        return asks and any(isinstance(value, abc.ABCMeta) for value in self._seen.values())

    def knows(self, value: Any) -> bool:
        """Whether an object was met, so that it existed before the hooks ran."""
        return id(value) in self._seen or id(value) in self._inside

    def instances(self, cls: type[T], keep: Callable[[T], bool]) -> list[T]:
        """The instances of a class that were met."""
        return [value for value in self._seen.values() if isinstance(value, cls) and keep(value)]

    def refuse(self, message: str, path: str, root: Any = None) -> None:
        """Raises, in a strict walk, in the name of a root: by default the one that is looked into."""
        root = self._root if root is None else root
        if self._strict:
            raise Unsupported(message) if root is None else state_refused(root, message, path)

    def _add(self, obj: Any, kind: str, path: str, names: set[str] | frozenset[str] | None = None) -> None:
        container = self._by_id.get((id(obj), kind))
        new_names = names
        if container is not None:
            if container.names is None or names is None or names <= container.names:
                return
            new_names = names - container.names  # a globals dict, met again from other code
            container.names |= names
        else:
            if len(self.containers) >= self._limit:
                self.truncated = True
                self.refuse(
                    f"jhop walked more than {MAX_CONTAINERS} objects of one hook's Python state at {path}. A hook "
                    "should reach only the state that it uses: pass it the small object it needs.",
                    path,
                )
                return
            copy = names if names is None else set(names)
            container = Container(obj, kind, path, copy, weak=id(obj) in self._weak)
            self._by_id[id(obj), kind] = container
            self.containers.append(container)
        for key, value in container.items():
            if new_names is None or key in new_names:
                self._slot(container, key, value)

    def _slot(self, container: Container, key: Any, value: Any) -> None:
        if self._slots is not None and len(self.fixed) + len(self.leaves) >= self._slots:
            self.truncated = True
            return
        path = container.path_of(key)
        # An object may say what it likes of its class, or raise when it is asked.
        if issubclass(type(value), _compat.Tracer):
            self.tracers.append(Leaf(container, key, path, value))
        elif (is_number(value) or is_array(value)) and container.kind != "set":
            self.leaves.append(Leaf(container, key, path, value))
        else:
            self.fixed.append(Fixed(container, key, value))
            self._work.append((value, path))

    def _visit_if_possible(self, value: Any, path: str) -> None:
        try:
            self._visit(value, path)
        except Unsupported:
            raise
        except Exception as error:  # an object may raise whatever one asks of it
            why = f"{type(error).__name__}: {error}"
            self.refuse(f"jhop could not look into `{path}`, which a hook reads: {why}.", path)

    def _visit(self, value: Any, path: str) -> None:
        if type(value) in IMMUTABLE or is_number(value):
            return
        self.arrivals[id(value)] += 1
        if id(value) in self._seen:
            return
        if isinstance(value, _compat.Tracer):
            self.holds_tracer = True
            return
        self._seen[id(value)] = value  # also keeps it alive, so that ids stay its own
        if (kind := builtin_kind(value)) is not None:
            self._add(value, kind, path)
            for index, key in enumerate(dict.__iter__(value) if kind == "dict" else ()):
                self.pinned.add(id(key))
                self._work.append((key, f"[*{path}][{index}]"))
        if isinstance(value, collections.defaultdict):
            self.attributes.append((value, "default_factory", value.default_factory))
            self._work.append((value.default_factory, f"{path}.default_factory"))
        wrapped = value.__dict__.get("__wrapped__") if hasattr(value, "__dict__") and callable(value) else None
        if wrapped is None and module_of(type(value)).startswith("jaxlib"):
            wrapped = getattr(value, "__wrapped__", None)
        if wrapped is not None:
            self._work.append((wrapped, f"{path}.__wrapped__"))
        if not isinstance(value, FUNCTIONS):
            self._visit_inside(held(value), path)  # JAX's `custom_vjp` and the like: the rules are the user's
        if isinstance(value, types.FunctionType):
            self._visit_function(value, path)
        elif isinstance(value, types.MethodType):
            self._work.append((value.__self__, f"{path}.__self__"))
            self._work.append((value.__func__, f"{path}.__func__"))
        elif isinstance(value, functools.partial):
            self.attributes.append((value, "func", value.func))
            self._work.append((value.func, f"{path}.func"))
            if not self._left_out(value.func) or self.mentions("args", "keywords"):
                self._add(value, "partial", path)
                self._add(value.keywords, "dict", f"{path}.keywords")
        elif isinstance(value, (tuple, frozenset)):
            for index, item in enumerate(value):
                self.pinned.add(id(item))
                self._work.append((item, f"{path}[{index}]"))
            if type(value) not in (tuple, frozenset):
                self._visit_instance(value, path)
        elif isinstance(value, (types.BuiltinMethodType, types.MethodWrapperType)):
            owner = value.__self__  # `log.append`, kept by itself
            if owner is not None and not isinstance(owner, types.ModuleType):
                self.pinned.add(id(owner))
                self._work.append((owner, f"{path}.__self__"))
        elif isinstance(value, types.ModuleType):
            self._visit_module(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, property):
            for name in ("fget", "fset", "fdel"):
                self._work.append((getattr(value, name), f"{path}.{name}"))
        elif isinstance(value, (staticmethod, classmethod)):
            self._work.append((value.__func__, f"{path}.__func__"))
        elif isinstance(value, _VIEWS):
            for inside in gc.get_referents(value):
                self.pinned.add(id(inside))
                self._work.append((inside, path))
        elif isinstance(value, (operator.attrgetter, operator.methodcaller)):
            self._names |= names_in_value(value.__reduce__())
        elif isinstance(value, weakref.ref):
            self.alive.append((value, value() is not None))
            self.note_weak([value])
            self._work.append((value(), f"{path}()"))
        else:
            self._visit_instance(value, path)

    def _left_out(self, fn: Any) -> bool:
        """Whether a callable is a hook that the function hands on: what is given to it, the function does not read."""
        return self._without is not None and getattr(peeled(fn), "__code__", None) in self._without

    def _visit_inside(self, held: list[Any], path: str) -> None:
        for item in inside(held, self._inside):
            if isinstance(item, _compat.Tracer):
                self.holds_tracer = True
            else:
                self._work.append((item, f"{path}.__wrapped__"))

    def _visit_function(self, fn: types.FunctionType, path: str) -> None:
        if not is_user_file(fn.__code__.co_filename):
            registry = getattr(fn, "registry", None)  # of `functools.singledispatch`
            if isinstance(registry, types.MappingProxyType):
                self._work.append((registry, f"{path}.registry"))
            # A library's wrapper (contextmanager, vmap, grad): what it wraps may be the user's.
            self._visit_inside(cells_of(fn), path)
            return
        self.attributes += [(fn, "__code__", fn.__code__), (fn, "__kwdefaults__", fn.__kwdefaults__)]
        if self._without is not None and fn.__code__ in self._without:
            return
        names, loaded, imported, cells = names_in_code(fn.__code__, self._without)
        self._names |= names - {"type"} if fn.__code__ in self.generated else names
        self._everything |= not REFLECTION.isdisjoint(names)
        for index, (name, cell) in enumerate(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)):
            if name in cells:
                self._add(cell, "cell", f"{path}.__closure__[{index}]")
        if fn.__defaults__:
            self._add(fn, "defaults", path)
        if fn.__kwdefaults__:
            self._add(fn.__kwdefaults__, "dict", f"{path}.__kwdefaults__")
        if loaded:
            # Names that are not there yet count too: the hook may create them.
            self._add(fn.__globals__, "dict", "G", loaded)
            if added := loaded - fn.__globals__.keys() - _BUILTINS:
                self._add(builtins.__dict__, "dict", "builtins", added)
        if imported and self._without is not None:
            self._add(sys.modules, "dict", "sys.modules", imported)
        for name in sorted(imported):  # the same paths in every process
            self._work.append((sys.modules.get(name), f"G[{name!r}]"))
        self._add(fn.__dict__, "dict", f"{path}.__dict__", None if self._everything else self._names)
        if fn.__dict__:
            self._filtered = True
        elif (container := self._by_id.get((id(fn.__dict__), "dict"))) is not None:
            self._bare.append(container)

    def _visit_module(self, module: types.ModuleType) -> None:
        filename = getattr(module, "__file__", None)
        root = module.__name__.split(".")[0]
        made = filename is None and root not in {*sys.stdlib_module_names, *sys.builtin_module_names, *OPAQUE_ROOTS}
        if made or (filename is not None and is_user_file(filename)):
            self._filtered = True
            self._add(module.__dict__, "dict", f"G[{module.__name__!r}].__dict__", self._names - set(_NEVER))

    def _visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not is_user_class(base) or (id(base) in self._seen and base is not cls):
                continue
            self._seen[id(base)] = base
            self._filtered = True
            self.attributes.append((base, "__bases__", base.__bases__))
            special = {
                name
                for name, value in base.__dict__.items()
                if name.startswith("__") and isinstance(value, (types.FunctionType, classmethod, staticmethod))
            }
            members = {
                name
                for name, value in base.__dict__.items()
                if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType))
            }
            # They ask only for the type of the object itself.
            self.generated.update(code for name in special for code in generated_code(base, name))
            generated = {name for name in special if getattr(base.__dict__[name], "__code__", None) in self.generated}
            if self._without is not None:  # the fields that it made methods of are not read by the function
                special -= generated
                special -= TEXT_METHODS if self._names.isdisjoint(TEXT) else set()
            names = ((self._names | special) - members) - set(_NEVER)
            self._add(base, "class", f"G[{base.__qualname__!r}]", names)
            if "__match_args__" in names:
                self._names |= names_in_value(base.__dict__.get("__match_args__", ()))
            if is_user_class(type(base)):
                self._work.append((type(base), f"type(G[{base.__qualname__!r}])"))

    def _visit_instance(self, value: Any, path: str) -> None:
        cls = type(value)
        if (reason := why_not_lifted(cls)) is not None:
            self.refuse(f"a hook reads `{path}`, a {cls.__name__}{reason}, or {last_resort()}.", path)
            return
        if isinstance(value, np.ndarray) and is_array(value):
            self.unlifted.append((value, path, self._root))
            return
        if isinstance(value, np.ndarray):
            what = f"a {cls.__name__} of dtype {value.dtype}, which JAX has no arrays of"
            self.refuse(f"a hook reads `{path}`, {what}. Use a list or an array of numbers.", path)
            return
        if cls in DECLARED:
            self._add(value, "slots", path, set(DECLARED[cls]))
            return
        if is_opaque(cls):
            return
        self._filtered = True
        mine = is_user_class(cls)
        node = mine and self._without is not None and not jax.tree_util.all_leaves([value])
        if mine:
            self.attributes.append((value, "__class__", value.__class__))  # which may be a property
            self._work.append((cls, path))
        if id(cls) not in self._inherited:
            self._inherited[id(cls)] = names_of_bases(cls, read=self._without is not None) if mine else frozenset()
        names = None if self._everything else self._names | self._inherited[id(cls)]
        if isinstance(getattr(value, "__dict__", None), dict):
            # The code that reads attributes of a standard container (UserDict, SimpleNamespace) is not the user's.
            # Nor is that of `jax.tree.map`, which may be what the function does with a registered class.
            everything = node or not mine and module_of(cls).split(".")[0] in _STANDARD_CONTAINERS
            self._add(value, "attrs", path, None if everything else names)
        slots = {key for key, name in slot_names(cls).items() if names is None or node or name in names}
        if slots:
            self._add(value, "slots", path, slots)
