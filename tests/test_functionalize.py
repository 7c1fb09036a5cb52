"""`jhop.functionalize`: the state of hooks as a pytree, with the results and the state that `jhop.jit` gives."""

import concurrent.futures
import dataclasses
import functools
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_state as shapes
import test_state_control_flow as flow
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop
from jhop import _walk

W = jnp.array([0.5, -1.0, 2.0], jnp.float32)
named = pytest.mark.parametrize
PATH = "fn.__wrapped__.__closure__[0].cell_contents."  # of the variable `meter`, in the function that `grad` wraps


class Meter:
    """A counter, a float, arrays, and a setting."""

    def __init__(self):
        self.steps = 0
        self.rate = 0.5
        self.norm = jnp.float32(0)
        self.sums = {"ct": jnp.zeros(3), "calls": 10}
        self.decay = 0.75

    def hook(self, ct):
        self.steps += 2
        self.rate = self.rate * 0.5 + 1.0
        self.norm = self.decay * self.norm + jnp.sum(ct * ct)
        self.sums["ct"] = self.sums["ct"] + ct * self.steps
        self.sums["calls"] += 1
        return ct * self.steps + self.rate + self.norm


def gradient(meter):
    return jax.grad(lambda w: (jhop.hook(w, meter.hook) ** 2).sum())


def short(state):
    return {path.rpartition("cell_contents.")[2]: value for path, value in state.items()}


def steps(pure, state, n):
    outs = []
    for i in range(n):
        out, state = pure(state, W * (1 - 0.5 * i))
        outs.append(out)
    return jnp.stack(outs), state


def scanned(pure, state, n):
    state, outs = lax.scan(lambda s, i: pure(s, W * (1 - 0.5 * i))[::-1], state, jnp.arange(float(n)))
    return outs, state


def agree(got, expected, *, exact=True):
    """Equal, Python numbers by type and exactly."""
    assert got.keys() == expected.keys()
    for path, theirs in expected.items():
        ours = got[path]
        if exact and isinstance(theirs, (int, float)):
            assert (type(ours), ours) == (type(theirs), theirs), path
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6, err_msg=path)


def as_jit_leaves_it(fn, n):
    """(results, state) of `jhop.jit` after n steps on the objects themselves."""
    step = jhop.jit(fn, fullgraph=True)
    outs = jnp.stack([step(W * (1 - 0.5 * i)) for i in range(n)])
    return outs, jhop.functionalize(fn)[1]


# The state.


def test_names_and_values():
    meter = Meter()
    state = jhop.functionalize(gradient(meter))[1]
    assert type(state) is dict
    assert {path.removeprefix(PATH) for path in state} == {"steps", "rate", "norm", "sums['ct']", "sums['calls']"}
    assert {type(state[PATH + name]) for name in ("steps", "sums['calls']")} == {int}
    assert (state[PATH + "steps"], state[PATH + "sums['calls']"], state[PATH + "rate"]) == (0, 10, 0.5)


@dataclasses.dataclass
class Defaults:
    n: int = 3
    sum: float = 0.5

    def hook(self, ct):
        self.n += 1
        self.sum = self.sum * 0.5
        return ct * self.n + self.sum


class OfTheClass:
    n = 3

    def hook(self, ct):
        type(self).n += 1
        return ct * self.n


class ByClassMethod:
    n = 3

    @classmethod
    def hook(cls, ct):
        cls.n += 1
        return ct * cls.n


class ByName:
    n = 3

    def hook(self, ct):
        ByName.n += 1
        return ct * self.n


class Registry(type):
    def count(cls):
        cls.n += 1
        return cls.n


class ByMeta(metaclass=Registry):
    n = 3
    places = {}

    def hook(self, ct):
        return ct * self.places["it"].count()


ByMeta.places["it"] = ByMeta


