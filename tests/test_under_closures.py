"""Tracers that a hook closes over become operands, wherever it keeps them, and none outlives its trace."""

import collections
import dataclasses
import functools
import gc
import threading
import types
import weakref

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import sparse

import jhop
from tests import under

X = np.array([0.5, -2.0, 3.0], np.float32)


def times(ct, s):
    return ct * s


class Scale:
    def __init__(self, s):
        self.s = s

    def __call__(self, ct):
        return ct * self.s

    def hook(self, ct):
        return ct * self.s


class Slots:
    __slots__ = ("s",)
    __init__, __call__ = Scale.__init__, Scale.__call__


@dataclasses.dataclass
class Data:
    s: object
    __call__ = Scale.__call__


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    s: object
    __call__ = Scale.__call__


class Named(collections.namedtuple("Named", "s")):
    __call__ = Scale.__call__


class Table(dict):
    def __call__(self, ct):
        return ct * self["s"]

    def __setitem__(self, key, value):
        raise RuntimeError("not called by the hook")


class Ring(collections.deque):
    def __call__(self, ct):
        return ct * self[0] * self.maxlen / 2

    def extend(self, values):
        raise RuntimeError("not called by the hook")


class Text(str):
    def __call__(self, ct):
        return ct * self.s * int(self)


class Whole(int):
    __call__ = Text.__call__


def with_attribute(obj, s):
    obj.s = s
    return obj


def default(s):
    def hook(ct, s=s):
        return ct * s

    return hook


def keyword_default(s):
    def hook(ct, *, s=s):
        return ct * s

    return hook


def attribute(s):
    def hook(ct):
        return ct * hook.s

    hook.s = s
    return hook


def recursive(s):
    def hook(ct, n=2):
        return ct * s if n == 0 else hook(ct, n - 1)

    return hook


def nested(s):
    def outer():
        return lambda ct: ct * s

    inner = outer()
    return lambda ct: inner(ct)


def kept_in(make, read):
    def of(s):
        box = make(s)
        return lambda ct: ct * read(box)

    return of


def holding_itself(s):
    box = {"s": s}
    box["hook"] = lambda ct: ct * box["s"]
    return box["hook"]


def two_share_a_cell(s):
    def one():
        return s

    def other(ct):
        return ct * (one() + s) / 2

    return other


def pullback(s):
    _, pull = jax.vjp(lambda x: x * s, X)
    return lambda ct: pull(ct)[0]


def sparse_matrix(s):
    matrix = sparse.BCOO((s * jnp.ones(3), jnp.array([[0, 0], [1, 1], [2, 2]])), shape=(3, 3))
    return lambda ct: matrix @ ct


def index_of_an_array(s):
    return (s * jnp.ones(3)).at[:].multiply


def jaxpr_with_constants(s):
    fn = jex_core.jaxpr_as_fun(jax.make_jaxpr(lambda ct: ct * s)(X))
    return lambda ct: fn(ct)[0]


def converted_closure(s):
    fn, consts = jax.closure_convert(lambda ct: ct * s, X)
    return lambda ct: fn(ct, *consts)


def custom_rule(s):
    @jax.custom_vjp
    def hook(ct):
        return ct * s

    hook.defvjp(lambda ct: (ct * s, None), lambda _, ct: (ct * s,))
    return hook


def thread_local(s):
    box = threading.local()
    box.s = s
    return lambda ct: ct * box.s


