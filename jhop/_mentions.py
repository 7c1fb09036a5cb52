"""Calls that C code or a library makes with what it is given, where Python reports nothing (`map(print, xs)`).

`calls_in` reads off the bytecode which names the text of a call mentions; `label_given` and `label_in_call` ask what
they mean in a frame.
"""

from __future__ import annotations

import collections
import contextvars
import dis
import functools
import inspect
import itertools
import operator
import re
import types
import weakref
from typing import Any, NamedTuple

import numpy as np

from jhop import _compat
from jhop._banned import label_of

_Path = tuple[str, ...]  # a dotted name
_Place = tuple[int, int]  # line and column

# Functions of C and the standard library that call what they are given, or keep it to call it, by id.
_CALLERS = {id(fn): fn for fn in (
    map, filter, sorted, min, max, iter, list.sort, functools.reduce, itertools.starmap, itertools.accumulate,
    itertools.groupby, itertools.takewhile, itertools.dropwhile, itertools.filterfalse, operator.call, re.sub, re.subn,
    re.Pattern.sub, re.Pattern.subn, contextvars.Context.run, weakref.finalize, collections.defaultdict,
)}  # fmt: skip
_WHOLE = ("numpy.random", "ctypes", "operator")  # of the last, it may be a `methodcaller`
_CALLING_METHODS = ("sort", "sub", "subn", "run")  # of those
_LIBRARIES = ("jax", "numpy", "jhop")
_PASSES_ON = re.compile("callback|^debug_")  # `jax.pure_callback(f, ...)` has `f` called at each run
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_FAST_LOAD_FAST")
_CALLS = ("PRECALL", "CALL", "CALL_KW", "CALL_FUNCTION_EX")


class Call(NamedTuple):
    """The dotted names in the text of one call."""

    callee: _Path | None  # the name that the text starts with
    mentioned: tuple[_Path, ...]  # all others
    direct: tuple[_Path, ...]  # those which are arguments themselves, or given to `partial` in one
    on_call: bool  # the text starts with a call, and calls what that returns: `partial(f)()`
    method: str | None  # the attribute that is called


@functools.lru_cache(maxsize=512)
def calls_in(code: types.CodeType) -> dict[int, Call]:
    """The calls in `code`, by the byte offset of their instruction; none if it was compiled without columns."""
    loads: list[tuple[_Place, _Place, _Path]] = []
    calls: list[tuple[int, _Place, _Place]] = []
    attributes: list[tuple[_Place, _Place, str]] = []
    before = ""
    for instruction in dis.get_instructions(code):
        at, name, value = instruction.positions, instruction.opname, instruction.argval
        if at is None or at.lineno is None or at.col_offset is None:
            continue
        begin, end = (at.lineno, at.col_offset), (at.end_lineno or 0, at.end_col_offset or 0)
        if name in _LOADS:
            loads += [(begin, end, (each,)) for each in (value if isinstance(value, tuple) else (value,))]
        elif name in ("LOAD_ATTR", "LOAD_METHOD") and before in (*_LOADS, "LOAD_ATTR") and loads:
            loads[-1] = (begin, end, (*loads[-1][2], value))
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.append((begin, end, value))
        if name in _CALLS:
            calls.append((instruction.offset, begin, end))
        before = name
    found = {}
    for offset, begin, end in calls:
        inside = [(start, path) for start, stop, path in loads if begin <= start and stop <= end]
        callee = next((path for start, path in inside if start == begin), None)
        mentioned = [(start, path) for start, path in inside if path is not callee]
        # In the arguments; a call that the text starts with is what is called.
        nested = [(start, stop) for _, start, stop in calls if begin < start and stop <= end]
        nested = [each for each in nested if not _is_partial(each[0], loads)]
        direct = tuple(path for at, path in mentioned if not any(start <= at < stop for start, stop in nested))
        on_call = any(start == begin and stop < end for _, start, stop in calls)
        method = max(((stop, name) for start, stop, name in attributes if start == begin and stop < end), default=None)
        found[offset] = Call(
            callee, tuple(path for _, path in mentioned), direct, on_call, None if method is None else method[1]
        )
    return found


def _is_partial(begin: _Place, loads: list[tuple[_Place, _Place, _Path]]) -> bool:
    return any(start == begin and path[-1] == "partial" for start, _, path in loads)