def test_defaults_of_a_dataclass_are_no_state():
    meter = Defaults()
    pure, state = jhop.functionalize(gradient(meter))
    assert short(state) == {"n": 3, "sum": 0.5}
    agree(short(steps(pure, state, 3)[1]), {"n": 6, "sum": 0.0625})


@named("cls", [OfTheClass, ByClassMethod, ByName, ByMeta], ids=lambda cls: cls.__name__)
def test_state_of_a_class_is_state(cls):
    pure, state = jhop.functionalize(gradient(cls()))
    assert list(state.values()) == [3]
    outs, state = steps(pure, state, 3)
    assert list(state.values()) == [6]
    np.testing.assert_allclose(outs[0], 8 * W)
    assert cls.n == 3


def test_paths_are_the_same_each_time():
    first, second = (list(jhop.functionalize(gradient(Meter()))[1]) for _ in range(2))
    assert first == second


def test_name_of_a_global():
    space = types.ModuleType("space")
    code = "def loss(w): return (jhop.hook(w, meter.hook) ** 2).sum()"
    space.__dict__.update(jhop=jhop, meter=Meter())
    exec(compile(code, __file__, "exec"), space.__dict__)
    state = jhop.functionalize(jax.grad(space.loss))[1]
    assert {"G['meter'].steps", "G['meter'].sums['calls']"} <= state.keys()
    pure, state = jhop.functionalize(jax.grad(space.loss))
    assert pure(state, W)[1]["G['meter'].steps"] == 2


def test_globals_of_one_name():
    """Of two modules: each has an entry of its own."""
    one, other = {"n": 3}, {"n": 40}
    code = "def hook(ct):\n    global n\n    n += 1\n    return ct * n"
    for module in (one, other):
        exec(compile(code, __file__, "exec"), module)
    first, second = one["hook"], other["hook"]
    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(jhop.hook(w, first), second) ** 2).sum()))
    assert state == {"G['n']": 3, "G['n']#2": 40}
    assert pure(state, W)[1] == {"G['n']": 4, "G['n']#2": 41}


def test_no_state():
    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, lambda ct: ct * 3) ** 2).sum()))
    assert state == {}
    out, new = jax.jit(pure)(state, W)
    np.testing.assert_allclose(out, 6 * W)
    assert new == {}


# The results are those of `jhop.jit`.


def test_as_jit():
    meter = Meter()
    fn = gradient(meter)
    pure, state0 = jhop.functionalize(fn)
    outs, state = steps(pure, state0, 4)
    expected, left = as_jit_leaves_it(fn, 4)
    np.testing.assert_allclose(outs, expected, rtol=1e-6)
    agree(state, left)
    assert meter.steps == 8


@named("make_run", [lambda pure: jax.jit(pure), lambda pure: jax.jit(pure, donate_argnums=0)], ids=["jit", "donated"])
def test_jitted(make_run):
    fn = gradient(Meter())
    pure, state0 = jhop.functionalize(fn)
    traces = []

    def counted(state, w):
        traces.append(1)
        return pure(state, w)

    outs, state = steps(make_run(counted), jax.tree.map(jnp.asarray, state0), 4)
    assert len(traces) == 1
    expected, left = as_jit_leaves_it(fn, 4)
    np.testing.assert_allclose(outs, expected, rtol=1e-5)
    agree(state, left, exact=False)


@named("steps_are", [jnp.int32(1), jnp.asarray(1), jnp.int16(1), jnp.uint8(1), 1])
@named("norm_is", [jnp.float32(0.5), jnp.asarray(0.5)])
def test_each_entry_comes_back_as_it_was_given(steps_are, norm_is):
    """Dtype and weak type too: a loop takes it back."""
    pure, state = jhop.functionalize(gradient(Meter()))
    state = {**state, PATH + "steps": steps_are, PATH + "norm": norm_is}
    avals = {path: (aval.shape, aval.dtype, aval.weak_type) for path, aval in of_avals(state).items()}
    out, new = jax.jit(pure)(state, W)
    assert {path: (aval.shape, aval.dtype, aval.weak_type) for path, aval in of_avals(new).items()} == avals
    expected = pure({**state, PATH + "steps": 1, PATH + "norm": jnp.float32(0.5)}, W)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5)
    agree(new, expected[1], exact=False)