HOLDERS = {
    "closure": lambda s: lambda ct: ct * s,
    "nested closure": nested,
    "closure of itself": recursive,
    "shared cell": two_share_a_cell,
    "default": default,
    "keyword default": keyword_default,
    "attribute of a function": attribute,
    "partial keyword": lambda s: functools.partial(times, s=s),
    "partial argument": lambda s: functools.partial(lambda s, ct: ct * s, s),
    "partial of partial": lambda s: functools.partial(functools.partial(times), s=s),
    "jax Partial": lambda s: jax.tree_util.Partial(times, s=s),
    "bound method": lambda s: Scale(s).hook,
    "callable object": Scale,
    "slots": Slots,
    "dataclass": Data,
    "frozen dataclass with slots": Frozen,
    "named tuple": Named,
    "subclass of dict": lambda s: Table(s=s),
    "subclass of deque": lambda s: Ring([s], 2),
    "subclass of str": lambda s: with_attribute(Text("1"), s),
    "subclass of int": lambda s: with_attribute(Whole(1), s),
    "set": kept_in(lambda s: {Scale(s)}, lambda box: next(iter(box)).s),
    "frozenset": kept_in(lambda s: frozenset([Scale(s)]), lambda box: next(iter(box)).s),
    "set of functions": kept_in(lambda s: {lambda: s}, lambda box: next(iter(box))()),
    "factory": kept_in(lambda s: collections.defaultdict(lambda: s), lambda box: box.default_factory()),
    "method of the tracer": lambda s: s.__rmul__,
    "wraps": lambda s: functools.wraps(times)(lambda ct: ct * s),
    "list": kept_in(lambda s: [s], lambda box: box[0]),
    "tuple": kept_in(lambda s: (1, s), lambda box: box[1]),
    "dict": kept_in(lambda s: {"s": s}, lambda box: box["s"]),
    "deque": kept_in(lambda s: collections.deque([s]), lambda box: box[0]),
    "defaultdict": kept_in(lambda s: collections.defaultdict(int, s=s), lambda box: box["s"]),
    "OrderedDict": kept_in(lambda s: collections.OrderedDict(s=s), lambda box: box["s"]),
    "namespace": kept_in(lambda s: types.SimpleNamespace(s=s), lambda box: box.s),
    "deep": kept_in(lambda s: {"k": [(0, Data(Named(s)))]}, lambda box: box["k"][0][1].s.s),
    "dict that holds the hook": holding_itself,
    "jit": lambda s: jax.jit(lambda ct: ct * s),
    "jit with options": lambda s: functools.partial(jax.jit(lambda n, ct: ct * s * n / 2, static_argnums=0), 2),
    "jit inside": kept_in(lambda s: jax.jit(lambda: s), lambda box: box()),
    "vmap": lambda s: jax.vmap(lambda ct: ct * s),
    "checkpoint": lambda s: jax.checkpoint(lambda ct: ct * s),
    "pullback": pullback,
    "sparse matrix": sparse_matrix,
    "index of an array": index_of_an_array,
    "jaxpr with constants": jaxpr_with_constants,
    "converted closure": converted_closure,
    "thread local": thread_local,
}

RUNS = {
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X, 1.5),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X, 1.5),
    "grad by both": lambda f: jax.grad(f, (0, 1))(X, 1.5)[0],
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X[None], jnp.array([1.5]))[0],
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x[None], jnp.array([1.5]))[0])(X),
    "vmapped scale": lambda f: jax.jit(jax.vmap(jax.grad(f), (None, 0)))(X, jnp.array([7.0, 1.5]))[1],
    "xs of a scan": lambda f: jax.jit(
        jax.grad(lambda x: lax.scan(lambda c, s: (c, f(c, s)), x, jnp.array([1.5]))[1].sum())
    )(X),
    "xs of an eager scan": lambda f: jax.grad(
        lambda x: lax.scan(lambda c, s: (c, f(c, s)), x, jnp.array([1.5]))[1].sum()
    )(X),
    "cond": lambda f: jax.jit(jax.grad(lambda x, s: lax.cond(s > 0, lambda x: f(x, s), lambda x: x.sum(), x)))(X, 1.5),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X, 1.5),
    "hessian": lambda f: 3 + jax.jit(lambda x: jax.grad(lambda x: jax.grad(f)(x, 1.5).sum())(x))(X),
    "jhop.jit": lambda f: jhop.jit(jax.grad(f), fullgraph=True)(X, jnp.float32(1.5)),
    "linear_transpose": lambda f: jax.jit(lambda s: jax.linear_transpose(lambda x: f(x, s), X)(1.0)[0])(1.5),
}


def loss(holder):
    return lambda x, s: (2 * jhop.hook(x, HOLDERS[holder](s))).sum()


# Every holder in a few runs, and a few holders in every run.
PAIRS = [(holder, run) for holder in HOLDERS for run in ("jit of grad", "grad by both", "jhop.jit")]
PAIRS += [(holder, run) for holder in ("closure", "bound method", "tuple", "pullback") for run in RUNS]
PAIRS += [(holder, "vmap of grad") for holder in ("sparse matrix", "index of an array", "converted closure")]


