"""`create_graph=True` on the tape: what has history, what is kept and freed, compiled functions, captured passes."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import MODES, each_mode, leaf, orders, power, scalar

import jhop
import jhop.numpy as hnp


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: lifted operations stay compiled, and must not notice."""


# What hooks are given, and what has history.


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_get_tensors_and_record_only_on_demand(create_graph):
    x, seen = scalar(3.0), []
    x.register_hook(lambda g: seen.append((isinstance(g, jhop.Tensor), (x * 2.0).requires_grad)))
    jhop.autograd.grad(x * x, x, create_graph=create_graph)
    assert seen == [(create_graph, create_graph)]


@each_mode
@pytest.mark.parametrize(
    ("fn", "history"),
    [
        (lambda x: x * 2.0, False), (lambda x: x + x, False), (lambda x: x.sum(), False), (lambda x: -x / 3.0, False),
        (lambda x: hnp.clip(x, -9.0, 9.0), False), (lambda x: x * x, True), (lambda x: hnp.sin(x), True),
    ],
)  # fmt: skip
def test_gradient_of_a_linear_function_has_no_history(mode, fn, history):
    x = scalar(2.0)
    (found,) = mode.grad(mode.compile(fn)(x), x, create_graph=True)
    assert (isinstance(found, jhop.Tensor), found.requires_grad) == (True, history)


@each_mode
def test_second_derivative_reaches_only_what_it_depends_on(mode):
    x, w = scalar(3.0), scalar(5.0)
    x.register_hook(lambda g: pytest.fail("ran twice") if calls else calls.append(1))
    calls = []
    by_x, by_w = mode.grad(mode.compile(lambda x, w: x * w)(x, w), [x, w], create_graph=True)
    assert [float(by_x), float(by_w)] == [5.0, 3.0]
    found = mode.grad(by_x * 7.0, [x, w], allow_unused=True)
    assert (found[0], float(found[1])) == (None, 7.0)


@each_mode
def test_result_that_nothing_uses_has_no_part_in_the_second_derivative(mode):
    x, w = scalar(3.0), scalar(5.0)
    fn = jhop.lift(lambda x, w: (x * x, w * w * x))
    first, _ = mode.compile(lambda x, w: fn(x, w))(x, w)
    (found,) = mode.grad(first * first, x, create_graph=True)
    by_x, by_w = mode.grad(found, [x, w], allow_unused=True)
    assert (float(found), float(by_x), by_w) == (108.0, 108.0, None)


@each_mode
def test_each_gradient_of_one_operation_has_a_history_of_its_own(mode):
    x, w = scalar(3.0), scalar(5.0)
    fn = jhop.lift(lambda x, w: x * x + w * 7.0)
    found = mode.grad(mode.compile(lambda x, w: fn(x, w))(x, w), [x, w], create_graph=True)
    assert [(float(g), g.requires_grad) for g in found] == [(6.0, True), (7.0, False)]


def test_recorded_although_recording_is_off():
    x = scalar(3.0)
    y = x * x
    with jhop.autograd.no_grad():
        (found,) = jhop.autograd.grad(y, x, create_graph=True)
    assert found.requires_grad
    assert not jhop.autograd.grad(x * x, x, create_graph=False)[0].weak_type


def test_recording_is_as_before_after_an_error():
    def hook(g):
        raise LookupError

    x = scalar(3.0)
    x.register_hook(hook)
    with jhop.autograd.no_grad():
        with pytest.raises(LookupError), jhop.autograd.enable_grad():
            (x * x).backward(create_graph=True)
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad


# .grad, and graphs that are kept or freed.


@each_mode
def test_backward_leaves_a_grad_with_history(mode):
    x = scalar(3.0)
    mode.backward(mode.compile(lambda x: x * x * x)(x), create_graph=True)
    slope, x.grad = x.grad, None
    mode.backward(slope, create_graph=True)
    bend, x.grad = x.grad, None
    mode.backward(bend)
    assert (float(slope), float(bend), float(x.grad)) == (27.0, 18.0, 6.0)
    assert isinstance(x.grad, jax.Array)


@each_mode
def test_grads_with_and_without_history_add_up(mode):
    x = scalar(3.0)
    fn = mode.compile(lambda x: x * x)
    mode.backward(fn(x))
    mode.backward(fn(x), create_graph=True)
    assert float(x.grad) == 12.0
    assert float(mode.grad(x.grad, x)[0]) == 2.0
    mode.backward(fn(x))
    assert (isinstance(x.grad, jax.Array), float(x.grad)) == (True, 18.0)


