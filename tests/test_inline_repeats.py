"""A hook in many places is run once, where that is right: each test here fails for one wrong way to tell."""

import abc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
from jhop import _inline, _repeats

X = np.array([0.5, -2.0, 3.0], np.float32)


@pytest.fixture
def runs(monkeypatch):
    """The names of the hooks that ran while graphs were inlined."""
    ran = []
    run_hook = _inline._Inliner._run_hook

    def noted(self, hook, values):
        ran.append(hook.name)
        return run_hook(self, hook, values)

    monkeypatch.setattr(_inline._Inliner, "_run_hook", noted)
    return ran


def through(*hooks):
    """A function that sends its argument through hooks, changed a little before each."""

    def fn(ct):
        for i, hook in enumerate(hooks):
            ct = jhop.trace_wrapped(ct + (i + 1.0), fn=hook)
        return ct

    return fn


def inlined_outs(fn, *args):
    inlined = jhop.inline(jhop.make_fx(fn)(*args))
    outs = jax.tree.leaves(inlined(*args, *inlined.lifted.read()))
    return [np.asarray(out) for out in outs[: inlined.lifted.n_outs]]


def check(fn, *args, restore=lambda: None):
    """Inlined and eager must agree; `restore` puts state back in between."""
    found = inlined_outs(fn, *args)
    restore()
    expected = [np.asarray(out) for out in jax.tree.leaves(fn(*args))]
    restore()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def squash(ct):
    return jnp.tanh(ct) * 3.0 + jnp.sum(ct)


def test_a_pure_hook_runs_once_for_each_type(runs):
    check(through(squash, squash, squash), X)
    assert len(runs) == 1
    runs.clear()

    def two_types(ct):
        row, table = (jhop.trace_wrapped(ct * k, fn=squash) for k in (2.0, jnp.ones((2, 1))))
        return jhop.trace_wrapped(row * 1.5, fn=squash), jhop.trace_wrapped(table - 1.0, fn=squash)

    check(two_types, X)
    assert len(runs) == 2


def test_under_jit_and_with_methods_and_partials(runs):
    class Clip:
        limit = 0.7

        def __init__(self):
            self.scale = jnp.float32(1.5)

        def run(self, ct):
            return jnp.clip(ct * self.scale, -self.limit, self.limit)

    clip = Clip()

    def loss(x):
        inner = jax.jit(lambda x: jhop.hook(x * 1.5, clip.run))
        return jnp.sum(jhop.hook(inner(jhop.hook(x, clip.run)), clip.run) ** 2)

    step = jhop.jit(jax.grad(loss))
    for scale in (1.5, 4.0):
        clip.scale = jnp.float32(scale)
        np.testing.assert_allclose(step(X), jax.grad(loss)(jnp.asarray(X)), rtol=1e-6)
    assert runs == ["Clip.run"]


class Box:
    """Python state of two hooks."""

    def __init__(self):
        self.n = 2
        self.flag = False
        self.word = "two"
        self.array = jnp.float32(2.0)
        self.log = [2.0]
        self.table = {"a": 2.0}
        self.names = {"a"}
        self.helper = lambda ct: ct * 2.0


def set_flag(box):
    box.flag = not box.flag


def set_word(box):
    box.word += "!"


def set_n(box):
    box.n += 3


def set_array(box):
    box.array = box.array + 3.0


def append(box):
    box.log.append(5.0)


def add_key(box):
    box.table["b"] = 5.0


def add_name(box):
    box.names.add("b")


READS = {
    set_flag: lambda box, ct: ct * (5.0 if box.flag else 2.0),
    set_word: lambda box, ct: ct * len(box.word),
    set_n: lambda box, ct: ct * box.n,
    set_array: lambda box, ct: ct * box.array,
    append: lambda box, ct: ct * sum(box.log),
    add_key: lambda box, ct: ct * sum(box.table.values()),
    add_name: lambda box, ct: ct * len(box.names),
}


@pytest.mark.parametrize("write", READS, ids=lambda write: write.__name__)
def test_a_hook_that_reads_what_another_wrote_runs_again(write, runs):
    box, read = Box(), READS[write]

    def reader(ct):
        return read(box, ct)

    def writer(ct):
        write(box)

    check(through(reader, reader, writer, reader, reader), X, restore=box.__init__)
    assert runs.count(runs[0]) == 3  # once before the write, and then each time


@pytest.mark.parametrize("write", READS, ids=lambda write: write.__name__)
def test_a_hook_that_writes_runs_each_time(write, runs):
    box, read = Box(), READS[write]

    def hook(ct):
        write(box)
        return read(box, ct)

    check(through(hook, hook, hook), X, restore=box.__init__)
    assert len(runs) == 3


def test_every_run_of_a_counter_counts():
    box = Box()

    def count(ct):
        box.n += 1

    step = jhop.jit(jax.grad(lambda x: jnp.sum(jhop.hook(jhop.hook(jhop.hook(x, count) * 2.0, count), count) ** 2)))
    for _ in range(3):
        step(X)
    assert box.n == 2 + 9


