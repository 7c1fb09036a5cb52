"""The options of `jax.jit`, read for one call and carried over to the program that runs in its place.

That program takes the arguments that are not static, and before them, where there is Python state, the state's arrays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax


class Named(NamedTuple):
    """Arguments by position and by name; a position may count from the end where the function takes `*args`."""

    nums: frozenset[int]
    names: frozenset[str]

    def positions(self, count: int) -> set[int]:
        """The positions among `count` positional arguments."""
        return {num % count for num in self.nums if -count <= num < count}


def named(fn: Callable[..., Any], nums: Any, names: Any) -> Named:
    """Arguments as `jax.jit` takes them: the way to say which that was left out is completed from the other.

    JAX's versions differ in positions from the end; here they count from the last parameter, as in the newest.

    Source: the documentation of `static_argnums` and `static_argnames` of `jax.jit`.
    """
    by_num = {nums} if isinstance(nums, int) else set(nums or ())
    by_name = {names} if isinstance(names, str) else set(names or ())
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return Named(frozenset(by_num), frozenset(by_name))
    kinds = [parameter.kind for parameter in parameters]
    count = kinds.count(inspect.Parameter.POSITIONAL_ONLY) + kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        by_num = {num % count if -count <= num < 0 else num for num in by_num}
    either = [
        (i, parameter.name)
        for i, parameter in enumerate(parameters)
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if nums is None:
        by_num = {i for i, name in either if name in by_name}
    elif names is None:
        by_name = {name for i, name in either if i in by_num}
    return Named(frozenset(by_num), frozenset(by_name))


class Options:
    """The options of one `jhop.jit`.

    Attributes:
        given: for `jax.jit` of the function itself.
        static: the static arguments.
    """

    def __init__(self, fn: Callable[..., Any], given: dict[str, Any]):
        jax.jit(fn, **given)  # raises what JAX has to say of them
        self.given = dict(given)
        self.static = self._resolve(fn, "static")
        self._places: dict[int, tuple[list[int], list[int]]] = {}  # static ones and others, by how many there are
        self._donated = self._resolve(fn, "donate")

    def _resolve(self, fn: Callable[..., Any], kind: str) -> Named:
        nums, names = self.given.pop(f"{kind}_argnums", None), self.given.pop(f"{kind}_argnames", None)
        found = named(fn, nums, names)
        if found.nums:
            self.given[f"{kind}_argnums"] = tuple(sorted(found.nums))
        if found.names:
            self.given[f"{kind}_argnames"] = tuple(sorted(found.names))
        return found

    def split(self, args: Any, kwargs: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...], dict[str, Any]]:
        """(static arguments as (place or name, value), the other positional ones, the other named ones)."""
        if not self.static.nums and not self.static.names:
            return [], args, kwargs
        places = self._places.get(len(args))
        if places is None:
            chosen = self.static.positions(len(args))
            each = range(len(args))
            places = self._places[len(args)] = (
                [i for i in each if i in chosen], [i for i in each if i not in chosen]
            )  # fmt: skip
        static: list[tuple[Any, Any]] = [(i, args[i]) for i in places[0]]
        others = tuple([args[i] for i in places[1]])
        if not kwargs:
            return static, others, kwargs
        static += [(name, kwargs[name]) for name in sorted(kwargs) if name in self.static.names]
        return static, others, {name: value for name, value in kwargs.items() if name not in self.static.names}

    def _shardings(self, count: int) -> tuple[Any, ...]:
        """Those of the positional arguments that are not static."""
        given = self.given["in_shardings"]
        return tuple(given) if isinstance(given, (tuple, list)) else (given,) * count

    def for_piece(self) -> dict[str, Any]:
        """Options of `jax.jit` for a part of the program, which is cut where hooks run on the host."""
        return {name: self.given[name] for name in ("compiler_options", "device", "backend") if name in self.given}

    def for_placing(self, n_args: int, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of `jax.jit` for what comes before and after those parts: (of arguments, of results).

        Both are for identities, the first of a tuple of positional arguments and a dict of named ones.
        """
        new = self.for_program(n_args, names, state=False)
        into = {name: value for name, value in new.items() if name.startswith(("donate_", "in_shardings")) and value}
        if "in_shardings" in into:
            into["out_shardings"] = (self._shardings(n_args - len(self.static.positions(n_args))), None)
        return into, {name: new[name] for name in ("out_shardings",) if name in new}

    def for_program(self, n_args: int, names: Collection[str], *, state: bool) -> dict[str, Any]:
        """Options of `jax.jit` for a program without static arguments.

        Args:
            n_args: how many positional arguments the function was called with.
            names: the arguments that it was given by name.
            state: whether arrays of state come before the arguments, and after the results.
        """
        new = {name: value for name, value in self.given.items() if not name.startswith(("static_", "donate_"))}
        static = self.static.positions(n_args)
        dynamic = [place for place in range(n_args) if place not in static]
        donated = self._donated.positions(n_args)
        new["donate_argnums"] = tuple(i + state for i, place in enumerate(dynamic) if place in donated)
        new["donate_argnames"] = tuple(sorted(self._donated.names & set(names)))
        if state and "in_shardings" in new:
            new["in_shardings"] = (None, *self._shardings(len(dynamic)))  # None: as the arrays are
        if state and "out_shardings" in new:
            new["out_shardings"] = (new["out_shardings"], None)
        return new