@functools.lru_cache(maxsize=512)
def starred_calls(code: types.CodeType) -> frozenset[int]:
    """The byte offsets of calls `f(*xs)` in which `xs` may be anything but a tuple."""
    instructions = list(dis.get_instructions(code))
    star = code.co_varnames[code.co_argcount + code.co_kwonlyargcount] if code.co_flags & inspect.CO_VARARGS else None
    if any(each.opname.startswith("STORE_") and each.argval == star for each in instructions):
        star = None  # `args` of `def f(*args)`, but no longer what it was
    found = set()
    for before, call in itertools.pairwise(instructions):
        if call.opname == "CALL_FUNCTION_EX":
            is_tuple = before.argrepr == "INTRINSIC_LIST_TO_TUPLE" or (star is not None and before.argval == star)
            if not is_tuple or call.arg:  # with keywords, they come before the call
                found.add(call.offset)
    return frozenset(found)


def label_given(frame: types.FrameType, offset: int, callee: Any) -> str | None:
    """The first banned callable that the call at `offset` gives to a `callee` which calls what it is given."""
    call = calls_in(frame.f_code).get(offset)
    if call is None:
        return None
    if id(callee) in _CALLERS:
        paths = call.mentioned
    elif callee is None and call.method in _CALLING_METHODS:  # of a literal or a result, `[2, 1].sort`
        paths = call.direct
    elif call.direct and _is_of_library(callee):
        paths = call.direct
    else:
        return None
    return next(filter(None, (label_of(_value_of(frame, path)) for path in paths)), None)


def calls_its_argument(callee: Any) -> bool:
    """True for a function of C or the standard library that calls what it is given."""
    return id(callee) in _CALLERS


def _is_of_library(callee: Any) -> bool:
    """True for a function of JAX, NumPy or jhop which would call a function that it is given, while it is traced."""
    cls = type(callee)
    if cls is type:
        return callee is np.vectorize
    if cls not in _LIBRARY_FUNCTIONS and not _compat.is_jitted(callee):
        return False
    module, name = str(callee.__module__), str(callee.__name__)
    return module.partition(".")[0] in _LIBRARIES and not _PASSES_ON.search(name)


_LIBRARY_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type(np.sum))  # the last: with overrides


def label_in_call(frame: types.FrameType, offset: int) -> str | None:
    """The banned callable that the call at `offset` would run, as far as its text tells."""
    call = calls_in(frame.f_code).get(offset)
    if call is None:
        return None
    if call.callee is None:
        return label_given(frame, offset, None)
    callee = _value_of(frame, call.callee)
    owner = _value_of(frame, call.callee[:-1]) if len(call.callee) > 1 else None
    if not call.on_call and (label := label_of(callee, owner)) is not None:
        return label
    if isinstance(callee, operator.methodcaller):
        return next(filter(None, (label_of(callee, _value_of(frame, path)) for path in call.direct)), None)
    if call.on_call:
        callee = map if callee is functools.partial else None
    return label_given(frame, offset, callee)


def mentions_banned(frame: types.FrameType) -> bool:
    """True if a call in the code of `frame`, which has just been entered, mentions something banned."""
    for path in _paths_in(frame.f_code):
        value = _value_of(frame, path)
        # An object such as `numpy.random.Generator` is not banned, but its methods are, under whatever name it goes.
        if value is not None and (type(value).__module__.startswith(_WHOLE) or label_of(value) is not None):
            return True
    return False


@functools.lru_cache(maxsize=512)
def _paths_in(code: types.CodeType) -> frozenset[_Path]:
    """The dotted names in all calls of `code`, and what they start with: of `rng.normal`, also `rng`."""
    paths = {path for call in calls_in(code).values() for path in (call.callee, *call.mentioned) if path}
    return frozenset(path[:length] for path in paths for length in range(1, len(path) + 1))


def _value_of(frame: types.FrameType, path: _Path) -> Any:
    """What a dotted name means in `frame`, found without running any code of the objects on the way."""
    for names in (frame.f_locals, frame.f_globals, frame.f_builtins):
        if path[0] in names:
            value = names[path[0]]
            for attribute in path[1:]:
                if isinstance(value, types.ModuleType):
                    value = vars(value).get(attribute)
                else:
                    value = inspect.getattr_static(value, attribute, None)
            return value
    return None
