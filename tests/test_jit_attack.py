"""`jhop.jit` where functions look things up in ways that are easily missed, and among objects that do not behave."""

import array
import collections
import contextvars
import copy
import dataclasses
import functools
import operator
import pickle
import sys
import types
import weakref
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop

X = np.array([1.0, 2.0, 3.0], np.float32)
VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)
BY_NAME = operator.attrgetter("scale")
BYTES = bytearray(b"\x02")
DOUBLES = array.array("d", [2.0])
OBJECTS = np.array([2.0, 3.0], object)
SCALES = types.SimpleNamespace(vjp=2.0, jvp=2.0, rule=2.0)


@dataclasses.dataclass
class Point:
    x: float = 1.0
    y: float = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
    w: object
    b: object


class Model:
    def __init__(self):
        self.scale = 2.0
        self.cache = None
        self.sub = types.SimpleNamespace(scale=2.0)
        self.point = Point()
        self.params = Params(2.0, 3.0)
        self.table = {}
        self.array = np.full(3, 2.0, np.float32)
        self.number = np.array(2.0, np.float32)
        self.weak = weakref.WeakSet([self])
        self.defaults = collections.defaultdict(lambda: 2.0)

    def both(self, x):
        return x * self.scale


@jax.custom_vjp
def with_vjp(x):
    return x * 1.0


with_vjp.defvjp(lambda x: (x, None), lambda _, ct: (ct * SCALES.vjp,))


@jax.custom_jvp
def with_jvp(x):
    return x * 1.0


with_jvp.defjvps(lambda dot, out, x: dot * SCALES.jvp)


@jax.custom_batching.custom_vmap
def with_rule(x):
    return x * 1.0


@with_rule.def_vmap
def _rule(size, batched, x):
    return x * SCALES.rule, True


def by_keyword(m, x):
    match m.point:
        case Point(x=1.0):
            return x * 2.0
    return x * 5.0


def by_position(m, x):
    match m.point:
        case Point(1.0, _):
            return x * 2.0
    return x * 5.0


def fills_cache(m, x):
    if m.cache is None:
        m.cache = 3.0
    return x * m.cache


def fills_table(m, x):
    return x * m.table.setdefault("k", 3.0)


def imports(m, x):
    from attacked_module import SCALE

    return x * SCALE


def hook_and_helper(m, x):
    def both(y):
        return y * m.scale

    return jhop.hook(both(x), both)


def module(scale):
    made = types.ModuleType("attacked_module")
    made.SCALE = scale
    sys.modules["attacked_module"] = made


def scaled(m):
    m.scale = 7.0


# (the function, of a model and x; what changes)
CHANGES = {
    "attrgetter": (lambda m, x: x * BY_NAME(m), scaled),
    "dotted attrgetter": (lambda m, x: x * operator.attrgetter("sub.scale")(m), lambda m: scaled(m.sub)),
    "methodcaller": (lambda m, x: operator.methodcaller("both", x)(m), scaled),
    "hasattr": (lambda m, x: x * (3.0 if hasattr(m, "".join("extra")) else 2.0), lambda m: setattr(m, "extra", 0)),
    "pattern by keyword": (by_keyword, lambda m: setattr(m.point, "x", 9.0)),
    "pattern by position": (by_position, lambda m: setattr(m.point, "x", 9.0)),
    "registered dataclass": (lambda m, x: x * sum(jax.tree.leaves(m.params)), lambda m: setattr(m.params, "b", 9.0)),
    "astuple": (lambda m, x: x * sum(dataclasses.astuple(m.point)), lambda m: setattr(m.point, "y", 9.0)),
    "array in place": (lambda m, x: x * m.array.sum(), lambda m: m.array.fill(9.0)),
    "number in place": (lambda m, x: x * m.number, lambda m: m.number.fill(9.0)),
    "array of objects": (lambda m, x: x * OBJECTS[0], lambda m: OBJECTS.fill(9.0)),
    "bytearray": (lambda m, x: x * float(BYTES[0]), lambda m: BYTES.__setitem__(0, 9)),
    "array.array": (lambda m, x: x * DOUBLES[0], lambda m: DOUBLES.__setitem__(0, 9.0)),
    "context variable": (lambda m, x: x * VARIABLE.get(), lambda m: VARIABLE.set(9.0)),
    "weak set": (lambda m, x: x * float(len(m.weak)), lambda m: m.weak.add(Point)),
    "cache": (fills_cache, lambda m: setattr(m, "cache", 7.0)),
    "cache in a dict": (fills_table, lambda m: m.table.update(k=7.0)),
    "defaultdict": (lambda m, x: x * m.defaults["k"], lambda m: m.defaults.update(k=7.0)),
    "module": (imports, lambda m: module(7.0)),
    "custom_vjp": (lambda m, x: with_vjp(x), lambda m: setattr(SCALES, "vjp", 7.0)),
    "custom_jvp": (lambda m, x: with_jvp(x), lambda m: setattr(SCALES, "jvp", 7.0)),
    "custom_vmap": (lambda m, x: jax.vmap(with_rule)(x), lambda m: setattr(SCALES, "rule", 7.0)),
    "hook and helper": (hook_and_helper, scaled),
    "method that is hook and helper": (lambda m, x: jhop.hook(m.both(x), m.both), scaled),
}


