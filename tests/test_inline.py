"""`jhop.inline`: hooks become equations at any depth, the state they touch becomes inputs and outputs."""

import functools
from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import make_mesh

import jhop
from jhop import _inline

X = np.array([1.0, 2.0, 3.0], np.float32)


def capture(hook):
    return jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook))(X)


def stateful():
    box = Box(n=3, x=0.5, a=jnp.ones(3))

    def hook(ct):
        box.n += 1
        box.a = box.a + ct
        return ct * box.x + box.a

    return box, hook


def test_state_inputs_are_named_by_access_path():
    _, hook = stateful()
    inlined = jhop.inline(capture(hook))
    path = "L['hooks'][0].__closure__[0].cell_contents"
    assert [given.source for given in inlined.inputs if given.role == "state"] == [f"{path}.{k}" for k in "nxa"]


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda box, fn: fn, "L['hooks'][0].__closure__[0].cell_contents.k"),
        (lambda box, fn: functools.partial(lambda ct, obj: ct * obj.k, obj=box),
         "L['hooks'][0].keywords['obj'].k"),
        (lambda box, fn: functools.partial(lambda obj, ct: ct * obj.k, box), "L['hooks'][0].args[0].k"),
        (lambda box, fn: lambda ct, obj=box: ct * obj.k, "L['hooks'][0].__defaults__[0].k"),
        (lambda box, fn: lambda ct, *, obj=box: ct * obj.k, "L['hooks'][0].__kwdefaults__['obj'].k"),
    ],
    ids=["closure", "keyword", "position", "default", "keyword default"],
)  # fmt: skip
def test_access_path(make, path):
    box = Box(k=2.0)
    inlined = jhop.inline(capture(make(box, lambda ct: ct * box.k)))
    assert [given.source for given in inlined.inputs if given.role == "state"] == [path]


def test_inlined_graph_is_a_function_of_its_state():
    _, hook = stateful()
    inlined = jhop.inline(capture(hook))
    out, n, a = inlined(X, 10, 0.25, jnp.zeros(3))
    assert (out.tolist(), n, a.tolist()) == ((X * 0.25 + X).tolist(), 11, X.tolist())


def test_inlined_graph_keeps_ints_exact():
    _, hook = stateful()
    assert jhop.inline(capture(hook))(X, 2**31 - 1, 0.25, jnp.zeros(3))[1] == 2**31


def test_inlining_and_calling_change_no_object():
    box, hook = stateful()
    array = box.a
    inlined = jhop.inline(capture(hook))
    inlined(X, 10, 0.25, jnp.zeros(3))
    assert (box.n, box.x, box.a is array) == (3, 0.5, True)


def test_inlined_graph_without_its_state_is_refused():
    _, hook = stateful()
    with pytest.raises(jhop.JhopError, match="4 inputs"):
        jhop.inline(capture(hook))(X)


def test_state_that_is_not_read_is_no_input():
    box = Box(used=2.0, unused=jnp.ones(3))

    def hook(ct):
        if box.used is None:
            return ct * box.unused
        return ct * box.used

    inlined = jhop.inline(capture(hook))
    assert [given.source.rpartition(".")[2] for given in inlined.inputs[1:]] == ["used"]


def test_arrays_are_inputs_and_no_constants():
    box = Box(a=jnp.arange(3.0), b=np.arange(3, dtype=np.float32))
    inlined = jhop.inline(capture(lambda ct: ct * box.a + box.b))
    assert (len(inlined.inputs), list(inlined.jaxpr.consts)) == (3, [])


def test_inlining_twice_gives_the_same():
    _, hook = stateful()
    gm = capture(hook)
    assert jhop.inline(gm).code == jhop.inline(gm).code


def test_captured_graph_is_unchanged():
    _, hook = stateful()
    gm = capture(hook)
    before = str(gm.jaxpr)
    jhop.inline(gm)
    assert str(gm.jaxpr) == before and len(gm.inputs) == 1


# Hooks inside other equations.


def square(y):
    return (y**2).sum()


PLACE = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
NESTED = {
    "scan": lambda hook: lambda x: lax.scan(lambda c, _: (hook(c) * 1.5, None), x, None, length=3)[0].sum(),
    "scan over inputs": lambda hook: lambda x: square(lax.scan(lambda c, y: (c, hook(y) * 2.0), 0.0, x)[1]),
    "cond": lambda hook: lambda x: lax.cond(x[0] > 0, lambda c: hook(c) * 2.0, lambda c: c * 3.0, x).sum(),
    "switch": lambda hook: lambda x: lax.switch(1, [lambda c: c, lambda c: hook(c) * 2.0], x).sum(),
    "fori": lambda hook: lambda x: lax.fori_loop(0, 3, lambda i, c: hook(c) * 1.5, x).sum(),
    "map": lambda hook: lambda x: lax.map(lambda c: hook(c) * 2.0, x).sum(),
    "jit": lambda hook: lambda x: jax.jit(lambda c: hook(c) * 2.0)(x).sum(),
    "jit in jit": lambda hook: lambda x: jax.jit(lambda d: jax.jit(lambda c: hook(c) * 2.0)(d) * 2.0)(x).sum(),
    "jit with shardings": lambda hook: lambda x: jax.jit(
        lambda c: hook(c) * 2.0, in_shardings=PLACE, out_shardings=PLACE)(x).sum(),
    "jit in jit with shardings": lambda hook: lambda x: jax.jit(
        lambda d: jax.jit(lambda c: hook(c) * 2.0)(d) * 2.0, out_shardings=PLACE)(x).sum(),
    "jit in scan": lambda hook: lambda x: lax.scan(
        lambda c, _: (jax.jit(lambda d: hook(d) * 1.5)(c), None), x, None, length=3)[0].sum(),
    "remat": lambda hook: lambda x: jax.checkpoint(lambda c: jnp.sin(hook(c) * 2.0))(x).sum(),
    "vmap": lambda hook: lambda x: jax.vmap(lambda c: hook(c) * 2.0)(x).sum(),
    "custom_jvp": lambda hook: lambda x: jax.nn.relu(hook(x)).sum(),
}  # fmt: skip


