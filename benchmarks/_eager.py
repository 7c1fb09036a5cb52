"""Parts c and e: without compilation."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _models import by_hand, halve
from _timing import Row, bounded, interleaved, row

import jhop

# -- c: operation by operation -----------------------------------------------------------------------------------------

OPS = 50


def chain(x: Any, tanh: Callable[..., Any], on_value: Callable[..., Any] | None = None) -> Any:
    """50 operations, tanh and multiply in turn; `on_value` hooks 25 of them."""
    for _ in range(OPS // 2):
        x = tanh(x) * 0.99
        if on_value is not None:
            x = on_value(x)
    return x


def registered(x: Any) -> Any:
    x.register_hook(halve)
    return x


def tensor_chain() -> dict[str, Callable[[], Any]]:
    """The chain on jhop's tape."""
    x = jhop.tensor(jnp.ones((8, 8)), requires_grad=True)
    seed = jnp.ones((8, 8))

    def both(on_value: Any = None) -> Any:
        x.grad = None
        chain(x, jhop.numpy.tanh, on_value).backward(seed)
        return x.grad

    return {
        "jhop forward": lambda: chain(x, jhop.numpy.tanh).value,
        "jhop both": both,
        "jhop both, hooks": lambda: both(registered),
    }


def jnp_chain() -> dict[str, Callable[[], Any]]:
    """The chain on JAX's arrays, operation by operation."""
    x, seed = jnp.ones((8, 8)), jnp.ones((8, 8))

    def both(on_value: Any = None) -> Any:
        _, pull = jax.vjp(lambda x: chain(x, jnp.tanh, on_value), x)
        return pull(seed)

    return {
        "jnp forward": lambda: chain(x, jnp.tanh),
        "jnp both": both,
        "jnp both, hooks": lambda: both(lambda x: by_hand(x, halve)),
    }


def torch_chain() -> dict[str, Callable[[], Any]]:
    """The chain in PyTorch on one thread, where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(1)
    x = torch.ones((8, 8), requires_grad=True)
    seed = torch.ones((8, 8))

    def both(on_value: Any = None) -> None:
        x.grad = None
        chain(x, torch.tanh, on_value).backward(seed)

    def forward() -> None:
        chain(x, torch.tanh)

    return {"torch forward": forward, "torch both": both, "torch both, hooks": lambda: both(registered)}


def eager_chain(quick: bool) -> list[Row]:
    """(c) 50 operations on 8x8 values without compilation, per operation."""
    runs = {**tensor_chain(), **jnp_chain(), **torch_chain()}
    samples = interleaved(runs, rounds=10 if quick else 100, calls=2)
    words = {"forward": "forward", "both": "forward + backward", "both, hooks": "forward + backward, 25 hooks"}
    # JAX's own eager derivative traces anew each time; the tape must beat it.
    targets = {"jnp": {"forward": 3.0, "both": 0.5, "both, hooks": 0.5}, "torch": dict.fromkeys(words, 3.0)}
    return [
        row(f"eager op, {text}, jhop.tensor / {peer}", samples, f"jhop {part}", f"{peer} {part}",
            (0.0, targets[peer][part]), ops=OPS)
        for part, text in words.items()
        for peer in targets
        if f"{peer} {part}" in samples
    ]  # fmt: skip


# -- e: a hook by itself -----------------------------------------------------------------------------------------------

CALLS, HOOKS = 1000, 200


def hook_alone(quick: bool) -> list[Row]:
    """(e) `jhop.hook` where nothing is traced, and one more call of it in a trace."""
    x = jnp.ones((8, 8))
    tree = {"weight": x, "bias": jnp.ones(8), "steps": jnp.arange(3)}

    def repeat(fn: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            for _ in range(CALLS):
                out = fn()
            return out

        return run

    eager = interleaved(
        {
            "x": repeat(lambda: x),
            "array": repeat(lambda: jhop.hook(x, halve)),
            "tree": repeat(lambda: jhop.hook(tree, halve)),
            "custom_vjp": repeat(lambda: by_hand(x, halve)),
        },
        rounds=10 if quick else 60,
    )
    extra = {name: [a - b for a, b in zip(times, eager["x"], strict=True)] for name, times in eager.items()}
    eager["extra array"], eager["extra tree"] = extra["array"], extra["tree"]
    return [
        bounded("eager jhop.hook(x), beyond x", eager, "extra array", 5e-6, ops=CALLS),
        bounded("eager jhop.hook of 3 leaves, beyond x", eager, "extra tree", 10e-6, ops=CALLS),
        row("eager jhop.hook(x) / custom_vjp", eager, "array", "custom_vjp", (0.0, 0.5), ops=CALLS),
        *traced_hook(quick),
    ]  # fmt: skip


def traced_hook(quick: bool) -> list[Row]:
    """One hook's share of tracing a chain of them; the chain without hooks is taken off."""
    x = jnp.ones((8, 8))

    def chain_of(hook: Callable[..., Any]) -> Callable[[Any], Any]:
        def fn(x: Any) -> Any:
            for _ in range(HOOKS):
                x = hook(x * 1.01, halve)
            return jnp.sum(x)

        return fn

    hooks = {"none": lambda x, fn: x, "jhop": jhop.hook, "hand": by_hand}
    rows = []
    for what, transform in (("forward", lambda fn: fn), ("value and grad", jax.value_and_grad)):
        runs = {
            name: lambda hook=hook, transform=transform: jax.make_jaxpr(transform(chain_of(hook)))(x) and None
            for name, hook in hooks.items()
        }
        samples = interleaved(runs, rounds=5 if quick else 30, clock=time.thread_time)
        for name in ("jhop", "hand"):
            samples[name] = [a - b for a, b in zip(samples[name], samples["none"], strict=True)]
        what = f"tracing one hook, {what}, jhop.hook / custom_vjp"
        rows.append(row(what, samples, "jhop", "hand", (0.0, 1.0), ops=HOOKS))
    return rows
