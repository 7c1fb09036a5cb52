"""`jhop.nan_guard`: the operation that made the first NaN, forward and backward, where it is and what went into it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop


def line_of(text):
    """The line of this file that ends with a comment `# text`."""
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith(f"# {text}"))


def caught(fn, *args, **options):
    with pytest.raises(jhop.NanError) as raised:
        jhop.nan_guard(fn, **options)(*args)
    return raised.value


def norm(x):
    with jax.named_scope("layer"):
        return jnp.sqrt((x * x).sum())  # norm


def scanned(x):
    def body(c, i):
        with jax.named_scope("step"):
            return jnp.sqrt(c - i) * 2.0, None  # scanned

    return lax.scan(body, x, jnp.arange(4.0))[0].sum()


def test_a_backward_operation():
    error = caught(jax.grad(norm), jnp.zeros(3))
    assert (error.primitive, error.phase) == ("mul", "backward")
    assert error.values["count"] == 3
    text = str(error)
    assert f"`mul` (test_nan_guard.py:{line_of('norm')}: return jnp.sqrt((x * x).sum())" in text
    assert "made 3 non-finite values, in the backward pass of `norm`, in the scope `layer`." in text
    assert jhop.nan_guard(jax.grad(norm))(jnp.float32([3.0, 4.0])).tolist() == [np.float32(0.6), np.float32(0.8)]


def test_the_same_with_infinities():
    """The derivative's 0.5 / 0 is computed with the forward."""
    error = caught(jax.grad(norm), jnp.zeros(3), inf=True)
    assert (error.primitive, error.phase, error.values["count"]) == ("div", "forward", 1)
    assert error.values["operands"] == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert "operand 1 (float32[]): from 0 to 0, 0 non-finite values" in str(error)


def test_in_a_scan_the_iteration_is_told():
    error = caught(scanned, jnp.float32([4.0, 9.0]))  # 4, 4, 3.5; 9, 6, 4.5
    assert float(jhop.nan_guard(scanned)(jnp.float32([90.0]))) > 0.0
    assert (error.primitive, error.phase, error.values["turns"]) == ("sqrt", "forward", [3])
    assert f"(test_nan_guard.py:{line_of('scanned')}: " in str(error)
    assert "in the scope `step`, at iteration 3." in str(error)


@pytest.mark.parametrize("remat", [False, True])
def test_backward_through_a_scan(remat):
    def chain(x):
        body = lambda c, _: (jnp.sqrt(c), c)  # noqa: E731
        return lax.scan(jax.checkpoint(body) if remat else body, x, None, length=4)[1].sum()

    error = caught(jax.grad(chain), jnp.float32([1.0, 0.0]))
    assert (error.primitive, error.phase, error.values["turns"]) == ("mul", "backward", [3])
    assert error.values["operands"][0] == [0.0, 0.0, 0.0]


def test_loops_in_loops_branches_and_calls():
    def inner(c):
        return lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, jnp.log(s[1])), (0, c))[1]

    def body(c, i):
        return lax.cond(i == 2, jax.jit(jax.checkpoint(inner)), lambda c: c, c), None

    error = caught(lambda x: lax.scan(body, x, jnp.arange(4))[0], 5.0)
    assert (error.primitive, error.values["turns"]) == ("log", [2, 3])


def test_the_counts_of_a_while_loop():
    def run(x):
        return lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, jnp.log(s[1])), (0, x))[1]

    error = caught(run, 5.0)  # 1.6, 0.48, -0.74
    assert (error.primitive, error.values["turns"]) == ("log", [3])
    assert error.values["operands"][0][0] == pytest.approx(-0.742579)


def test_the_first_in_order_of_execution():
    def run(x):
        return jnp.log(x) + jnp.arcsin(x)

    assert caught(run, -2.0).primitive == "log"
    assert caught(run, 2.0).primitive == "asin"


def test_functions_with_rules_of_their_own():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    root.defvjp(lambda x: (jnp.sqrt(x), x), lambda x, ct: (ct * jnp.log(x),))
    assert caught(root, -1.0).primitive == "sqrt"
    assert caught(jax.grad(root), -1.0).phase == "forward"

    @jax.custom_jvp
    def double(x):
        return jnp.log(x)

    double.defjvp(lambda primals, tangents: (double(*primals), 7.0 * tangents[0]))
    assert caught(double, -1.0).primitive == "log"
    assert float(jax.grad(lambda x: jhop.nan_guard(double, "zero")(x))(2.0)) == 7.0  # it keeps its rule


