"""`jhop.edge`: places of the graph in place of Tensors, as inputs and as outputs of backward passes."""

import gc
import weakref

import jax.numpy as jnp
import pytest
from tape_modes import MODES, each_mode, leaf, scalar, times

import jhop
import jhop.numpy as hnp

both = pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=lambda mode: mode.name)


def test_an_edge_is_a_node_and_the_number_of_an_output():
    x = leaf(1.0, 2.0)
    _, b = hnp.split(x * 3.0, 2)
    edge = jhop.edge(b)
    assert isinstance(edge, jhop.autograd.GradientEdge)
    assert (edge.node, edge.output_nr) == edge == (b.grad_fn, 1)
    assert (edge.shape, edge.dtype) == ((1,), jnp.float32)
    end = jhop.edge(x)
    assert (end.node.name(), end.output_nr, end.shape) == ("AccumulateGrad", 0, (2,))
    assert jhop.autograd.get_gradient_edge is jhop.edge


@each_mode
def test_it_stays_when_the_variable_is_bound_to_another_tensor(mode):
    x = scalar(2.0)
    y = mode.compile(lambda x: x * 3.0)(x)
    y.register_hook(times(10.0))
    old = jhop.edge(y)
    y += 1.0
    y *= 5.0
    y.register_hook(times(7.0))
    new = jhop.edge(y)
    found = mode.grad(y * 11.0, [old, new, x], retain_graph=True)
    assert [float(g) for g in found] == [11.0 * 7.0 * 5.0 * 10.0, 11.0 * 7.0, 11.0 * 7.0 * 5.0 * 10.0 * 3.0]


@each_mode
def test_a_backward_in_two_parts(mode):
    x, w = scalar(2.0), scalar(5.0)
    y = mode.compile(lambda x: x * 3.0)(x)
    y.register_hook(times(10.0))
    edge = jhop.edge(y)
    z = mode.compile(lambda y, w: y * w)(y, w)
    found, by_w = mode.grad(z, [edge, w])
    assert (float(found), float(by_w)) == (50.0, 6.0)
    with mode.captured():
        jhop.autograd.backward(edge, found * 2.0)
    assert float(x.grad) == 100.0 * 10.0 * 3.0


@both
def test_outputs_of_grad_with_and_without_a_cotangent(mode):
    x = scalar(2.0)
    y = x * x
    assert float(mode.grad(jhop.edge(y), x, retain_graph=True)[0]) == 4.0
    assert float(mode.grad([y, jhop.edge(y)], x, [None, jnp.float32(3.0)], retain_graph=True)[0]) == 16.0
    (slope,) = mode.grad(jhop.edge(y), x, create_graph=True)
    assert float(mode.grad(jhop.edge(slope), x)[0]) == 2.0
    rows = mode.grad(jhop.edge(y), jhop.edge(x), jnp.array([1.0, 5.0]), is_grads_batched=True)[0]
    assert rows.tolist() == [4.0, 20.0]


@both
def test_inputs_of_backward(mode):
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    seen = []
    y = x * 3.0
    y.register_hook(lambda grad: seen.append(grad))
    z = (y * w).sum()
    mode.backward(z, inputs=[jhop.edge(x)], retain_graph=True)
    assert (x.grad.tolist(), w.grad, len(seen)) == ([9.0, 12.0], None, 1)
    mode.backward(z, inputs=jhop.edge(y))  # as in PyTorch: what leads there runs, and nothing is kept
    assert (x.grad.tolist(), w.grad, y.grad, [g.tolist() for g in seen]) == ([9.0, 12.0], None, None, [[3.0, 4.0]] * 2)


@both
def test_unused_inputs(mode):
    x, w = scalar(2.0), leaf(1.0, 2.0)
    end = jhop.edge(w)
    with pytest.raises(jhop.JhopError, match=r"no output depends on inputs\[0\], of shape \(2,\)"):
        mode.grad(x * 3.0, end)
    assert mode.grad(x * 3.0, end, allow_unused=True) == (None,)
    assert mode.grad(x * 3.0, end, materialize_grads=True)[0].tolist() == [0.0, 0.0]


def test_it_keeps_the_graph_and_not_the_tensor():
    x = scalar(2.0)
    y = x * 3.0
    edge, tensor, node = jhop.edge(y), weakref.ref(y), weakref.ref(y.grad_fn)
    del y
    gc.collect()
    assert (tensor(), node()) == (None, edge.node)
    jhop.autograd.backward(edge)
    assert float(x.grad) == 3.0
    with pytest.raises(jhop.JhopError, match="already run and its saved arrays were freed"):
        jhop.autograd.backward(edge)
    del edge
    gc.collect()
    assert node() is None


def test_errors():
    x = scalar(2.0)
    y = x * 3.0
    with pytest.raises(jhop.JhopError, match="^jhop.edge: expected a Tensor, got float"):
        jhop.edge(2.0)
    with pytest.raises(jhop.JhopError, match="^jhop.edge: this Tensor does not require grad"):
        jhop.edge(x.detach())
    with pytest.raises(jhop.JhopError, match="^jhop.edge inside a function that jhop.compile traces"):
        jhop.compile(lambda x: (jhop.edge(x * 2.0), x * 3.0)[1])(x)
    Edge = jhop.autograd.GradientEdge
    for edge in (Edge(y.grad_fn, 1), Edge(y.grad_fn, -1), Edge(y.grad_fn, True), Edge(y, 0)):
        with pytest.raises(jhop.JhopError, match="^autograd.grad: expected a GradientEdge of a node"):
            jhop.autograd.grad(y, edge)
        with pytest.raises(jhop.JhopError, match="^autograd.backward: expected a GradientEdge of a node"):
            jhop.autograd.backward(edge)
    with pytest.raises(jhop.JhopError, match=r"expected shape \(\) and dtype float32"):
        jhop.autograd.backward(jhop.edge(y), jnp.ones(2))
    with pytest.raises(jhop.JhopError, match=r"a gradient can be left out only for a scalar, .* shape \(2,\)"):
        jhop.autograd.backward(jhop.edge(leaf(1.0, 2.0) * 2.0))
    with pytest.raises(jhop.JhopError, match="register_multi_grad_hook: expected Tensors"):
        jhop.autograd.register_multi_grad_hook([jhop.edge(y)], times(2.0))
    assert x.grad is None


def test_as_in_pytorch():
    torch = pytest.importorskip("torch")
    from torch.autograd.graph import get_gradient_edge

    def program(x, edge, backward, grad):
        y = x * 3.0
        y.register_hook(lambda g: g * 10.0)
        old = edge(y)
        y += 1.0
        (first,) = grad(y * 5.0, [old], retain_graph=True)
        backward(old, first)
        return float(first), float(x.grad)

    ours = program(scalar(2.0), jhop.edge, jhop.autograd.backward, jhop.autograd.grad)
    x = torch.tensor(2.0, requires_grad=True)
    assert ours == program(x, get_gradient_edge, torch.autograd.backward, torch.autograd.grad)
    assert ours == (50.0, 1500.0)
