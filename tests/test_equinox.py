"""Hooks on Tensors that come from Equinox modules, called through `jhop.lift`: gradients are those of the module."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

eqx = pytest.importorskip("equinox")


class Meter:
    """Clips a gradient, counts and keeps a running norm."""

    def __init__(self):
        self.calls = 0
        self.norm = jnp.zeros(())

    def __call__(self, grad):
        self.calls += 1
        self.norm = 0.5 * self.norm + jnp.sqrt((grad * grad).sum())
        return grad.clip(-0.25, 0.25)


def times(factor):
    return lambda grad: grad * factor


@pytest.fixture(scope="module")
def model():
    """(parameters, everything else) of a small network."""
    first, second = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(3, 4, key=first), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(4, 2, key=second)]
    return eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)


def call(static, params, x):
    return jax.vmap(eqx.combine(params, static))(x)


class Eager:
    """One operation after another."""

    name = "eager"

    def forward(self, fn):
        return fn

    def backward(self, loss):
        loss.backward()


class Compiled(Eager):
    name = "jhop.compile"

    def forward(self, fn):
        return jhop.compile(fn, fullgraph=True)


class Captured(Eager):
    name = "compiled_autograd"

    def __init__(self):
        self.captured = 0

    def _compiler(self, gm):
        self.captured += 1
        return jhop.compile(gm, fullgraph=True)

    def backward(self, loss):
        with jhop.compiled_autograd.enable(self._compiler):
            loss.backward()


class Both(Captured, Compiled):
    name = "both"


each_mode = pytest.mark.parametrize("mode", [Eager, Compiled, Captured, Both], ids=lambda mode: mode.name)


def tensors(params):
    """The module with Tensors in the place of its arrays."""
    return jax.tree.map(lambda array: jhop.tensor(array, requires_grad=True), params)


def leaves(module):
    return jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, jhop.Tensor))


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@each_mode
def test_gradient_is_that_of_the_module(mode, model):
    params, static = model
    mode, module = mode(), tensors(params)
    lifted = jhop.lift(functools.partial(call, static))
    mode.backward(mode.forward(lambda module, x: (lifted(module, x) ** 2).sum())(module, X))
    expected = jax.grad(lambda params: (call(static, params, X) ** 2).sum())(params)
    close([leaf.grad for leaf in leaves(module)], jax.tree.leaves(expected))


@each_mode
def test_hooks_on_output_and_parameters(mode, model):
    params, static = model
    mode, module, meter = mode(), tensors(params), Meter()
    lifted = jhop.lift(functools.partial(call, static))
    module.layers[0].weight.register_hook(times(3.0))
    module.layers[2].bias.register_hook(times(5.0))

    def loss(module, x):
        out = lifted(module, x)
        out.register_hook(meter)
        return (out**2).sum()

    step = mode.forward(loss)
    norm = 0.0
    for scale in (1.0, 2.0):
        mode.backward(step(module, X * scale))
        out, pull = jax.vjp(lambda params, x: call(static, params, x), params, X * scale)
        expected, _ = pull((2.0 * out).clip(-0.25, 0.25))
        norm = 0.5 * norm + float(jnp.linalg.norm(2.0 * out))
        scaled = [expected.layers[0].weight * 3.0, expected.layers[2].bias * 5.0, expected.layers[2].weight]
        found = [module.layers[0].weight, module.layers[2].bias, module.layers[2].weight]
        close([leaf.grad for leaf in found], scaled)
        for leaf in leaves(module):
            leaf.grad = None
    assert (meter.calls, float(meter.norm)) == (2, pytest.approx(norm, rel=1e-5))
    if type(mode) is Captured:
        assert mode.captured == 1


@each_mode
def test_hooks_after_accumulation(mode, model):
    params, static = model
    mode, module = mode(), tensors(params)
    lifted = jhop.lift(functools.partial(call, static))
    for leaf in leaves(module):
        leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", leaf.grad * 0.1))
    step = mode.forward(lambda module, x: (lifted(module, x) ** 2).mean())
    mode.backward(step(module, X))
    expected = jax.grad(lambda params: (call(static, params, X) ** 2).mean())(params)
    close([leaf.grad for leaf in leaves(module)], [0.1 * grad for grad in jax.tree.leaves(expected)])


def test_second_derivatives_through_a_hook(model):
    params, static = model
    module = tensors(params)
    out = jhop.lift(functools.partial(call, static))(module, X)
    out.register_hook(lambda grad: grad * grad)
    weight = module.layers[0].weight
    (grad,) = jhop.autograd.grad(out.sum() * 2.0, [weight], create_graph=True)
    (second,) = jhop.autograd.grad((grad * grad).sum(), [weight])

    def squared(value):
        moved = eqx.tree_at(lambda params: params.layers[0].weight, params, value)
        _, pull = jax.vjp(lambda params: call(static, params, X), moved)
        return (pull(jnp.full((4, 2), 4.0))[0].layers[0].weight ** 2).sum()

    close([second], [jax.grad(squared)(params.layers[0].weight)])


def test_stateful_layer(model):
    """Dropout in Equinox takes a key: a lifted call takes it too, and gives the same mask in forward and backward."""
    params, static = model
    module, key = tensors(params), jax.random.key(7)
    drop = eqx.nn.Dropout(0.5)

    def dropped(params, x, key):
        return drop(call(static, params, x), key=key)

    out = jhop.lift(dropped)(module, X, key)
    out.register_hook(times(3.0))
    out.sum().backward()
    expected = jax.grad(lambda params: 3.0 * dropped(params, X, key).sum())(params)
    close([leaf.grad for leaf in leaves(module)], jax.tree.leaves(expected))
