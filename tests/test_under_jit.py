"""`jhop.hook` inside inner `jax.jit`s: what they say besides what to compute stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop
from tests import under
from tests.under import check, check_true_gradient

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)


def inner(point, x, s):
    @jax.jit
    def layer(x):
        return point(jnp.sin(x), s) ** 2

    return (layer(x) + layer(2.0 * x)).sum()


def jit_of_jit(point, x, s):
    def deepest(x):
        return point(jnp.sin(x), s)

    return (jax.jit(lambda x: jax.jit(lambda x: jax.jit(deepest)(x) * 2.0)(point(x, s)))(x) ** 2).sum()


def static(point, x, s):
    @functools.partial(jax.jit, static_argnums=(1,), static_argnames=("flip",))
    def layer(x, n, *, flip):
        for _ in range(n):
            x = jnp.sin(point(x, s))
        return -x if flip else x

    return layer(x, 2, flip=True).sum() + (layer(x, 1, flip=False) ** 2).sum()


def inline(point, x, s):
    return (jax.jit(lambda x: point(jnp.sin(x), s), inline=True)(x) ** 2).sum()


def keep_unused(point, x, s):
    return (jax.jit(lambda x, y: point(jnp.sin(x), s), keep_unused=True)(x, x) ** 2).sum()


def donated(point, x, s):
    return (jax.jit(lambda x: point(jnp.sin(x), s), donate_argnums=0)(x * 2.0) ** 2).sum()


def closed_over(point, x, s):
    w = point(jnp.cos(x), s)
    return jax.jit(lambda x: (point(x, s) * w).sum())(x) + w.sum()


def trees(point, x, s):
    @jax.jit
    def layer(tree):
        tree = point(tree, s)
        return {"y": tree["a"] * tree["b"][0]}

    return (layer({"a": x, "b": [jnp.sin(x)]})["y"] ** 2).sum()


def in_scan(point, x, s):
    layer = jax.jit(lambda c: jnp.sin(point(c, s)))
    return lax.scan(lambda c, row: (layer(c) * row, None), x, jnp.stack([x, 2.0 * x]))[0].sum()


def around_scan(point, x, s):
    @jax.jit
    def loop(x):
        return lax.scan(lambda c, row: (jnp.sin(point(c, s)) * row, None), x, jnp.stack([x, 2.0 * x]))[0]

    return loop(x).sum()


def under_vmap(point, x, s):
    return (jax.vmap(jax.jit(lambda x: point(jnp.sin(x), s)))(jnp.stack([x, 2.0 * x])) ** 2).sum()


def checkpointed(point, x, s):
    return jax.jit(jax.checkpoint(jax.jit(lambda x: jnp.sin(point(jnp.sin(x), s)))))(x).sum()


def gradient_inside(point, x, s):
    return jnp.sin(jax.jit(jax.grad(lambda x: (point(jnp.sin(x), s) ** 2).sum()))(x)).sum()


def an_inner_jhop_jit(point, x, s):
    return (jhop.jit(lambda x: point(jnp.sin(x), s))(x) ** 2).sum()


PROGRAMS = [
    jit_of_jit, static, inline, keep_unused, donated, closed_over, trees, in_scan, around_scan, under_vmap,
    checkpointed, gradient_inside, an_inner_jhop_jit,
]  # fmt: skip


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(inner, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(PROGRAMS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "inline"])
def test_second_derivative(run):
    check(jit_of_jit, "nonlinear", run, X, derivative=lambda fn: jax.grad(lambda x, s: jax.grad(fn)(x, s).sum()))


def test_true_gradient():
    check_true_gradient(jit_of_jit, X)


@pytest.mark.parametrize("outer", [jax.jit, functools.partial(jhop.jit, fullgraph=True)], ids=["jax.jit", "jhop.jit"])
def test_one_hook_in_several_compiled_functions(outer):
    """One hook object, functions that differ: what JAX finds again must be the hook's work on that function."""

    def hook(ct):
        return ct * ct

    for power in (1.0, 2.0, 3.0):
        fn = outer(jax.grad(lambda x, power=power: (power * jhop.hook(x, hook)).sum()))
        for _ in range(2):
            np.testing.assert_array_equal(fn(X), [power**2] * 3)


