"""Nothing that `jhop.jit` compiled is stale: what a function or its hooks look up may change between calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from jhop import _lookups

X = np.array([0.5, -2.0, 3.0], np.float32)
SCALE = 2.0
HOOKS = []
COMPILERS = {
    "jhop.jit": functools.partial(jhop.jit, fullgraph=True),
    "jhop.jit of jit": lambda fn: jhop.jit(jax.jit(fn), fullgraph=True),
    "jhop.jit of jhop.jit": lambda fn: jhop.jit(jhop.jit(fn), fullgraph=True),
    "eager": lambda fn: fn,
}


class Model:
    """What a function may reach; `scale` may also be a class attribute."""

    bias = 1.0

    def __init__(self):
        self.scale = 2.0
        self.flag = False
        self.hooks = []
        self.table = {"w": 3.0}
        self.weight = jnp.array([1.0, 2.0, 3.0])
        self.seen = 0

    def hook(self, ct):
        return ct * self.scale

    def count(self, ct):
        self.seen += 1
        return ct * 2.0

    def helper(self, x):
        return x * 5.0


def rebind(model, **values):
    for name, value in values.items():
        setattr(model, name, value)


def grow(model):
    model.hooks.append(lambda ct: ct * 3.0)


def with_hooks(model, x):
    for hook in model.hooks:
        x = jhop.hook(x, hook)
    return x


def scanned(model, x):
    def body(carry, _):
        return jhop.hook(carry, model.hook), None

    return lax.scan(body, x, None, length=3)[0]


# (what the function computes of a model and x, what changes)
CHANGES = {
    "hook replaced": (lambda m, x: jhop.hook(x, m.hook), lambda m: rebind(m, hook=lambda ct: ct * 7.0)),
    "hook closes over": (lambda m, x: jhop.hook(x, lambda ct: ct * m.scale), lambda m: rebind(m, scale=7.0)),
    "method reads": (lambda m, x: jhop.hook(x, m.hook), lambda m: rebind(m, scale=7.0)),
    "class attribute": (lambda m, x: jhop.hook(x, lambda ct: ct * m.bias), lambda m: rebind(type(m), bias=4.0)),
    "hook added": (with_hooks, grow),
    "function reads": (lambda m, x: x * m.scale, lambda m: rebind(m, scale=7.0)),
    "function branches": (lambda m, x: x * (2.0 if m.flag else 3.0), lambda m: rebind(m, flag=True)),
    "function reads an array": (lambda m, x: x * m.weight, lambda m: rebind(m, weight=m.weight * 4)),
    "function reads a dict": (lambda m, x: x * m.table["w"], lambda m: m.table.update(w=9.0)),
    "key added": (lambda m, x: x * m.table.get("v", 2.0), lambda m: m.table.update(v=9.0)),
    "helper replaced": (lambda m, x: m.helper(x), lambda m: rebind(m, helper=lambda x: x * 8.0)),
    "getattr": (lambda m, x: x * getattr(m, "sca" + "le"), lambda m: rebind(m, scale=7.0)),
    "scan": (scanned, lambda m: rebind(m, scale=7.0)),
    "hook in a scan replaced": (scanned, lambda m: rebind(m, hook=lambda ct: ct * 7.0)),
    "checkpoint": (lambda m, x: jax.checkpoint(lambda x: with_hooks(m, x) * x)(x), grow),
    "vmap": (lambda m, x: jax.vmap(lambda x: with_hooks(m, x) * x)(x), grow),
    "inner jit": (lambda m, x: jax.jit(lambda x: with_hooks(m, x) * x)(x), grow),
    "partial": (lambda m, x: functools.partial(with_hooks, m)(x), grow),
}


@pytest.fixture
def model():
    bias = Model.bias
    yield Model()
    Model.bias = bias


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("change", CHANGES)
def test_change_is_seen(change, compiler, model):
    forward, alter = CHANGES[change]
    fn = jax.grad(lambda x: (forward(model, x) * 1.5).sum())
    compiled = COMPILERS[compiler](fn)
    before = [compiled(X).tolist() for _ in range(2)][-1]
    assert before == fn(X).tolist()
    alter(model)
    after = compiled(X).tolist()
    assert after == fn(X).tolist()
    assert after != before


def module_body(carry, _):
    for hook in HOOKS:
        carry = jhop.hook(carry, hook)
    return carry * SCALE, None


@jax.jit
def module_jitted(x):
    for hook in HOOKS:
        x = jhop.hook(x, hook)
    return x * SCALE


INNER = {
    "scan": lambda x: lax.scan(module_body, x, None, length=2)[0].sum(),
    "jit": lambda x: module_jitted(x).sum(),
    "jit of grad": lambda x: jax.grad(lambda x: module_jitted(x).sum())(x).sum() + (x * x).sum(),
}


@pytest.mark.parametrize("what", ["hook", "global"])
@pytest.mark.parametrize("inner", INNER)
def test_inner_function_that_jax_knows_already(inner, what, monkeypatch):
    """JAX keeps traces of inner functions by function and types: another function that uses them must not be stale."""
    outer = [jax.grad(lambda x, k=k: INNER[inner](x) * k) for k in (1.0, 2.0, 3.0)]
    first = jhop.jit(outer[0])
    before = first(X).tolist()
    monkeypatch.setitem(globals(), *(("HOOKS", [lambda ct: ct * 5.0]) if what == "hook" else ("SCALE", 5.0)))
    factor = {"scan": {"hook": 25.0, "global": 6.25}, "jit": {"hook": 5.0, "global": 2.5}}.get(inner)
    expected = [factor[what] * value for value in before] if factor else before
    assert jhop.jit(outer[1])(X).tolist() == [2.0 * value for value in expected]
    assert first(X).tolist() == expected
    monkeypatch.undo()
    assert jhop.jit(outer[2])(X).tolist() == [3.0 * value for value in before]


OUTER = {
    "grad": lambda fn: jax.grad(lambda x: fn(x).sum())(X),
    "vjp": lambda fn: jax.vjp(fn, X)[1](jnp.ones(3))[0],
    "vmap of grad": lambda fn: jax.vmap(jax.grad(fn))(X),
    "jit of grad": lambda fn: jax.jit(jax.grad(lambda x: fn(x).sum()))(X),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("change", ["hook replaced", "hook closes over", "method reads", "function reads", "scan"])
def test_change_is_seen_inside_an_outer_transformation(change, outer, model):
    forward, alter = CHANGES[change]
    inner = jhop.jit(lambda x: forward(model, x) * 1.5)
    before = [OUTER[outer](inner).tolist() for _ in range(2)][-1]
    alter(model)
    after = OUTER[outer](inner).tolist()
    assert after == OUTER[outer](lambda x: forward(model, x) * 1.5).tolist()
    assert after != before


def test_second_jit_of_a_function(model):
    fn = jax.grad(lambda x: with_hooks(model, x).sum())
    assert jhop.jit(fn)(X).tolist() == [1.0] * 3
    grow(model)
    assert jhop.jit(fn)(X).tolist() == [3.0] * 3


def test_reset_forgets_traces_too(model):
    fn = jhop.jit(jax.grad(lambda x: with_hooks(model, x).sum()))
    assert fn(X).tolist() == [1.0] * 3
    jhop.reset()
    grow(model)
    assert fn(X).tolist() == [3.0] * 3


def test_static_argument_that_changes():
    class Layer:
        k = 3.0

        @functools.partial(jhop.jit, static_argnums=0)
        def step(self, x):
            return x * self.k

    layer = Layer()
    assert layer.step(X).tolist() == (X * 3).tolist()
    layer.k = 4.0
    assert layer.step(X).tolist() == (X * 4).tolist()


def test_static_argument_with_another_hash():
    """It is the same object, and what was traced for it is not found again."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Layer:
        k: float = 3.0

    layer, step = Layer(), jhop.jit(lambda layer, x: x * layer.k, static_argnums=0)
    assert step(layer, X).tolist() == (X * 3).tolist()
    layer.k = 4.0
    assert step(layer, X).tolist() == (X * 4).tolist()
    assert jhop.explain(step).traces[-1].reason == "a static argument that was changed in place"


