"""Names that code uses, read off code objects without running them."""

from __future__ import annotations

import dis
import functools
import types
from typing import Any, NamedTuple

_GLOBALS = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"}
_SIMPLE = {"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME"}
_READS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "IMPORT_FROM"}


# Ways to ask for text; only with one of these does the text of an object matter to a traced function.
TEXT = frozenset({"str", "repr", "format", "print"})
# What runs when a class or an object is made, and does not for one that is there.
CONSTRUCTORS = frozenset({"__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__"})
TEXT_METHODS = frozenset({"__str__", "__repr__", "__format__"})


class Names(NamedTuple):
    """What code names, the code nested in it included.

    Attributes:
        attributes: names of attributes, and strings that could be such names.
        globals: global variables.
        modules: modules that it imports.
        cells: variables of functions around it.
    """

    attributes: frozenset[str]
    globals: frozenset[str]
    modules: frozenset[str]
    cells: frozenset[str]


_OUTSIDE = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR"}


@functools.lru_cache(maxsize=4096)
def stores_outside(code: types.CodeType) -> bool:
    """Whether code, that nested in it included, has a statement that may write to more than its own variables."""
    return any(
        instruction.opname in _OUTSIDE
        or (instruction.opname in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars)
        for instruction in dis.get_instructions(code)
    ) or any(stores_outside(const) for const in code.co_consts if isinstance(const, types.CodeType))


@functools.lru_cache(maxsize=4096)
def names_in_code(code: types.CodeType, without: frozenset[types.CodeType] | None = None) -> Names:
    """What code names; with `without`, leaving out those code objects, and names that are only stored to."""
    attributes = {name for name in code.co_names if name[0] != "@"} if without is None else set()
    loaded: set[str] = set()
    imported: set[str] = set()
    cells = set(code.co_freevars) if without is None else set()
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if isinstance(instruction.argval, str) and instruction.argval.startswith("@"):
            continue  # pytest puts such names into the code of `assert`
        if name == "IMPORT_NAME":
            imported.add(instruction.argval)
        elif without is None:
            if name in _GLOBALS:
                loaded.add(instruction.argval)
        elif name in _READS:
            attributes.add(instruction.argval)
            if name in _GLOBALS:
                loaded.add(instruction.argval)
        elif "DEREF" in name and name.startswith("LOAD"):
            cells.add(instruction.argval)
        elif name.startswith(("FORMAT_", "CONVERT_VALUE")):
            attributes.add("format")
        if name == "MATCH_CLASS":  # `case Point(0)`
            attributes.add("__match_args__")
    attributes -= _only_with_constants(code)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            if without is None or const not in without:
                inner = names_in_code(const, without)
                attributes |= inner.attributes
                loaded |= inner.globals
                imported |= inner.modules
                cells |= inner.cells
        else:
            attributes |= names_in_value(const)
    return Names(frozenset(attributes), frozenset(loaded), frozenset(imported), frozenset(cells))


def _only_with_constants(code: types.CodeType) -> set[str]:
    """Which of `getattr` and its like the code only calls as `getattr(x.y, "name")`: that is one name more."""
    found: dict[str, bool] = {}
    instructions = [each for each in dis.get_instructions(code) if each.opname != "PUSH_NULL"]
    for i, instruction in enumerate(instructions):
        if instruction.opname in _GLOBALS and instruction.argval in ("getattr", "hasattr", "setattr", "delattr"):
            j = i + 2
            while j < len(instructions) and instructions[j].opname == "LOAD_ATTR":
                j += 1
            rest = [each.opname for each in instructions[j : j + 3]]
            if rest[1:2] and rest[1] in {"LOAD_CONST", *_SIMPLE}:  # what to return where there is no such attribute
                del rest[1]
            given = instructions[i + 1].opname in _SIMPLE and rest[0] == "LOAD_CONST" and "CALL" in rest[1]
            found[instruction.argval] = found.get(instruction.argval, True) and given
    return {name for name, given in found.items() if given}


def names_in_value(value: Any) -> set[str]:
    """Strings that could be names of attributes: `"a.b"` of an `attrgetter`, the tuple of `case Point(x=0)`."""
    if isinstance(value, str):
        return set(filter(str.isidentifier, value.split(".")))
    return set().union(*map(names_in_value, value)) if isinstance(value, (tuple, frozenset)) else set()


def slot_names(cls: type) -> dict[str, str]:
    """What instances of a class keep in `__slots__`: keys, each with the attribute's name, private ones mangled.

    A key is the name, or `__mro__[1].name` where a slot is hidden by another of its name, in a class before that one.
    """
    found: dict[str, str] = {}
    for place, base in enumerate(cls.__mro__):
        if "__slots__" in base.__dict__:
            for name, value in base.__dict__.items():
                if isinstance(value, types.MemberDescriptorType) and name not in _NO_STATE:
                    found[f"__mro__[{place}].{name}" if name in found else name] = name
    return found


_NO_STATE = ("__dict__", "__weakref__")


def slot_member(cls: type, key: str) -> Any:
    """What reads and writes the slot with a key of `slot_names`; None where there is none.

    It is asked instead of the object: a subclass may have hidden it, behind a property for one.
    """
    place, _, name = key.rpartition(".")
    bases = cls.__mro__[int(place[len("__mro__[") : -1]) :] if place else cls.__mro__
    members = (base.__dict__.get(name) for base in bases if "__slots__" in base.__dict__)
    return next((member for member in members if isinstance(member, types.MemberDescriptorType)), None)
