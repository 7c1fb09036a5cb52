"""`jhop.hook` under `lax.scan`: in the carry, on what is scanned over, on what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from tests import under
from tests.under import check, check_true_gradient

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)


def carry(point, x, s):
    def body(c, row):
        return jnp.sin(point(c, s)) * 1.5 + row, None

    return lax.scan(body, x, jnp.stack([x, 2.0 * x, s * x]))[0].sum()


def inputs(point, x, s):
    def body(c, row):
        return c * 0.5 + point(row, s) * row, None

    return lax.scan(body, x, jnp.stack([x, 2.0 * x]))[0].sum()


def outputs(point, x, s):
    def body(c, row):
        return jnp.tanh(c + row), point(c * row, s)

    return (lax.scan(body, x, jnp.stack([x, 2.0 * x]))[1] ** 2).sum()


def everywhere(point, x, s):
    def body(c, row):
        c = point(c, s) * 1.5 + point(row, s)
        return c, point(c * row, s)

    c, rows = lax.scan(body, point(x, s), point(jnp.stack([x, 2.0 * x]), s))
    return point(c, s).sum() + 0.1 * point(rows, s).sum()


def backwards(point, x, s):
    def body(c, row):
        return jnp.sin(point(c, s)) + row, point(c, s) * row

    c, rows = lax.scan(body, x, jnp.stack([x, 2.0 * x, 3.0 * x]), reverse=True)
    return c.sum() + (rows * jnp.arange(3, dtype=x.dtype)[:, None]).sum()


def nested(point, x, s):
    def inner(c, row):
        return point(c, s) * row + 1.0, point(row, s)

    def outer(c, row):
        c, rows = lax.scan(inner, point(c, s), jnp.stack([row, -row]))
        return c, rows * c

    c, rows = lax.scan(outer, x, jnp.stack([x, 0.5 * x]))
    return c.sum() + (rows**2).sum()


def closed_over(point, x, s):
    w = point(jnp.cos(x), s)  # used by each step: the hook sees the sum

    def body(c, _):
        return c * w + point(w, s), None

    return lax.scan(body, x, None, length=3)[0].sum()


def trees(point, x, s):
    def body(c, row):
        c = point(c, s)
        return {"a": c["b"][0] * row["r"], "b": (c["a"] + 1.0,)}, {"y": point((c["a"], row["r"]), s)}

    c, ys = lax.scan(body, {"a": x, "b": (2.0 * x,)}, {"r": jnp.stack([x, 2.0 * x])})
    return c["a"].sum() + c["b"][0].sum() + sum((y**2).sum() for y in ys["y"])


def integers_beside(point, x, s):
    def body(c, i):
        n, y = c
        return (n + i, point(y, s) * i.astype(y.dtype)), None

    return lax.scan(body, (0, x), jnp.arange(1, 4, dtype=jnp.int32))[0][1].sum()


def unrolled(point, x, s):
    return lax.scan(lambda c, _: (jnp.sin(point(c, s)) * 2.0, None), x, None, length=5, unroll=2)[0].sum()


def unrolled_whole(point, x, s):
    return lax.scan(lambda c, _: (jnp.sin(point(c, s)) * 2.0, None), x, None, length=3, unroll=True)[0].sum()


def once(point, x, s):
    return lax.scan(lambda c, row: (point(c, s) * row, point(row, s)), x, x[None])[0].sum()


def split_transpose(point, x, s):
    def body(c, row):
        return jnp.sin(point(c, s)) * row, None

    return lax.scan(body, x, jnp.stack([x, 2.0 * x]), _split_transpose=True)[0].sum()


def of_the_step(point, x, s):
    """The hook closes over a tracer of the body, which the backward loop must be handed."""

    def body(c, row):
        return point(c, row.sum()) * 1.5, None

    return lax.scan(body, x, jnp.stack([x, 2.0 * x]))[0].sum()


def a_jitted_body(point, x, s):
    @jax.jit
    def body(c, row):
        return jnp.sin(point(c, s)) * row, point(row, s)

    c, rows = lax.scan(body, x, jnp.stack([x, 2.0 * x]))
    return c.sum() + (rows**2).sum()


def a_gradient_inside(point, x, s):
    """Gradient descent: each step differentiates through a hook, and then the whole is differentiated."""

    def body(c, _):
        return c - 0.1 * jax.grad(lambda y: (jnp.sin(point(y, s)) ** 2).sum())(c), None

    return (lax.scan(body, x, None, length=3)[0] ** 2).sum()


OTHERS = [
    inputs, outputs, nested, everywhere, backwards, closed_over, trees, integers_beside, unrolled, unrolled_whole, once,
    split_transpose, of_the_step, a_jitted_body, a_gradient_inside,
]  # fmt: skip


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(carry, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(OTHERS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", under.RUNS)
def test_second_derivative(run):
    def twice(fn):
        return jax.grad(lambda x, s: jnp.sin(jax.grad(fn)(x, s)).sum())

    check(carry, "nonlinear", run, X, derivative=twice)


@pytest.mark.parametrize("how", ["hessian", "jacrev", "vmap of grad", "grad by the closed-over tracer"])
def test_other_derivatives(how):
    derivative = {
        "hessian": jax.hessian,
        "jacrev": jax.jacrev,
        "vmap of grad": lambda fn: jax.vmap(jax.grad(fn), in_axes=(0, None)),
        "grad by the closed-over tracer": lambda fn: jax.grad(fn, argnums=1),
    }[how]
    x = jnp.stack([X, -0.5 * X]) if "vmap" in how else X
    if "closed-over" in how:  # a hook's operand carries no derivative of the first order; the program itself must
        derivative = lambda fn: jax.grad(lambda x, s: jax.grad(fn)(x, s).sum(), argnums=1)  # noqa: E731
    check(carry, "closing", "jhop.jit", x, derivative=derivative)


@pytest.mark.parametrize("program", [inputs, outputs, unrolled], ids=lambda program: program.__name__)
def test_true_gradient(program):
    check_true_gradient(program, X)


def test_no_steps_run_no_hook():
    def loss(x):
        c, _ = lax.scan(lambda c, row: (jhop.hook(c, lambda ct: ct + 7.0) * row, None), 3.0 * x, jnp.zeros((0, 3)))
        return (c**2).sum()

    for run in under.RUNS.values():
        np.testing.assert_allclose(run(jax.grad(loss))(X), 18.0 * X)


@pytest.mark.parametrize("run", under.RUNS)
def test_hook_runs_once_a_step_on_that_steps_cotangent(run):
    """A hook that adds one to its cotangent tells how often it ran."""

    def loss(x):
        return lax.scan(lambda c, _: (jhop.hook(c, lambda ct: ct + 1.0), None), x, None, length=7)[0].sum()

    np.testing.assert_allclose(under.RUNS[run](jax.grad(loss))(X), [8.0] * 3)


@pytest.mark.parametrize("run", under.RUNS)
def test_weak_carry(run):
    def loss(x):
        return lax.scan(lambda c, _: (jhop.hook(c, lambda ct: ct * np.float32(2.0)) * 2.0, None), x, None, length=3)[0]

    assert float(under.RUNS[run](jax.grad(loss))(1.5)) == 64.0


def test_forward_mode_passes_by():
    def both(fn):
        return lambda x, s: jax.jvp(lambda x: fn(x, s), (x,), (jnp.cos(x),))

    def of(point):
        return both(lambda x, s: everywhere(point, x, s))(X, jnp.float32(1.5))

    under.agree(of(under.hooked(under.nonlinear)), of(under.ignored))


def test_a_hook_that_scans():
    """The hook's own body is a loop over its cotangent."""

    def rule(ct, s):
        return lax.scan(lambda c, row: (c * s + row, c), jnp.zeros_like(ct[0]), ct)[1] + ct

    def of(point):
        return lambda x, s: (point(jnp.sin(x), s) ** 2).sum()

    s = jnp.float32(1.5)
    expected = jax.grad(of(under.by_hand(rule)))(X, s)
    for run in under.RUNS.values():
        got = run(jax.grad(of(lambda x, s: jhop.hook(x, lambda ct: rule(ct, s)))))(X, s)
        under.agree(got, expected)
