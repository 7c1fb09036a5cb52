"""`jhop.hook` under `lax.cond` and `lax.switch`: the branch that runs has its hooks run, the others theirs not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from tests import under
from tests.under import check, check_true_gradient

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)


def cond(point, x, s):
    return lax.cond(x.sum() > 0, lambda x: (point(x, s) * x).sum(), lambda x: x.sum(), x)


def untaken(point, x, s):
    return lax.cond(x.sum() < 0, lambda x: x.sum(), lambda x: (jnp.sin(point(x, s)) * x).sum(), x)


def both(point, x, s):
    return lax.cond(x[0] > 0, lambda x: (point(x, s) ** 2).sum(), lambda x: point(x, s).sum(), 2.0 * x)


def closed_over(point, x, s):
    w = point(jnp.cos(x), s)
    return lax.cond(x[0] > 0, lambda: (point(w, s) * w).sum(), lambda: w.sum()) + w.sum()


def around(point, x, s):
    return point(lax.cond(x[0] > 0, lambda x: jnp.sin(x), lambda x: x, point(x, s)), s).sum() ** 2


def trees(point, x, s):
    def taken(tree):
        tree = point(tree, s)
        return {"y": tree["a"] * tree["b"][0], "z": tree["a"].sum()}

    out = lax.cond(x[0] > 0, taken, lambda tree: {"y": tree["a"], "z": tree["b"][0].sum()}, {"a": x, "b": [2.0 * x]})
    return (out["y"] ** 2).sum() + out["z"]


def switch(point, x, s):
    branches = [lambda x: x.sum(), lambda x: (point(x, s) * x).sum(), lambda x: (point(x, s) ** 3).sum()]
    return sum(lax.switch(i, branches, x * (i + 1.0)) for i in range(3))


def dynamic_switch(point, x, s):
    branches = [lambda x: x * 2.0, lambda x: point(x, s) * x, lambda x: jnp.sin(point(x, s))]
    return sum(lax.switch(jnp.int32(x[2]) - k, branches, x).sum() for k in range(4))


def nested(point, x, s):
    def inner(x):
        return lax.cond(x[1] < 0, lambda x: jnp.sin(point(x, s)), lambda x: x, point(x, s))

    return lax.cond(x[0] > 0, lambda x: inner(point(x, s)).sum() ** 2, lambda x: x.sum(), x)


def in_scan(point, x, s):
    def body(c, row):
        return lax.cond(row[0] > 0, lambda c: point(c, s) * row, lambda c: jnp.sin(point(c, s)), c), None

    return lax.scan(body, x, jnp.stack([x, -x, 2.0 * x]))[0].sum()


def around_scan(point, x, s):
    def loop(x):
        return lax.scan(lambda c, _: (jnp.sin(point(c, s)) * 2.0, None), x, None, length=2)[0]

    return lax.cond(x[0] > 0, loop, lambda x: x, x).sum()


def under_vmap(point, x, s):
    def one(row):
        return lax.cond(row[0] > 0, lambda row: (point(row, s) ** 2).sum(), lambda row: 3.0 * row.sum(), row)

    return jax.vmap(one)(jnp.stack([x, -x])).sum()


def under_vmap_of_one_predicate(point, x, s):
    def one(row):
        return lax.cond(x[0] > 0, lambda row: (point(row, s) ** 2).sum(), lambda row: row.sum(), row)

    return jax.vmap(one)(jnp.stack([x, -x])).sum()


def checkpointed(point, x, s):
    def branch(x):
        return jnp.sin(point(jnp.sin(x), s))

    return lax.cond(x[0] > 0, jax.checkpoint(branch), lambda x: x, x).sum()


def by_platform(point, x, s):
    return lax.platform_dependent(x, default=lambda x: (point(x, s) ** 2).sum())


def by_named_platform(point, x, s):
    return lax.platform_dependent(x, tpu=lambda x: x.sum(), default=lambda x: (point(x, s) ** 2).sum())


PROGRAMS = [
    untaken, both, closed_over, around, trees, switch, dynamic_switch, nested, in_scan, around_scan, under_vmap,
    under_vmap_of_one_predicate, checkpointed, by_platform, by_named_platform,
]  # fmt: skip


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(cond, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(PROGRAMS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "inline"])
@pytest.mark.parametrize("program", [switch, in_scan], ids=lambda program: program.__name__)
def test_second_derivative(program, run):
    check(program, "nonlinear", run, X, derivative=lambda fn: jax.grad(lambda x, s: jnp.sin(jax.grad(fn)(x, s)).sum()))


def test_true_gradient():
    check_true_gradient(nested, X)


@pytest.mark.parametrize("run", under.RUNS)
@pytest.mark.parametrize("positive", [True, False])
def test_hook_of_the_branch_not_taken_adds_nothing(run, positive):
    """Hooks that add to their cotangent would show even on zeros."""

    def loss(x):
        return lax.cond(
            x[0] > 0,
            lambda x: (jhop.hook(x, lambda ct: ct + 10.0) * 2.0).sum(),
            lambda x: (jhop.hook(x, lambda ct: ct + 100.0) * 3.0).sum(),
            x,
        )

    x = X if positive else -X
    np.testing.assert_array_equal(under.RUNS[run](jax.grad(loss))(x), [12.0 if positive else 103.0] * 3)


@pytest.mark.parametrize("run", under.RUNS)
def test_under_vmap_each_example_has_its_branchs_hook(run):
    def loss(x):
        return lax.cond(
            x > 0, lambda x: jhop.hook(x, lambda ct: ct + 10.0) * 2.0, lambda x: jhop.hook(x, lambda ct: -ct) * 3.0, x
        )

    np.testing.assert_array_equal(under.RUNS[run](jax.vmap(jax.grad(loss)))(X), [12.0, -3.0, 12.0])


def test_forward_mode_passes_by():
    def of(point):
        return jax.jvp(lambda x: nested(point, x, jnp.float32(1.5)), (X,), (jnp.cos(X),))

    under.agree(of(under.hooked(under.nonlinear)), of(under.ignored))


@pytest.mark.parametrize("run", under.RUNS)
def test_a_hook_that_branches(run):
    def rule(ct, s):
        return lax.cond(ct.sum() > s, lambda ct: ct * 10.0, lambda ct: -ct, ct)

    for sign in (1.0, -1.0):
        fn = jax.grad(lambda x, sign=sign: sign * (jhop.hook(x, lambda ct: rule(ct, 1.0)) ** 2).sum())
        got = under.RUNS[run](fn)(X)
        np.testing.assert_array_equal(got, 20.0 * X if sign > 0 else 2.0 * X)


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit", "inline"])
def test_second_derivative_of_a_hook_that_branches(run):
    def rule(ct, s):
        return lax.cond(ct.sum() > 0, lambda ct: ct**3, lambda ct: ct**2, ct)

    def derivative(fn):
        return lambda x, s: jax.jvp(lambda x: jax.grad(fn)(x, s), (x,), (jnp.cos(x),))[1]

    check(lambda point, x, s: (jnp.sin(point(2.0 * x, s)) ** 2).sum(), rule, run, X, derivative=derivative)
