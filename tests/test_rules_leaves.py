"""PyTorch's rules 51 to 68 (docs/RULES.md): leaves, accumulation into `.grad`, retained gradients."""

import jax.numpy as jnp
import numpy as np
import pytest
from rules import each_mode, leaf, mark, note, only_eager_and_captured, scalar, times, values

import jhop


@pytest.fixture
def seen():
    return []


@each_mode
def test_rule_051_grad_accumulates(mode):
    x = scalar(1.0)
    fn = mode.compile(lambda x: x * 2.0)
    found = []
    for _ in range(3):
        mode.backward(fn(x))
        found.append(float(x.grad))
    assert found == [2.0, 4.0, 6.0]


@each_mode
def test_rule_052_accumulation_makes_a_new_array(mode):
    """PyTorch adds to the array that is there; here whoever holds it keeps what it was."""
    x = scalar(1.0)
    fn = mode.compile(lambda x: x * 2.0)
    mode.backward(fn(x))
    before = x.grad
    mode.backward(fn(x))
    assert (float(before), float(x.grad)) == (2.0, 4.0)


@each_mode
def test_rule_053_an_intermediate_keeps_no_gradient_of_its_own_accord(mode):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    mode.backward(y * 3.0)
    assert (y.grad, y.retains_grad, float(x.grad)) == (None, False, 6.0)


@each_mode
def test_rule_054_retain_grad_stores_it_and_is_nothing_new_for_a_leaf(mode):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    x.retain_grad()
    y.retain_grad()
    mode.backward(y * 3.0)
    assert (float(y.grad), y.retains_grad, x.retains_grad, float(x.grad)) == (3.0, True, False, 6.0)


@each_mode
def test_rule_054_inside_a_compiled_function_it_is_for_results(mode, seen):
    def fn(x):
        y = x * 2.0
        y.retain_grad()
        y.register_hook(note(seen, times(5.0)))
        return y, y * 3.0

    x = scalar(1.0)
    y, z = mode.compile(fn)(x)
    mode.backward(z + y)
    assert (float(y.grad), values(seen), float(x.grad)) == (20.0, [4.0], 40.0)


def test_rule_054_of_other_values_in_it_a_hook_keeps_the_gradient(seen):
    def fn(x, kept):
        y = x * 2.0
        if kept is None:
            y.retain_grad()
        y.register_hook(note(kept, times(5.0)))
        return y * 3.0

    with pytest.raises(jhop.HookError, match="that it does not return, so nobody could look at its .grad"):
        jhop.compile(lambda x: fn(x, None))(scalar(1.0))
    jhop.compile(lambda x: fn(x, seen))(scalar(1.0)).backward()
    assert values(seen) == [3.0]


@each_mode
@pytest.mark.parametrize("first", ["hook", "retain"])
def test_rule_055_the_retained_gradient_is_the_one_after_all_hooks(mode, first):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    if first == "hook":
        y.register_hook(times(10.0))
    y.retain_grad()
    y.register_hook(lambda grad: grad + (1.0 if first == "hook" else 29.0))
    mode.backward(y * 3.0)
    assert (float(y.grad), float(x.grad)) == ((31.0, 62.0) if first == "hook" else (32.0, 64.0))


@each_mode
def test_rule_056_hooks_of_the_node_run_after_the_gradient_was_retained(mode):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 10.0,))
    y.retain_grad()
    mode.backward(y * 3.0)
    assert (float(y.grad), float(x.grad)) == (3.0, 60.0)


@each_mode
def test_rule_057_retained_gradients_accumulate(mode):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.retain_grad()
    for keep in (True, False):
        mode.backward(y * 3.0, retain_graph=keep)
    assert (float(y.grad), float(x.grad)) == (6.0, 12.0)


@each_mode
def test_rule_058_a_tensor_that_requires_no_grad_retains_none(mode):
    y = mode.compile(lambda x: x * 2.0)(jhop.tensor(1.0))
    with pytest.raises(jhop.HookError, match="retain_grad: this Tensor does not require grad"):
        y.retain_grad()


@only_eager_and_captured
def test_rule_059_gradients_of_many_intermediates_are_retained_under_compiled_autograd(mode):
    x = scalar(1.0)
    ys = [x]
    for factor in (2.0, 3.0, 5.0):
        ys.append(ys[-1] * factor)
        ys[-1].retain_grad()
    mode.backward(ys[-1])
    assert [float(y.grad) for y in ys] == [30.0, 15.0, 5.0, 1.0]