def of_avals(state):
    return {path: jax.typeof(value) for path, value in state.items()}


def test_ints_of_64_bits():
    meter = Meter()

    def hook(ct):
        meter.steps += 2
        return ct * 3

    with jax.enable_x64(True):
        pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
        state = {path: 2**40 if path.endswith("steps") else value for path, value in state.items()}
        (steps,) = (value for path, value in jax.jit(pure)(state, W)[1].items() if path.endswith("steps"))
        assert (int(steps), steps.dtype) == (2**40 + 2, jnp.int64)


def test_threads():
    meter = Meter()
    pure, state0 = jhop.functionalize(gradient(meter))

    def work(i):
        state = {**state0, PATH + "steps": 100 * i}
        for _ in range(2):
            _, state = pure(state, W)
        return state[PATH + "steps"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [100 * i + 4 for i in range(8)]
    assert meter.steps == 0


def test_scan_over_ten_steps():
    fn = gradient(Meter())
    pure, state0 = jhop.functionalize(fn)
    outs, state = scanned(pure, state0, 10)
    expected, left = as_jit_leaves_it(fn, 10)
    np.testing.assert_allclose(outs, expected, rtol=1e-5)
    agree(state, left, exact=False)
    assert {path: v.dtype for path, v in short(state).items()} == {
        "steps": jnp.int32, "rate": jnp.float32, "norm": jnp.float32, "sums['ct']": jnp.float32,
        "sums['calls']": jnp.int32,
    }  # fmt: skip


# The state's own values count, in hooks and in the function.


def test_values_of_the_state_are_used():
    pure, state0 = jhop.functionalize(gradient(Meter()))
    state = {path: value + 3 for path, value in state0.items()}
    other = Meter()
    other.steps, other.rate, other.norm = 3, 3.5, jnp.float32(3)
    other.sums = {"ct": jnp.full(3, 3.0), "calls": 13}
    expected = gradient(other)(W)
    for run in (pure, jax.jit(pure)):
        out, new = run(state, W)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        agree(short(new), short(jhop.functionalize(gradient(other))[1]), exact=run is pure)


def test_function_reads_the_state_too():
    meter = Meter()

    def fn(w):
        norm, count = meter.norm, meter.steps
        return gradient(meter)(w) * norm + count

    pure, state = jhop.functionalize(fn)
    got = [steps(run, state, 3)[0] for run in (pure, jax.jit(pure))] + [scanned(pure, state, 3)[0]]
    expected = jnp.stack([fn(W * (1 - 0.5 * i)) for i in range(3)])
    for outs in got:
        np.testing.assert_allclose(outs, expected, rtol=1e-5)


@named("wrap", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_compiled_function_that_reads_the_state(wrap):
    """JAX keeps traces of inner functions: none with values of another call in it is found again."""
    meter = Meter()
    inner = wrap(lambda w: gradient(meter)(w) + meter.norm * meter.steps)
    pure, state = jhop.functionalize(lambda w: inner(w) + inner(2 * w))
    state = {path: value + 1 for path, value in state.items()}
    other = Meter()
    other.steps, other.rate, other.norm, other.sums = 1, 1.5, jnp.float32(1), {"ct": jnp.ones(3), "calls": 11}
    expected = inner_twice(other, W)
    for run in (steps, scanned, steps, scanned):
        np.testing.assert_allclose(run(pure, state, 3)[0][0], expected, rtol=1e-5)
        pure, _ = jhop.functionalize(lambda w: inner(w) + inner(2 * w))


def inner_twice(meter, w):
    """What the function itself reads is what was there when it is traced: before its hooks run."""
    norm_times_steps = meter.norm * meter.steps
    return gradient(meter)(w) + norm_times_steps + gradient(meter)(2 * w) + norm_times_steps


def test_ints_are_exact_without_a_trace():
    pure, state = jhop.functionalize(gradient(Meter()))
    state[PATH + "steps"] = 2**40
    assert pure(state, W)[1][PATH + "steps"] == 2**40 + 2


def test_number_in_a_branch_is_exact_and_stays_when_traced():
    meter = Meter()

    def fn(w):
        return lax.cond(w[0] > 0, lambda w: jhop.hook(w, meter.hook) ** 2, lambda w: w**3, w).sum()

    pure, state = jhop.functionalize(jax.grad(fn))
    assert [short(pure(state, w)[1])["steps"] for w in (W, -W)] == [2, 0]
    assert type(short(pure(state, W)[1])["steps"]) is int
    traced = jax.jit(lambda w: pure(state, w)[1])  # the state is no argument, but what is done to it depends on one
    assert [short(traced(w))["steps"].tolist() for w in (W, -W)] == [2, 0]


def test_python_control_flow_on_python_numbers():
    meter = Meter()

    def hook(ct):
        meter.steps += 1
        return ct * 10 if meter.steps % 2 == 0 else ct

    fn = jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum())
    pure, state = jhop.functionalize(fn)
    outs, state = steps(pure, state, 4)
    np.testing.assert_allclose(outs, as_jit_leaves_it(fn, 4)[0], rtol=1e-6)
    # An array that is there is as good, if one waits for it.
    pure, state = jhop.functionalize(fn)
    arrays = steps(pure, jax.tree.map(jnp.asarray, state), 4)
    np.testing.assert_allclose(arrays[0][:2] / outs[:2], jnp.ones((2, 3)), rtol=1e-6)
    with pytest.raises(jhop.Unsupported, match="asks for the value of the number `.*steps`.* lax.cond"):
        jax.jit(pure)(state, W)
    with pytest.raises(jhop.Unsupported, match="asks for the value of the number"):
        scanned(pure, state, 2)


def test_setting_may_steer():
    meter = Meter()
    meter.times = 3

    def hook(ct):
        meter.steps += 1
        for _ in range(meter.times):
            ct = ct * 2 if meter.decay > 0.5 else ct
        return ct * meter.steps

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
    np.testing.assert_allclose(scanned(pure, state, 2)[0][0], 16 * W)
    meter.times = 1
    np.testing.assert_allclose(pure(state, W)[0], 4 * W)


# Transformations.


def test_grad_of_the_result():
    pure, state = jhop.functionalize(gradient(Meter()))
    out = jax.jacobian(lambda w: pure(state, w)[0])(W)
    # ct = 2w, times 2 steps + rate 1.25 + norm sum(4 w^2)
    np.testing.assert_allclose(out, 4 * jnp.eye(3) + 8 * W[None, :], rtol=1e-5)
    by_state = jax.grad(lambda norm: pure({**state, PATH + "norm": norm}, W)[0].sum())(jnp.float32(0))
    np.testing.assert_allclose(by_state, 3 * 0.75)


def test_grad_through_numbers_of_the_state():
    pure, state = jhop.functionalize(gradient(Meter()))
    by_rate = jax.grad(lambda rate: pure({**state, PATH + "rate": rate}, W)[0].sum())(0.5)
    np.testing.assert_allclose(by_rate, 3 * 0.5)


def test_grad_through_steps():
    pure, state = jhop.functionalize(gradient(Meter()))

    def last(w):
        def body(carry, _):
            w, state = carry
            out, state = pure(state, w)
            return (w - 0.01 * out, state), None

        (w, _), _ = lax.scan(body, (w, jax.tree.map(jnp.asarray, state)), None, length=3)
        return (w**2).sum()

    numeric = (last(W.at[0].add(1e-2)) - last(W.at[0].add(-1e-2))) / 2e-2
    np.testing.assert_allclose(jax.grad(last)(W)[0], numeric, rtol=2e-2)


def test_vmap():
    pure, state = jhop.functionalize(gradient(Meter()))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), state)
    ws = jnp.stack([W, 2 * W])
    outs, new = jax.vmap(pure)(states, ws)
    for i in range(2):
        out, one = pure(jax.tree.map(lambda leaf, i=i: leaf[i], states), ws[i])
        np.testing.assert_allclose(outs[i], out, rtol=1e-5)
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], new), one, exact=False)


