"""PyTorch's rules 95 to 108 (docs/RULES.md): higher derivatives, transformations, checkpoints, threads, NaN."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rules import MODES, each_mode, leaf, note, scalar, times, values

import jhop
import jhop.numpy as hnp

each_jit = pytest.mark.parametrize("compile", [lambda fn: fn, jax.jit, jhop.jit], ids=["eager", "jax.jit", "jhop.jit"])


with_state = pytest.mark.parametrize("compile", [lambda fn: fn, jhop.jit], ids=["eager", "jhop.jit"])


class Count:
    """A hook that counts, and scales by `factor`."""

    runs = 0

    def __init__(self, factor):
        self.factor = factor
        self.shape = None

    def __call__(self, ct):
        self.runs += 1
        self.shape = ct.shape
        return ct * self.factor


@pytest.fixture
def seen():
    return []


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
def test_rule_095_what_a_hook_computes_has_history_with_create_graph_alone(mode, create_graph):
    other = scalar(2.0)
    found = []

    def hook(grad):
        result = grad * other
        found.append((isinstance(grad, jhop.Tensor), result.requires_grad))
        return result

    x = scalar(3.0)
    x.register_hook(hook)
    (grad,) = mode.grad(mode.compile(lambda x: x * x * x)(x), x, create_graph=create_graph)
    assert (found, float(grad)) == ([(create_graph, create_graph)], 54.0)


@each_mode
def test_rule_095_a_hook_that_returns_an_array_ends_the_history(mode):
    x = scalar(3.0)
    y = mode.compile(lambda x: x * x * x)(x)
    y.register_hook(lambda grad: getattr(grad, "value", grad) * 2.0)
    z = y * y
    (grad,) = mode.grad(z, x, create_graph=True)
    (bend,) = mode.grad(grad, x)
    # 2 * 2 x**3 * 3 x**2, of which the first factor is now a constant: 4 x**3 * 6 x
    assert (float(grad), float(bend)) == (4.0 * 27.0 * 27.0, 4.0 * 27.0 * 18.0)


@each_mode
def test_rule_096_a_second_derivative_goes_through_the_hook(mode):
    def fn(x):
        y = x * x * x
        y.register_hook(times(2.0))
        return y

    x = scalar(3.0)
    (grad,) = mode.grad(mode.compile(fn)(x), x, create_graph=True)
    (bend,) = mode.grad(grad, x)
    assert (float(grad), float(bend)) == (54.0, 36.0)


@each_jit
def test_rule_096_in_a_jax_function_too(compile):
    def cube(x):
        return jhop.hook(x * x * x, times(2.0))

    assert float(compile(jax.grad(jax.grad(cube)))(3.0)) == 36.0


@each_mode
def test_rule_097_a_hook_that_uses_a_value_of_the_forward_adds_its_own_derivative(mode):
    x = scalar(3.0)
    x.register_hook(lambda grad: grad * x)
    (grad,) = mode.grad(mode.compile(lambda x: x * x)(x), x, create_graph=True)
    (bend,) = mode.grad(grad, x)
    assert (float(grad), float(bend)) == (18.0, 36.0)


@each_jit
def test_rule_097_in_a_jax_function_too(compile):
    def square(x):
        return jhop.hook(x * x, lambda ct: ct * x)

    assert float(compile(jax.grad(jax.grad(square)))(3.0)) == 12.0


@each_mode
def test_rule_098_the_hook_runs_again_in_the_second_pass(mode, seen):
    x = scalar(3.0)
    x.register_hook(note(seen, times(2.0)))
    (grad,) = mode.grad(mode.compile(lambda x: x * x * x)(x), x, create_graph=True)
    mode.backward(grad)
    assert [float(grad) for grad in seen] == [27.0, 36.0]
    assert float(x.grad) == 72.0


@pytest.mark.parametrize("order", [2, 3])
def test_rule_099_create_graph_under_compiled_autograd(order):
    mode = MODES[2]
    x = scalar(3.0)
    y = x * x * x * x
    y.register_hook(times(2.0))
    for i in range(order):
        mode.graphs.clear()
        (y,) = mode.grad(y, x, create_graph=i + 1 < order)
    assert float(y) == {2: 2 * 12 * 9.0, 3: 2 * 24 * 3.0}[order]
    assert len(mode.graphs) == 1  # the last pass was captured


@with_state
def test_rule_100_jax_grad_runs_hooks(compile):
    count = Count(5.0)
    grad = compile(jax.grad(lambda x: (jhop.hook(x * 2.0, count) * 3.0).sum()))
    assert grad(jnp.ones(2)).tolist() == [30.0, 30.0]
    assert (count.runs, count.shape) == (1, (2,))


@each_jit
def test_rule_101_under_vmap_a_hook_sees_one_examples_shape(compile):
    def hook(ct):
        assert ct.shape == (2,)
        return ct / jnp.linalg.norm(ct)

    grad = compile(jax.vmap(jax.grad(lambda x: (jhop.hook(x, hook) * jnp.array([3.0, 4.0])).sum())))
    np.testing.assert_allclose(grad(jnp.ones((3, 2))), [[0.6, 0.8]] * 3, rtol=1e-6)


@with_state
@pytest.mark.parametrize("how", ["vmap", "jacrev"])
def test_rule_101_and_runs_once(compile, how):
    count = Count(10.0)
    fn = lambda x: jhop.hook(x, count) * jnp.array([3.0, 4.0])  # noqa: E731
    if how == "vmap":
        found = compile(jax.vmap(jax.grad(lambda x: fn(x).sum())))(jnp.ones((2, 2)))
    else:
        found = compile(jax.jacrev(fn))(jnp.ones(2))
    assert found.tolist() == ([[30.0, 40.0]] * 2 if how == "vmap" else [[30.0, 0.0], [0.0, 40.0]])
    assert (count.runs, count.shape) == (1, (2,))


@each_mode
def test_rule_101_and_in_a_batch_of_cotangents(mode):
    shapes = []

    def hook(grad):
        shapes.append(grad.shape)
        return grad * 10.0

    x = leaf(1.0, 1.0)
    x.register_hook(hook)
    y = mode.compile(lambda x: x * jnp.array([3.0, 4.0]))(x)
    (found,) = mode.grad(y, x, jnp.eye(2), is_grads_batched=True)
    assert (found.tolist(), shapes) == ([[30.0, 0.0], [0.0, 40.0]], [(2,)])


@each_jit
def test_rule_102_forward_mode_ignores_hooks(compile):
    def fn(x):
        return jhop.hook(x * 2.0, times(100.0)) * 3.0

    primal, tangent = compile(lambda x, dot: jax.jvp(fn, (x,), (dot,)))(1.0, 5.0)
    assert (float(primal), float(tangent)) == (6.0, 30.0)
    assert float(compile(jax.jacfwd(jax.grad(lambda x: fn(x * x))))(1.0)) == 1200.0  # not the grad's hook


@each_mode
def test_rule_103_a_hook_inside_a_checkpoint_counts_once(mode):
    """The function is JAX's, so the hook in it is `jhop.hook`."""

    def program(hook):
        @jhop.lift
        @jax.checkpoint
        def block(x):
            return jnp.sin(jhop.hook(jnp.sin(x), hook))

        x = scalar(1.0)
        mode.backward(mode.compile(block)(x))
        return float(x.grad)

    expected = pytest.approx(5.0 * np.cos(np.sin(1.0)) * np.cos(1.0), rel=1e-5)
    count = Count(5.0)
    assert program(times(5.0)) == expected
    assert (program(count), count.runs) == (expected, 1)
    assert (program(count), count.runs) == (expected, 2)


