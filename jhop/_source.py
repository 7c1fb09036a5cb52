"""Where things come from: names and places of hooks, and the user's own variable names for traced values.

Everything here is read off code objects; nothing is run. JAX records for each equation the Python frames that made
it, as code objects and byte offsets. From those come

- an equation's **origin**: file, line, function and source text (`user_frames`, `origin_of`);
- an equation's **name**: the local variable that its value is stored to (`local_name`, `eqn_name`; see `_stores`).

A name is only as good as its frames: JAX gives an equation of a *transposed* program the frames of the forward
operation it came from, so there the name is that of the forward value.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.util
import linecache
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, WrapperDescriptorType
from typing import Any

from jhop._stores import RETURNED, stored_name

Frame = tuple[CodeType, int]  # a code object and the byte offset of the instruction it stands at


# Hooks: what to call them


def hook_name(fn: Any) -> str:
    """Returns a readable name for any callable; never fails.

    A function gives its qualified name less the functions around it (`clip`, `Clipper.step`, `<lambda>`), a bound
    method `Class.method`, a partial `partial(clip)`, and any other object the name of its class.
    """
    if isinstance(fn, functools.partial):
        return f"partial({hook_name(fn.func)})"
    if isinstance(fn, MethodType):
        # The class of the object, not the one that it inherits the method from: that is how the user knows it.
        cls = fn.__self__ if isinstance(fn.__self__, type) else type(fn.__self__)
        return f"{cls.__name__}.{hook_name(fn.__func__).rpartition('.')[2]}"
    name = _quietly(fn, "__qualname__") or _quietly(fn, "__name__")
    if isinstance(name, str) and name:
        return name.rpartition("<locals>.")[2]
    wrapped = _quietly(fn, "__wrapped__")  # an object without a name of its own that stands for a function
    return hook_name(wrapped) if callable(wrapped) and wrapped is not fn else type(fn).__name__


def hook_location(fn: Any) -> tuple[str, int] | None:
    """Returns the file and first line of the Python code behind `fn`, or None if there is none (a builtin)."""
    *_, last = layers(fn)
    code = _quietly(last, "__code__")
    return (code.co_filename, code.co_firstlineno) if isinstance(code, CodeType) else None


def describe_hook(fn: Any) -> str:
    """Returns the words an error uses for a hook, such as "hook `clip` (train.py:12)"."""
    where = hook_location(fn)
    place = f" ({os.path.basename(where[0])}:{where[1]})" if where else ""
    return f"hook `{hook_name(fn)}`{place}"


def peeled(fn: Any) -> Any:
    """The callable in partials and bound methods."""
    while isinstance(fn, (functools.partial, MethodType)):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return fn


def layers(fn: Any) -> Iterator[Any]:
    """What a call of `fn` goes through: the callable in partials and methods, what that wraps or has as `__call__`."""
    for _ in range(32):  # a wrapper may name itself as what it wraps
        fn = peeled(fn)
        yield fn
        wrapped = _quietly(fn, "__wrapped__")
        if not callable(wrapped):
            if isinstance(fn, (FunctionType, WrapperDescriptorType, type)) or _quietly(fn, "__code__") is not None:
                return
            wrapped = next((cls.__dict__["__call__"] for cls in type(fn).__mro__ if "__call__" in cls.__dict__), None)
            if wrapped is None or isinstance(wrapped, WrapperDescriptorType):
                return
        fn = wrapped


def with_nested(codes: Iterable[CodeType]) -> Iterator[CodeType]:
    """Code objects, and those nested in them."""
    for code in codes:
        yield code
        yield from with_nested(const for const in code.co_consts if isinstance(const, CodeType))


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _quietly(obj: Any, attribute: str) -> Any:
    """`getattr` for objects that were written to answer anything, or to fail."""
    try:
        return getattr(obj, attribute, None)
    except Exception:
        return None


# Files: whose code is it?


class FileKind(enum.Enum):
    """Whose code a file holds."""

    USER = "user"
    STDLIB = "stdlib"  # and what else is looked through: who called it makes the call
    IMPORT = "import"  # the import system
    JHOP = "jhop"
    LIBRARY = "library"  # JAX and what it is built on


# Packages whose frames stand between a user's call and what JAX does for it.
_LIBRARIES = ("jax", "jaxlib", "numpy", "chex", "ml_dtypes", "opt_einsum")
# What JAX reads and writes files through where it is installed (its compilation cache does), and users may as well.
_HELPERS = ("etils", "filelock", "zstandard")


@functools.cache
def _known_folders() -> tuple[tuple[str, FileKind], ...]:
    """Folders with the kind of file they hold, those inside others first."""
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [(here, FileKind.JHOP)]
    for name in (*_LIBRARIES, *_HELPERS):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # not installed; or a test's stand-in without a spec
            continue
        kind = FileKind.LIBRARY if name in _LIBRARIES else FileKind.STDLIB
        folders += [(path, kind) for path in (spec and spec.submodule_search_locations) or ()]
    paths = sysconfig.get_paths()
    installed = {paths["purelib"], paths["platlib"]}
    installed |= {os.path.join(paths["stdlib"], leaf) for leaf in ("site-packages", "dist-packages")}
    folders += [(path, FileKind.USER) for path in installed]
    folders += [(path, FileKind.STDLIB) for path in {paths["stdlib"], paths["platstdlib"]}]
    demo = (os.path.join(here, "_demo.py"), FileKind.USER)  # it stands for a user's program
    return (demo, *((os.path.join(path, ""), kind) for path, kind in folders))


@functools.lru_cache(maxsize=4096)
def file_kind(filename: str) -> FileKind:
    """Says whose code `filename` holds; code typed in (`<stdin>`, a notebook cell) is the user's."""
    if filename.startswith("<frozen importlib"):
        return FileKind.IMPORT
    if filename.startswith("<frozen"):
        return FileKind.STDLIB
    if filename.startswith(("<__array_function__", "<@beartype")):  # made by NumPy and by beartype at run time
        return FileKind.LIBRARY
    for folder, kind in _known_folders():
        if filename.startswith(folder):
            return kind
    return FileKind.USER


