"""Which calls a traced hook may not make: those with an effect outside the trace, or a result that changes by itself.

`label_of` tells a banned callable from one that may be called; it looks only at what the callable is, and at its first
argument. For calls that C code makes, see `_mentions`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import enum
import functools
import inspect
import io
import operator
import os
import sys
import types
import typing
import weakref
from collections.abc import Iterator
from typing import Any

from jhop import _compat
from jhop._source import FileKind, file_kind

# Names banned in a module: all but some, or only some. A function, class or method is known by either end of its
# qualified name: "Thread" and "start" for `Thread.start`.

_ALL_BUT: dict[str, frozenset[str]] = {
    "time": frozenset(("struct_time",)),
    "random": frozenset(),
    "numpy.random": frozenset(),
    "secrets": frozenset(("compare_digest",)),
    "os": frozenset(
        ("fspath", "_fspath", "fsencode", "fsdecode", "PathLike", "strerror", "_path_normpath", "_path_splitroot")
        + ("_path_splitroot_ex",)
    ),
    # Buffers in memory are the standard library's own tools (`pprint.pformat`); see `BUFFER_WRITES`.
    "io": frozenset(("StringIO", "BytesIO", "text_encoding", "IncrementalNewlineDecoder")),
    **dict.fromkeys(
        "socket ssl select selectors subprocess multiprocessing concurrent.futures asyncio sqlite3 queue signal mmap "
        "urllib.request http.client http.server ftplib smtplib shutil tempfile glob webbrowser atexit faulthandler "
        "resource getpass".split(),
        frozenset(),
    ),
}
_ONLY: dict[str, frozenset[str]] = {
    "builtins": frozenset(("print", "input", "breakpoint")),
    "threading": frozenset(("Thread", "Timer", "start_new_thread", "start_joinable_thread")),
    "logging": frozenset(
        "debug info warning warn error exception critical fatal log handle emit basicConfig".split(),
    ),
    "warnings": frozenset(("warn", "warn_explicit", "showwarning")),
    "uuid": frozenset(("uuid1", "uuid4", "uuid6", "uuid7", "getnode")),
    "datetime": frozenset(("now", "today", "utcnow")),
    "numpy": frozenset(
        "save savez savez_compressed savetxt load loadtxt genfromtxt fromfile tofile memmap dump info show_config "
        "show_runtime seterr geterr seterrcall geterrcall setbufsize set_printoptions".split(),
    ),
    "ctypes": frozenset(("dlopen", "LoadLibrary")),  # and their functions: see `label_of`
    "sys": frozenset("displayhook excepthook unraisablehook breakpointhook".split()),
}
# C modules, by the names that users know them under.
_ALIASES = {
    "posix": "os", "nt": "os", "_io": "io", "_pyio": "io", "_thread": "threading", "_random": "random",
    "_warnings": "warnings", "_datetime": "datetime", "_socket": "socket", "_ssl": "ssl", "_queue": "queue",
    "_ctypes": "ctypes", "_sqlite3": "sqlite3", "_posixsubprocess": "subprocess", "_signal": "signal",
}  # fmt: skip
# Refused only where user code itself makes the call.
BUFFER_WRITES = frozenset(f"io.{kind}.{name}" for kind in ("StringIO", "BytesIO") for name in ("write", "writelines"))
# Classes that a label leaves out, because their methods go by the name of the module: `random.choice`.
_ANONYMOUS = ("Random.", "RandomState.", "Generator.")

_RANDOM_REMEDY = "use `jax.random` with a key that is an argument of the function"
_CALLBACK_REMEDY = "use `jax.debug.callback`, which runs each time the backward runs"
_TIME_REMEDY = "take the time outside the backward"
_REMEDIES = {
    "print": 'use `jax.debug.print("{}", x)`, which prints each time the backward runs',
    "breakpoint": "use `jax.debug.breakpoint()`",
    "logging": _CALLBACK_REMEDY,
    "warnings": _CALLBACK_REMEDY,
    "random": _RANDOM_REMEDY,
    "numpy.random": _RANDOM_REMEDY,
    "secrets": _RANDOM_REMEDY,
    "time": _TIME_REMEDY,
    "datetime": _TIME_REMEDY,
    "os": "call it outside the hook, which may close over the result",
    "numpy.seterr": "call it outside the hook",
    "ctypes": "use `jax.pure_callback` or `jax.ffi`",
}

# Syntax reads and writes the environment (`os.environ[name]`), so no call of these is seen, only their code running.
ENVIRON_CODES = {id(fn.__code__) for fn in vars(type(os.environ)).values() if isinstance(fn, types.FunctionType)}



def _harmless_codes() -> Iterator[types.CodeType]:
    """Code of the standard library that JAX runs all the time, and that calls nothing of the user's choice."""
    made = contextlib.contextmanager(iter)
    manager = type(made(()))
    pair: Any = collections.namedtuple
    pair = pair("pair", "a b")
    members: list[Any] = [
        made, manager.__init__, manager.__enter__, manager.__exit__, pair._replace, pair._make.__func__,
        enum.Enum.__hash__, *vars(inspect.Parameter).values(), vars(inspect.Signature)["parameters"],
        weakref.WeakKeyDictionary.get, weakref.WeakValueDictionary.get, typing.cast,
    ]  # fmt: skip
    for member in members:
        fn = member.fget if isinstance(member, property) else member
        if isinstance(fn, types.FunctionType):
            yield fn.__code__


