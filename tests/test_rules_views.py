"""PyTorch's rules 81 to 94 (docs/RULES.md): new versions of a value, several Tensors, what is saved, callbacks."""

import jax.numpy as jnp
import pytest
from rules import each_mode, leaf, mark, note, scalar, times, values

import jhop
import jhop.numpy as hnp
from jhop.autograd import queue_callback, register_multi_grad_hook, saved_tensors_hooks


@pytest.fixture
def seen():
    return []


@each_mode
def test_rule_081_a_hook_stays_on_the_version_that_it_was_put_on(mode, seen):
    def fn(x):
        y = x * 2.0
        y.register_hook(mark(seen, "before", lambda grad: grad + 1.0))
        old = y
        y *= 5.0
        assert y is not old
        y.register_hook(mark(seen, "after", times(7.0)))
        return y * 3.0

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert (seen, float(x.grad)) == (["after", "before"], 2.0 * (5.0 * (7.0 * 3.0) + 1.0))


def test_rule_081_at_set_makes_a_new_value_without_hooks(seen):
    x = leaf(1.0, 2.0)
    y = x * 2.0
    y.register_hook(note(seen, times(10.0)))
    z = y.at[0].set(0.0)
    (z * 3.0).sum().backward()
    assert (values(seen), x.grad.tolist()) == ([[0.0, 3.0]], [0.0, 60.0])


@each_mode
def test_rule_082_a_retained_gradient_is_that_of_the_version_that_was_asked(mode):
    """In PyTorch it moves on to the new version."""
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.retain_grad()
    old = y
    y *= 5.0
    mode.backward(mode.compile(lambda y: y * 3.0)(y))
    assert (float(old.grad), y.grad, y.retains_grad, float(x.grad)) == (15.0, None, False, 30.0)


@each_mode
def test_rule_083_a_part_of_a_value_is_a_value_of_its_own(mode, seen):
    """There is no writing through a view: the base stays as it is, and a hook on the part is on the part."""

    def fn(x):
        y = x * 1.0
        part = y[0]
        part.register_hook(note(seen, times(10.0)))
        old = part
        part *= 3.0
        return (y * 2.0).sum() + part + old * 0.0

    x = leaf(1.0, 5.0)
    mode.backward(mode.compile(fn)(x))
    assert (values(seen), x.grad.tolist()) == ([3.0], [32.0, 2.0])


@each_mode
def test_rule_084_a_hook_on_a_part_that_nothing_uses_is_silent(mode, seen):
    def fn(x):
        y = x * 2.0
        part = y[0]
        part.register_hook(note(seen, times(10.0)))
        return (y * 3.0).sum()

    x = leaf(1.0, 5.0)
    mode.backward(mode.compile(fn)(x))
    assert (seen, x.grad.tolist()) == ([], [6.0, 6.0])


@each_mode
def test_rule_085_each_of_several_results_may_be_changed(mode):
    """PyTorch refuses to change one in place; here `*=` makes a new value."""

    def fn(x):
        a, b = hnp.split(x * 2.0, 2)
        a.register_hook(lambda grad: grad + 1.0)
        a *= 5.0
        return (a + b * 3.0).sum()

    x = leaf(1.0, 5.0)
    mode.backward(mode.compile(fn)(x))
    assert x.grad.tolist() == [12.0, 6.0]


@each_mode
def test_rule_086_a_hook_on_all_runs_once_with_none_for_what_is_not_reached(mode, seen):
    x, w, v = scalar(1.0), scalar(2.0), scalar(3.0)

    def joint(grads):
        seen.append([None if grad is None else grad * 1.0 for grad in grads])
        return [None if grad is None else grad * 10.0 for grad in grads]

    register_multi_grad_hook([x, w, v], joint)
    mode.backward(mode.compile(lambda x, w: x * 2.0 + w * 5.0)(x, w))
    assert [values(grads) for grads in seen] == [[2.0, 5.0, None]]
    mode.backward(mode.compile(lambda x, w, v: x + w * 3.0 + v * 7.0)(x, w, v))
    assert [values(grads) for grads in seen[1:]] == [[1.0, 3.0, 7.0]]
    assert (float(x.grad), float(w.grad), float(v.grad)) == (30.0, 80.0, 70.0)


@each_mode
def test_rule_087_a_hook_on_any_runs_once_per_backward(mode, seen):
    x, w = scalar(1.0), scalar(2.0)
    register_multi_grad_hook([x, w], lambda grad: seen.append(grad), mode="any")
    fn = mode.compile(lambda x, w: x * 2.0 + w * 2.0)
    for _ in range(2):
        mode.backward(fn(x, w))
    assert (values(seen), float(x.grad)) == ([2.0, 2.0], 4.0)


