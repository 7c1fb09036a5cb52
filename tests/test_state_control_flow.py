"""State that hooks write inside loops, branches and calls: as in eager, where Python loops and `if` stand for JAX's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from under import make_mesh

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
        box.n, box.table["calls"] = box.table["calls"] + 1, box.n * 2 % 1009
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


def keeps_variables(box):
    """In the function around the hook."""
    n, mean = 0, jnp.zeros(3)

    def hook(ct):
        nonlocal n, mean
        n, mean = n + 1, 0.5 * mean + ct
        box.n += n
        return ct * n + mean

    return hook


THREADED = [
    counts, counts_and_uses, decays, mixes, averages, becomes_an_array, accumulates, keeps_numpy, keeps_variables,
]  # fmt: skip


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


def keeps_a_window(box):
    box.log.append(jnp.ones(3))

    def hook(ct):
        box.log.append(ct)
        if len(box.log) > 2:
            box.log.pop(0)
        return ct + sum(box.log)

    return hook


def keeps_a_pair(box):
    box.pair = (0, jnp.zeros(3))

    def hook(ct):
        box.pair = (box.pair[0] + box.n, box.pair[1] * 0.5 + ct)
        return ct * box.pair[0] + box.pair[1]

    return hook


def puts_keys_in_another_order(box):
    def hook(ct):
        box.table["last"] = ct
        box.table["sum"] = box.table.pop("sum") + box.table.get("first", 0.5)
        box.table["first"] = box.table.pop("last")
        return ct * len(box.table)

    return hook


def collects(box):
    box.seen, box.tree = {0}, {"a": [1, [jnp.ones(3)]]}

    def hook(ct):
        box.seen.add(len(box.seen))
        box.tree["a"] = [box.tree["a"][0] + len(box.seen), [ct, box.tree["a"][1][0]]]
        del box.tree["a"][1][1:]
        return ct * box.tree["a"][0]

    return hook


RESHAPES = [keeps_a_window, keeps_a_pair, puts_keys_in_another_order, collects]


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
        if isinstance(theirs, (int, float, set)):
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


@named("make", UNROLLED + RESHAPES)
@named("program", LOOPS)
def test_loop_is_unrolled_where_it_must(program, make):
    check(program, make, versions=None)


@named("make", UNROLLED + RESHAPES)
@named("program", CALLS)
def test_call_may_leave_anything(program, make):
    check(program, make, versions=None)


# What one hook makes, another one changes inside.


def makes(box):
    def hook(ct):
        box.log, box.table = [ct], {"sum": ct, "calls": 1}
        box.made = types.SimpleNamespace(n=box.n, rate=0.5, last=ct)
        return ct * 1.5

    return hook


def changes_its_list(box):
    def hook(ct):
        box.log.append(ct)
        return ct * len(box.log)

    return hook


def changes_its_object(box):
    def hook(ct):
        box.made.n += 1
        box.made.last, box.made.rate = box.made.last * 0.5 + ct, box.made.rate * 0.5
        return ct * box.made.n + box.made.last * box.made.rate

    return hook


def adds_to_its_object(box):
    def hook(ct):
        box.made.again = [box.made.last]
        box.made.again.append(ct)
        return ct + sum(box.made.again)

    return hook


def changes_its_dict(box):
    def hook(ct):
        box.table["calls"] += 2
        box.table["sum"] = box.table["sum"] + ct * box.table["calls"]
        return ct + box.table["sum"]

    return hook


@named("make", [changes_its_list, changes_its_object, adds_to_its_object, changes_its_dict])
@named("program", LOOPS + CALLS + [in_cond_in_scan])
def test_object_that_a_hook_made_is_changed_inside(program, make):
    """Bodies are traced more than once: what they did to it counts once all the same."""
    if program is in_cond_in_scan and make in (changes_its_list, adds_to_its_object):
        pytest.skip("no list grows in a branch")

    def of(flow, box):
        made, changed = makes(box), make(box)

        def loss(x):  # hooks run from last to first
            x = program(flow, lambda value: jhop.hook(value, changed), x) * x
            return (jhop.hook(x, made) ** 2).sum()

        return jax.grad(loss)

    boxes = Box(), Box()
    for box in boxes:
        box.made = None
    eager, step = of(PYTHON, boxes[0]), jhop.jit(of(JAX, boxes[1]), fullgraph=True)
    for i in range(3):
        x = X * (1 - 0.5 * i)
        agree(step(x), eager(x))
        made = [vars(box.made) for box in boxes]
        agree(made[1], made[0])
        for box in boxes:
            box.made = None
        agree(boxes[1].state(), boxes[0].state())


# What is counted stays exact, and costs no further trace.


def compiled(program, hook):
    return jhop.jit(jax.grad(lambda x: program(JAX, lambda v: jhop.hook(v, hook), x)), fullgraph=True)


@named("program", [*LOOPS, *CALLS, *BRANCHES])
def test_large_ints_stay_exact(program):
    boxes = Box(), Box()
    for box in boxes:
        box.n = 2**70
    jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, counts(boxes[0])), x))(X)
    compiled(program, counts(boxes[1]))(X)
    assert boxes[1].n == boxes[0].n > 2**70


@named("program", [in_scan, in_nested_scans, twice_in_scans])
def test_int_that_grows_past_what_the_device_counts_to(program):
    """The device has it as an int32 as long as that will do, and then as a float."""
    boxes = Box(), Box()

    def as_float(ct):  # JAX itself takes no int as large
        boxes[0].n += 2
        return ct * float(boxes[0].n) + boxes[0].rate

    step = compiled(program, counts_and_uses(boxes[1]))
    for start in (2**31 - 30, 2**31 - 20, 2**31 - 7, 2**31 - 1, 2**31 + 8, 5):
        for box in boxes:
            box.n = start
        expected = jax.grad(lambda x: program(PYTHON, lambda v: jhop.hook(v, as_float), x))(X)
        np.testing.assert_allclose(step(X), expected, rtol=1e-5)
        assert boxes[1].n == boxes[0].n


def test_floats_are_those_of_python():
    boxes = Box(), Box()
    step = compiled(in_nested_scans, decays(boxes[1]))
    for _ in range(3):
        step(X)
        jax.grad(lambda x: in_nested_scans(PYTHON, lambda v: jhop.hook(v, decays(boxes[0])), x))(X)
    assert boxes[1].rate == boxes[0].rate


def test_long_scan_is_not_unrolled():
    box = Box()

    def of(x):
        return lax.scan(lambda c, _: (jhop.hook(c * 0.999, counts(box)) * 0.5, None), x, None, length=5000)[0].sum()

    step = jhop.jit(jax.grad(of), fullgraph=True)
    step(X)
    step(X)
    assert (box.n, step.versions()) == (10003, 1)
    assert len(jhop.inline(step.graph(X)).jaxpr.eqns) < 20


@named("make", [counts, counts_and_uses, decays, averages])
def test_nested_scans_are_not_unrolled(make):
    def of(x, hook):
        def outer(c, _):
            return lax.scan(lambda d, _: (jhop.hook(d * 0.999, hook) * 0.5, None), c, None, length=100)[0], None

        return lax.scan(outer, x, None, length=70)[0].sum()

    hook = make(Box())
    step = jhop.jit(jax.grad(lambda x: of(x, hook)), fullgraph=True)
    assert len(jhop.inline(step.graph(X)).jaxpr.eqns) < 40


def test_scan_of_no_iterations_writes_nothing():
    box = Box()

    def of(x):
        c, _ = lax.scan(lambda c, _: (jhop.hook(c * 2, becomes_an_array(box)), None), x, None, length=0)
        return (c * 3).sum()

    assert jhop.jit(jax.grad(of), fullgraph=True)(X).tolist() == [3.0, 3.0, 3.0]
    assert (box.rate, type(box.rate)) == (0.5, float)


# While loops have no reverse mode: hooks run in one where it contains a backward pass of its own.


def descent(point, steps):
    """Gradient descent with a hook, as often as it takes."""

    def goes_on(carry):
        i, _ = carry
        return i < steps

    def body(carry):
        i, x = carry
        return i + 1, x - 0.1 * jax.grad(lambda x: (point(x) ** 2).sum())(x)

    return lambda x: lax.while_loop(goes_on, body, (jnp.int32(0), x))[1]


@named("make", THREADED)
def test_in_a_while_loop(make):
    eager, box = Box(), Box()
    hook, own = make(box), make(eager)
    run = jhop.jit(lambda x, n: descent(lambda v: jhop.hook(v, hook), n)(x), fullgraph=True)
    for steps in (3, 1, 4):
        expected = X
        for _ in range(steps):
            expected = expected - 0.1 * jax.grad(lambda x: (jhop.hook(x, own) ** 2).sum())(expected)
        agree(run(X, jnp.int32(steps)), expected)
        agree(box.state(), eager.state())
    assert run.versions() <= (2 if make is becomes_an_array else 1)


@named("make", [*UNROLLED, logs])
def test_while_loop_says_what_it_cannot_do(make):
    box = Box()
    hook = make(box)
    before = str(box.state())
    with pytest.raises(jhop.Unsupported, match="inside a `while` loop"):
        jhop.jit(lambda x: descent(lambda v: jhop.hook(v, hook), 3)(x), fullgraph=True)(X)
    assert str(box.state()) == before


def test_condition_that_writes_is_refused():
    box = Box()

    def goes_on(x):
        return jhop.trace_wrapped(x.sum(), fn=counts(box)) > 1

    with pytest.raises(jhop.Unsupported, match=r"inside `while` writes Python state .*, in the loop's condition"):
        jhop.jit(lambda x: lax.while_loop(goes_on, lambda x: x * 0.5, x), fullgraph=True)(X)
    assert box.n == 3


# Branches.


def test_number_of_a_branch_is_used_later():
    """Outside of the branch that counts, in a hook's arithmetic and on the device."""

    def program(flow, point, x):
        x = point(x)
        x = flow.cond(x[0] > 0, lambda x: point(jnp.sin(point(x))), lambda x: jnp.cos(point(x)), x)
        return (point(x * 2) ** 2).sum()

    for make in (counts_and_uses, decays, mixes):
        check(program, make)


