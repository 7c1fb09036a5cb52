"""Hooks on several Tensors at once: `jhop.autograd.register_multi_grad_hook`."""

import gc
import random
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import Mode, each_mode, leaf, scalar, times

import jhop
import jhop.numpy as hnp
from jhop.autograd import register_multi_grad_hook

EAGER, CAPTURED = Mode("eager"), Mode("captured")
both = pytest.mark.parametrize("mode", [EAGER, CAPTURED], ids=lambda mode: mode.name)


class State:
    def __init__(self):
        self.runs = 0
        self.shown = None


def clip_to(limit):
    def clip(grads):
        norm = jnp.sqrt(sum((g * g).sum() for g in grads if g is not None))
        return [None if g is None else g * (limit / norm) for g in grads]

    return clip


@each_mode
def test_joint_clip_of_leaves(mode):
    x, w = leaf(1.0, 1.0), leaf(2.0)
    register_multi_grad_hook([x, w], clip_to(13.0))
    y = mode.compile(lambda x, w: (x * jnp.array([6.0, 8.0])).sum() + w.sum() * 24.0)(x, w)
    mode.backward(y)  # the norm is 26
    assert (x.grad.tolist(), w.grad.tolist()) == ([3.0, 4.0], [12.0])


@each_mode
def test_gradients_flow_on_only_after_the_hook(mode):
    # The one that is complete first must wait for the other: a and b hang on branches of different lengths.
    x, w = scalar(3.0), scalar(5.0)
    a = mode.compile(lambda x: x * 2.0)(x)
    b = w * 7.0
    register_multi_grad_hook([a, b], lambda grads: (grads[1], grads[0] * 10.0))
    c = b
    for _ in range(4):
        c = c * 1.5
    mode.backward(a * 11.0 + c)
    assert (float(x.grad), float(w.grad)) == (2.0 * 1.5**4, 7.0 * 110.0)


@both
def test_none_for_those_that_the_pass_does_not_reach(mode):
    x, w, v = scalar(2.0), scalar(3.0), scalar(4.0)
    state = State()

    def look(grads):
        state.runs += 1
        state.shown = [g is None for g in grads]

    register_multi_grad_hook([x, w, v], look)
    mode.backward(x * w)
    assert (state.runs, state.shown) == (1, [False, False, True])
    mode.backward(x * w * v)
    assert (state.runs, state.shown) == (2, [False] * 3)
    mode.backward(x * 5.0 * v.detach(), inputs=[x])
    assert (state.runs, state.shown, float(x.grad)) == (3, [False, True, True], 3.0 + 12.0 + 20.0)


@both
def test_not_called_where_the_pass_reaches_none(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([w], lambda grads: pytest.fail("nothing reaches it"))
    mode.backward(x * 5.0)
    assert float(x.grad) == 5.0


@both
def test_one_none_keeps_a_gradient(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], lambda grads: (None, grads[0] + grads[1]))
    mode.backward(x * w)
    assert (float(x.grad), float(w.grad)) == (3.0, 5.0)


@both
def test_turn_among_the_hooks_of_a_tensor(mode):
    x, w = scalar(2.0), scalar(3.0)
    y = x * 1.0
    y.register_hook(lambda g: g + 1.0)
    w.register_hook(lambda g: g + 2.0)
    register_multi_grad_hook([y, w], lambda grads: [grads[1], grads[0]])
    y.register_hook(times(10.0))
    w.register_hook(times(100.0))
    mode.backward(y * w, retain_graph=True)  # 3 and 2; 4 and 4 with the first hooks
    assert (float(x.grad), float(w.grad)) == (40.0, 400.0)
    x.grad = w.grad = None
    register_multi_grad_hook([w, y], lambda grads: [grads[0] + 0.5, grads[1] * 3.0])
    mode.backward(y * (w * 2.0))  # 6 and 4: 6 and 7 exchanged, times 10 and 100
    assert (float(x.grad), float(w.grad)) == (6.0 * 10.0 * 3.0, 7.0 * 100.0 + 0.5)


@both
def test_several_hooks_on_crossing_sets(mode):
    a, b, c = scalar(1.0), scalar(2.0), scalar(3.0)
    register_multi_grad_hook([a, b], lambda grads: [grads[0] + grads[1], None])
    register_multi_grad_hook([b, c], lambda grads: [grads[0] * grads[1], None])
    register_multi_grad_hook([c, a], lambda grads: [grads[0] - grads[1], None])
    mode.backward(a * 5.0 + b * 7.0 + c * 11.0)
    assert [float(t.grad) for t in (a, b, c)] == [12.0, 77.0, 11.0 - 12.0]