def while_around_a_gradient(hook):
    def loop(x):
        def body(carry):
            return carry[0] + 1, jax.grad(lambda y: square(hook(y)))(carry[1]) * 0.1

        return lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]

    return loop


def nested(kind, fn):
    def hook(y):
        return jhop.hook(y, fn)

    return while_around_a_gradient(hook) if kind == "while" else jax.grad(NESTED[kind](hook))


KINDS = [*NESTED, "while"]
READS = {
    "nothing": (lambda: Box(k=2.0), lambda box, ct: ct * 2.0, lambda box: None),
    "a number": (lambda: Box(k=2.0), lambda box, ct: ct * box.k, lambda box: setattr(box, "k", 3.0)),
    "an array": (lambda: Box(k=jnp.float32(2.0)), lambda box, ct: ct * box.k, lambda b: setattr(b, "k", b.k + 1)),
    "a NumPy array": (lambda: Box(k=np.float32([2.0])), lambda box, ct: ct * box.k[0], lambda box: box.k.fill(3.0)),
    "a branch": (lambda: Box(k=2), lambda box, ct: ct * (2.0 if box.k > 2 else 5.0), lambda b: setattr(b, "k", 3)),
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("kind", KINDS)
def test_nested_hook_reads_state(kind, reads):
    make, body, change = READS[reads]
    box = make()
    fn = nested(kind, lambda ct: body(box, ct))
    compiled = jhop.jit(fn, fullgraph=True)
    for _ in range(2):
        np.testing.assert_allclose(compiled(X), fn(X), rtol=1e-6)
        change(box)


WRITES = {
    "a counter": lambda box, ct: setattr(box, "n", box.n + 1),
    "an array": lambda box, ct: setattr(box, "a", box.a + 1.0),
    "a constant": lambda box, ct: setattr(box, "flag", not box.flag),
    "the cotangent": lambda box, ct: setattr(box, "last", ct),
    "a list": lambda box, ct: box.items.append(1),
    "a new dict key": lambda box, ct: box.table.update(k=1),
}


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("jit") and "scan" not in kind])
def test_hook_inside_a_jit_writes_state(kind, writes):
    boxes = [Box(n=0, a=jnp.zeros(()), flag=False, last=None, items=[], table={}) for _ in range(2)]

    def hook_of(box):
        def hook(ct):
            WRITES[writes](box, ct)
            return ct * 2.0

        return hook

    compiled = jhop.jit(nested(kind, hook_of(boxes[0])), fullgraph=True)
    eager = jax.grad(lambda x: (jhop.hook(x * 3.0, hook_of(boxes[1])) ** 2).sum())
    for _ in range(3):
        compiled(X)
        eager(X)
    assert boxes[0].n == boxes[1].n
    assert (boxes[0].flag, boxes[0].items, boxes[0].table) == (boxes[1].flag, boxes[1].items, boxes[1].table)
    assert float(boxes[0].a) == float(boxes[1].a)
    assert (boxes[0].last is None) == (boxes[1].last is None)


def test_jits_that_say_how_to_shard_and_donate_while_hooks_write(monkeypatch):
    """Values are sharded as each of them says, donated or not, and the graph is traced once."""
    mesh = make_mesh((8,), ("d",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    box, runs, run = Box(n=0), [], _inline._Inliner.run
    monkeypatch.setattr(_inline._Inliner, "run", lambda self, avals: (runs.append(1), run(self, avals))[1])

    def count(ct):
        box.n += 1
        return ct * 2.0

    inner = jax.jit(lambda c: jhop.trace_wrapped(c, fn=count) * 3.0, out_shardings=spread, donate_argnums=0)
    compiled = jhop.jit(lambda x: [inner(x + float(i)) for i in range(4)], fullgraph=True)
    x = jnp.arange(8.0)
    for calls in (4, 8):
        for i, out in enumerate(compiled(x)):
            np.testing.assert_allclose(out, 6.0 * (x + float(i)))
            assert out.sharding.is_equivalent_to(spread, 1)
        assert box.n == calls
    assert len(runs) == 1


def test_hook_inside_a_hook_writes_state():
    found = []
    for compile in (lambda fn: fn, lambda fn: jhop.jit(fn, fullgraph=True)):
        box = Box(n=0)

        def inner(ct, box=box):
            box.n += 10
            return ct * 2.0

        def outer(ct, box=box, inner=inner):
            box.n += 1
            return jhop.trace_wrapped(ct, fn=inner) * box.n

        fn = compile(jax.grad(lambda x, outer=outer: (jhop.hook(x, outer) ** 2).sum()))
        found.append(([fn(X).tolist() for _ in range(3)], box.n))
    assert found[1] == found[0]


def test_hook_that_differentiates_with_a_hook():
    box = Box(k=2.0)

    def outer(ct):
        return jax.grad(lambda y: (jhop.hook(y, lambda c: c * box.k) ** 2).sum())(ct)

    fn = jax.grad(lambda x: (jhop.hook(x, outer) ** 2).sum())
    compiled = jhop.jit(fn, fullgraph=True)
    for k in (2.0, 3.0):
        box.k = k
        np.testing.assert_allclose(compiled(X), fn(X))