def test_question_of_a_number_that_depends_on_the_data():
    box = Box()

    def asks(ct):
        return ct * 2 if box.n > 5 else ct

    def of(x):
        x = jhop.hook(x, asks)
        return lax.cond(x[0] > 0, lambda x: jhop.hook(x, counts(box)) ** 2, lambda x: x**2, x).sum()

    with pytest.raises(jhop.Unsupported, match="`asks`|asks.*known only once the graph ran"):
        jhop.jit(jax.grad(of), fullgraph=True)(X)
    assert box.n == 3


@named("make", [notes_new_keys, logs])
def test_branch_says_what_it_cannot_do(make):
    box = Box()
    hook = make(box)
    before = str(box.state())
    with pytest.raises(jhop.Unsupported, match="inside `cond`"):
        compiled(in_cond, hook)(X)
    assert str(box.state()) == before


# Devices.


def normalizes(box):
    """What it keeps is the same on all devices."""

    def hook(ct):
        norm = jnp.sqrt(lax.psum(jnp.sum(ct * ct), "a"))
        box.last = 0.9 * box.last + 0.1 * norm
        box.n += 1
        return ct / (box.n + norm)

    return hook


def whole(box):
    """The same on one device, of all shards."""

    def hook(ct):
        norm = jnp.sqrt(jnp.sum(ct * ct))
        box.last = 0.9 * box.last + 0.1 * norm
        box.n += 1
        return ct / (box.n + norm)

    return hook