@both
def test_two_outputs_of_one_node(mode):
    x = scalar(3.0)
    a, b = jhop.lift(lambda x: (x * 2.0, x * x))(x)
    register_multi_grad_hook([b, a], lambda grads: [grads[1], grads[0]])
    mode.backward(a * 5.0 + b * 7.0)
    assert float(x.grad) == 7.0 * 2.0 + 5.0 * 6.0


# Where one gradient depends on another.


@both
def test_may_look_on_where_one_is_computed_from_another(mode):
    x = scalar(2.0)
    y = x * 3.0
    state = State()

    def look(grads):
        state.runs += 1
        state.shown = grads[0] * 100.0 + grads[1]

    register_multi_grad_hook([x, y], look)
    mode.backward(y * 5.0)
    assert (state.runs, float(state.shown), float(x.grad)) == (1, 1505.0, 15.0)


@both
def test_cannot_replace_where_one_is_computed_from_another(mode):
    x = scalar(2.0)
    y = x * 3.0
    register_multi_grad_hook([x, y], lambda grads: grads)
    with pytest.raises(jhop.HookError, match="some have flowed on already. Return None"):
        mode.backward(y * 5.0)
    assert x.grad is None


@both
def test_others_are_held_where_one_group_waits_for_itself(mode):
    x, w = scalar(2.0), scalar(7.0)
    y = x * 3.0
    other = w * 1.0
    register_multi_grad_hook([other, x], lambda grads: [grads[1], grads[0]])
    register_multi_grad_hook([y, x], lambda grads: None)
    mode.backward(y * 5.0 + other * 11.0)
    assert (float(x.grad), float(w.grad)) == (11.0, 15.0)


@both
def test_of_two_hooks_that_wait_for_each_other_the_first_only_looks_on(mode):
    # a flows to b2 and b to a2, so both pairs cannot be held.
    x, w = scalar(2.0), scalar(3.0)
    a2, b2 = x * 2.0, w * 3.0
    a, b = b2 * 5.0, a2 * 7.0
    state = State()

    def look(grads):
        state.shown = grads[0] * 1000.0 + grads[1]

    with register_multi_grad_hook([a, a2], look):
        register_multi_grad_hook([b, b2], lambda grads: [grads[0] * 10.0, grads[1] * 100.0])
        mode.backward(a + b, retain_graph=True)
    assert (float(state.shown), float(x.grad), float(w.grad)) == (1070.0, 140.0, 1500.0)
    register_multi_grad_hook([a, a2], look)  # the pair that came first is now the one that returns something
    with pytest.raises(jhop.HookError, match="two such hooks wait for each other"):
        mode.backward(a + b)
    assert (float(x.grad), float(w.grad)) == (140.0, 1500.0)


# The first gradient.


@both
def test_any_runs_once_per_pass(mode):
    x, w = scalar(2.0), scalar(3.0)
    state = State()

    def look(grad):
        state.runs += 1
        state.shown = grad * 10.0

    a, b = x * 5.0, w * 7.0
    register_multi_grad_hook([a, b], look, mode="any")
    c = b
    for _ in range(3):
        c = c * 2.0
    total = a * 11.0 + c
    for runs in (1, 2):
        mode.backward(total, retain_graph=True)
        assert state.runs == runs
        assert float(state.shown) in (110.0, 80.0)
    assert (float(x.grad), float(w.grad)) == (110.0, 112.0)


@both
def test_any_replaces_nothing(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], lambda grad: grad, mode="any")
    with pytest.raises(jhop.HookError, match="mode='any' must return None, .* Use Tensor.register_hook"):
        mode.backward(x * w)
    assert (x.grad, w.grad) == (None, None)


# Handles, lifetime, recording.


@both
def test_removed_hooks_do_not_run(mode):
    x, w = scalar(2.0), scalar(3.0)
    handle = register_multi_grad_hook([x, w], lambda grads: pytest.fail("removed"))
    handle.remove()
    handle.remove()
    with register_multi_grad_hook([x, w], lambda grads: [g * 10.0 for g in grads]):
        mode.backward(x * w)
    mode.backward(x * w)
    assert (float(x.grad), float(w.grad)) == (33.0, 22.0)


