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
import jax.numpy as jnp
import numpy as np

from jhop import _compat
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
    ours: list[tuple[Any, Any]] = [(eager, _as_it_is), (aot_eager, _as_it_is), (xla, jax.jit)]
    return getattr(backend, "transform", next((does for known, does in ours if known is backend), None))


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


def checked(gm: GraphModule, outs: Any, where: str, *, types: bool) -> list[Any]:
    """What a backend's callable returned for a graph, once it is known to be what the graph returns.

    Args:
        types: whether to look at shapes and dtypes: a backend is the user's.

    Raises:
        JhopError: it is not.
    """
    what = f"{where}: a backend's callable must return"
    if not isinstance(outs, (list, tuple)):
        raise JhopError(f"{what} a list of the graph's outputs, got {type(outs).__name__}.")
    jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
    if len(outs) != len(jaxpr.outvars):
        raise JhopError(f"{what} all {len(jaxpr.outvars)} outputs of the graph, got {len(outs)}.")
    if types:
        for i, (out, variable) in enumerate(zip(outs, jaxpr.outvars, strict=True)):
            if not _is_of_type(out, variable.aval):
                raise JhopError(f"{what} outputs of the graph's types, got {out!r} for output {i}: {variable.aval}.")
    return [jnp.asarray(out) if isinstance(out, np.ndarray) else out for out in outs]


def _is_of_type(value: Any, aval: Any) -> bool:
    """Whether a value may stand for an output, of which sizes may be symbols. Numbers may be Python's or arrays."""
    shape = jnp.shape(value)
    sizes = zip(shape, aval.shape, strict=False)
    same = len(shape) == len(aval.shape) and all(
        size == wanted for size, wanted in sizes if not _compat.is_dim_expr(wanted)
    )
    return same and (aval.weak_type or getattr(value, "dtype", None) == aval.dtype)
