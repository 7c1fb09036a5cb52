"""Ints that hooks compute in loops and branches: those of eager, or an error; never what the device wraps them to."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_state_control_flow import (
    PYTHON,
    Box,
    agree,
    compiled,
    counts,
    in_checkpoint,
    in_cond,
    in_cond_in_scan,
    in_nested_scans,
    in_scan,
    in_scan_in_cond,
    named,
)  # fmt: skip

import jhop

LARGEST = 2 ** (63 if jax.config.jax_enable_x64 else 31) - 1
X = jnp.array([0.5, -1.0, 2.0])
# What makes an int of the middle outgrow the device's, as the bits of these do.
BITS = LARGEST.bit_length()


def large_in_between(box):
    def hook(ct):
        box.n += 1
        return ct * (box.n * 2 ** (BITS - 6) % 7 + 1)

    return hook


def squares(box):
    """Small at each turn's start and end."""

    def hook(ct):
        box.n = (box.n * 31 + 7) % 2 ** (BITS // 2 + 2)
        return ct * (box.n * box.n % 11 + 1)

    return hook


def takes_away(box):
    """A small difference of large ints."""

    def hook(ct):
        box.n += 1
        return ct * (box.n + 2 ** (BITS + 9) - (2 ** (BITS + 9) - 1))

    return hook


def far_from_zero(box):
    def hook(ct):
        box.n += 1
        return ct * ((box.n - 4 * LARGEST) * 0.5**BITS)

    return hook


def reads_only(box):
    def hook(ct):
        return ct * (box.n * 2 ** (BITS - 6) % 7 + 1)

    return hook


def run(program, box, make, x):
    return jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, make(box)), x))(x)


def right_or_refused(program, make, starts, inputs=(X, -X)):
    """Whether each call is as in eager; where one is refused, nothing is written."""
    eager, box = Box(), Box()
    step, right = compiled(program, make(box)), []
    for start in starts:
        for x in inputs:
            eager.n = box.n = start
            before = str(box.state())
            try:
                found = step(x)
            except jhop.Unsupported as error:
                assert "uses an int there that grows past" in str(error)
                assert "test_state_control_flow_exact.py:" in str(error)
                assert str(box.state()) == before
                right.append(False)
                continue
            agree(found, run(program, eager, make, x))
            agree(box.state(), eager.state())
            right.append(True)
    return right


HOOKS = [large_in_between, squares, takes_away, far_from_zero, reads_only]


@named("make", HOOKS)
@named("program", [in_cond, in_cond_in_scan])
def test_int_is_right_or_refused(program, make):
    right_or_refused(program, make, (3, 21473))


@named("make", HOOKS)
@named("program", [in_scan, in_scan_in_cond, in_checkpoint])
def test_int_that_the_host_knows_is_right(program, make):
    starts = (40, 2**BITS + 5) if make in (large_in_between, reads_only) else (40,)
    start = (4 * LARGEST,) if make is far_from_zero else starts
    assert all(right_or_refused(program, make, start, inputs=(X,)))


def test_int_in_nested_scans_is_right():
    assert all(right_or_refused(in_nested_scans, squares, (40,), inputs=(X,)))


def test_int_that_outgrows_the_device_in_one_branch():
    """It is known only after the run that the device counted wrong; before, all is well."""

    def make(box):
        def hook(ct):
            box.n += 2 ** (BITS - 2)
            return ct * (box.n * 0.5**BITS)

        return hook

    def program(flow, point, x):
        def of(x, i):
            return flow.cond(x[i] > 0, lambda x: jnp.sin(point(x)), lambda x: x * 2, x)

        return sum(of(of(of(x, 0), 1), 2).sum() for _ in range(2))

    few, many = jnp.array([0.5, -1.0, -2.0]), jnp.array([0.5, 1.0, 2.0])
    assert right_or_refused(program, make, (3, 5), inputs=(few, many, few)) == [True, False, True] * 2


def long_scan(length):
    def program(flow, point, x):
        return flow.scan(lambda c, _: (point(c * 0.5), None), x, length=length)[0].sum()

    return program


@named("make", [large_in_between, squares])
def test_long_scan_is_refused_with_the_reason(make):
    """It is too long to be unrolled."""
    box = Box()
    box.n = 21473
    step = compiled(long_scan(100), make(box))
    for _ in range(2):
        with pytest.raises(jhop.Unsupported, match=rf"100 iterations .*`hook` .*:\d+\) uses an int .*{LARGEST}.*float"):
            step(X)
        assert box.n == 21473


