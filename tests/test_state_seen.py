"""What hooks can tell apart, compared with Python: keys and what they lead to, order, classes, copies, weak types."""

import collections
import copy
import dataclasses
import enum
import functools
import gc
import pickle
import types
import warnings
import weakref

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from test_state_records import agrees, by_hand, loss

import jhop

X = jnp.array([1.0, 2.0, 3.0], jnp.float32)
Box = types.SimpleNamespace


class Letter(enum.StrEnum):
    A = "a"


class Word(str):
    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Label:
    name: str
    weight: object = dataclasses.field(compare=False, default=2)


@dataclasses.dataclass(eq=False)
class Key:
    n: object


@dataclasses.dataclass
class Record:
    n: object
    sum: object = 2.0


# Keys


def weigh(key):
    """Tells keys apart that are equal."""
    if isinstance(key, tuple):
        return weigh(key[0]) + 1
    if isinstance(key, Label):
        return key.weight
    if isinstance(key, (float, complex)):
        return 5 if str(key)[0] == "-" else 7
    return {bool: 11, int: 13, str: 17, Word: 19, Letter: 23}[key.__class__]


EQUAL = [
    (True, 1), (1, 1.0), (1, True), (0.0, -0.0), ("a", Letter.A), (Word("a"), "a"), ((True, 2), (1, 2)),
    (Label("a", 3), Label("a", 4)), (((1,), "x"), ((1.0,), "x")),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), EQUAL, ids=str)
@pytest.mark.parametrize("kind", ["dict", "another dict", "set"])
def test_equal_keys_that_hooks_can_tell_apart(kind, before, after):
    def make():
        box = Box(n=1, table={before} if kind == "set" else {before: 1.5})

        def hook(ct):
            box.n += 1
            for key in box.table:
                ct = ct * weigh(key)
            return ct * box.n

        return box, hook

    def between(box, i):
        if i == 2 and kind == "another dict":
            box.table = {after: 1.5}
        elif i == 2:
            box.table.clear()
            box.table |= {after} if kind == "set" else {after: 1.5}

    def told(box):
        return [weigh(key) for key in box.table]

    boxes = []
    results = []
    for compiled in (False, True):
        box, hook = make()
        boxes.append(box)
        step = jhop.jit(jax.grad(lambda x, hook=hook: loss(x, hook)), fullgraph=True)
        results.append([])
        for i in range(4):
            between(box, i)
            found = step(X) if compiled else by_hand(X, hook)
            results[-1].append([np.asarray(found).tolist(), box.n, told(box)])
    assert results[1] == results[0]
    assert step.versions() == 2


def test_what_keys_lead_to_is_state():
    def make():
        key = Key(1)
        box = Box(table={key: 2, ("pair", Key(10)): 3}, n=0)

        def hook(ct):
            for each in box.table:
                each = each[1] if isinstance(each, tuple) else each
                each.n += 1
                ct = ct * each.n
            box.n = key.n
            return ct * box.table[key]

        box.key = key
        return box, hook

    def between(box, i):
        if i == 3:
            box.key.n = 20.5

    def run(step, box, hook):
        found = []
        for i in range(5):
            between(box, i)
            found.append([np.asarray(step(X, hook)).tolist(), box.n, [key[1].n for key in box.table if key != box.key]])
        return found

    box, hook = make()
    fn = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    compiled = run(lambda x, _: fn(x), box, hook)
    assert compiled == run(by_hand, *make())
    assert fn.versions() == 3  # `box.n` becomes a float too


# Order


def first_attribute(box, ct):
    return ct * list(vars(box.at).values())[0]


def move_attribute(box, ct):
    first, value = next(iter(vars(box.at).items()))
    delattr(box.at, first)
    setattr(box.at, first, value + 1)
    return ct * value


def test_order_of_attributes_that_the_host_changes():
    def make():
        box = Box(at=Record(3, 5))
        return box, functools.partial(first_attribute, box)

    def between(box, i):
        if i == 2:
            del box.at.n
            box.at.n = 3
        elif i == 4:
            box.at.sum = 7

    assert agrees(make, between=between) == 2


def test_order_of_attributes_that_a_hook_changes():
    def make():
        box = Box(at=Record(3, 50))
        return box, functools.partial(move_attribute, box)

    assert agrees(make) == 2


def test_list_that_is_in_itself():
    def make():
        items = [1, 2.0]
        items.append(items)
        box = Box(n=0)

        def hook(ct):
            items[2][2][0] += 1
            box.n = items[0]
            return ct * items[2][0]

        return box, hook

    assert agrees(make) == 1


# Copies


