"""Hooks of a captured pass that use `.grad`: not of Tensors that the pass writes; of others it is state of theirs."""

import jax.numpy as jnp
import pytest

import jhop

TOO_EARLY = "hook {} the .grad of a Tensor whose gradient the same backward pass computes"
NODE_BY_NODE = "ignore:compiled_autograd. a backward pass runs node by node:UserWarning"


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def compiler(gm):
    return jhop.compile(gm, fullgraph=True)


def on_host(gm):
    return jhop.compile(gm)


def reads(x, w):
    return lambda grad: grad if w.grad is None else grad + w.grad


def writes(x, w):
    def hook(grad):
        w.grad = grad * 10.0

    return hook


def reads_after(x, w):
    def hook(tensor):
        tensor.grad = tensor.grad if w.grad is None else tensor.grad + w.grad

    x.register_post_accumulate_grad_hook(hook)
    return lambda grad: None


def runs_backward(x, w):
    def hook(grad):
        with jhop.autograd.enable_grad():
            loss = (w * 5.0).sum()
        loss.backward()

    return hook


KINDS = {reads: "reads", writes: "writes", reads_after: "reads", runs_backward: "runs a backward pass that writes"}


def passes(make, n=4):
    """Gradients of a few passes over x * 2 * w, with a hook on the first product."""
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    hook = make(x, w)
    found = []
    for _ in range(n):
        y = x * 2.0
        y.register_hook(hook)
        (y * w).sum().backward()
        found.append((x.grad.tolist(), w.grad.tolist()))
    return found


@pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])
@pytest.mark.parametrize("compiler_fn", [compiler, on_host])
def test_gradient_that_the_pass_writes_is_refused(make, compiler_fn):
    with jhop.compiled_autograd.enable(compiler_fn):
        for _ in range(2):
            with pytest.raises(jhop.JhopError, match=TOO_EARLY.format(KINDS[make])):
                passes(make, 1)


@pytest.mark.filterwarnings(NODE_BY_NODE)
@pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])
def test_pass_that_nobody_asked_to_see_goes_on_node_by_node(make):
    expected = passes(make)
    with jhop.compiled_autograd.enable():
        assert passes(make) == expected


def test_hook_on_the_host_is_refused_too():
    x, log = leaf(1.0, 2.0), []

    def hook(grad):
        log.append(float(grad.sum()))
        x.grad = None

    y = x * 2.0
    y.register_hook(hook)
    with pytest.warns(match="runs on the host"), jhop.compiled_autograd.enable(on_host):
        with pytest.raises(jhop.JhopError, match=TOO_EARLY.format("writes")):
            y.sum().backward()
    assert (x.grad, log) == (None, [])


@pytest.mark.parametrize("compiler_fn", [compiler, on_host, None])
def test_gradients_of_other_tensors_are_state(compiler_fn):
    other, written = leaf(1.0, 2.0), leaf(1.0, 2.0)

    def hook(grad):
        written.grad = grad * 3.0 if written.grad is None else written.grad + grad
        return grad if other.grad is None else grad + other.grad

    found = []
    with jhop.compiled_autograd.enable(compiler_fn):
        for i in range(5):
            other.grad = jnp.array([1.0 + i, 7.0]) if i % 2 else None
            x = leaf(1.0, 2.0)
            y = x * 2.0
            y.register_hook(hook)
            y.sum().backward()
            found.append((x.grad.tolist(), written.grad.tolist()))
    gradients = [[2.0, 2.0], [6.0, 16.0], [2.0, 2.0], [10.0, 16.0], [2.0, 2.0]]
    assert found == [(grad, [3.0 + i] * 2) for i, grad in enumerate(gradients)]


@pytest.mark.parametrize("compiler_fn", [compiler, None])
@pytest.mark.filterwarnings(NODE_BY_NODE)
def test_capture_whose_hook_used_a_gradient_that_another_pass_writes(compiler_fn):
    x, shown = leaf(1.0, 2.0), leaf(3.0, 4.0)
    shown.grad = jnp.array([10.0, 20.0])

    def run(factor):
        x.grad = None
        y = x * 2.0
        y.register_hook(hook)
        with jhop.compiled_autograd.enable(compiler_fn):
            (y * factor).sum().backward()
        return x.grad.tolist()

    def hook(grad):
        return grad + shown.grad

    others = [leaf(5.0, 6.0) for _ in range(3)]
    for other in others:
        other.grad = jnp.array([0.0, 0.0])
    assert [run(other) for other in others] == [[30.0, 52.0]] * 3
    if compiler_fn is None:
        assert run(shown) == [30.0, 56.0]  # as in eager, the other factor's gradient was written before: 10 + 2, 20 + 4
    else:
        with pytest.raises(jhop.JhopError, match=TOO_EARLY.format("reads")):
            run(shown)


def test_post_accumulate_hook_uses_its_own():
    def run():
        x = leaf(1.0, 2.0)

        def hook(tensor):
            tensor.grad = tensor.grad * 10.0

        x.register_post_accumulate_grad_hook(hook)
        found = []
        for _ in range(3):
            (x * 2.0).sum().backward()
            found.append(x.grad.tolist())
        return found

    captured = []
    with jhop.compiled_autograd.enable(lambda gm: captured.append(gm) or jhop.compile(gm, fullgraph=True)):
        assert run() == [[20.0] * 2, [220.0] * 2, [2220.0] * 2]
    assert len(captured) == 2  # without a gradient, and with one
