"""Tensors: what is recorded, when hooks run and on which value, and what ends up in `.grad`."""

import contextlib
import copy
import functools
import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
import jhop.numpy as hnp


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: lifted operations stay compiled, and must not notice."""


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def scalar(value):
    return jhop.tensor(value, requires_grad=True)


def times(factor):
    return lambda grad: grad * factor


@pytest.fixture
def seen():
    """A list, for hooks that note what they are given."""
    return []


def noting(seen, label=None):
    def hook(grad):
        seen.append(grad.tolist() if label is None else label)

    return hook


# When a hook runs, and on what.


def test_hook_runs_once_on_the_sum_over_all_uses(seen):
    x = leaf(1.0, 1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    (y + 1.0 + y * 3.0).sum().backward()
    assert seen == [[4.0, 4.0]]


def test_hook_changes_the_sum():
    x = leaf(1.0, 1.0)
    y = x * 2.0
    y.register_hook(times(2.0))
    (y + 1.0 + y * 3.0).sum().backward()
    assert x.grad.tolist() == [16.0, 16.0]


@pytest.mark.parametrize("when", ["before uses", "between uses", "after uses"])
def test_nonlinear_hook_does_not_depend_on_when_it_was_registered(when):
    x = leaf(1.0)
    y = x * 2.0
    if when == "before uses":
        y.register_hook(lambda grad: grad.clip(max=5.0))
    z = y * 4.0
    if when == "between uses":
        y.register_hook(lambda grad: grad.clip(max=5.0))
    out = (z + y * 3.0).sum()
    if when == "after uses":
        y.register_hook(lambda grad: grad.clip(max=5.0))
    out.backward()
    assert x.grad.tolist() == [10.0]  # per use, the clip would leave 4 + 3 as it is: 14


def test_leaf_hook_sees_the_sum_of_all_paths(seen):
    x = leaf(2.0)
    x.register_hook(noting(seen))
    (x * 3.0 + x * x).sum().backward()
    assert seen == [[7.0]]


def test_leaf_hook_sees_the_sum_of_both_operands(seen):
    x = leaf(2.0)
    x.register_hook(noting(seen))
    (x * x).sum().backward()
    assert seen == [[4.0]]


def test_hook_off_the_path_does_not_run(seen):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    (x * 3.0).sum().backward()
    assert seen == []


def test_hook_before_a_detached_path_does_not_run(seen):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    (y.detach() * x).sum().backward()
    assert seen == []


def test_hook_on_an_output_that_nothing_uses_does_not_run(seen):
    x = leaf(1.0, 2.0)
    a, b = hnp.split(x, 2)
    b.register_hook(noting(seen))
    (a * 3.0).sum().backward()
    assert seen == []


def test_hook_of_the_other_output_runs():
    x = leaf(1.0, 2.0)
    a, b = hnp.split(x, 2)
    a.register_hook(times(5.0))
    b.register_hook(times(100.0))
    (a * 3.0).sum().backward()
    assert x.grad.tolist() == [15.0, 0.0]


def test_hook_under_a_product_with_zero_gets_zero(seen):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    (y * 0.0).sum().backward()
    assert seen == [[0.0]]


def test_hook_sees_this_backward_and_not_the_accumulated_gradient(seen):
    x = leaf(1.0)
    x.register_hook(noting(seen))
    for _ in range(2):
        (x * 2.0).sum().backward()
    assert (seen, x.grad.tolist()) == ([[2.0], [2.0]], [4.0])


def test_hook_runs_at_each_backward_of_a_kept_graph(seen):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    out = y.sum()
    for _ in range(3):
        out.backward(retain_graph=True)
    assert seen == [[1.0]] * 3


def test_hooks_of_a_chain_run_backwards(seen):
    x = leaf(1.0)
    a = x * 2.0
    b = a * 2.0
    c = b * 2.0
    for tensor, label in ((x, "x"), (a, "a"), (b, "b"), (c, "c")):
        tensor.register_hook(noting(seen, label))
    c.sum().backward()
    assert seen == ["c", "b", "a", "x"]


def test_of_two_siblings_the_later_one_runs_first(seen):
    x = leaf(1.0)
    a = x * 2.0
    b = x * 3.0
    a.register_hook(noting(seen, "a"))
    b.register_hook(noting(seen, "b"))
    (a + b).sum().backward()
    assert seen == ["b", "a"]


def test_hook_on_the_root_sees_the_incoming_gradient(seen):
    x = leaf(1.0, 1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    y.backward(jnp.array([3.0, -1.0]))
    assert seen == [[3.0, -1.0]]


def test_hook_on_a_leaf_that_is_the_root():
    x = leaf(1.0, 2.0)
    x.register_hook(times(10.0))
    x.backward(jnp.array([3.0, 4.0]))
    assert x.grad.tolist() == [30.0, 40.0]


def test_hook_on_a_diamond_sees_the_whole_sum(seen):
    x = leaf(1.0)
    top = x * 2.0
    left, right = top * 3.0, top * 5.0
    top.register_hook(noting(seen))
    (left * right).sum().backward()
    assert seen == [[2 * 15.0 * 2.0]]


def test_hook_gets_an_array(seen):
    x = leaf(1.0)
    x.register_hook(lambda grad: seen.append(type(grad)))
    (x * 2.0).sum().backward()
    assert issubclass(seen[0], jax.Array)


# What a hook returns.


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        ([lambda g: None], 2.0),
        ([times(3.0)], 6.0),
        ([lambda g: g + 1.0, times(10.0)], 30.0),
        ([times(10.0), lambda g: g + 1.0], 21.0),
        ([lambda g: None, times(10.0)], 20.0),
        ([times(10.0), lambda g: None, lambda g: g + 1.0], 21.0),
        ([functools.partial(jnp.multiply, jnp.float32(4.0))], 8.0),
        ([jnp.negative], -2.0),
    ],
    ids=["none keeps", "replaces", "chain", "chain the other way", "none first", "none between", "partial", "ufunc"],
)
@pytest.mark.parametrize("of", ["leaf", "intermediate"])
def test_chain_of_hooks(hooks, expected, of):
    x = leaf(1.0)
    y = x * 1.0
    for hook in hooks:
        (x if of == "leaf" else y).register_hook(hook)
    (y * 2.0).sum().backward()
    assert x.grad.tolist() == [expected]


def test_same_hook_twice_runs_twice():
    x, double = leaf(1.0), times(2.0)
    x.register_hook(double)
    x.register_hook(double)
    (x * 1.0).sum().backward()
    assert x.grad.tolist() == [4.0]


def test_callable_object_is_a_hook():
    class Scale:
        def __call__(self, grad):
            return grad * 7.0

    x = leaf(1.0)
    x.register_hook(Scale())
    (x * 1.0).sum().backward()
    assert x.grad.tolist() == [7.0]


def test_bound_method_is_a_hook():
    class Scale:
        factor = 7.0

        def apply(self, grad):
            return grad * self.factor

    x = leaf(1.0)
    x.register_hook(Scale().apply)
    (x * 1.0).sum().backward()
    assert x.grad.tolist() == [7.0]


def test_hook_may_return_a_numpy_array():
    x = leaf(1.0)
    x.register_hook(lambda grad: np.array([9.0], np.float32))
    (x * 1.0).sum().backward()
    assert x.grad.tolist() == [9.0]


def test_hook_may_return_a_tensor():
    x, factor = leaf(1.0), jhop.tensor([3.0])
    x.register_hook(lambda grad: factor * grad)
    (x * 1.0).sum().backward()
    assert x.grad.tolist() == [3.0]


def test_gradient_is_an_array_though_the_hook_returned_a_tensor():
    x, factor = leaf(1.0), jhop.tensor([3.0])
    x.register_hook(lambda grad: factor * grad)
    (x * 1.0).sum().backward()
    assert isinstance(x.grad, jax.Array)


def test_hook_counts_in_python_at_each_backward():
    x, calls = leaf(1.0), []
    x.register_hook(calls.append)
    for _ in range(3):
        (x * 2.0).sum().backward()
    assert len(calls) == 3


def test_exception_in_a_hook_is_the_callers():
    def hook(grad):
        raise LookupError("mine")

    x = leaf(1.0)
    x.register_hook(hook)
    with pytest.raises(LookupError, match="mine"):
        (x * 2.0).sum().backward()


def test_exception_in_a_hook_leaves_every_gradient():
    def hook(grad):
        raise LookupError("mine")

    x, y = leaf(1.0), leaf(2.0)
    y.grad = jnp.array([5.0])
    x.register_hook(hook)
    out = (x * y).sum()
    with pytest.raises(LookupError):
        out.backward()
    assert (x.grad, y.grad.tolist()) == (None, [5.0])


def test_backward_may_be_repeated_after_an_exception_in_a_hook():
    fail = [True]

    def hook(grad):
        if fail:
            raise LookupError("mine")

    x = leaf(3.0)
    x.register_hook(hook)
    out = (x * x).sum()
    with pytest.raises(LookupError):
        out.backward()
    fail.clear()
    out.backward()
    assert x.grad.tolist() == [6.0]


# Handles.


def test_removed_hook_does_not_run():
    x = leaf(1.0)
    handle = x.register_hook(times(10.0))
    handle.remove()
    (x * 2.0).sum().backward()
    assert x.grad.tolist() == [2.0]


def test_hook_removed_between_forward_and_backward_does_not_run():
    x = leaf(1.0)
    y = x * 1.0
    handle = y.register_hook(times(10.0))
    out = (y * 2.0).sum()
    handle.remove()
    out.backward()
    assert x.grad.tolist() == [2.0]


def test_hook_registered_between_forward_and_backward_runs():
    x = leaf(1.0)
    y = x * 2.0
    z = y * 3.0
    y.register_hook(times(5.0))
    z.sum().backward()
    assert x.grad.tolist() == [30.0]


def test_removing_twice_is_no_error():
    x = leaf(1.0)
    first, _ = x.register_hook(times(10.0)), x.register_hook(times(3.0))
    first.remove()
    first.remove()
    (x * 2.0).sum().backward()
    assert x.grad.tolist() == [6.0]


def test_handle_removes_one_of_two_registrations_of_a_hook():
    x, triple = leaf(1.0), times(3.0)
    x.register_hook(triple)
    x.register_hook(triple).remove()
    (x * 2.0).sum().backward()
    assert x.grad.tolist() == [6.0]


def test_handle_as_context_manager():
    x = leaf(1.0)
    with x.register_hook(times(5.0)):
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [10.0]
    (x * 2.0).sum().backward()
    assert x.grad.tolist() == [12.0]


def test_handle_as_context_manager_removes_after_an_exception(seen):
    x = leaf(1.0)
    with pytest.raises(KeyError), x.register_hook(noting(seen)):
        raise KeyError
    (x * 2.0).sum().backward()
    assert seen == []


def test_hook_that_removes_itself_runs_this_time_only(seen):
    x = leaf(1.0)

    def once(grad):
        handle.remove()
        seen.append("once")
        return grad * 5.0

    handle = x.register_hook(once)
    for _ in range(2):
        (x * 2.0).sum().backward()
    assert (seen, x.grad.tolist()) == (["once"], [12.0])


def test_hook_that_removes_a_later_one_counts_from_the_next_backward(seen):
    x = leaf(1.0)
    x.register_hook(lambda grad: (later.remove(), seen.append("a"))[1])
    later = x.register_hook(noting(seen, "b"))
    for _ in range(2):
        (x * 2.0).sum().backward()
    assert seen == ["a", "b", "a"]


def test_hook_that_registers_another_counts_from_the_next_backward(seen):
    x = leaf(1.0)

    def first(grad):
        seen.append("first")
        if len(seen) == 1:
            x.register_hook(noting(seen, "second"))

    x.register_hook(first)
    for _ in range(2):
        (x * 2.0).sum().backward()
    assert seen == ["first", "first", "second"]


def test_handle_outlives_its_tensor():
    handle = leaf(1.0).register_hook(times(2.0))
    gc.collect()
    handle.remove()


def test_tensor_and_hook_are_freed():
    x, hook = leaf(1.0), times(2.0)
    x.register_hook(hook)
    (x * 2.0).sum().backward()
    alive = weakref.ref(x), weakref.ref(hook)
    del x, hook
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_intermediate_hook_stays_though_its_tensor_is_gone():
    x = leaf(1.0)

    def forward():
        y = x * 2.0
        y.register_hook(times(5.0))
        return (y * 3.0).sum()

    out = forward()
    gc.collect()
    out.backward()
    assert x.grad.tolist() == [30.0]


def test_detach_leaves_hooks_behind(seen):
    x = leaf(1.0)
    x.register_hook(noting(seen))
    (x.detach().requires_grad_() * 2.0).sum().backward()
    assert seen == []


# Gradients.


def test_gradients_accumulate():
    x = leaf(1.0, 2.0)
    for _ in range(3):
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]


def test_gradient_starts_anew_after_none():
    x = leaf(1.0)
    (x * 2.0).sum().backward()
    x.grad = None
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [3.0]


def test_gradient_is_added_to_one_that_was_set():
    x = leaf(1.0)
    x.grad = np.array([0.5], np.float32)
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [3.5]


def test_earlier_gradient_array_is_not_changed():
    x = leaf(1.0)
    (x * 2.0).sum().backward()
    before = x.grad
    (x * 2.0).sum().backward()
    assert before.tolist() == [2.0]


def test_intermediate_has_no_gradient():
    x = leaf(1.0)
    y = x * 2.0
    y.sum().backward()
    assert y.grad is None


@pytest.mark.parametrize("first", ["retain_grad", "register_hook"])
def test_retained_gradient_is_the_one_after_all_hooks(first):
    x = leaf(1.0)
    y = x * 2.0
    if first == "retain_grad":
        y.retain_grad()
    y.register_hook(times(10.0))
    y.retain_grad()
    y.sum().backward()
    assert (y.grad.tolist(), x.grad.tolist()) == ([10.0], [20.0])


def test_retained_gradients_accumulate():
    x = leaf(1.0)
    y = x * 2.0
    y.retain_grad()
    out = y.sum()
    out.backward(retain_graph=True)
    out.backward()
    assert y.grad.tolist() == [2.0]


def test_retain_grad_says_so():
    y = leaf(1.0) * 2.0
    before = y.retains_grad
    y.retain_grad()
    assert (before, y.retains_grad) == (False, True)


def test_retain_grad_is_nothing_new_for_a_leaf():
    x = leaf(1.0)
    x.retain_grad()
    (x * 2.0).sum().backward()
    assert (x.retains_grad, x.grad.tolist()) == (False, [2.0])


def test_post_accumulate_hook_sees_the_accumulated_gradient(seen):
    x = leaf(1.0)
    x.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.tolist()))
    for _ in range(2):
        (x * 2.0).sum().backward()
    assert seen == [[2.0], [4.0]]


def test_post_accumulate_hook_gets_the_leaf(seen):
    x = leaf(1.0)
    x.register_post_accumulate_grad_hook(seen.append)
    (x * 2.0).sum().backward()
    assert len(seen) == 1 and seen[0] is x


def test_post_accumulate_hooks_run_in_order(seen):
    x = leaf(1.0)
    for label in "pq":
        x.register_post_accumulate_grad_hook(functools.partial(lambda label, _: seen.append(label), label))
    x.register_hook(noting(seen, "tensor"))
    (x * 2.0).sum().backward()
    assert seen == ["tensor", "p", "q"]


def test_post_accumulate_hook_may_clear_the_gradient():
    x = leaf(1.0)

    def clear(tensor):
        tensor.grad = None

    x.register_post_accumulate_grad_hook(clear)
    (x * 2.0).sum().backward()
    assert x.grad is None


def test_removed_post_accumulate_hook_does_not_run(seen):
    x = leaf(1.0)
    x.register_post_accumulate_grad_hook(seen.append).remove()
    (x * 2.0).sum().backward()
    assert seen == []


def test_second_backward_through_a_kept_graph_adds():
    x = leaf(3.0)
    out = (x * x).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert x.grad.tolist() == [12.0]


def test_backward_takes_a_tensor_or_an_array_as_gradient():
    x, y = leaf(1.0, 2.0), leaf(1.0, 2.0)
    (x * 2.0).backward(jhop.tensor([1.0, 3.0]))
    (y * 2.0).backward(np.array([1.0, 3.0], np.float32))
    assert x.grad.tolist() == y.grad.tolist() == [2.0, 6.0]


def test_backward_returns_none():
    assert (leaf(1.0) * 2.0).sum().backward() is None


def test_backward_of_one_element_needs_no_gradient():
    x = jhop.tensor([[2.0]], requires_grad=True)
    (x * x).backward()
    assert x.grad.tolist() == [[4.0]]


def test_autograd_backward_adds_over_several_roots():
    x = leaf(1.0)
    y = x * 2.0
    jhop.autograd.backward([y.sum(), (y * 3.0).sum()])
    assert x.grad.tolist() == [8.0]


def test_autograd_backward_counts_a_root_given_twice_twice():
    out = (x := leaf(1.0)) * 2.0
    jhop.autograd.backward([out, out])
    assert x.grad.tolist() == [4.0]


def test_autograd_backward_runs_a_shared_hook_once(seen):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(noting(seen))
    jhop.autograd.backward([(y * 3.0).sum(), (y * 4.0).sum()])
    assert seen == [[7.0]]


# What requires grad.


def test_result_requires_grad_if_an_operand_does():
    x, constant = leaf(1.0), jhop.tensor([2.0])
    assert [(x * constant).requires_grad, (constant * x).requires_grad] == [True, True]


def test_result_of_constants_requires_no_grad():
    assert not (jhop.tensor([2.0]) * jhop.tensor([2.0])).requires_grad


def test_constant_gets_no_gradient():
    x, constant = leaf(1.0), jhop.tensor([2.0])
    (x * constant).sum().backward()
    assert constant.grad is None


def test_detached_value_is_a_constant():
    x = leaf(3.0)
    (x * x.detach()).sum().backward()
    assert x.grad.tolist() == [3.0]


def test_nothing_is_recorded_under_no_grad():
    x = leaf(1.0)
    with jhop.autograd.no_grad():
        y = x * 2.0
    assert (y.requires_grad, y.is_leaf, y.grad_fn) == (False, True, None)


def test_enable_grad_inside_no_grad_records():
    x = leaf(1.0)
    with jhop.autograd.no_grad(), jhop.autograd.enable_grad():
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [2.0]


def test_no_grad_ends_after_an_exception():
    with pytest.raises(KeyError), jhop.autograd.no_grad():
        raise KeyError
    assert (leaf(1.0) * 2.0).requires_grad


def test_no_grad_inside_enable_grad_inside_no_grad_nests():
    x, flags = leaf(1.0), []
    with jhop.autograd.no_grad():
        with jhop.autograd.enable_grad():
            with jhop.autograd.no_grad():
                flags.append((x * 1.0).requires_grad)
            flags.append((x * 1.0).requires_grad)
        flags.append((x * 1.0).requires_grad)
    assert flags == [False, True, False]


def test_operations_in_a_hook_are_not_recorded(seen):
    x, other = leaf(1.0), leaf(2.0)
    x.register_hook(lambda grad: seen.append((other * 3.0).requires_grad))
    (x * 2.0).sum().backward()
    assert seen == [False]


def test_requires_grad_may_be_set_later():
    x = jhop.tensor([2.0])
    assert x.requires_grad_() is x
    (x * x).sum().backward()
    assert x.grad.tolist() == [4.0]


def test_requires_grad_may_be_withdrawn():
    x = leaf(2.0)
    x.requires_grad_(False)
    assert not (x * x).requires_grad


def test_leaf_and_result_say_what_they_are():
    x = leaf(1.0)
    y = x * 2.0
    assert (x.is_leaf, y.is_leaf, x.grad_fn, y.grad_fn.name()) == (True, False, None, "MultiplyBackward")


def test_next_functions_lead_to_the_leaves():
    x, y = leaf(1.0), leaf(2.0)
    nodes = [node.name() for node, _ in (x * y).grad_fn.next_functions]
    assert nodes == ["AccumulateGrad", "AccumulateGrad"]


def test_equal_leaves_have_one_accumulator():
    x = leaf(1.0)
    (first, _), (second, _) = (x * x).grad_fn.next_functions
    assert first is second


# jhop.numpy and lift, against jax.grad.


def grads_agree(fn, *values):
    """Whether jhop's gradients of `fn(module, *tensors)` are those of `jax.grad` on `jax.numpy`."""
    tensors = [jhop.tensor(value, requires_grad=True) for value in values]
    fn(hnp, *tensors).sum().backward()
    arrays = [jnp.asarray(value) for value in values]
    expected = jax.grad(lambda *args: fn(jnp, *args).sum(), argnums=tuple(range(len(values))))(*arrays)
    for tensor, grad in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.grad, grad, rtol=2e-6, atol=1e-7)


