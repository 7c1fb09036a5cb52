"""What is said of values that inlined hooks computed: their names and places."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.extend.core as jex_core

from jhop._graph import NO_INFO, Info
from jhop._scalar import scalar_p
from jhop._source import eqn_name, origin_of, user_frame


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
