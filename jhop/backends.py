"""Backends: `backend(gm, example_inputs) -> callable`, where the callable takes and returns flat lists.

Any function of that form is a backend; these three come with jhop:

- `eager` runs the graph one equation at a time;
- `aot_eager` does too, and counts as an ahead-of-time compile (its graphs have an id, as in PyTorch);
- `xla` compiles the graph with `jax.jit`. "inductor" is an alias of its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jhop._errors import JhopError
from jhop._graph import GraphModule
from jhop._program import Program

__all__ = ("Backend", "aot_eager", "eager", "xla")

Backend = Callable[[GraphModule, list[Any]], Callable[..., list[Any]]]

_next_aot_id = 0


def take_aot_id() -> int:
    """The number of the next ahead-of-time compile; it is part of names in printed graphs (`aot3_tangents_1`)."""
    global _next_aot_id
    _next_aot_id += 1
    return _next_aot_id - 1


def aot_ids(start: int | None = None) -> int:
    """The next number; with `start`, counting goes on from there and the old next number is returned."""
    global _next_aot_id
    before = _next_aot_id
    if start is not None:
        _next_aot_id = start
    return before


def eager(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., list[Any]]:
    """Runs the graph one equation at a time.

    Args:
        gm: the graph.
        example_inputs: the values that it is about to run on: arrays, then lifted numbers and arrays.
    """
    return Program(gm, lambda device: device)


def aot_eager(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., list[Any]]:
    """As `eager`, with an ahead-of-time id. Arguments as for `eager`."""
    take_aot_id()
    return eager(gm, example_inputs)


def xla(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., list[Any]]:
    """Compiles the graph with XLA, through `jax.jit`. Arguments as for `eager`."""
    take_aot_id()
    return xla_program(gm)


def xla_program(gm: GraphModule) -> Callable[..., list[Any]]:
    """What `xla` returns, for stages that took their id themselves."""
    return Program(gm, jax.jit, only_read=True)


NAMED: dict[str, Backend] = {"eager": eager, "aot_eager": aot_eager, "xla": xla, "inductor": xla}


def transform_of(backend: Any) -> Callable[..., Any] | None:
    """What a backend does to a function of arrays; None for one of the user's, which takes whole graphs only."""
    return getattr(backend, "transform", {eager: _as_it_is, aot_eager: _as_it_is, xla: jax.jit}.get(backend))


def _as_it_is(function: Any) -> Any:
    return function


def find(backend: Any, where: str) -> Backend:
    """The backend function for a name or a callable.

    Raises:
        JhopError: there is no such backend.
    """
    if callable(backend):
        return backend
    if isinstance(backend, str) and backend in NAMED:
        return NAMED[backend]
    raise JhopError(
        f"{where}: unknown backend {backend!r}. Expected one of {', '.join(map(repr, NAMED))}, "
        "or a function `backend(gm, example_inputs) -> callable`."
    )


def run_backend(backend: Backend, gm: GraphModule, example_inputs: list[Any], where: str) -> Callable[..., list[Any]]:
    """What a backend makes of a graph.

    Raises:
        JhopError: it is not callable.
    """
    run = backend(gm, example_inputs)
    if not callable(run):
        raise JhopError(
            f"{where}: a backend must return a callable for the graph that it is given, got {type(run).__name__}."
        )
    return run
