"""Graphs with hooks that cannot be traced: these run on the host at every run, with real values, in their turn.

At the top level the graph is cut there, so that the rest stays compiled. Inside loops and branches the compiled program
calls the hook back, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat
from jhop._contract import HookFn
from jhop._errors import Unsupported
from jhop._interp import reader
from jhop._records import lift_tuples
from jhop._source import describe_hook, hook_name
from jhop._trace_wrapped import inlining, trace_wrapped_p
from jhop._undo import reach_of
from jhop._walk import Walk


class _Piece(NamedTuple):
    """A part of a graph: a hook, or equations as one function.

    Attributes:
        run: a function of the values of `ins`, which returns those of `outs`.
        done: what nothing after it reads.
    """

    run: Callable[..., Any]
    ins: list[Any]
    outs: list[Any]
    done: list[Any]


def is_cut(jaxpr: Any) -> bool:
    """Whether there are hooks at the top level of an open jaxpr."""
    return any(eqn.primitive is trace_wrapped_p for eqn in jaxpr.eqns)


def cut(jaxpr: Any, compiled: Callable[[Any], Callable[..., Any]]) -> Callable[..., list[Any]]:
    """A function of flat inputs that runs an open jaxpr piece by piece.

    Args:
        jaxpr: without constants; each `trace_wrapped` equation at its top level is a hook that runs on the host.
        compiled: makes a function of a jaxpr without hooks.
    """
    groups: list[list[Any]] = [[]]
    for eqn in jaxpr.eqns:
        if eqn.primitive is trace_wrapped_p:
            groups += [[eqn], []]
        else:
            groups[-1].append(eqn)
    groups = [group for group in groups if group]
    last: dict[Any, int] = {}
    for index, group in enumerate([*groups, None]):
        atoms = jaxpr.outvars if group is None else [atom for eqn in group for atom in eqn.invars]
        last.update((atom, index) for atom in atoms if not isinstance(atom, jex_core.Literal))
    pieces = [_piece(jaxpr, group, index, last, compiled) for index, group in enumerate(groups)]

    def run(*flat: Any) -> list[Any]:
        env = dict(zip(jaxpr.invars, flat, strict=True))
        read = reader(env)
        for piece in pieces:
            outs = piece.run(*map(read, piece.ins))
            env.update(zip(piece.outs, outs, strict=True))
            for variable in piece.done:
                env.pop(variable, None)
        return [read(atom) for atom in jaxpr.outvars]

    return run


class Callback:
    """A hook that a compiled program calls back."""

    def __init__(self, hook: HookFn):
        self.hook = hook
        self.error: BaseException | None = None

    def bind(self, values: list[Any], avals: Any) -> list[Any]:
        """Puts the call into the jaxpr that is being made. What the program does in order stays in order."""
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        outs = jax.experimental.io_callback(self, shapes, *values, ordered=True)
        return [_compat.with_weak_type(out, aval.weak_type) for out, aval in zip(outs, avals, strict=True)]

    def __call__(self, *values: Any) -> list[Any]:
        try:
            return self.hook.call(*values)
        except BaseException as error:
            self.error = error  # JAX makes one of its own of it
            raise


class CannotRunOnHost(Unsupported):
    """A hook that cannot be traced is where it cannot run on the host either."""


def refuse_under_vmap(hook: HookFn) -> None:
    """Raises where a hook that cannot be traced gets one example's cotangent."""
    if "vmap" in hook.rules():
        raise CannotRunOnHost(
            f"{describe_hook(hook.base)} cannot be traced, and under jax.vmap it cannot run on the host: there is one "
            "call for all examples. Hook a value outside of jax.vmap, or change the hook."
        )


