"""What functions and objects of JAX hold: no state of a hook's, but functions of the user's, and tracers.

A pullback that `jax.vjp` returned, a sparse matrix, `x.at[i]`, a jaxpr with constants: a hook may close over any.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._classes import is_opaque, is_user_class, module_of
from jhop._container import Container
from jhop._names import names_in_code, slot_names
from jhop._source import is_user_file, peeled

FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def attributes_of(obj: Any) -> list[Container]:
    """All that an object keeps under names: its `__dict__`, its `__slots__`."""
    found = [Container(obj, "attrs", "")] if isinstance(getattr(obj, "__dict__", None), dict) else []
    return [*found, Container(obj, "slots", "", set(slot_names(type(obj))))]


def names_of_bases(cls: type, *, read: bool) -> frozenset[str]:
    """Attributes that inherited code of libraries uses, such as `data` of a UserDict: it is not looked into by itself.

    Args:
        cls: a user's class.
        read: leave out those that are only stored to.
    """
    found: set[str] = set()
    for base in cls.__mro__:
        if module_of(base) != "builtins" and not is_user_class(base) and not is_opaque(base):
            codes = [value.__code__ for value in base.__dict__.values() if isinstance(value, types.FunctionType)]
            found.update(*(names_in_code(code, frozenset() if read else None).attributes for code in codes))
    return frozenset(found)


def is_jaxs(obj: Any) -> bool:
    """Whether an object is an instance of one of JAX's classes, other than an array or a function that it compiled."""
    cls = type(obj)
    return module_of(cls).partition(".")[0] in ("jax", "jaxlib") and not (
        issubclass(cls, (jax.Array, type)) or _compat.is_jitted(obj)
    )


def cells_of(fn: types.FunctionType) -> list[Any]:
    """What a function closes over."""
    return [value for cell in fn.__closure__ or () for _, value in Container(cell, "cell", "").items()]


def held(obj: Any) -> list[Any]:
    """What an object of a library's holds: all of an object of JAX's, the functions of another one."""
    if isinstance(obj, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
        return _compat.open_jaxpr(obj)[1]
    if is_jaxs(obj):
        return [value for part in attributes_of(obj) for _, value in part.items()]
    if is_opaque(type(obj)) and callable(obj):
        return [value for value in getattr(obj, "__dict__", {}).values() if isinstance(value, FUNCTIONS)]
    return []


def without_rules(parts: list[Any]) -> list[Any]:
    """What an object of JAX's holds, less its functions: JAX may keep what it traced of one, as of a custom rule."""
    return [part for part in parts if not isinstance(part, FUNCTIONS) or _is_plumbing(part)]


def copied(obj: Any, make: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any, Callable[[Any], None]], None]:
    """How to copy an object of JAX's: a function of (a run, a function that is told of the copy before it is filled).

    Args:
        make: for a value in the object, the function of a run that makes what stands there in the copy.
    """
    if isinstance(obj, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
        jaxpr, consts = _compat.open_jaxpr(obj)
        makes = [make(const) for const in consts]
        # Without the constants, where they are the jaxpr's own (from jax 0.12): what is made here outlives the trace.
        jaxpr, _ = _compat.open_jaxpr(jex_core.ClosedJaxpr(jaxpr, [None for _ in consts]))
        return lambda run, tell: tell(jex_core.ClosedJaxpr(jaxpr, [const(run) for const in makes]))
    another = bare(obj)
    slots = [(part.kind, name, make(value)) for part in attributes_of(obj) for name, value in part.items()]

    def fill(run: Any, tell: Callable[[Any], None]) -> None:
        made = another()
        tell(made)
        for kind, name, value in slots:
            Container(made, kind, "").put(name, value(run))

    return fill


def bare(obj: Any) -> Callable[[], Any]:
    """Makes other instances of an object's class with nothing in them; a number's or string's have the same value."""
    base = built_in(obj)
    arguments = base.__getnewargs__(obj) if hasattr(base, "__getnewargs__") else ()
    return functools.partial(base.__new__, type(obj), *arguments)


def built_in(obj: Any) -> Any:
    """The class, not written in Python, that makes objects of an object's class."""
    return next(cls for cls in type(obj).__mro__ if isinstance(cls.__dict__.get("__new__"), types.BuiltinMethodType))


def inside(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """What a value that a library's function or object holds leads to: tracers, functions, objects of JAX's.

    Args:
        seen: the lists, dicts and the like which were looked into, by id; those of this value are added.
    """
    if isinstance(value, (list, tuple, dict)) or _is_plumbing(value):
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, functools.partial):
            parts = [value.func, *value.args, *value.keywords.values()]
        else:
            parts = list(value.values() if isinstance(value, dict) else value)
        for part in parts:
            yield from inside(part, seen)
    elif isinstance(value, (_compat.Tracer, *FUNCTIONS)) or is_jaxs(value):
        yield value
    elif callable(value) and not isinstance(value, type) and is_user_class(type(value)):
        yield value


def _is_plumbing(fn: Any) -> bool:
    """Whether a function is a partial of one of a library's."""
    if not isinstance(fn, functools.partial):
        return False
    fn = peeled(fn)
    return not is_user_file(fn.__code__.co_filename) if isinstance(fn, types.FunctionType) else is_opaque(type(fn))
