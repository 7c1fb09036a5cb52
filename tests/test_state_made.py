"""Objects that hooks make and store: each run makes others, which refer to what eager's refer to."""

import collections
import fractions
import functools
import gc
import math
import types
import weakref

import jax
import jax.numpy as jnp
import pytest

import jhop

X = jnp.array([1.0, 2.0], jnp.float32)
Box = types.SimpleNamespace


class Node:
    def __init__(self, name, parent=None):
        self.name = name
        self.parent = parent
        self.children = []


class Error(ValueError):
    """What keeps some of its own in C."""

    def __init__(self, about):
        super().__init__(about)
        self.about = about


def shape(value, seen=None):
    """What an object is, with what is in it, and which of that is one object."""
    seen = {} if seen is None else seen
    if isinstance(value, (str, int, float, type(None))):
        return value
    if id(value) in seen:
        return f"number {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(shape(item, seen) for item in value)]
    own = [value.args] if isinstance(value, BaseException) else []
    return [type(value).__name__, own, {name: shape(item, seen) for name, item in vars(value).items()}]


def history(hook, box, compiled, steps=4):
    def step(x):
        return jax.grad(lambda x: (jhop.hook(x, functools.partial(hook, box)) ** 2).sum())(x)

    step = jhop.jit(step, fullgraph=True) if compiled else step
    return [(step(X).tolist(), shape(box)) for _ in range(steps)]


def refers_to_what_was_there(box, ct):
    box.new = Node("child", box.root)
    return ct * 2.0


def is_referred_to_by_what_was_there(box, ct):
    box.root.children.append(Node("child", box.root))
    return ct * len(box.root.children)


def share_what_they_hold(box, ct):
    shared, names = Node("shared"), ["a"]
    box.new, box.other = Node("one", shared), Node("other", shared)
    box.new.children = box.other.children = names
    return ct * 2.0


def follows_the_one_before(box, ct):
    box.new = Node("next", box.new)
    depth, node = 0, box.new
    while node is not None:
        depth, node = depth + 1, node.parent
    return ct * depth


def holds_itself_and_what_was_there(box, ct):
    box.new = Node("loop", box.root)
    box.new.children.append(box.new)
    return ct * 2.0


def holds_a_number_and_what_was_there(box, ct):
    box.n += 1
    box.new = Node(box.n, box.root)
    return ct * box.n


def keeps_some_of_its_own_in_c(box, ct):
    box.new = Error("odd")
    box.new.parent = box.root
    return ct * 2.0


MADE = [
    refers_to_what_was_there, is_referred_to_by_what_was_there, share_what_they_hold, follows_the_one_before,
    holds_itself_and_what_was_there, holds_a_number_and_what_was_there, keeps_some_of_its_own_in_c,
]  # fmt: skip


@pytest.mark.parametrize("hook", MADE)
def test_new_object_refers_to_what_it_does_in_eager(hook):
    eager, compiled = (history(hook, Box(root=Node("root"), new=None, other=None, n=0), on) for on in (False, True))
    assert compiled == eager


def test_what_a_class_keeps_in_c_is_not_lost():
    """It cannot be made of attributes, so one that holds a number is refused."""

    def hook(box, ct):
        box.n += 1
        box.new = Error(box.n)

    with pytest.raises(jhop.Unsupported, match="inside a Error, which jhop cannot make anew"):
        history(hook, Box(n=0, new=None), True)


class Machine:
    """Whose state is the method that runs next."""

    def __init__(self):
        self.n = 0
        self.step = self.first

    def first(self, ct):
        self.n += 1
        self.step = self.second
        return ct * self.n

    def second(self, ct):
        self.n += 10
        self.step = self.first
        return ct + self.n

    def __call__(self, ct):
        return self.step(ct)


