"""The functions that are timed. Each takes `hook`: one text serves `jhop.hook`, hand-written custom_vjp and neither.

A model is a function of (parameters, inputs) whose gradients pass through hooks: `clip_by_norm`, which is nonlinear,
on weights, and `halve` on activations. Widths are chosen so that no hook happens to change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LAYERS, WIDTH, BATCH = 4, 256, 128


def clip_by_norm(ct: jax.Array) -> jax.Array:
    return ct * jnp.minimum(1.0, 0.01 / (jnp.sqrt(jnp.sum(ct * ct)) + 1e-6))


def halve(ct: jax.Array) -> jax.Array:
    return ct * 0.5


def squash(ct: jax.Array) -> jax.Array:
    """Nonlinear and smooth: its derivatives are finite everywhere."""
    return ct * jnp.tanh(1.0 + 100.0 * ct)


def by_hand(x: jax.Array, rule: Callable[..., Any]) -> jax.Array:
    """What `jhop.hook` replaces."""
    point = jax.custom_vjp(lambda x: x)
    point.defvjp(lambda x: (x, None), lambda _, ct: (rule(ct),))
    return point(x)


def no_hook(x: jax.Array, rule: Callable[..., Any]) -> jax.Array:
    return x


# -- a step of gradient descent on an MLP ------------------------------------------------------------------------------


def mlp(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A clip on each parameter, a scale on each activation."""

    def step(layers: Any, x: jax.Array) -> Any:
        def loss(layers: Any) -> jax.Array:
            h = x
            for weight, bias in layers:
                h = hook(jnp.tanh(h @ hook(weight, clip_by_norm) + hook(bias, clip_by_norm)), halve)
            return jnp.mean(h * h)

        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(loss)(layers))

    return step


def mlp_inputs(width: int = WIDTH, batch: int = BATCH) -> tuple[Any, jax.Array]:
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    layers = [(jax.random.normal(key, (width, width)) / width**0.5, jnp.zeros(width)) for key in keys[1:]]
    return layers, jax.random.normal(keys[0], (batch, width))


# -- a transformer block -----------------------------------------------------------------------------------------------

HEADS, SEQUENCE, MODEL = 4, 16, 64


def transformer(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of a pre-norm block: attention, MLP, layer norms; a clip on each weight, a scale on each branch."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return hook(scale, clip_by_norm) * centred / jnp.sqrt(variance + 1e-5)

    def attention(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (
            (x @ hook(p[name], clip_by_norm)).reshape(*x.shape[:2], HEADS, MODEL // HEADS) for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (MODEL // HEADS) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((SEQUENCE, SEQUENCE), bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", hook(jax.nn.softmax(scores), halve), v)
        return mixed.reshape(x.shape) @ hook(p["out"], clip_by_norm)

    def block(p: Any, x: jax.Array) -> jax.Array:
        x = x + hook(attention(p, norm(x, p["norm1"])), halve)
        inside = hook(jax.nn.gelu(norm(x, p["norm2"]) @ hook(p["up"], clip_by_norm)), halve)
        return x + hook(inside @ hook(p["down"], clip_by_norm), halve)

    return jax.grad(lambda p, x: jnp.mean(block(p, x) ** 2))


def transformer_inputs() -> tuple[Any, jax.Array]:
    square, wide = dict.fromkeys(("q", "k", "v", "out"), (MODEL, MODEL)), 4 * MODEL
    shapes = {**square, "up": (MODEL, wide), "down": (wide, MODEL)}
    keys = jax.random.split(jax.random.key(1), len(shapes) + 1)
    weights = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    norms = {"norm1": jnp.ones(MODEL), "norm2": jnp.ones(MODEL)}
    return weights | norms, jax.random.normal(keys[0], (8, SEQUENCE, MODEL))


# -- a scanned stack ---------------------------------------------------------------------------------------------------


def scanned(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of layers that `jax.lax.scan` runs over, hooks inside the body."""

    def loss(stack: Any, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, parameters: Any) -> Any:
            weight, bias = parameters
            h = hook(jnp.tanh(h @ hook(weight, clip_by_norm) + hook(bias, clip_by_norm)), halve)
            return h, jnp.sum(h)

        h, sums = jax.lax.scan(layer, x, stack)
        return jnp.mean(h * h) + 1e-3 * jnp.sum(sums)

    return jax.grad(loss)


def scanned_inputs() -> tuple[Any, jax.Array]:
    layers, x = mlp_inputs(64, 32)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), x


# -- double backward ---------------------------------------------------------------------------------------------------


def double_backward(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a gradient penalty: hooks run in the first backward, and their derivatives in the second."""

    def loss(layers: Any, x: jax.Array) -> jax.Array:
        h = x
        for weight, bias in layers:
            h = hook(jnp.tanh(h @ hook(weight, squash) + bias), squash)
        return jnp.mean(h * h)

    def penalty(layers: Any, x: jax.Array) -> jax.Array:
        grads = jax.grad(loss)(layers, x)
        return jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)) + 1e-12)

    return jax.grad(penalty)


def double_backward_inputs() -> tuple[Any, jax.Array]:
    return mlp_inputs(64, 32)


MODELS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, jax.Array]]]] = {
    "4-layer MLP": (mlp, mlp_inputs),
    "transformer block": (transformer, transformer_inputs),
    "scanned stack": (scanned, scanned_inputs),
    "double backward": (double_backward, double_backward_inputs),
}


def check_alike(results: dict[str, Any]) -> None:
    """A benchmark of hooks that do not run would be fast: every contestant must give what `custom_vjp` gives."""
    expected = jax.tree.leaves(results["custom_vjp"])
    for name, result in results.items():
        pairs = zip(jax.tree.leaves(result), expected, strict=True)
        same = all(jnp.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in pairs)
        if same is (name == "no hooks"):
            raise AssertionError(f"{name}: the results {'are' if same else 'are not'} those of custom_vjp")
