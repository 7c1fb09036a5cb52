"""Some hooks run on the host, or the backend is the user's: an error leaves all as it was, and nothing gets stale."""

import copy
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)


class Box:
    def __init__(self):
        self.n = 3
        self.log = [1.5]
        self.a = np.ones(3, np.float32)
        self.fixed = np.ones(3, np.float32)
        self.fixed.flags.writeable = False

    def on_host(self, ct):
        self.n += 1
        self.log.append(float(ct.sum()))
        self.a += 1
        return ct * 2.0

    def fails(self, ct):
        if float(ct.sum()) < 1e9:
            raise OverflowError("as it happens")

    def state(self):
        return self.n, self.log[:], self.a.tolist(), self.fixed.tolist()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("loop", [False, True])
def test_when_what_is_traced_cannot_be_written(loop):
    """One hook has run on the host when it shows that an array is read-only which another changes."""
    box, other = Box(), Box()

    def fills(ct):
        other.fixed += 1

    def program(x):
        if loop:
            body = lambda c, _: (jhop.hook(c * 1.5, box.on_host), None)  # noqa: E731
            return jax.lax.scan(body, jhop.hook(x, fills), None, length=2)[0].sum()
        return (jhop.hook(jhop.hook(x, box.on_host), fills) ** 2).sum()

    before, array = box.state(), box.a
    step = jhop.jit(jax.grad(program))
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            step(X)
        assert (box.state(), other.state()) == (before, Box().state())
        assert box.a is array
    other.fixed.flags.writeable = True
    step(X)
    assert (box.n, len(box.log), other.fixed.tolist()) == ((5, 3, [2.0] * 3) if loop else (4, 2, [2.0] * 3))


def plain(gm, example_inputs):
    return gm


@pytest.mark.parametrize("backend", ["xla", plain])
@pytest.mark.parametrize("captured", [False, True])
def test_when_a_hook_fails_in_a_graph_that_runs_on_the_host_as_a_whole(backend, captured):
    box = Box()

    def loss(x):
        z = x * 1.5
        z.register_hook(box.fails)
        y = jhop.numpy.sin(z)
        y.register_hook(box.on_host)
        return (y * y).sum()

    x = jhop.tensor(X, requires_grad=True)
    x.grad = X * 10.0
    before = box.state()
    for _ in range(2):
        y = (loss if captured else jhop.compile(loss, backend=backend))(x)
        with pytest.raises(OverflowError, match="as it happens"):
            if captured:
                with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, backend=backend)):
                    y.backward()
            else:
                y.backward()
        assert box.state() == before
        assert x.grad.tolist() == (X * 10.0).tolist()


@pytest.mark.parametrize("wrong", [lambda out: out[:1], lambda out: out.astype(jnp.int32)])
def test_when_a_backend_returns_what_the_graph_does_not(wrong):
    counter = SimpleNamespace(n=3, seen=jnp.zeros(3))

    def count(ct):
        counter.n += 1
        counter.seen = ct

    def backend(gm, example_inputs):
        def run(*flat):
            outs = gm(*flat)
            return [wrong(out) if jnp.ndim(out) else out for out in outs]

        return run

    x = jhop.tensor(X, requires_grad=True)
    x.register_hook(count)
    y = (x**2).sum()
    captured = jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, backend=backend, fullgraph=True))
    with captured, pytest.raises(jhop.JhopError, match=r"must return outputs of the graph's types, .* for output 0"):
        y.backward()
    assert (counter.n, counter.seen.tolist(), x.grad) == (3, [0.0] * 3, None)


