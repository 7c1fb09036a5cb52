"""State that hooks write inside loops, branches and calls: as in eager, where Python loops and `if` stand for JAX's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)
named = pytest.mark.parametrize


# Control flow twice: JAX's own, and in Python, where hooks run as often as they are met.


def python_scan(body, init, xs=None, length=None, *, reverse=False, **_):
    length = jax.tree.leaves(xs)[0].shape[0] if length is None else length
    carry, ys = init, [None] * length
    for i in reversed(range(length)) if reverse else range(length):
        carry, ys[i] = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys) if length else None


def python_cond(index, true, false, *operands):
    return (true if bool(index) else false)(*operands)


def python_switch(index, branches, *operands):
    return branches[min(max(int(index), 0), len(branches) - 1)](*operands)


JAX = types.SimpleNamespace(
    scan=lax.scan, cond=lax.cond, switch=lax.switch, checkpoint=jax.checkpoint, jit=jax.jit, custom=jax.custom_jvp
)
PYTHON = types.SimpleNamespace(
    scan=python_scan, cond=python_cond, switch=python_switch, checkpoint=lambda fn, **_: fn, jit=lambda fn, **_: fn,
    custom=lambda fn: fn,
)  # fmt: skip


class Box:
    def __init__(self):
        self.n = 3
        self.rate = 0.5
        self.last = jnp.float32(0)
        self.log = []
        self.table = {"sum": jnp.zeros(3), "calls": 0}
        self.numpy = np.zeros(3, np.float32)

    def state(self):
        return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, vars(self))


# Hooks: each a function that makes one for a box.


def counts(box):
    def hook(ct):
        box.n += 1
        return ct * 2

    return hook


def counts_and_uses(box):
    def hook(ct):
        box.n += 2
        return ct * box.n + box.rate

    return hook


def decays(box):
    def hook(ct):
        box.rate = 0.5 * box.rate + 1.0
        return ct * box.rate

    return hook


def mixes(box):
    """Numbers that depend on each other, and on what they were."""

    def hook(ct):
        box.n, box.table["calls"] = box.table["calls"] + 1, box.n * 2
        return ct + box.n

    return hook


def averages(box):
    def hook(ct):
        box.last = 0.9 * box.last + 0.1 * jnp.sum(ct * ct)
        return ct / (1.0 + box.last)

    return hook


def becomes_an_array(box):
    """A number at first, an array from the first call on."""

    def hook(ct):
        box.rate = box.rate * 0.5 + jnp.max(ct)
        return ct * 1.5

    return hook


def accumulates(box):
    def hook(ct):
        box.table["sum"] = box.table["sum"] + ct
        box.table["calls"] += 1
        return ct * 0.5

    return hook


def logs(box):
    def hook(ct):
        box.log.append(jnp.sum(ct))
        return ct * 3

    return hook


def keeps_numpy(box):
    def hook(ct):
        box.numpy = box.numpy + ct
        return ct * 2

    return hook


THREADED = [counts, counts_and_uses, decays, mixes, averages, becomes_an_array, accumulates, keeps_numpy]


def every_other(box):
    """Python control flow on what changes."""

    def hook(ct):
        box.n += 1
        return ct * 10 if box.n % 2 else ct

    return hook


def flags(box):
    box.seen = False

    def hook(ct):
        first, box.seen = not box.seen, True
        return ct * 5 if first else ct

    return hook


def notes_new_keys(box):
    def hook(ct):
        box.table[f"call {len(box.table)}"] = ct
        return ct * 2

    return hook


def logs_numbers(box):
    def hook(ct):
        box.log.append(box.n)
        box.n += 1
        return ct * 2

    return hook


UNROLLED = [every_other, flags, notes_new_keys, logs_numbers]


# Programs: `program(flow, point, x)`.


def in_scan(flow, point, x):
    def body(c, s):
        c = point(jnp.sin(c) * s)
        return c, c.sum()

    c, ys = flow.scan(body, x, jnp.array([1.5, 0.5, 2.0, 1.0]))
    return (c**2).sum() + (ys**2).sum()


def in_reversed_scan(flow, point, x):
    c, _ = flow.scan(lambda c, s: (point(jnp.cos(c) + s), None), x, jnp.array([1.5, 0.5, 2.0]), reverse=True)
    return (c**2).sum()


def in_nested_scans(flow, point, x):
    def outer(c, s):
        c, ys = flow.scan(lambda d, t: (point(d * t), d.sum()), c, jnp.array([1.5, 0.75]))
        return point(c * s), ys.sum()

    c, ys = flow.scan(outer, x, jnp.array([0.5, 1.25, 2.0]))
    return (c**2).sum() + ys.sum()


def in_scanned_checkpoint(flow, point, x):
    body = flow.checkpoint(lambda c, s: (point(jnp.sin(c) * s), None))
    return (flow.scan(body, x, jnp.array([1.5, 0.5, 2.0]))[0] ** 2).sum()


def in_checkpoint(flow, point, x):
    return (flow.checkpoint(lambda x: jnp.sin(point(jnp.sin(point(x)) * 3)))(x) ** 2).sum()


def in_jit(flow, point, x):
    inner = flow.jit(lambda x: point(jnp.sin(point(x))), keep_unused=True)
    return (inner(x) * inner(2 * x)).sum()


def twice_in_scans(flow, point, x):
    """What the first leaves, the second finds; and a hook outside sees both."""
    x, _ = flow.scan(lambda c, s: (point(c * s), None), x, jnp.array([1.5, 0.5]))
    x = point(jnp.sin(x))
    x, _ = flow.scan(lambda c, s: (point(c + s), None), x, jnp.array([1.0, 2.0, 3.0]))
    return (x**2).sum()


def in_cond(flow, point, x):
    def of(x, sign):
        return flow.cond(sign * x[0] > 0, lambda x: jnp.sin(point(x)), lambda x: jnp.cos(point(point(x))), x)

    return (of(x, 1.0) * of(x, -1.0)).sum()


def in_one_branch(flow, point, x):
    return sum((flow.cond(x[i] > 0, lambda x: point(x) ** 2, lambda x: x**3, x)).sum() for i in range(3))


def in_switch(flow, point, x):
    def of(i):
        branches = [lambda x: point(x) * 2, lambda x: x, lambda x: point(jnp.sin(point(x)))]
        return flow.switch(jnp.int32(jnp.floor(x[i])) + 1, branches, x)

    return (of(0) * of(1) * of(2)).sum()


def in_cond_in_scan(flow, point, x):
    def body(c, s):
        return flow.cond(s > 1, lambda c: point(c * s), lambda c: c * s, c), None

    return (flow.scan(body, x, jnp.array([1.5, 0.5, 2.0, 0.25]))[0] ** 2).sum()


def in_scan_in_cond(flow, point, x):
    def scanned(x):
        return flow.scan(lambda c, s: (point(c * s), None), x, jnp.array([1.5, 0.5, 2.0]))[0]

    return (flow.cond(x[0] > 0, scanned, lambda x: point(x), x) ** 2).sum()


def in_checkpointed_cond_in_nested_scans(flow, point, x):
    def inner(c, s):
        return flow.cond(c[0] * s > 0, lambda c: point(c * s), lambda c: c + s, c), None

    def outer(c, s):
        return flow.scan(flow.checkpoint(inner), c * s, jnp.array([1.5, -0.75]))[0], None

    return (flow.scan(outer, x, jnp.array([0.5, 1.25, 2.0]))[0] ** 2).sum()


LOOPS = [in_scan, in_reversed_scan, in_nested_scans, in_scanned_checkpoint, twice_in_scans]
CALLS = [in_checkpoint, in_jit]
BRANCHES = [
    in_cond, in_one_branch, in_switch, in_cond_in_scan, in_scan_in_cond, in_checkpointed_cond_in_nested_scans,
]  # fmt: skip


def agree(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if isinstance(theirs, (int, float)):
            assert (type(ours), ours) == (type(theirs), theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def check(program, make, calls=3, versions=1):
    """Compiled, state and gradients are those of eager after each of several calls."""
    eager, compiled = Box(), Box()
    hooks = make(eager), make(compiled)
    untouched = eager.state()
    step = jhop.jit(jax.grad(lambda x: program(JAX, lambda v: jhop.hook(v, hooks[1]), x)), fullgraph=True)
    for i in range(calls):
        x = X * (1 - 0.5 * i)
        expected = jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, hooks[0]), x))(x)
        agree(step(x), expected)
        agree(compiled.state(), eager.state())
    assert str(untouched) != str(eager.state()), "these hooks write nothing"
    if versions is not None:
        assert step.versions() <= versions


@named("make", THREADED)
@named("program", LOOPS + CALLS)
def test_in_a_loop_or_a_call(program, make):
    check(program, make, versions=2 if make is becomes_an_array else 1)


@named("make", THREADED)
@named("program", BRANCHES)
def test_in_a_branch(program, make):
    check(program, make, versions=2 if make is becomes_an_array else 1)


@named("program", LOOPS + CALLS)
def test_list_that_is_appended_to(program):
    check(program, logs)


@named("make", UNROLLED)
@named("program", LOOPS)
def test_loop_is_unrolled_where_it_must(program, make):
    check(program, make, versions=None)
