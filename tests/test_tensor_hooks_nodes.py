"""Hooks on nodes of the tape, run node by node and captured by compiled autograd."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import Mode, each_mode, leaf, scalar, times

import jhop
import jhop.numpy as hnp

EAGER, CAPTURED = Mode("eager"), Mode("captured")
both = pytest.mark.parametrize("mode", [EAGER, CAPTURED], ids=lambda mode: mode.name)


@both
def test_prehook_replaces_the_cotangents(mode):
    x = scalar(2.0)
    y = x * x
    y.grad_fn.register_prehook(lambda outs: (outs[0] * outs[0],))
    mode.backward(y * 3.0)
    assert float(x.grad) == 9.0 * 4.0


@both
def test_hook_sees_both_sides_and_replaces_what_flows_on(mode):
    x, w = scalar(2.0), scalar(5.0)
    y = x * w
    y.grad_fn.register_hook(lambda ins, outs: (ins[0] + outs[0], ins[1] * outs[0]))
    mode.backward(y * 3.0)
    assert (float(x.grad), float(w.grad)) == (15.0 + 3.0, 6.0 * 3.0)


@both
def test_none_keeps_one_cotangent(mode):
    x, w = scalar(2.0), scalar(5.0)
    y = x * w
    y.grad_fn.register_hook(lambda ins, outs: (None, ins[1] * 7.0))
    mode.backward(y * 3.0)
    assert (float(x.grad), float(w.grad)) == (15.0, 42.0)


@both
def test_hooks_of_one_node_run_in_order_of_registration_on_what_the_last_one_made(mode):
    x = scalar(2.0)
    y = x * x
    y.grad_fn.register_prehook(lambda outs: (outs[0] * 3.0,))
    y.grad_fn.register_prehook(lambda outs: (outs[0] + 1.0,))
    y.grad_fn.register_hook(lambda ins, outs: (ins[0] * outs[0], ins[1]))
    y.grad_fn.register_hook(lambda ins, outs: (ins[0] + 0.5, None))
    mode.backward(y)
    assert float(x.grad) == (8.0 * 4.0 + 0.5) + 8.0


@each_mode
def test_nodes_of_compiled_functions(mode):
    x = leaf(2.0, 3.0)
    y = mode.compile(lambda x: x * x)(x)
    y.grad_fn.register_prehook(lambda outs: (outs[0] * 10.0,))
    y.grad_fn.register_hook(lambda ins, outs: (ins[0] + outs[0], *ins[1:]))
    mode.backward(y.sum())
    assert x.grad.tolist() == [50.0, 70.0]


@both
def test_outputs_that_nothing_depends_on_are_none(mode):
    x = scalar(3.0)
    shapes = []
    a, b = jhop.lift(lambda x: (x * 2.0, x * x))(x)

    def look(outs):
        shapes.append([None if ct is None else ct.shape for ct in outs])
        return (None, outs[1] * 5.0)

    b.grad_fn.register_prehook(look)
    mode.backward(b)
    assert (shapes, float(x.grad)) == ([[None, ()]], 30.0)


@both
def test_inputs_that_are_not_wanted_are_none(mode):
    x, w = scalar(2.0), scalar(5.0)
    y = x * w
    seen = []
    y.grad_fn.register_hook(lambda ins, outs: seen.append([ct is None for ct in ins]))
    (found,) = mode.grad(y, w)
    assert (seen, float(found)) == ([[True, False]], 2.0)


@both
@pytest.mark.parametrize(
    ("register", "hook", "message"),
    [
        ("register_prehook", lambda outs: outs[0], "must return a tuple of 1 cotangents or None, but returned"),
        ("register_prehook", lambda outs: (outs[0], outs[0]), "must return a tuple of 1 .*returned tuple of 2"),
        ("register_prehook", lambda outs: (jnp.ones(3),), r"shape and dtype of its cotangent"),
        ("register_prehook", lambda outs: (1.0,), "returned float"),
        ("register_hook", lambda ins, outs: [ins[0], ins[1]], "must return a tuple of 2"),
        ("register_hook", lambda ins, outs: (ins[0],), "returned tuple of 1"),
    ],
)
def test_bad_results(mode, register, hook, message):
    x, w = scalar(2.0), scalar(5.0)
    y = x * w
    getattr(y.grad_fn, register)(hook)
    with pytest.raises(jhop.HookError, match=message):
        mode.backward(y)
    assert (x.grad, w.grad) == (None, None)


@both
def test_nothing_can_flow_where_none_was_given(mode):
    x, w = scalar(2.0), scalar(5.0)
    y = x * w
    y.grad_fn.register_hook(lambda ins, outs: (outs[0], ins[1]))
    with pytest.raises(jhop.HookError, match="given None: nothing flows there"):
        mode.grad(y, w)


@both
@pytest.mark.parametrize(
    ("register", "hook"), [("register_prehook", lambda: None), ("register_hook", lambda ins: None)]
)
def test_hooks_of_another_arity_are_an_error(mode, register, hook):
    x = scalar(2.0)
    y = x * 3.0
    getattr(y.grad_fn, register)(hook)
    with pytest.raises((TypeError, jhop.JhopError), match="positional argument"):
        mode.backward(y)
    assert x.grad is None


class Counter:
    def __init__(self):
        self.runs = 0
        self.total = 0.0


@both
def test_state_of_hooks_counts_every_run(mode):
    counter = Counter()

    def count(outs):
        counter.runs += 1
        return (outs[0] * counter.runs,)

    def add(ins, outs):
        counter.total = counter.total + float(10 * counter.runs)

    grads = []
    mode.graphs.clear()
    for _ in range(3):
        x = scalar(2.0)
        y = x * x
        y.grad_fn.register_prehook(count)
        y.grad_fn.register_hook(add)
        mode.backward(y)
        grads.append(float(x.grad))
    assert (grads, counter.runs, counter.total) == ([4.0, 8.0, 12.0], 3, 60.0)
    assert len(mode.graphs) == (1 if mode is CAPTURED else 0)  # the same structure is captured once


def test_another_hook_is_another_capture():
    for factor in (2.0, 3.0):
        x = scalar(2.0)
        y = x * x
        y.grad_fn.register_prehook(lambda outs, factor=factor: (outs[0] * factor,))
        CAPTURED.backward(y)
        assert float(x.grad) == 4.0 * factor


@both
def test_removed_hooks_do_not_run(mode):
    x = scalar(2.0)
    y = x * x
    first = y.grad_fn.register_prehook(lambda outs: (outs[0] * 100.0,))
    second = y.grad_fn.register_hook(lambda ins, outs: (ins[0] * 100.0, ins[1]))
    first.remove()
    with second:
        pass
    mode.backward(y)
    assert float(x.grad) == 4.0


# The node at the end of a path.


def with_end(value):
    """A leaf, and its AccumulateGrad node."""
    x = scalar(value)
    return x, (x * 1.0).grad_fn.next_functions[0][0]


def test_node_of_a_leaf_is_one_while_it_is_kept():
    x, end = with_end(2.0)
    assert end.name() == "AccumulateGrad"
    assert (x * 3.0).grad_fn.next_functions == ((end, 0),)


@both
def test_order_at_a_leaf(mode):
    x, end = with_end(2.0)
    log = Counter()
    log.text = 1.0

    def step(digit):
        def hook(*args):
            log.text = log.text * 10.0 + digit

        return hook

    end.register_hook(step(5.0))
    end.register_prehook(step(3.0))
    x.register_post_accumulate_grad_hook(step(4.0))
    x.register_hook(step(2.0))  # a Tensor's hooks come before its node's, also if they are registered later
    mode.backward(x * 3.0)
    assert (log.text, float(x.grad)) == (12345.0, 3.0)


@both
def test_each_step_at_a_leaf_works_on_what_the_last_one_made(mode):
    x, end = with_end(2.0)
    given = Counter()

    def halve(tensor):
        tensor.grad = (tensor.grad + 0.5) * 10.0

    def after(ins, outs):
        assert ins == ()
        given.total = outs[0] * 2.0

    x.register_hook(lambda g: g - 2.0)
    end.register_prehook(lambda outs: (outs[0] / 4.0,))
    x.register_post_accumulate_grad_hook(halve)
    end.register_hook(after)
    mode.backward(x * 8.0)
    assert (float(x.grad), float(given.total)) == (((8.0 - 2.0) / 4.0 + 0.5) * 10.0, 3.0)


@both
def test_prehook_of_a_leaf_changes_what_is_added(mode):
    x, end = with_end(2.0)
    end.register_prehook(lambda outs: (outs[0] * 10.0,))
    for _ in range(2):
        mode.backward(x * 3.0)
    assert float(x.grad) == 60.0


@both
def test_hook_after_a_leaf_has_nothing_to_replace(mode):
    x, end = with_end(2.0)
    end.register_hook(lambda ins, outs: outs)
    with pytest.raises(jhop.HookError, match="a tuple of 0 cotangents"):
        mode.backward(x * 3.0)
    assert x.grad is None


@both
def test_grad_runs_the_hooks_of_a_leaf_but_not_of_its_node(mode):
    x, end = with_end(2.0)
    x.register_hook(times(10.0))
    end.register_prehook(lambda outs: pytest.fail("the node is not run"))
    end.register_hook(lambda ins, outs: pytest.fail("the node is not run"))
    (found,) = mode.grad(x * 3.0, x)
    assert float(found) == 30.0


def test_hooks_of_a_leafs_node_go_with_the_graph():
    x, end = with_end(2.0)
    end.register_prehook(lambda outs: (outs[0] * 10.0,))
    del end
    gc.collect()
    (x * 3.0).backward()
    assert float(x.grad) == 3.0


def test_prehook_of_a_leaf_is_differentiated():
    x, end = with_end(3.0)
    end.register_prehook(lambda outs: (outs[0] * outs[0],))
    (x * x).backward(create_graph=True)  # (2x)**2
    first, x.grad = x.grad, None
    end.register_prehook(lambda outs: (outs[0] * 0.0 + 0.5,))
    (second,) = jhop.autograd.grad(first, x)  # of 4 x**2; grad() runs no hooks of the leaf's node
    assert (float(first), float(second)) == (36.0, 24.0)


def test_hooks_see_one_example_of_a_batch():
    x = leaf(1.0, 2.0)
    y = x * x
    counter = Counter()

    def count(outs):
        counter.runs = counter.runs + 1
        return (outs[0] * 3.0,)

    y.grad_fn.register_prehook(count)
    (found,) = jhop.autograd.grad(y * 1.0, x, jnp.eye(2), is_grads_batched=True)
    assert (found.tolist(), counter.runs) == ([[6.0, 0.0], [0.0, 12.0]], 1)


def test_what_differs_between_examples_cannot_be_kept():
    x = leaf(1.0, 2.0)
    y = x * x
    counter = Counter()

    def keep(outs):
        counter.total = outs[0]

    y.grad_fn.register_prehook(keep)
    with pytest.raises(jhop.Unsupported, match="total"):
        jhop.autograd.grad(y * 1.0, x, jnp.eye(2), is_grads_batched=True)
    assert counter.total == 0.0


def test_captured_graph_runs_before_it_is_inlined():
    x = leaf(1.0, 2.0)
    y = x * x
    y.grad_fn.register_prehook(lambda outs: (outs[0] * 3.0,))
    y.grad_fn.register_hook(lambda ins, outs: (ins[0], ins[1] + outs[0]))
    with jhop.compiled_autograd.enable(lambda gm: gm):
        y.sum().backward()
    assert x.grad.tolist() == [6.0 + 3.0, 12.0 + 3.0]


@pytest.mark.parametrize("dialect", ["torch", "jax"])
def test_captured_graphs_print(dialect):
    x = leaf(1.0, 2.0)
    y = x * x
    y.grad_fn.register_prehook(lambda outs: (outs[0] * 3.0,))
    texts = []

    def compiler_fn(gm):
        texts.append(gm.print_readable(False, dialect=dialect))
        inlined = jhop.inline(gm)
        texts.append(inlined.print_readable(False, dialect=dialect))
        return gm

    with jhop.compiled_autograd.enable(compiler_fn):
        y.sum().backward()
    assert x.grad.tolist() == [6.0, 12.0]
    assert all("3.0" in text for text in texts[1:])
    assert "trace_wrapped" in texts[0]


# Live, against PyTorch.


@both
def test_against_torch(mode):
    torch = pytest.importorskip("torch")

    def run(ns, make, backward, number):
        calls = []
        x, w = make([0.5, -1.5]), make([2.0, 3.0])
        y = x * w
        z = ns.sin(y) * x
        ends = [z.grad_fn.next_functions[1][0]]

        def note(label):
            return lambda *args: calls.append(label)

        y.grad_fn.register_prehook(note("y pre"))
        y.grad_fn.register_prehook(lambda outs: (outs[0] * outs[0],))
        y.grad_fn.register_hook(lambda ins, outs: (ins[0] + outs[0], ins[1] * 2.0))
        y.grad_fn.register_hook(note("y post"))
        y.register_hook(note("y tensor"))
        ends[0].register_prehook(lambda outs: (outs[0] * 3.0,))
        ends[0].register_prehook(note("x pre"))
        ends[0].register_hook(note("x post"))
        x.register_post_accumulate_grad_hook(note("x acc"))
        x.register_hook(note("x tensor"))
        backward(z.sum())
        return calls, [[number(v) for v in t.grad] for t in (x, w)]

    theirs = run(torch, lambda v: torch.tensor(v, requires_grad=True), lambda t: t.backward(), float)
    if mode is CAPTURED:
        with jhop.compiled_autograd.enable(lambda gm: gm):  # hooks run with real values
            ours = run(hnp, lambda v: leaf(*v), lambda t: t.backward(), float)
    else:
        ours = run(hnp, lambda v: leaf(*v), lambda t: t.backward(), float)
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-4)


def test_none_of_the_hooks_keeps_a_tracer():
    kept = Counter()
    x = scalar(2.0)
    y = x * x

    def keep(ins, outs):
        kept.total = ins[0]

    y.grad_fn.register_hook(keep)
    CAPTURED.backward(y)
    assert isinstance(kept.total, jax.Array) and not isinstance(kept.total, jax.core.Tracer)
    assert float(kept.total) == 2.0