@each_mode
def test_rule_060_a_post_accumulate_hook_gets_the_leaf_with_its_new_gradient(mode, seen):
    x = scalar(1.0)
    found = []

    def look(tensor):
        found.append(tensor.shape)
        seen.append(tensor.grad * 10.0)

    x.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert (values(seen), found) == ([20.0, 40.0], [(), ()])


@each_mode
def test_rule_061_a_post_accumulate_hook_returns_none(mode):
    x = scalar(1.0)
    x.grad = jnp.float32(5.0)
    x.register_post_accumulate_grad_hook(lambda tensor: tensor.grad * 2.0)
    with pytest.raises(jhop.HookError, match=r"must return None, but returned .*change its .grad instead"):
        mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert float(x.grad) == 5.0


@each_mode
def test_rule_062_only_leaves_that_require_grad_have_post_accumulate_hooks(mode):
    y = mode.compile(lambda x: x * 2.0)(scalar(1.0))
    with pytest.raises(jhop.HookError, match=r"only leaves accumulate gradients.*Use register_hook"):
        y.register_post_accumulate_grad_hook(print)
    with pytest.raises(jhop.HookError, match="does not require grad"):
        jhop.tensor(1.0).register_post_accumulate_grad_hook(print)


@each_mode
def test_rule_063_grad_runs_no_post_accumulate_hook(mode, seen):
    x = scalar(1.0)
    x.register_post_accumulate_grad_hook(mark(seen, "post"))
    fn = mode.compile(lambda x: x * 2.0)
    (grad,) = mode.grad(fn(x), x)
    assert (float(grad), x.grad, seen) == (2.0, None, [])
    mode.backward(fn(x))
    assert seen == ["post"]


@each_mode
def test_rule_064_post_accumulate_hooks_run_in_order_each_on_what_the_last_one_left(mode, seen):
    def change(label, fn):
        def hook(tensor):
            seen.append(label)
            tensor.grad = fn(tensor.grad)

        return hook

    x = scalar(1.0)
    x.register_post_accumulate_grad_hook(change("p", lambda grad: grad + 1.0))
    x.register_post_accumulate_grad_hook(change("q", times(10.0)))
    mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert (seen, float(x.grad)) == (["p", "q"], 30.0)


class Sgd:
    """An optimizer with momentum that lives in the backward pass: it updates each leaf and frees its gradient."""

    def __init__(self, *leaves):
        self.speed = [jnp.zeros_like(tensor.value) for tensor in leaves]
        self.steps = 0
        self.handles = [
            tensor.register_post_accumulate_grad_hook(lambda tensor, i=i: self.step(i, tensor))
            for i, tensor in enumerate(leaves)
        ]

    def step(self, i, tensor):
        self.steps += 1
        self.speed[i] = self.speed[i] * 0.5 + tensor.grad
        tensor.value = tensor.value - 0.1 * self.speed[i]
        tensor.grad = None


def by_hand(p, q, steps):
    speed = [np.zeros(2), np.zeros(1)]
    for _ in range(steps):
        grads = [2 * p * q, (p * p).sum(keepdims=True)]
        speed = [v * 0.5 + g for v, g in zip(speed, grads, strict=True)]
        p, q = p - 0.1 * speed[0], q - 0.1 * speed[1]
    return p, q


@each_mode
def test_rule_065_an_optimizer_in_the_backward_updates_leaves_and_frees_gradients(mode):
    p, q = leaf(1.0, 2.0), leaf(3.0)
    optimizer = Sgd(p, q)
    fn = mode.compile(lambda p, q: (p * p * q).sum())
    mode.graphs.clear()
    for _ in range(4):
        mode.backward(fn(p, q))
        assert p.grad is q.grad is None
    for tensor, expected in zip((p, q), by_hand(np.array([1.0, 2.0]), np.array([3.0]), 4), strict=True):
        np.testing.assert_allclose(np.asarray(tensor.value), expected, rtol=1e-5)
    assert (optimizer.steps, p.is_leaf, len(mode.graphs)) == (8, True, int(mode.name == "captured"))


