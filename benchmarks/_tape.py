"""Part j: backward passes of the tape under compiled autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _eager import OPS, chain, registered, tensor_chain, torch_chain
from _models import by_hand, halve
from _timing import Row, clear_caches, interleaved, row

import jhop

SMALL, LARGE = (8, 8), (1000, 1000)


def by_jax(shape: tuple[int, ...], on_value: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
    """The gradient of the chain as one program, jitted by hand."""
    x, seed = jnp.ones(shape), jnp.ones(shape)

    @jax.jit
    def gradient(x: Any, seed: Any) -> Any:
        return jax.grad(lambda x: jnp.vdot(chain(x, jnp.tanh, on_value), seed))(x)

    return lambda: gradient(x, seed)


def captured(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """The chain on the tape, its backward under compiled autograd; the warm-up has seen its structure."""
    x, seed = jhop.tensor(jnp.ones(shape), requires_grad=True), jnp.ones(shape)
    compiled = jhop.compile(lambda x: chain(x, jhop.numpy.tanh))

    def gradient(forward: Callable[[], Any]) -> Any:
        x.grad = None
        with jhop.compiled_autograd.enable():
            forward().backward(seed)
        return x.grad

    return {
        "captured": lambda: gradient(lambda: chain(x, jhop.numpy.tanh)),
        "captured, hooks": lambda: gradient(lambda: chain(x, jhop.numpy.tanh, registered)),
        "captured, compiled": lambda: gradient(lambda: compiled(x)),
    }


def tape(quick: bool) -> list[Row]:
    """(j) 50 operations, forward and backward under compiled autograd: later sights of a structure, and the first."""
    rounds = 10 if quick else 100
    others = {name: run for name, run in {**tensor_chain(), **torch_chain()}.items() if "both" in name}
    small = interleaved({**captured(SMALL), **others}, rounds=rounds, calls=5)
    rows = []
    for ours, peer, text in (
        ("captured", "both", "second sight"),
        ("captured, hooks", "both, hooks", "second sight, 25 hooks"),
        ("captured, compiled", "both", "second sight, compiled forward"),
    ):
        rows += [
            row(f"captured op, {text}, jhop.tensor / {name}", small, ours, f"{key} {peer}", (0.0, limit), ops=OPS)
            for name, key, limit in (("torch eager", "torch", 1.5), ("node by node", "jhop", 1.0))
            if f"{key} {peer}" in small
        ]  # fmt: skip
    large = interleaved(
        {**captured(LARGE), "jax": by_jax(LARGE), "jax, hooks": by_jax(LARGE, lambda x: by_hand(x, halve))},
        rounds=max(5, rounds // 5),
    )
    rows += [
        row(f"captured, 1e6 elements, {text}, jhop.tensor / jitted jax.grad", large, ours, peer, (0.0, 1.2), unit="ms")
        for ours, peer, text in (
            ("captured", "jax", "second sight"),
            ("captured, hooks", "jax, hooks", "second sight, 25 hooks"),
            ("captured, compiled", "jax", "second sight, compiled forward"),
        )
    ]  # fmt: skip
    return [*rows, *first_sight(quick)]


def first_sight(quick: bool) -> list[Row]:
    """What it costs that a structure may come again: each pass is of a new one, as its hook is new."""
    x, seed = jhop.tensor(jnp.ones(SMALL), requires_grad=True), jnp.ones(SMALL)
    compiles: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiles.append(event) if "backend_compile" in event else None
    )

    def gradient() -> Any:
        x.grad = None
        y = x * 0.5
        y.register_hook(lambda ct: ct * 0.5)
        chain(y, jhop.numpy.tanh).backward(seed)
        return x.grad

    def first() -> Any:
        with jhop.compiled_autograd.enable():
            return gradient()

    samples = interleaved({"plain": gradient, "first": first}, rounds=20 if quick else 200, calls=2)
    counts = {}
    for name, run in (("plain", gradient), ("first", first)):
        clear_caches()
        before = len(compiles)
        run()
        counts[name] = len(compiles) - before
    return [
        row("first sight, jhop.tensor / node by node", samples, "first", "plain", (0.0, 1.5), ops=OPS),
        Row("programs that XLA compiles at first sight / node by node", counts["first"], counts["plain"], "instr",
            (1.0, 1.0)),
    ]  # fmt: skip
