"""`Tensor.retain_grad` inside compiled functions: results and arguments of a call keep their gradients."""

import gc
import weakref

import jax.numpy as jnp
import pytest
from tape_modes import MODES, each_mode, leaf, scalar, times

import jhop
import jhop.numpy as hnp

both = pytest.mark.parametrize("mode", [MODES[1], MODES[3]], ids=lambda mode: mode.name)


def both_results(x):
    """Two results, of which the first retains its gradient, and the second is computed from it."""
    y = x * 3.0
    y.register_hook(times(2.0))
    y.retain_grad()
    z = y * y
    y.register_hook(lambda grad: grad + 1.0)
    return y, z


@each_mode
def test_it_is_the_whole_gradient_after_all_hooks(mode):
    compiled = mode.compile(both_results)
    for value in (2.0, 5.0):
        x = scalar(value)
        y, z = compiled(x)
        assert y.retains_grad
        assert not z.retains_grad
        mode.backward(z * 5.0 + y * 7.0)
        expected = (5.0 * 6.0 * value + 7.0) * 2.0 + 1.0
        assert (float(y.grad), z.grad, float(x.grad)) == (expected, None, expected * 3.0)


@each_mode
def test_it_accumulates_and_each_call_has_its_own(mode):
    compiled = mode.compile(both_results)
    x = scalar(2.0)
    (y, z), (other, last) = compiled(x), compiled(x)
    mode.backward(z, retain_graph=True)
    assert (float(y.grad), other.grad) == (25.0, None)
    mode.backward(z + y, retain_graph=True)
    assert float(y.grad) == 25.0 + 27.0
    mode.backward(z + last * 10.0)
    assert (float(y.grad), float(other.grad)) == (25.0 + 27.0 + 25.0, 241.0)


@each_mode
def test_several_results_of_which_a_pass_reaches_some(mode):
    def fn(x, w):
        y, v = x * 3.0, w * 5.0
        y.retain_grad()
        v.retain_grad()
        return {"y": y, "v": v, "both": y * v, "n": jnp.int32(2)}

    x, w = scalar(2.0), scalar(7.0)
    out = mode.compile(fn)(x, w)
    mode.backward(out["y"] * 2.0, retain_graph=True)
    assert (float(out["y"].grad), out["v"].grad) == (2.0, None)
    mode.backward(out["both"], retain_graph=True)
    assert (float(out["y"].grad), float(out["v"].grad)) == (37.0, 6.0)
    mode.backward(out["both"], inputs=[w])
    assert (float(out["y"].grad), float(out["v"].grad), float(w.grad)) == (37.0, 12.0, 60.0)


@each_mode
def test_inputs_of_a_pass(mode):
    x, w = scalar(2.0), scalar(7.0)
    y, z = mode.compile(lambda x, w: (lambda y, z: (y, z * w))(*both_results(x)))(x, w)
    mode.backward(z, inputs=[w], retain_graph=True)
    assert (y.grad, float(w.grad), x.grad) == (None, 36.0, None)
    mode.backward(z, inputs=[y], retain_graph=True)
    assert (float(y.grad), float(w.grad), x.grad) == (169.0, 36.0, None)
    assert float(mode.grad(z, x, retain_graph=True)[0]) == 169.0 * 3.0
    assert float(y.grad) == 169.0 * 2.0
    mode.backward(z, inputs=[x])
    assert (float(y.grad), float(x.grad)) == (169.0 * 3.0, 169.0 * 3.0)


@each_mode
def test_arguments_and_tensors_from_outside(mode):
    x, captured = scalar(2.0), scalar(3.0)
    middle, other = x * 5.0, captured * 7.0

    def fn(a):
        a.retain_grad()
        other.retain_grad()
        return a * a * other

    out = mode.compile(fn)(middle)
    assert (middle.retains_grad, other.retains_grad) == (True, True)
    mode.backward(out)
    assert (float(middle.grad), float(other.grad), float(x.grad)) == (420.0, 100.0, 2100.0)


