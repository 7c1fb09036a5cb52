"""`jhop.jit` takes all of `jax.jit`'s options and has its stages: with hooks inlined, and with their state."""

import functools
from types import SimpleNamespace as Box

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop

X = np.arange(1.0, 9.0, dtype=np.float32)


class Counter:
    def __init__(self):
        self.n = 0
        self.seen = np.float32(0.0)
        self.scale = jnp.float32(3.0)

    def __call__(self, ct):
        self.n += 1
        return ct * self.scale


def pure(ct):
    return ct * 3.0


def gradient(hook):
    """By x alone; `w` comes along, `aux` is structured."""

    def fn(x, w):
        def loss(x):
            return (jhop.hook(x, hook) ** 2).sum() + w.sum()

        return jax.grad(loss)(x), {"w": w * 2.0}

    return fn


def check(result, x=X, w=X):
    got, aux = result
    np.testing.assert_allclose(got, 6.0 * np.asarray(x), rtol=1e-6)
    np.testing.assert_allclose(aux["w"], 2.0 * np.asarray(w), rtol=1e-6)


@pytest.fixture(params=["pure", "state"])
def hook(request):
    return pure if request.param == "pure" else Counter()


def ran(hook, count):
    assert getattr(hook, "n", count) == count


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((8,), ("i",))


# Shardings.

IN_SHARDINGS = {
    "one for all": lambda s: s,
    "one each": lambda s: (s, s),
    "a list": lambda s: [s, s],
    "none for some": lambda s: (s, None),
}


@pytest.mark.parametrize("given", IN_SHARDINGS)
def test_in_shardings(given, hook, mesh):
    sharding = NamedSharding(mesh, P("i"))
    step = jhop.jit(gradient(hook), in_shardings=IN_SHARDINGS[given](sharding), fullgraph=True)
    for _ in range(3):
        result = step(X, X)
        check(result)
        assert result[0].sharding.is_equivalent_to(sharding, 1)
    ran(hook, 3)


OUT_SHARDINGS = {"one for all": lambda s: s, "one each": lambda s: (s, {"w": s}), "prefix": lambda s: (s, s)}


@pytest.mark.parametrize("given", OUT_SHARDINGS)
def test_out_shardings(given, hook, mesh):
    sharding = NamedSharding(mesh, P("i"))
    step = jhop.jit(gradient(hook), out_shardings=OUT_SHARDINGS[given](sharding), fullgraph=True)
    for _ in range(3):
        result = step(X, X)
        check(result)
        assert all(leaf.sharding.is_equivalent_to(sharding, 1) for leaf in jax.tree.leaves(result))
    ran(hook, 3)


def test_shardings_with_a_static_argument(hook, mesh):
    sharding, everywhere = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())

    def fn(x, k, w):
        return gradient(hook)(x * k, w)

    step = jhop.jit(
        fn, static_argnums=1, in_shardings=(sharding, everywhere), out_shardings=(everywhere, None), fullgraph=True
    )
    for k in (2, 2, 5):
        result = step(X, k, X)
        check(result, X * k)
        assert result[0].sharding.is_equivalent_to(everywhere, 1)
    ran(hook, 3)


def test_wrong_shardings_are_jaxs_errors(mesh):
    step = jhop.jit(gradient(pure), in_shardings=(NamedSharding(mesh, P("i")),) * 3)
    with pytest.raises(ValueError, match="in_shardings"):
        step(X, X)


def test_arrays_keep_their_shardings(hook, mesh):
    x = jax.device_put(X, NamedSharding(mesh, P("i")))
    result = jhop.jit(gradient(hook), fullgraph=True)(x, X)
    check(result)
    assert result[0].sharding == jax.jit(gradient(pure))(x, X)[0].sharding


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_mesh_around_the_call(axis_type, hook):
    traces = []

    def fn(x, w):
        traces.append(jax.sharding.get_abstract_mesh().axis_names)
        return gradient(hook)(x, w)

    step = jhop.jit(fn, fullgraph=True)
    for _ in range(2):
        check(step(X, X))
        with jax.set_mesh(make_mesh((4,), ("j",), axis_type)):
            check(step(X, X))
    assert traces == [(), ("j",)]
    ran(hook, 4)


# Donation.

DONATED = {
    "first": ({"donate_argnums": 0}, (True, False)),
    "from the end": ({"donate_argnums": -1}, (False, True)),
    "both": ({"donate_argnums": (0, 1)}, (True, True)),
    "by name": ({"donate_argnames": "w"}, (False, True)),
    "both by name": ({"donate_argnames": ("w", "x")}, (True, True)),
}


