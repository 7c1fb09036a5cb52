"""A jaxpr evaluated with a look at what each equation made: behind `jhop.nan_guard`.

Each equation that computes floats is followed by a check (`_check`), in the bodies of loops, branches and calls too.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._blame import is_floating, what, where
from jhop._check import bind_check
from jhop._errors import NanError
from jhop._interp import ClosesOverTracer, evaluate, rewrite
from jhop._point import hook_p
from jhop._rebuild import RUNS_ONCE, rebuild
from jhop._source import origin_of, user_frame
from jhop._trace_wrapped import trace_wrapped_p

_MAX_OPERANDS = 4  # of which a report tells
# What only moves or chooses values makes no new ones.
_MOVES = frozenset(
    """broadcast_in_dim reshape transpose squeeze slice rev copy copy_p stop_gradient neg select_n concatenate real imag
    optimization_barrier dynamic_slice expand_dims split empty empty2 while pvary pcast""".split()
)
_NOT_SCOPES = ("", "jvp", "transpose", "vmap", "jit", "checkpoint", "rematted_computation")
_RULED = frozenset({"custom_jvp_call", "custom_vjp_call"})


class _NanSite:
    """An equation that is looked at."""

    def __init__(self, function: str, eqn: Any, phase: str, scope: str, operands: list[str]):
        frame = user_frame(eqn)
        self._what = what(eqn)
        if frame is None or eqn.primitive is trace_wrapped_p:  # a hook's name has its own place
            self._place = ""
        else:
            self._place = where(origin_of(*frame))
        self._primitive = eqn.primitive.name
        self._phase = phase
        self._scope = "/".join(name for name in re.split("[/()]+", scope) if name not in _NOT_SCOPES)
        self._operands = operands
        self._function = function
        self.title = f"jhop.nan_guard of `{function}`"

    def error(self, arrays: Sequence[Any]) -> NanError:
        """The error for (the result's NaNs, the operands' statistics, the turns of the loops around)."""
        bad, stats, turns = map(np.asarray, arrays)
        scope = f", in the scope `{self._scope}`" if self._scope else ""
        at = f", at iteration {', '.join(map(str, turns.tolist()))}" if turns.size else ""
        lines = [
            f"jhop.nan_guard: {self._what}{self._place} made {_values(int(bad))}, in the "
            f"{self._phase} of `{self._function}`{scope}{at}."
        ]
        lines += [
            f"  operand {i} ({kind}): {_in_words(*row)}"
            for i, (kind, row) in enumerate(zip(self._operands, stats.tolist(), strict=False))
        ]
        error = NanError("\n".join(lines), {"count": int(bad), "operands": stats.tolist(), "turns": turns.tolist()})
        error.primitive, error.phase = self._primitive, self._phase.partition(" ")[0]
        return error


def _in_words(low: float, high: float, bad: float) -> str:
    span = f"from {low:.6g} to {high:.6g}" if low <= high else "none of it finite"
    return f"{span}, {_values(int(bad))}"


def _values(count: int) -> str:
    return f"{count} non-finite value{'' if count == 1 else 's'}"


class _ArgumentSite:
    """The results, where no operation is at fault."""

    def __init__(self, function: str, names: list[str]):
        self._function = function
        self._names = names
        self.title = f"jhop.nan_guard of `{function}`"

    def error(self, arrays: Sequence[Any]) -> NanError:
        """The error for how many values of each argument are not finite."""
        counts = np.asarray(arrays[0]).tolist()
        given = [f"argument `{name}` has {n}" for name, n in zip(self._names, counts, strict=True) if n]
        origin = ", ".join(given) or "a constant of it has some"
        return NanError(
            f"jhop.nan_guard: a result of `{self._function}` has values that are not finite, which none of its "
            f"operations made: {origin}.", {"arguments": counts},
        )  # fmt: skip


class Guarding:
    """Evaluates a jaxpr with a look at what each equation made."""

    def __init__(self, inf: bool, mode: str, names: list[str], function: str):
        self._inf = inf
        self._zero = mode == "zero"
        self._names = names
        self._function = function
        self._turns: list[Any] = []  # those of the loops around, the outermost first
        self._scopes: list[str] = []

    def whole(self, closed: Any, flat: list[Any]) -> list[Any]:
        """The function itself."""
        outs = self._run(closed, flat)
        if not self._zero and flat and any(map(is_floating, outs)):
            counts = [self._count([value]) for value in map(jnp.asarray, flat)]
            site = _ArgumentSite(self._function, self._names)
            bind_check((self._count(outs) > 0).astype(jnp.int32), [jnp.stack(counts)], site)
        return outs

    def _count(self, values: list[Any]) -> Any:
        """How many of the elements of some arrays are at fault."""
        counts = [self._bad(value).sum(dtype=jnp.int32) for value in values if is_floating(value)]
        return functools.reduce(jnp.add, counts, jnp.int32(0))

    def _bad(self, value: Any) -> Any:
        return ~jnp.isfinite(value) if self._inf else jnp.isnan(value)

    def _run(self, jaxpr: Any, args: list[Any]) -> list[Any]:
        return evaluate(jaxpr, args, self._rule)

    def _rule(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        name = eqn.primitive.name
        with self._inside(eqn):
            if name == "scan":
                return self._scan(eqn, values)
            if name == "while":
                return self._while(eqn, values)
            if name == "cond" or name in RUNS_ONCE:
                return rebuild(eqn, values, self._run)
            if name in _RULED:
                return self._keeping_rules(eqn, values)
            if name in _MOVES or eqn.primitive is hook_p or not any(is_floating(v.aval) for v in eqn.outvars):
                return None
            outs = _compat.bind_eqn(eqn, values)
            with _compat.in_place_of(eqn):
                return self._looked_at(eqn, values, outs)

    @contextlib.contextmanager
    def _inside(self, eqn: Any) -> Iterator[None]:
        self._scopes.append(str(eqn.source_info.name_stack))
        try:
            yield
        finally:
            self._scopes.pop()

    def _keeping_rules(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        """A function with derivative rules of its own, which it keeps: its body is looked at, less how often it ran."""
        turns, self._turns = self._turns, []

        def change(jaxpr: Any) -> Any:
            avals = [v.aval for v in _compat.open_jaxpr(jaxpr)[0].invars]
            return jax.make_jaxpr(lambda *args: self._run(jaxpr, list(args)))(*avals)

        try:
            with contextlib.suppress(ClosesOverTracer):
                return rewrite(eqn, values, change)
            return None
        finally:
            self._turns = turns

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_consts, n_carry = _compat.scan_split(params)
        consts, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]

        def body(carry: Any, x: Any) -> Any:
            with self._turn(x[0]):
                outs = self._run(params["jaxpr"], [*consts, *carry, *x[1]])
            return outs[:n_carry], outs[n_carry:]

        options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
        with _compat.in_place_of(eqn):
            places = jnp.arange(params["length"], dtype=jnp.int32)
            carry, ys = jax.lax.scan(body, init, (places, xs), **options)
        return [*carry, *ys]

    def _while(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond, consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]

        # Nothing gets out of a loop's condition: it is computed before, and at the end of each turn for the next one.
        def goes_on(turn: Any, carry: list[Any]) -> Any:
            with self._turn(turn):
                return self._run(params["cond_jaxpr"], [*cond, *carry])[0]

        def body(state: Any) -> Any:
            turn, _, carry = state
            with self._turn(turn):
                carry = self._run(params["body_jaxpr"], [*consts, *carry])
            return turn + 1, goes_on(turn + 1, carry), carry

        with _compat.in_place_of(eqn):
            start = jnp.int32(0), goes_on(jnp.int32(0), init), init
            return list(jax.lax.while_loop(lambda state: state[1], body, start)[2])

    @contextlib.contextmanager
    def _turn(self, turn: Any) -> Iterator[None]:
        self._turns.append(turn)
        try:
            yield
        finally:
            self._turns.pop()

    def _looked_at(self, eqn: Any, values: list[Any], outs: list[Any]) -> list[Any]:
        """What an equation made, looked at."""
        scope = "/".join(part for part in self._scopes if part)
        phase = "forward" if "transpose(" not in scope else "backward"
        if self._zero:
            if phase == "forward":
                return outs
            return [jnp.where(self._bad(out), jnp.zeros_like(out), out) if is_floating(out) else out for out in outs]
        if "rematted_computation" in scope:
            phase += " pass, where the forward is computed again,"
        else:
            phase += " pass"
        operands = [value for value in map(jnp.asarray, values) if is_floating(value)]
        made, given = self._count(outs), self._count(operands)
        if axes := _mesh_axes(eqn):
            given = jax.lax.psum(given, axes)  # what other devices gave counts, too
        failed = (made > 0) & (given == 0)
        shown = operands[:_MAX_OPERANDS]
        kinds = [jax.typeof(value).str_short() for value in shown]
        turns = jnp.stack(self._turns) if self._turns else jnp.zeros(0, jnp.int32)
        stats = jax.lax.cond(failed, _stats_of, _no_stats_of, shown)
        site = _NanSite(self._function, eqn, phase, scope, kinds)
        bind_check(failed.astype(jnp.int32), [made, stats, turns], site)
        return outs


def _stats_of(values: list[Any]) -> Any:
    """(smallest, largest, how many are not finite) of each."""
    rows = []
    for value in values:
        finite = jnp.isfinite(value)
        size = abs(value) if jnp.issubdtype(value.dtype, jnp.complexfloating) else value
        size = size.astype(jnp.float32)
        low = jnp.where(finite, size, jnp.inf).min(initial=jnp.inf)
        high = jnp.where(finite, size, -jnp.inf).max(initial=-jnp.inf)
        rows.append(jnp.stack([low, high, (~finite).sum().astype(jnp.float32)]))
    return jnp.stack(rows) if rows else jnp.zeros((0, 3), jnp.float32)


def _no_stats_of(values: list[Any]) -> Any:
    """Zeros in their place, which in `shard_map` vary over the same axes."""
    zeros: Any = jnp.zeros((len(values), 3), jnp.float32)
    return functools.reduce(_compat.as_varying_as, map(jax.typeof, values), zeros)


def _mesh_axes(eqn: Any) -> tuple[str, ...]:
    """The axes of a mesh, if it has any, over which an equation of a `shard_map` moves values between devices."""
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(axis, str))
