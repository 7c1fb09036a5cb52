"""Options of `Tensor.register_hook`: `zeros="none"` and `torch_complex=True`."""

import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import MODES, each_mode, leaf, times

import jhop
import jhop.numpy as hnp

both = pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=lambda mode: mode.name)


class Seen:
    """A hook that counts its runs, and those with None."""

    def __init__(self, factor=7.0):
        self.runs = 0
        self.nones = 0
        self.factor = factor

    def __call__(self, grad):
        if grad is None:
            self.nones += 1
            return None
        self.runs += 1
        return grad * self.factor


# -- torch_complex -----------------------------------------------------------------------------------------------------


@each_mode
def test_torch_complex_on_leaves_and_results(mode):
    seen = []

    def hook(grad):
        seen.append(grad)
        return grad * 1j

    def fn(z):
        y = z * (2 + 1j)
        y.register_hook(hook, torch_complex=True)
        return hnp.abs(y * y)

    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    z.register_hook(lambda grad: grad + 3j, torch_complex=True)
    mode.backward(mode.compile(fn)(z))
    y = (1 + 2j) * (2 + 1j)
    assert np.allclose([complex(grad) for grad in seen], [2 * y])
    assert np.allclose(z.grad, np.conj(2 * y * 1j * np.conj(2 + 1j) + 3j))


@each_mode
def test_torch_complex_with_create_graph(mode):
    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    z.register_hook(lambda grad: grad * (3 + 1j), torch_complex=True)
    (slope,) = mode.grad(mode.compile(lambda z: hnp.abs(z) ** 2)(z), z, create_graph=True)
    assert np.allclose(slope.value, np.conj((2 + 4j) * (3 + 1j)))
    (bend,) = mode.grad(hnp.abs(slope) ** 2, z)  # |slope|**2 is 4 * 10 * |z|**2, and the hook runs once more
    assert np.allclose(bend, np.conj((80 + 160j) * (3 + 1j)))


def test_torch_complex_closing_over_values_of_a_compiled_function():
    @jhop.compile
    def fn(z):
        y = z * 2.0
        y.register_hook(lambda grad: grad * y.value, torch_complex=True)
        z.register_hook(lambda grad: grad * y.value, torch_complex=True)
        return hnp.abs(y) ** 2

    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    fn(z).backward()
    assert np.allclose(z.grad, np.conj((4 + 8j) * (2 + 4j) * 2.0 * (2 + 4j)))


def test_torch_complex_names_the_hook_and_can_be_removed():
    z = jhop.tensor(jnp.complex64(1 + 2j), requires_grad=True)
    handle = z.register_hook(lambda grad: grad.real, torch_complex=True)
    with pytest.raises(jhop.HookError, match=r"hook `<lambda>` \(test_tensor_hooks_options.py:\d+\) must return"):
        (hnp.abs(z) ** 2).backward()
    handle.remove()
    (hnp.abs(z) ** 2).backward()
    assert np.allclose(z.grad, 2 - 4j)


# -- zeros -------------------------------------------------------------------------------------------------------------


def parts(x):
    return hnp.split(x, 2)


@both
def test_none_for_a_sibling_that_nothing_reaches(mode):
    x, seen, plain = leaf(1.0, 2.0), Seen(), Seen(5.0)
    a, b = parts(x)
    for _ in range(2):
        b.register_hook(plain)
        b.register_hook(seen, zeros="none")
    mode.backward((a * 3.0).sum(), retain_graph=True)
    assert (seen.runs, seen.nones, plain.runs, plain.nones, x.grad.tolist()) == (0, 2, 0, 0, [3.0, 0.0])
    mode.backward((b * 2.0).sum())
    assert (seen.runs, seen.nones, plain.runs) == (2, 2, 2)
    assert x.grad.tolist() == [3.0, 2.0 * 5.0 * 7.0 * 5.0 * 7.0]


