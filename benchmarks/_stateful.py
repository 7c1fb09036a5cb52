"""Part i: hooks with Python state, and hooks that run on the host."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _dispatch import CALLS, gradient, repeated
from _models import by_hand, halve
from _timing import Row, Samples, bounded, interleaved, row
from jax.experimental import io_callback

import jhop
from jhop import _effects, _inline

HOOKS = 100


class Counter:
    """A hook with a Python int."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, ct: jax.Array) -> None:
        self.n += 1


class Scalars:
    """A hook with 16 Python numbers."""

    def __init__(self) -> None:
        self.a = self.b = self.c = self.d = self.e = self.f = self.g = self.h = 0
        self.i = self.j = self.k = self.l = self.m = self.n = self.o = self.p = 0.0

    def __call__(self, ct: jax.Array) -> None:
        self.a, self.b, self.c, self.d = self.a + 1, self.b + 2, self.c + 3, self.d + 4
        self.e, self.f, self.g, self.h = self.e + 5, self.f + 6, self.g + 7, self.h + 8
        self.i, self.j, self.k, self.l = self.i + 0.5, self.j + 1.5, self.k + 2.5, self.l + 3.5
        self.m, self.n, self.o, self.p = self.m + 4.5, self.n + 5.5, self.o + 6.5, self.p + 7.5


class Reader:
    """A hook that reads its cotangent's values, so it cannot be traced."""

    def __init__(self) -> None:
        self.n = 0
        self.largest = 0.0

    def __call__(self, ct: jax.Array) -> jax.Array:
        self.n += 1
        self.largest = max(self.largest, float(np.max(ct)))
        return ct


def stateful(quick: bool) -> list[Row]:
    """(i) Hooks with Python state, and hooks that run on the host."""
    rounds = 10 if quick else 60
    return [*calls(rounds), *guards(rounds), *watched(quick), large_step(quick), *on_host(rounds)]


def calls(rounds: int) -> list[Row]:
    """Calls of a small gradient whose hook writes Python numbers."""
    x = jnp.ones(8)
    counter, called, scalars = Counter(), Counter(), Scalars()

    def call_back(ct: jax.Array) -> jax.Array:
        io_callback(called, None, ct)
        return ct

    runs = {
        "jax.jit": repeated(jax.jit(gradient(jhop.hook, halve)), x),
        "counter": repeated(jhop.jit(gradient(jhop.hook, counter), fullgraph=True), x),
        "16 scalars": repeated(jhop.jit(gradient(jhop.hook, scalars), fullgraph=True), x),
        "io_callback": repeated(jax.jit(gradient(by_hand, call_back)), x, finish=jax.effects_barrier),
    }
    samples = interleaved(runs, rounds=rounds)
    expected = CALLS * (rounds + 3)
    if (counter.n, called.n, scalars.a, scalars.p) != (expected, expected, expected, 7.5 * expected):
        raise AssertionError(f"{expected} calls, but counted {counter.n}, {called.n}, {scalars.a}, {scalars.p / 7.5}")
    what = "dispatch, jhop.jit"
    return [
        row(f"{what}, hook counts / jax.jit", samples, "counter", "jax.jit", (0.0, 3.0), ops=CALLS),
        row(f"{what}, hook counts / io_callback", samples, "counter", "io_callback", (0.0, 0.2), ops=CALLS),
        row(f"{what}, hook writes 16 scalars / jax.jit", samples, "16 scalars", "jax.jit", (0.0, 4.0), ops=CALLS),
    ]


