"""JAX's settings are a part of what is traced: compiled functions and captured passes follow when they change."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import pytest

import jhop

MODES = {
    "eager": contextlib.nullcontext,
    "captured": lambda: jhop.compiled_autograd.enable(compiler),
    "unasked": lambda: jhop.compiled_autograd.enable(),
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))
SETTINGS = (False, True, False, True, True, False)


def compiler(gm):
    return jhop.compile(gm, fullgraph=True)


def width():
    """4 or 8: bytes of a float under the present settings."""
    return jnp.zeros((), float).dtype.itemsize


def leaf():
    return jhop.tensor(jnp.array([1.0, 2.0], jnp.float32), requires_grad=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["tape", "compiled"])
@each_mode
def test_they_change_between_passes(mode, compiled):
    def loss(x):
        y = x * (5.0 * width())
        y.register_hook(lambda grad: grad * width())
        return y.sum()

    fn = jhop.compile(loss) if compiled else loss
    for wide in SETTINGS:
        with jax.enable_x64(wide), mode():
            x = leaf()
            fn(x).backward()
            assert x.grad.tolist() == [5.0 * width() ** 2] * 2


@each_mode
def test_they_change_between_forward_and_backward(mode):
    @jhop.compile
    def loss(x):
        y = x * 5.0
        y.register_hook(lambda grad: grad * width())
        return y.sum()

    for wide in SETTINGS:
        x = leaf()
        y = loss(x)
        with jax.enable_x64(wide), mode():
            y.backward()
            assert x.grad.tolist() == [5.0 * width()] * 2


def test_the_reason_is_logged(caplog):
    @jhop.compile
    def loss(x):
        y = x * 5.0
        y.register_hook(lambda grad: grad * 3.0)
        return y.sum()

    with caplog.at_level(logging.INFO, "jhop.recompiles"):
        for wide in (False, True):
            with jax.enable_x64(wide), MODES["captured"]():
                loss(leaf()).backward()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("JAX is set up in another way" in message for message in messages)
