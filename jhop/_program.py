"""Programs: graphs as callables, cut in two where Python state is lifted.

Arithmetic on lifted Python numbers stays in Python: it is exact, and never waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat
from jhop._cut import cut, is_cut
from jhop._expr import CODE_NAMES, step_code, to_code
from jhop._graph import GraphModule
from jhop._interp import evaluate, symbols_in
from jhop._replay import replay_p
from jhop._scalar import fill, scalar_p


class DoesNotFit(Exception):
    """Lifted numbers are no longer of the types that a graph was traced with; the caller traces anew."""


class Program:
    """A callable on a graph's flat inputs, whose array part is `transform(function)`, e.g. `jax.jit` of it.

    Args:
        gm: the graph.
        transform: of the device's function.
        wait: whether numbers that depend on what happened on the device are computed after it, exactly. Otherwise they
            stay there, as scalar arrays: where the whole is traced, there is nothing to wait for.
        only_read: whether the device's function takes only those inputs that it reads: each costs something per call.

    Attributes:
        consts: arrays that the graph closes over; they are the first inputs of the device's function.
        device: `transform` of the function of arrays; where hooks run on the host, of each piece between them.
    """

    def __init__(self, gm: GraphModule, transform: Callable[..., Any], *, wait: bool = True, only_read: bool = False):
        jaxpr, self.consts = _compat.open_jaxpr(gm.jaxpr)
        self._gm = gm
        numbers = [v for v, given in zip(jaxpr.invars, gm.inputs, strict=True) if given.number is not None]
        host = set(numbers)
        host_eqns, device_eqns, late_eqns = [], [], []
        for eqn in jaxpr.eqns:
            if eqn.primitive in _NUMBER and host.issuperset(_variables([eqn])):
                host_eqns.append(eqn)
                host.update(eqn.outvars)
                continue
            device_eqns.append(eqn)
            if eqn.primitive in _NUMBER and wait:
                late_eqns.append(eqn)
        n_results = len(jaxpr.outvars) if gm.lifted is None else gm.lifted.n_outs
        late = {v for eqn in late_eqns for v in eqn.outvars}
        self._places = [
            "device"
            if i < n_results or isinstance(v, jex_core.Literal)
            else "host" if v in host else "late" if v in late else "device"
            for i, v in enumerate(jaxpr.outvars)
        ]  # fmt: skip
        device_outs = [v for v, place in zip(jaxpr.outvars, self._places, strict=True) if place == "device"]
        late_outs = [v for v, place in zip(jaxpr.outvars, self._places, strict=True) if place == "late"]
        late_eqns = _needed(late_eqns, late_outs, always=_is_check)
        inputs = dict.fromkeys(v for v in _variables(late_eqns) if v not in late)
        kept, waits = [v for v in inputs if v in host], [v for v in inputs if v not in host]
        self._n_waits = len(waits)
        self._sides: dict[int, tuple[list[int], list[int]]] = {}
        self._order = _order(self._places)
        device_outs += waits
        device_eqns = _needed(device_eqns, device_outs, always=lambda eqn: eqn.primitive not in _NUMBER)
        read = {*_variables(device_eqns), *(v for v in device_outs if not isinstance(v, jex_core.Literal))}
        feeds = [v for v in [*numbers, *(o for eqn in host_eqns for o in eqn.outvars)] if v in read]
        host_outs = [v for v, place in zip(jaxpr.outvars, self._places, strict=True) if place == "host"]
        self._host = _host_code(numbers, host_eqns, [host_outs, kept], feeds)
        self._late = _host_code([*kept, *waits], late_eqns, [late_outs], None) if late_eqns else None
        self._is_number = [v in host for v in jaxpr.invars]
        self._symbolic = bool(gm.shapes) and bool(symbols_in([v.aval for v in jaxpr.invars]))
        all_read = not only_read or self._symbolic  # sizes are those of all inputs
        self._taken = [v not in host and (all_read or v in read) for v in jaxpr.invars]
        self._takes_all = all(self._taken)
        arrays = [v for v, taken in zip(jaxpr.invars, self._taken, strict=True) if taken]
        device = jaxpr.replace(
            constvars=[],
            invars=[*jaxpr.constvars, *arrays, *feeds],
            outvars=device_outs,
            eqns=device_eqns,
            debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        if is_cut(device) and self._symbolic:
            self.device = self._cut_for_sizes(device, transform)
        elif is_cut(device):
            self.device = cut(device, lambda piece: transform(self._make_device(piece)))
        else:
            self.device = transform(self._make_device(device))

    def _make_device(self, device: Any) -> Callable[..., list[Any]]:
        symbolic = self._symbolic and bool(symbols_in([v.aval for v in device.invars]))

        def run(*flat: Any) -> list[Any]:
            return evaluate(device, list(flat), self._sizes_from(flat) if symbolic else None)

        run.__name__ = self._gm.name
        return run

    def _sizes_from(self, flat: Sequence[Any]) -> Any:
        """The rule that fills in sizes, from all that the device's part takes."""
        rest = iter(flat[len(self.consts) :])
        return self._gm.rule_for([0 if number else next(rest) for number in self._is_number])

    def _cut_for_sizes(self, device: Any, transform: Callable[..., Any]) -> Callable[..., list[Any]]:
        """As `cut`, with sizes filled in before: what the pieces take does not tell them."""
        made: dict[Any, Callable[..., list[Any]]] = {}

        def run(*flat: Any) -> list[Any]:
            types = tuple(map(jax.typeof, flat))
            if types not in made:
                rule = self._sizes_from(flat)
                closed = jax.make_jaxpr(lambda *args: evaluate(device, list(args), rule))(*flat)
                jaxpr, consts = _compat.open_jaxpr(closed)
                debug_info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
                jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=debug_info)
                pieces = cut(jaxpr, lambda piece: transform(lambda *args: evaluate(piece, list(args))))
                made[types] = functools.partial(pieces, *consts)
            return made[types](*flat)

        return run

    def __call__(self, *args: Any) -> list[Any]:
        if self._takes_all and self._late is None:
            return self.device(*self.consts, *args)
        numbers, arrays = self.split(args)
        return self.join(numbers, self.device(*self.consts, *arrays))

    def split(self, values: Sequence[Any], start: int = 0) -> tuple[Any, list[Any]]:
        """Does the host's part for the inputs from the `start`th on, before which there are only arrays.

        Returns:
            (what `join` takes, inputs of the device's function).

        Raises:
            DoesNotFit: a number no longer has the type that it had.
        """
        sides = self._sides.get(start)
        if sides is None:
            numbers, arrays = (_places(marks[start:]) for marks in (self._is_number, self._taken))
            sides = self._sides[start] = numbers, arrays
        numbers, arrays = sides
        outs, kept, feeds = self._host(*[values[i] for i in numbers])
        return (outs, kept), [values[i] for i in arrays] + feeds

    def join(self, numbers: Any, outs: Sequence[Any], start: int = 0) -> list[Any]:
        """The outputs of the graph from the `start`th on, from what `split` returned and the device's, from there on.

        It waits for the device where numbers depend on what happened there, such as which branch was taken.
        """
        outs_of_host, kept = numbers
        late: tuple[Any, ...] = ()
        if self._late is not None:
            count = len(outs) - self._n_waits
            late = self._late(*kept, *(np.asarray(array).tolist() for array in outs[count:]))[0]
            outs = outs[:count]
        every = (*outs, *outs_of_host, *late)
        return [every[i - start] for i in self._order[start:]]


