"""Hooks that cannot be traced, without `fullgraph=True`: they run on the host at each run, the rest stays compiled."""

import array
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_state_control_flow import JAX, PYTHON
from under import make_mesh

import jhop

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)


def compiled(program, *hooks, **options):
    """Calls `jhop.jit` of the gradient, and collects the warnings of the first call in `.warnings`."""
    step = jhop.jit(jax.grad(lambda x: program(x, *hooks)), **options)

    def call(*args):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = step(*args)
        call.warnings += [str(warning.message) for warning in caught]
        call.places += [warning.filename for warning in caught]
        return out

    call.warnings, call.places, call.step = [], [], step
    return call


def chain(x, *hooks):
    for i, hook in enumerate(hooks):
        x = jhop.hook(jnp.sin(x) * (1.5 + i), hook)
    return (x**2).sum()


def agree(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5)


class Prints:
    """Prints, and looks at values."""

    def __init__(self):
        self.calls = 0

    def __call__(self, ct):
        self.calls += 1
        print(f"call {self.calls}: {float(ct[0]):.3f}")
        return ct * (2.0 if ct.sum() > 0 else 3.0)


def test_each_hook_is_warned_of_once_in_all_graphs_of_a_function(capsys):
    first, second = Prints(), lambda ct: print("second") or ct
    step = compiled(chain, first, second)
    for size in (3, 3, 4, 5):
        step(jnp.ones(size))
    assert [message.split(" runs on the host")[0].split("`")[1] for message in step.warnings] == ["<lambda>", "Prints"]
    assert len(capsys.readouterr().out.splitlines()) == 8


def test_hook_runs_at_each_run_and_the_rest_is_compiled(capsys):
    traced, box = [], types.SimpleNamespace(n=0)

    def counts(ct):
        box.n += 1
        traced.append(jnp.shape(ct))
        return ct * 1.25

    def clips(ct):
        return ct.clip(-2.0, 2.0)

    own, theirs = Prints(), Prints()
    step = compiled(chain, counts, own, clips, counts)
    for i in range(3):
        x = X * (i + 1)
        got = step(x)
        printed = capsys.readouterr().out
        n = len(traced)
        agree(got, jax.grad(lambda x: chain(x, counts, theirs, clips, counts))(x))
        assert printed == capsys.readouterr().out != ""
        del traced[n:]
    assert (own.calls, box.n) == (3, 12)
    assert len(step.warnings) == 1
    assert step.warnings[0].startswith("hook `Prints` (test_host.py:") and "it reads the value" in step.warnings[0]
    assert step.places == [__file__]


def test_each_such_hook_is_warned_of_once():
    def first(ct):
        print("first", end="")
        return ct * 2

    def second(ct):
        return ct * float(ct.max())

    step = compiled(chain, first, lambda ct: ct * 3, second)
    for _ in range(3):
        step(X)
    assert [warning.split("`")[1].rpartition(".")[2] for warning in step.warnings] == ["second", "first"]
    agree(step(X), jax.grad(lambda x: chain(x, first, lambda ct: ct * 3, second))(X))


