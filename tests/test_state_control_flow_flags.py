"""Flags, strings, None and NumPy scalars that hooks write in loops and branches: their values and types are kept."""

import copy
import enum

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_state_control_flow import (
    JAX,
    PYTHON,
    X,
    descent,
    in_checkpoint,
    in_checkpointed_cond_in_nested_scans,
    in_cond,
    in_cond_in_scan,
    in_one_branch,
    in_scan,
    in_scan_in_cond,
    in_switch,
    named,
)  # fmt: skip

import jhop


class Mode(enum.Enum):
    SLOW = 1
    FAST = 2


class Box:
    def __init__(self):
        self.n = 3
        self.flag = False
        self.other = True
        self.scale = np.float32(1.5)
        self.small = np.int16(3)
        self.name = "a"
        self.best = None
        self.mode = Mode.SLOW
        self.pair = (1, "x")
        self.flags = [False, True]
        self.counts = [1, 2]
        self.table = {"seen": False}

    def state(self):
        return copy.deepcopy(vars(self))


def alike(box, eager):
    """Equal, and of the same types."""
    for name, value in eager.state().items():
        found = vars(box)[name]
        assert (type(found), repr(found)) == (type(value), repr(value)), name


# Hooks.


def sets_flag(box):
    def hook(ct):
        box.flag = True
        return ct * 2

    return hook


def sets_many(box):
    def hook(ct):
        box.flags[0], box.table["seen"], box.name, box.best, box.mode = True, True, "b", 1.5, Mode.FAST
        box.pair = (2, "y")
        box.counts[1] += 1
        return ct * box.counts[1]

    return hook


def copies_flag(box):
    def hook(ct):
        box.flag, box.other = box.other, box.flag
        return ct * 2

    return hook


def flips(box):
    def hook(ct):
        box.flag ^= True
        return jnp.where(box.flag, ct * 2, ct * 3)

    return hook


def scales(box):
    def hook(ct):
        box.scale = box.scale * np.float32(0.5) + np.float32(1)
        box.small += np.int16(1)
        return ct * box.scale

    return hook


def asks_once(box):
    """A flag set in one turn is read by `if` in the next."""

    def hook(ct):
        if box.flag:
            return ct * 3
        box.flag = True
        return ct * 2

    return hook


SET = [sets_flag, sets_many, copies_flag, flips]


def compiled(program, hook):
    return jhop.jit(jax.grad(lambda x: program(JAX, lambda v: jhop.hook(v, hook), x)), fullgraph=True)


def check(program, make, inputs=(X, -X, 0.3 * X), change=None):
    """Compiled, gradients and state are those of eager after each of several calls, between which state changes."""
    eager, box = Box(), Box()
    hook, step = make(eager), compiled(program, make(box))
    for i, x in enumerate(inputs):
        expected = jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, hook), x))(x)
        np.testing.assert_allclose(step(x), expected, rtol=2e-5, atol=1e-6)
        alike(box, eager)
        if i == 1:
            for each in (box, eager):
                each.flag, each.name, each.scale = False, "c", np.float32(0.25)
    assert repr(Box().state()) != repr(eager.state()), "this hook writes nothing"
    return step


@named("make", [*SET, scales])
@named("program", [in_cond, in_switch, in_one_branch, in_cond_in_scan])
def test_in_a_branch(program, make):
    check(program, make)


@named("make", [sets_many, flips, scales, asks_once])
@named("program", [in_scan, in_scan_in_cond, in_checkpoint])
def test_in_a_loop_or_a_call(program, make):
    check(program, make)


def test_in_a_checkpointed_branch_in_nested_scans():
    check(in_checkpointed_cond_in_nested_scans, sets_many)


@named("make", SET)
def test_in_a_while_loop(make):
    eager, box = Box(), Box()
    hook, own = make(box), make(eager)
    run = jhop.jit(lambda x, n: descent(lambda v: jhop.hook(v, hook), n)(x), fullgraph=True)
    for steps in (0, 3, 1, 4):
        expected = X
        for _ in range(steps):
            expected = expected - 0.1 * jax.grad(lambda x: (jhop.hook(x, own) ** 2).sum())(expected)
        np.testing.assert_allclose(run(X, jnp.int32(steps)), expected, rtol=2e-5, atol=1e-6)
        alike(box, eager)