def sharded(body, **options):
    mesh = make_mesh((4,), ("a",))
    return lambda x: jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"), **options)(x).sum()


@named("scanned", [False, True], ids=["once", "in a scan"])
def test_in_shard_map(scanned):
    boxes = Box(), Box()

    def program(flow, hook):
        def once(x):
            return jhop.hook(jnp.sin(x), hook) ** 2

        return (lambda x: flow.scan(lambda c, _: (once(c), None), x, length=3)[0]) if scanned else once

    x = jnp.arange(8, dtype=jnp.float32)
    step = jhop.jit(jax.grad(sharded(program(JAX, normalizes(boxes[0])))), fullgraph=True)
    for _ in range(2):
        agree(step(x), jax.grad(lambda x: program(PYTHON, whole(boxes[1]))(x).sum())(x))
        agree(boxes[0].state(), boxes[1].state())
    assert step.versions() == 1


@named("check_vma", [True, False])
def test_number_in_shard_map_is_counted_once(check_vma):
    box = Box()
    of = sharded(lambda x: jhop.hook(jnp.sin(x), counts_and_uses(box)) ** 2, check_vma=check_vma)
    step = jhop.jit(jax.grad(of), fullgraph=True)
    x = jnp.arange(8, dtype=jnp.float32)
    for n in (5, 7):
        np.testing.assert_allclose(step(x), (2 * jnp.sin(x) * n + 0.5) * jnp.cos(x), rtol=1e-5)
        assert box.n == n