@each_mode
@pytest.mark.parametrize("create_graph", [False, True])
def test_rule_103_what_such_a_hook_reads_is_read_at_each_backward(mode, create_graph):
    count = Count(2.0)
    fn = mode.compile(jhop.lift(lambda x: jnp.sin(jhop.hook(x, count))))
    found = []
    for factor in (2.0, 3.0, 5.0):
        count.factor = factor
        x = scalar(0.0)
        found += [float(grad) for grad in mode.grad(fn(x), x, create_graph=create_graph)]
    assert (found, count.runs) == ([2.0, 3.0, 5.0], 3)


def test_rule_103_also_in_a_scan_of_checkpoints():
    count = Count(2.0)

    @jax.checkpoint
    def body(x, _):
        return jnp.sin(jhop.hook(x, count)), None

    grad = jhop.jit(jax.grad(lambda x: jax.lax.scan(body, x, None, length=3)[0]))
    plain = jax.grad(lambda x: jnp.sin(jnp.sin(jnp.sin(x))))
    assert float(grad(1.0)) == pytest.approx(8.0 * float(plain(1.0)), rel=1e-5)
    assert count.runs == 3


@each_mode
def test_rule_104_a_value_used_in_and_out_of_a_checkpoint_has_one_gradient(mode, seen):
    block = jhop.lift(jax.checkpoint(lambda y: y * 3.0))

    def fn(x):
        y = x * 2.0
        y.register_hook(note(seen, times(2.0)))
        return (block(y) + y).sum()

    x = leaf(1.0, 1.0)
    mode.backward(mode.compile(fn)(x))
    assert (values(seen), x.grad.tolist()) == ([[4.0, 4.0]], [16.0, 16.0])


