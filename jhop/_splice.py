"""Inlining into a jaxpr at the price of what is new: equations that stay as they are are not traced again.

`Splice.evaluate` is `_interp.evaluate` for jaxprs most of whose equations keep their meaning. A stretch of these
becomes one equation, `section`, while what replaces the others is traced around it; `expand` puts the stretch's own
equations back, with their source, name stack and mesh context. That is quicker than binding each of them again, and
loses nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._interp import Rule, reader

_section_p = jex_core.Primitive("section")
_section_p.multiple_results = True


@_section_p.def_abstract_eval
def _section_abstract_eval(*avals: Any, section: Section) -> list[Any]:
    return [variable.aval for variable in section.outs]


class Section:
    """Equations in a row, with the variables that they read and those that are read after them.

    Args:
        names: for equations that are repeated elsewhere: the name stack in which they were made. Each repetition has
            variables of its own, and the name stack of its place.
    """

    def __init__(self, eqns: list[Any], ins: list[Any], outs: list[Any], names: Any = None):
        self.eqns = eqns
        self.ins = ins
        self.outs = outs
        self.names = names


def bind_section(values: Sequence[Any], section: Section) -> list[Any]:
    """One equation that stands for a section's until it is expanded; `values` stand for what that reads."""
    return _section_p.bind(*values, section=section)


class Splice:
    """One jaxpr that is evaluated, and then expanded.

    Args:
        jaxpr: closed, or open without constants.
        stays: whether an equation is to stay as it is; asked once for each.
    """

    def __init__(self, jaxpr: Any, stays: Callable[[Any], bool]):
        self._opened, self._consts = _compat.open_jaxpr(jaxpr)
        self._stays = stays
        self._last_use: dict[Any, int] = {}
        for index, eqn in enumerate(self._opened.eqns):
            self._last_use.update((atom, index) for atom in eqn.invars if not isinstance(atom, jex_core.Literal))
        end = len(self._opened.eqns)
        self._last_use.update((atom, end) for atom in self._opened.outvars if not isinstance(atom, jex_core.Literal))

    def evaluate(
        self, args: list[Any], rule: Rule, note: Callable[[Any, Any], None] = lambda *_: None
    ) -> list[Any]:
        """Evaluates the jaxpr on tracers; arguments and result as in `_interp.evaluate`.

        `note` is not called for variables that live within one stretch: they stay the variables that they are.
        """
        env: dict[Any, Any] = {}
        waiting: list[Any] = []

        def write(variables: Any, values: Any) -> None:
            for variable, value in zip(variables, values, strict=True):
                env[variable] = value
                note(variable, value)

        read = reader(env)

        def one_by_one(eqns: list[Any]) -> None:
            for eqn in eqns:
                write(eqn.outvars, _compat.bind_eqn(eqn, [read(atom) for atom in eqn.invars]))

        def settle(end: int) -> None:
            eqns, waiting[:] = list(waiting), []
            section = self._section(eqns, end)
            # What replaced an equation may have given a value of another type (weak, sharded); so may the arguments.
            fits = all(jax.typeof(env[variable]) == variable.aval for variable in section.ins)
            if len(eqns) > 1 and fits:
                write(section.outs, bind_section([env[variable] for variable in section.ins], section))
            else:
                one_by_one(eqns)

        write(self._opened.constvars, self._consts)
        write(self._opened.invars, args)
        for index, eqn in enumerate(self._opened.eqns):
            if not eqn.effects and self._stays(eqn):
                waiting.append(eqn)
                continue
            settle(index)
            values = [read(atom) for atom in eqn.invars]
            outs = rule(eqn, values)
            write(eqn.outvars, _compat.bind_eqn(eqn, values) if outs is None else outs)
        settle(len(self._opened.eqns))
        return [read(atom) for atom in self._opened.outvars]

    def _section(self, eqns: list[Any], end: int) -> Section:
        made = {variable: None for eqn in eqns for variable in eqn.outvars}
        read = {atom: None for eqn in eqns for atom in eqn.invars if not isinstance(atom, jex_core.Literal)}
        ins = [variable for variable in read if variable not in made]
        return Section(eqns, ins, [variable for variable in made if self._last_use.get(variable, -1) >= end])


def expand(jaxpr: Any) -> tuple[Any, list[Any], list[tuple[dict[Any, Any], list[Any]]]]:
    """Puts each section's own equations in its place.

    Returns:
        (the open jaxpr, the variables in it that are those of the jaxpr which was evaluated, for each repetition of a
        section the new variables by the old ones, and which of these it made).
    """
    eqns: list[Any] = []
    kept: list[Any] = []
    repeated = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is not _section_p:
            eqns.append(eqn)
            continue
        section = eqn.params["section"]
        new = dict(zip([*section.ins, *section.outs], [*eqn.invars, *eqn.outvars], strict=True))
        inner = [variable for old in section.eqns for variable in old.outvars if variable not in new]
        if section.names is None:
            kept += inner
        else:
            new.update((variable, jex_core.Var(variable.aval)) for variable in inner)
            repeated.append((new, [*section.outs, *inner]))
        for old in section.eqns:
            invars = [atom if isinstance(atom, jex_core.Literal) else new.get(atom, atom) for atom in old.invars]
            source = old.source_info
            if section.names is not None:
                source = _moved(source, section.names, eqn.source_info.name_stack)
            outvars = [new.get(variable, variable) for variable in old.outvars]
            eqns.append(old.replace(invars=invars, outvars=outvars, source_info=source))
    return jaxpr.replace(eqns=eqns), kept, repeated


def _moved(source: Any, before: Any, now: Any) -> Any:
    """An equation's source, for one like it in another place: `now` instead of `before` in front of its name stack."""
    names, n = source.name_stack, len(before)
    return source.replace(name_stack=now + names[n:]) if names.stack[:n] == before.stack else source


def retrace(
    jaxpr: Any, rule: Rule, stays: Callable[[Any], bool], apart: Callable[..., Any] = lambda fn, *args: fn(*args)
) -> Any:
    """Traces a jaxpr anew under `rule`, but for the equations that stay: the changed jaxpr, closed.

    Args:
        apart: calls the function that evaluates it.
    """
    opened, _ = _compat.open_jaxpr(jaxpr)
    splice = Splice(jaxpr, stays)
    closed = jax.make_jaxpr(lambda *args: apart(splice.evaluate, list(args), rule))(*(v.aval for v in opened.invars))
    changed, consts = _compat.open_jaxpr(closed)
    return jex_core.ClosedJaxpr(expand(changed)[0], consts)