@each_mode
def test_with_create_graph(mode):
    x = scalar(2.0)
    y, z = mode.compile(both_results)(x)
    (slope,) = mode.grad(z, x, create_graph=True)  # (2 * 2 * 3x + 1) * 3
    assert (float(slope), float(y.grad)) == (75.0, 25.0)
    assert float(mode.grad(slope, x)[0]) == (12.0 * 2.0 + 1.0) * 3.0  # through the hooks once more
    again = mode.compile(both_results)(x)
    (slope,) = mode.grad(again[0] * 5.0, x, create_graph=True)
    assert float(again[0].grad) == 11.0


@each_mode
def test_a_result_that_does_not_move_with_the_inputs(mode):
    def fn(x):
        y = hnp.floor(x)
        y.retain_grad()
        return y, x * 3.0

    x = scalar(2.5)
    y, z = mode.compile(fn)(x)
    mode.backward(y * 5.0 + z, retain_graph=True)
    assert (float(y.grad), float(x.grad)) == (5.0, 3.0)
    y.grad = None
    mode.backward(y * 7.0 + z, create_graph=True)
    assert float(getattr(y.grad, "value", y.grad)) == 7.0


@each_mode
def test_other_sizes_and_structures(mode):
    compiled = mode.compile(lambda x: both_results(x)[::-1])
    for n in (2, 3, 4):
        x = leaf(*map(float, range(1, n + 1)))
        z, y = compiled(x)
        mode.backward(z.sum())
        assert y.grad.tolist() == [12.0 * i + 1.0 for i in range(1, n + 1)]


@both
def test_a_structure_is_captured_once(mode):
    compiled = mode.compile(both_results)
    mode.graphs.clear()
    for _ in range(3):
        y, z = compiled(scalar(2.0))
        mode.backward(z)
        assert float(y.grad) == 25.0
    assert len(mode.graphs) == ("captured" in mode.name)


@each_mode
def test_under_anomaly_detection_and_for_batches(mode):
    x = scalar(2.0)
    y, z = mode.compile(both_results)(x)
    with mode.captured(), jhop.autograd.detect_anomaly():
        z.backward(retain_graph=True)
    assert float(y.grad) == 25.0
    with pytest.raises(jhop.JhopError, match="retains its gradient"):
        mode.grad(z, x, jnp.ones(3), is_grads_batched=True)


def test_state_of_hooks_and_no_retained_gradient_without_an_owner():
    seen = []

    @jhop.compile
    def fn(x):
        y = x * 3.0
        y.register_hook(lambda grad: seen.append(grad))
        y.retain_grad()
        return y, y * 2.0

    x = scalar(2.0)
    y, z = fn(x)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None  # the graph does not keep it
    z.backward()
    assert ([float(grad) for grad in seen], float(x.grad)) == ([2.0], 6.0)


def test_refused_for_what_is_not_returned():
    @jhop.compile
    def fn(x):
        y = x * 3.0
        y.retain_grad()
        return y * y

    with pytest.raises(jhop.HookError, match=r"`fn`, which jhop.compile traces, calls it on a value of shape \(2,\)"):
        fn(leaf(1.0, 2.0))

    @jhop.compile
    def detached(x):
        x.detach().retain_grad()
        return x * 2.0

    with pytest.raises(jhop.HookError, match="this Tensor does not require grad"):
        detached(leaf(1.0, 2.0))


def test_what_is_retained_outside_too_is_written_once():
    y, z = jhop.compile(both_results)(scalar(2.0))
    y.retain_grad()
    z.backward()
    assert float(y.grad) == 25.0


def test_one_trace_for_all_sizes():
    traces = []

    @jhop.compile(dynamic=True)
    def fn(x):
        traces.append(None)
        return both_results(x)

    for n in (2, 3, 4):
        y, z = fn(leaf(*map(float, range(1, n + 1))))
        z.sum().backward()
        assert y.grad.tolist() == [12.0 * i + 1.0 for i in range(1, n + 1)]
    assert len(traces) == 1
