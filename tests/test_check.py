"""`jhop.check`: assertions about traced values, wherever they stand; what failed is told after the run."""

import functools
import pickle
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec

import jhop


def below(x, limit, text="{x:.1f} is too large"):
    """`x`, checked."""
    jhop.check(x < limit, text, x=x)
    return x


def hooked(limit, state=None):
    """x ** 2, whose cotangent is checked, counted in `state` and made ten times as large."""

    def hook(ct):
        if state is not None:
            state.n += 1
        return below(ct, limit) * 10.0

    return lambda x: jhop.hook(x, hook) ** 2


def scanned(x):
    """Squares three times: 1.1, 1.21, 1.4641."""
    return lax.scan(lambda c, i: (below(c, 1.4, "{x:.4f} is too large") ** 2, None), x, None, length=3)[0]


def branched(x):
    return lax.cond(x > 0.0, lambda x: below(x, 5.0) * 3.0, lambda x: -below(-x, 7.0), x)


def looped(x):
    """Doubles until it is at least 40, and never what is that large."""
    return lax.while_loop(lambda c: c < 40.0, lambda c: below(c, 35.0) * 2.0, x)


# (program, argument for which the checks hold, result, argument for which one does not, what the error says)
PROGRAMS = {
    "top": (lambda x: below(x, 3.0) * 2.0, 2.0, 4.0, 4.0, "4.0 is"),
    "derivative": (jax.grad(lambda x: below(x * x, 9.0) * 2.0), 2.0, 8.0, 4.0, "16.0 is"),
    "second derivative": (jax.grad(jax.grad(lambda x: below(x**3, 9.0))), 2.0, 12.0, 3.0, "27.0 is"),
    "forward": (lambda x: jax.jvp(lambda x: below(x * x, 9.0), (x,), (1.0,))[1], 2.0, 4.0, 4.0, "16.0 is"),
    "of a tangent": (lambda x: below(jax.jvp(lambda x: x * x, (x,), (1.0,))[1], 7.0), 2.0, 4.0, 4.0, "8.0 is"),
    "hook": (jax.grad(hooked(5.0)), 2.0, 40.0, 3.0, "6.0 is"),
    "hook, second derivative": (jax.grad(jax.grad(hooked(5.0))), 2.0, 20.0, 3.0, "6.0 is"),
    "scan": (scanned, 1.0, 1.0, 1.1, "1.4641 is"),
    "scan, derivative": (jax.grad(scanned), 1.0, 8.0, 1.1, "1.4641 is"),
    "hook in a scan": (
        jax.grad(lambda x: lax.scan(lambda c, _: (hooked(150.0)(c), None), x, None, length=2)[0]),
        1.0, 400.0, 2.0, "320.0 is",
    ),
    "cond": (branched, 4.0, 12.0, 6.0, "6.0 is"),
    "cond, other branch": (branched, -6.0, -6.0, -8.0, "8.0 is"),
    "while": (looped, 5.0, 40.0, 18.0, "36.0 is"),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, c: below(c, 4.5) * 2.0, x), 1.0, 8.0, 2.0, "8.0 is"),
    "checkpoint": (jax.grad(jax.checkpoint(lambda x: jnp.sin(below(x, 3.0)) ** 2)), 0.0, 0.0, 4.0, "4.0 is"),
    "scan of checkpoints": (jax.grad(jax.checkpoint(scanned)), 1.0, 8.0, 1.1, "1.4641 is"),
    "jit": (jax.jit(lambda x: below(x, 3.0) * 2.0), 2.0, 4.0, 4.0, "4.0 is"),
    "jhop.jit": (jhop.jit(lambda x: below(x, 3.0) * 2.0), 2.0, 4.0, 4.0, "4.0 is"),
    "scan in cond": (
        lambda x: lax.cond(x < 2.0, scanned, lambda x: x, x), 3.0, 3.0, 1.1, "1.4641 is",
    ),
    "cond in scan": (
        lambda x: lax.scan(lambda c, i: (branched(c * i), None), x, jnp.float32([1, -1, 1]))[0],
        1.0, -3.0, 4.0, "12.0 is",
    ),
}  # fmt: skip
each_program = pytest.mark.parametrize("name", PROGRAMS)


# With JAX_CHECK_TRACER_LEAKS, JAX finds fault with effects in a scan that is differentiated (of its own too), and with
# comparisons in a hook that is differentiated: jhop notes operators until the hook is done.
LEAKY = {"scan, derivative", "hook, second derivative"}