A = [[0.5, -1.0, 2.0], [3.0, 0.25, -0.75]]
B = [[1.5, 2.0, -0.5], [0.1, 0.2, 0.3]]


@pytest.mark.parametrize(
    "fn",
    [
        lambda np_, a, b: np_.sin(a) * np_.exp(b),
        lambda np_, a, b: np_.concatenate([a, b * 2.0, a], axis=1) ** 2,
        lambda np_, a, b: np_.split(a, 3, axis=1)[1] * b,
        lambda np_, a, b: np_.where(a > b, a * a, b * 3.0),
        lambda np_, a, b: np_.einsum("ij,kj->ik", a, b) ** 2,
        lambda np_, a, b: a @ b.T,
        lambda np_, a, b: a[0] * b[1, ::-1],
        lambda np_, a, b: a[..., None, 1:] * b[0, 0],
        lambda np_, a, b: a[jnp.array([0, 0, 1])] * a[jnp.array([1, 0, 1])] + b[0],
        lambda np_, a, b: np_.maximum(a, b).reshape(3, 2) * a.T,
        lambda np_, a, b: a.mean(axis=0) * b.max(axis=1, keepdims=True),
        lambda np_, a, b: np_.clip(a, -0.9, 0.9) * b.cumsum(axis=1),
        lambda np_, a, b: np_.pad(a, ((1, 0), (0, 1)), constant_values=2.0) * 3.0 + b.sum(),
        lambda np_, a, b: a.swapaxes(0, 1).ravel() * b.flatten(),
        lambda np_, a, b: abs(a) ** 1.5 / (b * b + 1.0) - (-a),
    ],
)  # fmt: skip
def test_gradients_of_numpy_functions(fn):
    grads_agree(fn, A, B)


