"""PyTorch's rules 37 to 50 (docs/RULES.md): handles of hooks, and how long hooks live."""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import pytest
from rules import each_mode, leaf, mark, note, only_eager_and_captured, scalar, times, values

import jhop


@pytest.fixture
def seen():
    return []


def gradient(mode, x, fn=lambda x: x * 2.0):
    """The gradient of one more pass, by itself."""
    x.grad = None
    mode.backward(mode.compile(fn)(x))
    return float(x.grad)


@each_mode
def test_rule_037_removing_twice_is_no_error(mode):
    x = scalar(1.0)
    handle = x.register_hook(times(5.0))
    assert gradient(mode, x) == 10.0
    handle.remove()
    handle.remove()
    assert gradient(mode, x) == 2.0


@each_mode
def test_rule_038_a_handle_is_a_context_manager(mode):
    x = scalar(1.0)
    with x.register_hook(times(5.0)):
        assert gradient(mode, x) == 10.0
    assert gradient(mode, x) == 2.0


@each_mode
def test_rule_038_inside_the_function_the_hook_is_gone_before_the_backward(mode):
    def fn(x):
        with x.register_hook(times(5.0)):
            y = x * 2.0
        y.register_hook(times(7.0))
        return y

    assert gradient(mode, scalar(1.0), fn) == 14.0


@each_mode
@pytest.mark.parametrize("of", ["leaf", "result"])
def test_rule_039_removed_between_forward_and_backward_it_does_not_run(mode, of):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    handle = (x if of == "leaf" else y).register_hook(times(5.0))
    y.register_hook(times(7.0))
    handle.remove()
    mode.backward(y)
    assert float(x.grad) == 14.0


@each_mode
def test_rule_040_a_hook_that_removes_itself_counts_this_time(mode, seen):
    x = scalar(1.0)
    handles = []

    def once(grad):
        handles[-1].remove()
        return grad * 6.0

    handles.append(x.register_hook(once))
    assert [gradient(mode, x), gradient(mode, x)] == [12.0, 2.0]
    handles.append(x.register_hook(once))  # the captured graph of this pass is there already
    assert [gradient(mode, x), gradient(mode, x)] == [12.0, 2.0]


@each_mode
def test_rule_041_a_hook_that_removes_a_later_one_does_so_from_the_next_backward_on(mode, seen):
    x = scalar(1.0)
    handles = []
    x.register_hook(mark(seen, "a", lambda grad: handles[-1].remove()))
    for _ in range(2):
        handles.append(x.register_hook(mark(seen, "b", times(10.0))))
        assert [gradient(mode, x), gradient(mode, x)] == [20.0, 2.0]
    assert seen == ["a", "b", "a"] * 2


@each_mode
def test_rule_042_a_hook_that_registers_another_does_so_from_the_next_backward_on(mode, seen):
    x = scalar(1.0)
    handles = []
    new = mark(seen, "new", times(10.0))
    x.register_hook(mark(seen, "a", lambda grad: handles.append(x.register_hook(new))))
    assert gradient(mode, x) == 2.0
    assert gradient(mode, x) == 20.0
    assert gradient(mode, x) == 200.0
    for handle in handles:
        handle.remove()
    assert gradient(mode, x) == 2.0  # and registers one again, though a pass like this one was captured
    assert gradient(mode, x) == 20.0
    assert (len(handles), seen) == (5, ["a", "a", "new", "a", "new", "new", "a", "a", "new"])


@each_mode
def test_rule_043_handles_have_ids_of_their_own_and_hooks_an_order(mode, seen):
    x = scalar(1.0)
    first = x.register_hook(mark(seen, "a", times(5.0)))
    second = x.register_hook(mark(seen, "b", lambda grad: grad + 1.0))
    first.remove()
    third = x.register_hook(mark(seen, "a", times(5.0)))
    assert first.id < second.id < third.id
    assert gradient(mode, x) == 15.0
    assert seen == ["b", "a"]


@each_mode
def test_rule_044_a_returned_handle_is_one_object_and_removes_that_calls_hook(mode):
    def fn(x):
        handle = x.register_hook(times(5.0))
        return handle, x * 2.0, {"again": handle}

    fn = mode.compile(fn)
    xs = [scalar(1.0) for _ in range(3)]
    found = [fn(x) for x in xs]
    assert all(first is rest["again"] for first, _, rest in found)
    found[1][0].remove()
    for _, y, _ in found:
        mode.backward(y)
    assert [float(x.grad) for x in xs] == [10.0, 2.0, 10.0]


