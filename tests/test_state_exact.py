"""State that is easily taken for other state: hidden slots, one NaN in two places, NumPy arrays in what is replaced."""

import dataclasses
import math
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_state import cases, gradient, same_as_eager

import jhop

X = jnp.array([1.0, 2.0, 3.0], jnp.float32)


# Slots of one name in several classes.


class Base:
    __slots__ = ("n",)

    def __init__(self, n):
        Base.n.__set__(self, n)

    def count(self):
        Base.n.__set__(self, Base.n.__get__(self) + 1)
        return Base.n.__get__(self)


class Sub(Base):
    __slots__ = ("n",)

    def __init__(self, outer, inner):
        super().__init__(inner)
        self.n = outer

    def both(self):
        return [self.n, Base.n.__get__(self)]


def hidden_slot():
    box = Sub(10, 100)

    def hook(ct):
        box.n += 2
        return ct * box.count() + box.n

    return hook, box.both


def slots_told_apart():
    box = Sub(10, 100)

    def hook(ct):
        return ct * Base.n.__get__(box) + box.n

    def between(i):
        Base.n.__set__(box, 7 + i)

    return hook, box.both, between


class Doubled(Base):
    """A property in front of the slot that it is kept in."""

    __slots__ = ()
    asked = 0

    @property
    def n(self):
        Doubled.asked += 1
        return 2 * Base.n.__get__(self)

    @n.setter
    def n(self, value):
        Base.n.__set__(self, value - 1)


def property_over_a_slot():
    box = Doubled(3)

    def hook(ct):
        box.n += 1
        return ct * box.n

    return hook, lambda: Base.n.__get__(box)


def hidden_slot_of_a_new_object():
    holder = [Sub(1, 2)]

    def hook(ct):
        old = holder[0]
        new = Sub(old.n + 1, Base.n.__get__(old) + 10)
        holder[0] = new
        return ct * new.n + Base.n.__get__(new)

    return hook, lambda: holder[0].both()


@cases(hidden_slot, slots_told_apart, property_over_a_slot, hidden_slot_of_a_new_object)
def test_slot_of_one_name_in_two_classes(case):
    same_as_eager(case)


def test_no_property_runs_when_a_slot_is_read():
    box = Doubled(3)
    step = jhop.jit(gradient(lambda ct: ct * Base.n.__get__(box)), fullgraph=True)
    Doubled.asked = 0
    for n in range(3):
        Base.n.__set__(box, n)
        np.testing.assert_allclose(step(X), 2 * n * X)
    assert Doubled.asked == 0


def test_hidden_slot_has_an_entry_of_its_own():
    box = Sub(10, 100)

    def hook(ct):
        box.n += 2
        return ct * box.count() + box.n

    pure, state = jhop.functionalize(gradient(hook))
    assert sorted(state.values()) == [10, 100]
    out, state = pure(state, X)
    assert sorted(state.values()) == [12, 101]
    np.testing.assert_allclose(out, 2 * X * 101 + 12)


# NumPy arrays in what a hook replaces.


class Pair(typing.NamedTuple):
    mean: object
    count: object


@dataclasses.dataclass
class Means:
    mean: object
    count: object


@dataclasses.dataclass(slots=True)
class SlottedMeans:
    mean: object
    count: object


MAKES = {  # and how to read it
    "tuple": (lambda mean, count: (mean, count), lambda state: state),
    "named tuple": (Pair, lambda state: state),
    "tuple in a tuple": (lambda mean, count: (("m", mean), count), lambda state: (state[0][1], state[1])),
    "list": (lambda mean, count: [mean, count], lambda state: (state[0], state[1])),
    "dict": (lambda mean, count: {"m": mean, "n": count}, lambda state: (state["m"], state["n"])),
    "dict in a tuple": (lambda mean, count: ({"m": mean}, count), lambda state: (state[0]["m"], state[1])),
    "dataclass": (Means, lambda state: (state.mean, state.count)),
    "dataclass with slots": (SlottedMeans, lambda state: (state.mean, state.count)),
    "tuple in a dict": (lambda mean, count: {"all": (mean, count)}, lambda state: state["all"]),
}