@pytest.mark.leaks
@pytest.mark.parametrize(("holder", "run"), dict.fromkeys(PAIRS))
def test_what_a_hook_closes_over_is_an_operand(holder, run):
    with jax.checking_leaks():
        assert RUNS[run](loss(holder)).tolist() == [3.0] * 3


@pytest.mark.parametrize("run", ["jit of grad", "grad by both", "hessian", "jhop.jit"])
def test_function_with_a_custom_rule_closes_over_a_tracer(run):
    assert RUNS[run](lambda x, s: (2 * jhop.hook(x, custom_rule(s))).sum()).tolist() == [3.0] * 3


@pytest.mark.leaks
@pytest.mark.parametrize("holder", ["closure", "partial keyword", "bound method", "list", "jit"])
def test_compiled_again_with_another_value(holder):
    with jax.checking_leaks():
        grad = jax.jit(jax.grad(loss(holder)))
        assert [grad(X, s).tolist() for s in (1.5, 4.0)] == [[3.0] * 3, [8.0] * 3]


def test_object_dies_with_its_trace():
    class Big:
        def __init__(self, s):
            self.s = s
            made.append(weakref.ref(self))

        def hook(self, ct):
            return ct * self.s

    made = []
    jax.jit(jax.grad(lambda x, s: (2 * jhop.hook(x, Big(s).hook)).sum()))(X, 1.5)
    gc.collect()
    assert [ref() for ref in made] == [None]


# Several tracers, of several traces.


@pytest.mark.leaks
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_tracers_of_two_traces(jit):
    def outer(x, s):
        def inner(y, t):
            return (jhop.hook(x * y, lambda ct: ct * s * t * y)).sum()

        return jax.vmap(jax.grad(inner), (None, 0))(x, jnp.array([1.0, 2.0])).sum()

    # inner: (s t y) x, summed over t: 3 s x y at y = x.
    grad = jax.grad(outer, (0, 1))
    with jax.checking_leaks():
        by_x, by_s = (jax.jit(grad) if jit else grad)(X, jnp.float32(1.5))
    # The gradient of the inner gradient goes through the hook as well: d/dx of x * (s t y) is s t y, twice with y = x.
    assert by_s.shape == ()
    by_hand = jax.grad(lambda x, s: (3 * s * x * x).sum(), (0, 1))(X, jnp.float32(1.5))
    np.testing.assert_allclose(by_x, by_hand[0], rtol=1e-5)
    np.testing.assert_allclose(by_s, by_hand[1], rtol=1e-5)


@pytest.mark.leaks
def test_threshold_key_and_index_in_one_hook():
    def f(x, threshold, key, n):
        def hook(ct):
            return jnp.minimum(ct, threshold) + jax.random.normal(key, ct.shape) + n.astype(ct.dtype)

        return (jhop.hook(x, hook) * 5).sum()

    key = jax.random.key(1)
    expected = 4 + jax.random.normal(key, (3,)) + 7
    with jax.checking_leaks():
        for run in (jax.jit, lambda f: jhop.jit(f, fullgraph=True)):
            np.testing.assert_allclose(run(jax.grad(f))(X, 4.0, key, jnp.int32(7)), expected, rtol=1e-6)


@pytest.mark.parametrize("run", ["eager", "jhop.jit", "inline"])
def test_constant_closed_over_is_an_array_of_jax(run):
    """What a jaxpr holds of it is NumPy's, which no tracer indexes."""

    def f(x):
        table = jnp.array([3.0, 5.0])
        return (2 * jhop.hook(x, lambda ct: ct * table[(ct > 1).astype(jnp.int32)])).sum()

    under.agree(jax.tree.leaves(under.RUNS[run](jax.grad(f))(X))[0], jnp.full(3, 10.0))


def test_hook_is_restored():
    box = [0.0]

    def f(x, s):
        box[0] = s
        hook = functools.partial(times, s=s)
        y = jhop.hook(x, hook)
        assert (box[0] is s, hook.keywords["s"] is s) == (True, True)
        return (2 * y * s).sum()

    assert jax.jit(jax.grad(f))(X, 1.5).tolist() == [2 * 1.5 * 1.5] * 3


