"""PyTorch's rules 1 to 20 (docs/RULES.md): when a hook on a value runs, and on which gradient."""

import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import pytest
from rules import each_mode, leaf, mark, note, only_eager_and_captured, scalar, times, values

import jhop
import jhop.numpy as hnp


@pytest.fixture
def seen():
    return []


@each_mode
def test_rule_001_runs_once_on_the_sum_over_all_uses(mode, seen):
    def fn(x):
        y = x * 2.0
        z = y + 1.0
        y.register_hook(note(seen, times(2.0)))
        return (z + y * 3.0).sum()

    x = leaf(1.0, 1.0)
    mode.backward(mode.compile(fn)(x))
    assert (x.grad.tolist(), values(seen)) == ([16.0, 16.0], [[4.0, 4.0]])


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_001_in_a_jax_function_the_hook_is_on_all_uses_of_what_hook_returns(compile):
    def loss(x):
        y = jhop.hook(x * 2.0, lambda ct: ct.clip(max=3.0))
        return (y + 1.0 + y * 3.0).sum()

    assert compile(jax.grad(loss))(jnp.ones(2)).tolist() == [6.0, 6.0]


@each_mode
def test_rule_002_a_hook_registered_after_the_uses_counts_for_them(mode):
    def fn(x):
        y = x * 2.0
        z = y * 3.0
        y.register_hook(times(5.0))
        return z

    x = scalar(7.0)
    mode.backward(mode.compile(fn)(x))
    assert float(x.grad) == 30.0


def test_rule_002_in_a_jax_function_it_is_from_here_on():
    def loss(x):
        z = x * 3.0
        x = jhop.hook(x, times(5.0))
        return z + x * 2.0

    assert float(jhop.jit(jax.grad(loss))(7.0)) == 3.0 + 2.0 * 5.0


def test_rule_002_strict_refuses_a_use_past_the_hook():
    @jhop.strict
    def loss(x):
        hooked = jhop.hook(x, times(5.0))
        return hooked * 3.0 + x * 2.0

    with pytest.raises(jhop.HookError, match=r"`loss` uses a value past .*after it, at test_rules_fire.py:\d+"):
        jax.grad(loss)(7.0)


@each_mode
def test_rule_003_a_clip_shows_that_the_hook_gets_the_sum(mode):
    def fn(x):
        y = x * 2.0
        z = y * 4.0
        y.register_hook(lambda grad: grad.clip(max=5.0))
        return z + y * 3.0

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert float(x.grad) == 10.0  # and not 14, the sum of clips


@each_mode
def test_rule_004_a_value_off_the_path_is_silent(mode, seen):
    def fn(x):
        y = x * 2.0
        y.register_hook(note(seen, times(7.0)))
        return y, x * 3.0

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x)[1])
    assert (float(x.grad), seen) == (3.0, [])


def parts(x):
    return hnp.split(x, 2)


@each_mode
def test_rule_005_of_several_results_one_without_gradient_runs_no_tensor_hook(mode, seen):
    """PyTorch calls the hook with None. The node's hooks see that None; a pytree in `jhop.hook` gets zeros."""
    reached = []

    def fn(x):
        a, b = parts(x)
        b.register_hook(note(seen, times(7.0)))
        a.register_hook(note(reached, times(5.0)))
        return a * 3.0, b * 2.0

    x = leaf(1.0, 2.0)
    mode.backward(mode.compile(fn)(x)[0].sum())
    assert (x.grad.tolist(), seen, values(reached)) == ([15.0, 0.0], [], [[3.0]])


@only_eager_and_captured
def test_rule_005_the_nodes_hook_sees_none(mode, seen):
    x = leaf(1.0, 2.0)
    a, b = parts(x)
    a.grad_fn.register_prehook(lambda grads: seen.append([grad is None for grad in grads]))
    mode.backward((b * 3.0).sum())
    assert (x.grad.tolist(), seen) == ([0.0, 3.0], [[True, False]])


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_005_a_pytree_in_a_jax_function_gets_zeros(compile):
    def loss(x):
        a, _ = jhop.hook((x[0], x[1]), lambda cts: (cts[0] * 5.0, cts[1] + 11.0))
        return a * 3.0

    assert compile(jax.grad(loss))(jnp.array([1.0, 2.0])).tolist() == [15.0, 11.0]


