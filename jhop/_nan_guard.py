"""`jhop.nan_guard`: which equation of a function made the first NaN, forward or backward.

The function is traced, with hooks opaque, and each equation that computes floats is followed by a check (`_check`) of
what it made, in the bodies of loops, branches and calls too. Everything else is the business of checks: how they get
out of loops, and that nothing is written when one fails.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._blame import is_floating, what, where
from jhop._capture import parameter_names
from jhop._check import bind_check, find_failed
from jhop._discharge import discharge
from jhop._errors import JhopError, NanError
from jhop._graph import GraphModule, Input
from jhop._hook import hook_p
from jhop._interp import ClosesOverTracer, evaluate, rewrite
from jhop._jit import Jitted
from jhop._leaves import declare_state
from jhop._rebuild import RUNS_ONCE, rebuild
from jhop._source import hook_name, origin_of, user_frame
from jhop._trace_wrapped import trace_wrapped

_MODES = ("raise", "zero", "count")
_MAX_OPERANDS = 4  # of which a report tells
# What only moves or chooses values makes no new ones.
_MOVES = frozenset(
    """broadcast_in_dim reshape transpose squeeze slice rev copy copy_p stop_gradient neg select_n concatenate real imag
    optimization_barrier dynamic_slice expand_dims split empty empty2 while""".split()
)
_RULED = frozenset({"custom_jvp_call", "custom_vjp_call"})
_OPTIONS_ONLY: Any = object()


def nan_guard(
    fn: Callable[..., Any] = _OPTIONS_ONLY, mode: str = "raise", *, inf: bool = False, **jax_jit_kwargs: Any
) -> Any:
    """Finds the operation that makes the first NaN in a JAX function: in its forward or, around `jax.grad`, backward.

    The function is compiled, as by `jhop.jit`, with a look at the result of each floating operation, in `scan`,
    `while`, `cond`, `jit`, `checkpoint` and functions with rules of their own too. An operation is at fault if NaN
    comes out of it and none went in. The report names its primitive (or the hook), the user's line and named scopes,
    says whether it is of the forward or the backward pass, at which iterations of the loops around it (in a backward
    pass, those of the forward), and of each operand the smallest and the largest value, and how many are not finite.
    If only arguments had NaN, and the results have too, the report says so. What JAX computes of a derivative while it
    runs the forward (the `1 / x` of a logarithm) counts as forward, at the same line. It is for finding errors: the
    program takes a multiple of its time. Hooks in the function work as always, with their Python state; each counts as
    one operation.

    Args:
        fn: a function of arrays and pytrees that JAX can trace, e.g. `jax.grad(loss)`. It is `fn`'s own operations that
            are looked at, so wrap the gradient, and not the function that it is of. Left out, a decorator is returned.
        mode: "raise": an error after the run; no Python state is written then. "zero": in the backward pass, elements
            of a result that are NaN become 0, and nothing is told: gradients are finite where the forward is. "count":
            nothing is changed; `report()` tells of the last call, and `count` how many calls had a NaN.
        inf: whether infinities count as NaN does.
        **jax_jit_kwargs: options of `jax.jit`, e.g. static_argnums.

    Returns:
        A function of the same arguments, with the same results. It may itself be part of what `jhop.jit` compiles.

    Raises:
        NanError: at the call, in mode "raise". It is a CheckError.
        JhopError: `fn` is not callable, or there is no such mode. Also where a function in mode "raise" is compiled by
            `jax.jit` alone; `jax.experimental.checkify.checkify` around that gives the report as an error.

    Example:
        >>> import jax, jax.numpy as jnp, jhop
        >>> def loss(x):
        ...     return jnp.sqrt(x * x).sum()
        >>> guarded = jhop.nan_guard(jax.grad(loss))
        >>> try:
        ...     guarded(jnp.array([4.0, 0.0]))
        ... except jhop.NanError as error:
        ...     print(error.primitive, error.phase, error.values["count"])
        mul backward 1

    The counterpart in PyTorch is `torch.autograd.detect_anomaly` (rule 107), which runs operation by operation.
    """
    if fn is _OPTIONS_ONLY:
        return functools.partial(nan_guard, mode=mode, inf=inf, **jax_jit_kwargs)
    if not callable(fn):
        raise JhopError(f"jhop.nan_guard: expected a function, got {type(fn).__name__}.")
    if mode not in _MODES:
        raise JhopError(f"jhop.nan_guard: unknown mode {mode!r}. Expected one of {', '.join(map(repr, _MODES))}.")
    return Guarded(fn, mode, inf, jax_jit_kwargs)


class Guarded(Jitted):
    """What `jhop.nan_guard` returns.

    Attributes:
        count: in mode "count", in how many calls a NaN was made.
    """

    def __init__(self, fn: Callable[..., Any], mode: str, inf: bool, options: dict[str, Any]):
        self._mode = mode
        self._kept = _Kept()

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return _run_guarded(fn, mode, inf, self._kept, args, kwargs)

        super().__init__(guarded, False, options)

    @property
    def count(self) -> int:
        return int(self._kept.count)

    def report(self) -> str:
        """What the last call did: the operation that made the first NaN, as an error would say; "" if none did.

        It waits for that call.

        Raises:
            JhopError: the mode is another.

        Example:
            >>> import jax.numpy as jnp, jhop
            >>> guarded = jhop.nan_guard(jnp.log, "count")
            >>> _ = guarded(-1.0)
            >>> guarded.report().startswith("jhop.nan_guard: `log`"), guarded.count
            (True, 1)
        """
        if self._mode != "count":
            raise JhopError(f"jhop.nan_guard: there is a report in mode 'count' only, and this is {self._mode!r}.")
        record = self._kept.record
        error = None if record is None else find_failed(record[0], record[1:], self._kept.sites[self._kept.version])
        return "" if error is None else str(error)


class _Kept:
    """What the program of a mode "count" writes: Python state of a hook, as any.

    Attributes:
        record: of the last call, as `Checks` has it; None before the first.
        version: which of `sites` it is of.
        sites: the checks of each trace.
    """

    __slots__ = ("count", "record", "sites", "version")

    def __init__(self) -> None:
        self.count: Any = 0
        self.record: Any = None
        self.version = 0
        self.sites: list[Any] = []

    def begin(self, record: list[Any], sites: Any) -> int:
        """The number of a new trace. What it will write has its types before, or it would be traced again."""
        with jax.ensure_compile_time_eval():
            self.count = jnp.asarray(self.count, jnp.int32)
            if self.record is None or list(map(jax.typeof, self.record)) != list(map(jax.typeof, record)):
                self.record = tuple(jnp.zeros(value.shape, value.dtype) for value in record)
        self.sites.append(sites)
        return len(self.sites) - 1


class _Note:
    """The hook that writes it."""

    __slots__ = ("_kept", "_version")

    def __init__(self, kept: _Kept, version: int):
        self._kept = kept
        self._version = version

    def __call__(self, told: tuple[Any, tuple[Any, ...]]) -> None:
        _, record = told
        self._kept.count = self._kept.count + (record[0] != 0)
        self._kept.record = record
        self._kept.version = self._version


declare_state(_Kept, "count", "record", "version")
declare_state(_Note, "_kept", "_version")


def _run_guarded(fn: Any, mode: str, inf: bool, kept: _Kept, args: Any, kwargs: Any) -> Any:
    """The function, traced and evaluated again with checks."""
    flat, in_tree = jax.tree.flatten((args, kwargs))
    out_tree: Any = None

    def run(*values: Any) -> list[Any]:
        nonlocal out_tree
        given, named = jax.tree.unflatten(in_tree, values)
        outs, out_tree = jax.tree.flatten(fn(*given, **named))
        return outs

    closed = jax.make_jaxpr(run)(*flat)
    names = parameter_names(fn, args, kwargs)
    guarding = _Guarding(inf, mode, names, hook_name(fn))
    if mode != "count":
        return jax.tree.unflatten(out_tree, guarding.whole(closed, flat))
    checked = jax.make_jaxpr(lambda *values: guarding.whole(closed, list(values)))(*map(jax.typeof, flat))
    gm = discharge(GraphModule(jaxpr=checked, inputs=tuple(Input(name="") for _ in flat)))
    outs = evaluate(gm.jaxpr, flat)
    if gm.checks is None:
        return jax.tree.unflatten(out_tree, outs)
    outs, record = outs[: len(outs) - gm.checks.n], outs[len(outs) - gm.checks.n :]
    note = _Note(kept, kept.begin(record, gm.checks.sites))
    outs, _ = trace_wrapped((outs, tuple(record)), fn=note)  # as part of the results, or it might be dropped
    return jax.tree.unflatten(out_tree, outs)


class _NanSite:
    """An equation that is looked at."""

    def __init__(self, function: str, eqn: Any, phase: str, scope: str, operands: list[str]):
        frame = user_frame(eqn)
        self._what = what(eqn)
        self._place = where(origin_of(*frame)) if frame is not None else ""
        self._primitive = eqn.primitive.name
        self._phase = phase
        self._scope = scope
        self._operands = operands
        self._function = function
        self.title = f"jhop.nan_guard of `{function}`"

    def error(self, arrays: Sequence[Any]) -> NanError:
        """The error for (the result's NaNs, the operands' statistics, the turns of the loops around)."""
        bad, stats, turns = map(np.asarray, arrays)
        scope = f", in the scope `{self._scope}`" if self._scope else ""
        at = f", at iteration {', '.join(map(str, turns.tolist()))}" if turns.size else ""
        lines = [
            f"jhop.nan_guard: {self._what}{self._place} made {int(bad)} values that are not finite, in the "
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
    return f"{span}, {int(bad)} values not finite"


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


class _Guarding:
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
        bad = sum((self._bad(out).any() for out in outs if is_floating(out)), start=jnp.bool_(False))
        if not self._zero and flat:
            counts = [self._bad(value).sum() if is_floating(value) else 0 for value in map(jnp.asarray, flat)]
            failed = (bad != 0).astype(jnp.int32)
            bind_check(failed, [jnp.stack([jnp.int32(n) for n in counts])], _ArgumentSite(self._function, self._names))
        return outs

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

        def goes_on(carry: Any) -> Any:
            with self._turn(carry[0]):
                return self._run(params["cond_jaxpr"], [*cond, *carry[1]])[0]

        def body(carry: Any) -> Any:
            with self._turn(carry[0]):
                return carry[0] + 1, self._run(params["body_jaxpr"], [*consts, *carry[1]])

        with _compat.in_place_of(eqn):
            return list(jax.lax.while_loop(goes_on, body, (jnp.int32(0), init))[1])

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
        made = sum(self._bad(out).sum() for out in outs if is_floating(out))
        given = sum((self._bad(value).sum() for value in operands), start=jnp.int32(0))
        failed = (made > 0) & (given == 0)
        shown = operands[:_MAX_OPERANDS]
        kinds = [jax.typeof(value).str_short() for value in shown]
        turns = jnp.stack(self._turns) if self._turns else jnp.zeros(0, jnp.int32)
        stats = jax.lax.cond(failed, _stats_of, lambda shown: jnp.zeros((len(shown), 3), jnp.float32), shown)
        site = _NanSite(self._function, eqn, phase, scope, kinds)
        bind_check(failed.astype(jnp.int32), [jnp.int32(made), stats, turns], site)
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