def test_going_back_traces_nothing_new(model):
    traces = []

    def fn(x):
        traces.append(1)
        return x * model.scale

    compiled = jhop.jit(fn)
    for scale in (2.0, 3.0, 2.0, 3.0, 2.0):
        model.scale = scale
        assert compiled(X).tolist() == (X * scale).tolist()
    assert len(traces) == 2


# What is no reason for a trace. The functions stand alone: what one can reach must not be in a table with the others.


def steps(fn, compile):
    """(the gradient of a compiled function of (x, register), how often it was traced)."""
    traces = []
    if compile is jhop.compile:

        @jhop.compile
        def compiled(x):
            traces.append(1)
            return fn(x, lambda x, hook: (x.register_hook(hook), x)[1]).sum() * 2.0

        def step(x):
            tensor = jhop.tensor(x, requires_grad=True)
            compiled(tensor).backward()
            return tensor.grad

        return step, traces

    def traced(x):
        traces.append(1)
        return fn(x, jhop.hook).sum() * 2.0

    return jhop.jit(jax.grad(traced), fullgraph=True), traces


both = pytest.mark.parametrize("compile", [jhop.jit, jhop.compile], ids=["jit", "compile"])


def check_steady(fn, compile, model, count):
    step, traces = steps(fn, compile)
    results = [step(X).tolist() for _ in range(6)]
    assert results == results[:1] * 6
    assert model.seen == count
    assert len(traces) == 1


