"""Hooks under reverse mode: one call with the sum of all later uses, in the structure of what is hooked."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from under import RULES, RUNS, agree, check, check_true_gradient

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)


def twice(point, x, s):
    """The hooked value is used twice, so that a hook which saw one use alone would show."""
    y = point(jnp.sin(x), s)
    return (y * y).sum() + (3 * y).sum()


def beside(point, x, s):
    """Uses of the value itself are not hooked."""
    y = point(x, s)
    return (2 * y * y + 5 * x).sum()


def chained(point, x, s):
    return (point(point(x, s) * 2, s) ** 2).sum()


PROGRAMS = [twice, beside, chained]

REVERSE = {
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "vjp": lambda f: lambda x, s: jax.vjp(f, x, s)[1](jnp.float32(-2)),
    "jacrev": lambda f: jax.jacrev(lambda x, s: jnp.stack([f(x, s), 2 * f(2 * x, s)])),
    "both arguments": lambda f: jax.grad(f, (0, 1)),
    "has_aux": lambda f: jax.grad(lambda x, s: (f(x, s), {"x": x * s, "f": f(x, s)}), has_aux=True),
    "value_and_grad has_aux": lambda f: jax.value_and_grad(lambda x, s: (f(x, s), x * s), has_aux=True),
    "vjp has_aux": lambda f: lambda x, s: jax.vjp(lambda x: (f(x, s), x * s), x, has_aux=True)[1](jnp.float32(3)),
    "of jit": lambda f: jax.grad(jax.jit(f)),
    "of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "of jit of checkpoint": lambda f: jax.grad(jax.jit(jax.checkpoint(f))),
    "pullback under vmap": lambda f: lambda x, s: jax.vmap(jax.vjp(f, x, s)[1])(jnp.array([1.0, -2.0, 3.0])),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_gradient_is_that_of_a_rule_by_hand(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", REVERSE)
@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
def test_reverse_mode(how, rule, run):
    check(twice, rule, run, X, derivative=REVERSE[how])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_true_gradient(program):
    check_true_gradient(program, X / 4)


def test_hook_is_an_identity_forward():
    x = jnp.array(X)
    assert jhop.hook(x, jnp.square) is x


@pytest.mark.parametrize("how", [jax.jit, jax.vmap, jax.checkpoint, jhop.jit], ids=lambda how: how.__name__)
def test_hook_is_an_identity_forward_under(how):
    assert how(lambda x: jhop.hook(x, jnp.square))(X).tolist() == X.tolist()


def test_nested_hooks_run_last_registered_first():
    def of(x):
        x = jhop.hook(x, lambda ct: ct + 1.0)
        x = jhop.hook(x, lambda ct: ct * 10.0)
        return (2.0 * x).sum()

    assert jax.grad(of)(X).tolist() == [21.0] * 3


def test_one_hook_object_on_several_values():
    def square(ct):
        return ct * ct

    def of(x):
        return (3 * jhop.hook(x, square) + jnp.float32(5) * jhop.hook(x, square)).sum()

    assert jax.grad(of)(X).tolist() == jax.jit(jax.grad(of))(X).tolist() == [9.0 + 25.0] * 3


def in_a_hook(x):
    """A hook that differentiates a function with a hook, which closes over the outer cotangent."""

    def outer(ct):
        return jax.grad(lambda v: (jhop.hook(v, lambda inner: inner * ct) ** 2).sum())(ct)

    return (3 * jhop.hook(x, outer)).sum()


@pytest.mark.parametrize("run", RUNS)
def test_hook_within_a_hook(run):
    assert jax.tree.leaves(RUNS[run](jax.grad(in_a_hook))(X))[0].tolist() == [2 * 3.0 * 3.0] * 3


def test_hook_that_returns_none_keeps_the_cotangent():
    assert jax.grad(lambda x: (2.0 * jhop.hook(x, lambda ct: None)).sum())(X).tolist() == [2.0] * 3


def test_hook_may_be_a_jitted_function():
    assert jax.grad(lambda x: (3.0 * jhop.hook(x, jax.jit(jnp.square))).sum())(X).tolist() == [9.0] * 3


# How often, and with what.


def test_hook_runs_with_values_under_grad_alone():
    seen = []
    jax.grad(lambda x: (2.0 * jhop.hook(x, lambda ct: seen.append(ct.tolist()))).sum())(X)
    assert seen == [[2.0] * 3]


def test_hook_runs_once_on_the_sum_of_uses():
    seen = []

    def of(x):
        y = jhop.hook(x, lambda ct: seen.append(ct.tolist()))
        return (2 * y).sum() + (3 * y[:1]).sum() + jax.jit(lambda y: (4 * y).sum())(y)

    jax.grad(of)(X)
    assert seen == [[9.0, 6.0, 6.0]]


UNUSED = {
    "not used": lambda x, y: 2 * x,
    "stop_gradient": lambda x, y: jax.lax.stop_gradient(y) * x,
    "rounded": lambda x, y: x * y.astype(jnp.int32).astype(x.dtype),
    "compared": lambda x, y: jnp.where(y > 0, 2 * x, x),
    "aux": lambda x, y: x,
}


@pytest.mark.parametrize("how", UNUSED)
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_hook_on_a_value_without_gradient_does_not_run(how, jit):
    def of(x):
        y = jhop.hook(x, lambda ct: pytest.fail("ran"))
        return UNUSED[how](x, y).sum(), y

    grad = jax.grad(of, has_aux=True)
    assert np.isfinite((jax.jit(grad) if jit else grad)(X)[0]).all()


def test_hook_on_a_constant_does_not_run():
    of = jax.grad(lambda x: (jhop.hook(jnp.ones(3), lambda ct: pytest.fail("ran")) * x).sum())
    assert of(X).tolist() == jax.jit(of)(X).tolist() == [1.0] * 3


def test_hook_runs_at_each_call_of_a_pullback():
    seen = []
    _, pull = jax.vjp(lambda x: 2.0 * jhop.hook(x, lambda ct: seen.append(ct.tolist())), jnp.array(X))
    for seed in (1.0, 3.0):
        pull(jnp.full(3, seed))
    assert seen == [[2.0] * 3, [6.0] * 3]


def test_several_arguments_have_hooks_of_their_own():
    def of(x, y):
        return (jhop.hook(x, jnp.square) * jhop.hook(y, jnp.negative)).sum()

    assert [g.tolist() for g in jax.grad(of, (0, 1))(X, X + 1.0)] == [((X + 1.0) ** 2).tolist(), (-X).tolist()]


# Pytrees.


def tree_of(x):
    return {"b": jnp.array([True, False]), "k": jax.random.key(3), "n": jnp.arange(2), "x": x, "y": [2 * x, None]}


@pytest.mark.parametrize("run", RUNS)
def test_pytree_with_leaves_of_every_kind(run):
    def hook(ct):
        if {ct[name].dtype for name in "bkn"} != {jax.dtypes.float0}:
            raise TypeError("expected float0")
        if (ct["b"].shape, ct["k"].shape, ct["n"].shape) != ((2,), (), (2,)):
            raise ValueError("expected the shapes of the values")
        return {**ct, "x": ct["x"] * 10, "y": [ct["y"][0] + 1, None]}

    def of(x):
        tree = jhop.hook(tree_of(x), hook)
        noise = jax.random.normal(tree["k"], (3,))
        return (tree["x"] * noise * tree["n"].sum() + 3 * tree["y"][0] * tree["b"].sum()).sum()

    with jax.numpy_dtype_promotion("standard"):
        got = jax.tree.leaves(RUNS[run](jax.grad(of))(X))[0]
    agree(got, 10 * jax.random.normal(jax.random.key(3), (3,)) + 2 * (3 + 1))


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_pytree_keeps_what_carries_no_gradient(jit):
    of = lambda tree: jhop.hook(tree, lambda ct: None)  # noqa: E731
    tree = tree_of(jnp.array(X))
    out = (jax.jit(of) if jit else of)(tree)
    assert jax.tree.map(jnp.result_type, out) == jax.tree.map(jnp.result_type, tree)
    assert (out["n"].tolist(), out["b"].tolist(), out["k"] == tree["k"]) == ([0, 1], [True, False], True)


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit", "inline"])
def test_cotangent_of_a_scalar_is_an_array_of_jax(run):
    """It is the constant 1, which jaxprs hold as an array of NumPy's."""
    got = RUNS[run](jax.grad(lambda x: jhop.hook(x, lambda ct: ct.at[()].multiply(3.0))))(jnp.float32(2.0))
    assert jax.tree.leaves(got)[0] == 3.0


