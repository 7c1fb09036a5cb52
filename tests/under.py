"""What the files `test_under_*.py` share: hooks, and ways to run a program, checked against hand-written rules.

A program is `program(point, x, s)`, a scalar function of an array `x` and a scalar `s`. It puts its hooks on values
with `point(value, s)`, which is `jhop.hook` in one run and a `jax.custom_vjp` by hand in the other: gradients must
agree. Some hooks close over `s`, a tracer; by hand it is a residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jhop

Rule = Callable[[Any, Any], Any]
Point = Callable[[Any, Any], Any]


def linear(ct, s):
    return jax.tree.map(lambda leaf: 3 * leaf, ct)


def nonlinear(ct, s):
    return jax.tree.map(lambda leaf: leaf * leaf + 2 * leaf, ct)


def clip(ct, s):
    norm = jnp.sqrt(sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(ct)))
    return jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, 0.5 / norm).astype(leaf.dtype), ct)


def closing(ct, s):
    return jax.tree.map(lambda leaf: leaf * s + leaf, ct)


def true(ct, s):
    """The cotangent itself, in other words."""
    return jax.tree.map(lambda leaf: (leaf * 3 - leaf) / 2, ct)


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (linear, nonlinear, clip, closing)}


def hooked(rule: Rule) -> Point:
    """Puts a rule on a value with `jhop.hook`."""
    if rule is closing or getattr(rule, "closes", False):
        return lambda x, s: jhop.hook(x, lambda ct: rule(ct, s))
    return lambda x, s: jhop.hook(x, lambda ct: rule(ct, None))


def by_hand(rule: Rule) -> Point:
    """What `jhop.hook` replaces: an identity with a hand-written rule."""

    @jax.custom_vjp
    def point(x, s):
        return x

    point.defvjp(lambda x, s: (x, s), lambda s, ct: (rule(ct, s), jnp.zeros_like(s)))
    return point


def ignored(x: Any, s: Any) -> Any:
    """No hook at all: where its gradient agrees, a test shows nothing."""
    return x


def _inlined(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: jhop.inline(jhop.make_fx(fn)(*args))(*args)


RUNS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda fn: fn,
    "jax.jit": jax.jit,
    "jhop.jit": lambda fn: jhop.jit(fn, fullgraph=True),
    "make_fx": lambda fn: lambda *args: jhop.make_fx(fn)(*args)(*args),
    "inline": _inlined,
}

PRODUCT = [(rule, run) for rule in RULES for run in RUNS]


def spread(programs: Any) -> list[Any]:
    """(program, rule, run): each program inlined, compiled and in one further run, each time with another hook."""
    rules, others = list(RULES), ["eager", "jax.jit", "make_fx"]
    cases = []
    for i, program in enumerate(programs):
        for k, run in enumerate(("inline", "jhop.jit", others[i % 3])):
            rule = rules[(i + k) % len(rules)]
            cases.append(pytest.param(program, rule, run, id=f"{program.__name__}-{rule}-{run}"))
    return cases


def inlined_and_jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an inlined graph as one compiled function, for what is slow or impossible one equation at a time."""
    return lambda *args: jax.jit(jhop.inline(jhop.make_fx(fn)(*args)))(*args)


def make_mesh(shape: tuple[int, ...], names: tuple[str, ...], *kinds: str) -> Any:
    """A mesh, its axes of the kinds "Auto" (the default), "Explicit".

    Where devices are fewer (tests/conftest.py makes eight of a CPU), the last axes shrink; with one device the test is
    skipped.
    """
    if jax.device_count() == 1:
        pytest.skip("needs several devices, as JAX_PLATFORMS=cpu gives them (tests/conftest.py)")
    fitting = []
    for size in shape:
        fitting.append(min(size, jax.device_count() // math.prod(fitting)))
    types = tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds or ("Auto",) * len(shape))
    return jax.make_mesh(tuple(fitting), names, axis_types=types)


def agree(got: Any, expected: Any, rtol: float = 1e-4) -> None:
    """Asserts equal structure, shapes, dtypes, and values up to rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        wide = np.complex128 if jnp.issubdtype(ours.dtype, jnp.complexfloating) else np.float64
        np.testing.assert_allclose(np.asarray(ours).astype(wide), np.asarray(theirs).astype(wide), rtol, atol=1e-6)


def differ(got: Any, other: Any) -> bool:
    """Whether two gradients are visibly not the same."""
    return not all(
        np.allclose(np.asarray(a), np.asarray(b), rtol=1e-2, atol=1e-3)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(other), strict=True)
    )


def check(program: Any, rule: Any, run: Any, x: Any, s: Any = None, derivative: Callable[..., Any] = jax.grad) -> None:
    """Asserts that a derivative of a program with hooks is that of the same program with hand-written rules.

    Args:
        program: `program(point, x, s)`.
        rule: a key of `RULES`, or such a function itself; `s` is for `closing`, and for rules with a true `closes`.
        run: a key of `RUNS`, or such a function itself: how the derivative is run. Or several of them.
        derivative: e.g. `jax.grad`; applied to a function of (x, s), so it differentiates by `x`.
    """
    s = jnp.float32(1.5) if s is None else s

    def of(point: Point) -> Callable[..., Any]:
        return derivative(lambda x, s: program(point, x, s))

    wanted: Any = RULES.get(rule, rule)
    expected, without = jax.jit(lambda x, s: (of(by_hand(wanted))(x, s), of(ignored)(x, s)))(x, s)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(expected)), "this program has no numbers"
    assert differ(expected, without), "this program does not show whether its hooks ran"
    for way in run if isinstance(run, tuple) else (run,):
        transform: Any = RUNS.get(way, way)
        agree(transform(of(hooked(wanted)))(x, s), expected)


def check_true_gradient(program: Any, x: Any, s: Any = None, modes: Any = ("fwd", "rev"), order: int = 2) -> None:
    """Asserts by finite differences that hooks which return the true gradient leave all derivatives right."""
    s = jnp.float32(1.5) if s is None else s
    check_grads(jax.jit(lambda x: program(hooked(true), x, s)), (x,), order=order, modes=modes, rtol=2e-2, atol=2e-2)
