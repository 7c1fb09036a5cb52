"""Hooks under `jax.vmap`: the hook sees one example's cotangent, a value that all share has the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import RULES, RUNS, agree, check, check_true_gradient

import jhop

X = np.array([[0.5, -2.0, 3.0], [1.0, 0.25, -0.5]], np.float32)
W = np.array([2.0, -1.0, 0.5], np.float32)


def example(point, x, s):
    y = point(jnp.sin(x), s)
    return (y * y * x).sum() + (3 * y).sum()


def over_examples(point, x, s):
    return jax.vmap(lambda x: example(point, x, s))(x).sum()


def over_scales(point, x, s):
    """Each example's hook closes over a scale of its own."""
    return jax.vmap(lambda x, s: example(point, x, s))(x, s * jnp.arange(1.0, 3.0)).sum()


def nested(point, x, s):
    return jax.vmap(jax.vmap(lambda e, w: 3 * point(jnp.sin(e), s * w) ** 2), (0, None))(x, jnp.arange(1.0, 4.0)).sum()


def nested_the_other_way(point, x, s):
    inner = jax.vmap(lambda e, s: 3 * point(jnp.sin(e), s) ** 2, (0, None))
    return jax.vmap(inner, (1, 0))(x, s * jnp.arange(1.0, 4.0)).sum()


def other_axes(point, x, s):
    return (jax.vmap(lambda x: point(x, s) ** 2, in_axes=1, out_axes=1)(x) * X).sum()


def last_axes(point, x, s):
    return (jax.vmap(lambda x: point(x, s) ** 2, in_axes=-1, out_axes=0)(x) * X.T).sum()


def of_jit(point, x, s):
    return jax.vmap(jax.jit(lambda x: example(point, x, s)))(x).sum()


def of_scan(point, x, s):
    def of(x, s):
        return lax.scan(lambda c, r: (jnp.sin(point(c, s * r)) * 2, None), x, jnp.array([1.0, 2.0]))[0].sum()

    return jax.vmap(of)(x, s * jnp.arange(1.0, 3.0)).sum()


def of_cond(point, x, s):
    def of(x):
        return lax.cond(x.sum() > 1, lambda x: (point(x, s) ** 2).sum(), lambda x: 3 * point(x, s).sum(), x)

    return jax.vmap(of)(x).sum()


def of_checkpoint(point, x, s):
    return jax.vmap(jax.checkpoint(lambda x: example(point, jnp.sin(x), s)))(x).sum()


def of_grad(point, x, s):
    return jax.vmap(lambda x: (jax.grad(lambda x: example(point, x, s))(x) ** 2).sum())(x).sum()


def in_scan(point, x, s):
    row = jax.vmap(lambda e, s: jnp.sin(point(e, s)) * 2, (0, None))
    return lax.scan(lambda c, r: (row(c, s * r), None), x, jnp.array([1.0, 2.0]))[0].sum()


PROGRAMS = [
    over_examples, over_scales, nested, nested_the_other_way, other_axes, last_axes, of_jit, of_scan, of_cond,
    of_checkpoint, of_grad, in_scan,
]  # fmt: skip
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


@pytest.mark.parametrize("rule", RULES)
@each_program
def test_grad_of_vmap(program, rule):
    check(program, rule, "jax.jit", X)


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "inline"])
@each_program
def test_grad_of_vmap_in_other_runs(program, run):
    check(program, "closing", run, X)


@pytest.mark.parametrize("program", [over_scales, nested, of_scan], ids=lambda program: program.__name__)
def test_true_gradient(program):
    check_true_gradient(program, X / 4)