HARMLESS = {id(code): code for code in _harmless_codes()}

_IOBASE = io.IOBase.__bases__[0]  # the C class: an abstract base class is slow to ask
_CFunction: Any = ctypes._CFuncPtr  # type: ignore[attr-defined]
_CachedFunction: Any = type(functools.lru_cache(len))


def remedy_for(label: str) -> str | None:
    """What to do instead of the call that `label` names; None where there is nothing better than the host."""
    return next((remedy for key, remedy in _REMEDIES.items() if f"{label}.".startswith(f"{key}.")), None)


@functools.lru_cache(maxsize=4096)
def label_of_name(module: str, qualname: str) -> str | None:
    """The name to show for a banned function, such as `time.sleep`, or None for one that may be called."""
    key = _ALIASES.get(module, module)
    while key not in _ALL_BUT and key not in _ONLY:
        key = key.rpartition(".")[0]
        if not key:
            return None
    qualname = qualname.removesuffix(".__init__")
    ends = {qualname.partition(".")[0], qualname.rpartition(".")[2]}
    if key == "os" and "_Environ" in ends:
        return "os.environ"
    if key == "io" and qualname == "open":
        return "open"
    banned = not ends & _ALL_BUT[key] if key in _ALL_BUT else bool(ends & _ONLY[key])
    for name in _ANONYMOUS:
        qualname = qualname.removeprefix(name)
    label = qualname if key == "builtins" else f"{key}.{qualname}"
    return label if banned or label in BUFFER_WRITES else None


def label_of(callee: Any, arg: Any = None) -> str | None:
    """The name to show for a banned callable, called with `arg` first; None for one that may be called."""
    if isinstance(callee, types.FunctionType):  # most are
        module = str(callee.__module__)
        return _label_of_method(callee, callee.__name__, arg) or label_of_name(module, callee.__qualname__)
    if not callable(callee):
        return None
    if (stream := _console_of(callee, arg)) is not None:
        return stream
    if isinstance(callee, operator.methodcaller):
        return _label_of_named(callee, arg)
    if isinstance(callee, _CFunction):
        return f"ctypes.{getattr(callee, '__name__', 'function')}"
    for _ in range(8):  # a partial of a method of ...
        if isinstance(callee, functools.partial):
            callee = callee.func
        elif isinstance(callee, types.MethodType):
            callee, arg = callee.__func__, callee.__self__
        elif isinstance(callee, (_CachedFunction, staticmethod, classmethod)) or _compat.is_jitted(callee):
            callee = callee.__wrapped__
        else:
            break
    if isinstance(callee, type):
        names = [str(type.__getattribute__(callee, name)) for name in ("__module__", "__qualname__")]
        return label_of_name(*names)
    caller = _defining_class(callee, "__call__")
    if caller is not None and isinstance(vars(caller)["__call__"], types.FunctionType):
        return None  # an object of a Python class: what its `__call__` does is seen there
    name = getattr(callee, "__name__", None)
    if not isinstance(name, str):
        return None
    owner = getattr(callee, "__objclass__", None) or _defining_class(getattr(callee, "__self__", None), name)
    if owner is not None:
        return label_of_name(str(owner.__module__), f"{owner.__name__}.{name}")
    if (method := _label_of_method(callee, name, arg)) is not None:
        return method
    home = getattr(callee, "__module__", None)
    return label_of_name(home, getattr(callee, "__qualname__", name)) if isinstance(home, str) else None