@pytest.mark.parametrize("removed", [False, True])
def test_rule_044_the_handle_of_a_value_inside_cannot_be_returned_from_a_compiled_function(removed):
    """As in PyTorch."""

    def fn(x):
        handle = (x if removed else x * 3.0).register_hook(times(5.0))
        if removed:
            handle.remove()
        return x * 2.0, handle

    with pytest.raises(jhop.JhopError, match=r"`fn` returned the handle of a hook on a value inside it"):
        jhop.compile(fn)(scalar(1.0))


@each_mode
def test_rule_045_of_two_registrations_the_one_that_was_not_removed_stays(mode):
    def fn(x):
        y = x * 2.0
        handle = y.register_hook(times(3.0))
        y.register_hook(times(5.0))
        handle.remove()
        handle = x.register_hook(times(3.0))
        x.register_hook(times(7.0))
        handle.remove()
        return y

    assert gradient(mode, scalar(1.0), fn) == 70.0


class Module:
    handle = None


@each_mode
def test_rule_046_a_handle_that_the_function_keeps_removes_the_hook_of_its_last_call(mode):
    module = Module()

    def fn(x):
        module.handle = x.register_hook(times(5.0))
        return x * 2.0

    fn = mode.compile(fn)
    xs = [scalar(1.0) for _ in range(4)]
    ys = []
    for i, x in enumerate(xs):
        ys.append(fn(x))
        if i % 2:
            module.handle.remove()
            module.handle.remove()
    for y in ys:
        mode.backward(y)
    assert [float(x.grad) for x in xs] == [10.0, 2.0, 10.0, 2.0]


def test_rule_046_the_handle_of_a_value_inside_says_that_it_cannot_remove():
    module = Module()

    def fn(x):
        y = x * 3.0
        module.handle = y.register_hook(times(5.0))
        return y * 2.0

    x = scalar(1.0)
    y = jhop.compile(fn)(x)
    with pytest.raises(jhop.JhopError, match="the hook is on a value inside `fn`, which jhop.compile compiled with it"):
        module.handle.remove()
    y.backward()
    assert float(x.grad) == 30.0


class Owner:
    """What a hook holds."""

    factor = 5.0


@each_mode
def test_rule_047_what_a_hook_holds_goes_with_its_tensor(mode):
    """A captured graph holds its hooks as long as it is kept for tapes like it, and so do JAX's caches of traces."""
    owner = Owner()
    x = scalar(1.0)
    x.register_hook(lambda grad, owner=owner: grad * owner.factor)
    x.register_post_accumulate_grad_hook(lambda tensor, owner=owner: None)
    assert gradient(mode, x) == 10.0
    refs = [weakref.ref(owner), weakref.ref(x)]
    del owner, x
    if mode.name == "captured":
        mode.fresh()
        jhop.reset()
        jax.clear_caches()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


@each_mode
def test_rule_048_detached_values_and_copies_have_no_hooks(mode, seen):
    def fn(x):
        x.register_hook(note(seen, times(5.0)))
        return x.detach() * 3.0 + x

    x = scalar(1.0)
    assert gradient(mode, x, fn) == 5.0
    copied = copy.deepcopy(x)
    assert gradient(mode, copied) == 2.0
    assert values(seen) == [1.0]


@each_mode
def test_rule_049_hooks_stay_where_the_value_is_exchanged_and_gradients_are_not_wanted_for_a_while(mode):
    """`.value` takes the place of `.data`. A graph keeps the value that it was recorded with."""
    x = scalar(1.0)
    x.register_hook(times(5.0))
    x.requires_grad_(False)
    assert not mode.compile(lambda x: x * 2.0)(x).requires_grad
    x.requires_grad_()
    assert gradient(mode, x) == 10.0
    y = mode.compile(lambda x: x * x)(x)
    x.value = jnp.float32(3.0)
    x.grad = None
    mode.backward(y)
    assert float(x.grad) == 10.0
    assert gradient(mode, x, lambda x: x * x) == 30.0
    for value, message in ((jnp.ones(2), "shape"), (3.0, "got float")):
        with pytest.raises(jhop.JhopError, match=f"Tensor.value: .*{message}"):
            x.value = value
    with pytest.raises(jhop.JhopError, match="only a leaf"):
        y.value = jnp.float32(3.0)


@only_eager_and_captured
def test_rule_050_a_tensor_with_hooks_is_pickled_without_them(mode):
    x = leaf(1.0, 3.0)
    x.register_hook(times(5.0))
    with pytest.warns(UserWarning, match="a Tensor's hooks are not pickled with it"):
        loaded = pickle.loads(pickle.dumps(x))
    mode.backward((loaded * loaded).sum())
    assert (loaded.requires_grad, loaded.grad.tolist()) == (True, [2.0, 6.0])