@only_eager_and_captured
def test_rule_005_a_hook_that_asks_for_it_gets_none(mode, seen):
    x = leaf(1.0, 2.0)
    a, b = parts(x)
    b.register_hook(note(seen), zeros="none")
    mode.backward((a * 3.0).sum())
    assert (x.grad.tolist(), seen) == ([3.0, 0.0], [None])


@pytest.mark.parametrize(("zeros", "expected"), [("none", [15.0, 0.0]), ("skip", [3.0, 0.0])])
@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_005_a_pytree_in_a_jax_function_gets_what_it_asks_for(compile, zeros, expected):
    def loss(x):
        hook = lambda cts: (cts[0] * 5.0, None if cts[1] is None else cts[1] + 11.0)  # noqa: E731
        a, _ = jhop.hook((x[0], x[1]), hook, zeros=zeros)
        return a * 3.0

    assert compile(jax.grad(loss))(jnp.array([1.0, 2.0])).tolist() == expected


@each_mode
def test_rule_006_what_an_earlier_backward_reached_a_later_one_need_not(mode, seen):
    def fn(x):
        a, b = parts(x)
        a.register_hook(note(seen, times(5.0)))
        b.register_hook(note(seen, times(7.0)))
        return a.sum(), b.sum() * 2.0

    x = leaf(1.0, 2.0)
    outs = mode.compile(fn)(x)
    for out in outs:
        mode.backward(out, retain_graph=True)
    assert (x.grad.tolist(), values(seen)) == ([5.0, 14.0], [[1.0], [2.0]])


@only_eager_and_captured
def test_rule_006_a_later_backward_gives_none(mode, seen):
    x = leaf(1.0, 2.0)
    a, b = parts(x)
    b.register_hook(note(seen, lambda grad: None if grad is None else grad * 7.0), zeros="none")
    mode.backward((b * 2.0).sum(), retain_graph=True)
    mode.backward(a.sum())
    assert (x.grad.tolist(), values(seen)) == ([1.0, 14.0], [[2.0], None])


@each_mode
def test_rule_007_a_tensor_that_requires_no_grad_refuses_a_hook(mode):
    def fn(x):
        x.register_hook(times(2.0))
        return x * 3.0

    with pytest.raises(jhop.HookError, match=r"register_hook: this Tensor does not require grad"):
        mode.compile(fn)(jhop.tensor([1.0, 1.0]))


@each_mode
@pytest.mark.parametrize("cut", ["no_grad", "detach"])
def test_rule_008_what_was_cut_off_refuses_a_hook(mode, cut):
    def fn(x):
        with jhop.autograd.no_grad() if cut == "no_grad" else contextlib.nullcontext():
            y = x * 2.0
        y = y.detach() if cut == "detach" else y
        y.register_hook(times(5.0))
        return y * 3.0 + x

    with pytest.raises(jhop.HookError, match="does not require grad"):
        mode.compile(fn)(scalar(1.0))


@pytest.mark.parametrize("compile", [lambda fn: fn, jax.jit, jhop.jit], ids=["eager", "jax.jit", "jhop.jit"])
def test_rule_007_a_log_names_a_hook_on_what_nobody_differentiates(compile, caplog):
    caplog.set_level(logging.INFO, "jhop.inert")
    jhop.reset()
    compile(lambda x: jhop.hook(x, times(2.0)) * 3.0)(jnp.ones(2))
    (record,) = caplog.records
    assert re.fullmatch(
        r"hook `.*` \(tape_modes.py:\d+\) does not run: no backward pass .*/test_rules_fire.py:\d+", record.getMessage()
    )


@each_mode
def test_rule_008_no_gradient_flows_through_the_array_of_a_tensor(mode):
    other = scalar(5.0)
    x = scalar(3.0)
    fn = mode.compile(lambda x: x * x.value + hnp.sin(x * 0.0) * jnp.exp(x.value) + x * other.value)
    mode.backward(fn(x))
    assert (float(x.grad), other.grad) == (8.0, None)
    other.value = jnp.float32(7.0)
    mode.backward(fn(x))
    assert float(x.grad) == 18.0


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_008_behind_stop_gradient_a_hook_in_a_jax_function_is_silent(compile):
    def loss(x):
        y = jhop.hook(jax.lax.stop_gradient(x * 2.0), times(5.0))
        return y * x

    assert float(compile(jax.grad(loss))(3.0)) == 6.0