def _label_of_named(caller: Any, arg: Any) -> str | None:
    """The name to show for the method of `arg` that an `operator.methodcaller` calls."""
    make, given = caller.__reduce__()  # with keywords, `make` is a partial
    name = make.args[0] if isinstance(make, functools.partial) else given[0]
    method = inspect.getattr_static(arg, name, None)
    return None if method is None else label_of(method, arg)


def _console_of(callee: Any, arg: Any) -> str | None:
    """The name to show for a C method that writes to the console, even if that is a buffer in memory just now."""
    if type(callee) not in _C_METHODS or callee.__name__ not in ("write", "writelines", "flush"):
        return None
    owner = callee.__self__ if type(callee) is types.BuiltinMethodType else arg
    names = (name for name in ("stdout", "stderr") if owner is getattr(sys, name) is not None)
    return next((f"sys.{name}.{callee.__name__}" for name in names), None)


_C_METHODS = (types.BuiltinMethodType, types.MethodDescriptorType)


def _label_of_method(function: Any, name: str, owner: Any) -> str | None:
    """The name to show for a function that is a method of `owner`, where that is the environment or a file."""
    cls = type(owner)
    is_environ = cls is type(os.environ)
    is_file = issubclass(cls, _IOBASE) and not issubclass(cls, (io.StringIO, io.BytesIO))
    if (is_environ or is_file) and getattr(cls, name, None) is function:
        return "os.environ" if is_environ else f"{cls.__name__}.{name}"
    return None


def _defining_class(owner: Any, name: str) -> type | None:
    """The class that a method of `owner` comes from; None for a function of a module."""
    if owner is None or isinstance(owner, types.ModuleType):
        return None
    for cls in owner.__mro__ if isinstance(owner, type) else type(owner).__mro__:
        if name in cls.__dict__:
            return cls
    return None


# Who makes a call?


def blamed_frame(frame: types.FrameType | None) -> types.FrameType | None:
    """The user's frame that made a call found in `frame`, through the standard library at most; None if none did."""
    while frame is not None:
        kind = file_kind(frame.f_code.co_filename)
        if kind is FileKind.USER:
            return None if _is_generated(frame) else frame
        # Finalizers run whenever memory is freed, under any frame.
        if (
            kind is not FileKind.STDLIB
            or frame.f_code.co_name == "__del__"
            or frame.f_code.co_qualname == "finalize.__call__"
        ):
            return None
        frame = frame.f_back
    return None


def is_staged_within(frame: types.FrameType, outer: Any) -> bool:
    """Whether code that begins in `frame`, a user's, is traced by a transformation within the trace `outer`."""
    return _compat.staging() is not outer and not _is_generated(frame)


def _is_generated(frame: types.FrameType) -> bool:
    """Whether code was made by `dataclass` or `namedtuple` for a library: such code has no file."""
    module = frame.f_globals.get("__name__", "") if frame.f_code.co_filename == "<string>" else ""
    return module.startswith(("namedtuple_", "jax.", "jaxlib.", "numpy.", "jhop."))


def count_imports(frame: types.FrameType | None) -> int:
    """How many frames of the import system `frame` runs in."""
    count = 0
    while frame is not None:
        count += file_kind(frame.f_code.co_filename) is FileKind.IMPORT
        frame = frame.f_back
    return count