def test_arrays_of_all_kinds():
    box = SimpleNamespace(
        masked=np.ma.array([1.0, 2.0, 3.0]),
        hidden=np.ma.array([1.0, 2.0, 3.0], mask=[True, False, False]),
        matrix=np.arange(2.0).view(np.matrix),
        objects=np.array([1, "one"], dtype=object),
        texts=(np.array(["a", "b"]),),
        rows=np.zeros(2, dtype=[("a", "f4")]),
    )

    def hook(ct):
        box.masked[0] = 7
        box.masked[1] = np.ma.masked
        box.hidden.mask[1] = True
        box.hidden.data[0] = 5
        box.matrix[0, 0] = 9
        box.objects[1] = ct
        box.texts[0][0] = "z"
        box.rows["a"][1] = float(ct.sum())
        raise LookupError("as it happens")

    before, held = copy.deepcopy(box), vars(box).copy()
    with pytest.raises(LookupError):
        jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))(X)
    assert all(vars(box)[name] is value for name, value in held.items())
    assert repr(box) == repr(before)
    assert box.hidden.data.tolist() == [1.0, 2.0, 3.0]


def grows_list(box):
    box.seen.setdefault("x", []).append(1)


def grows_entry(box):
    if not box.rows:
        box.rows.append({"k": ([0],)})
    box.rows[0]["k"][0][0] += 1


def grows_attribute(box):
    if not hasattr(box, "made"):
        box.made = SimpleNamespace(log=[])
    box.made.log.append(1)


def takes_the_place_of_a_number(box):
    box.leaf = box.leaf if isinstance(box.leaf, list) else []
    box.leaf.append(1)


@pytest.mark.parametrize("write", [grows_list, grows_entry, grows_attribute, takes_the_place_of_a_number])
@pytest.mark.parametrize("captured", [False, True])
def test_what_an_earlier_run_has_made(write, captured):
    box = SimpleNamespace(seen={}, rows=[], leaf=3)

    def hook(ct):
        write(box)
        if float(ct[0]) > 100.0:
            raise LookupError("as it happens")

    grad = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))

    def backward(x):
        x = jhop.tensor(x, requires_grad=True)
        x.register_hook(hook)
        with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm)):
            (x * x).sum().backward()

    step = backward if captured else grad
    step(X)
    before = copy.deepcopy(box)
    for _ in range(2):
        with pytest.raises(LookupError):
            step(X * 1000.0)
        assert box == before
    step(X)
    assert box != before


@pytest.mark.parametrize("host_first", [False, True])
@pytest.mark.parametrize("moves", ["on_host", "traced", "array", "view"])
def test_a_hook_on_the_host_that_comes_to_share_state_with_one_that_is_traced(moves, host_first):
    def begin(n):
        return SimpleNamespace(own=SimpleNamespace(n=n, a=np.full(3, n, np.float32)))

    results = []
    for compiles in (False, True):
        ours, theirs = begin(100), begin(3)
        own = (ours if moves != "traced" else theirs).own

        def on_host(ct, ours=ours):
            ours.own.n += 1
            ours.own.a += 2
            print("", end="")
            return ct * ours.own.n + ours.own.a

        def traced(ct, theirs=theirs):
            theirs.own.n += 10
            theirs.own.a += 20
            return ct * theirs.own.n - theirs.own.a

        hooks = (on_host, traced) if host_first else (traced, on_host)
        step = jax.grad(lambda x, hooks=hooks: (jhop.hook(jhop.hook(x, hooks[0]), hooks[1]) * 1.0).sum())
        step = jhop.jit(step) if compiles else step
        seen = []
        for together in (False, True, True, False):
            if moves == "on_host":
                ours.own = theirs.own if together else own
            elif moves == "traced":
                theirs.own = ours.own if together else own
            elif together:
                ours.own.a = theirs.own.a if moves == "array" else theirs.own.a[:]
            state = [(each.own.n, each.own.a.tolist()) for each in (ours, theirs)]
            seen.append((step(X).tolist(), state))
        seen.append([(each.own.n, each.own.a.tolist()) for each in (ours, theirs)])
        results.append(seen)
        if compiles:
            assert step.versions() == 2
            assert "a hook on the host and one that is traced now share state" in str(jhop.explain(step))
    assert results[0] == results[1]
