"""Graphs with hooks that cannot be traced: cut at each of them, so that the rest stays compiled.

Such a hook runs on the host at every run, with real values, when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.extend.core as jex_core

from jhop._contract import HookFn
from jhop._source import hook_name
from jhop._trace_wrapped import trace_wrapped_p
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

    The function puts the Python state that those hooks can reach back to what it was if anything raises.
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
    hooks = [eqn.params["fn"] for eqn in jaxpr.eqns if eqn.primitive is trace_wrapped_p]

    def run(*flat: Any) -> list[Any]:
        env = dict(zip(jaxpr.invars, flat, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        containers = reach_of(hook.base for hook in hooks).containers
        before = [(container, container.items()) for container in containers]
        try:
            for piece in pieces:
                outs = piece.run(*map(read, piece.ins))
                env.update(zip(piece.outs, outs, strict=True))
                for variable in piece.done:
                    env.pop(variable, None)
        except BaseException:
            for container, items in before:
                container.restore(items)
            raise
        return [read(atom) for atom in jaxpr.outvars]

    return run


def reach_of(hooks: Any) -> Walk:
    """What hooks can reach that run on the host."""
    return Walk([(hook_name(hook), hook) for hook in hooks], strict=False)


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
