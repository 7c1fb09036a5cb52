"""`jhop.backward_graph`: the VJP alone, with named residuals, and what it computes."""

from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop

X = np.array([1.0, 2.0, 3.0], np.float32)
W = np.array([[0.5, -1.0], [2.0, 0.25], [1.0, 3.0]], np.float32)


FUNCTIONS = {
    "product": (lambda x, y: x * y, (X, X + 1)),
    "sum": (lambda x: (x**2).sum(), (X,)),
    "chain": (lambda x: jnp.sin(jnp.exp(x)) * x, (X,)),
    "matmul": (lambda x, w: jnp.tanh(x @ w), (X, W)),
    "tree": (lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), ({"w": W, "b": np.float32([0.1, 0.2])}, X)),
    "two outputs": (lambda x: (jnp.sin(x), x.sum()), (X,)),
    "int argument": (lambda x, i: x[i] * x, (X, np.int32(1))),
    "int output": (lambda x: (x**2, jnp.argmax(x)), (X,)),
    "linear": (lambda x: x * 2.0, (X,)),
    "scan": (lambda x: lax.scan(lambda c, y: (c * y, c), jnp.float32(1.0), x)[1], (X,)),
    "cond": (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), (X,)),
    "jit": (lambda x: jax.jit(jnp.sin)(x) * x, (X,)),
    "remat": (lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.sin(y)))(x), (X,)),
    "constant": (lambda x: x * jnp.arange(3.0), (X,)),
}


def floating(values):
    return [v for v in values if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_values_are_those_of_vjp(kind):
    fn, args = FUNCTIONS[kind]
    flat, tree = jax.tree.flatten(args)
    moving = [i for i, leaf in enumerate(flat) if np.issubdtype(leaf.dtype, np.floating)]

    @jax.jit
    def forward(*values):
        def of_moving(*parts):
            filled = list(values)
            for i, part in zip(moving, parts, strict=True):
                filled[i] = part
            return floating(jax.tree.leaves(fn(*jax.tree.unflatten(tree, filled))))

        return jax.vjp(of_moving, *(values[i] for i in moving))

    outs, pull = forward(*flat)
    cts = [jnp.cos(out) + 0.5 for out in outs]
    gm = jhop.backward_graph(fn)(*args)
    residuals = [np.asarray(leaf) for leaf in jax.tree.leaves(pull)]
    wanted = gm.inputs[len(cts) :]
    by_aval = []
    avals = [v.aval for v in gm.jaxpr.jaxpr.invars[len(cts) :]]
    for aval in avals:  # residuals in order, less the ones that are the same value again
        index = next(i for i, leaf in enumerate(residuals) if leaf.shape == aval.shape and leaf.dtype == aval.dtype)
        by_aval.append(residuals.pop(index))
    assert len(by_aval) == len(wanted)
    got = gm(*cts, *by_aval)
    np.testing.assert_equal([g.shape for g in jax.tree.leaves(got)], [g.shape for g in jax.tree.leaves(pull(cts))])
    if kind not in ("two outputs", "chain", "product", "tree", "matmul"):  # residuals of one type may be exchanged
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(pull(cts)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_values_by_name():
    gm = jhop.backward_graph(lambda x, y: x * y)(X, X + 1)
    values = {"ct": X * 0.5, "x": X, "y": X + 1}
    got = gm(*(values[given.name] for given in gm.inputs))
    np.testing.assert_allclose(got, [X * 0.5 * (X + 1), X * 0.5 * X])


def test_local_variables_give_names():
    def fn(x):
        y = jnp.sin(x)
        z = jnp.exp(y)
        return y * z

    names = [given.name for given in jhop.backward_graph(fn)(X).inputs]
    assert names[0] == "ct" and {"y", "z"} <= set(names)


def test_several_cotangents_are_numbered():
    gm = jhop.backward_graph(lambda x: (jnp.sin(x), x * 2, jnp.argmax(x)))(X)
    assert [given.name for given in gm.inputs[:2]] == ["ct_0", "ct_1"]


def test_keyword_arguments():
    gm = jhop.backward_graph(lambda x, *, k: x * k)(X, k=X)
    assert sorted(given.name for given in gm.inputs) == ["ct", "k", "x"]


def test_name_of_the_graph():
    def model(x):
        return x * x

    gm = jhop.backward_graph(model)(X)
    assert (gm.name, gm.made_by) == ("model_backward", "backward_graph")


def test_graph_prints():
    text = jhop.backward_graph(lambda x: jnp.sin(x) * x)(X).print_readable(print_output=False)
    assert "def forward" in text and "cos" in text


def test_function_that_is_none_is_refused():
    with pytest.raises(jhop.JhopError, match="function"):
        jhop.backward_graph(None)


def test_hook_stays_opaque_and_does_not_run():
    seen = []

    def hook(ct):
        seen.append(ct)
        return ct * 2.0

    gm = jhop.backward_graph(lambda x: (jhop.hook(x, hook) ** 2).sum())(X)
    assert seen == [] and "trace_wrapped" in str(gm.jaxpr)


def test_graph_with_a_hook_runs_it():
    gm = jhop.backward_graph(lambda x: (jhop.hook(x, lambda ct: ct * 3.0) ** 2).sum())(X)
    np.testing.assert_allclose(jax.tree.leaves(gm(np.float32(1.0), 2 * X))[0], 6.0 * X)


def test_inlined_graph_with_state():
    box = Box(n=1, k=3.0)

    def hook(ct):
        box.n += 1
        return ct * box.k

    inlined = jhop.inline(jhop.backward_graph(lambda x: (jhop.hook(x, hook) ** 2).sum())(X))
    paths = [given.source.rpartition(".")[2] for given in inlined.inputs if given.role == "state"]
    assert sorted(paths) == ["k", "n"]


def test_compiled_graph_writes_state():
    box = Box(n=1, k=3.0)

    def hook(ct):
        box.n += 1
        return ct * box.k

    compiled = jhop.compile(jhop.backward_graph(lambda x: (jhop.hook(x, hook) ** 2).sum())(X), fullgraph=True)
    for k in (3.0, 4.0):
        box.k = k
        np.testing.assert_allclose(jax.tree.leaves(compiled(np.float32(1.0), 2 * X))[0], 2.0 * k * X)
    assert box.n == 3