def test_vmap_of_numbers_in_a_scan():
    meter = flow.Box()
    hook = flow.mixes(meter)
    fn = jax.grad(lambda x: flow.in_scan(flow.JAX, lambda v: jhop.hook(v, hook), x))
    pure, state = jhop.functionalize(fn)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 2]), state)
    outs, new = jax.vmap(pure, in_axes=(0, None))(states, W)
    for i in range(2):
        out, one = pure(jax.tree.map(lambda leaf, i=i: leaf[i], states), W)
        np.testing.assert_allclose(outs[i], out, rtol=1e-5)
        agree(jax.tree.map(lambda leaf, i=i: leaf[i], new), one, exact=False)


def test_checkpoint_and_cond_around():
    pure, state = jhop.functionalize(gradient(Meter()))
    arrays = jax.tree.map(jnp.asarray, state)
    out, new = jax.jit(
        lambda p, s: lax.cond(p, lambda s: jax.checkpoint(pure)(s, W), lambda s: (W, s), s)
    )(True, arrays)  # fmt: skip
    np.testing.assert_allclose(out, pure(state, W)[0], rtol=1e-6)
    agree(new, pure(state, W)[1], exact=False)


def test_sharded_state():
    mesh = make_mesh((4,), ("a",))
    sharding = NamedSharding(mesh, P("a"))
    meter = Meter()
    meter.sums["ct"] = jax.device_put(jnp.zeros(8), sharding)
    meter.norm = jax.device_put(meter.norm, NamedSharding(mesh, P()))
    pure, state = jhop.functionalize(gradient(meter))
    assert short(state)["sums['ct']"].sharding == sharding
    w = jax.device_put(jnp.arange(8.0), sharding)
    step = jax.jit(pure)
    for _ in range(2):
        out, state = step(state, w)
    assert short(state)["sums['ct']"].sharding.is_equivalent_to(sharding, 1)
    for _ in range(2):
        expected = gradient(meter)(w)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_allclose(short(state)["sums['ct']"], meter.sums["ct"], rtol=1e-5)