@named(("make", "check_vma", "said"), [(accumulates, True, r"varies over the mesh axes \['a'\]"),
                                       (normalizes, False, "check_vma=False")])  # fmt: skip
def test_state_that_may_differ_from_device_to_device(make, check_vma, said):
    box = Box()
    box.table["sum"] = jnp.float32(0)
    before = str(box.state())
    of = sharded(lambda x: jhop.hook(jnp.sin(x), lambda ct: make(box)(ct.sum()) + ct) ** 2, check_vma=check_vma)
    with pytest.raises(jhop.Unsupported, match=said):
        jhop.jit(jax.grad(of), fullgraph=True)(jnp.arange(8, dtype=jnp.float32))
    assert str(box.state()) == before


# All or nothing.


@named("program", [in_scan, in_nested_scans, in_cond, in_checkpoint, in_cond_in_scan])
def test_error_leaves_everything_as_it_was(program):
    box, calls = Box(), []

    def hook(ct):
        box.n += 1
        box.last = jnp.sum(ct)
        box.log.append(jnp.sum(ct)) if program is not in_cond and program is not in_cond_in_scan else None
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("no")
        return ct

    box.calls = calls  # not reached by the hook's code through the box
    before = str({key: value for key, value in box.state().items() if key != "calls"})
    with pytest.raises((jhop.Unsupported, KeyError)):
        compiled(program, hook)(X)
    assert str({key: value for key, value in box.state().items() if key != "calls"}) == before


@pytest.mark.leaks
@named("program", [in_scan, in_nested_scans, in_cond_in_scan, in_checkpoint, in_jit])
def test_nothing_leaks(program):
    with jax.checking_leaks():
        for make in (counts_and_uses, averages, accumulates):
            check(program, make)
    with jax.checking_leaks():
        if program is in_scan:
            check(program, every_other, versions=None)


def test_lists_change_places_inside_a_call():
    def run(flow, compiled):
        ours, other = types.SimpleNamespace(log=[5]), types.SimpleNamespace(log=[2, 2])

        def hook(ct):
            for item in ours.log[:3]:
                ours.log, other.log = other.log, ours.log
                ct = ct if item % 2 else ct * 0.25
            ours.log.extend([1, 2])
            return ct

        def program(x):
            first = jhop.hook(jnp.sin(x) * 1.5, hook)
            return (first + flow.checkpoint(lambda v: jnp.sin(jhop.hook(jnp.cos(v), hook)))(x)).sum()

        step, found = compiled(jax.grad(program)), []
        for _ in range(2):
            found.append((np.asarray(step(X)).round(4).tolist(), list(ours.log), list(other.log)))
        return found

    assert run(JAX, lambda step: jhop.jit(step, fullgraph=True)) == run(PYTHON, lambda step: step)
