"""`autograd.grad` and `backward(inputs=...)`: what runs, what comes back, what is left alone, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import each_mode, leaf, scalar, times

import jhop
import jhop.numpy as hnp

grad = jhop.autograd.grad


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: lifted operations stay compiled, and must not notice."""


def noting(seen, label):
    return lambda *_: seen.append(label)


@pytest.fixture
def seen():
    """A list, for hooks that note that they ran."""
    return []


# What comes back.


@each_mode
def test_gradient_is_the_one_after_the_hooks_of_the_input(mode):
    x = leaf(3.0)
    x.register_hook(times(7.0))
    (found,) = mode.grad(mode.compile(lambda x: x * 2.0)(x), x)
    assert (found.tolist(), x.grad) == ([14.0], None)


@each_mode
def test_gradient_at_an_intermediate(mode):
    x = leaf(3.0)
    y = mode.compile(lambda x: x * 5.0)(x)
    y.register_hook(times(7.0))
    (found,) = mode.grad(mode.compile(lambda y: y * y)(y), y)
    assert found.tolist() == [2 * 15.0 * 7.0]


@each_mode
def test_gradients_at_an_intermediate_and_above_it(mode):
    x = leaf(3.0)
    y = x * 5.0
    y.register_hook(times(7.0))
    found = mode.grad(mode.compile(lambda y: y * 2.0)(y), [y, x])
    assert [g.tolist() for g in found] == [[14.0], [70.0]]  # PyTorch leaves the first at 2 in this case


@each_mode
def test_input_given_twice(mode):
    x = leaf(3.0)
    assert [g.tolist() for g in mode.grad(mode.compile(lambda x: x * 2.0)(x), [x, x])] == [[2.0], [2.0]]