def test_a_value_that_came_in():
    error = caught(lambda x, y: x * 2.0 + y, jnp.float32([1.0, 2.0]), jnp.float32([np.nan, 1.0]))
    assert str(error).endswith("which none of its operations made: argument `y` has 1.")
    assert error.primitive is None
    masked = jhop.nan_guard(lambda x: jnp.where(jnp.isnan(x), 5.0, x))
    assert masked(jnp.float32([np.nan, 1.0])).tolist() == [5.0, 1.0]


def test_complex_and_other_dtypes():
    assert caught(lambda x: (x - x) / (x - x), jnp.complex64(1 + 2j)).primitive == "div"
    error = caught(jnp.log, jnp.bfloat16(-3.0))
    assert error.values["operands"] == [[-3.0, -3.0, 0.0]]
    assert int(jhop.nan_guard(lambda x: x + 1)(jnp.int32(3))) == 4


def test_mode_zero():
    """Only the backward is changed: NaN in the forward stays, as does what is finite."""
    guarded = jhop.nan_guard(jax.value_and_grad(lambda x: jnp.sqrt(x * x).sum()), mode="zero")
    value, grad = guarded(jnp.float32([0.0, -2.0]))
    assert (float(value), grad.tolist()) == (2.0, [0.0, -1.0])
    value, grad = guarded(jnp.float32([np.nan, -2.0]))
    assert np.isnan(value)
    assert grad.tolist() == [0.0, -1.0]
    assert jax.jit(guarded)(jnp.float32([0.0, -2.0]))[1].tolist() == [0.0, -1.0]


@pytest.mark.leaks
def test_mode_count():
    guarded = jhop.nan_guard(jax.grad(norm), "count")
    assert (guarded.report(), guarded.count) == ("", 0)
    assert np.isnan(guarded(jnp.zeros(2))).all()
    assert guarded.report().startswith("jhop.nan_guard: `mul` (test_nan_guard.py:")
    assert guarded(jnp.float32([3.0, 4.0])).tolist() == [np.float32(0.6), np.float32(0.8)]
    assert (guarded.report(), guarded.count) == ("", 1)
    guarded(jnp.zeros(2))
    guarded(jnp.zeros(5))  # of other sizes
    assert guarded.count == 3
    assert "made 5 non-finite values" in guarded.report()
    assert guarded.versions() == 2


def test_mode_count_inside_jhop_jit():
    guarded = jhop.nan_guard(jnp.log, "count")
    step = jhop.jit(lambda x: guarded(x) * 2.0)
    for x in (1.0, -1.0, -2.0):
        step(x)
    assert guarded.count == 2
    assert "`log`" in guarded.report()


@pytest.mark.leaks
def test_hooks_and_their_state():
    state = SimpleNamespace(n=0)

    def hook(ct):
        state.n += 1
        return ct / (ct - 2.0)

    guarded = jhop.nan_guard(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), inf=True)
    assert [guarded(jnp.float32([3.0, 2.0])).tolist(), state.n] == [[1.5, 2.0], 1]
    with pytest.raises(jhop.NanError, match=r"hook `hook` \(test_nan_guard.py:\d+\) made 1 non-finite value") as raised:
        guarded(jnp.float32([3.0, 1.0]))
    assert (raised.value.phase, raised.value.values["operands"]) == ("backward", [[2.0, 6.0, 0.0]])
    assert state.n == 1
    step = jhop.jit(lambda x: guarded(x) * 10.0)
    assert [step(jnp.float32([3.0, 2.0])).tolist(), state.n] == [[15.0, 20.0], 2]
    with pytest.raises(jhop.NanError, match="hook `hook`"):
        step(jnp.float32([3.0, 1.0]))
    assert state.n == 2


def test_vmap_around_and_inside():
    xs = jnp.float32([4.0, -1.0])
    assert caught(jax.vmap(jnp.log), xs).primitive == "log"
    with pytest.raises(jhop.NanError, match=r"from -1 to -1"):
        jhop.jit(jax.vmap(jhop.nan_guard(jnp.log)))(xs)


def test_by_checkify():
    error, _ = checkify.checkify(jax.jit(jhop.nan_guard(jnp.log)))(-1.0)
    assert "jhop.nan_guard: `log` made 1 non-finite value" in error.get()
    with pytest.raises(jhop.JhopError, match=r"(?s)jhop.nan_guard of `log` is in .*`jhop.jit`"):
        jax.jit(jhop.nan_guard(jnp.log))(-1.0)


