"""Hooks on values of every dtype, and under the settings of JAX that change how programs run."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import RULES, RUNS, agree, check

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)
in_runs = pytest.mark.parametrize("run", RUNS)
FLOAT8 = [getattr(jnp, name) for name in dir(jnp) if name.startswith("float8_") and name != "float8_e8m0fnu"]


def leaf(value):
    return jax.tree.leaves(value)[0]


def program(point, x, s):
    return (point(x, s) ** 2).sum() + (3 * point(x, s)).sum()


@in_runs
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rule", ["linear", "nonlinear", "closing"])
def test_half_precision(dtype, rule, run):
    check(program, rule, run, jnp.array(X / 4, dtype), s=dtype(1.5))


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: dtype.__name__)
def test_eighth_precision(dtype, run):
    def hook(ct):
        return (ct.astype(jnp.float32) * 2).astype(ct.dtype)

    grad = jax.grad(lambda x: (jhop.hook(x, hook).astype(jnp.float32) * 0.5).sum())
    got = leaf(RUNS[run](grad)(jnp.ones(3, dtype)))
    assert (got.dtype, got.astype(jnp.float32).tolist()) == (dtype, [1.0] * 3)


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=lambda dtype: dtype.__name__)
def test_with_x64(dtype, rule, run):
    def real(point, x, s):
        return jnp.abs(program(point, x, s))

    with jax.enable_x64(True):
        x = X.astype(dtype) * (1 + (1j if dtype is np.complex128 else 0)) / 3
        check(real, rule, run, x.astype(dtype), s=dtype(1.5))


def test_precision_of_x64_is_kept():
    with jax.enable_x64(True):
        got = jax.jit(jax.grad(lambda x: (jhop.hook(x, lambda ct: ct / 3.0) * x).sum()))(np.array([1.0]))
        assert (got.dtype, got.tolist()) == (jnp.float64, [1.0 / 3.0 + 1.0])


def test_x64_on_and_off_again():
    grad = jax.jit(jax.grad(lambda x: (jhop.hook(x, lambda ct: ct / 3.0) * 2).sum()))
    for on in (False, True, False):
        with jax.enable_x64(on):
            assert grad(np.ones(1)).dtype == (jnp.float64 if on else jnp.float32)


@in_runs
def test_python_scalar(run):
    for name, rule in RULES.items():
        if name != "closing":
            got = leaf(RUNS[run](jax.grad(lambda x, rule=rule: 3.0 * jhop.hook(x, lambda ct: rule(ct, None))))(2.0))
            np.testing.assert_allclose(got, rule(jnp.float32(3), None), rtol=1e-6)


@pytest.mark.parametrize("value", [2.0, 2, X, X.tolist(), 1j], ids=repr)
def test_value_without_gradient_comes_back_as_it_is(value):
    tree = {"float": 1.0, "value": value}
    assert jhop.hook(tree, lambda ct: pytest.fail("ran")) is tree


WEAK = {
    "weak": (2.0, lambda ct: ct * 2, True),
    "weak, hook makes it strong": (2.0, lambda ct: jnp.float32(2) * ct, True),
    "strong": (jnp.float32(2), lambda ct: ct * 2, False),
    "strong, hook makes it weak": (jnp.float32(2), lambda ct: jnp.asarray(6.0), False),
}


@in_runs
@pytest.mark.parametrize("name", WEAK)
def test_weak_type_is_that_of_the_cotangent(name, run):
    x, hook, weak = WEAK[name]
    got = leaf(RUNS[run](jax.grad(lambda x: jhop.hook(x, hook) * 3.0))(x))
    assert (float(got), got.weak_type) == (6.0, weak)


@in_runs
def test_weak_type_through_a_scan(run):
    def of(x):
        hooked = lambda c, _: (jhop.hook(c, lambda ct: jnp.float32(2) * ct) * 2, None)  # noqa: E731
        return lax.scan(hooked, x, None, length=3)[0]

    assert float(leaf(RUNS[run](jax.grad(of))(2.0))) == 64.0


@in_runs
def test_hook_that_returns_a_numpy_array(run):
    got = leaf(RUNS[run](jax.grad(lambda x: (3 * jhop.hook(x, lambda ct: np.full(3, 7, np.float32))).sum()))(X))
    assert np.asarray(got).tolist() == [7.0] * 3


def test_hook_that_works_in_numpy():
    assert jax.grad(lambda x: (3 * jhop.hook(x, np.negative)).sum())(X).tolist() == [-3.0] * 3


@in_runs
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), ()], ids=str)
def test_shapes_at_the_edge(shape, run):
    x = jnp.full(shape, 3.0)
    got = leaf(RUNS[run](jax.grad(lambda x: (jhop.hook(x, lambda ct: 5 * ct) ** 2).sum()))(x))
    assert (got.shape, got.tolist()) == (shape, (30 * x / 3).tolist())


def test_vmap_over_no_example():
    got = jax.jit(jax.vmap(jax.grad(lambda x: (jhop.hook(x, lambda ct: 5 * ct) ** 2).sum())))(jnp.zeros((0, 3)))
    assert got.shape == (0, 3)


# Keys.


@in_runs
def test_hook_closes_over_a_key(run):
    def of(x, key):
        return (jhop.hook(x, lambda ct: ct + jax.random.normal(key, ct.shape)) * 2).sum()

    key = jax.random.key(1)
    agree(leaf(RUNS[run](jax.grad(of))(X, key)), 2 + jax.random.normal(key, (3,)))


@in_runs
def test_hook_closes_over_a_vmapped_key(run):
    def of(x, key):
        return (jhop.hook(x, lambda ct: ct + jax.random.normal(key, ct.shape)) * 2).sum()

    keys = jax.random.split(jax.random.key(1), 2)
    expected = 2 + jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    agree(leaf(RUNS[run](jax.vmap(jax.grad(of), (None, 0)))(X, keys)), expected)


@in_runs
def test_key_in_the_pytree_of_a_scan(run):
    def of(x, keys):
        def body(carry, key):
            tree = jhop.hook({"key": key, "x": carry}, lambda ct: {"key": ct["key"], "x": 5 * ct["x"]})
            return tree["x"] * jax.random.uniform(tree["key"], (3,)), None

        return lax.scan(body, x, keys)[0].sum()

    keys = jax.random.split(jax.random.key(1), 2)
    expected = 25 * jnp.prod(jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys), 0)
    agree(leaf(RUNS[run](jax.grad(of))(X, keys)), expected)


# Settings.


def deep(point, x, s):
    def of(x, s):
        body = jax.checkpoint(lambda c, r: (jnp.sin(point(c, s * r)) * 2, None))
        return lax.scan(body, x, jnp.array([1.0, 2.0]))[0].sum()

    return jax.jit(jax.vmap(of))(jnp.stack([x, 2 * x]), s * jnp.arange(1.0, 3.0)).sum()


SETTINGS = {
    "disable_jit": jax.disable_jit,
    "enable_checks": lambda: jax.enable_checks(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "no promotion": lambda: jax.numpy_rank_promotion("raise"),
    "highest precision": lambda: jax.default_matmul_precision("highest"),
    "threefry": lambda: jax.threefry_partitionable(False),
}


@pytest.mark.parametrize("run", ["eager", "jhop.jit"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting, run):
    with SETTINGS[setting]():
        check(deep, "closing", run, X)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("setting", ["disable_jit", "enable_checks"])
def test_second_order_under_settings(setting, rule):
    with SETTINGS[setting]():
        check(program, rule, "jax.jit", X, derivative=lambda f: jax.jacrev(jax.grad(lambda x, s: f(jnp.sin(x), s))))


@pytest.mark.parametrize("how", [lambda f: f, jax.jit, lambda f: jhop.jit(f, fullgraph=True)], ids=["", "jit", "jhop"])
def test_nan_that_a_hook_makes_is_found(how):
    grad = how(jax.grad(lambda x: (jhop.hook(x, lambda ct: jnp.log(-ct)) * 2).sum()))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"), contextlib.redirect_stdout(None):
        grad(X)
