"""State that is replaced as a whole, as by optimizers written as functions: one trace serves, and nothing is stale."""

import collections
import copy
import dataclasses
import functools
import threading
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_state_control_flow import JAX, PYTHON

import jhop

X = jnp.array([1.0, 2.0, 3.0], jnp.float32)
SHIFT = (2, jnp.ones(3))
Box = types.SimpleNamespace


class Adam(typing.NamedTuple):
    count: object
    mean: object
    square: object


class Empty(typing.NamedTuple):
    pass


@dataclasses.dataclass
class Record:
    sum: object
    n: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    sum: object
    n: int = 0


@dataclasses.dataclass(slots=True)
class Slotted:
    sum: object
    n: int = 0


def plain(value):
    """What is in some state, with types."""
    if isinstance(value, (jax.Array, np.ndarray)):
        kind = "jax" if isinstance(value, jax.Array) else "numpy"
        return [kind, str(value.dtype), np.asarray(value).tolist()]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, Box) or dataclasses.is_dataclass(value):
        names = [*vars(value)] if hasattr(value, "__dict__") else [field.name for field in dataclasses.fields(value)]
        return [type(value).__name__, {name: plain(getattr(value, name)) for name in names}]
    return [type(value).__name__, value if isinstance(value, (int, float, str, type(None))) else ...]


