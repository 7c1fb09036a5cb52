"""Programs: graphs as callables, cut in two where Python state is lifted.

Arithmetic on lifted Python numbers stays in Python: it is exact, and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._graph import GraphModule
from jhop._interp import evaluate, symbols_in
from jhop._scalar import I32_MAX, I32_MIN, scalar_p, step_code


class DoesNotFit(Exception):
    """Lifted numbers are no longer of the types that a graph was traced with; the caller traces anew."""


class Program:
    """A callable on a graph's flat inputs, whose array part is `transform(function)`, e.g. `jax.jit` of it.

    Attributes:
        consts: arrays that the graph closes over; they are the first inputs of the device's function.
        device: `transform` of the function of arrays.
    """

    def __init__(self, gm: GraphModule, transform: Callable[..., Any]):
        jaxpr, self.consts = _compat.open_jaxpr(gm.jaxpr)
        self._gm = gm
        numbers = [v for v, given in zip(jaxpr.invars, gm.inputs, strict=True) if given.number is not None]
        host = set(numbers)
        host_eqns, device_eqns = [], []
        for eqn in jaxpr.eqns:
            if eqn.primitive is scalar_p and host.issuperset(eqn.invars):
                host_eqns.append(eqn)
                host.update(eqn.outvars)
            else:
                device_eqns.append(eqn)
        n_results = len(jaxpr.outvars) if gm.lifted is None else gm.lifted.n_outs
        outs = [
            (v, i >= n_results and not isinstance(v, jex_core.Literal) and v in host)
            for i, v in enumerate(jaxpr.outvars)
        ]
        self._on_host = [on_host for _, on_host in outs]
        device_outs = [v for v, on_host in outs if not on_host]
        atoms = [*(atom for eqn in device_eqns for atom in eqn.invars), *device_outs]
        read = {atom for atom in atoms if not isinstance(atom, jex_core.Literal)}
        feeds = [v for v in [*numbers, *(o for eqn in host_eqns for o in eqn.outvars)] if v in read]
        self._host = _host_code(numbers, host_eqns, [v for v, on_host in outs if on_host], feeds)
        arrays = [v for v in jaxpr.invars if v not in host]
        self._is_number = [v in host for v in jaxpr.invars]
        device = jaxpr.replace(
            constvars=[],
            invars=[*jaxpr.constvars, *arrays, *feeds],
            outvars=device_outs,
            eqns=device_eqns,
            debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        self.device = transform(self._make_device(device))

    def _make_device(self, device: Any) -> Callable[..., list[Any]]:
        symbolic = bool(self._gm.shapes) and bool(symbols_in([v.aval for v in device.invars]))

        def run(*flat: Any) -> list[Any]:
            rule = None
            if symbolic:
                rest = iter(flat[len(self.consts) :])
                rule = self._gm.rule_for([0 if number else next(rest) for number in self._is_number])
            return evaluate(device, list(flat), rule)

        run.__name__ = self._gm.name
        return run

    def __call__(self, *args: Any) -> list[Any]:
        if not any(self._is_number):
            return self.device(*self.consts, *args)
        numbers, arrays = self.split(args)
        return self.join(numbers, self.device(*self.consts, *arrays))

    def split(self, values: Sequence[Any], start: int = 0) -> tuple[Sequence[Any], list[Any]]:
        """Does the host's part for the inputs from the `start`th on, before which there are only arrays.

        Returns:
            (outputs that stay on the host, inputs of the device's function).

        Raises:
            DoesNotFit: a number no longer has the type that it had.
        """
        numbers: list[Any] = []
        arrays: list[Any] = []
        for value, number in zip(values, self._is_number[start:], strict=True):
            (numbers if number else arrays).append(value)
        outs, feeds = self._host(*numbers)
        return outs, arrays + feeds

    def join(self, numbers: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
        """All outputs of the graph, from those of `split` and of the device."""
        host, device = iter(numbers), iter(outs)
        return [next(host) if on_host else next(device) for on_host in self._on_host]


def _host_code(numbers: list[Any], eqns: list[Any], outs: list[Any], feeds: list[Any]) -> Callable[..., Any]:
    """A generated function of the lifted numbers: (outputs that are numbers, numbers as the device takes them)."""
    given: dict[str, Any] = {"DoesNotFit": DoesNotFit, "feed": _feed}
    names: dict[Any, str] = {v: f"n{i}" for i, v in enumerate(numbers)}

    def name(value: Any) -> str:
        given[f"k{len(given)}"] = value
        return f"k{len(given) - 1}"

    lines = []
    for eqn in eqns:
        out = names[eqn.outvars[0]] = f"n{len(names)}"
        read = iter(eqn.invars)
        operands = [names[next(read)] if item is None else name(item) for item in eqn.params["template"]]
        lines.append(f"        {out} = {step_code(eqn.params['op'], operands)}")
        lines.append(f"        if type({out}) is not {name(eqn.params['python'])}: raise DoesNotFit")
    source = f"def host({', '.join(names[v] for v in numbers)}):\n"
    if lines:  # where a step fails, the hook would have met it: let it, in a new trace
        source += "    try:\n" + "\n".join(lines) + "\n    except Exception:\n        raise DoesNotFit from None\n"
    fed = ", ".join(f"feed({names[v]}, {name(v.aval)})" for v in feeds)
    source += f"    return ({''.join(f'{names[v]}, ' for v in outs)}), [{fed}]\n"
    exec(source, given)
    return given["host"]


def _feed(value: Any, aval: Any) -> Any:
    """A lifted number as the device takes it."""
    if type(value) is not int or aval.dtype.itemsize == 8:
        return value
    if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact):
        return float(value)
    if not I32_MIN <= value <= I32_MAX:
        raise DoesNotFit
    return value
