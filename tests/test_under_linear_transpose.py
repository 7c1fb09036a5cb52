"""`jax.linear_transpose` runs hooks; of what a linear hook made of a function, it runs the hook's own transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import RULES, RUNS, agree, check, hooked

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)
CT = np.array([2.0, 0.25, -1.0], np.float32)
S = jnp.float32(1.5)
RUN = pytest.mark.parametrize("run", RUNS)


def transpose(f):
    return lambda ct: jax.linear_transpose(f, X)(ct)[0]


def first(out):
    return jax.tree.leaves(out)[0]


@RUN
@pytest.mark.parametrize("rule", RULES)
def test_transpose_runs_the_hook(rule, run):
    def of(ct, s):
        return transpose(lambda x: 2 * hooked(RULES[rule])(x, s))(ct)

    agree(first(RUNS[run](of)(CT, S)), RULES[rule](2 * jnp.array(CT), S))


@RUN
@pytest.mark.parametrize("rule", RULES)
def test_transpose_of_a_linearized_function(rule, run):
    def derivative(f):
        return lambda x, s: jax.linear_transpose(jax.linearize(lambda x: f(x, s), x)[1], x)(jnp.float32(-2))

    check(lambda point, x, s: (point(jnp.sin(x), s) ** 2).sum(), rule, run, X, derivative=derivative)


LINEAR = {
    "scale": lambda ct: 3 * ct,
    "reverse": lambda ct: 2 * ct[::-1],
    "cumulate": lambda ct: jnp.cumsum(2 * ct),
    "sum": lambda ct: jnp.broadcast_to(ct.sum(), ct.shape),
    "first": lambda ct: 5 * ct.at[1:].set(0),
}


@RUN
@pytest.mark.parametrize("hook", LINEAR)
def test_transpose_of_a_transpose_is_the_hooks_own_transpose(hook, run):
    def of(x):
        return 2 * jhop.hook(x, LINEAR[hook])

    expected = 2 * jax.linear_transpose(LINEAR[hook], X)(jnp.array(CT))[0]
    agree(first(RUNS[run](transpose(transpose(of)))(CT)), expected)


@pytest.mark.parametrize("hook", LINEAR)
def test_four_transposes_are_two(hook):
    def of(x):
        return 2 * jhop.hook(x, LINEAR[hook])

    agree(jax.jit(transpose(transpose(transpose(transpose(of)))))(CT), transpose(transpose(of))(CT))


def test_transpose_by_a_value_that_the_hook_closes_over():
    # The second transpose is linear in the cotangent for each value of the closure.
    def of(ct, s):
        return transpose(transpose(lambda x: 2 * jhop.hook(x, lambda ct: (s * ct)[::-1])))(ct)

    agree(jax.jit(of)(CT, S), jnp.array(2 * 1.5 * CT[::-1]))
    agree(jax.vmap(of, (None, 0))(CT, jnp.array([1.0, 2.0])), jnp.stack([2 * CT[::-1], 4 * CT[::-1]]))


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_hook_that_closes_over_what_is_transposed_by_is_refused(jit):
    of = transpose(lambda x: 2 * jhop.hook(x, lambda ct: ct * x))
    with pytest.raises(jhop.HookError, match=r"`<lambda>` \(test_under_linear_transpose.py:\d+\) closes over an input"):
        (jax.jit(of) if jit else of)(CT)


PLACES = {
    "scan": lambda point: lambda x: lax.scan(lambda c, _: (2 * point(c), None), x, None, length=2)[0],
    "cond": lambda point: lambda x: lax.cond(jnp.array(True), lambda x: 4 * point(x), lambda x: x, x),
    "jit": lambda point: jax.jit(lambda x: 4 * point(x)),
    "vmap": lambda point: jax.vmap(lambda e: 4 * point(e)),
}


@pytest.mark.parametrize("place", PLACES)
def test_transpose_through(place):
    times = 4 * (9 if place == "scan" else 3)
    point = lambda x: jhop.hook(x, lambda ct: 3 * ct)  # noqa: E731
    agree(jax.jit(transpose(PLACES[place](point)))(CT), jnp.array(times * CT))
    agree(jax.vmap(transpose(PLACES[place](point)))(np.stack([CT, -CT])), jnp.stack([times * CT, -times * CT]))