def alike(found, expected):
    """Whether two things that `plain` gave are the same, floats but for rounding."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, dict):
        return [*found] == [*expected] and all(alike(found[key], expected[key]) for key in found)
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    return found == (pytest.approx(expected, rel=1e-5) if type(found) is float else expected)


def loss(x, hook):
    return (jhop.hook(x * 1.5, hook) ** 2).sum()


def by_hand(x, hook):
    """The gradient, with the hook called as the Python function that it is."""
    ct = 2 * (x * 1.5)
    new = hook(ct)
    return 1.5 * (ct if new is None else new)


def history(run, box, hook, between, steps):
    found = []
    for i in range(steps):
        between(box, i)
        found.append([plain(run(X * (i + 1), hook)), plain(box)])
    return found


def agrees(make, *, between=lambda box, i: None, steps=6):
    """Compares with Python over some steps; returns how many graphs there were."""
    expected = history(by_hand, *make(), between, steps)
    box, hook = make()
    step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    found = history(lambda x, hook: step(x), box, hook, between, steps)
    assert alike(found, expected), (found, expected)
    return step.versions()


# One trace


def update_adam(box, ct):
    adam, _ = box.state
    mean = {key: 0.9 * value + 0.1 * ct for key, value in adam.mean.items()}
    square = jax.tree.map(lambda value: 0.99 * value + 0.01 * ct**2, adam.square)
    box.state = (Adam(adam.count + 1, mean, square), Empty())
    return mean["w"] / (jnp.sqrt(square["w"]) + 1e-3)


def map_tree(box, ct):
    box.state = jax.tree.map(lambda value: value + ct, box.state)
    return ct * box.state["a"][0]


def update_record(box, ct):
    box.state = dataclasses.replace(box.state, sum=box.state.sum + ct, n=box.state.n + 1)
    return ct * box.state.n + box.state.sum


def make_record(box, ct):
    box.state = Slotted(box.state.sum + ct, box.state.n + 1)
    return ct * box.state.n + box.state.sum


def make_tuple(box, ct):
    total, n, name = box.state
    box.state = (total + ct, n + 1, name)
    return ct * n + total


def make_nested(box, ct):
    box.state = {"x": {"n": box.state["x"]["n"] + 1}, "t": (box.state["t"][0] + 1, box.state["t"][1] * 2)}
    box.pairs = [(i + 1, value + ct) for i, value in box.pairs]
    return ct * box.state["x"]["n"] + box.pairs[1][1]


def pairs():
    return [(1, jnp.ones(3)), (2, jnp.zeros(3))]


ONE_TRACE = {
    "adam": (update_adam, lambda: Box(state=(Adam(0, {"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}), Empty()))),
    "tree.map": (map_tree, lambda: Box(state={"a": (jnp.ones(3), jnp.zeros(3)), "b": [jnp.ones(3)]})),
    "tuple": (make_tuple, lambda: Box(state=(jnp.zeros(3), 1, "a"))),
    "tuple of numbers": (
        lambda box, ct: setattr(box, "state", (box.state[0] + 1, box.state[1] * 0.5)) or ct * box.state[1],
        lambda: Box(state=(1, 2.0)),
    ),
    "dict, tuples in it, list of tuples": (
        make_nested,
        lambda: Box(state={"x": {"n": 1}, "t": (1, 2.0)}, pairs=pairs()),
    ),
    "dataclass": (update_record, lambda: Box(state=Record(jnp.zeros(3)))),
    "frozen dataclass": (update_record, lambda: Box(state=Frozen(jnp.zeros(3)))),
    "slotted dataclass": (make_record, lambda: Box(state=Slotted(jnp.zeros(3)))),
    "namespace": (
        lambda box, ct: setattr(box, "state", Box(n=box.state.n + 1)) or ct * box.state.n,
        lambda: Box(state=Box(n=2)),
    ),
}


@pytest.mark.parametrize("name", ONE_TRACE)
def test_state_that_hooks_replace_costs_one_trace(name):
    hook, make_box = ONE_TRACE[name]

    def make():
        box = make_box()
        return box, functools.partial(hook, box)

    assert agrees(make) == 1


def test_tuple_of_a_function_around():
    def make():
        box, state = Box(n=0), (0, jnp.zeros(3))

        def hook(ct):
            nonlocal state
            state = (state[0] + 1, state[1] + ct)
            box.n = state[0]
            return ct * state[0] + state[1]

        return box, hook

    assert agrees(make) == 1


def test_tuples_among_arguments():
    def make():
        def hook(scale, ct, shift=SHIFT):
            return ct * scale[0] * shift[0] + shift[1]

        return Box(), functools.partial(hook, (3.0, jnp.zeros(2)))

    assert agrees(make) == 1


def test_numpy_array_in_a_tuple():
    def make():
        box = Box(state=(np.arange(3, dtype=np.float32), 2))
        return box, lambda ct: ct * box.state[1] + box.state[0]

    def between(box, i):
        if i == 2:
            box.state = (np.arange(3, dtype=np.float32) * 3, 4)
        elif i == 4:
            box.state[0][1] = 100

    assert agrees(make, between=between) == 1


def test_log_of_tuples_that_is_only_appended_to():
    def make():
        box = Box(log=[], n=0)

        def hook(ct):
            box.log.append((box.n, ct))
            box.n += 1

        return box, hook

    assert agrees(make) == 1


# Changes are seen


def test_host_puts_other_things_there():
    def make():
        box = Box(state=(jnp.zeros(3), 1, "a"))

        def hook(ct):
            if box.state is None:
                return ct * 7
            return ct * box.state[1] + box.state[0] * (2 if box.state[2] == "a" else 3)

        return box, hook

    def between(box, i):
        new = {2: (jnp.ones(3), 5, "b"), 3: (jnp.ones(3), 5, "a"), 4: (jnp.ones(1), 5.5, "a"), 5: None}
        box.state = new.get(i, box.state)

    assert agrees(make, between=between) <= 4


@pytest.mark.parametrize("grow", ["list", "dict"])
def test_more_entries_are_seen(grow):
    def make():
        box = Box(state=[] if grow == "list" else {})

        def hook(ct):
            if grow == "list":
                box.state = [*box.state, len(box.state)]
            else:
                box.state = {**box.state, len(box.state): 1.5}
            return ct * len(box.state)

        return box, hook

    agrees(make)


def test_function_in_a_dict_that_is_replaced():
    def make():
        box = Box(state={"n": 1, "fn": lambda value: value * 2})

        def hook(ct):
            box.state = {**box.state, "n": box.state["n"] + 1}
            return box.state["fn"](ct) * box.state["n"]

        return box, hook

    def between(box, i):
        if i == 3:
            box.state = {"n": 1, "fn": lambda value: value * 5}

    assert agrees(make, between=between) == 2


def test_one_object_comes_to_be_in_two_places():
    def make():
        box = Box(a={"n": 1}, b={"n": 2})

        def hook(ct):
            box.a["n"] += 1
            box.b["n"] += 10
            return ct * box.a["n"]

        return box, hook

    def between(box, i):
        if i == 2:
            box.b = box.a
        elif i == 4:
            box.a = {"n": 7}

    agrees(make, between=between)


def test_whether_two_places_hold_one_object():
    def make():
        box = Box(a={"n": 1}, b={"n": 2})

        def hook(ct):
            same = box.a is box.b
            box.a = {"n": box.a["n"] + 1}
            return ct * (3 if same else 2)

        return box, hook

    def between(box, i):
        if i == 3:
            box.a = box.b

    agrees(make, between=between)


def test_identity_that_is_asked_for():
    def make():
        box = Box(state={"n": 2}, first=0)
        box.first = id(box.state)
        return box, lambda ct: ct * (3 if id(box.state) == box.first else 5) * box.state["n"]

    def between(box, i):
        if i == 3:
            box.state = {"n": 2}
        box.first = id(box.state) if i < 3 else box.first

    box, hook = make()
    step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    kept, found = [], []
    for i in range(5):
        kept.append(box.state)  # so that the new one is another
        between(box, i)
        found.append(step(X).tolist()[0])
    assert found == [27.0] * 3 + [45.0] * 2


class Other(typing.NamedTuple):
    count: object
    mean: object
    square: object


@dataclasses.dataclass
class OtherRecord:
    sum: object
    n: int = 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2.0, 3.0), [2.0, 3.0]),
        ((2.0, 3.0), (2.0, 3.0, 4.0)),
        ((2.0, 3.0, 4.0), (2.0, 3.0)),
        (Adam(1.0, 2.0, 3.0), Other(1.0, 2.0, 3.0)),
        (Adam(1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),
        ({"a": 1.0}, collections.OrderedDict(a=1.0)),
        ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}),
        (Record(1.0, 2), OtherRecord(1.0, 2)),
        ((2.0, (3.0, jnp.ones(3))), (2.0, [3.0, jnp.ones(3)])),
        ((2.0, None, jnp.ones(3)), (2.0, "a", jnp.ones(3))),
        ((2.0, True), (2.0, False)),
    ],
)
def test_another_kind_of_thing_is_seen(first, second):
    def look(value):
        """A number for what something is and what is in it."""
        if isinstance(value, Record | OtherRecord):
            return (7.0 if isinstance(value, Record) else 9.0) + value.sum
        if isinstance(value, dict):
            return (2.0 if type(value) is dict else 4.0) + value[next(iter(value))] + len(value)
        if isinstance(value, list | tuple):
            kind = {list: 1.5, tuple: 2.5, Adam: 3.5}.get(type(value), 4.5)
            return kind + sum(look(item) * (i + 1) for i, item in enumerate(value))
        return {None: 0.5, "a": 0.75, True: 3.0, False: 6.0}[value] if isinstance(value, str | bool | None) else value

    def make():
        box = Box(state=copy.deepcopy(first), never=False)

        def hook(ct):
            if box.never:
                box.state = None  # which the code says, so that the state counts as something that changes
            return ct * look(box.state)

        return box, hook

    def between(box, i):
        if i == 2:
            box.state = copy.deepcopy(second)

    agrees(make, between=between, steps=4)


def test_nothing_in_the_place_of_an_object_with_slots():
    """What reads it is written when something else is there already."""

    def make():
        box = Box(state=Slotted(X, 1), n=0)

        def hook(ct):
            box.n += 1
            box.state = Slotted(ct, box.n) if box.state is None else None
            return ct * (box.n if box.state is None else box.state.n * 5)

        return box, hook

    agrees(make, between=lambda box, i: None, steps=5)


# What hooks do with objects that they replace


def swap(box, ct):
    box.a, box.b = box.b, box.a
    box.a["n"] += 1
    return ct * box.a["n"]


def keep_old(box, ct):
    box.b = box.a
    box.a = {"n": box.a["n"] + 1}
    return ct * box.a["n"] + box.b["n"]


def write_then_replace(box, ct):
    old = box.a
    old["n"] += 1
    box.a = dict(old)
    box.a["n"] *= 2
    return ct * box.a["n"]


def keep_in_function(box, ct):
    box.b = functools.partial(box.a.get, "n")
    box.a = {"n": 5}
    return ct * 2


@pytest.mark.parametrize("hook", [swap, keep_old, write_then_replace])
def test_old_objects_stay_what_they_are(hook):
    def make():
        box = Box(a={"n": 1}, b={"n": 4})
        return box, functools.partial(hook, box)

    agrees(make)


def test_old_tuple_is_kept():
    def make():
        box = Box(state=(1, jnp.ones(3)), before=None)

        def hook(ct):
            box.before = box.state
            box.state = (box.state[0] + 1, box.state[1] + ct)
            return ct * box.state[0]

        return box, hook

    assert agrees(make) == 2  # there is nothing before the first step


def test_error_leaves_the_objects_that_were_there():
    box = Box(pair=(jnp.zeros(3), 1), table={"n": 1})

    def hook(ct):
        box.pair = (box.pair[0] + ct, box.pair[1] + 1)
        box.table = {"n": box.table["n"] + 1}
        if box.table["n"] > 3:
            raise ValueError("too many")
        return ct * box.pair[1]

    step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    step(X), step(X)
    pair, table = box.pair, box.table
    with pytest.raises(jhop.Unsupported, match="too many"):
        step(X)
    assert box.pair is pair and box.table is table and table == {"n": 3}


# Elsewhere


def repeated(x, hook):
    return lax.scan(lambda c, t: (jhop.hook(jnp.sin(c * t), hook), None), x, jnp.array([1.0, 2.0, 3.0]))[0].sum()


def unrolled(x, hook):
    for t in (1.0, 2.0, 3.0):
        x = jhop.hook(jnp.sin(x * t), hook)
    return x.sum()


def inner(x, hook):
    return jax.jit(lambda x: jnp.sin(jhop.hook(jnp.sin(x), hook)))(x).sum()


def recomputed(x, hook):
    return jax.checkpoint(lambda x: jnp.sin(jhop.hook(jnp.sin(x), hook)))(x).sum()


def once(x, hook):
    return jnp.sin(jhop.hook(jnp.sin(x), hook)).sum()


@pytest.mark.parametrize(("program", "like"), [(repeated, unrolled), (inner, once), (recomputed, once)])
def test_in_inner_functions(program, like):
    def run(program):
        box, found = Box(state=(jnp.zeros(3), 1, {"k": 2.0})), []

        def hook(ct):
            total, n, table = box.state
            box.state = (total + ct, n + 1, {"k": table["k"] * 0.5})
            return ct * n + total * table["k"]

        step = jhop.jit(jax.grad(lambda x: program(x, hook)), fullgraph=True)
        for i in range(4):
            found.append([plain(step(X * (i + 1))), plain(box)])
        assert step.versions() == 1
        return found

    assert alike(run(program), run(like))


def branch(flow, hook, x):
    return flow.cond(x[0] > 0, lambda x: hook(jnp.sin(x)), jnp.cos, x)


def branches_in_a_loop(flow, hook, x):
    scanned, _ = flow.scan(lambda c, t: (branch(flow, hook, c * t), None), x, jnp.array([1.0, -2.0, 3.0]))
    return branch(flow, hook, scanned).sum()


def long_loop(flow, hook, x):
    return flow.scan(lambda c, t: (hook(jnp.sin(c) * t), None), x, jnp.linspace(0.9, 1.1, 70))[0].sum()


@pytest.mark.parametrize("program", [branches_in_a_loop, long_loop])
def test_tuples_in_branches_and_long_loops(program):
    def run(flow, compiled):
        box, found = Box(state=(jnp.zeros(3), 1, (2.0, "a"))), []

        def hook(ct):
            total, n, (rate, _) = box.state
            box.state = (total + ct, n + 1, (rate * 0.5, "b"))
            return ct * (1 + 0.001 * n) + total * rate

        step = compiled(jax.grad(lambda x: program(flow, lambda v: jhop.hook(v, hook), x)))
        for x in (X, -X, 0.3 * X):
            found.append([plain(step(x)), plain(box)])
        return found

    assert alike(run(JAX, functools.partial(jhop.jit, fullgraph=True)), run(PYTHON, lambda step: step))


def test_hook_inside_a_hook_reads_a_tuple():
    def make():
        box = Box(state=(jnp.ones(3) * 2, {"m": jnp.ones(3)}))

        def hook(ct):
            def inner(ct):
                return ct * box.state[0] + box.state[1]["m"]

            out = jax.grad(lambda v: (jhop.hook(v * 2, inner) ** 2).sum())(ct)
            box.state = (box.state[0] + 1, {"m": box.state[1]["m"] * 2})
            return out

        return box, hook

    assert agrees(make) == 1


def test_threads_with_tuples_of_their_own():
    boxes = [Box(state=(jnp.zeros(3), 0)) for _ in range(8)]

    def work(box):
        def hook(ct):
            box.state = (box.state[0] + ct, box.state[1] + 1)
            return ct * box.state[1]

        step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
        for _ in range(10):
            step(X)

    threads = [threading.Thread(target=work, args=(box,)) for box in boxes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alike([plain(box) for box in boxes], [plain(Box(state=(30.0 * X, 10)))] * 8)


@pytest.mark.parametrize("kind", [tuple, dict, Frozen])
def test_functionalize_names_what_is_inside(kind):
    pair = {"sum": jnp.zeros(3), "n": 1}
    box = Box(state={tuple: (*pair.values(),), dict: pair, Frozen: Frozen(**pair)}[kind])

    def hook(ct):
        if kind is tuple:
            box.state = (box.state[0] + ct, box.state[1] + 1)
        elif kind is dict:
            box.state = {"sum": box.state["sum"] + ct, "n": box.state["n"] + 1}
        else:
            box.state = dataclasses.replace(box.state, sum=box.state.sum + ct, n=box.state.n + 1)
        return ct * 2

    before = plain(box)
    pure, state = jhop.functionalize(jax.grad(lambda x: loss(x, hook)))
    names = [name for name in state if ".state" in name]
    assert alike([plain(state[name]) for name in names], [plain(jnp.zeros(3)), plain(1)])
    for _ in range(2):
        grad, state = pure(state, X)
    assert alike(plain(grad), plain(9 * X)) and plain(box) == before
    assert alike([plain(state[name]) for name in names], [plain(6 * X), plain(3)])
    state, _ = lax.scan(lambda state, x: pure(state, x)[::-1], state, jnp.stack([X, X]))
    assert [np.asarray(state[name]).tolist() for name in names] == [(12 * X).tolist(), 5]