@pytest.mark.parametrize(("make", "read"), MAKES.values(), ids=MAKES)
def test_numpy_array_in_what_is_replaced_stays_one(make, read):
    box = types.SimpleNamespace(state=make(np.arange(3, dtype=np.float32), 0))

    def hook(ct):
        mean, count = read(box.state)
        box.state = make(mean * np.float32(0.5) + np.float32(1), count + 1)
        return ct * mean

    step = jhop.jit(gradient(hook), fullgraph=True)
    mean = np.arange(3, dtype=np.float32)
    for i in range(4):
        np.testing.assert_allclose(step(X), 2 * X * mean)
        mean = mean * np.float32(0.5) + np.float32(1)
        found, count = read(box.state)
        assert (type(found), found.dtype, count) == (np.ndarray, np.float32, i + 1)
        np.testing.assert_allclose(found, mean)
    assert step.versions() == 1


def test_what_was_no_numpy_array_becomes_none():
    box = types.SimpleNamespace(state=(jnp.ones(3), np.ones(3, np.float32)))

    def hook(ct):
        box.state = (box.state[0] + ct, box.state[1] + np.float32(1))

    step = jhop.jit(gradient(hook), fullgraph=True)
    for _ in range(3):
        step(X)
        assert isinstance(box.state[0], jax.Array)
        assert type(box.state[1]) is np.ndarray
    assert step.versions() == 1


def test_one_new_object_in_two_places_stays_one():
    """A NumPy array in a tuple that is in two places could not be read again: there it is JAX's."""
    box = types.SimpleNamespace(state=(np.zeros(3, np.float32), 1), copy=None, all=[np.zeros(3, np.float32)], more=None)

    def hook(ct):
        box.state = box.copy = (box.state[0] + np.float32(1), 1)
        box.all = box.more = [box.all[0] + np.float32(2)]

    step = jhop.jit(gradient(hook), fullgraph=True)
    for i in range(3):
        step(X)
        assert box.state is box.copy
        assert box.all is box.more
        np.testing.assert_allclose([box.state[0][0], box.all[0][0]], [i + 1, 2 * i + 2])
        assert type(box.all[0]) is np.ndarray


def test_wide_numpy_array_in_a_tuple_is_refused():
    box = types.SimpleNamespace(state=(np.zeros(3), 1))

    def hook(ct):
        box.state = (box.state[0] + 1, 1)

    with pytest.raises(jhop.Unsupported, match=r"writes `.*state\[0\]`, a NumPy array of dtype float64"):
        jhop.jit(gradient(hook), fullgraph=True)(X)
    assert type(box.state[0]) is np.ndarray


# NaN equals nothing, but a list looks first whether it is one object.


def one_nan(ask):
    def case():
        nan = float("nan")
        box = types.SimpleNamespace(a=nan, b=nan, c=1.0)

        def hook(ct):
            return ct * (10.0 if ask(box) else 1.0)

        changes = [
            lambda: vars(box).update(a=float("nan")),
            lambda: vars(box).update(b=box.a),
            lambda: vars(box).update(a=1.0, b=2.0),
            lambda: vars(box).update(a=2.0),
            lambda: vars(box).update(a=nan, b=nan),
            lambda: vars(box).update(c=nan),
            lambda: vars(box).update(a=float("nan"), b=float("nan")),
        ]
        return hook, lambda: (box, box.a is box.b), lambda i: changes[i - 1]()

    return case


ASKS = {
    "in a list": lambda box: box.a in [box.c, box.b],
    "lists": lambda box: [box.a] == [box.b],
    "lists that differ": lambda box: (box.a, 1) != (box.b, 1),
    "index": lambda box: [box.c, box.b, box.a].index(box.a) == 1,
    "operator": lambda box: box.a == box.b,
    "with types": lambda box: type(box.a) is float and [box.a] == [box.b],
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_one_nan_in_two_places(ask):
    same_as_eager(one_nan(ask), 8)


def test_nan_that_was_computed_and_put_in_two_places():
    def case():
        box = types.SimpleNamespace(a=1e308, b=0.0)

        def hook(ct):
            same = [box.a] == [box.b]
            box.a = box.a * 10.0 - box.a * 10.0
            box.b = box.a
            return ct * (10.0 if same else 1.0)

        return hook, lambda: (box, box.a is box.b)

    same_as_eager(case)


def test_nan_that_is_asked_for_is_refused_where_two_answers_are_possible():
    box = types.SimpleNamespace(a=1.0)

    def hook(ct):
        return ct * (10.0 if box.a in (math.nan, 5.0) else 1.0)

    step = jhop.jit(gradient(hook), fullgraph=True)
    for value, factor in [(1.0, 2), (5.0, 20), (float("nan"), 2), (1.0, 2)]:
        box.a = value
        np.testing.assert_allclose(step(X), factor * X)
    box.a = math.nan
    with pytest.raises(jhop.Unsupported, match=r"hook `hook` .* compares a NaN with itself(.|\n)*math.isnan"):
        step(X)
