"""Which variable a value is stored to, read off a function's instructions: a small simulation of Python's stack.

The instruction at the recorded offset leaves the value on top of the stack; the simulation walks on from there until
the value is stored, returned or used up.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import sys
from types import CodeType
from typing import Any, Final


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