def test_one_function_with_one_hook_after_another():
    layer = jax.jit(lambda x, hook: jhop.hook(x, hook) * 3.0, static_argnums=1)
    for hook, expected in ((jnp.square, 9.0), (jnp.negative, -3.0), (jnp.square, 9.0)):
        assert jax.grad(lambda x, hook=hook: layer(x, hook).sum())(X).tolist() == [expected] * 3


# What a jit says.


def equations(jaxpr):
    """All equations of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inside in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inside)


def jits(gm):
    return [eqn for eqn in equations(gm.jaxpr.jaxpr) if eqn.primitive.name == "jit"]


@pytest.fixture
def mesh():
    return make_mesh((8,), ("i",))


@pytest.mark.parametrize("reads", [False, True], ids=["pure", "reads state"])
def test_inner_jit_keeps_shardings_and_donation(mesh, reads):
    box = type("Box", (), {"k": 3.0})() if reads else None
    row, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())

    @functools.partial(jax.jit, in_shardings=(row, whole), out_shardings=row, donate_argnums=1, keep_unused=True)
    def layer(x, y):
        return jhop.trace_wrapped(x * y, fn=lambda ct: ct * (box.k if reads else 3.0))

    def fn(x):
        return layer(x, 2.0 * x) + 1.0

    x = jnp.arange(8.0)
    gm = jhop.make_fx(fn)(x)
    inlined = jhop.inline(gm)
    (before,), (after,) = jits(gm), jits(inlined)
    n = len(after.invars) - len(before.invars)
    assert n == (1 if reads else 0)
    for key in ("in_shardings", "donated_invars", "in_layouts"):
        assert after.params[key][n:] == before.params[key]
    for key in ("out_shardings", "out_layouts", "name", "keep_unused", "inline", "ctx_mesh", "compiler_options_kvs"):
        assert after.params[key] == before.params[key]
    out = jax.jit(lambda x: jax.tree.leaves(inlined(x, *inlined.lifted.read()))[0])(x)
    np.testing.assert_array_equal(out, x * x * 6.0 + 1.0)
    assert out.sharding.is_equivalent_to(row, 1)
    compiled = jhop.jit(fn, fullgraph=True)
    np.testing.assert_array_equal(compiled(x), out)
    if reads:
        box.k = 5.0
        np.testing.assert_array_equal(compiled(x), x * x * 10.0 + 1.0)


@pytest.mark.parametrize("option", ["donate_argnums", "in_shardings", "out_shardings"])
def test_one_option_keeps_the_jit(mesh, option):
    value = 0 if option == "donate_argnums" else NamedSharding(mesh, P("i"))
    layer = jax.jit(lambda x: jhop.trace_wrapped(x, fn=jnp.negative) * 2.0, **{option: value})
    gm = jhop.make_fx(lambda x: layer(x + 1.0))(jnp.arange(8.0))
    (before,), (after,) = jits(gm), jits(jhop.inline(gm))
    for key in ("donated_invars", "in_shardings", "out_shardings"):
        assert after.params[key] == before.params[key]


def test_constraint_on_sharding_inside_a_hook_and_around(mesh):
    row = NamedSharding(mesh, P("i"))

    def hook(ct):
        return lax.with_sharding_constraint(ct * 3.0, row)

    def fn(x):
        return lax.with_sharding_constraint(jax.jit(lambda x: jhop.trace_wrapped(x, fn=hook) * 2.0)(x), row)

    inlined = jhop.inline(jhop.make_fx(fn)(jnp.arange(8.0)))
    names = [eqn.primitive.name for eqn in equations(inlined.jaxpr.jaxpr)]
    assert names.count("sharding_constraint") == 2
    assert [e.params["sharding"] for e in equations(inlined.jaxpr.jaxpr) if "sharding" in e.params] == [row, row]


def test_body_of_a_plain_jit_is_named_after_it():
    """A jit that says nothing but what to compute becomes part of the graph; its name stays on the name stack."""

    @jax.jit
    def layer(x):
        with jax.named_scope("attention"):
            return jhop.trace_wrapped(x, fn=jnp.negative) * 2.0

    inlined = jhop.inline(jhop.make_fx(lambda x: layer(x) + 1.0)(X))
    stacks = {eqn.primitive.name: str(eqn.source_info.name_stack) for eqn in inlined.jaxpr.jaxpr.eqns}
    assert "trace_wrapped" not in stacks
    assert (stacks["mul"], stacks["add"]) == ("jit(layer)/attention", "")


def test_hook_under_disable_jit():
    with jax.disable_jit():
        check(inner, "closing", "eager", X)