@each_mode
def test_rule_105_a_backward_inside_a_hook(mode, seen):
    def hook(grad):
        inner = jhop.tensor(grad, requires_grad=True)
        inner.register_hook(times(10.0))
        with jhop.autograd.enable_grad():  # hooks run without
            (inner * inner).backward()
        return inner.grad

    x = scalar(1.0)
    x.register_hook(hook)
    mode.backward(mode.compile(lambda x: x * 3.0)(x))
    assert float(x.grad) == 60.0


@each_jit
def test_rule_105_a_gradient_inside_a_hook_of_a_jax_function(compile):
    def hook(ct):
        return jax.grad(lambda ct: jhop.hook(ct, times(10.0)) ** 2)(ct)

    assert float(compile(jax.grad(lambda x: jhop.hook(x, hook) * 3.0))(1.0)) == 60.0


@each_mode
def test_rule_106_four_threads_run_their_hooks(mode):
    class State:
        def __init__(self):
            self.runs = 0

    threads, found, errors = [], {}, []

    def work(i):
        try:
            state, x = State(), scalar(1.0)

            def hook(grad):
                state.runs += 1
                return grad * (2.0 + i)

            x.register_hook(hook)
            fn = mode.compile(lambda x: x * 2.0)
            for _ in range(3):
                mode.backward(fn(x))
            found[i] = (state.runs, float(x.grad))
        except BaseException as error:
            errors.append(error)

    for i in range(4):
        threads.append(threading.Thread(target=work, args=(i,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found == {i: (3, 3 * 2.0 * (2.0 + i)) for i in range(4)}


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.name)
def test_rule_106_a_hook_that_is_not_traced_runs_in_the_thread_that_called_backward(mode):
    where = []
    x = scalar(1.0)
    x.register_hook(lambda grad: where.append(threading.get_ident()))
    y = mode.compile(lambda x: x * 2.0)(x)
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert where == [thread.ident]


@each_mode
def test_rule_107_what_made_the_first_nan_is_named(mode):
    def fn(x):
        return hnp.sqrt(x * 0.0) * 0.0 + x

    x = scalar(1.0)
    y = mode.compile(fn)(x)
    named = "SqrtBackward, for input 0 of the operation,"
    if mode.name == "compiled":
        named = r"`\w+` in `fn_backward` \(test_rules_higher.py:\d+: return hnp.sqrt\("
    with pytest.raises(jhop.JhopError, match=rf"{named}.* made NaN of values without: float32\[\] with 1"):
        with mode.captured(), jhop.autograd.detect_anomaly():
            y.backward(retain_graph=True)
    assert x.grad is None
    mode.backward(y)
    assert np.isnan(float(x.grad))


@each_mode
def test_rule_107_it_holds_for_captured_passes_in_the_block(mode):
    x = scalar(-1.0)
    y = hnp.sqrt(x)
    with jhop.autograd.detect_anomaly(), pytest.raises(jhop.JhopError, match="SqrtBackward.* made NaN"):
        mode.backward(y, retain_graph=True)
    mode.backward(y)
    assert np.isnan(float(x.grad))


@each_mode
def test_rule_107_a_hook_that_makes_a_nan_is_named_and_others_run_as_ever(mode, seen):
    def bad(grad):
        return grad / (grad - grad) * 0.0

    def fn(x, y):
        x.register_hook(note(seen, times(5.0)))
        z = y * 2.0
        z.register_hook(bad)
        return x * 3.0, z * 7.0

    x, y = scalar(1.0), scalar(1.0)
    first, second = mode.compile(fn)(x, y)
    with mode.captured(), jhop.autograd.detect_anomaly():
        first.backward(retain_graph=True)
        assert (float(x.grad), values(seen)) == (15.0, [3.0])
        with pytest.raises(jhop.JhopError, match=r"hook `bad` \(test_rules_higher.py:\d+\).* made NaN"):
            second.backward()


@each_mode
def test_rule_108_two_hooks_bracket_where_a_nan_is_born(mode, seen):
    def fn(x):
        y = x * 0.0
        y.register_hook(note(seen))
        x.register_hook(note(seen))
        z = hnp.sqrt(y)
        return z * 0.0

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert np.isnan(float(x.grad))
    assert [np.isnan(grad) for grad in values(seen)] == [True, True]


@each_mode
def test_rule_108_the_hook_above_sees_a_number(mode, seen):
    def fn(x):
        y = x * 0.0
        z = hnp.sqrt(y)
        z.register_hook(note(seen))
        y.register_hook(note(seen))
        return z * 0.0

    mode.backward(mode.compile(fn)(scalar(1.0)))
    above, below = values(seen)
    assert above == 0.0 and np.isnan(below)