OF_GRAD = {
    "of grad": lambda f: lambda x, s: jax.vmap(jax.grad(f), (0, None))(x, s),
    "of jit of grad": lambda f: lambda x, s: jax.vmap(jax.jit(jax.grad(f)), (0, None))(x, s),
    "of grad of jit": lambda f: lambda x, s: jax.vmap(jax.grad(jax.jit(f)), (0, None))(x, s),
    "with scales": lambda f: lambda x, s: jax.vmap(jax.grad(f))(x, s * jnp.arange(1.0, 3.0)),
    "only scales": lambda f: lambda x, s: jax.vmap(jax.grad(f), (None, 0))(x[0], s * jnp.arange(1.0, 3.0)),
    "other axes": lambda f: lambda x, s: jax.vmap(jax.grad(f), (1, None), 1)(x.T, s),
    "pytree axes": lambda f: (
        lambda x, s: jax.vmap(
            lambda d: jax.grad(lambda d: f(d["x"], d["s"]))(d), ({"x": 0, "s": None},), {"x": 1, "s": 0}
        )({"x": x, "s": s})
    ),
    "nested": lambda f: lambda x, s: jax.vmap(jax.vmap(jax.grad(f), (None, 0)), (0, None))(x, s * jnp.arange(1.0, 4.0)),
    "value_and_grad": lambda f: lambda x, s: jax.vmap(jax.value_and_grad(f), (0, None))(x, s),
    "of hessian": lambda f: lambda x, s: jax.vmap(jax.hessian(f), (0, None))(x, s),
    "of grad of vmap": lambda f: (
        lambda x, s: jax.vmap(
            lambda x: jax.grad(lambda x: jax.vmap(f)(jnp.stack([x, 2 * x]), s * jnp.arange(1.0, 3.0)).sum())(x)
        )(x)
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", OF_GRAD)
def test_vmap_of_grad(how, rule):
    check(example, rule, "jax.jit", X, derivative=OF_GRAD[how])


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "make_fx", "inline"])
@pytest.mark.parametrize("how", ["of grad", "with scales", "nested"])
def test_vmap_of_grad_in_other_runs(how, run):
    check(example, "closing", run, X, derivative=OF_GRAD[how])


def test_hook_sees_one_example():
    shapes = []

    def hook(ct):
        shapes.append(ct.shape)
        return ct / jnp.abs(ct).max()

    got = jax.vmap(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))(X)
    agree(got, jnp.array(X / np.abs(X).max(1, keepdims=True)))
    assert set(shapes) == {(3,)}


def test_hook_outside_vmap_sees_the_batch():
    got = jax.grad(lambda xs: jax.vmap(lambda x: 2.0 * x)(jhop.hook(xs, lambda ct: ct / ct.sum())).sum())(X)
    agree(got, jnp.full((2, 3), 1.0 / 6.0))


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_value_that_all_examples_share_gets_the_sum(inside):
    seen = []

    def hook(ct):
        seen.append(ct.tolist())
        return 10 * ct

    def of(w):
        if inside:
            return jax.vmap(lambda x: (jhop.hook(w, hook) * x).sum())(X).sum()
        w = jhop.hook(w, hook)
        return jax.vmap(lambda x: (w * x).sum())(X).sum()

    agree(jax.grad(of)(W), jnp.array(10 * X.sum(0)))
    assert seen == [X.sum(0).tolist()]


def test_value_that_all_examples_share_under_a_hook_with_scales():
    # The hook differs from example to example, so it runs for each.
    def of(w):
        return jax.vmap(lambda x, s: (jhop.hook(w, lambda ct: ct * ct * s) * x).sum())(X, jnp.array([1.0, 3.0])).sum()

    agree(jax.jit(jax.grad(of))(W), jnp.array(X[0] ** 2 + 3 * X[1] ** 2))


# Named axes.

COLLECTIVES = {
    "psum": (lambda ct: lax.psum(ct, "i"), lambda cts: np.broadcast_to(cts.sum(0), cts.shape)),
    "pmean": (lambda ct: 5 * lax.pmean(ct, "i"), lambda cts: np.broadcast_to(5 * cts.mean(0), cts.shape)),
    "pmax": (lambda ct: lax.pmax(ct, "i") + ct, lambda cts: cts.max(0) + cts),
    "all_gather": (lambda ct: lax.all_gather(ct, "i")[::-1][0], lambda cts: np.broadcast_to(cts[-1], cts.shape)),
    "ppermute": (lambda ct: lax.ppermute(ct, "i", [(0, 1), (1, 0)]), lambda cts: cts[::-1]),
    "axis_index": (lambda ct: ct * (lax.axis_index("i") + 2), lambda cts: cts * np.array([[2], [3]], np.float32)),
    "axis_size": (lambda ct: ct * (lax.axis_size("i") + 1), lambda cts: 3 * cts),
}
in_runs = pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit", "inline"])


@in_runs
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective_in_a_hook(name, run):
    hook, expected = COLLECTIVES[name]

    def of(xs):
        return jax.vmap(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), axis_name="i")(xs)

    with jax.numpy_dtype_promotion("standard"):
        agree(jax.tree.leaves(RUNS[run](of)(X))[0], jnp.array(expected(2 * X)))