def test_index_by_a_numpy_mask():
    x = leaf(1.0, 2.0, 3.0)
    x[np.array([True, False, True])].sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


def test_numpy_integer_as_axis():
    x = leaf(1.0, 2.0)
    x.sum(axis=np.int64(0)).backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_functions_of_submodules_are_lifted():
    x = leaf(3.0, 4.0)
    hnp.linalg.norm(x).backward()
    np.testing.assert_allclose(x.grad, [0.6, 0.8], rtol=1e-6)


def test_pytree_in_and_out():
    x = leaf(1.0, 2.0, 3.0, 4.0)
    out = jhop.lift(lambda tree: {"sum": tree["a"][0] + tree["a"][1], "first": (tree["a"][0],)})
    result = out({"a": [x, 3.0 * x]})
    result["sum"].register_hook(times(10.0))
    (result["sum"] + result["first"][0]).sum().backward()
    assert x.grad.tolist() == [41.0] * 4


def test_lift_of_any_jax_function():
    x = leaf(0.0, 1.0)
    y = jhop.lift(jax.nn.softplus)(x)
    y.register_hook(times(2.0))
    y.sum().backward()
    np.testing.assert_allclose(x.grad, 2.0 * jax.nn.sigmoid(jnp.array([0.0, 1.0])), rtol=1e-6)


