"""`jhop.hook` under `lax.fori_loop` and `lax.while_loop`: backward where JAX has it, forward mode always."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from tests import under
from tests.under import check, check_true_gradient

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)


def fori(point, x, s):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(point(c, s)) * x, x).sum()


def fori_by_index(point, x, s):
    def body(i, c):
        return point(c, s) * (1.0 + i.astype(x.dtype)) + point(x, s)

    return (lax.fori_loop(1, 4, body, x) ** 2).sum()


def fori_unrolled(point, x, s):
    return lax.fori_loop(0, 4, lambda i, c: jnp.sin(point(c, s)) * 2.0, x, unroll=2).sum()


def fori_of_trees(point, x, s):
    def body(i, c):
        c = point(c, s)
        return {"a": c["b"] * 2.0, "b": jnp.sin(c["a"])}

    out = lax.fori_loop(0, 3, body, {"a": x, "b": 2.0 * x})
    return out["a"].sum() + (out["b"] ** 2).sum()


def fori_in_fori(point, x, s):
    def body(i, c):
        return lax.fori_loop(0, 2, lambda j, d: jnp.sin(point(d, s)) + x, point(c, s))

    return lax.fori_loop(0, 2, body, x).sum()


def fori_in_scan(point, x, s):
    def body(c, row):
        return lax.fori_loop(0, 2, lambda j, d: point(d, s) * row, c), None

    return lax.scan(body, x, jnp.stack([x, 0.5 * x]))[0].sum()


def fori_of_jit(point, x, s):
    step = jax.jit(lambda c: jnp.sin(point(c, s)) * 2.0)
    return lax.fori_loop(0, 3, lambda i, c: step(c), x).sum()


def while_beside(point, x, s):
    """A loop whose length is known only as it runs gives no gradient; what it gives may scale one."""
    n = lax.while_loop(lambda n: n < 5.0, lambda n: n * 2.0, 1.0)
    return (point(jnp.sin(x), s) ** 2).sum() * n


PROGRAMS = [fori_by_index, fori_unrolled, fori_of_trees, fori_in_fori, fori_in_scan, fori_of_jit, while_beside]


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(fori, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(PROGRAMS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "inline"])
def test_second_derivative(run):
    check(fori, "nonlinear", run, X, derivative=lambda fn: jax.grad(lambda x, s: jnp.sin(jax.grad(fn)(x, s)).sum()))


def test_true_gradient():
    check_true_gradient(fori, X)


# A gradient taken inside a loop: the hook runs in each turn, and the loop is forward.


def descend(point, x, s):
    def body(carry):
        n, y = carry
        return n + 1, y - 0.1 * jax.grad(lambda y: (jnp.sin(point(y, s)) ** 2).sum())(y)

    return lax.while_loop(lambda carry: carry[0] < 4, body, (0, x))[1]


def descend_while_large(point, x, s):
    """The hook decides how long the loop runs."""

    def gradient(y):
        return jax.grad(lambda y: (point(y, s) ** 2).sum())(y)

    def body(carry):
        n, y = carry
        return n + 1, y - 0.05 * gradient(y)

    return lax.while_loop(lambda c: (jnp.abs(gradient(c[1])).sum() > 1.0) & (c[0] < 9), body, (0, x))[1]


def descend_for(point, x, s):
    n = jnp.int32(x.sum() * 2.0)  # known only as it runs: 3

    def body(i, y):
        return y - 0.1 * jax.grad(lambda y: (jnp.sin(point(y, s)) ** 2).sum())(y)

    return lax.fori_loop(0, n, body, x)


def descend_in_while(point, x, s):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, descend(point, c[1], s)), (0, x))[1]


as_it_is = functools.partial(check, derivative=lambda fn: fn)


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient_inside_while(rule, run):
    as_it_is(descend, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread([descend_while_large, descend_for, descend_in_while]))
def test_gradient_inside(program, rule, run):
    as_it_is(program, rule, run, X)


@pytest.mark.parametrize("run", under.RUNS)
def test_vmap_of_a_loop_that_takes_gradients(run):
    def program(point, x, s):
        return jax.vmap(lambda row: descend_while_large(point, row, s))(jnp.stack([x, 0.1 * x]))

    as_it_is(program, "nonlinear", run, X)


# Forward.


def doubled(x, by):
    return lax.while_loop(lambda c: c[0] < by, lambda c: (c[0] + 1, jhop.hook(c[1], jnp.square) * 2.0), (0, x))[1]


@pytest.mark.parametrize("run", under.RUNS)
def test_while_is_an_identity_forward(run):
    np.testing.assert_array_equal(under.RUNS[run](lambda x: doubled(x, 3))(X), 8.0 * X)


@pytest.mark.parametrize("run", under.RUNS)
def test_dynamic_fori_is_an_identity_forward(run):
    def loss(x, n):
        return lax.fori_loop(0, n, lambda i, c: jhop.hook(c, jnp.square) * 2.0, x)

    np.testing.assert_array_equal(under.RUNS[run](loss)(X, 3), 8.0 * X)


@pytest.mark.parametrize("run", under.RUNS)
def test_forward_mode_passes_by(run):
    got = under.RUNS[run](lambda x: jax.jvp(lambda x: doubled(x, 3), (x,), (x + 1.0,)))(X)
    np.testing.assert_array_equal(jax.tree.leaves(got)[1], 8.0 * (X + 1.0))


def test_forward_jacobian():
    np.testing.assert_array_equal(jax.jacfwd(lambda x: doubled(x, 2))(X), 4.0 * np.eye(3))


def test_linearize():
    _, linear = jax.linearize(lambda x: lax.fori_loop(0, 3, lambda i, c: jhop.hook(c, jnp.square) * 2.0, x), X)
    np.testing.assert_array_equal(linear(X), 8.0 * X)


def test_gradient_of_while_is_jaxs_error():
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(lambda x: doubled(x, 3).sum())(X)