def uses(box):
    def hook(ct):
        box.n += 5
        return ct * (box.n * 0.5**BITS)

    return hook


def test_long_scan_is_looked_at_before_each_call():
    """One that fits is compiled once; one that does not is refused."""
    eager, box = Box(), Box()
    step = compiled(long_scan(100), uses(box))
    for start, right in ((3, True), (50, True), (LARGEST - 500, True), (LARGEST - 499, False), (-LARGEST, True)):
        eager.n = box.n = start
        if right:
            agree(step(X), run(long_scan(100), eager, uses, X))
        else:
            with pytest.raises(jhop.Unsupported, match="grows past"):
                step(X)
        assert box.n == eager.n
    assert step.versions() == 1


# While loops.


def looped(hook):
    def body(carry):
        i, x = carry
        return i + 1, jhop.trace_wrapped(x, fn=hook)

    return jhop.jit(lambda n, x: lax.while_loop(lambda carry: carry[0] < n, body, (jnp.int32(0), x))[1])


def test_count_of_a_while_loop_is_exact():
    box = Box()
    step = looped(counts(box))
    for start in (2**70, -(2**70), LARGEST - 1, 5):
        for turns in (3, 0, 4):
            box.n = start
            step(jnp.int32(turns), X)
            assert box.n == start + turns
    assert step.versions() <= 2


def test_while_loop_in_which_the_device_counts_too_far():
    box = Box()

    def hook(ct):
        box.n += 2 ** (BITS - 4)
        return ct * (box.n * 0.5**BITS)

    step = looped(hook)
    for turns, right in ((3, True), (20, False), (2, True)):
        before = box.n = 3
        if not right:
            with pytest.raises(jhop.Unsupported, match=r"`hook` .* int there that grows past .*Nothing was writ"):
                step(jnp.int32(turns), X)
            assert box.n == before
            continue
        expected = X
        for i in range(turns):
            expected = expected * ((3 + (i + 1) * 2 ** (BITS - 4)) * 0.5**BITS)
        agree(step(jnp.int32(turns), X), expected)
        assert box.n == 3 + turns * 2 ** (BITS - 4)
    assert step.versions() == 1


def test_condition_of_a_while_loop_in_which_the_device_counts_too_far():
    box = Box()

    def condition(ct):
        return ct * (box.n * 2 ** (BITS - 6) % 5 + 1)

    @jhop.jit
    def step(x):
        goes_on = lambda x: jhop.trace_wrapped(x.sum(), fn=condition) < 2000  # noqa: E731
        return lax.while_loop(goes_on, lambda x: jhop.trace_wrapped(x + 1.0, fn=counts(box)), x)

    box.n = 62
    with pytest.raises(jhop.Unsupported, match="grows past"):
        step(X)
    assert box.n == 62


# Late ints.


@named("start", [3, 2**40, 2**70])
@named("program", [in_cond, in_cond_in_scan])
def test_count_of_a_branch_is_exact(program, start):
    eager, box = Box(), Box()
    eager.n = box.n = start
    step = compiled(program, counts(box))
    for x in (X, -X, 0.3 * X):
        agree(step(x), run(program, eager, counts, x))
        assert (type(box.n), box.n) == (int, eager.n)
    assert step.versions() == 1


def test_error_of_the_check_leaves_other_state_as_it_was():
    box = Box()

    def hook(ct):
        box.n += 2 ** (BITS - 1)
        box.last = jnp.sum(ct).astype(jnp.float32)
        box.rate *= 0.5
        return ct * (box.n * 0.5**BITS)

    def program(flow, point, x):
        for i in range(3):
            x = flow.cond(x[i] > 0, lambda x: point(x) * 2, lambda x: x * 3, x)
        return x.sum()

    step = compiled(program, hook)
    before = str(box.state())
    with pytest.raises(jhop.Unsupported, match="Nothing was written"):
        step(jnp.array([1.0, 2.0, 3.0]))
    assert str(box.state()) == before
    np.testing.assert_allclose(step(-jnp.ones(3)), 27.0)


@pytest.mark.skipif(jax.config.jax_enable_x64, reason="this is it")
def test_with_x64():
    """The device's ints are larger then, and not without end."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "while or before_each"],
        env={**{name: value for name, value in os.environ.items() if "XDIST" not in name}, "JAX_ENABLE_X64": "1"},
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