def test_a_variable_that_another_hook_writes(runs):
    k = 2.0

    def reader(ct):
        return ct * (3.0 if k == 2.0 else 5.0)

    def writer(ct):
        nonlocal k
        k = 11.0

    def restore():
        nonlocal k
        k = 2.0

    check(through(reader, reader, writer, reader), X, restore=restore)
    assert len(runs) == 3


def test_code_that_another_hook_replaces(runs):
    def helper(ct):
        return ct * 2.0

    plain = helper.__code__

    def reader(ct):
        return helper(ct)

    def writer(ct):
        helper.__code__ = (lambda ct: ct * 7.0).__code__

    def restorer(ct):  # code that stays another after the run is no state, and refused
        helper.__code__ = plain

    check(through(reader, reader, writer, reader, restorer), X)
    assert len(runs) == 4


def test_classes_that_a_hook_registers(runs):
    class Number(abc.ABC):  # noqa: B024 (only to be asked for)
        pass

    class Mine:
        pass

    mine = Mine()

    def reader(ct):
        return ct * (5.0 if isinstance(mine, Number) else 2.0)

    def writer(ct):
        Number.register(Mine)

    (out,) = inlined_outs(through(reader, reader, writer, reader), X)
    expected = ((X + 1.0) * 2.0 + 2.0) * 2.0 + 3.0
    np.testing.assert_allclose(out, (expected + 4.0) * 5.0, rtol=1e-6)


# -- what JAX knows ----------------------------------------------------------------------------------------------------


def test_weak_types_dtypes_and_shapes_are_told_apart(runs):
    def hook(ct):
        aval = jax.typeof(ct)
        return ct * (3.0 if aval.weak_type else 5.0) * (1.0 + aval.ndim) * (2.0 if aval.dtype == jnp.float32 else 7.0)

    def fn(x):
        weak = jnp.asarray(2.5) * 1.0
        values = weak, x[0], x, x.astype(jnp.bfloat16), x[None]
        values = [jhop.trace_wrapped(value, fn=hook) for value in values]
        return [jhop.trace_wrapped(value, fn=hook).astype(jnp.float32) for value in values]

    check(fn, jnp.asarray(X))
    assert len(runs) == 5


def test_the_context_of_each_place_counts(runs):
    def noise(ct):
        return ct * jax.random.uniform(jax.random.key(3), ct.shape)

    def fn(x):
        found = []
        for new in (True, False, True, False):
            with jax.threefry_partitionable(new):
                found.append(jhop.trace_wrapped(x + 1.0, fn=noise))
        return found

    check(fn, X)
    assert len(runs) == 2


def test_a_place_keeps_its_name_stack(runs):
    def fn(x):
        for name in ("one", "two", "three"):
            with jax.named_scope(name):
                x = jhop.trace_wrapped(x * 2.0, fn=inside)
        return x

    def inside(ct):
        with jax.named_scope("inside"):
            return jnp.tanh(ct)

    inlined = jhop.inline(jhop.make_fx(fn)(X))
    stacks = [str(eqn.source_info.name_stack) for eqn in inlined.jaxpr.eqns if eqn.primitive.name == "tanh"]
    assert stacks == ["one/inside", "two/inside", "three/inside"]
    assert len(runs) == 1


def test_effects_happen_at_each_place():
    seen = []

    def tell(ct):
        jax.debug.callback(lambda x: seen.append(float(x)), ct[0], ordered=True)
        return ct * 3.0

    jax.jit(lambda x: jhop.inline(jhop.make_fx(through(tell, tell, tell))(X))(x))(X)
    jax.effects_barrier()
    assert seen == [1.5, 6.5, 22.5]


# -- which values a hook gets ------------------------------------------------------------------------------------------


def test_a_hook_may_ask_whether_two_values_are_one(runs):
    def hook(ct):
        a, b = ct
        return (a * 3.0, b) if a is b else (a * 5.0, b * 7.0)

    def fn(x):
        y = x * 2.0
        return [jhop.trace_wrapped(pair, fn=hook) for pair in ((x, x), (x, y), (y, y), (y, x))]

    factors = 3.0, 1.0, 5.0, 14.0, 6.0, 2.0, 10.0, 7.0
    for out, factor in zip(inlined_outs(fn, X), factors, strict=True):
        np.testing.assert_allclose(out, X * factor, rtol=1e-6)
    assert len(runs) == 3


def test_a_value_that_is_state_of_the_hook_too():
    box = Box()
    box.array = jnp.asarray(X) * 2.0

    def give(ct):
        return box.array

    def add(ct):
        return ct * 3.0 + box.array

    def fn(x):
        first = jhop.trace_wrapped(jhop.trace_wrapped(x + 1.0, fn=give), fn=add)
        return first, jhop.trace_wrapped(x, fn=add), jhop.trace_wrapped(x * 5.0, fn=add)

    check(fn, X)


