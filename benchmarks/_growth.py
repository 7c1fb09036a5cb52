"""Part h: how times grow with the size of a graph."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _models import halve
from _timing import Row, exponent

import jhop

SIZES = (10, 100, 1_000, 10_000)
# Fixed costs flatten the slope over all sizes; the last decade shows what large graphs do.
LINEAR = (0.0, 1.1)


class Counter:
    """A hook with state of its own."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, ct: jax.Array) -> jax.Array:
        self.n += 1
        return ct * 0.5


def _other_function() -> Callable[[jax.Array], jax.Array]:
    return eval("lambda ct: ct * 0.5")  # its own code object too


def _one_counter(n: int) -> list[Any]:
    return [Counter()] * n


HOOKS: dict[str, Callable[[int], list[Any]]] = {
    "one function": lambda n: [halve] * n,
    "different functions": lambda n: [_other_function() for _ in range(n)],
    "one counter": _one_counter,
    "different counters": lambda n: [Counter() for _ in range(n)],
}


def straight(hooks: list[Any], call: Callable[..., Any]) -> Callable[[jax.Array], jax.Array]:
    """As many equations as hooks, in a straight line."""

    def fn(ct: jax.Array) -> jax.Array:
        for hook in hooks:
            ct = call(ct * 1.01, hook)
        return ct

    return fn


def opaque(ct: jax.Array, hook: Any) -> jax.Array:
    return jhop.trace_wrapped(ct, fn=hook)


def in_scans(ct: jax.Array, hook: Any) -> jax.Array:
    return jax.lax.scan(lambda c, _: (jhop.trace_wrapped(c * 1.02, fn=hook), None), ct, None, length=2)[0]


def best_of(run: Callable[[], Any], times: int) -> float:
    """Seconds of this thread: the quickest of a few runs, garbage collected before each and not during it."""
    found = []
    for _ in range(times):
        gc.collect()
        gc.disable()
        try:
            before = time.thread_time()
            run()
            found.append(time.thread_time() - before)
        finally:
            gc.enable()
    return min(found)


def growth(quick: bool) -> list[Row]:
    """(h) Inlining and printing of 10 to 10,000 equations and as many hooks."""
    sizes = SIZES[:-1] if quick else SIZES
    x = jnp.ones(4)
    rows: list[Row] = []

    def by_jax(n: int) -> float:
        def run() -> Any:  # a new function each time: JAX keeps traces
            return jax.make_jaxpr(straight([halve] * n, lambda ct, hook: hook(ct)))(x)

        return best_of(run, _times(n))

    hands = {n: by_jax(n) for n in sizes}
    for what, make in HOOKS.items():
        graphs = {n: jhop.make_fx(straight(make(n), opaque))(x) for n in sizes}
        rows += _series(f"inline, {what}", graphs, jhop.inline, hands)
    in_loops = {n: jhop.make_fx(straight([halve] * n, in_scans))(x) for n in sizes if n <= 1_000}
    rows += _series("inline, each hook in a scan", in_loops, jhop.inline, None)
    inlined = {n: jhop.inline(jhop.make_fx(straight([halve] * n, opaque))(x)) for n in sizes}
    for dialect in ("torch", "jax"):
        rows += _series(f"print, {dialect}", inlined, lambda gm, d=dialect: gm.print_readable(False, dialect=d), None)
    rows += _series("graph.nodes", inlined, lambda gm: gm.graph.nodes, None)
    return [*rows, *tapes(sizes)]


def tapes(sizes: tuple[int, ...]) -> list[Row]:
    """Recorded operations: made, run backward, captured, found again; and what a pass leaves of them."""
    x, seed = jhop.tensor(jnp.ones(4), requires_grad=True), jnp.ones(4)

    def recorded(n: int) -> jhop.Tensor:
        y = x
        for _ in range(n // 2):
            y = jhop.numpy.tanh(y) * 0.99
        return y

    def backward(y: jhop.Tensor, compiler_fn: Any = None) -> None:
        x.grad = None
        if compiler_fn is None:
            return y.backward(seed, retain_graph=True)
        with jhop.compiled_autograd.enable(compiler_fn):
            y.backward(seed, retain_graph=True)

    def capture_anew(y: jhop.Tensor) -> None:
        backward(y, lambda gm: lambda *flat: [flat[0]])

    def kept(gm: Any) -> Any:
        return lambda *flat: [flat[0]]

    graphs = {n: recorded(n) for n in sizes}
    for known in graphs.values():
        backward(known, kept)
    rows = _series("tape, forward", dict(zip(sizes, sizes, strict=True)), recorded, None)
    rows += _series("tape, backward", graphs, backward, None)
    rows += _series("tape, capture", graphs, capture_anew, None)
    rows += _series("tape, found again", graphs, lambda y: backward(y, kept), None)
    del graphs, known
    gc.collect()
    before = len(jax.live_arrays())
    y = recorded(sizes[-1])
    held = len(jax.live_arrays()) - before
    x.grad = None
    y.backward(seed)
    left = len(jax.live_arrays()) - before
    what = f"tape, {sizes[-1]:,}, arrays that are left after the pass / held before it"
    return [*rows, Row(what, left, held, "instr", (0.0, 0.01))]


def _times(n: int) -> int:
    return 5 if n <= 100 else 3 if n <= 1_000 else 2


def _series(what: str, graphs: dict[int, Any], run: Callable[[Any], Any], peers: dict[int, float] | None) -> list[Row]:
    """A line per size, and the slopes. `peers`: what else is timed, or None for the same at the smallest size."""
    sizes = list(graphs)
    run(graphs[sizes[0]])
    times = {n: best_of(lambda n=n: run(graphs[n]), _times(n)) for n in sizes}
    first = times[sizes[0]] / sizes[0]
    lines = [
        Row(f"{what}, {n:,}, each / {'tracing the bodies' if peers else f'each of {sizes[0]}'}",
            times[n] / n * 1e6, (peers[n] / n if peers else first) * 1e6, "us", (0.0, math.inf),
            note=f"{times[n]:.3f} s")
        for n in sizes
    ]  # fmt: skip
    all_sizes = exponent(sizes, [times[n] for n in sizes])
    last = exponent(sizes[-2:], [times[n] for n in sizes[-2:]])
    return [
        *lines,
        Row(f"{what}, slope, {sizes[0]:,} to {sizes[-1]:,}", all_sizes, 1.0, "exp", LINEAR),
        Row(f"{what}, slope, {sizes[-2]:,} to {sizes[-1]:,}", last, 1.0, "exp", LINEAR),
    ]