@both
def test_no_trace_for_a_method_that_counts(compile, model):
    check_steady(lambda x, register: register(x * 1.0, model.count), compile, model, 6)


@both
def test_no_trace_for_a_counting_hook_made_inside(compile, model):
    check_steady(lambda x, register: register(x * 1.0, lambda ct: model.count(ct)), compile, model, 6)


@both
def test_no_trace_for_a_counting_partial(compile, model):
    check_steady(lambda x, register: register(x * 1.0, functools.partial(Model.count, model)), compile, model, 6)


@both
def test_no_trace_for_a_counting_object(compile, model):
    class Counting:
        def __call__(self, ct):
            model.seen += 1
            return ct * 2.0

    counting = Counting()
    check_steady(lambda x, register: register(x * 1.0, counting), compile, model, 6)


@both
def test_no_trace_for_a_counting_dataclass(compile, model):
    """Its `__eq__` and `__repr__` read every field, and are not called."""

    @dataclasses.dataclass
    class Meter:
        n: int = 0
        norm: float = 0.0

        def hook(self, ct):
            self.n += 1
            self.norm = 0.5 * self.norm + 1.0
            return ct * 2.0

        def __str__(self):
            return f"seen {self.n}"

    meter = Meter()
    check_steady(lambda x, register: register(x * 1.0, meter.hook), compile, model, 0)
    assert (meter.n, meter.norm) == (6, 1.96875)


@both
def test_no_trace_for_what_made_the_hook(compile, model):
    """What `__init__` reads, and the methods that it names, do not count for an object that is there."""

    class Meter:
        def __init__(self):
            self.n = 0
            self.scale = self.twice
            self.text = self.describe()

        def describe(self):
            return f"seen {self.n}"

        def twice(self, ct):
            self.n += 1
            return ct * 2.0

        def __call__(self, ct):
            return self.scale(ct)

    meter = Meter()
    check_steady(lambda x, register: register(x * 1.0, meter), compile, model, 0)
    assert meter.n == 6