def test_lift_keeps_static_arguments():
    grads_agree(lambda np_, a: jhop.lift(jax.nn.softmax)(a, axis=0) ** 2, A)


def test_lift_makes_one_node():
    y = jhop.lift(jax.nn.softplus)(leaf(1.0))
    assert [node.name() for node, _ in y.grad_fn.next_functions] == ["AccumulateGrad"]


def test_lift_takes_a_jitted_function():
    x = leaf(2.0)
    jhop.lift(jax.jit(lambda v: v**3))(x).sum().backward()
    assert x.grad.tolist() == [12.0]


def test_lift_takes_a_hooked_function():
    x = leaf(2.0)
    jhop.lift(lambda v: jhop.hook(v, lambda ct: ct * ct) * 3.0)(x).sum().backward()
    assert x.grad.tolist() == [9.0]


def test_function_without_tensors_is_jax_numpys_own():
    assert isinstance(hnp.sin(jnp.array([1.0])), jax.Array)


def test_what_is_no_function_is_the_same_object():
    assert (hnp.float32, hnp.pi, hnp.newaxis) == (jnp.float32, jnp.pi, jnp.newaxis)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="jhop.numpy has no attribute 'not_there'"):
        _ = hnp.not_there


# Operators.

OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}
OTHERS = {
    "int": 3,
    "float": 1.5,
    "jax array": jnp.array([2.0, 0.5]),
    "numpy array": np.array([2.0, 0.5], np.float32),
    "numpy scalar": np.float32(1.5),
    "tensor": "tensor",
}


