"""The ways in which one program on Tensors is run: as it is, compiled, captured by compiled autograd, or both."""

import contextlib

import jax.numpy as jnp
import pytest

import jhop


class Mode:
    """One way to run a program: `compile` its functions, and run its backward passes inside `captured()`."""

    def __init__(self, name):
        self.name = name
        self.graphs = []  # that were captured

    def compile(self, fn):
        return jhop.compile(fn) if self.name.startswith("compiled") else fn

    def captured(self):
        return jhop.compiled_autograd.enable(self) if "captured" in self.name else contextlib.nullcontext()

    def __call__(self, gm):
        self.graphs.append(gm)
        return jhop.compile(gm, fullgraph=True)

    def grad(self, *args, **kwargs):
        with self.captured():
            return jhop.autograd.grad(*args, **kwargs)

    def backward(self, tensor, *args, **kwargs):
        with self.captured():
            tensor.backward(*args, **kwargs)


MODES = [Mode(name) for name in ("eager", "compiled", "captured", "compiled, captured")]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
some_modes = pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=lambda mode: mode.name)


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def scalar(value):
    return jhop.tensor(jnp.float32(value), requires_grad=True)


def times(factor):
    return lambda grad: grad * factor


def orders(mode, y, x, n=3):
    """`y` and its derivatives by `x`, each of them through the hooks."""
    found = [float(y)]
    for order in range(1, n + 1):
        (y,) = mode.grad(y, x, create_graph=order < n)
        found.append(float(y))
    return found


def power(hook, start):
    """y = x**2 with a hook on it, then y**2."""

    def fn(x):
        y = x * x
        y.register_hook(hook)
        return y * y

    return fn, scalar(start)