def test_what_makes_an_object_in_the_function_is_fresh(model):
    class Scale:
        def __init__(self):
            self.by = model.scale

    fn = jhop.jit(lambda x: x * Scale().by)
    for scale in (2.0, 5.0):
        model.scale = scale
        assert fn(X).tolist() == (X * scale).tolist()


def test_text_that_the_function_asks_for_is_fresh(model):
    class Meter:
        n = 0

        def __str__(self):
            return str(self.n)

    meter = Meter()
    fn = jhop.jit(lambda x: x * int(f"{meter}"))
    assert fn(X).tolist() == [0.0, 0.0, 0.0]
    meter.n = 3
    assert fn(X).tolist() == (X * 3).tolist()


@both
def test_no_trace_for_what_the_function_stores(compile, model):
    def fn(x, register):
        model.seen = 4
        return x * 1.0

    check_steady(fn, compile, model, 4)


@both
def test_no_trace_for_what_the_function_changes_itself(compile, model):
    def fn(x, register):
        model.seen += 4
        return x * 1.0

    check_steady(fn, compile, model, 4)


def test_counter_that_the_function_reads_is_never_stale(model):
    """The hook writes what the function reads: a trace a call is slow, and right."""
    step = jhop.jit(jax.grad(lambda x: jhop.hook(x * (model.seen + 1.0), model.count).sum()), fullgraph=True)
    assert [step(X)[0].item() for _ in range(3)] == [2.0, 4.0, 6.0]


def test_function_that_reaches_too_much_says_so(model):
    class Node:
        def __init__(self, rest):
            self.rest = rest

    chain = None
    for _ in range(10_100):
        chain = Node(chain)
    fn = jhop.jit(lambda x: x * (2.0 if chain.rest else 3.0) * model.scale)
    with pytest.warns(UserWarning, match=r"can reach more than 10000 Python objects.*pass it what it uses"):
        assert fn(X).tolist() == (X * 4.0).tolist()


def test_function_with_assert(model):
    """pytest rewrites `assert` so that it names pytest, which reaches everything."""

    def hook(ct):
        assert ct.ndim == 1
        return ct * model.scale

    def fn(x):
        assert x.ndim == 1
        return jhop.hook(x, hook).sum()

    step = jhop.jit(jax.grad(fn), fullgraph=True)
    assert step(X).tolist() == [2.0] * 3
    model.scale = 7.0
    assert step(X).tolist() == [7.0] * 3


def test_what_changes_at_every_call_is_warned_of(model):
    fn = jhop.jit(lambda x: x * model.scale)
    for k in range(8):
        model.scale = 2.0 + k
        fn(X)
    model.scale = 20.0
    with pytest.warns(UserWarning, match=r"traced more than 8 times.*scale` changed from 9.0 to 20.0.*as an argument"):
        assert fn(X).tolist() == (X * 20).tolist()
    model.scale = 21.0
    assert fn(X).tolist() == (X * 21).tolist()


def double(ct):
    return ct * 2.0


def write_global(ct):
    global SCALE
    SCALE = SCALE
    return ct * 3.0


def write_attribute(ct):
    double.seen = True
    return ct * 5.0


HOLDS_STATE = {
    double: False, write_global: True, write_attribute: True, lambda ct: ct * SCALE: True,
    lambda ct, table={}: ct * len(table): True, lambda ct: ct * Model.bias: True, lambda ct: vars(double) and ct: True,
}  # fmt: skip


@pytest.mark.parametrize("hook", HOLDS_STATE)
def test_what_runs_is_watched_closely_where_hooks_may_have_state(hook, monkeypatch):
    """On Python 3.11 that makes tracing twice as slow, so it is left out for others."""
    roughly = []

    def noted(codes, **options):
        roughly.append(options["roughly"])
        return note(codes, **options)

    note = _lookups.note_code_that_runs
    monkeypatch.setattr(_lookups, "note_code_that_runs", noted)
    step = jhop.jit(jax.grad(lambda x: jhop.hook(x, hook).sum()))
    step.eval_shape(X)
    assert roughly == [not HOLDS_STATE[hook]]
