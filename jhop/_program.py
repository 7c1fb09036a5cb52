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
from jhop._interp import evaluate, has_symbols
from jhop._scalar import I32_MAX, I32_MIN, apply_step, fill, scalar_p


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
        self._host_eqns = []
        device_eqns = []
        for eqn in jaxpr.eqns:
            if eqn.primitive is scalar_p and host.issuperset(eqn.invars):
                self._host_eqns.append(eqn)
                host.update(eqn.outvars)
            else:
                device_eqns.append(eqn)
        n_results = len(jaxpr.outvars) if gm.lifted is None else gm.lifted.n_outs
        self._outs = [
            (v, i >= n_results and not isinstance(v, jex_core.Literal) and v in host)
            for i, v in enumerate(jaxpr.outvars)
        ]
        outs = [v for v, on_host in self._outs if not on_host]
        atoms = [*(atom for eqn in device_eqns for atom in eqn.invars), *outs]
        read = {atom for atom in atoms if not isinstance(atom, jex_core.Literal)}
        self._numbers = [v for v in jaxpr.invars if v in host]
        self._feeds = [v for v in [*self._numbers, *(o for e in self._host_eqns for o in e.outvars)] if v in read]
        arrays = [v for v in jaxpr.invars if v not in host]
        self._is_number = [v in host for v in jaxpr.invars]
        device = jaxpr.replace(
            constvars=[],
            invars=[*jaxpr.constvars, *arrays, *self._feeds],
            outvars=outs,
            eqns=device_eqns,
            debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
        )
        self.device = transform(self._make_device(device))

    def _make_device(self, device: Any) -> Callable[..., list[Any]]:
        symbolic = bool(self._gm.shapes) and any(has_symbols(v.aval) for v in device.invars)

        def run(*flat: Any) -> list[Any]:
            rule = None
            if symbolic:
                rest = iter(flat[len(self.consts) :])
                rule = self._gm.rule_for([0 if number else next(rest) for number in self._is_number])
            return evaluate(device, list(flat), rule)

        run.__name__ = self._gm.name
        return run

    def __call__(self, *args: Any) -> list[Any]:
        if not self._numbers:
            return self.device(*self.consts, *args)
        numbers, arrays = self.split(args)
        return self.join(numbers, self.device(*self.consts, *arrays))

    def split(self, values: Sequence[Any], start: int = 0) -> tuple[dict[Any, Any], list[Any]]:
        """Does the host's part for the inputs from the `start`th on, before which there are only arrays.

        Returns:
            (lifted numbers and what was computed of them, inputs of the device's function).

        Raises:
            DoesNotFit: a number no longer has the type that it had.
        """
        env: dict[Any, Any] = {}
        arrays: list[Any] = []
        numbers = iter(self._numbers)
        for value, number in zip(values, self._is_number[start:], strict=True):
            if number:
                env[next(numbers)] = value
            else:
                arrays.append(value)
        for eqn in self._host_eqns:
            operands = fill(eqn.params["template"], [env[v] for v in eqn.invars])
            try:
                value = env[eqn.outvars[0]] = apply_step(eqn.params["op"], operands)
            except Exception:  # the hook would have met it: let it, in a new trace
                raise DoesNotFit from None
            if type(value) is not eqn.params["python"]:
                raise DoesNotFit
        arrays.extend(_feed(env[v], v.aval) for v in self._feeds)
        return env, arrays

    def join(self, numbers: dict[Any, Any], outs: Sequence[Any]) -> list[Any]:
        """All outputs of the graph, from those of `split` and of the device."""
        results = iter(outs)
        return [numbers[v] if on_host else next(results) for v, on_host in self._outs]


def _feed(value: Any, aval: Any) -> Any:
    """A lifted number as the device takes it."""
    if type(value) is not int or aval.dtype.itemsize == 8:
        return value
    if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact):
        return float(value)
    if not I32_MIN <= value <= I32_MAX:
        raise DoesNotFit
    return value
