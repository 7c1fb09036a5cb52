"""Hooks under forward mode: as if there were none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import RULES, RUNS, agree, hooked, ignored

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)
S = jnp.float32(1.5)


def plain(point, x, s):
    y = point(jnp.sin(x), s)
    return y * y + 3 * y


def scan(point, x, s):
    def body(carry, row):
        carry = point(carry, s) * row
        return jnp.sin(carry), point(carry, s)

    carry, rows = lax.scan(body, x, jnp.array([1.0, 2.0]))
    return carry + rows.sum(0)


def fori_loop(point, x, s):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(point(c, s)) * x, x)


def while_loop(point, x, s):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(point(c[1], s)) * 2), (0, x))[1]


def while_loop_with_a_traced_bound(point, x, s):
    return lax.while_loop(lambda c: c[0] < s * 2, lambda c: (c[0] + 1, jnp.sin(point(c[1], s)) * 2), (0.0, x))[1]


def cond(point, x, s):
    return lax.cond(x.sum() > 0, lambda x: point(x, s) ** 2, lambda x: 3 * x, x)


def switch(point, x, s):
    return lax.switch(1, [lambda x: 3 * x, lambda x: point(x, s) ** 2], x)


def vmap(point, x, s):
    return jax.vmap(lambda e: point(e, s) ** 2 * e)(x)


def vmap_with_an_axis(point, x, s):
    return jax.vmap(lambda e: point(e, s) ** 2 * lax.psum(e, "i"), axis_name="i")(x)


def jit(point, x, s):
    return jax.jit(lambda x: point(x, s) ** 2)(x)


def checkpoint(point, x, s):
    return jax.checkpoint(lambda x: jnp.sin(point(x, s)) ** 2)(x)


def custom_jvp(point, x, s):
    @jax.custom_jvp
    def inner(x):
        return point(x, s) ** 2

    inner.defjvp(lambda primals, tangents: (inner(*primals), 7 * point(tangents[0], s)))
    return inner(x)


def lax_map(point, x, s):
    return lax.map(lambda e: point(e, s) ** 2, x)


def associative_scan(point, x, s):
    return lax.associative_scan(lambda a, b: point(a, s) * b, x)


def deep(point, x, s):
    body = jax.checkpoint(lambda c, r: (jnp.sin(point(c, s)) * r, None))
    return jax.jit(jax.vmap(lambda e: lax.scan(body, e, jnp.array([1.0, 2.0]))[0]))(x)


PROGRAMS = [
    plain, scan, fori_loop, while_loop, while_loop_with_a_traced_bound, cond, switch, vmap, vmap_with_an_axis, jit,
    checkpoint, custom_jvp, lax_map, associative_scan, deep,
]  # fmt: skip

FORWARD = {
    "jvp": lambda f: lambda x, s: jax.jvp(lambda x: f(x, s), (x,), (jnp.cos(x),)),
    "jvp by both": lambda f: lambda x, s: jax.jvp(f, (x, s), (jnp.cos(x), s)),
    "jacfwd": jax.jacfwd,
    "linearize": lambda f: lambda x, s: jax.linearize(lambda x: f(x, s), x)[1](jnp.cos(x)),
    "jvp of jvp": lambda f: (
        lambda x, s: jax.jvp(lambda x: jax.jvp(lambda x: f(x, s), (x,), (x,))[1], (x,), (jnp.cos(x),))
    ),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jvp of jit": lambda f: lambda x, s: jax.jvp(jax.jit(lambda x: f(x, s)), (x,), (jnp.cos(x),)),
    "jvp of checkpoint": lambda f: lambda x, s: jax.jvp(jax.checkpoint(lambda x: f(x, s)), (x,), (jnp.cos(x),)),
    "vmap of jvp": lambda f: (
        lambda x, s: jax.vmap(lambda x: jax.jvp(lambda x: f(x, s), (x,), (x,)))(jnp.stack([x, -2 * x]))
    ),
    "jvp of vmap": lambda f: (
        lambda x, s: jax.jvp(jax.vmap(lambda x: f(x, s)), (jnp.stack([x, -2 * x]),), (jnp.stack([x, x]),))
    ),
}


def never(x, s):
    def hook(ct):
        raise AssertionError(f"ran with {s}")

    return jhop.hook(x, hook)


def both(how, program):
    if program is custom_jvp and how == "jvp by both":
        pytest.skip("JAX does not differentiate by what a custom_jvp function closes over")
    of = lambda point: FORWARD[how](lambda x, s: program(point, x, s))  # noqa: E731
    agree(jax.jit(of(never))(X, S), of(ignored)(X, S))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("how", ["jvp", "jacfwd", "linearize", "jvp by both"])
def test_forward_mode_runs_no_hook(how, program):
    both(how, program)


@pytest.mark.parametrize("program", [plain, deep, while_loop], ids=lambda program: program.__name__)
@pytest.mark.parametrize("how", FORWARD)
def test_forward_mode_of_every_kind(how, program):
    both(how, program)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["jvp", "jacfwd", "linearize"])
@pytest.mark.parametrize("run", RUNS)
def test_forward_mode_passes_the_hook_by(how, rule, run):
    of = lambda point: FORWARD[how](lambda x, s: plain(point, x, s))  # noqa: E731
    got, expected = RUNS[run](of(hooked(RULES[rule])))(X, S), of(ignored)(X, S)
    agree(jax.tree.leaves(got), jax.tree.leaves(expected))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_forward_pass_is_the_functions_own(program):
    agree(jax.jit(lambda x, s: program(never, x, s))(X, S), program(ignored, X, S))


def test_hook_in_a_forward_rule_is_on_the_tangent():
    # The rule of a custom_jvp is transposed for the gradient, and a hook in it with it.
    def of(point):
        return jax.grad(lambda x: custom_jvp(point, x, S).sum())(X)

    agree(of(hooked(RULES["nonlinear"])), jnp.full(3, 7.0 * 7.0 + 2 * 7.0))


def test_custom_vjp_around_a_hook_replaces_it():
    @jax.custom_vjp
    def inner(x):
        return never(x, S) ** 2

    inner.defvjp(lambda x: (inner(x), x), lambda x, ct: (jhop.hook(ct * 5, jnp.square) * x,))
    agree(jax.jit(jax.grad(lambda x: inner(x).sum()))(X), jnp.array(X * 5))
