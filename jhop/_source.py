"""Where things come from: names and places of hooks, and the user's own variable names for traced values.

Everything here is read off code objects; nothing is run. JAX records for each equation the Python frames that made
it, as code objects and byte offsets. From those come

- an equation's **origin**: file, line, function and source text (`user_frames`, `origin_of`);
- an equation's **name**: the local variable that its value is stored to (`stored_name`, `local_name`, `eqn_name`). The
  instruction at the recorded offset leaves the value on top of the stack; a small simulation of the stack walks on
  from there until the value is stored, returned or used up.

A name is only as good as its frames: JAX gives an equation of a *transposed* program the frames of the forward
operation it came from, so there the name is that of the forward value.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import importlib.util
import inspect
import linecache
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from types import CodeType, MethodType
from typing import Any, Final

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
    for _ in range(32):  # a wrapper may name itself as what it wraps
        code = _quietly(fn, "__code__")
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif isinstance(fn, MethodType):
            fn = fn.__func__
        elif callable(wrapped := _quietly(fn, "__wrapped__")):
            fn = wrapped
        elif isinstance(code, CodeType):
            return code.co_filename, code.co_firstlineno
        else:
            call = _quietly(type(fn), "__call__")
            if not isinstance(_quietly(call, "__code__"), CodeType):
                return None
            fn = call
    return None


def describe_hook(fn: Any) -> str:
    """Returns the words an error uses for a hook, such as "hook `clip` (train.py:12)"."""
    where = hook_location(fn)
    place = f" ({os.path.basename(where[0])}:{where[1]})" if where else ""
    return f"hook `{hook_name(fn)}`{place}"


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
    STDLIB = "stdlib"
    IMPORT = "import"  # the import system
    JHOP = "jhop"
    LIBRARY = "library"  # JAX and what it is built on


# Packages whose frames stand between a user's call and what JAX does for it.
_LIBRARIES = ("jax", "jaxlib", "numpy", "chex", "ml_dtypes", "opt_einsum")


@functools.cache
def _known_folders() -> tuple[tuple[str, FileKind], ...]:
    """Folders with the kind of file they hold, those inside others first."""
    here = os.path.dirname(os.path.abspath(__file__))
    folders = [(here, FileKind.JHOP)]
    for name in _LIBRARIES:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # not installed; or a test's stand-in without a spec
            continue
        folders += [(path, FileKind.LIBRARY) for path in (spec and spec.submodule_search_locations) or ()]
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
    """Returns every frame recorded for `eqn`, innermost first; empty where JAX recorded none."""
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


# Values: which variable are they stored to?


class _Returned(enum.Enum):
    RETURNED = "returned"


RETURNED: Final = _Returned.RETURNED  # what `stored_name` says of a value that the function returns

_VALUE = object()  # the value that is followed; every other one is None, or a list if it is a tuple being built

# Instructions that leave one value on top of the stack, at which a call into JAX can be recorded.
_PRODUCERS = frozenset(
    "BINARY_OP BINARY_SUBSCR BINARY_SLICE COMPARE_OP UNARY_NEGATIVE UNARY_INVERT UNARY_POSITIVE CALL_INTRINSIC_1 "
    "PRECALL CALL CALL_KW CALL_FUNCTION_EX LOAD_ATTR FOR_ITER".split()
)
_STORES = frozenset(("STORE_FAST", "STORE_NAME", "STORE_GLOBAL", "STORE_DEREF"))
_IDLE = frozenset(("NOP", "CACHE", "EXTENDED_ARG", "RESUME", "PRECALL", "KW_NAMES", "DELETE_FAST", "DELETE_NAME"))

# How many values an instruction takes off the stack and puts on it. One that is not here, or handled in `_step`, ends
# the search: no name is better than a wrong one.
_TAKES_AND_PUTS = {
    "BINARY_OP": (2, 1), "BINARY_SUBSCR": (2, 1), "BINARY_SLICE": (3, 1), "COMPARE_OP": (2, 1), "IS_OP": (2, 1),
    "CONTAINS_OP": (2, 1), "UNARY_NEGATIVE": (1, 1), "UNARY_INVERT": (1, 1), "UNARY_POSITIVE": (1, 1),
    "UNARY_NOT": (1, 1), "TO_BOOL": (1, 1), "CALL_INTRINSIC_1": (1, 1), "CALL_INTRINSIC_2": (2, 1),
    "STORE_SUBSCR": (3, 0), "STORE_SLICE": (4, 0), "STORE_ATTR": (2, 0), "DELETE_SUBSCR": (2, 0),
    "POP_TOP": (1, 0), "PUSH_NULL": (0, 1), "GET_ITER": (1, 1), "GET_LEN": (1, 2), "BEFORE_WITH": (1, 2),
    "LIST_APPEND": (1, 0), "LIST_EXTEND": (1, 0), "SET_ADD": (1, 0), "SET_UPDATE": (1, 0), "MAP_ADD": (2, 0),
    "DICT_UPDATE": (1, 0), "DICT_MERGE": (1, 0), "LIST_TO_TUPLE": (1, 1), "FORMAT_SIMPLE": (1, 1),
    "FORMAT_WITH_SPEC": (2, 1), "CONVERT_VALUE": (1, 1), "SET_FUNCTION_ATTRIBUTE": (2, 1), "LOAD_METHOD": (1, 2),
}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def stored_name(code: CodeType, lasti: int) -> str | None | _Returned:
    """Says where the value goes that the instruction at byte offset `lasti` leaves on top of the stack.

    Returns:
        The first local, global or class-level variable that it is stored to, `RETURNED` if the function returns it,
        None if it is used up otherwise (an operand, an argument, an element, an attribute).
    """
    instructions, index_of = _instructions(code)
    # An offset within the inline cache of an instruction belongs to that instruction.
    index = index_of.get(lasti - lasti % 2)
    if index is None or instructions[index].opname not in _PRODUCERS:
        return None
    if instructions[index].opname == "PRECALL":  # Python 3.11 makes some calls here, and then passes over CALL
        index += 1
    stack: list[Any] = [_VALUE]
    while index + 1 < len(instructions):
        instruction = instructions[index + 1]
        name, target = instruction.opname, index + 1
        if name == "RETURN_VALUE":
            # What a generator or a coroutine returns does not go to the frame that runs it.
            plain = not code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
            return RETURNED if plain and stack and stack[-1] is _VALUE else None
        if name == "JUMP_FORWARD":
            target = index_of[instruction.argval] - 1
        elif name == "FOR_ITER":
            target = _after_loop(instructions, index_of[instruction.argval]) - 1
            _take(stack, 1)
        elif (stored := _step(instruction, stack)) is not None:
            return stored or None
        # Of two branches the first is followed: within an expression both lead to the same place.
        if not any(item is _VALUE or (isinstance(item, list) and _VALUE in item) for item in stack):
            return None
        index = target
    return None


@functools.lru_cache(maxsize=512)
def _instructions(code: CodeType) -> tuple[list[dis.Instruction], dict[int, int]]:
    """The instructions of `code`, and the index of the one that each byte offset lies in."""
    instructions = list(dis.get_instructions(code))
    index_of = {}
    for index, instruction in enumerate(instructions):
        end = instructions[index + 1].offset if index + 1 < len(instructions) else len(code.co_code)
        index_of.update(dict.fromkeys(range(instruction.offset, end, 2), index))
    return instructions, index_of


def _after_loop(instructions: list[dis.Instruction], index: int) -> int:
    """The index that a loop goes on at when FOR_ITER, which has then dropped the iterator, jumps to `index`."""
    if instructions[index].opname == "END_FOR":
        # FOR_ITER passes over the instructions that would drop the iterator: one in Python 3.12, two in 3.13.
        index += 1 if sys.version_info < (3, 13) else 2
    return index


def _take(stack: list[Any], count: int) -> list[Any]:
    """Takes `count` values off the stack, below whose known part anything may lie; top of the stack last."""
    taken = [None] * (count - len(stack)) + stack[max(len(stack) - count, 0) :]
    del stack[max(len(stack) - count, 0) :]
    return taken if count else []


def _step(instruction: dis.Instruction, stack: list[Any]) -> str | None:
    """Runs one instruction on `stack`; returns the name the value is stored to, "" to give up, None to go on."""
    name, arg = instruction.opname, instruction.arg or 0
    if name in _IDLE:
        pass
    elif name in _STORES:
        if _take(stack, 1)[0] is _VALUE:
            return str(instruction.argval)
    elif name == "STORE_FAST_STORE_FAST":
        second, first = _take(stack, 2)
        if first is _VALUE or second is _VALUE:
            return str(instruction.argval[0 if first is _VALUE else 1])
    elif name == "STORE_FAST_LOAD_FAST":
        if _take(stack, 1)[0] is _VALUE:
            return str(instruction.argval[0])
        stack.append(None)
    elif name in ("SWAP", "COPY"):
        stack[:0] = [None] * (arg - len(stack))
        if name == "SWAP":
            stack[-1], stack[-arg] = stack[-arg], stack[-1]
        else:
            stack.append(stack[-arg])
    elif name in ("BUILD_TUPLE", "BUILD_LIST"):
        stack.append(_take(stack, arg))
    elif name == "UNPACK_SEQUENCE":
        (packed,) = _take(stack, 1)
        stack += packed[::-1] if isinstance(packed, list) and len(packed) == arg else [None] * arg
    elif name.startswith(("POP_JUMP", "JUMP_IF_")):  # the second: `and` and `or`, before Python 3.12
        _take(stack, 1)
    elif (counts := _takes_and_puts(name, arg)) is not None:
        _take(stack, counts[0])
        stack += [None] * counts[1]
    else:
        return ""
    return None


def _takes_and_puts(name: str, arg: int) -> tuple[int, int] | None:
    """How many values an instruction takes and puts, where that hangs on its argument; None if it is not known."""
    if name in _TAKES_AND_PUTS:
        return _TAKES_AND_PUTS[name]
    if name == "LOAD_ATTR":  # an odd argument loads a method, which is two values, in Python 3.12 and later
        return 1, 1 + (arg & 1 if sys.version_info >= (3, 12) else 0)
    if name == "LOAD_SUPER_ATTR":
        return 3, 1 + (arg & 1)
    if name == "MAKE_FUNCTION":  # each bit of the argument stands for one more value, before Python 3.13
        return 1 + (arg & 15).bit_count(), 1
    if name == "LOAD_FAST_LOAD_FAST":
        return 0, 2
    if name.startswith("LOAD_"):
        return 0, dis.stack_effect(dis.opmap[name], arg)
    variable = {
        "CALL": arg + 2, "CALL_KW": arg + 3, "CALL_FUNCTION_EX": 3 + (arg & 1), "BUILD_MAP": 2 * arg,
        "BUILD_CONST_KEY_MAP": arg + 1, "BUILD_SET": arg, "BUILD_STRING": arg, "BUILD_SLICE": arg,
        "FORMAT_VALUE": 2 if arg & 4 else 1,
    }  # fmt: skip
    return (variable[name], 1) if name in variable else None
