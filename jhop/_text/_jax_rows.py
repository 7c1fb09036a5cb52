"""Rows of a printed function, and what they are made of: origins, the user's names, objects that have no source."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._expr import INFIX, PREFIX
from jhop._graph import GraphModule
from jhop._scalar import fill
from jhop._source import Origin, eqn_name, origin_of, user_frames
from jhop._text._jax_source import number
from jhop._trace_wrapped import HookFn, trace_wrapped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a printed function.

    Attributes:
        kind: "def", "step", "return" or "note".
        code: the statement, without indentation.
        depth: of indentation.
        names: what it assigns, or the name of the function that it defines.
        type: of what it assigns.
        origin: where in the user's source it comes from, a line of another kind of place (`MulBackward (NodeCall 1)`).
        stage: "hook" for what hooks do, else "".
    """

    kind: str
    code: str
    depth: int
    names: str = ""
    type: str = ""
    origin: Origin | str | None = None
    stage: str = ""


@dataclasses.dataclass(kw_only=True)
class Shared:
    """What all scopes of one text have in common.

    Attributes:
        opaque: objects that Python source cannot hold, by the keyword-only parameter that brings them: (object, what
            it is).
        names: those names by the object's id; it may have been given back since.
        flat: hooks as functions of flat inputs, by the id of the hook.
        numbers: variables that are Python numbers when the text runs.
        scope: other globals that the text reads.
        checked: answers to checks of spellings.
        imports: statements that it needs beyond `jax`, `jnp` and `lax`.
    """

    gm: GraphModule
    opaque: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    flat: dict[int, FlatHook] = dataclasses.field(default_factory=dict)
    numbers: set[Any] = dataclasses.field(default_factory=set)
    scope: dict[str, Any] = dataclasses.field(default_factory=dict)
    checked: dict[Any, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    imports: set[str] = dataclasses.field(default_factory=set)


class Jhop:
    """What the text reads of `import jhop`."""

    trace_wrapped = staticmethod(trace_wrapped)


class OpaqueEquation:
    """An equation as a function of its inputs that returns the list of its outputs."""

    def __init__(self, eqn: Any):
        self._eqn = eqn

    def __call__(self, *args: Any) -> list[Any]:
        return _compat.bind_eqn(self._eqn, list(args))


class FlatHook:
    """A hook that a transformation derived, in the form in which `jhop.trace_wrapped` takes hooks."""

    def __init__(self, hook: HookFn):
        self._hook = hook
        self.__name__ = hook.name

    def __call__(self, *args: Any) -> Any:
        return self._hook.call(*args)[0]


def hook_word(name: str) -> str:
    return "hook" if name == "<lambda>" else name.replace("<lambda>", "hook")


def known_flat(shared: Shared, hook: HookFn) -> FlatHook:
    """One object per derived hook, however often it occurs."""
    found = shared.flat.get(id(hook))
    if found is None:
        found = shared.flat[id(hook)] = FlatHook(hook)
    return found


def origin_of_eqn(eqn: Any) -> Origin | None:
    frames = user_frames(eqn)
    return origin_of(*frames[0]) if frames else None


def place_of(origin: Origin | str) -> Any:
    """Equal for origins that print shows once."""
    return origin if isinstance(origin, str) else (origin.file, origin.line)


def origin_text(origin: Origin | str) -> str:
    """`clip.py:12 in clip: return ct * scale`, the same wherever the file lies."""
    if isinstance(origin, str):
        return origin
    function = origin.function.rpartition("<locals>.")[2]
    text = f": {origin.text}" if origin.text else ""
    return f"{os.path.basename(origin.file)}:{origin.line} in {function}{text}"


def local_names(eqns: list[Any]) -> dict[Any, str]:
    """The user's variables, by the first output of the equation that makes their value.

    Transposed and linearised equations have the frames of the forward ones that they come from, so they are left out;
    and of the equations that one expression makes, only the last has its value.
    """
    found: dict[Any, str] = {}
    place: dict[Any, Any] = {}
    for eqn in eqns:
        here = user_frames(eqn)[:1]
        for atom in eqn.invars:
            if not isinstance(atom, jex_core.Literal) and here and place.get(atom) == here:
                found.pop(atom, None)
        if not here or not eqn.outvars:
            continue
        place.update(dict.fromkeys(eqn.outvars, here))
        stack = str(eqn.source_info.name_stack)
        name = None if "transpose(" in stack or "jvp(" in stack else eqn_name(eqn)
        if name is not None:
            found[eqn.outvars[0]] = name
    return found


def in_mesh(eqn: Any) -> bool:
    """Inside shard_map a step cannot be traced by itself, as its axes are known only there."""
    return any(_compat.varying_axes(v.aval) for v in (*eqn.invars, *eqn.outvars))


def arithmetic(eqn: Any, texts: list[str]) -> str:
    """One step of arithmetic on lifted numbers, in Python."""
    op = eqn.params["op"]
    operands = [
        text if given is None else number(text)
        for given, text in zip(eqn.params["template"], fill(eqn.params["template"], texts), strict=True)
    ]
    operands = [f"({text})" if text.startswith("-") else text for text in operands]
    if op in INFIX:
        return f"{operands[0]} {INFIX[op]} {operands[1]}"
    if op in PREFIX:
        return f"{PREFIX[op]}{operands[0]}"
    # `float(n)` refuses tracers, and the product is the same number.
    return f"{operands[0]} * 1.0" if op == "float" else f"{op}({operands[0]})"