@each_mode
def test_input_that_is_an_output(mode):
    x = leaf(3.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.register_hook(times(5.0))
    assert [g.tolist() for g in mode.grad(y, [y, x], jnp.array([1.5]))] == [[7.5], [15.0]]


@each_mode
def test_leaf_that_is_the_output(mode):
    x = leaf(3.0)
    x.register_hook(times(5.0))
    assert mode.grad(x, x)[0].tolist() == [5.0]


@each_mode
def test_outputs_are_summed_each_with_its_gradient(mode):
    x = leaf(3.0, 1.0)
    first, second = mode.compile(lambda x: ((x * 2.0).sum(), x * 5.0))(x)
    (found,) = mode.grad([first, second], [x], [None, jnp.array([10.0, 20.0])])
    assert found.tolist() == [52.0, 102.0]


@each_mode
def test_output_given_twice_counts_twice(mode):
    x = leaf(3.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    assert mode.grad([y, y], x)[0].tolist() == [4.0]


@each_mode
def test_one_of_several_results_of_a_node(mode):
    x = leaf(1.0, 2.0)
    a, b = mode.compile(lambda x: (x * 3.0, x * x))(x)
    (found,) = mode.grad((a * b).sum(), b)
    assert found.tolist() == [3.0, 6.0]


@each_mode
def test_hook_sees_the_sum_of_all_paths(mode):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(lambda g: g.clip(max=5.0))
    (found,) = mode.grad(mode.compile(lambda y: y * 4.0)(y) + y * 3.0, x)
    assert found.tolist() == [10.0]


@each_mode
def test_gradients_are_arrays(mode):
    x = leaf(3.0)
    (found,) = mode.grad(mode.compile(lambda x: x * x)(x), x, jhop.tensor([2.0]))
    assert isinstance(found, jax.Array)
    assert found.tolist() == [12.0]


@each_mode
def test_against_jax(mode):
    def fn(np_, w, b, x):
        return (np_.tanh(x @ w + b) ** 2).sum()

    weights, x = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), jnp.linspace(0.0, 1.0, 12).reshape(4, 3)
    arrays = [weights, jnp.array([0.1, -0.2]), x]
    tensors = [jhop.tensor(a, requires_grad=True) for a in arrays]
    found = mode.grad(mode.compile(lambda *args: fn(hnp, *args))(*tensors), tensors)
    expected = jax.grad(lambda *args: fn(jnp, *args), argnums=(0, 1, 2))(*arrays)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@each_mode
def test_nothing_flows_from_one_result_to_the_operands_of_another(mode):
    x, w = leaf(3.0), leaf(5.0)
    w.register_hook(lambda g: pytest.fail("no result that is used depends on it"))
    both = jhop.lift(lambda x, w: (x * x, w * w))
    first, _ = mode.compile(lambda x, w: both(x, w))(x, w)
    found = mode.grad(first, [x, w], allow_unused=True)
    assert (found[0].tolist(), found[1]) == ([6.0], None)


# What runs, and what does not.


@each_mode
def test_only_paths_to_the_inputs_run(mode, seen):
    x, w = leaf(3.0), leaf(5.0)
    side = w * 2.0
    y = x * 4.0
    for tensor, label in ((side, "side"), (w, "w"), (y, "y")):
        tensor.register_hook(noting(seen, label))
    (found,) = mode.grad(mode.compile(lambda y, side: y * side)(y, side), x)
    assert (found.tolist(), seen, w.grad) == ([40.0], ["y"], None)


def test_nothing_runs_above_the_input(seen):
    x = leaf(3.0)
    a = x * 2.0
    b = a * 3.0
    for tensor, label in ((x, "x"), (a, "a"), (b, "b")):
        tensor.register_hook(noting(seen, label))
    grad(b * b, [b, a])
    assert seen == ["b", "a"]


def counted_node(seen):
    x = leaf(3.0)
    b = x * 2.0
    b.register_hook(noting(seen, "tensor"))
    b.grad_fn.register_prehook(noting(seen, "pre"))
    b.grad_fn.register_hook(noting(seen, "post"))
    return x, b


def test_hooks_of_the_inputs_node_do_not_run_for_grad(seen):
    _, b = counted_node(seen)
    grad(b * 3.0, b)
    assert seen == ["tensor"]


def test_hooks_of_the_inputs_node_run_for_backward(seen):
    x, b = counted_node(seen)
    (b * 3.0).backward(inputs=[b])
    assert (seen, b.grad.tolist(), x.grad) == (["tensor", "pre", "post"], [3.0], None)


def test_hooks_of_nodes_below_the_input_run_for_grad(seen):
    x, b = counted_node(seen)
    assert (grad(b * 3.0, x)[0].tolist(), seen) == ([6.0], ["tensor", "pre", "post"])


def test_node_hook_sees_no_gradient_that_nobody_asked_for(seen):
    x, w = leaf(1.0), leaf(2.0)
    y = x * w
    y.grad_fn.register_hook(lambda ins, outs: seen.append([None if g is None else g.tolist() for g in ins]))
    (y * 3.0).backward(inputs=[x])
    assert seen == [[[6.0], None]]


def test_node_hook_cannot_make_a_gradient_of_none():
    x, w = leaf(1.0), leaf(2.0)
    y = x * w
    y.grad_fn.register_hook(lambda ins, outs: (ins[0], jnp.ones(1)))
    with pytest.raises(jhop.HookError, match="given None"):
        (y * 3.0).backward(inputs=[x])


@each_mode
def test_post_accumulate_hook_does_not_run_for_grad(mode, seen):
    x = leaf(3.0)
    x.register_post_accumulate_grad_hook(seen.append)
    mode.grad(mode.compile(lambda x: x * 2.0)(x), x)
    assert seen == []


@each_mode
def test_no_grad_of_any_leaf_is_touched(mode):
    x, w = leaf(3.0), leaf(5.0)
    x.grad = before = jnp.array([0.5])
    mode.grad(mode.compile(lambda x, w: x * w)(x, w), [x, w])
    assert x.grad is before
    assert w.grad is None


@each_mode
@pytest.mark.parametrize("ask", ["the input", "above it"])
def test_retained_gradient_is_stored_by_grad_too(mode, ask):
    x = leaf(3.0)
    y = x * 2.0
    y.register_hook(times(7.0))
    y.retain_grad()
    mode.grad(mode.compile(lambda y: y * 3.0)(y), y if ask == "the input" else x)
    assert (y.grad.tolist(), x.grad) == ([21.0], None)


# backward(inputs=...).


@each_mode
def test_backward_accumulates_into_the_inputs_alone(mode):
    x, w = leaf(3.0), leaf(5.0)
    x.grad = jnp.array([0.5])
    w.register_hook(lambda g: pytest.fail("the hook of a Tensor that was not asked for ran"))
    mode.backward(mode.compile(lambda x, w: x * w)(x, w), inputs=[x])
    assert (x.grad.tolist(), w.grad) == ([5.5], None)


@each_mode
def test_backward_by_an_intermediate_retains_its_gradient(mode):
    x = leaf(3.0)
    y = x * 2.0
    y.register_hook(times(7.0))
    mode.backward(mode.compile(lambda y: y * 3.0)(y), inputs=y)
    assert (y.grad.tolist(), y.retains_grad, x.grad) == ([21.0], True, None)


@each_mode
def test_backward_by_an_input_given_twice_adds_once(mode):
    x = leaf(3.0)
    mode.backward(mode.compile(lambda x: x * 2.0)(x), inputs=[x, x])
    assert x.grad.tolist() == [2.0]


@each_mode
def test_backward_by_an_unused_input_does_nothing(mode):
    x, unused = leaf(3.0), leaf(1.0)
    mode.backward(mode.compile(lambda x: x * 2.0)(x), inputs=[unused])
    assert (x.grad, unused.grad) == (None, None)


@each_mode
def test_post_accumulate_hook_runs_for_backward_by_the_leaf(mode, seen):
    x, w = leaf(3.0), leaf(5.0)

    def double(tensor):
        tensor.grad = tensor.grad * 2.0

    x.register_post_accumulate_grad_hook(double)
    w.register_post_accumulate_grad_hook(lambda tensor: pytest.fail("not asked for"))
    mode.backward(mode.compile(lambda x, w: x * w)(x, w), inputs=[x])
    assert x.grad.tolist() == [10.0]


def test_autograd_backward_takes_inputs():
    x, w = leaf(3.0), leaf(5.0)
    jhop.autograd.backward([x * w, x * 2.0], inputs=[x])
    assert (x.grad.tolist(), w.grad) == ([7.0], None)


# Graphs that are kept or freed.


@each_mode
def test_graph_is_freed_by_grad(mode):
    x = leaf(3.0)
    y = mode.compile(lambda x: x * x)(x)
    mode.grad(y, x)
    with pytest.raises(jhop.JhopError, match="already run and its saved arrays were freed"):
        mode.grad(y, x)


@each_mode
def test_graph_is_kept_on_demand(mode):
    x = leaf(3.0)
    y = mode.compile(lambda x: x * x)(x)
    found = [mode.grad(y, x, retain_graph=keep)[0].tolist() for keep in (True, True, False)]
    assert found == [[6.0]] * 3


@each_mode
def test_what_did_not_run_is_not_freed(mode):
    x, w = leaf(3.0), leaf(5.0)
    a, b = mode.compile(lambda x: x * x)(x), mode.compile(lambda w: w * w * w)(w)
    y = a + b
    assert mode.grad(y, x)[0].tolist() == [6.0]
    assert mode.grad(b, w)[0].tolist() == [75.0]


@each_mode
def test_node_of_the_input_is_not_freed(mode):
    x = leaf(3.0)
    a = mode.compile(lambda x: x * x)(x)
    assert mode.grad(a * 4.0, a)[0].tolist() == [4.0]
    assert mode.grad(a, x)[0].tolist() == [6.0]


def test_leaves_are_visited_in_the_order_of_the_operands(seen):
    x, w = leaf(3.0), leaf(5.0)
    y = x * w
    for tensor, label in ((x, "x"), (w, "w")):
        tensor.register_hook(noting(seen, label))
    grad(y, [w, x])
    assert seen == ["x", "w"]


def test_input_of_a_freed_part_may_still_be_asked_for():
    x = leaf(3.0)
    a = x * x
    grad(a, x)
    assert grad(a * 4.0, a)[0].tolist() == [4.0]


# Inputs that no output depends on.


@each_mode
def test_unused_input_is_an_error_that_names_it(mode):
    x, unused = leaf(3.0), leaf(1.0, 2.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    with pytest.raises(jhop.JhopError, match=r"inputs\[1\], of shape \(2,\).*allow_unused"):
        mode.grad(y, [x, unused])


@each_mode
def test_unused_input_gives_none(mode):
    x, unused = leaf(3.0), leaf(1.0)
    found = mode.grad(mode.compile(lambda x: x * 2.0)(x), [unused, x], allow_unused=True)
    assert (found[0], found[1].tolist()) == (None, [2.0])


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
def test_unused_input_gives_zeros(mode, create_graph):
    x, unused = leaf(3.0), leaf(1.0, 2.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    found = mode.grad(y, [unused, x], materialize_grads=True, create_graph=create_graph)
    assert [g.tolist() for g in found] == [[0.0, 0.0], [2.0]]


@each_mode
def test_argument_that_the_function_does_not_use(mode):
    x, unused = leaf(3.0), leaf(1.0)
    found = mode.grad(mode.compile(lambda x, u: x * 2.0)(x, unused), [x, unused], allow_unused=True)
    assert (found[0].tolist(), found[1]) == ([2.0], None)


def test_zeros_and_an_error_for_unused_inputs_contradict():
    x = leaf(3.0)
    with pytest.raises(jhop.JhopError, match="materialize_grads"):
        grad(x * 2.0, x, allow_unused=False, materialize_grads=True)


# Refused.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, c: grad(x * 2.0, [x, c]), r"inputs\[1\], of shape \(1,\), does not require grad"),
        (lambda x, c: grad(x * 2.0, c, allow_unused=True), r"inputs\[0\], of shape \(1,\), does not require grad"),
        (lambda x, c: grad(c * 2.0, x), "autograd.grad: this Tensor does not require grad"),
        (lambda x, c: grad(x * 2.0, []), "at least one Tensor"),
        (lambda x, c: grad([], x), "at least one Tensor"),
        (lambda x, c: grad(x * 2.0, x.value), "expected Tensors"),
        (lambda x, c: grad(hnp.stack([x, x]), x), "can be left out only for a scalar"),
        (lambda x, c: grad(x * 2.0, x, jnp.ones(3)), r"expected shape \(1,\)"),
        (lambda x, c: grad([x * 2.0, x], x, [None]), "2 and 1"),
        (lambda x, c: (x * 2.0).backward(inputs=[]), "at least one Tensor"),
        (lambda x, c: (x * 2.0).backward(inputs=[x, c]), r"inputs\[1\].*does not require grad"),
        (lambda x, c: (x * 2.0).backward(inputs=3), "expected Tensors"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(jhop.JhopError, match=message):
        call(leaf(3.0), jhop.tensor([1.0]))


def test_inside_a_compiled_function_it_is_refused():
    x = leaf(3.0)
    with pytest.raises(jhop.JhopError, match="autograd.grad inside a function that jhop.compile traces"):
        jhop.compile(lambda x: x * grad(x * x, x)[0])(x)


@each_mode
def test_exception_in_a_hook_leaves_retained_gradients(mode):
    def hook(g):
        raise LookupError("mine")

    x = leaf(3.0)
    y = x * 2.0
    y.retain_grad()
    x.register_hook(hook)
    with pytest.raises((LookupError, jhop.Unsupported), match="mine|LookupError"):
        mode.grad(mode.compile(lambda y: y * 3.0)(y), x)
    assert y.grad is None


# Many cotangents at once.


def model(np_, x):
    return np_.tanh(x * x) * x[::-1]


@each_mode
def test_batch_of_cotangents_gives_the_jacobian(mode):
    values = jnp.array([0.5, -1.0, 2.0])
    x = jhop.tensor(values, requires_grad=True)
    y = mode.compile(lambda x: model(hnp, x))(x)
    (found,) = mode.grad(y, x, jnp.eye(3), is_grads_batched=True)
    np.testing.assert_allclose(found, jax.jacobian(lambda v: model(jnp, v))(values), rtol=1e-5, atol=1e-6)


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
def test_hook_sees_one_example_of_the_batch(mode, create_graph):
    x = leaf(3.0, 1.0)
    y = x * x
    y.register_hook(lambda g: g * g.sum() * 0.5)
    z = mode.compile(lambda y: y * 2.0)(y)
    cts = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 5.0]])
    (found,) = mode.grad(z, x, cts, is_grads_batched=True, create_graph=create_graph)
    # Twice the cotangent, times half of its own sum, times 2x.
    values = np.array([3.0, 1.0])
    assert found.tolist() == [(2 * row * 0.5 * (2 * row.sum()) * 2 * values).tolist() for row in np.asarray(cts)]


@each_mode
def test_hook_runs_once_for_a_batch(mode, seen):
    x = leaf(3.0, 1.0)
    y = x * x
    y.register_hook(lambda g: seen.append(g.shape))
    mode.grad(mode.compile(lambda y: y * 2.0)(y), x, jnp.eye(2), is_grads_batched=True)
    assert seen == [(2,)]


@each_mode
def test_batch_of_cotangents_with_history(mode):
    values, cts = jnp.array([0.5, -1.0]), jnp.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]])
    x, ct = jhop.tensor(values, requires_grad=True), jhop.tensor(cts, requires_grad=True)
    y = mode.compile(lambda x: model(hnp, x))(x)
    (found,) = mode.grad(y, x, ct, is_grads_batched=True, create_graph=True)
    second = mode.grad((found * found).sum(), [x, ct])

    def squares(v, c):
        rows = jax.vmap(lambda one: jax.vjp(lambda u: model(jnp, u), v)[1](one)[0])(c)
        return (rows * rows).sum()

    for got, want in zip(second, jax.grad(squares, argnums=(0, 1))(values, cts), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_several_outputs_in_a_batch():
    x = leaf(3.0, 1.0)
    cts = [jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 10.0]])]
    (found,) = grad([(x * x).sum(), x * 5.0], x, cts, is_grads_batched=True)
    assert found.tolist() == [[11.0, 2.0], [12.0, 54.0]]