@both
def test_no_call_where_the_operation_is_not_reached(mode):
    x, seen = leaf(1.0, 2.0), Seen()
    a, b = parts(x)
    b.register_hook(seen, zeros="none")
    mode.backward((x * 3.0).sum())
    assert (seen.runs, seen.nones) == (0, 0)
    assert float(mode.grad((a * a).sum(), a)[0][0]) == 2.0  # neither does it run for a sibling of an input
    assert (seen.runs, seen.nones) == (0, 0)


@each_mode
def test_results_of_compiled_functions_and_handles(mode):
    x, seen = leaf(1.0, 2.0), Seen()
    a, b = mode.compile(lambda x: (x * 3.0, x * 5.0))(x)
    handle = b.register_hook(seen, zeros="none")
    if mode.name.startswith("compiled"):
        mode.backward(a.sum(), retain_graph=True)
        assert (seen.runs, seen.nones) == (0, 1)
        handle.remove()
        mode.backward(a.sum())
        assert (seen.runs, seen.nones, x.grad.tolist()) == (0, 1, [6.0, 6.0])
    else:  # two operations
        mode.backward(a.sum())
        assert (seen.runs, seen.nones) == (0, 0)


@each_mode
def test_on_an_argument_in_a_function_it_is_on_the_tensor_outside(mode):
    seen = Seen()

    def fn(b):
        scale = b * 2.0
        b.register_hook(lambda grad: seen(grad) if grad is None else seen(grad) * scale.value, zeros="none")
        return scale

    x = leaf(1.0, 2.0)
    a, b = parts(x)
    y = mode.compile(fn)(b)
    mode.backward(a.sum(), retain_graph=True)
    assert (seen.runs, seen.nones, x.grad.tolist()) == (0, 1, [1.0, 0.0])
    mode.backward(y.sum())
    assert (seen.runs, seen.nones, x.grad.tolist()) == (1, 1, [1.0, 2.0 * 7.0 * 4.0])


@each_mode
def test_with_create_graph_and_batches(mode):
    x, seen = leaf(1.0, 2.0), Seen()
    a, b = parts(x)
    b.register_hook(seen, zeros="none")
    (slope,) = mode.grad((a * a * 3.0).sum(), x, create_graph=True)
    assert (slope.tolist(), seen.nones) == ([6.0, 0.0], 1)
    (rows,) = mode.grad(a * 3.0, x, jnp.array([[1.0], [2.0]]), is_grads_batched=True)
    assert (rows.tolist(), seen.nones, seen.runs) == ([[3.0, 0.0], [6.0, 0.0]], 2, 0)


@both
def test_a_gradient_in_place_of_none_is_an_error_and_nothing_is_written(mode):
    x = leaf(1.0, 2.0)
    a, b = parts(x)
    b.register_hook(lambda grad: jnp.ones(1), zeros="none")
    with pytest.raises(jhop.JhopError, match=r"hook `<lambda>` \(.*\) returned a .* where it was given None"):
        mode.backward((a * 3.0).sum())
    assert x.grad is None


def test_refused_for_one_of_several_results_inside_a_compiled_function():
    @jhop.compile
    def fn(x):
        a, b = parts(x)
        b.register_hook(times(2.0), zeros="none")
        return a, b

    with pytest.raises(jhop.HookError, match=r"zeros='none' on one of several results .* Return the Tensor"):
        fn(leaf(1.0, 2.0))


def test_of_an_operation_with_one_result_it_changes_nothing():
    @jhop.compile
    def fn(x):
        y = x * 3.0
        y.register_hook(times(2.0), zeros="none")
        return y

    x = leaf(1.0)
    fn(x).sum().backward()
    assert x.grad.tolist() == [6.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"zeros": "materialize"}, "expected zeros to be one of 'skip', 'none', got 'materialize'"),
        ({"torch_complex": "yes"}, "expected torch_complex to be True or False, got 'yes'"),
        ({"fn": 3, "torch_complex": True}, "expected a callable hook, got int"),
    ],
)
def test_other_values_are_errors(options, told):
    x = leaf(1.0)
    with pytest.raises(jhop.HookError, match=f"^Tensor.register_hook: {told}"):
        x.register_hook(**({"fn": times(2.0)} | options))
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [3.0]