COPIES = {
    "number": lambda state: copy.deepcopy(state["n"]),
    "shallow": lambda state: copy.copy(state["n"]) * 2,
    "array": lambda state: copy.deepcopy(state["sum"]).sum(),
    "array in a list": lambda state: copy.deepcopy([state["sum"]])[0].sum(),
    "state": lambda state: copy.deepcopy(state)["n"],
    "dataclass": lambda state: dataclasses.asdict(Record(state["n"], state["sum"]))["n"],
    "tuple": lambda state: dataclasses.astuple(Record(state["n"], state["sum"]))[0],
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_state(name):
    def make():
        box = Box(state={"n": 1, "sum": jnp.ones(3)}, copy=0)

        def hook(ct):
            box.state["n"] += 1
            box.state["sum"] = box.state["sum"] + ct
            box.copy = COPIES[name](box.state)
            return ct * box.copy

        return box, hook

    assert agrees(make) <= 2  # the copy is an int at first


def test_pickled_numbers_are_what_they_stand_for():
    def make():
        box = Box(n=1)

        def hook(ct):
            box.n = box.n % 2 + 1
            return ct * len(pickle.dumps(["n"] * box.n)) * pickle.loads(pickle.dumps(box.n))

        return box, hook

    assert agrees(make) == 2


# Numbers are leaves


def test_numbers_in_a_pytree_stay_numbers():
    def make():
        box = Box(state={"list": [1, 2.5], "n": 2**40, "sum": jnp.zeros(3)})

        def hook(ct):
            box.state = jax.tree.map(lambda value: value + 1, box.state)
            total = jax.tree.reduce(lambda one, other: one + other, box.state["list"])
            same = jax.tree.structure(box.state["n"]) == jax.tree.structure(0)
            return ct * total * (2 if same and jax.tree_util.all_leaves(box.state["list"]) else 3)

        return box, hook

    assert agrees(make) == 1


TRANSFORMS = {
    "jvp": lambda n, ct: ct * jax.jvp(lambda v: v * v, (n * 1.0,), (1.0,))[1],
    "linearize": lambda n, ct: ct * jax.linearize(lambda v: v * v, n * 1.0)[1](1.0),
    "scan": lambda n, ct: jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] * 2.0), None), (n, ct), None, length=3)[0][1] * n,
    "cond": lambda n, ct: jax.lax.cond(ct.sum() > 0, lambda k, c: c * k, lambda k, c: c - k, n, ct),
    "jit": lambda n, ct: jax.jit(lambda c, k: c * k["n"])(ct, {"n": n}),
    "vmap": lambda n, ct: jax.vmap(lambda c, k: c * k, in_axes=(0, None))(ct, n),
    "ravel": lambda n, ct: jax.flatten_util.ravel_pytree({"n": n * 1.0, "ct": ct})[0].sum() * ct,
    "ndim": lambda n, ct: ct * n * (2 + np.ndim(n) + len(np.shape(n)) + np.size(n)),
    "checkpoint": lambda n, ct: jax.checkpoint(lambda k, c: c * k)(n, ct),
    "device_put": lambda n, ct: jax.device_put({"n": n})["n"] * ct,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_among_what_jax_transforms(name):
    def make():
        box = Box(n=1)

        def hook(ct):
            box.n += 1
            return TRANSFORMS[name](box.n, ct)

        return box, hook

    assert agrees(make) == 1


# What is no state


class One:
    factor = 2


class Two:
    factor = 3


def change_class(box, ct):
    box.at.__class__ = Two if type(box.at) is One else One
    return ct * box.at.factor


def change_code(box, ct):
    box.helper.__code__ = (lambda v: v * 5).__code__
    return box.helper(ct)


def change_factory(box, ct):
    box.table.default_factory = float
    box.table["x"] += 1
    return ct * box.table["x"]


REPLACED = {
    "__class__": (change_class, lambda: Box(at=One())),
    "__code__": (change_code, lambda: Box(helper=lambda v: v * 7)),
    "default_factory": (change_factory, lambda: Box(table=collections.defaultdict(int))),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_hooks_replace_and_is_no_state_is_refused_or_done_on_the_host(name):
    hook, make = REPLACED[name]

    def told(box):
        values = [*vars(box).values()][0]
        return type(values), getattr(values, "__code__", None), getattr(values, "default_factory", None)

    box = make()
    before = told(box)
    step = jhop.jit(jax.grad(lambda x: loss(x, functools.partial(hook, box))), fullgraph=True)
    with pytest.raises(jhop.Unsupported, match=f"a hook replaces `{name}` of"):
        step(X)
    assert told(box) == before
    expected = make()
    box = make()
    step = jhop.jit(jax.grad(lambda x: loss(x, functools.partial(hook, box))))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            found = step(X)
            np.testing.assert_allclose(found, by_hand(X, functools.partial(hook, expected)))
            assert told(box)[::2] == told(expected)[::2]
    assert any("on the host" in str(warning.message) for warning in seen)


class Hidden:
    def __init__(self):
        self.n = 1

    @property
    def __dict__(self):
        return {"n": 100}


def test_attributes_that_a_property_hides_are_refused():
    hidden = Hidden()

    def hook(ct):
        hidden.n += 1
        return ct * hidden.n

    with pytest.raises(jhop.Unsupported, match="a Hidden: its class makes `__dict__` a property"):
        jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)(X)
    assert hidden.n == 1