@pytest.mark.parametrize("name", [n if n in LEAKY else pytest.param(n, marks=pytest.mark.leaks) for n in PROGRAMS])
def test_what_fails_is_raised_after_the_run(name):
    program, good, result, bad, text = PROGRAMS[name]
    run = jhop.jit(program, fullgraph=True)
    assert float(run(good)) == result
    with pytest.raises(jhop.CheckError, match=text):
        run(bad)
    assert float(run(good)) == result  # also on the quick way
    with pytest.raises(jhop.CheckError, match=text):
        run(bad)
    assert run.versions() == 1


@each_program
def test_under_vmap_any_example_counts_by_what_it_runs(name):
    program, good, result, bad, text = PROGRAMS[name]
    run = jhop.jit(jax.vmap(program), fullgraph=True)
    assert run(jnp.float32([good, good])).tolist() == [result, result]
    with pytest.raises(jhop.CheckError, match=text):
        run(jnp.float32([good, bad, good]))


@each_program
def test_checkify_sees_checks_of_what_jax_jit_compiles(name):
    program, good, result, bad, text = PROGRAMS[name]
    run = checkify.checkify(jax.jit(program))
    error, out = run(good)
    assert (error.get(), float(out)) == (None, result)
    error, _ = run(bad)
    assert text in error.get()
    with pytest.raises(checkify.JaxRuntimeError, match=text):
        error.throw()


@each_program
def test_jax_jit_alone_refuses(name):
    program, good, *_ = PROGRAMS[name]
    with pytest.raises(jhop.JhopError, match=r"(?s)jhop.check in `.*` \(.*\.py:\d+\) .*jhop.jit"):
        jax.jit(program)(good)


# Of branches and loops that `jax.vmap` runs for all examples


def test_of_branches_under_vmap_only_those_count_that_are_taken():
    run = jhop.jit(jax.vmap(branched))
    assert run(jnp.float32([4.0, -6.0])).tolist() == [12.0, -6.0]  # -6.0 would fail in the other branch, were it >= 5
    both = jhop.jit(
        jax.vmap(lambda x: lax.cond(x > 0, lambda x: below(-x, 0.0) * 2, lambda x: below(x, 0.5) * 3, x))
    )
    assert both(jnp.float32([4.0, -6.0])).tolist() == [-8.0, -18.0]
    with pytest.raises(jhop.CheckError, match=r"0\.0 is"):
        jhop.jit(jax.vmap(lambda x: lax.cond(x > 0, lambda x: x, lambda x: below(x, 0.0), x)))(jnp.float32([4.0, 0.0]))


def test_of_a_while_loop_under_vmap_examples_that_are_done_do_not_count():
    assert jhop.jit(jax.vmap(looped))(jnp.float32([100.0, 5.0])).tolist() == [100.0, 40.0]
    with pytest.raises(jhop.CheckError, match=r"36\.0 is"):
        jhop.jit(jax.vmap(looped))(jnp.float32([100.0, 18.0]))


def test_a_hook_under_vmap_with_a_branch_in_it():
    def hook(ct):
        return lax.cond(ct > 0, lambda ct: below(-ct, 0.0) * 2, lambda ct: below(ct, -3.0) * 5, ct)

    run = jhop.jit(jax.vmap(jax.grad(lambda x: jhop.hook(x, hook) ** 2)))
    assert run(jnp.float32([1.0, -2.0])).tolist() == [-4.0, -20.0]
    with pytest.raises(jhop.CheckError, match=r"-2\.0 is"):
        run(jnp.float32([1.0, -1.0]))


def test_the_derivative_of_a_branch_under_vmap():
    run = jhop.jit(jax.grad(lambda x: jax.vmap(branched)(x).sum()))
    assert run(jnp.float32([4.0, -6.0])).tolist() == [3.0, 1.0]
    with pytest.raises(jhop.CheckError, match=r"6\.0 is"):
        run(jnp.float32([6.0, -6.0]))


# What is told


def test_the_first_in_order_of_execution_is_told():
    def step(c, i):
        jhop.check(c + i < 5.0, "A at {i}", i=i)
        jhop.check(i != 1.0, "B at {i}", i=i)
        return c, None

    run = jhop.jit(lambda x: lax.scan(step, x, jnp.arange(6.0))[0])
    with pytest.raises(jhop.CheckError, match=r"B at 1\.0"):
        run(1.0)
    with pytest.raises(jhop.CheckError, match=r"A at 0\.0"):
        run(5.0)