@in_runs
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective_in_a_hook_of_grad_of_vmap(name, run):
    hook, expected = COLLECTIVES[name]

    def of(xs):
        return jax.grad(lambda xs: jax.vmap(lambda x: (jhop.hook(x, hook) ** 2).sum(), axis_name="i")(xs).sum())(xs)

    with jax.numpy_dtype_promotion("standard"):
        agree(jax.tree.leaves(RUNS[run](of)(X))[0], jnp.array(expected(2 * X)))


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_collective_on_a_value_that_all_examples_share(jit):
    # Its cotangent is the sum over examples already, and the same in each of them.
    def of(w):
        hooked = lambda x: (jhop.hook(w, lambda ct: lax.psum(ct, "i")) * x).sum()  # noqa: E731
        return jax.vmap(hooked, axis_name="i")(X).sum()

    grad = jax.grad(of)
    agree((jax.jit(grad) if jit else grad)(W), jnp.array(2 * X.sum(0)))


def test_hook_that_varies_over_an_axis_on_a_value_that_does_not_is_refused():
    def of(w):
        hooked = lambda x: (jhop.hook(w, lambda ct: ct * (lax.axis_index("i") + 1.0)) * x).sum()  # noqa: E731
        return jax.vmap(hooked, axis_name="i")(X).sum()

    with pytest.raises(jhop.HookError, match="varies over the axis 'i'"), jax.numpy_dtype_promotion("standard"):
        jax.grad(of)(W)


@pytest.mark.parametrize("run", ["eager", "jax.jit"])
def test_axis_without_any_mapped_argument(run):
    def of():
        hook = lambda ct: ct * lax.axis_index("i").astype(jnp.float32)  # noqa: E731
        return jax.vmap(lambda: jax.grad(lambda x: (3 * jhop.hook(x, hook)).sum())(W), axis_name="i", axis_size=4)()

    agree(RUNS[run](of)(), jnp.outer(3 * jnp.arange(4.0), jnp.ones(3)))


def test_axis_size_alone():
    got = jax.vmap(lambda: jax.grad(lambda x: (3 * jhop.hook(x, jnp.square)).sum())(W), axis_size=4, out_axes=None)()
    agree(got, jnp.full(3, 9.0))


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
def test_collectives_over_two_axes(run):
    def hook(ct):
        return lax.psum(ct, ("i", "j")) + 10 * lax.pmax(ct, "j")

    def of(x):
        inner = jax.vmap(jax.grad(lambda e: jhop.hook(e, hook) ** 2), axis_name="j")
        return jax.vmap(inner, axis_name="i")(x)

    cts = 2 * X
    agree(RUNS[run](of)(X), jnp.array(cts.sum() + 10 * np.broadcast_to(cts.max(1, keepdims=True), (2, 3))))


# Odd orders and depths.

ODD = {
    "jit vmap grad scan checkpoint": lambda f: jax.jit(jax.vmap(jax.grad(f))),
    "vmap jit grad": lambda f: jax.vmap(jax.jit(jax.grad(f))),
    "vmap grad jit": lambda f: jax.vmap(jax.grad(jax.jit(f))),
    "jhop.jit vmap checkpoint grad": lambda f: jhop.jit(jax.vmap(jax.checkpoint(jax.grad(f))), fullgraph=True),
    "vmap linear_transpose linearize": lambda f: jax.vmap(
        lambda x, s: jax.linear_transpose(jax.linearize(lambda x: f(x, s), x)[1], x)(jnp.float32(1))[0]
    ),
    "scan of grad": lambda f: lambda x, s: lax.scan(lambda c, r: (c, jax.grad(f)(*r)), 0.0, (x, s))[1],
    "map of vmap": lambda f: lambda x, s: lax.map(lambda r: jax.vmap(jax.grad(f))(r[0][None], r[1][None])[0], (x, s)),
}


@pytest.mark.parametrize("how", ODD)
def test_odd_orders_agree(how):
    def f(x, s):
        body = jax.checkpoint(lambda c, t: (jnp.sin(jhop.hook(c, lambda ct: ct * s * t)) * 2, None))
        return lax.scan(body, x, jnp.array([1.0, 2.0]))[0].sum()

    scales = jnp.array([1.0, 3.0])
    agree(ODD[how](f)(X, scales), jnp.stack([jax.grad(f)(x, s) for x, s in zip(X, scales, strict=True)]))
