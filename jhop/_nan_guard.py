"""`jhop.nan_guard`: which equation of a function made the first NaN, forward or backward.

The function is traced, with hooks opaque, and evaluated again with a check of what each equation made (`_guarding`).
Everything else is the business of checks: how they get out of loops, and that nothing is written when one fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jhop._capture import parameter_names
from jhop._check import find_failed
from jhop._discharge import discharge
from jhop._errors import JhopError
from jhop._graph import GraphModule, Input
from jhop._guarding import Guarding
from jhop._interp import evaluate
from jhop._jit import Jitted
from jhop._leaves import declare_state
from jhop._source import hook_name
from jhop._trace_wrapped import trace_wrapped

_MODES = ("raise", "zero", "count")
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
        self._kept.count = self._kept.count + (record[0] != 0).astype(jnp.int32)
        self._kept.record = record
        self._kept.version = self._version


declare_state(_Kept, "count", "record", "version")
declare_state(_Note, "_kept", "_version")


def _run_guarded(fn: Any, mode: str, inf: bool, kept: _Kept, args: Any, kwargs: Any) -> Any:
    """The function, traced and evaluated again with checks."""
    leaves, in_tree = jax.tree.flatten((args, kwargs))
    moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]  # others are static
    flat = [leaves[i] for i in moving]
    out_tree: Any = None

    def run(*values: Any) -> list[Any]:
        nonlocal out_tree
        filled = dict(zip(moving, values, strict=True))
        given, named = jax.tree.unflatten(in_tree, [filled.get(i, leaf) for i, leaf in enumerate(leaves)])
        outs, out_tree = jax.tree.flatten(fn(*given, **named))
        return outs

    closed = jax.make_jaxpr(run)(*flat)
    names = [name for i, name in enumerate(parameter_names(fn, args, kwargs)) if i in moving]
    guarding = Guarding(inf, mode, names, hook_name(fn))
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