@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
@pytest.mark.parametrize("given", DONATED)
def test_donation(given, named, hook):
    options, donated = DONATED[given]
    step = jhop.jit(gradient(hook), fullgraph=True, **options)
    for _ in range(2):
        x, w = jnp.asarray(X), jnp.asarray(X + 1)
        check(step(x, w=w) if named else step(x, w), X, X + 1)
        assert (x.is_deleted(), w.is_deleted()) == donated
    ran(hook, 2)


def test_donation_beside_a_static_argument(hook):
    def fn(k, x, w):
        return gradient(hook)(x * k, w)

    step = jhop.jit(fn, static_argnames="k", donate_argnums=2, fullgraph=True)
    x, w = jnp.asarray(X), jnp.asarray(X)
    check(step(2, x, w), X * 2)
    assert (x.is_deleted(), w.is_deleted()) == (False, True)


# Other options.


@pytest.mark.parametrize("keep", [False, True])
def test_keep_unused(keep):
    lowered = jhop.jit(lambda x, unused: x * 2.0, keep_unused=keep).lower(X, X)
    assert lowered.as_text().count("%arg") >= 1
    assert ("%arg1" in lowered.as_text()) is keep


def test_compiler_options(hook):
    step = jhop.jit(gradient(hook), compiler_options={"xla_embed_ir_in_executable": True}, fullgraph=True)
    check(step(X, X))
    with pytest.raises(Exception, match="no_such_option"):
        jhop.jit(gradient(hook), compiler_options={"no_such_option": True}, fullgraph=True)(X, X)
    ran(hook, 1)


def test_device(hook):
    device = jax.devices()[-1]
    step = jhop.jit(gradient(hook), out_shardings=jax.sharding.SingleDeviceSharding(device), fullgraph=True)
    result = step(X, X)
    check(result)
    assert result[0].devices() == {device}


def test_decorator_with_options():
    counter = Counter()

    @jhop.jit(fullgraph=True, static_argnames="k")
    def step(x, k):
        return jax.grad(lambda x: (jhop.hook(x, counter) ** k).sum())(x)

    np.testing.assert_allclose(step(X, k=2), 6.0 * X)
    assert counter.n == 1


# Ahead of time.


def test_lower_and_compile(hook):
    compiled = jhop.jit(gradient(hook), fullgraph=True).lower(X, X).compile()
    for _ in range(3):
        check(compiled(X, X))
    ran(hook, 3)
    assert "HloModule" in compiled.as_text()
    assert compiled.cost_analysis() is not None


def test_trace_shows_the_hook_inlined(hook):
    traced = jhop.jit(gradient(hook), fullgraph=True).trace(X, X)
    names = {eqn.primitive.name for eqn in traced.jaxpr.eqns}
    assert "trace_wrapped" not in str(traced.jaxpr) and "mul" in names
    assert traced.fun_name == "fn"
    check(traced.lower().compile()(X, X))
    ran(hook, 1)


def test_pure_stages_show_the_users_structure():
    traced = jhop.jit(gradient(pure)).trace(X, w=X)
    assert jax.tree.structure(traced.out_info) == jax.tree.structure((0, {"w": 0}))
    ((x,), named) = traced.args_info
    assert (x.shape, named["w"].shape) == ((8,), (8,))


def test_lowering_runs_nothing(hook):
    step = jhop.jit(gradient(hook), fullgraph=True)
    step.trace(X, X), step.lower(X, X).compile(), step.eval_shape(X, X)
    ran(hook, 0)


def test_lowering_from_shapes(hook):
    spec = jax.ShapeDtypeStruct(X.shape, X.dtype)
    step = jhop.jit(gradient(hook), fullgraph=True)
    check(step.lower(spec, spec).compile()(X, X))
    check(step(X, X))
    ran(hook, 2)


def test_lowering_with_options(hook, mesh):
    sharding = NamedSharding(mesh, P("i"))

    def fn(k, x, w):
        return gradient(hook)(x * k, w)

    step = jhop.jit(fn, static_argnums=0, out_shardings=sharding, donate_argnums=2, fullgraph=True)
    w = jax.device_put(X, sharding)
    compiled = step.lower(2, X, jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=sharding)).compile()
    result = compiled(X, w)
    check(result, X * 2)
    assert w.is_deleted() and result[0].sharding.is_equivalent_to(sharding, 1)
    ran(hook, 1)


def test_lowering_for_another_platform(hook):
    text = jhop.jit(gradient(hook), fullgraph=True).trace(X, X).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.multiply" in text and "custom_call" not in text


def test_compiled_program_refuses_other_types(hook):
    compiled = jhop.jit(gradient(hook), fullgraph=True).lower(X, X).compile()
    with pytest.raises(TypeError):
        compiled(X[:2], X)
    ran(hook, 0)