@each_mode
def test_rule_065_a_function_that_reaches_its_leaves_by_itself_sees_their_new_values(mode):
    p, q = leaf(1.0, 2.0), leaf(3.0)
    optimizer = Sgd(p, q)
    traced = [0]

    def fn(x, traced=traced.append):
        traced(1)
        return (p * p * q).sum() * x + (p.value * 0.0).sum()

    fn = mode.compile(fn)
    mode.fresh()
    for _ in range(4):
        mode.backward(fn(jnp.float32(1.0)))
    for tensor, expected in zip((p, q), by_hand(np.array([1.0, 2.0]), np.array([3.0]), 4), strict=True):
        np.testing.assert_allclose(np.asarray(tensor.value), expected, rtol=1e-5)
    assert (optimizer.steps, len(traced) - 1) == (8, 1 if mode.name == "compiled" else 4)
    assert len(mode.compiled) == (0 if mode.name == "eager" else 1)


@each_mode
def test_rule_065_a_later_hook_sees_that_the_gradient_was_freed(mode, seen):
    x = scalar(1.0)
    x.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    x.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad is None))
    for _ in range(2):
        mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert (x.grad, seen) == (None, [True, True])
    x.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", tensor.value * 7.0))
    mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert float(x.grad) == 7.0


@each_mode
def test_rule_065_whether_it_is_freed_may_depend_on_state(mode):
    class Every:
        steps = 0

        def __call__(self, tensor):
            self.steps += 1
            if self.steps % 2 == 0:
                tensor.value = tensor.value - 0.5 * tensor.grad
                tensor.grad = None

    x, every = scalar(1.0), Every()
    x.register_post_accumulate_grad_hook(every)
    found = []
    for _ in range(5):
        mode.backward(mode.compile(lambda x: x * 2.0)(x))
        found.append((None if x.grad is None else float(x.grad), float(x.value)))
    assert found == [(2.0, 1.0), (None, -1.0), (2.0, -1.0), (None, -3.0), (2.0, -3.0)]


@each_mode
def test_rule_066_without_its_handle_the_updates_stop(mode):
    p, q = leaf(1.0, 2.0), leaf(3.0)
    optimizer = Sgd(p, q)
    fn = mode.compile(lambda p, q: (p * p * q).sum())
    mode.backward(fn(p, q))
    for handle in optimizer.handles:
        handle.remove()
    after = p.value.tolist()
    mode.backward(fn(p, q))
    assert (p.value.tolist(), optimizer.steps) == (after, 2)
    assert p.grad is not None


@each_mode
def test_rule_067_new_values_and_a_grad_that_was_reset_cost_no_new_trace(mode):
    compiled = []

    def backend(gm, example_inputs):
        compiled.append(gm)
        return jhop.backends.xla(gm, example_inputs)

    mode.graphs.clear()

    def compiler_fn(gm):
        mode.graphs.append(gm)
        return jhop.compile(gm, backend=backend, fullgraph=True)

    x = leaf(1.0, 2.0)
    x.register_hook(times(3.0))
    fn = mode.compile(lambda x: (x * x).sum(), backend=backend)
    found = []
    for i in range(5):
        x.value = jnp.array([1.0 + i, 2.0])
        with mode.captured(compiler_fn):
            fn(x).backward()
        found.append(float(x.grad[0]))
        x.grad = None
    assert found == [6.0 + 6.0 * i for i in range(5)]
    expected = {"eager": (0, 0), "compiled": (2, 0), "captured": (1, 1)}  # a forward and a backward; one backward
    assert (len(compiled), len(mode.graphs)) == expected[mode.name]


@each_mode
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (jnp.ones(3), r"expected shape \(2,\) and dtype float32.* got shape \(3,\)"),
        (jnp.ones(2, jnp.float16), "got shape .* and dtype float16"),
        (3.0, "expected an array or None, got float"),
        ([1.0, 2.0], "expected an array or None, got list"),
    ],
    ids=["shape", "dtype", "number", "list"],
)
def test_rule_068_what_does_not_fit_cannot_be_assigned_to_grad(mode, grad, message):
    x = leaf(1.0, 2.0)
    x.grad = jnp.array([5.0, 7.0])
    with pytest.raises(jhop.JhopError, match=rf"Tensor.grad: .*{message}"):
        x.grad = grad
    mode.backward(mode.compile(lambda x: (x * 3.0).sum())(x))
    assert x.grad.tolist() == [8.0, 10.0]
