"""Tensors of compiled functions as objects: which one it is, what it tells of itself.

A Tensor that is returned in two places is one Tensor, an argument that is returned is that Tensor itself. What cannot
be known when the function is traced is refused.
"""

import jax.numpy as jnp
import pytest
from tape_modes import each_mode, leaf, times

import jhop


@each_mode
def test_tensor_in_two_places_is_one_tensor(mode):
    def fn(x):
        y = x * 2.0
        return y, {"again": y}, x * 2.0

    x = leaf(1.0, 2.0)
    y, again, other = (lambda y, d, other: (y, d["again"], other))(*mode.compile(fn)(x))
    assert y is again and y is not other
    y.register_hook(times(3.0))
    mode.backward((y * again).sum())
    assert x.grad.tolist() == [24.0, 48.0]  # 3 (2 * 2x) 2: a hook on one half of the gradient would give 16 and 32


@each_mode
@pytest.mark.parametrize("recording", [True, False])
def test_argument_is_that_tensor_itself(mode, recording):
    fn = mode.compile(lambda x, w: (x * w, [w], x))
    x, w = leaf(1.0, 2.0), jhop.tensor([3.0, 4.0])
    for _ in range(2):
        with jhop.autograd.enable_grad() if recording else jhop.autograd.no_grad():
            y, (same_w,), same_x = fn(x, w)
        assert same_x is x and same_w is w and x.requires_grad and not w.requires_grad
        assert y.requires_grad is recording and y.tolist() == [3.0, 8.0]


@each_mode
def test_hook_on_an_argument_that_comes_back_sees_its_whole_gradient(mode):
    x = leaf(1.0, 2.0)
    y, same = mode.compile(lambda x: (x * x, x))(x)
    same.register_hook(lambda grad: grad.clip(-5.0, 5.0))
    mode.backward((y * same).sum())  # 3 x**2: of two parts of it, 1 and 2, 4 and 8, none or one would be cut
    assert x.grad.tolist() == [3.0, 5.0]


@each_mode
def test_tensor_that_the_function_reaches_by_itself_is_returned_as_it_is(mode):
    w = leaf(3.0, 4.0)
    fn = mode.compile(lambda x: (w, x * w))
    same, y = fn(leaf(1.0, 2.0))
    assert same is w
    mode.backward((same * y).sum())
    assert w.grad.tolist() == [6.0, 16.0]


@each_mode
def test_function_that_returns_its_argument_alone(mode):
    seen = []

    def fn(x):
        x.register_hook(seen.append)
        return x

    x = leaf(1.0, 2.0)
    y = mode.compile(fn)(x)
    assert y is x
    mode.backward((y * 3.0).sum())
    assert x.grad.tolist() == [3.0, 3.0] and [grad.tolist() for grad in seen] == [[3.0, 3.0]]


@each_mode
def test_handles_arguments_and_repeated_results_keep_their_places(mode):
    def fn(x):
        y = x * 2.0
        handle = x.register_hook(times(10.0))
        return handle, y, x, handle, y

    x = leaf(1.0)
    first, y, same, second, again = mode.compile(fn)(x)
    assert first is second and y is again and same is x
    mode.backward(y.sum() + again.sum(), retain_graph=True)
    assert x.grad.tolist() == [40.0]
    second.remove()
    mode.backward(y.sum())
    assert x.grad.tolist() == [42.0]


@each_mode
def test_retained_gradient_of_a_result_in_two_places(mode):
    def fn(x):
        y = x * 3.0
        y.retain_grad()
        return y, y

    x = leaf(1.0, 2.0)
    a, b = mode.compile(fn)(x)
    mode.backward((a * b).sum())
    assert b.grad.tolist() == [6.0, 12.0] and x.grad.tolist() == [18.0, 36.0]


def test_several_derivatives_of_a_result_in_two_places():
    x = leaf(2.0)
    a, b, same = jhop.compile(lambda x: (lambda y: (y, y, x))(x * x))(x)
    (slope,) = jhop.autograd.grad((a * b * same).sum(), x, create_graph=True)
    (bend,) = jhop.autograd.grad(slope.sum(), x)
    assert slope.tolist() == [80.0] and bend.tolist() == [160.0]  # x**5


@each_mode
@pytest.mark.parametrize("reached", ["twice an argument", "by itself too"])
def test_hooks_on_one_tensor_in_two_places_run_in_order_of_registration(mode, reached):
    x = leaf(1.0, 2.0)

    def fn(a, b):
        (b if reached == "twice an argument" else x).register_hook(lambda grad: grad + 1.0)
        a.register_hook(times(10.0))
        return a * b

    mode.backward(mode.compile(fn)(x, x).sum())
    assert x.grad.tolist() == [30.0, 50.0]  # (2x + 1) 10; in the order of the places, 21 and 41


def _grad_of_argument(x):
    return x * 2.0 if x.grad is None else x + x.grad