def is_user_file(filename: str) -> bool:
    """True unless the file belongs to JAX or what it is built on, to the standard library or to jhop."""
    return file_kind(filename) is FileKind.USER


def warn(message: str) -> None:
    """Warns, in the name of the line of the user's code that called jhop."""
    frame, level = sys._getframe(1), 2
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, UserWarning, stacklevel=level)


# Equations: where do they come from?


@dataclasses.dataclass(frozen=True)
class Origin:
    """A place in the user's source."""

    file: str
    line: int
    function: str
    text: str  # the source line, stripped; empty where the source cannot be found


def raw_frames(eqn: Any) -> list[Frame]:
    """Returns every frame recorded for `eqn`, innermost first; empty where JAX recorded none.

    It may be anything with the `source_info` of an equation.
    """
    traceback = eqn.source_info.traceback
    if traceback is None:
        return []
    codes, offsets = traceback.raw_frames()
    return list(zip(codes, offsets, strict=True))


def user_frames(eqn: Any) -> list[Frame]:
    """Returns the frames of `eqn` that are in user files, innermost first."""
    return [frame for frame in raw_frames(eqn) if is_user_file(frame[0].co_filename)]


def user_frame(eqn: Any) -> Frame | None:
    """Returns the innermost of `user_frames`, or None."""
    return next((frame for frame in raw_frames(eqn) if is_user_file(frame[0].co_filename)), None)


@functools.lru_cache(maxsize=4096)
def origin_of(code: CodeType, lasti: int) -> Origin:
    """Returns the source place of the instruction at byte offset `lasti`."""
    line = next((start for begin, end, start in code.co_lines() if begin <= lasti < end and start), None)
    line = line or code.co_firstlineno
    text = linecache.getline(code.co_filename, line).strip()
    return Origin(code.co_filename, line, code.co_qualname, text)


def eqn_name(eqn: Any) -> str | None:
    """Returns the user's variable that the value of `eqn` is stored to, if there is one."""
    return local_name(raw_frames(eqn))


def local_name(frames: Iterable[Frame]) -> str | None:
    """Returns the variable that a value is stored to, following it out of the functions that return it.

    Args:
        frames: as `raw_frames` gives them, innermost first. Frames of JAX inside the innermost user frame are passed
            over. Further out every frame counts: a value that a function returns *to JAX* has no name, for what JAX
            hands on to its own caller is another value. So filtered frames (`user_frames`) are right only where
            user code calls user code all the way.
    """
    inside_user_code = False
    for code, lasti in frames:
        kind = file_kind(code.co_filename)
        if kind is FileKind.USER or (inside_user_code and kind is FileKind.STDLIB):
            inside_user_code = True
            name = stored_name(code, lasti)
            if name is not RETURNED:
                # A variable of a standard library frame is not one the user wrote.
                return name if kind is FileKind.USER else None
        elif inside_user_code:
            return None
    return None
