"""Tapes of 10,000 nodes: no recursion, linear time, and nothing is left of them after the backward pass."""

import gc
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

N = 10_002


@pytest.fixture
def no_gc():
    """What is freed is freed at once, and not when somebody looks for cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def leaf():
    return jhop.tensor(jnp.linspace(0.5, 1.5, 4), requires_grad=True)


def chain(x, n, hook=None):
    """`n` operations whose derivatives stay near 1; a hook on some of the values."""
    for i in range(n // 3):
        x = x + jhop.numpy.sin(x) * 1e-4
        if hook is not None and i % 100 == 0:
            x.register_hook(hook)
    return x


def slope_of_chain(x, n, factor=1.0):
    """The derivative by hand, in float64."""
    x, slope = np.asarray(x, np.float64), 1.0
    for i in range(n // 3):
        slope = slope * (1 + 1e-4 * np.cos(x)) * (factor if i % 100 == 0 else 1.0)
        x = x + 1e-4 * np.sin(x)
    return slope


def live():
    return len(jax.live_arrays())


def test_long_tape_runs_and_leaves_nothing(no_gc):
    x = leaf()
    chain(x, 200, lambda grad: grad * 1.5).backward(jnp.ones(4))
    x.grad, before = None, live()
    y = chain(x, N, lambda grad: grad * 1.5)
    node = weakref.ref(y.grad_fn)
    assert live() - before >= N - 2  # what each node keeps
    y.backward(jnp.ones(4))
    np.testing.assert_allclose(x.grad, slope_of_chain(x.value, N, 1.5), rtol=2e-3)
    assert live() - before <= 3  # the gradient, the result, and the cotangent
    assert "grad_fn=<AddBackward>" in repr(y)
    del y
    assert node() is None


def test_long_tape_that_is_not_run_leaves_nothing(no_gc):
    x = leaf()
    chain(x, 9)  # its constant is on the device from the second time on
    before, y = live(), chain(x, 3 * N)
    middle = y.grad_fn
    for _ in range(N):
        middle = middle.next_functions[0][0]
    middle = weakref.ref(middle)
    del y  # 30,006 nodes, each held by the next alone
    assert middle() is None
    assert live() == before


def test_retained_graph_is_freed_by_the_last_pass(no_gc):
    x = leaf()
    chain(x, 4).backward(jnp.ones(4), retain_graph=True)
    x.grad, before = None, live()
    y = chain(x, 1_998)
    for i in (1, 2):
        y.backward(jnp.ones(4), retain_graph=True)
        np.testing.assert_allclose(x.grad, i * slope_of_chain(x.value, 1_998), rtol=1e-3)
        assert live() - before >= 1_998
    y.backward(jnp.ones(4))
    assert live() - before <= 3


def test_one_value_with_many_uses():
    x = leaf()
    total = jhop.tensor(jnp.zeros(4))
    for i in range(5_000):
        total = total + x * float(i % 3)
    total.backward(jnp.ones(4))
    assert x.grad.tolist() == [sum(i % 3 for i in range(5_000))] * 4


def test_gradient_of_an_input_at_the_far_end():
    x = leaf()
    y = chain(x, 20)
    z = chain(y, N)
    (grad,) = jhop.autograd.grad(z, [y], grad_outputs=[jnp.ones(4)])
    np.testing.assert_allclose(grad, slope_of_chain(y.value, N), rtol=2e-3)


def test_long_tape_captured_leaves_nothing(no_gc):
    x, n, graphs = leaf(), 3_000, []

    def compiler_fn(gm):
        graphs.append(gm)
        return jhop.compile(gm, backend="eager", fullgraph=True)

    for i in range(2):
        x.grad, before = None, live()
        y = chain(x, n, halve)
        with jhop.compiled_autograd.enable(compiler_fn):
            y.backward(jnp.ones(4))
        np.testing.assert_allclose(x.grad, slope_of_chain(x.value, n, 0.5), rtol=1e-3)
        assert live() - before <= 8, i  # of thousands
    assert len(graphs) == 1
    jhop.reset()


def halve(grad):
    return grad * 0.5


def test_time_is_linear_in_the_nodes(no_gc):
    def seconds(n):
        x, found = leaf(), []
        for _ in range(3):
            gc.collect()
            before = time.thread_time()
            chain(x, n).backward(jnp.ones(4))
            found.append(time.thread_time() - before)
        return min(found)

    seconds(100)
    assert seconds(20_000) < 10 * 2 * seconds(2_000)  # quadratic: 100 times