@pytest.mark.parametrize("where", ["attribute", "item", "global"])
def test_slot_that_is_gone_when_the_hook_runs_stays_away(where):
    space = {"attribute": types.SimpleNamespace(s=0), "item": {}, "global": types.ModuleType("space")}[where]
    table = space if where == "item" else vars(space)

    def f(x, s):
        table["s"] = s
        return (2 * jhop.hook(x, lambda ct: ct * (space["s"] if where == "item" else space.s))).sum()

    _, pull = jax.vjp(f, X, jnp.float32(1.5))
    del table["s"]
    assert pull(jnp.float32(1))[0].tolist() == [3.0] * 3
    assert "s" not in table


@pytest.mark.parametrize("alive", [True, False])
def test_object_that_is_held_weakly(alive):
    kept = []

    def f(x, s):
        scale = Scale(s)
        ref = weakref.ref(scale)
        kept.append(scale)
        return (2 * jhop.hook(x, lambda ct: ct * 5 if ref() is None else ct * ref().s)).sum()

    def run(x, s):
        _, pull = jax.vjp(f, x, s)
        if not alive:
            kept.clear()
        return pull(jnp.float32(1))[0]

    assert run(X, jnp.float32(1.5)).tolist() == [3.0 if alive else 10.0] * 3


# State beside a tracer: what others can see is written where they see it, or refused.


class Counting:
    def __init__(self):
        self.n = 0

    def hook(self, ct):
        self.n += 1
        return ct * self.s


@pytest.mark.parametrize("run", ["vmap", "jhop.jit", "grad by both"])
def test_object_that_others_see_is_written(run):
    meter = Counting()

    def f(x, s):
        meter.s = s
        return (2 * jhop.hook(x, meter.hook)).sum()

    how = {
        "vmap": lambda x, s: jax.vmap(jax.grad(f))(x[None], s[None])[0],
        "jhop.jit": jhop.jit(jax.grad(f), fullgraph=True),
        "grad by both": lambda x, s: jax.grad(f, (0, 1))(x, s)[0],
    }[run]
    for count in (1, 2):
        assert how(jnp.array(X), jnp.float32(1.5)).tolist() == [3.0] * 3
        assert meter.n == count


def test_object_that_nobody_else_sees_keeps_what_it_counts():
    def f(x, s):
        meter = Counting()
        meter.s = s
        return 2 * jhop.hook(x, lambda ct: meter.hook(ct) * meter.n)

    _, pull = jax.vjp(f, X, jnp.float32(1.5))
    assert [pull(jnp.ones(3))[0].tolist() for _ in range(2)] == [[3.0] * 3, [6.0] * 3]


def write_dict(s):
    box = {"s": s, "n": 0}

    def hook(ct):
        box["n"] += 1
        return ct * box["s"]

    return hook


def write_variable(s):
    def hook(ct):
        nonlocal s
        s = s * 2
        return ct * s

    return hook


def write_list(s):
    seen = [s]

    def hook(ct):
        seen.append(1)
        return ct * seen[0]

    return hook


def write_attribute(s):
    scale = Scale(s)

    def hook(ct):
        scale.s = scale.s * 2
        return ct * scale.s

    return hook


def write_function_attribute(s):
    def hook(ct):
        hook.n += 1
        return ct * hook.s

    hook.n, hook.s = 0, s
    return hook


def write_keyword(s):
    def hook(s, ct, *, n):
        made[0].keywords["n"] += 1
        return ct * s

    made = [None]
    made[0] = functools.partial(hook, s, n=0)
    return made[0]


WRITERS = [write_dict, write_variable, write_list, write_attribute, write_function_attribute, write_keyword]


@pytest.mark.parametrize("make", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("run", ["grad by both", "vmap of grad", "jit of grad", "jhop.jit"])
def test_state_in_what_holds_a_tracer_is_refused(make, run):
    with pytest.raises(jhop.Unsupported, match=r"hook.*` \(test_under_closures.py:\d+\) writes to .*object of its own"):
        RUNS[run](lambda x, s: (2 * jhop.hook(x, make(s))).sum())