def test_gradient_by_integers_too():
    def hook(ct):
        return {"n": ct["n"], "x": ct["x"] * 3}

    got = jax.grad(lambda tree: (2 * jhop.hook(tree, hook)["x"]).sum(), allow_int=True)({"n": jnp.arange(2), "x": X})
    assert (got["n"].dtype, got["n"].shape, got["x"].tolist()) == (jax.dtypes.float0, (2,), [6.0] * 3)


@pytest.mark.parametrize("run", [run for run in RUNS if run != "inline"])  # there, state is an input
def test_hook_of_the_loss_itself(run):
    scaling = types.SimpleNamespace(by=8.0)

    def hook(ct):  # of a literal: in the jaxpr it is 1.0 and no array
        return ct.at[()].set(3.0) * ct * scaling.by

    agree(RUNS[run](jax.grad(lambda x: jhop.hook((x * x).sum(), hook)))(X), jnp.array(2 * X * 3 * 8))


def by_length(ct):
    return (ct[0] * ct[1].size, None)


@pytest.mark.parametrize("run", RUNS)
def test_one_hook_beside_integers_of_several_shapes(run):
    short, long = np.arange(2), np.arange(5)

    def of(x):
        return (3 * jhop.hook((x, short), by_length)[0] + 10 * jhop.hook((x, long), by_length)[0]).sum()

    agree(RUNS[run](jax.grad(of))(X), jnp.full(3, 3 * 2 + 10 * 5, jnp.float32))


