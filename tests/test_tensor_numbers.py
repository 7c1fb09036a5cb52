"""Python floats that operators on Tensors are given again and again are sent to the device once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
from jhop import _numbers


def arrays() -> dict:
    return _numbers._known.arrays


def sent(value: float, times: int) -> jax.Array:
    x = jhop.tensor(jnp.full((3,), 3.0), requires_grad=True)
    for _ in range(times):
        out = (x * value).value
    return out


@pytest.fixture(autouse=True)
def fresh():
    jhop.reset()
    yield
    jhop.reset()


def test_a_number_that_comes_again_is_an_array_from_then_on():
    assert sent(0.7, 1)[0] == np.float32(3.0) * np.float32(0.7)
    assert 0.7 not in arrays()
    assert sent(0.7, 2)[0] == np.float32(3.0) * np.float32(0.7)
    assert arrays()[0.7].aval == jax.typeof(0.7)  # of a Python number's weak type: the program is the same


def test_it_promotes_as_a_python_number_does():
    x = jhop.tensor(jnp.full((3,), 3.0, jnp.bfloat16), requires_grad=True)
    assert {(x * 0.7).dtype for _ in range(4)} == {jnp.dtype(jnp.bfloat16)}
    assert 0.7 in arrays()


def test_the_tape_keeps_the_number():
    x = jhop.tensor(jnp.full((3,), 3.0), requires_grad=True)
    nodes = [(x * 0.7).grad_fn for _ in range(3)]
    assert [node.saved()[1] for node in nodes] == [0.7] * 3
    assert 0.7 in arrays()
    (x * 0.7).sum().backward()
    np.testing.assert_allclose(x.grad, [0.7] * 3, rtol=1e-6)


def test_both_zeros_keep_their_sign():
    x = jhop.tensor(jnp.full((3,), 3.0), requires_grad=True)
    signs = [math.copysign(1.0, float((x * zero).value[0])) for _ in range(3) for zero in (0.0, -0.0)]
    assert signs == [1.0, -1.0] * 3


def test_other_settings_have_other_arrays():
    x = jhop.tensor(np.full((3,), 3.0), requires_grad=True)
    assert {(x * 0.7).dtype for _ in range(3)} == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        y = jhop.tensor(np.full((3,), 3.0), requires_grad=True)
        assert [float((y * 0.7).value[0]) for _ in range(3)] == [3.0 * 0.7] * 3  # not that of a float32
    assert [float((x * 0.7).value[0]) for _ in range(3)] == [float(np.float32(3.0) * np.float32(0.7))] * 3


def test_another_default_device_has_its_own():
    here, there = jax.devices()[0], jax.devices()[-1]
    for device in (here, there):
        with jax.default_device(device):
            x = jhop.tensor(np.full((3,), 3.0, np.float32), requires_grad=True)
            assert {(x * 0.7).value.device for _ in range(3)} == {device}
            assert arrays()[0.7].device == device


def test_numbers_that_change_all_the_time_do_not_fill_the_memory():
    x = jhop.tensor(jnp.full((3,), 3.0), requires_grad=True)
    for i in range(3 * _numbers._MOST):
        _ = x * (0.5 + i), x * (0.5 + i)
    assert len(arrays()) <= _numbers._MOST
    assert len(_numbers._known.seen) <= _numbers._MOST


def test_beside_an_array_that_has_its_place_a_number_stays_one():
    x = jhop.tensor(jax.device_put(jnp.full((3,), 3.0), jax.devices()[0]), requires_grad=True)
    for _ in range(3):
        y = x * 0.7
    assert not arrays()
    assert y.value[0] == np.float32(3.0) * np.float32(0.7)


def test_in_a_trace_it_stays_a_number():
    x = jhop.tensor(jnp.full((3,), 3.0), requires_grad=True)

    def fn(y: jax.Array) -> jax.Array:
        for _ in range(3):
            z = x * 0.7
        return y * z.value

    with jax.checking_leaks():
        np.testing.assert_allclose(jax.jit(fn)(jnp.ones(3)), [2.1] * 3, rtol=1e-6)
    assert not arrays()
    assert sent(0.7, 3)[0] == np.float32(3.0) * np.float32(0.7)
    assert 0.7 in arrays()