def test_compiled_program_sees_lifted_values():
    counter = Counter()
    compiled = jhop.jit(gradient(counter), fullgraph=True).lower(X, X).compile()
    counter.scale, counter.n = jnp.float32(6.0), 2**40
    np.testing.assert_allclose(compiled(X, X)[0], 12.0 * X)
    assert counter.n == 2**40 + 1


def test_compiled_program_refuses_to_be_stale(monkeypatch):
    counter = Counter()
    step = jhop.jit(gradient(counter), fullgraph=True)
    compiled = step.lower(X, X).compile()
    counter.scale = 6.0
    with pytest.raises(jhop.JhopError, match=r"compiled `fn` no longer fits.*\.scale` changed from float32\[\] to 6.0"):
        compiled(X, X)
    assert counter.n == 0
    np.testing.assert_allclose(step(X, X)[0], 12.0 * X)


def test_compiled_program_refuses_when_the_function_looks_up_something_else():
    box = {"k": 2.0}
    compiled = jhop.jit(lambda x: x * box["k"]).lower(X).compile()
    np.testing.assert_allclose(compiled(X), 2.0 * X)
    box["k"] = 3.0
    with pytest.raises(jhop.JhopError, match=r"\['k'\]` changed from 2.0 to 3.0"):
        compiled(X)


def test_lowering_what_cannot_be_traced_is_refused():
    def loud(ct):
        print("seen")

    with pytest.raises(jhop.Unsupported, match="print"):
        jhop.jit(gradient(loud)).lower(X, X)


def test_eval_shape(hook):
    got, aux = jhop.jit(gradient(hook)).eval_shape(X, X)
    assert (got.shape, aux["w"].dtype) == ((8,), jnp.float32)


# Export.


def test_export_of_a_pure_hook():
    exported = jax.export.export(jhop.jit(gradient(pure)))(jax.ShapeDtypeStruct((8,), jnp.float32), X)
    check(jax.export.deserialize(exported.serialize()).call(X, X))
    assert "trace_wrapped" not in exported.mlir_module()


def test_export_with_symbolic_sizes():
    (n,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((n,), jnp.float32)
    exported = jax.export.export(jhop.jit(gradient(pure)))(spec, spec)
    for size in (3, 5):
        check(exported.call(X[:size], X[:size]), X[:size], X[:size])


def test_constants_ahead_of_time():
    """Arrays that the function closes over are inputs of what `jhop.jit` runs, and in what is compiled or exported."""
    weight = jnp.arange(8.0)
    step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, pure) * weight).sum()))
    exported = jax.export.export(step)(X)
    for call in (step, step.lower(X).compile(), exported.call, jax.export.deserialize(exported.serialize()).call):
        np.testing.assert_allclose(call(X), 3.0 * weight)
    assert len(step.trace(X).jaxpr.in_avals) == 1


@pytest.mark.parametrize("options", [{}, {"compiler_options": {"xla_embed_ir_in_executable": True}}])
def test_export_of_state_that_is_only_read(options):
    """A hook's table and number are constants of the exported program, as those of the function itself are."""
    table, box = jnp.arange(8.0), Box(rate=0.5)
    fn = jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * table * box.rate) ** 2).sum())
    exported = jax.export.export(jhop.jit(fn, fullgraph=True, **options))(X)
    box.rate = 2.0
    for call in (exported.call, jax.export.deserialize(exported.serialize()).call):
        np.testing.assert_allclose(call(X), X * table)


def test_export_of_state_that_is_only_read_with_symbolic_sizes():
    table = jnp.arange(3.0)
    fn = jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * table) ** 2).sum())
    shape = jax.export.symbolic_shape("rows, 3")
    exported = jax.export.export(jhop.jit(fn))(jax.ShapeDtypeStruct(shape, jnp.float32))
    for rows in (2, 5):
        np.testing.assert_allclose(exported.call(jnp.ones((rows, 3))), jnp.ones((rows, 1)) * 2.0 * table)


def test_export_of_state_is_refused():
    with pytest.raises(jhop.Unsupported, match=r"jax.export of `fn`.*\.n.*argument"):
        jax.export.export(jhop.jit(gradient(Counter()), fullgraph=True))(X, X)


# Different types, called in turn.


def test_types_called_in_turn(hook):
    step = jhop.jit(gradient(hook), fullgraph=True)
    for _ in range(3):
        for size in (8, 3, 5):
            check(step(X[:size], X[:size]), X[:size], X[:size])
    ran(hook, 9)


def test_errors_in_the_program_leave_state_alone():
    counter = Counter()

    @functools.partial(jhop.jit, fullgraph=True)
    def step(x):
        return jax.grad(lambda x: (jhop.hook(x, counter) ** 2).sum())(x) + x["missing"] if isinstance(x, dict) else x

    with pytest.raises(TypeError):
        step({"x": X})
    assert counter.n == 0
