"""Inlining into a jaxpr at the price of what is new: equations that stay as they are are not traced again.

`Splice.evaluate` is `_interp.evaluate` for jaxprs most of whose equations keep their meaning. A stretch of these
becomes one equation, `stretch`, while what replaces the others is traced around it; `Splice.expand` puts the stretch's
own equations back, with their source, name stack and mesh context. That is quicker than binding each of them again, and
loses nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._interp import Rule

_stretch_p = jex_core.Primitive("stretch")
_stretch_p.multiple_results = True


@_stretch_p.def_abstract_eval
def _stretch_abstract_eval(*avals: Any, key: _Key) -> list[Any]:
    return [variable.aval for variable in key.outs]


class _Key:
    """A stretch of equations, with the variables that it reads and those that are read after it."""

    def __init__(self, eqns: list[Any], ins: list[Any], outs: list[Any]):
        self.eqns = eqns
        self.ins = ins
        self.outs = outs


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

    def evaluate(self, args: list[Any], rule: Rule, note: Callable[[Any, Any], None] = lambda *_: None) -> list[Any]:
        """Evaluates the jaxpr on tracers; arguments and result as in `_interp.evaluate`.

        `note` is not called for variables that live within one stretch: they stay the variables that they are.
        """
        env: dict[Any, Any] = {}
        waiting: list[Any] = []

        def write(variables: Any, values: Any) -> None:
            for variable, value in zip(variables, values, strict=True):
                env[variable] = value
                note(variable, value)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

        def one_by_one(eqns: list[Any]) -> None:
            for eqn in eqns:
                write(eqn.outvars, _compat.bind_eqn(eqn, [read(atom) for atom in eqn.invars]))

        def settle(end: int) -> None:
            eqns, waiting[:] = list(waiting), []
            key = self._key(eqns, end)
            # What replaced an equation may have given a value of another type (weak, sharded); so may the arguments.
            fits = all(jax.typeof(env[variable]) == variable.aval for variable in key.ins)
            if len(eqns) > 1 and fits:
                write(key.outs, _stretch_p.bind(*(env[variable] for variable in key.ins), key=key))
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

    def _key(self, eqns: list[Any], end: int) -> _Key:
        made = {variable: None for eqn in eqns for variable in eqn.outvars}
        read = {atom: None for eqn in eqns for atom in eqn.invars if not isinstance(atom, jex_core.Literal)}
        ins = [variable for variable in read if variable not in made]
        return _Key(eqns, ins, [variable for variable in made if self._last_use.get(variable, -1) >= end])


def expand(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Puts each stretch's own equations in its place.

    Returns:
        (the open jaxpr, the variables in it that are those of the jaxpr which was evaluated).
    """
    eqns, kept = [], []
    for eqn in jaxpr.eqns:
        if eqn.primitive is not _stretch_p:
            eqns.append(eqn)
            continue
        key = eqn.params["key"]
        new = dict(zip([*key.ins, *key.outs], [*eqn.invars, *eqn.outvars], strict=True))
        for old in key.eqns:
            invars = [atom if isinstance(atom, jex_core.Literal) else new.get(atom, atom) for atom in old.invars]
            eqns.append(old.replace(invars=invars, outvars=[new.get(variable, variable) for variable in old.outvars]))
            kept += [variable for variable in old.outvars if variable not in new]
    return jaxpr.replace(eqns=eqns), kept


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