@each_mode
def test_retained_gradient_has_history(mode):
    x = scalar(3.0)
    y = x * x
    y.retain_grad()
    mode.grad(mode.compile(lambda y: y * y)(y), x, create_graph=True)
    assert (float(y.grad), float(mode.grad(y.grad, x)[0])) == (18.0, 12.0)


def test_post_accumulate_hook_sees_a_grad_with_history():
    x, seen = scalar(3.0), []
    x.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.requires_grad))
    (x * x).backward(create_graph=True)
    assert seen == [True]


def test_autograd_backward_with_history():
    x = scalar(3.0)
    jhop.autograd.backward([x * x, x * x * x], create_graph=True, inputs=[x])
    assert (float(x.grad), float(jhop.autograd.grad(x.grad, x)[0])) == (33.0, 20.0)


@each_mode
def test_graph_is_kept_by_default(mode):
    x = scalar(3.0)
    y = mode.compile(lambda x: x * x)(x)
    mode.grad(y, x, create_graph=True)
    assert float(mode.grad(y, x)[0]) == 6.0


@each_mode
def test_graph_is_freed_on_demand_and_what_was_recorded_stays(mode):
    x = scalar(3.0)
    y = mode.compile(lambda x: hnp.sin(x))(x)
    (slope,) = mode.grad(y, x, create_graph=True, retain_graph=False)
    with pytest.raises(jhop.JhopError, match="freed"):
        mode.grad(y, x)
    np.testing.assert_allclose(mode.grad(slope, x)[0], -np.sin(3.0), rtol=1e-5)
    with pytest.raises(jhop.JhopError, match="freed"):
        mode.grad(slope, x)


@each_mode
def test_freed_graph_cannot_be_recorded(mode):
    x = scalar(3.0)
    y = mode.compile(lambda x: hnp.sin(x))(x)
    mode.grad(y, x)
    with pytest.raises(jhop.JhopError, match="freed"):
        mode.grad(y, x, create_graph=True)


@each_mode
def test_pass_without_history_after_one_with(mode):
    fn, x = power(lambda g: g * g, 1.0)
    y = mode.compile(fn)(x)
    mode.grad(y, x, create_graph=True)
    assert [float(mode.grad(y, x, retain_graph=True)[0]) for _ in range(2)] == [8.0, 8.0]


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.name)  # captures keep hooks for reuse
def test_arrays_are_freed_with_the_graph(mode):
    def fn(x):
        y = hnp.sin(x)
        y.register_hook(lambda g: g * y)
        return y * y

    x = jhop.tensor(jnp.ones(1234), requires_grad=True)
    fn = mode.compile(fn)

    def live():
        gc.collect()
        return sum(array.shape == (1234,) for array in jax.live_arrays())

    counts = []
    for _ in range(2):
        (slope,) = mode.grad(fn(x).sum(), x, create_graph=True)
        (bend,) = mode.grad(slope.sum(), x)
        del slope, bend
        counts.append(live())
    assert counts[0] == counts[1]
    assert counts[0] <= 2  # the leaf, and perhaps a constant of a compiled function


def test_pullbacks_of_linear_nodes_do_not_keep_their_inputs():
    x, ct = leaf(1.0, 2.0), leaf(1.0, 1.0)
    (slope,) = jhop.autograd.grad(x * 2.0 + x, x, ct, create_graph=True)
    nodes = [slope.grad_fn, *(node for node, _ in slope.grad_fn.next_functions)]
    arrays = [array for node in nodes for array in node.saved()]
    assert arrays
    assert not any(array is x.value for array in arrays)


def test_long_chain_takes_linear_memory_and_no_recursion():
    x = scalar(0.5)
    y = x
    for _ in range(1500):
        y = y + 0.0
    (slope,) = jhop.autograd.grad(y * y, x, create_graph=True)
    (bend,) = jhop.autograd.grad(slope, x)
    assert (float(slope), float(bend)) == (1.0, 2.0)


# Compiled functions.


def test_function_is_not_traced_again():
    traced = []

    def fn(x):
        traced.append(1)
        return hnp.sin(x) * x

    tick = jhop.compile(fn)
    for value in (1.0, 2.0):
        x = scalar(value)
        orders(MODES[0], tick(x), x)
    assert len(traced) <= 2  # the second value may be traced again, as the list that the function reaches has grown