def test_static_and_named_arguments():
    meter = Meter()

    def fn(w, scale=1.0, *, train=True, name="a"):
        if not train or name != "a":
            return w
        return gradient(meter)(w) * scale

    pure, state = jhop.functionalize(fn)
    step = jax.jit(pure, static_argnames=("train", "name"))
    assert step(state, W, train=False)[0].tolist() == W.tolist()
    assert step(state, W, train=False)[1].keys() == state.keys()
    np.testing.assert_allclose(step(state, W, 2.0, train=True)[0], 2 * pure(state, W, train=True, name="a")[0])
    assert pure(state, W, name="b")[0].tolist() == W.tolist()


# For the states that people have.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    step: jax.Array
    params: jax.Array
    hooks: dict


def test_in_a_train_state():
    meter, other = Meter(), Meter()
    pure, hooks = jhop.functionalize(gradient(meter))

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state):
        grad, hooks = pure(state.hooks, state.params)
        return TrainState(state.step + 1, state.params - 0.01 * grad, hooks)

    state = TrainState(jnp.int32(0), jnp.copy(W), hooks)
    params, step = W, jhop.jit(gradient(other))
    for _ in range(3):
        state = train(state)
        params = params - 0.01 * step(params)
    np.testing.assert_allclose(state.params, params, rtol=1e-5)
    assert (int(state.step), int(short(state.hooks)["steps"]), other.steps) == (3, 6, 6)
    assert meter.norm == 0  # not deleted: what was donated is a copy


