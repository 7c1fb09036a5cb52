"""`jhop.hook` inside what maps and combines: `lax.map`, `associative_scan`, `jnp.vectorize`, reductions, scatters."""

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


def mapped(point, x, s):
    return lax.map(lambda row: (point(row, s) ** 2).sum(), jnp.stack([x, -2.0 * x])).sum()


def mapped_in_batches(point, x, s):
    rows = jnp.stack([x * k for k in (1.0, -2.0, 0.5, 3.0, 0.1)])  # 5 in batches of 2: one is left over
    return (lax.map(lambda row: jnp.sin(point(row, s)).sum(), rows, batch_size=2) ** 2).sum()


def mapped_tree(point, x, s):
    out = lax.map(lambda t: point({"y": t["a"] * t["b"]}, s), {"a": x, "b": jnp.sin(x)})
    return (out["y"] ** 2).sum()


def mapped_in_map(point, x, s):
    def row(k):
        return lax.map(lambda v: point(v * k, s) ** 2, point(x, s)).sum()

    return lax.map(row, x).sum()


def associative(point, x, s):
    return (lax.associative_scan(lambda a, b: point(a, s) + b, jnp.stack([x, 2.0 * x, -x, x])) ** 2).sum()


def associative_backwards(point, x, s):
    rows = jnp.stack([x, 2.0 * x, 0.5 * x])
    return (lax.associative_scan(lambda a, b: point(a * b, s), rows, reverse=True)).sum()


def associative_pairs(point, x, s):
    """A linear recurrence, as state-space models compute it."""

    def combine(left, right):
        left = point(left, s)
        return left[0] * right[0], left[1] * right[0] + right[1]

    return (lax.associative_scan(combine, (jnp.cos(x), x))[1] ** 2).sum()


def tree_map(point, x, s):
    tree = {"a": x, "b": [2.0 * x, jnp.sin(x).sum()]}
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.tree.map(lambda leaf: point(leaf, s), tree)))


def tree_reduce(point, x, s):
    return jax.tree.reduce(lambda a, b: point(a * b, s), [x, jnp.sin(x), 2.0 * x]).sum()


def functools_reduce(point, x, s):
    return functools.reduce(lambda a, b: jnp.sin(point(a, s)) + b, [x, 2.0 * x, x]).sum()


def vectorized(point, x, s):
    f = jnp.vectorize(lambda a, b: point(a, s) @ jnp.sin(b), signature="(n),(n)->()")
    return (f(jnp.stack([x, 2.0 * x]), x) ** 2).sum()


def apply_along_axis(point, x, s):
    return (jnp.apply_along_axis(lambda row: point(row, s) ** 2, 1, jnp.stack([x, -x]))).sum()


def mapped_scan(point, x, s):
    def row(k):
        return lax.scan(lambda c, v: (jnp.sin(point(c, s)) + v, None), k, x)[0]

    return (jax.vmap(row)(x) ** 2).sum() + (lax.map(row, x) ** 2).sum()


def piecewise(point, x, s):
    return jnp.piecewise(x, [x < 0, x > 1], [lambda v: point(v, s) ** 2, lambda v: jnp.sin(point(v, s)), 0.0]).sum()


def of_a_linear_operator(point, x, s):
    """`jax.scipy`'s solver, whose matrix is a function."""
    a = jnp.diag(jnp.array([2.0, 3.0, 4.0])) + 0.1
    return (jax.scipy.sparse.linalg.cg(lambda v: a @ v, point(x, s), maxiter=5)[0] ** 2).sum()


PROGRAMS = [
    mapped_in_batches, mapped_tree, mapped_in_map, associative, associative_backwards, associative_pairs, tree_map,
    tree_reduce, functools_reduce, vectorized, apply_along_axis, mapped_scan, piecewise, of_a_linear_operator,
]  # fmt: skip


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(mapped, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(PROGRAMS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", ["jhop.jit", "inline"])
def test_second_derivative(run):
    check(
        associative_pairs, "nonlinear", run, X,
        derivative=lambda fn: jax.grad(lambda x, s: jnp.sin(jax.grad(fn)(x, s)).sum()),
    )  # fmt: skip


@pytest.mark.parametrize("program", [mapped_in_batches, associative_pairs], ids=lambda program: program.__name__)
def test_true_gradient(program):
    check_true_gradient(program, X)


# Functions of scalars that JAX compiles into one operation: it differentiates none of them, but a backward pass may
# use them, with a hook inside.


def reduce(hook, x):
    return lax.reduce(x, np.float32(0.0), lambda a, b: a + hook(b), (0,))


def reduce_window(hook, x):
    return lax.reduce_window(x, np.float32(0.0), lambda a, b: hook(a) + b, (2,), (1,), "VALID")


def scatter(hook, x):
    return x.at[jnp.array([0, 2])].apply(lambda v: hook(v) + 1.0)


@pytest.mark.parametrize("run", ["jhop.jit", "inline"])
@pytest.mark.parametrize("program", [reduce, reduce_window, scatter], ids=lambda program: program.__name__)
def test_forward_only(program, run):
    def rule(v):
        return v * v

    got = under.RUNS[run](lambda x: program(lambda v: jhop.trace_wrapped(v, fn=rule), x))(X)
    np.testing.assert_allclose(got, program(rule, X), rtol=1e-6)
    assert under.differ(got, program(lambda v: v, X))


@pytest.mark.parametrize("program", [reduce, reduce_window, scatter], ids=lambda program: program.__name__)
def test_state_read_in_a_combiner_is_refused_by_name(program):
    box = type("Box", (), {"k": 2.0})()
    with pytest.raises(jhop.Unsupported, match=f"reads Python state inside `{program.__name__}`"):
        jhop.inline(jhop.make_fx(lambda x: program(lambda v: jhop.trace_wrapped(v, fn=lambda v: v * box.k), x))(X))
    assert box.k == 2.0