def _grad_of_argument_in_hook(x):
    y = x * 2.0
    y.register_hook(lambda grad: grad if x.grad is None else grad + x.grad)
    return y


def _grad_of_result_in_hook(x):
    y = x * 2.0
    y.retain_grad()
    y.register_hook(lambda grad: grad if y.grad is None else grad + y.grad)
    return y


@pytest.mark.parametrize("fn", [_grad_of_argument, _grad_of_argument_in_hook, _grad_of_result_in_hook])
def test_gradient_that_is_not_known_when_it_is_traced_is_not_read(fn):
    x = leaf(1.0, 2.0)
    x.grad = jnp.array([5.0, 6.0])
    with pytest.raises(jhop.JhopError, match=r"reads the \.grad of a Tensor"):
        jhop.compile(fn, backend="xla")(x).sum().backward()
    assert x.grad.tolist() == [5.0, 6.0]


def _as_tensor(value):
    return value


def _as_array(value):
    return value.value


@pytest.mark.parametrize("made", [_as_tensor, _as_array])
@pytest.mark.parametrize("of", ["argument", "outside"])
def test_assignment_to_a_gradient_while_a_function_is_traced_is_refused(made, of):
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)

    @jhop.compile
    def fn(x):
        (x if of == "argument" else w).grad = made(x * 2.0)
        return x * 3.0

    with pytest.raises(jhop.JhopError, match=r"Assigning to \.grad inside a function"):
        fn(x)
    assert x.grad is None and w.grad is None


@each_mode
def test_a_result_inside_is_no_leaf(mode):
    def fn(x):
        y = x * x
        for tensor in (y, x.detach(), y.detach()):
            if not tensor.is_leaf:
                tensor.register_hook(times(5.0))
        return y, x.detach().is_leaf and (y.detach() * 2.0).grad_fn is None

    x = leaf(1.0, 2.0)
    y, told = mode.compile(fn)(x)
    mode.backward(y.sum())
    assert x.grad.tolist() == [10.0, 20.0] and told


@pytest.mark.parametrize(("ask", "of"), [("is_leaf", "argument"), ("grad_fn", "argument"), ("grad_fn", "result")])
def test_what_only_a_call_knows_of_a_tensor_is_refused(ask, of):
    def fn(x):
        y = x * 2.0
        return y if getattr(x if of == "argument" else y, ask) else y * 3.0

    with pytest.raises(jhop.JhopError, match=rf"Tensor\.{ask}"):
        jhop.compile(fn)(leaf(1.0))


@pytest.mark.parametrize("on", ["argument", "value inside"])
@pytest.mark.parametrize("call", ["register_hook", "retain_grad"])
def test_hook_in_a_compiled_function_adds_nothing_to_what_is_compiled(call, on):
    x = leaf(1.0, 2.0)

    @jhop.compile
    def fn(x):
        y = x * 2.0
        of = x if on == "argument" else y

        def hook(grad):
            of.register_hook(times(10.0)) if call == "register_hook" else of.retain_grad()

        y.register_hook(hook)
        return y

    y = fn(x)
    with pytest.raises(jhop.HookError, match=rf"Tensor\.{call}: a hook that"):
        y.sum().backward(retain_graph=True)
    assert x.grad is None


def test_gradients_that_accumulate_in_tensors_which_the_function_reaches_by_itself_cost_no_trace():
    w, scale = leaf(3.0, 4.0), jhop.tensor([2.0, 2.0])

    @jhop.compile
    def fn(x):
        y = x * w * scale
        y.register_hook(times(5.0))
        return y.sum()

    for _ in range(4):
        fn(jhop.tensor([1.0, 2.0])).backward()
    assert w.grad.tolist() == [40.0, 80.0]
    assert len(jhop.explain(fn).traces) == 2  # of the function, and of its backward


def test_function_that_reads_such_a_gradient_sees_each():
    w, found = leaf(3.0, 4.0), []
    fn = jhop.compile(lambda x: x * w + (0.0 if w.grad is None else w.grad))
    for _ in range(3):
        y = fn(leaf(1.0, 2.0))
        y.sum().backward()
        found.append(y.tolist())
    assert found == [[3.0, 8.0], [4.0, 10.0], [5.0, 12.0]]


@each_mode
def test_tensor_that_the_function_reaches_by_itself_may_begin_and_cease_to_require_grad(mode):
    w, seen = jhop.tensor([3.0, 4.0]), []
    fn = mode.compile(lambda x: (x * w).sum())
    for wanted in (False, True, False, True, True):
        w.requires_grad_(wanted)
        w.grad = None
        x = leaf(1.0, 2.0)
        mode.backward(fn(x))
        seen.append(None if w.grad is None else w.grad.tolist())
        assert x.grad.tolist() == [3.0, 4.0]
    assert seen == [None, [1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]]