def test_saved_and_loaded():
    pure, state = jhop.functionalize(gradient(Meter()))
    _, state = steps(pure, state, 2)
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    loaded = dict(np.load(file))
    assert loaded.keys() == state.keys()
    again, _ = jhop.functionalize(gradient(Meter()))  # as in another process
    out, new = pure(state, W)
    from_file, after = again(loaded, W)
    np.testing.assert_array_equal(from_file, out)
    agree(after, new)
    leaves, tree = jax.tree.flatten(state)
    agree(again(jax.tree.unflatten(tree, leaves), W)[1], new)
    jitted = jax.jit(again)(loaded, W)
    np.testing.assert_allclose(jitted[0], out, rtol=1e-6)


# Pure.


@pytest.mark.leaks
def test_objects_stay_as_they_were():
    meter = Meter()
    fn = gradient(meter)
    before, norm, sums = shapes.frozen(meter), meter.norm, meter.sums["ct"]
    pure, state = jhop.functionalize(fn)
    kept = dict(state)
    with jax.checking_leaks():
        first = steps(pure, state, 2)[0]
        jax.vmap(pure, in_axes=(None, 0))(state, jnp.stack([W] * 3))
        jax.grad(lambda w: pure(state, w)[0].sum())(W)
        scanned(pure, state, 2)
        jax.eval_shape(pure, state, W)
    assert shapes.frozen(meter) == before
    assert meter.norm is norm
    assert meter.sums["ct"] is sums
    assert all(state[path] is value for path, value in kept.items())
    np.testing.assert_array_equal(steps(pure, state, 2)[0], first)
    # What happens to the objects later is of no matter either.
    jhop.jit(fn)(W)
    np.testing.assert_array_equal(steps(pure, state, 2)[0], first)


def test_objects_are_put_back_after_an_error():
    meter = Meter()

    def fails(ct):
        meter.steps += 1
        meter.sums["new"] = ct
        raise KeyError("no")

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, fails) ** 2).sum()))
    before = shapes.frozen(meter)
    for run in (pure, jax.jit(pure)):
        with pytest.raises(jhop.Unsupported, match="raised KeyError"):
            run(state, W)
        assert shapes.frozen(meter) == before


def test_arrays_are_no_constants():
    meter = Meter()
    meter.mask = np.arange(1000, dtype=np.float32)
    meter.other = jnp.arange(1000.0)

    def hook(ct):
        return ct * meter.mask + meter.other

    table = jnp.arange(1000.0) + 1
    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) * table).sum()))
    closed = jax.make_jaxpr(pure)(state, jnp.ones(1000))
    assert all(np.size(const) < 1000 for const in closed.consts)
    np.testing.assert_allclose(pure(state, jnp.ones(1000))[0], table * meter.mask + meter.other)


# Errors.


def test_what_is_no_function():
    with pytest.raises(jhop.JhopError, match=r"jhop\.functionalize: expected a function, got int"):
        jhop.functionalize(3)


@named(
    ("change", "message"),
    [
        (lambda state: {}, r"lacks `.*steps`"),
        (lambda state: {**state, "more": 1}, "has no use for `more`"),
        (lambda state: list(state.values()), "comes first, as a dict .* got a list"),
        (lambda state: {**state, PATH + "norm": jnp.zeros(2)}, r"an array float32\[2\] at `.*norm`.*float32\[\]"),
        (lambda state: {**state, PATH + "norm": jnp.int32(0)}, r"an array int32\[\] at `.*norm`"),
        (lambda state: {**state, PATH + "norm": 1.5}, r"the number 1.5 at `.*norm`"),
        (lambda state: {**state, PATH + "steps": "x"}, r"a str at `.*steps`, where state0 has a Python int"),
        (lambda state: {**state, PATH + "steps": True}, r"a bool at `.*steps`"),
        (lambda state: {**state, PATH + "steps": jnp.zeros(3)}, r"an array float32\[3\] at `.*steps`"),
    ],
)
def test_state_that_is_another(change, message):
    pure, state = jhop.functionalize(gradient(Meter()))
    with pytest.raises(jhop.JhopError, match=message):
        pure(change(state), W)