@each_mode
def test_rule_009_a_hook_whose_value_is_used_detached_alone_is_silent(mode, seen):
    def fn(x):
        y = x * 2.0
        y.register_hook(note(seen, times(7.0)))
        return y.detach() * x

    x = scalar(3.0)
    mode.backward(mode.compile(fn)(x))
    assert (float(x.grad), seen) == (6.0, [])


@each_mode
def test_rule_010_times_zero_is_reached(mode, seen):
    def fn(x):
        y = x * 2.0
        y.register_hook(note(seen, lambda grad: grad + 5.0))
        return (y * 0.0).sum()

    x = leaf(1.0, 1.0)
    mode.backward(mode.compile(fn)(x))
    assert (x.grad.tolist(), values(seen)) == ([10.0, 10.0], [[0.0, 0.0]])


def test_rule_011_integers_cannot_require_grad():
    with pytest.raises(jhop.JhopError, match="only floating and complex values can require grad, got dtype int32"):
        jhop.tensor([1], requires_grad=True)


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_011_in_a_jax_function_too(compile):
    def loss(x, n):
        return x * jhop.hook(n, times(2.0)).astype(x.dtype)

    with pytest.raises(jhop.HookError, match="only floating and complex values have gradients, got int32"):
        compile(jax.grad(loss))(1.0, jnp.int32(3))


@each_mode
def test_rule_012_complex_gradients_are_jaxs(mode, seen):
    """PyTorch's hook would get the conjugate, 2+4j; `conj` before and after a hook makes it one of PyTorch's."""

    def fn(z):
        z.register_hook(note(seen, lambda grad: (grad.conj() * 1j).conj()))
        return hnp.abs(z * z)

    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    mode.backward(mode.compile(fn)(z))
    assert jnp.allclose(jnp.array(values(seen)), jnp.array([2 - 4j]))
    assert jnp.allclose(z.grad, jnp.conj((2 + 4j) * 1j))


@each_mode
def test_rule_012_torch_complex_gives_pytorchs(mode, seen):
    def fn(z):
        z.register_hook(note(seen, lambda grad: grad * 1j), torch_complex=True)
        return hnp.abs(z * z)

    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    mode.backward(mode.compile(fn)(z))
    assert jnp.allclose(jnp.array(values(seen)), jnp.array([2 + 4j]))
    assert jnp.allclose(z.grad, jnp.conj((2 + 4j) * 1j))


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_012_in_a_jax_function_too(compile):
    def loss(z):
        return jnp.abs(jhop.hook(z, lambda ct: ct * 1j, torch_complex=True) ** 2)

    assert jnp.allclose(compile(jax.grad(loss))(jnp.complex64(1 + 2j)), jnp.conj((2 + 4j) * 1j))


def test_rule_012_as_in_pytorch(seen):
    torch = pytest.importorskip("torch")
    theirs = []

    def run(z, absolute, options, note):
        z.register_hook(lambda grad: (note(grad), grad * 1j)[1], **options)
        y = z * (2 + 1j)
        y.register_hook(lambda grad: (note(grad), grad + 3j)[1], **options)
        absolute(y * y).backward()
        return z.grad

    z = torch.tensor(1 + 2j, requires_grad=True)
    expected = run(z, torch.abs, {}, lambda grad: theirs.append(complex(grad)))
    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    found = run(z, hnp.abs, {"torch_complex": True}, lambda grad: seen.append(complex(grad)))
    assert jnp.allclose(jnp.array(seen), jnp.array(theirs))
    assert jnp.allclose(jnp.conj(found), complex(expected))


@each_mode
def test_rule_013_it_sees_the_gradient_of_this_backward(mode, seen):
    x = scalar(1.0)
    x.register_hook(note(seen, times(5.0)))
    for _ in range(2):
        mode.backward(mode.compile(lambda x: x * 2.0)(x))
    assert (values(seen), float(x.grad)) == ([2.0, 2.0], 20.0)