def test_pytree_is_hooked_as_a_whole():
    def hook(ct):
        norm = jnp.sqrt((ct["a"] ** 2).sum() + (ct["b"][0] ** 2).sum())
        return jax.tree.map(lambda part: part / norm, ct)

    def of(tree):
        tree = jhop.hook(tree, hook)
        return 3.0 * tree["a"].sum() + 4.0 * tree["b"][0].sum()

    agree(jax.grad(of)({"a": jnp.ones(1), "b": [jnp.ones(1)]}), {"a": jnp.array([0.6]), "b": [jnp.array([0.8])]})


def test_leaf_that_nothing_uses_gets_zeros():
    seen = []

    def of(pair):
        a, _ = jhop.hook(pair, lambda ct: seen.append(ct[1].tolist()))
        return a.sum()

    jax.grad(of)((jnp.ones(1), jnp.ones(2)))
    assert seen == [[0.0, 0.0]]


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_hook_may_return_none_for_a_leaf(jit):
    def of(pair):
        a, (b, _) = jhop.hook(pair, lambda ct: (None, (ct[1][0] * 10.0, None)))
        return 3 * a.sum() + b.sum()

    grad = jax.grad(of)
    got = (jax.jit(grad) if jit else grad)((jnp.ones(1), (jnp.ones(1), None)))
    assert [g.tolist() for g in jax.tree.leaves(got)] == [[3.0], [10.0]]


# Complex values.

Z = np.array([1.0 + 2.0j, -0.5j, 0.25 + 1.0j], np.complex64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
def test_complex_cotangent_is_jaxs(rule, run):
    check(lambda point, z, s: jnp.abs(point(z, s) * z).sum(), rule, run, Z, s=jnp.complex64(2.0j))


@pytest.mark.parametrize("rule", ["linear", "nonlinear", "closing"])  # a norm is not holomorphic
@pytest.mark.parametrize("how", [jax.grad, jax.jacrev], ids=["grad", "jacrev"])
@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
def test_holomorphic(rule, how, run):
    def derivative(f):
        return how(f, holomorphic=True)

    check(lambda point, z, s: (point(z, s) ** 2).sum(), rule, run, Z, s=jnp.complex64(2.0j), derivative=derivative)