def _places(marks: list[bool]) -> list[int]:
    return [i for i, marked in enumerate(marks) if marked]


def _order(places: list[str]) -> list[int]:
    """Where each output is found among those of the device, then those of the host, then the late ones."""
    place = {index: at for at, index in enumerate(i for kind in _KINDS for i, its in enumerate(places) if its == kind)}
    return [place[i] for i in range(len(places))]


_KINDS = ("device", "host", "late")
_NUMBER = (scalar_p, replay_p)
_LARGEST = {size: 2 ** (8 * size - 1) - 1 for size in (4, 8)}  # ints, by their bytes


def _is_check(eqn: Any) -> bool:
    """Whether an equation is there to raise an error."""
    return eqn.primitive is replay_p and eqn.params["expr"].op == "check"


def _variables(eqns: list[Any]) -> list[Any]:
    return [atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, jex_core.Literal)]


def _needed(eqns: list[Any], outs: list[Any], always: Callable[[Any], bool] = lambda eqn: False) -> list[Any]:
    """The equations that something in `outs` depends on, or an equation that is needed `always`."""
    live, kept = {v for v in outs if not isinstance(v, jex_core.Literal)}, []
    for eqn in reversed(eqns):
        if always(eqn) or not live.isdisjoint(eqn.outvars):
            kept.append(eqn)
            live.update(_variables([eqn]))
    return kept[::-1]


def _host_code(inputs: list[Any], eqns: list[Any], groups: list[list[Any]], feeds: list[Any] | None) -> Any:
    """A generated function of numbers.

    Args:
        groups: the variables that it returns, as tuples.
        feeds: variables that it returns after those, as a list, as the device takes them. Where it is None, the
            function runs after the device, and an error is the hook's.
    """
    given: dict[str, Any] = {"DoesNotFit": DoesNotFit, "feed": _feed, **CODE_NAMES}
    names: dict[Any, str] = {v: f"n{i}" for i, v in enumerate(inputs)}

    def name(value: Any) -> str:
        given[f"k{len(given)}"] = value
        return f"k{len(given) - 1}"

    lines = []
    for eqn in eqns:
        out = names[eqn.outvars[0]] = f"n{len(names)}"
        read = [
            name(np.asarray(v.val).tolist()) if isinstance(v, jex_core.Literal) else names[v] for v in eqn.invars
        ]  # a branch may be known from the start
        if eqn.primitive is replay_p:
            code = to_code(eqn.params["expr"], read.__getitem__)
        else:
            template = tuple(part if part is None else name(part) for part in eqn.params["template"])
            code = step_code(eqn.params["op"], fill(template, read))
        lines.append(f"        {out} = {code}")
        if feeds is not None:
            lines.append(f"        if type({out}) is not {name(eqn.params['python'])}: raise DoesNotFit")
    source = f"def host({', '.join(names[v] for v in inputs)}):\n"
    if lines:  # where a step fails, the hook would have met it: let it, in a new trace
        failed = "DoesNotFit from None" if feeds is not None else ""
        source += "    try:\n" + "\n".join(lines) + f"\n    except Exception:\n        raise {failed}\n"
    outs = ", ".join(f"({''.join(f'{names[v]}, ' for v in group)})" for group in groups)
    fed = ", ".join(f"feed({names[v]}, {name(v.aval)})" for v in feeds or ())
    source += f"    return {outs}, [{fed}]\n"
    exec(source, given)
    return given["host"]


def _feed(value: Any, aval: Any) -> Any:
    """A lifted number as the device takes it."""
    if type(value) is not int:
        return value
    if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact):
        return float(value)
    if max(value, ~value) > _LARGEST[aval.dtype.itemsize]:
        raise DoesNotFit
    return value