def test_constants_are_no_values_of_the_graph():
    def hook(ct):
        return ct * (3.0 if isinstance(ct, jax.core.Tracer) else 5.0)

    constants = jnp.ones(3), jnp.ones(3) * 2.0

    def fn(x):
        return [jhop.trace_wrapped(value, fn=hook) for value in (x + 1.0, *constants, x + 2.0)]

    outs = inlined_outs(fn, X)
    expected = (X + 1.0) * 3.0, constants[0] * 5.0, constants[1] * 5.0, (X + 2.0) * 3.0
    for ours, theirs in zip(outs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_tracers_that_a_hook_closes_over():
    def loss(x):
        scale = x[0] * 2.0

        def hook(ct):
            return ct * scale

        y = jhop.hook(x * 3.0, hook)
        scale = x[1] * 5.0
        return jnp.sum(jhop.hook(y * 1.5, hook) ** 2)

    got = jhop.jit(jax.grad(loss))(X)
    upstream = 2 * (X * 3.0 * 1.5) * (X[1] * 5.0) * 1.5 * (X[0] * 2.0) * 3.0
    np.testing.assert_allclose(got, upstream, rtol=1e-5)


@pytest.mark.parametrize(
    "hook",
    [
        lambda ct: None,
        lambda ct: (jnp.sin(ct[0]), None),
        lambda ct: (ct[1] * 1.0, ct[0]),
        lambda ct: (ct[1], ct[1]),
        lambda ct: (jnp.full_like(ct[0], 4.0), np.full(3, 7.0, np.float32)),
    ],
    ids=["nothing", "one", "swapped", "the same", "constants"],
)
def test_what_hooks_may_return(hook, runs):
    def fn(x):
        first = jhop.trace_wrapped((x, x * 2.0), fn=hook)
        second = jhop.trace_wrapped((first[1] + x, x * 5.0), fn=hook)
        return first, second, jhop.trace_wrapped((x - 1.0, x * 7.0), fn=hook)

    check(fn, X)
    assert len(runs) == 1


# -- what must be as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["torch", "jax"])
def test_printed_as_if_each_had_run(dialect, monkeypatch):
    def hook(ct):
        half = ct * 0.5
        return half + jnp.sum(half) * 2

    def text():
        return jhop.inline(jhop.make_fx(through(hook, hook, squash, hook))(X)).print_readable(False, dialect=dialect)

    shared = text()
    monkeypatch.setattr(_repeats.Repeats, "place", lambda self, hook, values: None)
    assert shared == text()


def test_a_banned_call_in_one_kind_of_place_is_refused():
    def hook(ct):
        if ct.ndim == 2:
            print("here")
        return ct * 2.0

    def fn(x):
        x = through(hook, hook)(x)
        return jhop.trace_wrapped(x[None], fn=hook)

    with pytest.raises(jhop.Unsupported, match=r"`print` in hook `.*hook`"):
        jhop.inline(jhop.make_fx(fn)(X))


def test_a_hook_that_reaches_much_is_run_each_time(runs):
    table = {i: float(i) for i in range(_repeats.MAX_SLOTS + 1)}
    check(through(*[lambda ct: ct * table[3]] * 3), X)
    assert len(runs) == 3


def test_hooks_inside_loops_are_no_part_of_it(runs):
    def fn(x):
        x = through(squash, squash)(x)
        x, _ = jax.lax.scan(lambda c, _: (through(squash, squash)(c) * 0.1, None), x, None, length=2)
        return jhop.trace_wrapped(x, fn=squash)

    check(fn, X)
    assert len(runs) == 3


def test_a_loop_in_which_a_value_from_around_it_is_hooked():
    box = Box()

    def keep(ct):
        box.array = ct * 2.0

    def give(ct):
        return box.array

    def body(c, _):
        return jhop.trace_wrapped(jhop.trace_wrapped(c, fn=give), fn=squash) * 0.1, None

    def fn(x):
        x, _ = jax.lax.scan(body, jhop.trace_wrapped(x, fn=keep), None, length=2)
        return jhop.trace_wrapped(x * 3.0, fn=squash), jhop.trace_wrapped(x * 5.0, fn=squash)

    first = squash(X * 2.0) * 0.1
    outs = inlined_outs(fn, X)
    np.testing.assert_allclose(outs[0], squash(first * 3.0), rtol=1e-6)
    np.testing.assert_allclose(outs[1], squash(first * 5.0), rtol=1e-6)


@pytest.mark.leaks
def test_nothing_of_the_trace_is_left():
    box = Box()

    def hook(ct):
        return ct * box.n + box.array

    step = jhop.jit(jax.grad(lambda x: jnp.sum(jhop.hook(jhop.hook(x, hook) * 2.0, hook) ** 2)))
    with jax.checking_leaks():
        got = step(X)
    np.testing.assert_allclose(got, (((2 * 2 * X) * 2 + 2) * 2) * 2 + 2, rtol=1e-6)