def writes_new_key(meter, ct):
    meter.sums["new"] = ct


def writes_none(meter, ct):
    meter.sums["ct"] = None


def appends(meter, ct):
    meter.log.append(ct)


def fills_none(meter, ct):
    meter.empty = ct


def sets_flag(meter, ct):
    meter.flag = True


def deletes(meter, ct):
    del meter.sums["calls"]


def reorders(meter, ct):
    meter.sums["ct"] = meter.sums.pop("ct")


def grows(meter, ct):
    meter.sums["ct"] = jnp.concatenate([meter.sums["ct"], ct])


def makes_int_of_float(meter, ct):
    meter.norm = jnp.int32(1)


def makes_array_of_number(meter, ct):
    meter.steps = ct


@named(
    ("what", "place"),
    [
        (writes_new_key, r"sums\['new'\]"), (writes_none, r"sums\['ct'\]"), (appends, "log"), (fills_none, "empty"),
        (sets_flag, "flag"), (deletes, r"sums\['calls'\]"), (reorders, r"sums\['ct'\]"), (grows, r"sums\['ct'\]"),
        (makes_int_of_float, "norm"), (makes_array_of_number, "steps"),
    ],
)  # fmt: skip
def test_write_that_changes_what_there_is(what, place):
    meter = Meter()
    meter.log, meter.empty, meter.flag = [], None, False
    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, functools.partial(what, meter)) ** 2).sum()))
    before = shapes.frozen(meter)
    for run in (pure, jax.jit(pure)):
        with pytest.raises(jhop.Unsupported, match=rf"at `.*{place}` it .* Before functionalize is called"):
            run(state, W)
    assert shapes.frozen(meter) == before


def test_int_that_becomes_a_float():
    meter = Meter()

    def hook(ct):
        meter.steps += 0.5
        return ct * meter.steps

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
    assert 1.0 in steps(pure, state, 2)[1].values()  # as Python does it
    with pytest.raises(jhop.Unsupported, match=r"makes an array float32\[\] of an array int32\[\]"):
        jax.jit(pure)(state, W)


def test_int_beyond_the_devices():
    pure, state = jhop.functionalize(gradient(Meter()))
    with pytest.raises(jhop.Unsupported, match=r"writes the int 2147483649 to `.*steps`.*x64"):
        pure({**state, PATH + "steps": jnp.int32(2**31 - 1)}, W)
    with pytest.raises(OverflowError):  # by JAX
        jax.jit(pure)({**state, PATH + "steps": 2**40}, W)


def test_int_to_a_power_that_is_traced():
    meter = Meter()

    def hook(ct):
        meter.steps -= 1
        return ct * 2**meter.steps

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
    np.testing.assert_allclose(steps(pure, state, 2)[0], [W, 0.5 * W / 2], rtol=1e-6)
    with pytest.raises(jhop.Unsupported, match="raises an int to a power whose sign"):
        jax.jit(pure)(state, W)


def test_float_to_a_power_that_is_traced():
    meter = Meter()

    def hook(ct):
        meter.steps += 1
        return ct / (1 - 0.5**meter.steps)

    fn = jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum())
    pure, state = jhop.functionalize(fn)
    outs = scanned(pure, state, 3)[0]
    np.testing.assert_allclose(outs, as_jit_leaves_it(fn, 3)[0], rtol=1e-6)