def test_scan_in_a_while_loop():
    boxes = Box(), Box()

    def hook(box):
        def hook(ct):
            box.counts[0] += 1
            box.flags[0] = True
            return ct * box.counts[0] * 0.1

        return hook

    ours, theirs = hook(boxes[0]), hook(boxes[1])

    def body(carry):
        i, x = carry
        return i + 1, lax.scan(lambda c, _: (jhop.trace_wrapped(c, fn=ours), None), x, None, length=3)[0]

    run = jhop.jit(lambda n, x: lax.while_loop(lambda carry: carry[0] < n, body, (jnp.int32(0), x))[1], fullgraph=True)
    for turns in (2, 0, 1):
        expected = X
        for _ in range(3 * turns):
            expected = theirs(expected)
        np.testing.assert_allclose(run(jnp.int32(turns), X), expected, rtol=2e-5)
        alike(*boxes)


def test_long_scan_sets_a_flag():
    box = Box()

    def of(x):
        return lax.scan(lambda c, _: (jhop.hook(c * 0.999, sets_many(box)) * 0.5, None), x, None, length=1000)[0].sum()

    step = jhop.jit(jax.grad(of), fullgraph=True)
    step(X)
    assert (box.flags, box.name, box.best, box.mode, box.counts) == ([True, True], "b", 1.5, Mode.FAST, [1, 1002])


def test_branches_that_write_different_attributes():
    def make(box, i):
        def hook(ct):
            if i == 0:
                box.flag, box.n = True, box.n + 1
            elif i == 1:
                box.name = "second"
            else:
                box.best, box.scale = None, np.float32(7)
            return ct * (i + 2)

        return hook

    boxes = Box(), Box()
    hooks = [[make(box, i) for i in range(3)] for box in boxes]

    def of(x, hooks, flow):
        branches = [lambda x, h=h: jhop.hook(x * x, h) for h in hooks]
        return flow.switch(jnp.int32(jnp.abs(x[0])), branches, x).sum()

    step = jhop.jit(jax.grad(lambda x: of(x, hooks[0], JAX)), fullgraph=True)
    for first in (0.5, 1.5, 2.5, 1.0, 0.0):
        x = X.at[0].set(first)
        np.testing.assert_allclose(step(x), jax.grad(lambda x: of(x, hooks[1], PYTHON))(x), rtol=2e-5)
        alike(*boxes)


# What is refused.


def asks_flag(box):
    def hook(ct):
        box.flag = not box.flag
        return ct * 2

    return hook


def asks_identity(box):
    def hook(ct):
        box.flag = True
        return ct * 2 if box.flag is True else ct

    return hook


def asks_none(box):
    def hook(ct):
        box.best = 1.0 if box.best is None else None
        return ct * 2

    return hook


def asks_type(box):
    """A stand-in for a number cannot answer this."""

    def hook(ct):
        box.n += 1
        return ct * 2 if type(box.n) is int else ct

    return hook


def adds_a_key(box):
    def hook(ct):
        box.table["more"] = 1
        return ct * 2

    return hook


def number_to_none(box):
    def hook(ct):
        box.n = None
        return ct * 2

    return hook


@named(("make", "said"), [(asks_flag, "asks for the value"), (asks_identity, "compare by `is`"),
                          (asks_none, "compare by `is`"), (asks_type, r"ask for types by `type\(...\)`"),
                          (adds_a_key, "other entries"), (number_to_none, "holds a NoneType")])  # fmt: skip
def test_branch_says_what_it_cannot_do(make, said):
    box = Box()
    before = repr(box.state())
    with pytest.raises(jhop.Unsupported, match=said):
        compiled(in_cond, make(box))(X)
    assert repr(box.state()) == before


@named("make", [asks_flag, asks_identity, asks_none, asks_type])
def test_scan_is_unrolled_for_the_same(make):
    check(in_scan, make)
    box = Box()
    hook, before = make(box), repr(box.state())
    with pytest.raises(jhop.Unsupported, match="inside a `while` loop writes"):
        jhop.jit(lambda x: descent(lambda v: jhop.hook(v, hook), 3)(x), fullgraph=True)(X)
    assert repr(box.state()) == before