@pytest.fixture
def scales():
    before, token = vars(SCALES).copy(), VARIABLE.set(2.0)
    module(2.0)
    OBJECTS.fill(2.0)
    BYTES[0] = DOUBLES[0] = 2
    yield
    vars(SCALES).update(before)
    VARIABLE.reset(token)
    del sys.modules["attacked_module"]


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen(change, scales):
    forward, alter = CHANGES[change]
    model, traces = Model(), []

    def fn(x):
        traces.append(1)
        return jax.value_and_grad(lambda x: (forward(model, x) * 1.5).sum())(x)

    compiled = jhop.jit(fn)
    before = [compiled(X)[1].tolist() for _ in range(3)][-1]
    assert len(traces) == 1
    expected = fn(X)
    assert before == expected[1].tolist()
    alter(model)
    value, gradient = compiled(X)
    expected = jax.value_and_grad(lambda x: (forward(model, x) * 1.5).sum())(X)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    assert gradient.tolist() == expected[1].tolist() != before


def test_function_that_fills_caches_and_lists_for_several_types():
    model, traces = Model(), []

    def fn(x):
        traces.append(x.shape)
        return fills_table(model, fills_cache(model, x))

    compiled = jhop.jit(fn)
    for size in (1, 2, 3) * 4:
        assert compiled(jnp.ones(size)).tolist() == [9.0] * size
    assert len(traces) == 3


def test_attributes_by_constant_names_cost_no_trace():
    class Meter:
        n = 0

        def count(self, ct):
            self.n += 1
            return ct * 2.0

    meter, config, traces = Meter(), types.SimpleNamespace(rate=3.0), []

    def loss(x):
        traces.append(1)
        rate = getattr(config, "rate", 1.0) if hasattr(config, "rate") else 0.0
        return (jhop.hook(x, meter.count) * rate).sum()

    step = jhop.jit(jax.grad(loss), fullgraph=True)
    assert [step(X).tolist() for _ in range(4)] == [[6.0] * 3] * 4
    assert (meter.n, len(traces)) == (4, 1)


# Objects that do not behave.


class Refuses:
    """Whatever is asked of it that is no special name of the class."""

    def __getattr__(self, name):
        raise RuntimeError(name)


class RefusesAll:
    def __getattribute__(self, name):
        raise RuntimeError(name)


class Called(Refuses):
    def __call__(self):
        return None


class NoClass:
    @property
    def __class__(self):
        raise RuntimeError


class NoDict:
    __slots__ = ()

    @property
    def __dict__(self):
        raise RuntimeError


class Unequal(float):
    __hash__ = float.__hash__

    def __eq__(self, other):
        raise RuntimeError

    def __str__(self):
        raise RuntimeError


