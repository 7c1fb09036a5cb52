"""Part d: calling small compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _models import halve, no_hook
from _timing import Row, interleaved, row

import jhop

CALLS, PARAMETERS = 100, 100


def gradient(hook: Callable[..., Any], fn: Any) -> Callable[..., Any]:
    return jax.grad(lambda x: jnp.sum(hook(x, fn) ** 2))


def dispatch(quick: bool) -> list[Row]:
    """(d) Calling a small compiled gradient, with and without hooks."""
    rounds = 10 if quick else 60
    return [*one_array(rounds), *many_parameters(rounds)]


def repeated(step: Callable[..., Any], *args: Any, finish: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """`CALLS` calls in a row, of which the last is waited for."""

    def run() -> Any:
        for _ in range(CALLS):
            out = step(*args)
        if finish is not None:
            finish()
        return out

    return run


def one_array(rounds: int) -> list[Row]:
    """A function of one array."""
    x = jnp.ones(8)
    runs = {
        "none": repeated(jax.jit(gradient(no_hook, None)), x),
        "jax.jit": repeated(jax.jit(gradient(jhop.hook, halve)), x),
        "jhop.jit": repeated(jhop.jit(gradient(jhop.hook, halve)), x),
    }
    samples = interleaved(runs, rounds=rounds)
    return [
        row("dispatch, jax.jit, pure hook / no hook", samples, "jax.jit", "none", (0.0, 1.1), ops=CALLS),
        row("dispatch, jhop.jit, pure hook / jax.jit", samples, "jhop.jit", "jax.jit", (0.0, 2.0), ops=CALLS),
    ]


def many_parameters(rounds: int) -> list[Row]:
    """A function of a pytree of 100 parameters, a hook on each."""
    parameters = {f"layer{i}": {"weight": jnp.ones(4), "bias": jnp.ones(4)} for i in range(PARAMETERS // 2)}

    def step(hook: Callable[..., Any]) -> Callable[..., Any]:
        def loss(tree: Any) -> jax.Array:
            return sum(jnp.sum(hook(leaf, halve) ** 2) for leaf in jax.tree.leaves(tree))

        return jax.grad(loss)

    runs = {
        "none": repeated(jax.jit(step(no_hook)), parameters),
        "jax.jit": repeated(jax.jit(step(jhop.hook)), parameters),
        "jhop.jit": repeated(jhop.jit(step(jhop.hook)), parameters),
    }
    samples = interleaved(runs, rounds=rounds)
    what = f"dispatch, {PARAMETERS} parameters"
    return [
        row(f"{what}, jax.jit, pure hooks / no hooks", samples, "jax.jit", "none", (0.0, 1.1), ops=CALLS),
        row(f"{what}, jhop.jit, pure hooks / jax.jit", samples, "jhop.jit", "jax.jit", (0.0, 2.0), ops=CALLS),
    ]