def test_the_error_names_the_line_the_helper_and_the_hook():
    def watched(ct):
        return below(ct, 5.0)

    with pytest.raises(jhop.CheckError) as raised:
        jhop.jit(jax.grad(lambda x: jhop.hook(x, watched) ** 2))(3.0)
    line = below.__code__.co_firstlineno + 2
    expected = f"jhop.check failed in `below` (test_check.py:{line}), called by hook `watched` (test_check.py:"
    assert str(raised.value).startswith(expected)
    assert str(raised.value).endswith(": 6.0 is too large")


@pytest.mark.parametrize("wrap", [lambda fn: fn, jhop.jit], ids=["eager", "jit"])
def test_values_of_any_kind(wrap):
    def fn(x):
        jhop.check(
            x.sum() < 0, "{x} of {pair[0]:.2f}, {half:.1f}, {name!r}",
            x=x, pair=(x[1], 2), half=x[0].astype(jnp.bfloat16), name="n", more={"a": x > 1.0}, big=2**70,
        )  # fmt: skip

    with pytest.raises(jhop.CheckError) as raised:
        wrap(fn)(jnp.float32([0.1, 2.0]))
    assert str(raised.value).partition(": ")[2] == (
        "[0.1 2. ] of 2.00, 0.1, 'n' (big = 1180591620717411303424, more = {'a': array([False,  True])})"
    )
    values = raised.value.values
    np.testing.assert_array_equal(values["x"], np.float32([0.1, 2.0]))
    assert (values["pair"], values["name"], values["big"]) == ((2.0, 2), "n", 2**70)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_message_with_braces_and_no_values_is_taken_as_it_is():
    with pytest.raises(jhop.CheckError, match=r"\{ and \{x\}$"):
        jhop.check(False, "{ and {x}")


@pytest.mark.parametrize(
    ("args", "values", "text"),
    [
        ((1, "x"), {}, "expected a bool or an array of bools, got int"),
        ((None, "x"), {}, "got NoneType"),
        ((np.ones(2), "x"), {}, "got an array of float64"),
        ((True, 3), {}, "expected a message as second argument, got int"),
        ((True, "{y}"), {"x": 1}, "names `y`, of which no value was given"),
        ((True, "{} {x}"), {"x": 1}, "names ``"),
        ((True, "{"), {"x": 1}, "cannot format the message"),
    ],
)
def test_bad_input(args, values, text):
    with pytest.raises(jhop.JhopError, match=text):
        jhop.check(*args, **values)


# All or nothing


@pytest.mark.leaks
def test_no_state_is_written_when_a_check_fails():
    state = SimpleNamespace(n=0)
    step = jhop.jit(jax.grad(hooked(5.0, state)))
    assert [float(step(2.0)), state.n] == [40.0, 1]
    for _ in range(2):
        with pytest.raises(jhop.CheckError):
            step(3.0)
    assert state.n == 1
    assert [float(step(1.0)), state.n] == [20.0, 2]


def test_state_in_a_check():
    """A known condition costs no equation; the values are those of the run."""
    state = SimpleNamespace(n=0, limit=5.0)

    def hook(ct):
        state.n += 1
        jhop.check(state.n < 4, "ran {n} times", n=state.n)
        jhop.check(ct < state.limit, "{ct} with {limit}", ct=ct, limit=state.limit)

    step = jhop.jit(jax.grad(lambda x: jhop.hook(x, hook) ** 2))
    step(1.0)
    with pytest.raises(jhop.CheckError, match=r"6\.0 with 5\.0"):
        step(3.0)
    state.limit = 7.0
    assert (float(step(3.0)), step.versions()) == (6.0, 1)
    step(1.0)
    with pytest.raises(jhop.CheckError, match="ran 4 times"):
        step(1.0)
    assert state.n == 3


def test_a_known_failure_in_a_branch_that_is_not_taken():
    def fn(x):
        return lax.cond(x > 0.0, lambda: (jhop.check(False, "no {x}", x=3), x)[1], lambda: -x)

    run = jhop.jit(fn)
    assert float(run(-2.0)) == 2.0
    with pytest.raises(jhop.CheckError, match="no 3"):
        run(2.0)


def test_hooks_on_the_host_are_undone():
    state = SimpleNamespace(n=0)

    def on_host(ct):
        state.n += 1
        return ct * (2.0 if float(ct) > 0 else 3.0)

    fn = jax.grad(lambda x: jhop.hook(x, on_host) ** 2)
    step = jhop.jit(lambda x: below(fn(x), 9.0))
    with pytest.warns(UserWarning, match="on_host"):
        assert [float(step(2.0)), state.n] == [8.0, 1]
    with pytest.raises(jhop.CheckError, match=r"12\.0 is"):
        step(3.0)
    assert state.n == 1


