"""State through control flow: what numbers, arrays and lists are, asked of the same programs run in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_state_control_flow import (
    JAX,
    PYTHON,
    Box,
    X,
    agree,
    averages,
    check,
    compiled,
    counts,
    counts_and_uses,
    in_checkpoint,
    in_cond,
    in_cond_in_scan,
    in_nested_scans,
    in_scan,
    mixes,
    named,
)  # fmt: skip

import jhop
from jhop import _inline


def both(make, program, inputs=(X, -X, 0.3 * X), start=lambda box: None):
    """Gradients and state of `program(flow, hooks, x)`, where `make(box)` makes the hooks, are those of eager."""
    eager, box = Box(), Box()
    start(eager)
    start(box)
    ours, theirs = make(box), make(eager)
    step = jhop.jit(jax.grad(lambda x: program(JAX, ours, x)), fullgraph=True)
    for x in inputs:
        agree(step(x), jax.grad(lambda x: program(PYTHON, theirs, x))(x))
        agree(box.state(), eager.state())
    return step


def at_point(program):
    return lambda flow, hook, x: program(flow, lambda v: jhop.hook(v, hook), x)


# Numbers.


def test_zeros_of_both_signs_are_two_numbers():
    box = Box()

    def plus(ct):
        box.rate = 0.0
        return ct * 2

    def minus(ct):
        box.rate = -0.0
        return ct * 3

    def of(x):
        return lax.cond(x[0] > 0, lambda x: jhop.hook(x, plus) ** 2, lambda x: jhop.hook(x, minus) ** 2, x).sum()

    step = jhop.jit(jax.grad(of), fullgraph=True)
    for x, found in ((X, "0.0"), (-X, "-0.0"), (X, "0.0")):
        step(x)
        assert str(box.rate) == found


def adds_twice(box):
    def hook(ct):
        box.rate += 1
        box.rate += 1
        return ct * 2

    return hook


@named("program", [in_scan, in_cond, in_checkpoint])
def test_ints_added_to_a_float_are_added_one_by_one(program):
    def start(box):
        box.rate = 2.0**53

    both(adds_twice, at_point(program), start=start)


def test_guard_of_a_float_that_ints_were_added_to():
    box = Box()
    box.rate = 2.0**53 - 2

    def hook(ct):
        box.rate += 1
        box.rate += 1
        box.rate += 1
        return ct * 2 if box.rate > 2**53 else ct * 3

    step = jhop.jit(jax.grad(lambda x: jhop.hook(x, hook).sum()), fullgraph=True)
    for _ in range(3):
        before = box.rate
        expected = 2 if before + 1 + 1 + 1 > 2**53 else 3
        assert step(X).tolist() == [expected] * 3
        assert box.rate == before + 1 + 1 + 1


def divides(box):
    def hook(ct):
        box.rate = 100 / (box.n - 1) + (box.n - 8) ** 0.5 * 0
        return ct * box.table["calls"]

    return counts(box), hook


def test_number_that_is_not_known_yet_may_be_anything():
    """Nothing is computed with the number that stands for it in the meantime."""

    def program(flow, hooks, x):
        x = jhop.hook(x, hooks[1])
        squared, cubed = ((lambda x, p=p: jhop.hook(x, hooks[0]) ** p) for p in (2, 3))
        return flow.cond(x[0] > 0, squared, cubed, x).sum()

    def start(box):
        box.n = 20

    both(divides, program, start=start)


def adds_much(box):
    def hook(ct):
        box.n += 2**40
        return ct * (box.n * 1e-12)

    return hook


@named("program", [in_scan, in_nested_scans, in_cond, in_cond_in_scan, in_checkpoint])
def test_large_step_of_an_int(program):
    step = both(adds_much, at_point(program))
    assert step.versions() <= 2


def draws(box):
    """A generator of pseudo-random numbers, whose ints are exact or nothing."""

    def hook(ct):
        box.n = (box.n * 1103515245 + 12345) % 2**31
        return ct * (box.n % 7)

    return hook


@named("program", [in_scan, in_nested_scans, in_checkpoint])
def test_ints_that_were_rounded_are_not_taken_apart(program):
    both(draws, at_point(program))


@named("program", [in_cond, in_cond_in_scan])
def test_ints_that_would_be_rounded_are_refused(program):
    box = Box()
    with pytest.raises(jhop.Unsupported, match="an int there that grows past 2147483647"):
        compiled(program, draws(box))(X)
    assert box.n == 3


def test_branch_that_is_known_from_the_start():
    def program(flow, hook, x):
        taken = True if flow is PYTHON else jnp.bool_(True)
        return (flow.cond(taken, lambda x: jhop.hook(x * 2, hook), lambda x: x * 3, x) ** 2).sum()

    both(counts_and_uses, program)


# Arrays.


def number_to_int_array(box):
    def hook(ct):
        out = ct + jnp.float32(box.rate)
        box.rate = jnp.int32(3)
        return out

    return hook


def narrows(box):
    box.last = jnp.float32(0.1234567)

    def hook(ct):
        out = ct * box.last.astype(jnp.float32)
        box.last = (box.last.astype(jnp.float32) * 1.1 + 3.7).astype(jnp.int16)  # what XLA may not leave out
        return out

    return hook


@named("make", [number_to_int_array, narrows])
def test_first_turn_of_a_loop_has_what_was_there_before(make):
    both(make, at_point(in_scan))


def test_branches_that_write_arrays_of_two_dtypes():
    box = Box()

    def whole(ct):
        box.last = jnp.int32(3)
        return ct * 2

    def broken(ct):
        box.last = jnp.sum(ct) * 0.37
        return ct

    def of(x):
        return lax.cond(x[0] > 0, lambda x: jhop.hook(x, whole) ** 2, lambda x: jhop.hook(x, broken) ** 2, x).sum()

    with pytest.raises(jhop.Unsupported, match="its dtype changes from float32 to int32"):
        jhop.jit(jax.grad(of), fullgraph=True)(X)
    assert box.last == 0


# Lists.


def list_items(box):
    box.items = [1, 2.0, jnp.zeros(3)]

    def hook(ct):
        box.items[0] += 1
        box.items[1] *= 0.5
        box.items[2] = box.items[2] + ct
        return ct * box.items[0]

    return hook


@named("program", [in_scan, in_nested_scans, in_cond, in_cond_in_scan, in_checkpoint])
def test_items_of_a_list(program):
    assert both(list_items, at_point(program)).versions() == 1


@named("program", [in_scan, in_nested_scans, in_cond, in_checkpoint])
def test_list_that_is_read_inside_is_guarded(program):
    boxes = Box(), Box()

    def hook(box):
        def hook(ct):
            box.n += 1
            return ct * len(box.log)

        return hook

    for box in boxes:
        box.log = [1.5, 2.5]
    step = compiled(program, hook(boxes[0]))
    for _ in range(3):
        expected = jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, hook(boxes[1])), x))(X)
        agree(step(X), expected)
        for box in boxes:
            box.log.append(0.5)


# While loops.


def test_condition_reads_what_the_body_writes():
    def make(box):
        def body(ct):
            box.n += 1
            box.last = box.last + 0.5
            return ct

        return body, lambda ct: ct * box.n + box.last

    boxes = Box(), Box()
    body, condition = make(boxes[0])
    in_python = make(boxes[1])

    @jhop.jit
    def run(x):
        return lax.while_loop(
            lambda x: jhop.trace_wrapped(x.sum(), fn=condition) < 60, lambda x: jhop.trace_wrapped(x + 1.0, fn=body), x
        )

    for x in (X, X, -20 * X):
        found, x = run(x), x
        while in_python[1](x.sum()) < 60:
            x = in_python[0](x + 1.0)
        agree(found, x)
        agree(boxes[0].state(), boxes[1].state())
    assert run.versions() == 1


def test_number_of_a_branch_is_used_in_a_while_loop():
    boxes = Box(), Box()

    def adds(box):
        def hook(ct):
            box.table["calls"] += box.n
            return ct * 2

        return hook

    def program(flow, box, x, n):
        wrap = jhop.trace_wrapped if flow is JAX else lambda x, fn: fn(x)
        x = flow.cond(x[0] > 0, lambda x: wrap(x, fn=counts(box)), lambda x: x * 3, x)
        if flow is JAX:
            return lax.fori_loop(0, n, lambda _, x: wrap(x + 1.0, fn=adds(box)), x)
        for _ in range(n):
            x = adds(box)(x + 1.0)
        return x

    step = jhop.jit(lambda x, n: program(JAX, boxes[0], x, n), fullgraph=True)
    for x in (X, -X):
        agree(step(x, jnp.int32(3)), program(PYTHON, boxes[1], x, 3))
        agree(boxes[0].state(), boxes[1].state())


# What cannot be.


def test_array_of_one_example_of_many():
    box = Box()

    def of(x):
        def one(r):
            return lax.scan(lambda c, s: (jhop.hook(c * s, averages(box)), None), r, jnp.array([1.5, 0.5]))[0] ** 2

        return jax.vmap(one)(x).sum()

    with pytest.raises(jhop.Unsupported, match=r"under jax.vmap writes to `.*last` what differs from example"):
        jhop.jit(jax.grad(of), fullgraph=True)(X)
    assert box.last == 0


# Cost: nothing grows with a power of how deep or how long a program is.


def hooks_traced(monkeypatch, program, make):
    """How often hooks are run while a program is compiled."""
    runs = []
    inner = _inline._Inliner._run_hook
    monkeypatch.setattr(_inline._Inliner, "_run_hook", lambda self, *args: runs.append(1) or inner(self, *args))
    compiled(program, make(Box()))(X)
    monkeypatch.undo()
    return len(runs)


def nested(kind, depth):
    def program(flow, point, x):
        def body(x, depth):
            if depth == 0:
                return point(jnp.sin(x))
            if kind == "cond" and depth % 2:
                return flow.cond(x[0] > 0, lambda x: body(x, depth - 1), lambda x: x * 2, x)
            return flow.scan(lambda c, _: (body(c, depth - 1), None), x, None, length=2)[0]

        return body(x, depth).sum()

    return program


@named("make", [counts, mixes, averages])
@named("kind", ["scan", "cond"])
def test_nested_bodies_are_traced_as_often_as_they_are_deep(monkeypatch, kind, make):
    shallow, deep = (hooks_traced(monkeypatch, nested(kind, depth), make) for depth in (2, 6))
    assert deep <= 4 * shallow


def after_another(kind, n):
    def program(flow, point, x):
        for i in range(n):
            if kind == "cond":
                x = flow.cond(x[i % 3] > 0, lambda x: point(x) * 0.9, lambda x: x * 1.1, x)
            else:
                x, _ = flow.scan(lambda c, s: (point(c * s), None), x, jnp.array([0.9, 1.1]))
        return (x**2).sum()

    return program


def swaps(box):
    box.table["calls"] = 1.5

    def hook(ct):
        box.rate, box.table["calls"] = box.table["calls"] * 0.5, box.rate + 0.25
        return ct + box.rate

    return hook


@named("kind", ["cond", "scan"])
def test_what_follows_another_is_no_larger(kind):
    """Each reads what the one before left, twice over."""
    check(after_another(kind, 18), swaps, calls=2)


@pytest.mark.parametrize("reduced", [False, True])
def test_write_under_vmap(reduced):
    """What is one example's is refused, what is the same for all of them is written, and counted once."""
    box = Box()

    def hook(ct):
        box.n += 1
        box.last = lax.psum(ct.sum(), "i") if reduced else ct.sum()
        return ct * 2

    step = jhop.jit(jax.vmap(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), axis_name="i"), fullgraph=True)
    x = jnp.stack([X, 2 * X])
    if not reduced:
        with pytest.raises(jhop.Unsupported, match=r"under jax.vmap writes to `.*last` what differs"):
            step(x)
        assert (box.n, float(box.last)) == (3, 0.0)
        return
    for n in (4, 5):
        np.testing.assert_allclose(step(x), 4 * x, rtol=1e-6)
        assert box.n == n
        np.testing.assert_allclose(box.last, 2 * x.sum(), rtol=1e-6)


def test_late_number_is_written_with_the_type_that_it_has():
    """Whether `2 ** n` is an int depends on the sign of `n`, and that on the branches taken."""
    box = Box()
    box.n, box.power = 3, 1

    def falls(ct):
        box.n -= 5
        return ct

    def raises(ct):
        box.power = 2**box.n
        return ct * 2

    def of(x):
        x = jhop.hook(x, raises)
        return lax.cond(x[0] > 0, lambda x: jhop.hook(x, falls) * 2, lambda x: x * 3, x).sum()

    step = jhop.jit(jax.grad(of), fullgraph=True)
    for sign, n in ((-1, 3), (1, -2), (1, -7)):
        step(X * jnp.float32(sign))
        assert (box.n, box.power, type(box.power)) == (n, 2**n, type(2**n))