def test_unused_input_in_a_batch_gives_none():
    x, unused = leaf(3.0), leaf(1.0)
    found = grad(x * 2.0, [x, unused], jnp.ones((4, 1)), is_grads_batched=True, allow_unused=True)
    assert (found[0].shape, found[1]) == ((4, 1), None)


class Meter:
    """A hook with state: a count, which is the same for all examples, or what it was given, which is not."""

    def __init__(self, keep):
        self.keep = keep
        self.count = 0
        self.last = None

    def __call__(self, g):
        self.count += 1
        if self.keep:
            self.last = g


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_batch_counts_in_a_hook(inside):
    meter, x = Meter(keep=False), leaf(3.0, 1.0)

    def fn(x):
        y = x * 2.0
        if inside:
            y.register_hook(meter)
        return y

    y = jhop.compile(fn)(x)
    if not inside:
        y.register_hook(meter)
    grad(y, x, jnp.eye(2), is_grads_batched=True)
    assert (type(meter.count), meter.count) == (int, 1)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_batch_does_not_leak_one_example_into_state(inside):
    meter, x = Meter(keep=True), leaf(3.0, 1.0)
    meter.last = jnp.zeros(2)

    def fn(x):
        y = x * 2.0
        if inside:
            y.register_hook(meter)
        return y

    y = jhop.compile(fn)(x)
    if not inside:
        y.register_hook(meter)
    with pytest.raises(jhop.Unsupported, match="differs from example to example"):
        grad(y, x, jnp.eye(2), is_grads_batched=True)
    assert (meter.count, meter.last.tolist()) == (0, [0.0, 0.0])