def test_function_without_hooks_stays_one_operation():
    x = scalar(2.0)
    y = jhop.compile(lambda x: hnp.sin(x * x) * hnp.cos(x) + x)(x)
    jhop.autograd.grad(y, x, create_graph=True)
    ((node, _),) = y.grad_fn.next_functions
    assert [below.name() for below, _ in node.next_functions] == ["AccumulateGrad"]


def test_hook_that_cannot_be_traced_runs_with_real_values(capsys):
    def fn(x):
        y = x * x
        y.register_hook(lambda g: print("gradient", float(g)))
        return y * y

    x = scalar(2.0)
    orders(MODES[0], jhop.compile(fn)(x), x, 2)
    assert capsys.readouterr().out == "gradient 8.0\n" * 2


def test_several_results_and_a_tensor_that_the_function_reaches_by_itself():
    w = scalar(5.0)

    def fn(x):
        y = x * w
        y.register_hook(lambda g: g * g)
        return y * y, {"other": y * 3.0, "n": 3}

    def both(fn, x):
        first, rest = fn(x)
        slopes = jhop.autograd.grad([first, rest["other"]], [x, w], create_graph=True)
        found = jhop.autograd.grad(slopes[0] * slopes[1], [x, w])
        return [float(value) for value in (*slopes, *found)]

    assert both(jhop.compile(fn), scalar(2.0)) == both(fn, scalar(2.0))


def test_hooks_side_by_side_run_in_the_order_of_the_tape():
    def run(compiled):
        seen = []

        def fn(x):
            a, b, c = x * 2.0, x * 3.0, x * 5.0
            for tensor, label in ((a, "a"), (b, "b"), (c, "c")):
                tensor.register_hook(lambda g, label=label: seen.append((label, float(g))))
            return a * b * c

        x = scalar(1.0)
        y = jhop.compile(fn)(x) if compiled else fn(x)
        jhop.autograd.grad(y, x, create_graph=True)
        return seen

    assert run(compiled=True) == run(compiled=False) == [("c", 6.0), ("b", 10.0), ("a", 15.0)]


@each_mode
def test_detached_tensor_of_the_forward_in_a_hook_has_no_history(mode):
    seen = []

    def hook_of(factor):
        def hook(g):
            if isinstance(g, jhop.Tensor):
                seen.append(factor.requires_grad)
            return g * factor

        return hook

    def fn(x):
        y = x * x
        y.register_hook(hook_of(y.detach()))
        y.register_hook(hook_of(y * 0.5))
        return y * 3.0

    x = scalar(2.0)
    # 3 y (y / 2) 2x = 3 x**5, of which one y is a constant: 9 x**4, and by way of y (3/2 y) 2x y (y / 2) 2x.
    found = orders(mode, mode.compile(fn)(x), x, 1)
    (slope,) = mode.grad(mode.compile(fn)(x), x, create_graph=True)
    assert (found[1], float(slope), seen) == (96.0, 96.0, [False, True])


def test_hooked_result_of_a_compiled_function():
    x = scalar(2.0)
    y = jhop.compile(lambda x: x * x)(x)
    y.register_hook(lambda g: g * g)
    # The numbers of a nonlinear hook on y = x**2, at 2.
    assert orders(MODES[0], y * y, x, 2) == [16.0, 64.0 * 4.0, 8.0 * 16.0 + (16.0 * 8.0) ** 2 * 4.0]


def test_hook_and_its_tensors_are_freed():
    class Hook:
        def __call__(self, g):
            return g * 2.0

    hook = Hook()

    def run():
        fn, x = power(hook, 2.0)
        orders(MODES[0], jhop.compile(fn)(x), x)
        return weakref.ref(x)

    there = run()
    gc.collect()
    assert there() is None


# Compiled autograd.


def test_last_pass_is_captured_as_one_graph():
    captured = []

    def compiler(gm):
        captured.append(gm)
        return jhop.compile(gm, fullgraph=True)

    with jhop.compiled_autograd.enable(compiler):
        for value in (1.0, 2.0):
            fn, x = power(lambda g: g * g, value)
            (slope,) = jhop.autograd.grad(fn(x), x, create_graph=True)
            slope.backward()
    assert float(x.grad) == 8.0 * 16.0 + (16.0 * 8.0) ** 2 * 4.0
    assert len(captured) == 1  # the hooks are two functions, but of the same code