class MetaUnequal(type):
    __hash__ = type.__hash__

    def __eq__(cls, other):
        raise RuntimeError


def refuse(*_):
    raise RuntimeError


def subclass(base, content):
    names = {"__iter__", "__len__", "__getitem__", "__contains__", "items", "keys"} & set(dir(base))
    return type("Sub", (base,), dict.fromkeys(names, refuse))(content)


ODD = {
    "__getattr__": Refuses(),
    "__getattribute__": RefusesAll(),
    "callable": Called(),
    "__class__": NoClass(),
    "__dict__": NoDict(),
    "float": Unequal(0.0),
    "metaclass": MetaUnequal("Made", (), {}),
    "mock": mock.Mock(),
    "magic mock": mock.MagicMock(),
    "dict": subclass(dict, {"a": 1}),
    "list": subclass(list, [1]),
    "tuple": subclass(tuple, (1,)),
    "set": subclass(set, [1]),
    "deque": subclass(collections.deque, [1]),
    "generator": (i for i in range(3)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_object_in_reach(kind):
    odd, held, traces, box = ODD[kind], [ODD[kind]], [], types.SimpleNamespace(n=0)

    def count(ct):
        box.n += 1
        return ct * 2.0

    def loss(x):
        traces.append(1)
        return (jhop.hook(x, count) * (3.0 if odd is held[0] else 5.0)).sum()

    step = jhop.jit(jax.grad(loss), fullgraph=True)
    assert [step(X).tolist() for _ in range(3)] == [[6.0] * 3] * 3
    assert (box.n, len(traces)) == (3, 1)


# Calls.


@pytest.mark.parametrize("counts", [False, True])
def test_sharding_on_explicit_axes_is_part_of_the_type(counts):
    mesh = make_mesh((8,), ("i",), "Explicit")
    box = types.SimpleNamespace(n=0)

    def count(ct):
        box.n += counts
        return ct * 2.0

    step = jhop.jit(jax.grad(lambda x: jhop.hook(jnp.sin(x), count).sum()), fullgraph=True)
    with jax.set_mesh(mesh):
        for spec in (P("i"), P("i"), P(None), P(None), P("i")):
            x = jax.device_put(jnp.zeros(8), NamedSharding(mesh, spec))
            out = step(x)
            assert (out.sharding.spec, out.tolist()) == (spec, [2.0] * 8)


def test_arguments_of_any_name():
    box = types.SimpleNamespace(n=0)

    def count(ct):
        box.n += 1
        return ct * 2.0

    def fn(state, self, args, kwargs):
        return jax.grad(lambda x: jhop.hook(x, count).sum())(state) * self + args * kwargs

    step = jhop.jit(fn, fullgraph=True)
    named = {"state": X, "self": 3.0, "args": 5.0, "kwargs": 2.0}
    assert [step(**named).tolist() for _ in range(2)] == [[16.0] * 3] * 2
    assert step.lower(**named).out_info is not None
    assert box.n == 2


@jhop.jit
def doubled(x):
    return x * 2.0


def test_copies_are_the_function_itself_as_with_functions():
    doubled(X)
    assert copy.copy(doubled) is copy.deepcopy(doubled) is doubled
    assert pickle.loads(pickle.dumps(doubled)) is doubled
    nameless = jhop.jit(functools.partial(operator.mul, 2.0))
    assert copy.copy(nameless) is copy.deepcopy(nameless) is nameless


def test_static_method_of_a_deep_copied_object():
    class Trainer:
        def __init__(self, rate):
            self.rate = rate

        @functools.partial(jhop.jit, static_argnums=0)
        def step(self, x):
            return x * self.rate

    trainer = Trainer(3.0)
    trainer.step(X)
    other = copy.deepcopy(trainer)
    other.rate = 5.0
    assert (trainer.step(X).tolist(), other.step(X).tolist()) == ((X * 3).tolist(), (X * 5).tolist())