def test_a_hook_is_gone_with_its_tensors_and_keeps_none():
    x, w = scalar(2.0), scalar(3.0)

    def fn(grads):
        return None

    gone = [weakref.ref(x), weakref.ref(fn)]
    handle = register_multi_grad_hook([x, w], fn)
    del x, fn
    gc.collect()
    assert [ref() is None for ref in gone] == [True, False]  # w is left
    del w
    gc.collect()
    assert gone[1]() is None
    handle.remove()


@both
def test_hook_with_a_tensor_that_is_gone(mode):
    x, w = scalar(2.0), scalar(3.0)
    y = x * 4.0
    register_multi_grad_hook([y, w], lambda grads: [None if g is None else g * 10.0 for g in grads])
    total = y * 5.0
    del y, w
    gc.collect()
    mode.backward(total)  # the node of y is there still
    assert float(x.grad) == 200.0


@both
def test_state_counts_and_captures_are_used_again(mode):
    state = State()

    def scale(grads):
        state.runs += 1
        return [g * state.runs for g in grads]

    found = []
    mode.graphs.clear()
    for _ in range(3):
        x, w = scalar(2.0), scalar(3.0)
        register_multi_grad_hook([x, w], scale)
        mode.backward(x * w)
        found.append((float(x.grad), float(w.grad)))
    assert (found, state.runs) == ([(3.0, 2.0), (6.0, 4.0), (9.0, 6.0)], 3)
    assert len(mode.graphs) == (1 if mode is CAPTURED else 0)


def test_other_members_or_another_place_are_another_capture():
    def double(grads):
        return [None if g is None else g * 2.0 for g in grads]

    def plus_one(g):
        return g + 1.0

    x, w = scalar(2.0), scalar(3.0)
    found = []
    for members, early in (([x, w], False), ([x], False), ([w], False), ([x], True)):
        x.grad = w.grad = None
        if not early:
            plus = x.register_hook(plus_one)
        with register_multi_grad_hook(members, double):
            if early:
                plus = x.register_hook(plus_one)
            CAPTURED.backward(x * w)
        plus.remove()
        found.append((float(x.grad), float(w.grad)))
    assert found == [(8.0, 4.0), (8.0, 2.0), (4.0, 4.0), (7.0, 2.0)]


@both
def test_grad_runs_it(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], lambda grads: [None if g is None else g * 10.0 for g in grads])
    found = mode.grad(x * w, [w, x])
    assert [float(g) for g in found] == [20.0, 30.0]
    (found,) = mode.grad(x * w, w)
    assert float(found) == 20.0


def test_it_is_differentiated():
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], lambda grads: [grads[0] * grads[1], None])
    # z = x**2 w: by x that is 2xw times x**2; differentiated again, (6 x**2 w, 2 x**3), and the hook multiplies.
    first = jhop.autograd.grad(x * x * w, [x, w], create_graph=True)
    second = jhop.autograd.grad(first[0], [x, w])
    assert [float(g) for g in (*first, *second)] == [48.0, 4.0, 72.0 * 16.0, 16.0]


def test_batched():
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    register_multi_grad_hook([x, w], lambda grads: [grads[1], grads[0]])
    found = jhop.autograd.grad(x * w, [x, w], jnp.eye(2), is_grads_batched=True)
    assert [f.tolist() for f in found] == [[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]


@both
def test_optimizer_in_backward_sees_what_the_hook_made(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], clip_to(1.0))
    for tensor in (x, w):
        tensor.register_post_accumulate_grad_hook(lambda t: setattr(t, "grad", t.grad * 100.0))
    mode.backward(x * 3.0 + w * 4.0)
    np.testing.assert_allclose([float(x.grad), float(w.grad)], [60.0, 80.0], rtol=1e-6)


# Errors.


@both
@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda grads: grads[0], "a sequence of 2 gradients, one for each Tensor, but returned"),
        (lambda grads: grads[:1], "returned list of 1"),
        (lambda grads: [grads[0], jnp.ones(3)], "shape and dtype"),
        (lambda grads: [1.0, None], "returned float"),
    ],
)
def test_bad_results(mode, hook, message):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], hook)
    with pytest.raises(jhop.HookError, match=message):
        mode.backward(x * w)
    assert (x.grad, w.grad) == (None, None)