def test_no_equation_stays_where_the_condition_is_known():
    assert "check" not in str(jax.make_jaxpr(lambda x: (jhop.check(x.shape == (2,), "shape"), x)[1])(jnp.ones(2)))


def test_a_program_without_checks_is_what_it_was():
    gm = jhop.inline(jhop.make_fx(jax.grad(lambda x: jhop.hook(x, lambda ct: ct * 2.0) ** 2))(1.0))
    compiled = jhop.compile(gm)
    assert float(compiled(3.0)) == 12.0
    assert compiled.last_entry().gm.checks is None


# The Tensor face


def total(grad):
    jhop.check((grad < 10.0).all(), "gradient {grad}", grad=grad)


@pytest.mark.parametrize("mode", ["eager", "captured", "second", "compiled"])
def test_tensors(mode):
    def fn(x):
        y = x * 3.0
        y.register_hook(total)
        return (y * y).sum()

    run = jhop.compile(fn, fullgraph=True) if mode == "compiled" else fn
    compiler = {"captured": lambda gm: jhop.compile(gm, fullgraph=True)}.get(mode)
    for _ in range(3):
        x = jhop.tensor([1.0, 2.0], requires_grad=True)
        with pytest.raises(jhop.CheckError, match=r"gradient \[ 6\. 12\.\]"):
            if mode in ("captured", "second"):
                with jhop.compiled_autograd.enable(compiler):
                    run(x).backward()
            else:
                run(x).backward()
        assert x.grad is None
        run(jhop.tensor([1.0, 1.5], requires_grad=True)).backward()


def test_in_a_function_of_tensors():
    """Its checks belong to its forward, and are looked at once."""

    @functools.partial(jhop.compile, fullgraph=True)
    def fn(x):
        y = x * x
        jhop.check((y < 5.0).all(), "y is {y}", y=y)
        return (y * x).sum()

    x = jhop.tensor([1.0, 2.0], requires_grad=True)
    fn(x).backward()
    assert x.grad.tolist() == [3.0, 12.0]
    (grad,) = jhop.autograd.grad(fn(x), [x], create_graph=True)
    grad.sum().backward()
    assert x.grad.tolist() == [9.0, 24.0]
    with pytest.raises(jhop.CheckError, match=r"y is \[1\. 9\.\]"):
        fn(jhop.tensor([1.0, 3.0], requires_grad=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "xla", lambda gm, example: lambda *flat: gm(*flat)])
def test_backends(backend):
    gm = jhop.make_fx(lambda x: below(x, 3.0) * 2.0)(1.0)
    compiled = jhop.compile(gm, backend=backend)
    assert float(compiled(2.0)) == 4.0
    with pytest.raises(jhop.CheckError, match=r"4\.0 is"):
        compiled(4.0)


def test_symbolic_sizes():
    gm = jhop.make_fx(lambda x: (jhop.check((x < 3.0).all(), "{x}", x=x), x * 2.0)[1])(jnp.ones(3))
    compiled = jhop.compile(gm, dynamic=True)
    assert compiled(jnp.ones(4)).tolist() == [2.0] * 4
    with pytest.raises(jhop.CheckError, match=r"\[4\. 4\. 4\. 4\. 4\.\]"):
        compiled(jnp.full(5, 4.0))


# Ahead of time, on meshes, on threads


def test_ahead_of_time():
    compiled = jhop.jit(lambda x: below(x, 3.0) * 2.0).lower(1.0).compile()
    assert float(compiled(2.0)) == 4.0
    with pytest.raises(jhop.CheckError, match=r"4\.0 is"):
        compiled(4.0)


def test_an_exported_program_cannot_tell():
    pytest.importorskip("flatbuffers")
    with pytest.raises(jhop.Unsupported, match=r"jhop.check in `below`"):
        export.export(jhop.jit(lambda x: below(x, 3.0)))(1.0)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["hook", "scan", "cond"])
