"""`JHOP_LOGS=inert`: a hook on a value that nobody differentiates is logged, once, with where it is."""

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jhop

LOGGER = "jhop.inert"


def clip(ct):
    return ct.clip(-1.0, 1.0)


@pytest.fixture
def logged(caplog):
    """The messages so far; a call of it forgets them."""
    caplog.set_level(logging.INFO, LOGGER)
    jhop.reset()

    def take():
        found = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        caplog.clear()
        return found

    return take


def new_loss():
    """A function that JAX has not seen."""

    def loss(x):
        x = jhop.hook(x, clip)
        return (x**2).sum()

    return loss


def line():
    lines, first = inspect.getsourcelines(new_loss)
    return first + next(i for i, text in enumerate(lines) if "jhop.hook(" in text)


EXPECTED = (
    f"hook `clip` (test_logs_inert.py:{clip.__code__.co_firstlineno}) does not run: no backward pass goes through the "
    f"value that it is on, in {__file__}:{line()}"
)


def scanned(fn):
    return lambda x: jax.lax.scan(lambda total, _: (total + fn(x), None), 0.0, None, length=3)[0]


WAYS = {
    "eager": lambda fn: fn,
    "jax.jit": jax.jit,
    "jhop.jit": jhop.jit,
    "scan": lambda fn: jax.jit(scanned(fn)),
    "vmap": lambda fn: jax.jit(lambda x: jax.vmap(fn)(x[None])),
    "inner jit": lambda fn: jax.jit(lambda x: jax.jit(fn)(x) * 2.0),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_is_not_differentiated_is_logged_once(way, logged):
    run = way(new_loss())
    for _ in range(3):
        run(jnp.ones(2))
    assert logged() == [EXPECTED]
    run(jnp.ones(3))
    assert logged() == []  # compiled anew for another size, but it was told
    jhop.reset()
    way(new_loss())(jnp.ones(2))
    assert logged() == [EXPECTED]


DERIVATIVES = {
    "grad": jax.grad,
    "value_and_grad": jax.value_and_grad,
    "checkpoint": lambda fn: jax.grad(jax.checkpoint(fn)),
    "scan": lambda fn: jax.grad(scanned(fn)),
    "second": lambda fn: jax.grad(lambda x: jax.grad(fn)(x).sum()),
    "hessian": jax.hessian,
    "vmap": lambda fn: lambda x: jax.vmap(jax.grad(fn))(x[None]),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
@pytest.mark.parametrize("way", [lambda fn: fn, jax.jit, jhop.jit], ids=["eager", "jax.jit", "jhop.jit"])
def test_what_is_differentiated_is_not(way, derivative, logged):
    way(derivative(new_loss()))(jnp.ones(2))
    assert logged() == []


def test_a_hook_on_a_value_beside_the_path_is_logged(logged):
    def loss(x, y):
        return (x * jhop.hook(y, clip)).sum()

    jax.jit(jax.grad(loss))(jnp.ones(2), jnp.ones(2))
    assert len(logged()) == 1
    jax.jit(jax.grad(loss, argnums=1))(jnp.ones(2), jnp.ones(2))
    assert logged() == []


def test_off_it_logs_nothing(logged, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        new_loss()(jnp.ones(2))
        jax.jit(new_loss())(jnp.ones(2))
    assert logged() == []


PROGRAM = """
import jax, jhop
jax.jit(lambda x: jhop.hook(x, lambda ct: ct) * 2.0)(1.0)
"""


@pytest.mark.parametrize("setting", ["inert", "recompiles,inert", "recompiles"])
def test_environment(setting):
    env = {**os.environ, "JHOP_LOGS": setting, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("[jhop.inert] hook `<lambda>` (<string>:3) does not run") == ("inert" in setting)