def leave(eqn: Any, values: list[Any], top: Any, callbacks: list[Callback]) -> list[Any]:
    """Leaves a hook to run on the host: the graph will be cut there, or the compiled program calls it back.

    Args:
        eqn: the hook's, in a jaxpr that is being inlined.
        top: the trace that makes the graph.
        callbacks: gets the callback.

    Raises:
        CannotRunOnHost: under vmap and in shard_map.
    """
    hook = eqn.params["fn"]
    refuse_under_vmap(hook)
    if _compat.staging() is top:
        with inlining(None):
            return _compat.bind_eqn(eqn, values)
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise CannotRunOnHost(
            f"{describe_hook(hook.base)} cannot be traced, and inside shard_map it cannot run on the host: each device "
            "would call it. Hook a value outside of shard_map, or change the hook."
        )
    callback = Callback(hook)
    callbacks.append(callback)
    with _compat.in_place_of(eqn):
        return callback.bind(values, eqn.params["out_avals"])


def waiting(run: Callable[..., list[Any]], callbacks: Sequence[Callback]) -> Callable[..., list[Any]]:
    """A run of a graph that ends when all hooks have run which its program calls back."""
    if not callbacks:
        return run

    def call(*flat: Any) -> list[Any]:
        outs = run(*flat)
        jax.block_until_ready(outs)
        jax.effects_barrier()
        return outs

    return call


def _piece(jaxpr: Any, group: list[Any], index: int, last: dict[Any, int], compiled: Callable[..., Any]) -> _Piece:
    ins = list(dict.fromkeys(atom for eqn in group for atom in eqn.invars if not isinstance(atom, jex_core.Literal)))
    made = [variable for eqn in group for variable in eqn.outvars]
    done = [variable for variable in [*ins, *made] if last.get(variable, -1) <= index]
    if group[0].primitive is trace_wrapped_p:
        hook: HookFn = group[0].params["fn"]
        return _Piece(hook.call, group[0].invars, made, done)
    ins = [variable for variable in ins if variable not in set(made)]
    outs = [variable for variable in made if last.get(variable, -1) > index]
    debug_info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return _Piece(compiled(jaxpr.replace(invars=ins, outvars=outs, eqns=group, debug_info=debug_info)), ins, outs, done)


def refusal_of(hook: Any, error: Unsupported) -> Unsupported | None:
    """Why a hook cannot be traced, if it is one of those of an error, or if it has state that nobody can lift."""
    if error.hook is not None or error.hooks:
        return error if any(hook is other for other in (error.hook, *error.hooks)) else None
    try:
        lift_tuples(Walk([(hook_name(hook), hook)]))
    except Unsupported as refused:
        return refused
    return None


def shared(gm: Any, there: Walk) -> dict[tuple[int, str], str]:
    """Where lifted state of a graph is that hooks on the host can reach too: containers, with a path.

    Args:
        there: what those hooks can reach now.
    """
    reached = {(id(c.obj), c.kind): c.names for c in there.containers}
    arrays = [value for value in _values_in(there) if isinstance(value, np.ndarray)]
    slots = [(*slot[:3], slot.container.get(slot.key)) for slot in gm.lifted.slots]
    slots += [(write.container, write.key, write.container.path_of(write.key), None) for write in gm.lifted.writes]
    found: dict[tuple[int, str], str] = {}
    for container, key, path, held in slots:
        place = id(container.obj), container.kind
        names: Any = reached.get(place, ())
        if names is None or key in names or (names and not isinstance(key, str)):
            found[place] = f"`{path}`"
        elif isinstance(held, np.ndarray) and any(np.may_share_memory(held, array) for array in arrays):
            found[place] = f"the array `{path}`"
    return found


def _values_in(walk: Walk) -> list[Any]:
    return [value for container in walk.containers for _, value in container.items()]


def sharing(gm: Any, hooks: list[Any], there: list[Any]) -> dict[int, str]:
    """(place in `hooks`, path) of those in a graph whose lifted state hooks on the host can reach too."""
    assert gm.lifted is not None
    both = shared(gm, reach_of(there))
    found = {}
    for i, hook in enumerate(hooks):
        if both and not any(hook is other for other in there):
            mine = [both.get((id(c.obj), c.kind)) for c in reach_of([hook]).containers]
            found.update({i: path for path in mine if path is not None})  # noqa: B035 (one of them will do)
    return found