def test_hook_that_prints():
    def hook(ct):
        print(ct)

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
    with pytest.raises(jhop.Unsupported, match="call to `print` in hook `hook`"):
        pure(state, W)


def test_function_that_writes():
    meter = Meter()

    def fn(w):
        meter.steps += 1
        return gradient(meter)(w)

    pure, state = jhop.functionalize(fn)
    with pytest.raises(jhop.Unsupported, match=r"`.*fn` itself, not a hook of it, writes `.*steps`"):
        pure(state, W)
    assert meter.steps == 0


def test_function_that_asks():
    meter = Meter()
    pure, state = jhop.functionalize(lambda w: gradient(meter)(w) if meter.steps < 1 else w)
    assert steps(pure, state, 2)[0][1].tolist() == (0.5 * W).tolist()
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        jax.jit(pure)(state, W)
    assert any("what is in its state has no value" in note for note in caught.value.__notes__)


def test_state_that_has_changed_since():
    meter = Meter()
    hooks = [meter.hook]

    def loss(w):
        for hook in hooks:
            w = jhop.hook(w, hook)
        return (w**2).sum()

    pure, state = jhop.functionalize(jax.grad(loss))
    hooks.append(Meter().hook)
    with pytest.raises(jhop.JhopError, match=r"has changed since: it is also at .*Call functionalize again"):
        pure(state, W)
    del hooks[1]
    assert pure(state, W)[1]
    meter.sums = {"ct": jnp.zeros(3), "calls": 0}
    with pytest.raises(jhop.JhopError, match=r"has changed since: it is no longer at"):
        pure(state, W)


def test_setting_that_is_written_after_all():
    """By code that no walk could read."""
    meter = Meter()
    store = object.__setattr__.__get__(meter)

    def hook(ct):
        store("decay", meter.decay + 1)
        return ct

    pure, state = jhop.functionalize(jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum()))
    with pytest.raises(jhop.Unsupported, match=r"at `.*decay` it .* took for a setting"):
        pure(state, W)
    assert meter.decay == 0.75


def test_keys_and_arrays_of_other_dtypes():
    """Keys of either kind, and bools; under `jhop.jit` they cost no second trace."""
    box = types.SimpleNamespace(key=jax.random.key(0), old=jax.random.PRNGKey(1), flag=jnp.bool_(False))

    def hook(ct):
        box.key, key = jax.random.split(box.key)
        box.old, other = jax.random.split(box.old)
        box.flag = ~box.flag
        noise = jax.random.normal(key, ct.shape) + jax.random.normal(other, ct.shape)
        return jnp.where(box.flag, ct + noise, ct * 2)

    fn = jax.grad(lambda w: (jhop.hook(w, hook) ** 2).sum())
    pure, state0 = jhop.functionalize(fn)
    found = [steps(pure, state0, 3), scanned(pure, state0, 3)]
    step = jhop.jit(fn, fullgraph=True)
    expected = jnp.stack([step(W * (1 - 0.5 * i)) for i in range(3)])
    assert step.versions() == 1
    for outs, state in found:
        np.testing.assert_allclose(outs, expected, rtol=1e-5)
        for path, left in jhop.functionalize(fn)[1].items():
            assert state[path].dtype == left.dtype
            assert bool(jnp.all(state[path] == left)), path


def test_what_reaches_too_much_is_warned_of(monkeypatch):
    monkeypatch.setattr(_walk, "MAX_CONTAINERS", 3)
    boxes = [types.SimpleNamespace(n=i) for i in range(9)]

    def hook(ct):
        boxes[0].n += 1
        return ct * boxes[-1].n

    with pytest.warns(UserWarning, match=r"jhop\.functionalize: .* can reach more than") as caught:
        jhop.functionalize(jax.grad(lambda x: jhop.hook(x, hook) ** 2))
    assert caught[0].filename == __file__