@both
def test_nothing_can_flow_where_none_was_given(mode):
    x, w = scalar(2.0), scalar(3.0)
    register_multi_grad_hook([x, w], lambda grads: [grads[0], grads[0]])
    with pytest.raises(jhop.HookError, match="a gradient where it was given None"):
        mode.backward(x * 5.0)


@pytest.mark.parametrize(
    ("tensors", "fn", "mode", "message"),
    [
        (lambda x: [x], print, "some", "expected mode 'all' or 'any', got 'some'"),
        (lambda x: [x], 3, "all", "expected a callable hook, got int"),
        (lambda x: [x, x], print, "all", r"tensors\[1\], of shape \(1,\), is given twice"),
        (lambda x: [x, x.detach()], print, "all", r"tensors\[1\]: this Tensor does not require grad"),
        (lambda x: [], print, "all", "expected at least one Tensor"),
        (lambda x: [x, 3.0], print, "any", "expected Tensors"),
    ],
)
def test_bad_registrations(tensors, fn, mode, message):
    with pytest.raises(jhop.JhopError, match=message):
        register_multi_grad_hook(tensors(leaf(2.0)), fn, mode=mode)


def test_not_inside_a_compiled_function():
    @jhop.compile
    def fn(x):
        register_multi_grad_hook([x], clip_to(1.0))
        return x * 2.0

    with pytest.raises(jhop.JhopError, match="register_multi_grad_hook inside a function that jhop.compile traces"):
        fn(leaf(2.0))


# Live, against PyTorch: random programs with hooks on random sets of values.


def program(seed):
    rng = random.Random(seed)
    steps = [(rng.randrange(3), rng.randrange(i + 3), rng.randrange(i + 3)) for i in range(rng.randint(3, 8))]
    n = len(steps) + 3
    groups = [(rng.sample(range(n), rng.randint(1, 4)), rng.choice(["all", "all", "any"])) for _ in range(3)]
    hooks = [(rng.randrange(n), rng.uniform(0.5, 2.0)) for _ in range(3)]
    roots = rng.sample(range(3, n), 2)

    def run(ns, make, multi, backward, number):
        calls = []
        values = [make([0.5 + i, -1.0 + i]) for i in range(3)]
        leaves = values[:]
        for kind, a, b in steps:
            x, y = values[a], values[b]
            values.append((x * y, x + y * 0.5, ns.sin(x) * y)[kind])
        order = random.Random(seed + 1)
        todo = [("group", i) for i in range(len(groups))] + [("hook", i) for i in range(len(hooks))]
        order.shuffle(todo)
        for what, i in todo:
            if what == "hook":
                at, factor = hooks[i]
                values[at].register_hook(lambda g, factor=factor: g * factor)
            elif groups[i][1] == "any":
                # Which is first is up to the engine; that it runs once is not.
                multi([values[k] for k in groups[i][0]], lambda g, i=i: calls.append((i, 0)), mode="any")
            else:
                def note(grads, i=i):
                    calls.append((i, [None if g is None else [number(v) for v in g] for g in grads]))

                multi([values[k] for k in groups[i][0]], note)
        for at in roots:
            backward(values[at].sum())
        return sorted(calls, key=lambda call: call[0]), [t.grad for t in leaves]

    return run


@both
@pytest.mark.parametrize("seed", range(12))
def test_against_torch(mode, seed):
    torch = pytest.importorskip("torch")
    run = program(seed)
    theirs = run(
        torch, lambda v: torch.tensor(v, requires_grad=True), torch.autograd.graph.register_multi_grad_hook,
        lambda t: t.backward(retain_graph=True), float,
    )  # fmt: skip

    def backward(tensor):
        if mode is EAGER:
            return tensor.backward(retain_graph=True)
        with jhop.compiled_autograd.enable(lambda gm: gm):  # hooks run with real values
            tensor.backward(retain_graph=True)

    ours = run(hnp, lambda v: leaf(*v), register_multi_grad_hook, backward, float)
    assert [call[0] for call in ours[0]] == [call[0] for call in theirs[0]]
    for (_, mine), (_, other) in zip(ours[0], theirs[0], strict=True):
        for a, b in zip(mine or [], other or [], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            np.testing.assert_allclose(np.asarray(mine), other.numpy(), rtol=2e-4, atol=1e-5)