@each_mode
def test_rule_014_it_runs_at_each_backward_of_a_kept_graph(mode, seen):
    def fn(x):
        y = x * 2.0
        y.register_hook(note(seen, times(5.0)))
        return y * 3.0

    x = scalar(1.0)
    y = mode.compile(fn)(x)
    for keep in (True, True, False):
        mode.backward(y, retain_graph=keep)
    assert (values(seen), float(x.grad)) == ([3.0, 3.0, 3.0], 90.0)


@each_mode
def test_rule_015_hooks_of_a_chain_run_backwards(mode, seen):
    def fn(x):
        a = x * 2.0
        b = a * 3.0
        c = b * 5.0
        for label, value in zip("xabc", (x, a, b, c), strict=True):
            value.register_hook(mark(seen, label, times(10.0)))
        return c

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert (seen, float(x.grad)) == (["c", "b", "a", "x"], 30.0 * 10.0**4)


@each_mode
def test_rule_016_order_of_siblings_is_fixed(mode, seen):
    """The one made last runs first. A captured pass moves each hook to its gradient, which is as PyTorch does it."""

    def fn(x):
        a = x * 2.0
        b = x * 3.0
        b.register_hook(mark(seen, "b", times(10.0)))
        a.register_hook(mark(seen, "a", times(100.0)))
        return a + b

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert float(x.grad) == 230.0
    assert seen == (["a", "b"] if mode.name == "captured" else ["b", "a"])


@each_mode
def test_rule_017_grad_runs_the_hooks_of_its_inputs(mode):
    x = scalar(1.0)
    x.register_hook(times(7.0))
    (grad,) = mode.grad(mode.compile(lambda x: x * 2.0)(x), x)
    assert (float(grad), x.grad) == (14.0, None)


def test_rule_017_so_does_jax_grad():
    assert float(jhop.jit(jax.grad(lambda x: jhop.hook(x, times(7.0)) * 2.0))(1.0)) == 14.0


@each_mode
def test_rule_018_only_what_the_inputs_need_runs(mode, seen):
    def fn(x, w):
        v = w * 2.0
        v.register_hook(note(seen, times(9.0)))
        return x * v

    x, w = scalar(3.0), scalar(5.0)
    w.register_hook(note(seen, times(9.0)))
    x.register_hook(times(7.0))
    mode.backward(mode.compile(fn)(x, w), inputs=[x])
    assert (float(x.grad), w.grad, seen) == (70.0, None, [])


@only_eager_and_captured
def test_rule_019_hooks_of_the_inputs_node_run_for_backward_and_not_for_grad(mode, seen):
    def program():
        a = scalar(1.0)
        b = a * 2.0
        b.register_hook(mark(seen, "tensor", times(5.0)))
        b.grad_fn.register_prehook(lambda grads: seen.append("before"))
        b.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.append("after"))
        return b, b * 3.0

    b, c = program()
    (grad,) = mode.grad(c, [b])
    assert (float(grad), seen) == (15.0, ["tensor"])
    seen.clear()
    b, c = program()
    mode.backward(c, inputs=[b])
    assert (float(b.grad), seen) == (15.0, ["tensor", "before", "after"])


@each_mode
def test_rule_020_a_hook_runs_though_its_result_is_dropped(mode, seen):
    x = scalar(1.0)
    x.register_hook(note(seen, times(7.0)))
    mode.grad(mode.compile(lambda x: x * 2.0)(x), x)
    assert values(seen) == [2.0]


def test_rule_020_in_a_jax_function_only_a_hook_that_writes_state_runs_then():
    counts = {"state": 0}

    def counting(ct):
        counts["state"] += 1
        return ct * 7.0

    def step(x):
        jax.grad(lambda x: jhop.hook(x, counting) * jhop.hook(x, jnp.sin))(x)
        return x * 2.0

    run = jhop.jit(step)
    assert [float(run(3.0)) for _ in range(3)] == [6.0] * 3
    assert counts == {"state": 3}
    assert "sin" in str(jax.make_jaxpr(step)(3.0))
    assert "sine" not in run.lower(3.0).compile().as_text()  # a hook without effect is dead code