class Liar:
    def __init__(self):
        self.n = 1

    @property
    def __class__(self):
        return int


def test_object_that_lies_about_its_class_costs_one_trace():
    def make():
        liar, box = Liar(), Box(n=0)

        def hook(ct):
            liar.n += 1
            box.n = liar.n
            return ct * liar.n * (2 if isinstance(liar, int) else 3)

        return box, hook

    assert agrees(make) == 1


def test_weak_types_of_state_are_told_apart():
    def make():
        box = Box(sum=jnp.float32(1), n=0)

        def hook(ct):
            box.n += 1
            box.sum = box.sum * jnp.bfloat16(2)
            return ct * box.sum.astype(ct.dtype)

        return box, hook

    def between(box, i):
        if i == 2:
            box.sum = jnp.asarray(3.0)

    with jax.numpy_dtype_promotion("standard"):
        assert agrees(make, between=between) == 3  # float32, weak float32, bfloat16


REPLACE = {
    "attribute": lambda value: value,
    "tuple": lambda value: (1, value),
    "dict": lambda value: {"x": value},
}


@pytest.mark.parametrize("name", REPLACE)
@pytest.mark.parametrize("array", [jnp.ones, np.ones])
def test_arrays_that_state_held_are_let_go_of(name, array):
    first = array(1000, dtype=np.float32)
    box, gone = Box(state=REPLACE[name](first)), weakref.ref(first)

    def hook(ct):
        box.state = jax.tree.map(lambda value: value + 1, box.state)
        return ct * jax.tree.leaves(box.state)[-1].sum()

    step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    step(X)
    del first
    gc.collect()
    assert gone() is None
    step(X)
    assert "float32[1000]" in str(jhop.explain(step))
    box.state = REPLACE[name](jnp.ones(10))
    step(X)
    assert "from numpy float32[1000] to" in str(jhop.explain(step)) or array is jnp.ones


# What weak references refer to


class Target:
    def __init__(self, k):
        self.k = k


@pytest.mark.parametrize("first", ["strong", "weak"])
def test_what_the_host_drops_is_gone_for_weak_references(first):
    def make():
        box = Box(a=None, b=None)
        target = Target(2.0)
        strong, weak = ("a", "b") if first == "strong" else ("b", "a")
        setattr(box, strong, target)
        setattr(box, weak, weakref.ref(target))

        def hook(ct):
            found = getattr(box, weak)()
            if found is None:
                return ct * 7
            found.k += 1
            return ct * found.k * (2 if found is getattr(box, strong) else 3)

        box.strong = strong
        return box, hook

    def run(step, box, hook):
        found = []
        for i in range(6):
            if i == 2:
                found[0].append(getattr(box, box.strong).k)
            if i == 3:
                setattr(box, box.strong, Target(5.0))
            found.append([np.asarray(step(X, hook)).tolist()])
        return found

    box, hook = make()
    fn = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    compiled = run(lambda x, _: fn(x), box, hook)
    assert compiled == run(by_hand, *make())
    assert fn.versions() == 2


def test_class_of_what_only_weak_references_refer_to():
    target = Target(2.0)
    box = Box(ref=weakref.ref(target))

    class Other(Target):
        k2 = 5

    def hook(ct):
        return ct * getattr(box.ref(), "k2", 3)

    step = jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)
    np.testing.assert_allclose(step(X), by_hand(X, hook))
    target.__class__ = Other
    np.testing.assert_allclose(step(X), by_hand(X, hook))


def test_what_a_hook_drops_is_refused_where_a_weak_reference_could_tell():
    box = Box(at=Target(2.0))
    box.ref = weakref.ref(box.at)

    def hook(ct):
        box.at = Target(box.at.k + 1)
        return ct * (7 if box.ref() is None else 5)

    target = box.at
    with pytest.raises(jhop.Unsupported, match="where a Target was, which hooks reach by a weak reference too"):
        jhop.jit(jax.grad(lambda x: loss(x, hook)), fullgraph=True)(X)
    assert box.at is target