def test_static_arguments_keywords_and_what_is_looked_up():
    scale = SimpleNamespace(by=2.0)

    @jhop.nan_guard(static_argnums=1, inf=True)
    def fn(x, kind, *, shift):
        return {"y": (jnp.log(x) if kind == "log" else x) * scale.by + shift}

    assert float(fn(1.0, "log", shift=3.0)["y"]) == 3.0
    assert float(fn(1.0, "same", shift=3.0)["y"]) == 5.0
    scale.by = 4.0
    assert float(fn(1.0, "same", shift=3.0)["y"]) == 7.0
    with pytest.raises(jhop.NanError, match="`log`"):
        fn(0.0, "log", shift=3.0)


@pytest.mark.parametrize(
    ("args", "text"),
    [((3,), "expected a function, got int"), ((jnp.log, "stop"), "unknown mode 'stop'. Expected one of 'raise'")],
)
def test_bad_input(args, text):
    with pytest.raises(jhop.JhopError, match=text):
        jhop.nan_guard(*args)
    with pytest.raises(jhop.JhopError, match="a report in mode 'count' only"):
        jhop.nan_guard(jnp.log).report()


@pytest.mark.parametrize("mode", ["raise", "count", "zero"])
def test_the_condition_of_a_while_loop(mode):
    def run(x, low):
        return lax.while_loop(lambda s: jnp.sqrt(s.sum() - low) > 1.0, lambda s: s * 0.5, x)  # condition

    guarded = jhop.nan_guard(run, mode)
    x = jnp.array([4.0, 12.0])
    assert guarded(x, 0.0).tolist() == [0.25, 0.75]
    assert guarded(x * 0.01, 0.0).tolist() == (x * 0.01).tolist()
    if mode != "raise":
        assert guarded(x, 5.0).tolist() == [1.0, 3.0]
        assert mode == "zero" or "`sqrt`" in guarded.report()
        return
    for scale, turn in ((1.0, 2), (0.01, 0)):
        with pytest.raises(jhop.NanError) as raised:
            guarded(x * scale, 5.0)
        assert (raised.value.primitive, raised.value.values["turns"]) == ("sqrt", [turn])
        assert f":{line_of('condition')}" in str(raised.value)

    on_mesh = jax.shard_map(
        lambda x: lax.while_loop(lambda s: jnp.log(s).max() > 0.0, lambda s: s - 2.0, x),
        mesh=make_mesh((2,), ("i",)), in_specs=P("i"), out_specs=P("i"),
    )  # fmt: skip
    guarded = jhop.nan_guard(on_mesh)
    assert guarded(jnp.array([3.0, 2.5, 0.75, 0.5])).tolist() == [1.0, 0.5, 0.75, 0.5]
    with pytest.raises(jhop.NanError, match="`log`.*at iteration 1"):
        guarded(jnp.array([0.5, 0.25, 4.5, 1.5]))


def test_on_a_mesh():
    mesh = make_mesh((2,), ("i",))

    def on_mesh(fn, **specs):
        return jax.shard_map(fn, mesh=mesh, **{"in_specs": P("i"), "out_specs": P("i"), **specs})

    counter = SimpleNamespace(n=0)

    def hook(ct):
        counter.n += 1
        return ct * jnp.where(ct > 20.0, jnp.nan, 3.0)

    good, bad = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 2.0, 30.0, 4.0])
    squares = on_mesh(lambda x: jhop.hook(x, hook) ** 2)
    for mode, found in (("raise", None), ("count", [6.0, 12.0, None, 24.0]), ("zero", [6.0, 12.0, 0.0, 24.0])):
        counter.n = 0
        guarded = jhop.nan_guard(jax.grad(lambda x: squares(x).sum()), mode)
        assert guarded(good).tolist() == [6.0, 12.0, 18.0, 24.0]
        if found is None:
            with pytest.raises(jhop.NanError, match="hook `hook`.* made 1 non-finite value, in the backward pass"):
                guarded(bad)
        else:
            assert [None if np.isnan(value) else value for value in guarded(bad).tolist()] == found
        assert counter.n == (1 if found is None else 2)

    # Only the second device makes the NaN, which the sum brings to the first one too.
    total = on_mesh(lambda x: jax.lax.psum(jnp.log(x) * 2.0, "i"), out_specs=P())
    guarded = jhop.nan_guard(total)
    np.testing.assert_allclose(guarded(good), 2.0 * np.log([3.0, 8.0]), rtol=1e-5)
    with pytest.raises(jhop.NanError) as raised:
        guarded(-good + 2.5)
    assert raised.value.primitive == "log"
    # And here it is the sum that does.
    with pytest.raises(jhop.NanError) as raised:
        guarded(jnp.array([0.0, 1.0, jnp.inf, 1.0]))
    assert raised.value.primitive.startswith("psum")
