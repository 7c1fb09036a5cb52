"""Random programs with hooks of every kind: gradients, what hooks saw, how often and in which order, are as in PyTorch.

The program's text is one (`random_tapes`); it runs on PyTorch, and on jhop in one of the ways to run a program: 150
programs in each by default. `JHOP_RANDOM_PROGRAMS=1000` runs so many, and another number in `JHOP_RANDOM_SEED` others.
"""

import contextlib
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_tapes import Program
from tape_modes import MODES

import jhop
import jhop.numpy as hnp

torch = pytest.importorskip("torch")

N = int(os.environ.get("JHOP_RANDOM_PROGRAMS", "150"))
FIRST = int(os.environ.get("JHOP_RANDOM_SEED", "0"))


def numbers(shape, salt):
    """Values that tell places apart and are never equal."""
    size = int(np.prod(shape))
    return (np.sin(1.0 + 2.7 * np.arange(size) + 1.3 * salt) * 1.2).reshape(shape)


def in_torch(program):
    scope = {
        "ops": torch, "grad": torch.autograd.grad, "no_grad": torch.no_grad, "captured": contextlib.nullcontext,
        "leaf": lambda shape, salt, moves: torch.tensor(numbers(shape, salt), requires_grad=moves),
        "const": lambda shape: torch.tensor(numbers(shape, 7)),
        "index": torch.tensor, "halves": lambda a: torch.tensor_split(a, 2), "compiled": lambda fn: fn,
        "flags": lambda a: a > 0.1,
        "kept": lambda g: g.detach().clone(),  # PyTorch may add to `.grad` where the hook's `g` is
    }  # fmt: skip
    return run(program, scope)


def in_jhop(program, mode):
    scope = {
        "ops": hnp, "grad": mode.grad, "no_grad": jhop.autograd.no_grad, "captured": mode.captured,
        "leaf": lambda shape, salt, moves: jhop.tensor(jnp.array(numbers(shape, salt)), requires_grad=moves),
        "const": lambda shape: jnp.array(numbers(shape, 7)),
        "index": jnp.array, "halves": lambda a: hnp.array_split(a, 2), "compiled": mode.compile,
        "flags": lambda a: a > 0.1, "kept": lambda g: g,
    }  # fmt: skip
    return run(program, scope)


def run(program, scope):
    """Everything that can be observed of a program."""
    exec(compile(program.source, "<random program>", "exec"), scope)
    tensors = scope["main"]()
    names = [*(f"x{i}" for i in itertools.takewhile(lambda i: f"x{i}" in program.below, range(9)))]
    kept = [None if not t.is_leaf and not t.retains_grad else plain(t.grad) for t in tensors]
    return {
        "gradients of": dict(enumerate(kept)),
        "returned": list(map(plain, scope["GRADS"])),
        "seen by hook": {k: plain(v) for k, v in scope["LAST"].items()},
        "counts": dict(scope["COUNTS"]),
        "values": [plain(t.detach()) for t in tensors],
    }, passes(scope["LOG"]), names


def plain(value):
    value = getattr(value, "value", value)
    if value is None:
        return None
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)


def passes(log):
    """Numbers of the hooks that ran, per pass."""
    found = []
    for entry in log:
        found.append([]) if entry == "pass" else found[-1].append(entry)
    return found


def compare(found, expected, path=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            compare(found[key], expected[key], f"{path} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            compare(f, e, f"{path}[{i}]")
    elif expected is None or isinstance(expected, int):
        assert type(found) is type(expected) and found == expected, path
    else:
        assert found is not None and found.shape == expected.shape, path
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * scale, err_msg=path)


def compare_order(program, found, expected):
    """Of each two hooks, the order that data flow or registration gives them, and how often each ran."""
    assert [sorted(log) for log in found] == [sorted(log) for log in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in itertools.combinations(sorted(set(theirs)), 2):
            here, there = program.where[a], program.where[b]
            if here is None or there is None:
                continue
            if here in program.below[there] or there in program.below[here]:
                assert [k for k in mine if k in (a, b)] == [k for k in theirs if k in (a, b)], (a, b)


def check(program, mode):
    try:
        expected, order, _ = in_torch(program)
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"PyTorch refuses it: {str(error).partition('.')[0]}")
    found, mine, _ = in_jhop(program, mode)
    compare(found, expected)
    if mode.name == "eager" and not program.twice and not program.several_nodes:
        assert mine == order
    compare_order(program, mine, order)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: lifted operations stay compiled, and must not notice."""


@pytest.mark.parametrize("seed", range(FIRST, FIRST + N * len(MODES)))
def test_random_program(seed):
    mode = MODES[seed % len(MODES)]
    twice = seed // len(MODES) % 5 == 4
    program = Program(seed, compiled="compiled" in mode.name, captured="captured" in mode.name, twice=twice)
    try:
        check(program, mode)
    except Exception as error:
        error.add_note(f"seed {seed}, {mode.name}:\n{program.source}")
        raise