def test_shard_map(kind, check_vma):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def each(x):
        if kind == "hook":
            return jax.grad(lambda x: jhop.hook(x.sum(), lambda ct: below(ct * x.sum(), 5.0)) * 1.0)(x)
        if kind == "scan":
            return lax.scan(lambda c, _: (c * below(c.sum(), 5.0), None), x, None, length=2)[0]
        return lax.cond(x.sum() > 1.5, lambda x: x * below(x.sum(), 5.0), lambda x: x * 0.0, x)

    spec = PartitionSpec("d")
    fn = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    run = jhop.jit(fn, fullgraph=True)
    assert run(jnp.float32([1.0, 0.0, 2.0, 0.0])).tolist() == checked_on_mesh(kind)
    for place in (0, 2):  # on either device
        with pytest.raises(jhop.CheckError, match=r"7\.0 is"):
            run(jnp.float32([1.0, 0.0, 2.0, 0.0]).at[place].set(7.0))
    with pytest.raises(jhop.CheckError, match=r"8\.0 is"):  # on both: the first is told
        run(jnp.float32([8.0, 0.0, 9.0, 0.0]))


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_shard_map_with_a_branch_that_checks_what_all_devices_share():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def each(x):
        total = lax.psum(x.sum(), "d")
        ours = x.sum()
        return lax.cond(ours > 4.0, lambda: x * below(total, 11.0), lambda: x * below(ours, 3.0))

    spec = PartitionSpec("d")
    run = jhop.jit(jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec), fullgraph=True)
    assert run(jnp.float32([1.0, 5.0])).tolist() == [1.0, 30.0]
    with pytest.raises(jhop.CheckError, match=r"12\.0 is"):
        run(jnp.float32([6.0, 6.0]))
    with pytest.raises(jhop.CheckError, match=r"3\.5 is"):
        run(jnp.float32([5.0, 3.5]))


def checked_on_mesh(kind):
    """What `each` gives for 1.0 and 2.0 with 0.0 each."""
    return {"hook": [1.0, 1.0, 2.0, 2.0], "scan": [1.0, 0.0, 16.0, 0.0], "cond": [0.0, 0.0, 4.0, 0.0]}[kind]


def test_threads():
    run = jhop.jit(lambda x: below(x, 50.0) * 2.0)
    found = {}

    def work(i):
        try:
            found[i] = float(run(float(i * 10)))
        except jhop.CheckError as error:
            found[i] = error.values["x"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: i * 20.0 if i < 5 else i * 10.0 for i in range(8)}


# checkify


def test_checkify_of_hooks():
    """Hooks are equations to it: its own checks in them count too; what hooks raise by state stays an error."""
    def hook(ct):
        checkify.check(ct < 5.0, "{ct} of checkify", ct=ct)
        return jnp.log(ct)

    fn = jax.grad(lambda x: jhop.hook(x, hook) ** 2)
    error, _ = checkify.checkify(jax.jit(fn))(3.0)
    assert "6.0 of checkify" in error.get()
    error, _ = checkify.checkify(jax.jit(fn), errors=checkify.nan_checks)(-3.0)
    assert "nan generated by primitive: log" in error.get()
    state = SimpleNamespace(n=0)
    with pytest.raises(jhop.Unsupported, match=r"writes Python state.*jhop.jit"):
        checkify.checkify(jax.jit(jax.grad(hooked(5.0, state))))(2.0)


def test_checkify_inside_jhop_jit_leaves_hooks_to_it():
    state = SimpleNamespace(n=0)
    run = jhop.jit(checkify.checkify(lambda x: below(jax.grad(hooked(5.0, state))(x), 35.0)))
    error, out = run(1.0)
    assert (error.get(), float(out), state.n) == (None, 20.0, 1)
    error, out = run(2.0)
    assert "40.0 is too large" in error.get()
    assert state.n == 2
    with pytest.raises(jhop.CheckError, match=r"6\.0 is"):
        run(3.0)
    assert state.n == 2


def test_checkify_inside_jhop_jit_does_not_freeze_what_hooks_read():
    state = SimpleNamespace(factor=3.0)
    run = jhop.jit(checkify.checkify(jax.grad(lambda x: jhop.hook(x, lambda ct: below(ct, 9.0) * state.factor) ** 2)))
    assert float(run(2.0)[1]) == 12.0
    state.factor = 5.0
    assert (float(run(2.0)[1]), run.versions()) == (20.0, 1)


def test_functionalized_it_is_left_to_who_compiles():
    pure, state = jhop.functionalize(jax.grad(hooked(5.0)))
    error, (out, _) = checkify.checkify(pure)(state, 3.0)
    assert "6.0 is too large" in error.get()
    with pytest.raises(jhop.JhopError, match=r"jhop\.jit"):
        jax.jit(pure)(state, 2.0)


@pytest.mark.parametrize("dialect", ["jax", "torch"])
def test_graphs_with_checks_print(dialect):
    gm = jhop.inline(jhop.make_fx(jax.grad(hooked(5.0)))(1.0))
    assert gm.print_readable(False, dialect=dialect)
    with pytest.raises(jhop.CheckError, match=r"6\.0 is"):
        gm(3.0, 5.0)