def test_order_is_that_of_eager():
    def program(make):
        order = []

        def hook(name):
            def on_host(ct):
                order.append((name, float(ct[0])))
                return ct * 2

            return on_host

        fn = make(jax.grad(lambda x: chain(x, hook("a"), lambda ct: ct * 3, hook("b"), hook("c"))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = fn(X)
        return out, order

    (got, ours), (expected, theirs) = program(jhop.jit), program(lambda fn: fn)
    agree(got, expected)
    assert [name for name, _ in ours] == [name for name, _ in theirs] == ["c", "b", "a"]
    agree([value for _, value in ours], [value for _, value in theirs])


def sharing(box):
    """One hook that can be traced, and one that cannot; each sees what the other did."""

    def counts(ct):
        box.n += 1
        return ct * box.n

    def tells(ct):
        box.n *= 10
        print(box.n, end=" ")
        return ct + box.n

    return counts, tells, counts


def test_hooks_that_share_state_go_to_the_host_together(capsys):
    boxes = types.SimpleNamespace(n=1), types.SimpleNamespace(n=1)
    step = compiled(chain, *sharing(boxes[0]))
    for _ in range(3):
        got = step(X)
        ours = capsys.readouterr().out
        agree(got, jax.grad(lambda x: chain(x, *sharing(boxes[1])))(X))
        assert (boxes[0].n, ours) == (boxes[1].n, capsys.readouterr().out)
    assert any("it shares" in warning and ".n`" in warning for warning in step.warnings)


def test_error_is_the_hook_s_own_and_nothing_was_written():
    box, log = types.SimpleNamespace(n=0), types.SimpleNamespace(calls=0, seen=[])

    def counts(ct):
        box.n += 1
        return ct * 2

    def fails(ct):
        log.calls += 1
        log.seen.append(float(ct[0]))
        if log.calls == 2:
            raise ZeroDivisionError("as it happens")
        return ct * 3

    step = compiled(chain, fails, counts)
    first = step(X)
    with pytest.raises(ZeroDivisionError, match="as it happens"):
        step(X)
    assert (box.n, log.calls, len(log.seen)) == (1, 1, 1)
    log.calls = 7
    agree(step(X), first)
    assert (box.n, log.calls, len(log.seen)) == (2, 8, 2)


@pytest.mark.parametrize("loop", [False, True])
def test_error_undoes_what_was_written_in_place(loop):
    box = types.SimpleNamespace(seen=np.zeros(3), pair=(np.ones(2), 5), all=[np.arange(2.0)])
    box.bytes, box.numbers = bytearray(b"ab"), array.array("d", [1.0])
    before = [box.seen, box.pair[0], box.all[0], box.bytes, box.numbers]
    contents = [value.copy() if isinstance(value, np.ndarray) else value[:] for value in before]

    def fails(ct):
        box.seen[1] = float(ct[0])
        box.pair[0][:] = 7
        box.all[0] += 3
        box.seen = np.full(3, 4.0)
        box.bytes.append(1)
        box.numbers[0] += 1
        raise LookupError("as it happens")

    def program(x):
        if not loop:
            return (jhop.hook(x * 1.5, fails) ** 2).sum()
        return jax.lax.scan(lambda c, _: (jhop.hook(c * 1.5, fails), None), x, None, length=2)[0].sum()

    with pytest.raises(LookupError), pytest.warns(UserWarning):
        jhop.jit(jax.grad(program))(X)
    now = [box.seen, box.pair[0], box.all[0], box.bytes, box.numbers]
    assert [id(value) for value in now] == [id(value) for value in before]
    for value, content in zip(now, contents, strict=True):
        np.testing.assert_array_equal(value, content)


def test_state_that_nobody_can_lift():
    box = types.SimpleNamespace(lock=threading.Lock(), n=0)

    def locks(ct):
        with box.lock:
            box.n += 1
        return ct * 2

    step = compiled(chain, locks, lambda ct: ct * 3)
    for _ in range(2):
        agree(step(X), jax.grad(lambda x: chain(x, lambda ct: ct * 2, lambda ct: ct * 3))(X))
    assert box.n == 2
    assert len(step.warnings) == 1 and "locks" in step.warnings[0]


def test_hook_in_an_inner_jit_and_with_a_tracer():
    """What it closes over is there as a value."""

    def program(x, seen, jit):
        scale = x[2] * 2

        def hook(ct):
            seen.append(float(scale))
            return ct * scale

        return (jit(lambda x: jhop.hook(jnp.sin(x), hook) * 3)(x) ** 2).sum()

    seen = [], []
    step = compiled(program, seen[0], jax.jit)
    for x in (X, X * 2):
        agree(step(x), jax.grad(lambda x: program(x, seen[1], lambda fn: fn))(x))
    assert seen[0] == seen[1] == [4.0, 8.0]


def test_arguments_results_and_static_arguments():
    def hook(ct):
        print(end="")
        return jax.tree.map(lambda leaf: leaf * 2, ct)

    def loss(params, x, *, power, scale):
        params = jhop.hook(params, hook)
        return (scale * params["w"] * x + params["b"][0]).sum() ** power, {"aux": x + 1}

    def of(fn):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fn({"w": X, "b": [X * 3]}, X, power=2, scale=jnp.float32(1.5))

    grad = jax.value_and_grad(loss, has_aux=True)
    jax.tree.map(agree, of(jhop.jit(grad, static_argnames="power")), of(grad))


# Inside loops and branches the compiled program calls the hook back.


def in_scan(flow, point, x):
    def body(c, s):
        c = point(jnp.sin(c) * s)
        return c, c.sum()

    c, ys = flow.scan(body, x, jnp.array([1.5, 0.5, 2.0]))
    return (c**2).sum() + ys.sum()


def in_cond_in_scan(flow, point, x):
    def body(c, s):
        return flow.cond(s > 1, lambda c: point(c * s), lambda c: c * s, c), None

    return (flow.scan(body, x, jnp.array([1.5, 0.5, 2.0, 0.25]))[0] ** 2).sum()


def in_checkpoint(flow, point, x):
    return (flow.checkpoint(lambda x: jnp.sin(point(jnp.sin(x) * 3)))(x) ** 2).sum()


def in_checkpoint_in_scan(flow, point, x):
    body = flow.checkpoint(lambda c, s: (point(jnp.sin(c) * s), None))
    return (flow.scan(body, point(x), jnp.array([1.5, 0.5, 2.0]))[0] ** 2).sum()


INSIDE = [in_scan, in_cond_in_scan, in_checkpoint, in_checkpoint_in_scan]


def shouting(box, own):
    """Prints what it saw, and counts; beside it, a hook that can be traced counts on its own."""

    def shouts(ct):
        box.calls += 1
        print(f"{box.calls}: {float(ct.sum()):.4f}")
        return ct * (2.0 if box.calls % 2 else 0.5)

    def counts(ct):
        own.n += 1
        return ct * 1.25

    def point(value):
        return jhop.hook(jhop.hook(value, shouts), counts)

    return point


class Counter:
    def __init__(self):
        self.calls = self.n = 0


@pytest.mark.parametrize("program", INSIDE)
def test_inside_a_loop_or_a_branch(program, capsys):
    ours, theirs = (Counter(), Counter()), (Counter(), Counter())
    points = shouting(*ours), shouting(*theirs)
    step = compiled(lambda x: program(JAX, points[0], x))
    for i in range(3):
        got = step(X * (1 + i))
        printed = capsys.readouterr().out
        agree(got, jax.grad(lambda x: program(PYTHON, points[1], x))(X * (1 + i)))
        assert printed == capsys.readouterr().out != ""
        assert [vars(box) for box in ours] == [vars(box) for box in theirs]
    assert len(step.warnings) == 1 and "calls back" in step.warnings[0]


@pytest.mark.parametrize("program", INSIDE)
def test_error_inside_is_the_hook_s_own_and_nothing_was_written(program):
    box = types.SimpleNamespace(calls=0, fails=-1, n=0)

    def fails(ct):
        box.calls += 1
        print(end="")
        if box.calls == box.fails:
            raise LookupError("as it happens")
        return ct * 2

    def counts(ct):
        own.n += 1
        return ct

    own = types.SimpleNamespace(n=0)
    step = compiled(lambda x: program(JAX, lambda v: jhop.hook(jhop.hook(v, counts), fails), x))
    first, calls, n = step(X), box.calls, own.n
    box.fails = 2 * calls
    with pytest.raises(LookupError, match="as it happens"):
        step(X)
    assert (box.calls, own.n) == (calls, n)
    box.fails = -1
    agree(step(X), first)
    assert (box.calls, own.n) == (2 * calls, 2 * n)


def told(seen):
    """A hook that looks at values, and notes how its cotangent is sharded."""

    def hook(ct):
        seen.append((getattr(ct.sharding, "spec", None), float(ct[0])))
        return ct * 1.25

    return hook


@pytest.mark.filterwarnings("ignore:hook .* runs on the host")
@pytest.mark.parametrize("loop", [False, True])
def test_shardings_and_donation(loop):
    mesh = make_mesh((4,), ("a",))
    rows, whole = NamedSharding(mesh, P("a")), NamedSharding(mesh, P())
    seen = []

    def loss(params, power, *, scale=1.0):
        w = params["w"] * params["b"]
        if loop:
            w, _ = jax.lax.scan(lambda c, _: (jhop.hook(c * 1.5, told(seen)), None), w, None, length=2)
        else:
            w = jhop.hook(w * 1.5, told(seen))
        return (w**power).sum() * scale

    gradient = jax.value_and_grad(loss)
    params = {"w": np.arange(8, dtype=np.float32), "b": np.full(8, 0.5, np.float32)}
    places = {"w": rows, "b": whole}
    step = jhop.jit(
        gradient, static_argnums=1, in_shardings=(places,), out_shardings=(whole, places), donate_argnums=0
    )
    with jax.disable_jit():
        value, expected = gradient(jax.tree.map(jnp.asarray, params), 2)
    for _ in range(2):
        given = jax.tree.map(lambda leaf, place: jax.device_put(leaf, place), params, places)
        got, grads = step(given, 2)
        assert all(leaf.is_deleted() for leaf in given.values())
        assert {name: grad.sharding.spec for name, grad in grads.items()} == {"w": P("a"), "b": P()}
        assert got.sharding.spec == P()
        agree(got, value)
        jax.tree.map(agree, grads, expected)
    if not loop:
        assert {spec for spec, _ in seen if spec} == {P("a")}
    with pytest.raises(ValueError, match="does not match the sharding"):
        step(jax.device_put(params, whole), 2)


@pytest.mark.filterwarnings("ignore:hook .* runs on the host")
def test_donation_by_name_and_no_more():
    def loss(x, *, scale, other):
        return (jhop.hook(x * 1.5, Prints()) ** 2).sum() * scale + other

    step = jhop.jit(jax.grad(loss), donate_argnames="scale")
    x, scale, other = X + 0, jnp.array(2.0), jnp.array(3.0)
    agree(step(x, scale=scale, other=other), jax.grad(loss)(X, scale=2.0, other=3.0))
    assert [array.is_deleted() for array in (x, scale, other)] == [False, True, False]


@pytest.mark.filterwarnings("ignore:.*runs? on the host")
def test_options_hold_where_no_part_is_compiled():
    lock = threading.Lock()

    def hook(ct):
        with lock:
            return ct * 2

    place = NamedSharding(make_mesh((4,), ("a",)), P("a"))
    step = jhop.jit(jax.grad(lambda x: (jhop.hook(x * 1.5, hook) ** 2).sum()), out_shardings=place)
    assert step(jnp.arange(8.0)).sharding.spec == P("a")


def test_not_under_vmap_and_not_in_shard_map():
    def hook(ct):
        print("never", end="")
        return ct

    mapped = jhop.jit(jax.vmap(jax.grad(lambda x: jhop.hook(jnp.sin(x), hook) ** 2)))
    with pytest.raises(jhop.Unsupported, match=r"under jax\.vmap it cannot run on the host") as caught:
        mapped(X)
    assert "print" in str(caught.value.__cause__)
    mesh = make_mesh((4,), ("a",))
    sharded = jax.shard_map(lambda x: jhop.hook(jnp.sin(x), hook) ** 2, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    with pytest.raises(jhop.Unsupported, match=r"inside shard_map it cannot run on the host"):
        jhop.jit(jax.grad(lambda x: sharded(x).sum()))(jnp.arange(8.0))


def test_ahead_of_time_there_is_no_host():
    def hook(ct):
        print("never", end="")
        return ct

    step = jhop.jit(jax.grad(lambda x: chain(x, hook)))
    with pytest.raises(jhop.Unsupported, match="print"):
        step.lower(X)


def test_ahead_of_time_after_a_run_on_the_host():
    def hook(ct):
        return ct * float(ct.sum())

    step = compiled(chain, hook)
    step(X)
    for _ in range(2):
        with pytest.raises(jhop.Unsupported, match="reads the value") as caught:
            step.step.lower(X)
        assert isinstance(caught.value.__cause__, jax.errors.ConcretizationTypeError)


@pytest.mark.parametrize("backend", ["xla", "eager", "aot_eager"])
def test_compiled_functions_of_tensors(backend, capsys):
    box = types.SimpleNamespace(n=0)

    def counts(ct):
        box.n += 1
        return ct * 2

    def prints(ct):
        print(f"{float(ct[0]):.1f}", end=" ")
        return ct + 1

    def loss(x):
        y = x * 3.0
        y.register_hook(prints)
        z = y * y
        z.register_hook(counts)
        return z.sum()

    results = []
    for fn in (loss, jhop.compile(loss, backend=backend)):
        x = jhop.tensor([1.0, 2.0], requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fn(x).backward()
        results.append((x.grad.tolist(), capsys.readouterr().out))
    assert results[0] == results[1]
    assert box.n == 2


def test_backend_of_the_user_gets_no_part_of_a_graph(capsys):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm

    def hook(ct):
        print("hook", end="")
        return ct * 2

    def loss(x):
        y = x * 3.0
        y.register_hook(hook)
        return (y * y).sum()

    x = jhop.tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(UserWarning, match="one operation at a time"):
        jhop.compile(loss, backend=backend)(x).backward()
    assert (x.grad.tolist(), capsys.readouterr().out) == ([36.0, 72.0], "hook")
