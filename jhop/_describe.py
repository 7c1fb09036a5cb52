"""What is said of hooks that were inlined: names and places of their values, and why one cannot be traced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop._contract import HookFn
from jhop._graph import NO_INFO, Info
from jhop._scalar import scalar_p
from jhop._source import describe_hook, eqn_name, is_user_file, origin_of, user_frame


class Described(Mapping[Any, Info]):
    """Info by variable, in which what hooks computed is described when the first question is asked: only print asks."""

    def __init__(self, jaxpr: Any, known: Callable[[], dict[Any, Info]]):
        self._jaxpr = jaxpr
        self._known = known

    @functools.cached_property
    def _all(self) -> dict[Any, Info]:
        return _describe_hook_values(self._jaxpr, self._known())

    def __getitem__(self, variable: Any) -> Info:
        return self._all[variable]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def get(self, variable: Any, default: Any = None) -> Any:
        return self._all.get(variable, default)


def info_of(known: dict[Any, Info], kept: dict[Any, Info], repeated: Any) -> dict[Any, Info]:
    """What is known of the values of a graph.

    Args:
        known: of those that were traced.
        kept: of those that stayed as they were.
        repeated: per repetition of equations, their variables there by those that were traced, and the latter.
    """
    info = {**known, **kept}
    for new, made in repeated:
        info.update((new[variable], info[variable].renamed(new)) for variable in made if variable in info)
    return info


def _describe_hook_values(jaxpr: Any, info: dict[Any, Info]) -> dict[Any, Info]:
    """Adds source positions and the user's local names to values that hooks computed."""
    made: dict[Any, Any] = {}  # equations, by what hooks computed; the rest was carried over from the captured graph
    for eqn in jaxpr.eqns:
        for variable in eqn.outvars:
            if variable not in info or info[variable].stage.startswith("hook"):
                made[variable] = eqn
    place = {id(eqn): user_frame(eqn) for eqn in made.values()}
    inside = _inside_one_instruction(made, place, info)
    for variable, eqn in made.items():
        frame = place[id(eqn)]
        if frame is None:
            continue
        known = info.get(variable)
        name = None if eqn.primitive is scalar_p or variable in inside else eqn_name(eqn)
        stage = known.stage if known else "hook"
        if name is None and stage == "hook_result":
            name = "result"
        base = known or Info()
        origin = base.origin or origin_of(*frame)
        info[variable] = dataclasses.replace(base, name=name, origin=origin, stage=stage)
    return info


def _inside_one_instruction(made: dict[Any, Any], place: dict[int, Any], info: dict[Any, Info]) -> set[Any]:
    """Values that exist only within one instruction of the user's, such as a cast before a product."""
    inside = set()
    for eqn in made.values():
        here = place[id(eqn)]
        for atom in eqn.invars if here is not None else ():
            maker = None if isinstance(atom, jex_core.Literal) else made.get(atom)
            if maker is not None and place[id(maker)] == here and info.get(atom, NO_INFO).operator is None:
                inside.add(atom)
    return inside


_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def explain(hook: HookFn, error: Exception) -> str:
    """The message for an exception that left a hook while it was traced."""
    head = f"{describe_hook(hook.base)} cannot be traced"
    place = _place_of(error)
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return (
            f"{head}: it branches on the value of an array{place}. While the backward is traced, arrays have no "
            "values. Use `jnp.where` or `jax.lax.cond`, or fullgraph=False to run the hook on the host each time."
        )
    if isinstance(error, _VALUE_ERRORS):
        return (
            f"{head}: it reads the value of an array{place} (float(), int(), .item(), .tolist(), numpy). While the "
            "backward is traced, arrays have no values. Stay with jax.numpy, or use fullgraph=False to run the hook "
            "on the host each time."
        )
    return f"{head}: it raised {type(error).__name__}: {error}{place}. Nothing was written."


def _place_of(error: Exception) -> str:
    place, tb = "", error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if is_user_file(code.co_filename):
            origin = origin_of(code, tb.tb_lasti)
            place = f'\n  File "{origin.file}", line {origin.line}, in {origin.function}\n    {origin.text}\n'
        tb = tb.tb_next
    return place