def test_method_as_state():
    def run(machine, step):
        return [(step(X).tolist(), machine.n, machine.step.__name__) for _ in range(6)]

    def gradient(machine):
        return jax.grad(lambda x: (jhop.hook(x, machine) ** 2).sum())

    one, other = Machine(), Machine()
    compiled = jhop.jit(gradient(one), fullgraph=True)
    assert run(one, compiled) == run(other, gradient(other))
    assert compiled.versions() == 2
    one.step = other.first  # of another object
    compiled(X)
    assert (one.n, other.n, other.step) == (33, 34, other.second)


class Scaled:
    def __init__(self):
        self.calls = 0
        self.kind = 1

    @functools.singledispatchmethod
    def scale(self, kind):
        return 3.0

    @scale.register
    def _(self, kind: int):
        self.calls += 1
        return 2.0 * kind

    def __call__(self, ct):
        return ct * self.scale(self.kind)


def test_method_for_each_type():
    """From Python 3.12 on, it keeps a function for the object, which closes over it."""
    scaled = Scaled()
    step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, scaled) ** 2).sum()), fullgraph=True)
    for kind, factor in ((1, 2.0), (5, 10.0), ("a", 3.0), (7, 14.0)):
        scaled.kind = kind
        assert step(X).tolist() == [2.0 * factor, 4.0 * factor]
    assert scaled.calls == 3


# Attributes that only a library's code names


class Table(collections.UserDict):
    """Whose items are in an attribute `data`."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.stores = getattr(self, "stores", 0) + 1


class Log(collections.UserList):
    def add(self, item):
        self.append(item)
        return len(self)


class Ratio(fractions.Fraction):
    """Whose parts are in slots."""


def table_that_counts(box, ct):
    box.table["n"] += 1
    box.table["sum"] = ct.sum()
    return ct * box.table["n"] + box.table.stores


def log_that_grows(box, ct):
    return ct * box.log.add(ct.sum())


def ratio_that_grows(box, ct):
    box.ratio = Ratio(box.ratio + 1)
    return ct * float(box.ratio)


@pytest.mark.parametrize("hook", [table_that_counts, log_that_grows, ratio_that_grows])
def test_attribute_that_only_a_base_class_names(hook):
    def run(compiled):
        box = Box(table=Table(n=1), log=Log(), ratio=Ratio(1, 2))
        step = jax.grad(lambda x: (jhop.hook(x, functools.partial(hook, box)) ** 2).sum())
        step = jhop.jit(step, fullgraph=True) if compiled else step
        outs = [step(X).tolist() for _ in range(4)]
        return outs, [*box.table.data.items()], box.table.stores, box.log.data, box.ratio

    assert run(True) == run(False)


def test_base_class_s_attribute_that_the_function_reads_is_fresh():
    table = Table(k=2.0)
    fn = jhop.jit(lambda x: x * table["k"])
    for k in (2.0, 5.0):
        table.data["k"] = k
        assert fn(X).tolist() == [k, 2 * k]


# Weak references that hooks make


class Key:
    pass


def test_weak_key_that_a_hook_adds_goes_with_its_object():
    counts, keys = weakref.WeakKeyDictionary(), [Key(), Key()]

    def hook(ct):
        counts[keys[0]] = counts.get(keys[0], 0) + 1
        return ct * (10 * len(counts) + sum(counts.values()))

    step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)
    assert [step(X)[0].item() / 2 for _ in range(3)] == [11, 12, 13]
    del keys[0]
    gc.collect()
    assert len(counts) == 0
    assert [step(X)[0].item() / 2 for _ in range(2)] == [11, 12]


@pytest.mark.parametrize("keep", ["reference", "key"])
def test_weak_reference_to_what_the_hook_made(keep):
    box = Box(new=None, ref=None, table=weakref.WeakKeyDictionary())

    def hook(ct):
        box.new = Key()
        if keep == "key":
            box.table[box.new] = math.pi
        else:
            box.ref = weakref.ref(box.new)

    with pytest.raises(jhop.Unsupported, match="keeps a weak reference in .* to a Key that it made"):
        jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)(X)
    assert box.new is None