PAIRS = [(name, "float") for name in OPERATORS] + [("-", other) for other in OTHERS if other != "float"]


@pytest.mark.parametrize(("name", "other"), PAIRS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_operators(name, other, side):
    given, operator = OTHERS[other], OPERATORS[name]
    given = jhop.tensor([2.0, 0.5]) if other == "tensor" else given
    raw = given.value if other == "tensor" else given
    values = jnp.array([1.25, 2.5])
    x = jhop.tensor(values, requires_grad=True)
    y = operator(x, given) if side == "left" else operator(given, x)
    y.sum().backward()
    expected = jax.grad(lambda v: (operator(v, raw) if side == "left" else operator(raw, v)).sum())(values)
    np.testing.assert_allclose(x.grad, expected, rtol=2e-6)


@pytest.mark.parametrize("other", ["jax array", "numpy array"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_matmul_operator(side, other):
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    given = jnp.asarray(matrix) if other == "jax array" else matrix
    x = leaf(1.0, 1.0)
    (x @ given if side == "left" else given @ x).sum().backward()
    assert x.grad.tolist() == ([3.0, 7.0] if side == "left" else [4.0, 6.0])


@pytest.mark.parametrize("other", ["jax array", "numpy array", "float"])
def test_reflected_result_is_a_tensor_on_the_tape(other):
    assert (OTHERS[other] * leaf(1.0, 2.0)).requires_grad


@pytest.mark.parametrize("operator", ["__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"])
def test_comparisons_are_elementwise_and_carry_no_gradient(operator):
    x, values = leaf(1.0, 2.0, 3.0), jnp.array([1.0, 2.0, 3.0])
    result = getattr(x, operator)(2.0)
    assert (result.tolist(), result.requires_grad) == (getattr(values, operator)(2.0).tolist(), False)


def test_operator_with_a_stranger_is_a_type_error():
    with pytest.raises(TypeError, match="unsupported operand"):
        leaf(1.0) + "one"


def test_integer_power_has_a_gradient_at_zero():
    x = leaf(0.0)
    (x**2).sum().backward()
    assert x.grad.tolist() == [0.0]


def test_unary_operators():
    x = leaf(-2.0)
    (-x + abs(x) + (+x)).sum().backward()
    assert x.grad.tolist() == [-1.0]


def test_broadcast_operand_gets_its_own_shape():
    row, table = leaf(1.0, 2.0), jhop.tensor([[1.0, 1.0], [2.0, 3.0], [4.0, 5.0]], requires_grad=True)
    (row * table).sum().backward()
    assert (row.grad.tolist(), table.grad.shape) == ([7.0, 9.0], (3, 2))


# Integers and other dtypes.


def test_integer_tensors_compute_without_a_tape():
    n = jhop.tensor([1, 2]) * 3
    assert (n.tolist(), n.dtype, n.requires_grad) == ([3, 6], jnp.int32, False)


def test_integer_operand_of_a_floating_result():
    x, index = leaf(1.0, 2.0, 3.0), jhop.tensor([2, 0])
    x[index].sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 1.0]


def test_integer_output_of_a_recorded_function_carries_no_gradient():
    x = leaf(1.0, 3.0, 2.0)
    assert (x.argmax().item(), x.argmax().requires_grad) == (1, False)


def test_function_with_integer_and_floating_outputs():
    x = leaf(3.0, 1.0)
    order, values = jhop.lift(lambda v: (jnp.argsort(v), jnp.sort(v)))(x)
    (values * jnp.array([1.0, 10.0])).sum().backward()
    assert (order.requires_grad, order.tolist(), x.grad.tolist()) == (False, [1, 0], [10.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_gradient_has_the_dtype_of_its_leaf(dtype):
    x = jhop.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    x.register_hook(times(2.0))
    (x * 3.0).sum().backward()
    assert (x.grad.dtype, x.grad.tolist()) == (dtype, [6.0, 6.0])


def test_double_precision():
    with jax.enable_x64(True):
        x = jhop.tensor(np.array([1.0 / 3.0]), requires_grad=True)
        x.register_hook(lambda grad: grad / 3.0)
        (x * x).sum().backward()
        assert (x.grad.dtype, x.grad.tolist()) == (jnp.float64, [(2.0 / 3.0) / 3.0])


def test_complex_gradient_is_jaxs():
    z = jhop.tensor([1.0 + 2.0j], requires_grad=True)
    jhop.numpy.abs(z * z).sum().backward()
    expected = jax.grad(lambda v: jnp.abs(v * v).sum())(jnp.array([1.0 + 2.0j]))
    np.testing.assert_allclose(z.grad, expected, rtol=1e-6)


# Long tapes.


def test_long_chain_needs_no_recursion(seen):
    x = leaf(1.0)
    y = x
    for _ in range(2_000):
        y = y + 1.0
    x.register_hook(noting(seen))
    y.sum().backward()
    assert seen == [[1.0]]


def test_long_chain_is_freed_without_recursion():
    y = leaf(1.0)
    for _ in range(5_000):
        y = y + 1.0
    del y


def test_wide_fan_out_is_summed_before_the_hook(seen):
    x = leaf(1.0)
    y = x * 1.0
    y.register_hook(noting(seen))
    total = y
    for _ in range(99):
        total = total + y
    total.sum().backward()
    assert seen == [[100.0]]


# Leaving the tape.


@pytest.mark.parametrize("function", [jnp.sin, jnp.sum, lambda t: jnp.add(jnp.ones(2), t), lambda t: jnp.stack([t, t])])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_tensor_in_jax_numpy_is_refused(function, requires_grad):
    with pytest.raises(jhop.JhopError, match=r"jhop\.numpy"):
        function(jhop.tensor([1.0, 2.0], requires_grad=requires_grad))


@pytest.mark.parametrize("convert", [np.asarray, np.array, lambda t: t.numpy(), lambda t: np.add(t, 1.0)])
def test_numpy_of_a_tensor_that_requires_grad_is_refused(convert):
    with pytest.raises(jhop.JhopError, match="requires grad"):
        convert(leaf(1.0, 2.0))


@pytest.mark.parametrize("convert", [np.asarray, np.array, lambda t: t.numpy()])
def test_numpy_of_a_constant_tensor(convert):
    result = convert(jhop.tensor([1.0, 2.0]))
    assert (type(result), result.dtype, result.tolist()) == (np.ndarray, np.float32, [1.0, 2.0])


def test_numpy_of_a_constant_tensor_as_another_dtype():
    assert np.asarray(jhop.tensor([1.0, 2.0]), np.float64).dtype == np.float64


def test_numpy_of_a_detached_tensor():
    assert np.asarray(leaf(1.0, 2.0).detach()).tolist() == [1.0, 2.0]


def test_numbers_and_lists():
    x = jhop.tensor([2.5], requires_grad=True)
    assert (x.item(), float(x[0]), int(x[0]), bool(x[0]), len(x), x.tolist()) == (2.5, 2.5, 2, True, 1, [2.5])


def test_iteration_ends():
    assert len(list(itertools.islice(leaf(1.0, 2.0), 5))) == 2


def test_iteration_gives_tensors_on_the_tape():
    x = leaf(1.0, 2.0)
    a, b = itertools.islice(x, 2)
    (a * 3.0 + b * 5.0).backward()
    assert x.grad.tolist() == [3.0, 5.0]


def test_repr_says_what_made_it():
    assert repr(leaf(1.0) * 2.0).endswith("grad_fn=<MultiplyBackward>)")


def test_repr_of_a_leaf():
    assert repr(leaf(1.0)).endswith("requires_grad=True)")


def test_repr_of_a_constant():
    assert repr(jhop.tensor([1.0])) == "jhop.tensor([1.], dtype=float32)"


def test_tensor_of_a_tensor_is_a_new_leaf():
    x = leaf(1.0)
    y = jhop.tensor(x * 2.0, requires_grad=True)
    (y * 3.0).sum().backward()
    assert (y.is_leaf, y.grad.tolist(), x.grad) == (True, [3.0], None)


def test_changing_the_numpy_array_a_tensor_was_made_of_changes_nothing():
    data = np.array([1.0, 2.0], np.float32)
    x = jhop.tensor(data)
    data[0] = 9.0
    assert x.tolist() == [1.0, 2.0]


def test_tensors_are_hashed_by_identity():
    x, y = leaf(1.0), leaf(1.0)
    assert len({x, y, x}) == 2


def test_deep_copy_of_a_leaf_drops_its_hooks(seen):
    x = leaf(1.0)
    x.register_hook(noting(seen))
    (copy.deepcopy(x) * 2.0).sum().backward()
    assert seen == []


AT = {
    "set": lambda x, v: x.at[0].set(v),
    "add": lambda x, v: x.at[:, 1].add(5.0) * v,
    "subtract": lambda x, v: x.at[1, jnp.array([0, 2])].subtract(v[:2]),
    "multiply": lambda x, v: x.at[..., ::2].multiply(v[1:]),
    "mul": lambda x, v: x.at[-1].mul(v),
    "divide": lambda x, v: x.at[0, 1].divide(v[2]),
    "power": lambda x, v: x.at[1].power(2) * v,
    "max": lambda x, v: x.at[0].max(v),
    "min": lambda x, v: x.at[1].min(v),
    "get": lambda x, v: x.at[jnp.array([0, 7])].get(mode="clip") * v,
    "filled": lambda x, v: x.at[jnp.array([0, 7])].get(mode="fill", fill_value=2.5) * v,
    "dropped": lambda x, v: x.at[jnp.array([0, 7])].set(v * 2.0, mode="drop"),
}


@pytest.mark.parametrize("name", AT)
def test_at(name):
    def hooked(x, v):
        y = AT[name](x, v)
        y.register_hook(lambda grad: grad * 3.0)
        return (y * y).sum()

    a, b = jnp.array([[1.5, 2.0, -3.0], [4.0, 0.5, 6.0]]), jnp.array([2.5, -1.0, 0.25])
    expected = jax.grad(lambda a, b: 3.0 * (AT[name](a, b) ** 2).sum(), (0, 1))(a, b)
    for fn in (hooked, jhop.compile(hooked)):
        for around in (contextlib.nullcontext(), jhop.compiled_autograd.enable(jhop.compile)):
            x, v = jhop.tensor(a, requires_grad=True), jhop.tensor(b, requires_grad=True)
            with around:
                fn(x, v).backward()
            np.testing.assert_allclose(x.grad, expected[0], rtol=1e-6)
            np.testing.assert_allclose(v.grad if v.grad is not None else jnp.zeros(3), expected[1], rtol=1e-6)
            assert x.value.tolist() == a.tolist()


def test_at_a_mask():
    x = jhop.tensor([1.0, 4.0, -2.0], requires_grad=True)
    y = x.at[x > 0.0].set(5.0)
    assert y.tolist() == [5.0, 5.0, -2.0] and y.grad_fn.name() == "AtSetBackward"
    (y * y).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, -4.0]
    with pytest.raises(TypeError, match=r"x = x.at\[index\].set"):
        x[0] = 3.0
