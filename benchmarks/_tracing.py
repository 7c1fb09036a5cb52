"""Part f: tracing and lowering, without XLA's compilation.

Every sample makes new function objects, so JAX finds no trace of the function itself. *Warm* samples find what other
functions left in JAX's caches: traces of `jnp` functions, lowerings of primitives. Before a *cold* one every cache of
JAX's and jhop's is cleared; what is loaded by then (modules, source lines) stays.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
from _models import MODELS, by_hand
from _timing import Row, clear_caches, interleaved, row

import jhop

_ROUTES: dict[str, tuple[Callable[..., Any], Any]] = {
    "custom_vjp": (by_hand, jax.jit),
    "custom_vjp again": (by_hand, jax.jit),
    "jhop.hook, jax.jit": (jhop.hook, jax.jit),
    "jhop.hook, jhop.jit": (jhop.hook, jhop.jit),  # its first call up to compilation: trace, inline, lower
}


def trace_and_lower(quick: bool) -> list[Row]:
    """(f) Trace and lower, against hand-written custom_vjp."""
    rows = []
    for what in ("4-layer MLP", "transformer block", "scanned stack"):
        make, make_inputs = MODELS[what]
        inputs = make_inputs()
        runs = {
            name: lambda hook=hook, jit=jit, make=make, inputs=inputs: jit(make(hook)).lower(*inputs) and None
            for name, (hook, jit) in _ROUTES.items()
        }
        for state, options in {
            "warm": {"rounds": 6 if quick else 40, "prepare": gc.collect},
            "cold": {"rounds": 3 if quick else 15, "prepare": clear_caches, "warm_up": 1},
        }.items():
            samples = interleaved(runs, **options, clock=time.thread_time)
            rows += [
                row(f"trace + lower, {what}, {state}, {name} / custom_vjp", samples, name, "custom_vjp",
                    (0.95, 1.05) if name == "custom_vjp again" else (0.0, 1.3), unit="ms")
                for name in ("custom_vjp again", "jhop.hook, jax.jit", "jhop.hook, jhop.jit")
            ]  # fmt: skip
    return rows