def test_batch_through_a_retained_gradient_is_refused():
    x = leaf(3.0)
    y = x * 2.0
    y.retain_grad()
    with pytest.raises(jhop.JhopError, match="retain_grad"):
        grad(y, x, jnp.ones((2, 1)), is_grads_batched=True)


@pytest.mark.parametrize(
    "cts", [None, jnp.float32(1.0), [jnp.ones((2, 1)), jnp.ones((3, 1))], [None, jnp.ones((2, 1))]],
    ids=["none", "no axis", "two lengths", "one missing"],
)  # fmt: skip
def test_bad_batches(cts):
    x = leaf(3.0)
    outputs = [x * 2.0, x * 3.0] if isinstance(cts, list) else x * 2.0
    with pytest.raises(jhop.JhopError, match="one more axis"):
        grad(outputs, x, cts, is_grads_batched=True)


def test_batch_of_another_shape_is_refused():
    with pytest.raises(jhop.JhopError, match=r"expected shape \(1,\)"):
        grad((x := leaf(3.0)) * 2.0, x, jnp.ones((2, 3)), is_grads_batched=True)


# Compiled autograd.


def test_capture_with_inputs_is_used_again_for_the_same_inputs_only():
    captured = []

    def compiler(gm):
        captured.append(gm)
        return jhop.compile(gm, fullgraph=True)

    x, w = leaf(3.0), leaf(5.0)
    with jhop.compiled_autograd.enable(compiler):
        found = [grad(x * w, by)[0].tolist() for by in (x, x, w, x)]
        (x * w).backward()
        (x * w).backward(inputs=[x])
    assert (found, len(captured)) == ([[5.0], [5.0], [3.0], [5.0]], 4)
    assert (x.grad.tolist(), w.grad.tolist()) == ([10.0], [3.0])


def test_captured_gradients_are_outputs_of_the_graph():
    captured = []
    x = scalar(3.0)
    y = x * 2.0
    with jhop.compiled_autograd.enable(lambda gm: captured.append(gm) or gm):
        grad(y * y, [y, x])
    (gm,) = captured
    text = gm.print_readable(False)
    assert len(gm.graph.nodes[-1].args) == 2
    assert "AccumulateGrad" not in text