def guards(rounds: int) -> list[Row]:
    """What a call spends on finding out that nothing has changed: for the function and for its hooks."""

    def holds(counters: list[Counter]) -> Callable[[], bool]:
        def loss(x: jax.Array) -> jax.Array:
            for counter in counters:
                x = jhop.hook(x * 1.01, counter)
            return jnp.sum(x)

        step = jhop.jit(jax.grad(loss), fullgraph=True)
        step(jnp.ones(8))
        return step._direct[()].hold

    runs = {count: repeated(holds([Counter() for _ in range(count)])) for count in (1, HOOKS)}
    samples = interleaved({f"{count} hooks": run for count, run in runs.items()}, rounds=rounds)
    if not all(run() for run in runs.values()):
        raise AssertionError("guards do not hold")
    return [
        bounded("guards, 1 hook", samples, "1 hooks", 1e-6, ops=CALLS),
        bounded(f"guards, {HOOKS} hooks", samples, f"{HOOKS} hooks", 50e-6, ops=CALLS),
    ]


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Hooks are traced, and nobody looks at what they call."""
    places = [(_effects, "_seeing"), (_inline, "many_watches")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, contextlib.nullcontext)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def functions(ct: jax.Array) -> jax.Array:
    """200 operations: functions and operators in turn."""
    for _ in range(100):
        ct = jnp.tanh(ct) * 0.99
    return ct


def operators(ct: jax.Array) -> jax.Array:
    """200 operations, all by operators."""
    for _ in range(100):
        ct = ct * 0.99 + 0.5
    return ct


def watched(quick: bool) -> list[Row]:
    """Tracing a hook with and without a watch over what it calls."""
    rows = []
    for hook in (functions, operators):
        gm = jhop.make_fx(lambda ct, hook=hook: jhop.trace_wrapped(ct, fn=hook))(jnp.ones((8, 8)))

        def without(gm: Any = gm) -> None:
            with unwatched():
                jhop.inline(gm)

        runs = {"watched": lambda gm=gm: jhop.inline(gm) and None, "unwatched": without}
        samples = interleaved(runs, rounds=5 if quick else 40, prepare=gc.collect, clock=time.thread_time)
        # Without `sys.monitoring`, a profile function sees every call that JAX makes.
        target = 1.2 if hasattr(sys, "monitoring") else 2.5
        what = f"tracing a 200-op hook, {hook.__name__}, watched / unwatched"
        rows.append(row(what, samples, "watched", "unwatched", (0.0, target), unit="ms"))
    return rows


def large_step(quick: bool) -> Row:
    """A chain of matrix products whose hook counts: a call returns, and the count can be read, while it runs."""
    x, counter = jnp.full((1500, 1500), 1e-3), Counter()
    products = 4 if jax.default_backend() == "cpu" else 200  # a step long enough to tell

    def chain(x: jax.Array) -> jax.Array:
        y = jhop.hook(x, counter)
        for _ in range(products):
            y = y @ x
        return jnp.sum(y)

    step = jhop.jit(jax.grad(chain), fullgraph=True)
    jax.block_until_ready(step(x))
    samples: Samples = {"until counted": [], "whole": []}
    for i in range(3 if quick else 12):
        begin = time.perf_counter()
        out = step(x)
        if counter.n != i + 2:
            raise AssertionError(f"{i + 2} steps, but counted {counter.n}")
        samples["until counted"].append(time.perf_counter() - begin)
        jax.block_until_ready(out)
        samples["whole"].append(time.perf_counter() - begin)
    what = f"{products} products of 1500x1500, until a hook has counted / the step"
    return row(what, samples, "until counted", "whole", (0.0, 0.1), unit="ms")


def on_host(rounds: int) -> list[Row]:
    """A hook that reads its cotangent, at top level: the graph is cut there, against a callback in order."""
    x, reader, called = jnp.ones(8), Reader(), Reader()
    by_jhop = jhop.jit(gradient(jhop.hook, reader))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs on the host
        by_jhop(x)

    def call_back(ct: jax.Array) -> jax.Array:
        return io_callback(called, ct, ct, ordered=True)

    by_callback = jax.jit(gradient(by_hand, call_back))
    by_callback(x)
    runs = {
        "jhop.jit": repeated(by_jhop, x),
        "io_callback": repeated(by_callback, x, finish=jax.effects_barrier),
    }
    samples = interleaved(runs, rounds=rounds)
    expected = (CALLS * (rounds + 3) + 1, 2.0)
    if (reader.n, reader.largest) != expected or (called.n, called.largest) != expected:
        raise AssertionError(f"{expected}, but jhop.jit: {reader.n, reader.largest}, {called.n, called.largest}")
    what = "hook on the host, jhop.jit / jax.jit with io_callback"
    return [row(what, samples, "jhop.jit", "io_callback", (0.0, 1.0), ops=CALLS)]