@each_mode
def test_rule_088_a_hook_on_all_may_return_a_hook_on_any_may_not(mode):
    x, w = scalar(1.0), scalar(2.0)
    fn = mode.compile(lambda x, w: x * 3.0 + w * 4.0)

    def clip(grads):
        norm = jnp.sqrt(sum(grad * grad for grad in grads))
        return [grad / norm for grad in grads]

    with register_multi_grad_hook([x, w], clip):
        mode.backward(fn(x, w))
    assert (float(x.grad), float(w.grad)) == (pytest.approx(0.6), pytest.approx(0.8))
    with (
        register_multi_grad_hook([x, w], lambda grad: grad, mode="any"),
        pytest.raises(jhop.HookError, match="mode='any' must return None"),
    ):
        mode.backward(fn(x, w))
    with pytest.raises(jhop.HookError, match="expected mode 'all' or 'any', got 'some'"):
        register_multi_grad_hook([x, w], clip, mode="some")
    with pytest.raises(jhop.HookError, match=r"tensors\[1\]: this Tensor does not require grad"):
        register_multi_grad_hook([x, jhop.tensor(1.0)], clip)


@each_mode
def test_rule_089_what_is_saved_is_packed_then_and_unpacked_in_the_backward(mode, seen):
    x, w = leaf(2.0), leaf(3.0)

    def pack(array):
        seen.append("pack")
        return array * 10.0

    def unpack(kept):
        seen.append("unpack")
        return kept

    with saved_tensors_hooks(pack, unpack):
        y = mode.compile(lambda x, w: x * w)(x, w)
    assert seen == ["pack"] * 2
    mode.backward(y.sum())
    assert seen == ["pack"] * 2 + ["unpack"] * 2
    assert (x.grad.tolist(), w.grad.tolist()) == ([30.0], [20.0])


@each_mode
def test_rule_090_the_innermost_block_counts(mode, seen):
    x = leaf(2.0)

    def scale(label, factor):
        return lambda array: (seen.append(label), array * factor)[1]

    with saved_tensors_hooks(scale("outer", 100.0), lambda kept: kept):
        with saved_tensors_hooks(scale("inner", 10.0), lambda kept: kept):
            y = mode.compile(lambda x: x * x)(x)
    mode.backward(y.sum())
    assert (set(seen), x.grad.tolist()) == ({"inner"}, [40.0])


def test_rule_091_there_is_nothing_that_disables_saved_tensor_hooks():
    """Arrays cannot be written in place, so `pack` cannot do harm; a block of identities turns others off."""
    assert not hasattr(jhop.autograd, "disable_saved_tensors_hooks")
    x = leaf(2.0)
    with (
        saved_tensors_hooks(lambda array: array * 100.0, lambda kept: kept),
        saved_tensors_hooks(lambda array: array, lambda kept: kept),
    ):
        y = x * x
    y.sum().backward()
    assert x.grad.tolist() == [4.0]


@each_mode
def test_rule_092_unpack_runs_in_each_backward(mode, seen):
    x = leaf(2.0)
    with saved_tensors_hooks(lambda array: array, lambda kept: (seen.append("unpack"), kept * 10.0)[1]):
        y = mode.compile(lambda x: x * x)(x).sum()
    counts = []
    for keep in (True, False):
        mode.backward(y, retain_graph=keep)
        counts.append(len(seen))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]
    assert x.grad.tolist() == [80.0]


@each_mode
def test_rule_093_a_callback_runs_when_the_whole_pass_has_ended(mode, seen):
    """It is called by the host, so under compiled autograd the hook that queues it is taken out of the graph."""
    x, w = scalar(1.0), scalar(2.0)

    def hook(grad):
        seen.append("hook")
        queue_callback(lambda: seen.append((float(x.grad), float(w.grad))))
        return grad * 5.0

    x.register_hook(hook)
    w.register_hook(mark(seen, "other"))
    y = mode.compile(lambda x, w: x * 3.0 + w * 7.0)(x, w)
    if mode.name == "captured":
        with pytest.raises(jhop.Unsupported, match=r"queue_callback .*fullgraph=False"):
            mode.backward(y, retain_graph=True)
        assert seen == []
        with pytest.warns(UserWarning, match="`hook`"), mode.captured(jhop.compile):
            y.backward()
    else:
        mode.backward(y)
    assert sorted(seen[:2]) == ["hook", "other"]
    assert seen[2:] == [(15.0, 7.0)]


def test_rule_094_in_one_graph_a_hook_that_queues_a_callback_is_refused():
    def fn(x):
        y = x * 3.0
        y.register_hook(lambda grad: queue_callback(list))
        return y

    x = scalar(1.0)
    with pytest.raises(jhop.Unsupported, match=r"queue_callback .*fullgraph=False"):
        jhop.compile(fn, fullgraph=True)(x).backward()
    assert x.grad is None
