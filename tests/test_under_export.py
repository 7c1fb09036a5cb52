"""Hooks under `jax.export`: serialized functions and their derivatives, symbolic sizes, several platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from under import RULES, agree, by_hand, differ, hooked, ignored, make_mesh

import jhop
from jhop._text.jax_text import function_name, opaque

x = jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 7 - 0.6
s = jnp.float32(1.5)
named = pytest.mark.parametrize


def plain(point, x, s):
    return (point(jnp.sin(x), s) ** 2).sum()


def scanned(point, x, s):
    total, rows = lax.scan(lambda total, row: (total + point(row, s) * jnp.sin(total), row * total), x[0], x)
    return (total**2).sum() + rows.sum()


def branched(point, x, s):
    return lax.cond(x.sum() > 0, lambda x: point(x, s).sum() ** 2, lambda x: point(jnp.cos(x), s).sum() ** 3, x)


def rematted(point, x, s):
    return jax.checkpoint(lambda x: (jnp.sin(point(jnp.cos(x), s)) ** 2).sum())(x)


def vmapped(point, x, s):
    return (jax.vmap(lambda row: point(row, s) * row.sum())(x) ** 2).sum()


PROGRAMS = (plain, scanned, branched, rematted, vmapped)


def through_bytes(exported, **options):
    return export.deserialize(bytearray(exported.serialize(**options)))


def of(program, point):
    return lambda x, s: program(point, x, s)


def second(fn):
    return jax.grad(lambda x, s: (jax.grad(fn)(x, s) ** 2).sum())


@named(("program", "rule"), [(plain, rule) for rule in RULES] + [(program, "closing") for program in PROGRAMS[1:]])
def test_gradient(program, rule):
    expected = jax.grad(of(program, by_hand(RULES[rule])))(x, s)
    assert differ(expected, jax.grad(of(program, ignored))(x, s))
    exported = export.export(jax.jit(jax.grad(of(program, hooked(RULES[rule])))))(x, s)
    agree(through_bytes(exported).call(x, s), expected)


@named("rule", ["closing"])
@named("program", PROGRAMS)
def test_derivatives_of_an_exported_function(program, rule):
    hand = of(program, by_hand(RULES[rule]))
    again = through_bytes(export.export(jax.jit(of(program, hooked(RULES[rule]))))(x, s), vjp_order=1)
    agree(again.call(x, s), hand(x, s))
    expected = jax.grad(hand)(x, s)
    assert differ(expected, jax.grad(of(program, ignored))(x, s))
    agree(jax.grad(again.call)(x, s), expected)
    agree(again.vjp().call(x, s, jnp.float32(2))[0], jax.vjp(hand, x, s)[1](jnp.float32(2))[0])


@named("program", [plain, scanned])
def test_second_derivative_of_an_exported_function(program):
    hand = second(of(program, by_hand(RULES["nonlinear"])))
    again = through_bytes(export.export(jax.jit(of(program, hooked(RULES["nonlinear"]))))(x, s), vjp_order=2)
    agree(jax.jit(second(again.call))(x, s), jax.jit(hand)(x, s))
    assert again.vjp().vjp() is not None


def test_derivative_that_was_not_exported_is_the_error_that_jax_gives():
    again = through_bytes(export.export(jax.jit(of(plain, hooked(RULES["linear"]))))(x, s))
    with pytest.raises(ValueError, match="No VJP is available"):
        jax.grad(again.call)(x, s)


# -- an exported function inside another -------------------------------------------------------------------------------


def around(call, point):
    return lambda x, s: call(point(jnp.cos(x), s), s) * 3 + (point(x, s) ** 2).sum()


@pytest.fixture(scope="module")
def exported():
    return through_bytes(export.export(jax.jit(of(plain, hooked(RULES["nonlinear"]))))(x, s), vjp_order=1)


@named("run", ["eager", "jax.jit", "jhop.jit", "inline", "export"])
def test_exported_function_in_a_hooked_one(run, exported):
    expected = jax.grad(around(of(plain, by_hand(RULES["nonlinear"])), by_hand(RULES["closing"])))(x, s)
    grad = jax.grad(around(exported.call, hooked(RULES["closing"])))
    runs = {
        "eager": lambda: grad,
        "jax.jit": lambda: jax.jit(grad),
        "jhop.jit": lambda: jhop.jit(grad, fullgraph=True),
        "inline": lambda: jhop.inline(jhop.make_fx(grad)(x, s)),
        "export": lambda: through_bytes(export.export(jax.jit(grad))(x, s)).call,
    }
    agree(runs[run]()(x, s), expected)


def test_text_of_an_exported_call(exported):
    gm = jhop.inline(jhop.make_fx(jax.grad(around(exported.call, hooked(RULES["closing"]))))(x, s))
    assert gm.code.count("# the equation `call_exported`") == 2
    namespace = {}
    exec(gm.code, namespace)
    np.testing.assert_allclose(namespace[function_name(gm)](x, s, **opaque(gm))[0], gm(x, s), rtol=1e-6)
    assert 'result: "f32[4, 3]"' in gm.print_readable(False)


def test_hook_that_calls_an_exported_function(exported):
    def hook(ct):
        return ct * exported.call(ct, jnp.float32(1.5))

    def rule(ct, s):
        return ct * plain(ignored, ct, s)

    expected = jax.grad(of(plain, by_hand(rule)))(x, s)
    grad = jax.grad(lambda x: plain(lambda value, _: jhop.hook(value, hook), x, s))
    agree(through_bytes(export.export(jax.jit(grad))(x)).call(x), expected)
    agree(jhop.inline(jhop.make_fx(grad)(x))(x), expected)


@named("transform", [lambda fn: fn, jax.jit], ids=["plain", "jit"])
def test_graph_may_be_exported(transform):
    grad = jax.grad(of(plain, hooked(RULES["closing"])))
    gm = jhop.inline(jhop.make_fx(transform(grad))(x, s))
    agree(through_bytes(export.export(jax.jit(gm))(x, s)).call(x, s), grad(x, s))


# -- symbolic sizes ----------------------------------------------------------------------------------------------------


def specs(*shapes, constraints=()):
    scope = export.SymbolicScope(constraints)
    return [jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32) for shape in shapes]


def two_sizes(point, x, y):
    z = point(jnp.concatenate([x, jnp.sin(y)]), s)
    return (z.reshape(-1) * jnp.ones(3 * (x.shape[0] + y.shape[0]))).sum() * (1 + z.mean()) * 9


def doubled(point, x, y):
    return (point(jnp.repeat(x, 2, 0), s) ** 2 * y).sum()


def scan_of_symbols(point, x, y):
    def step(total, row):
        return total + point(row, s).sum(), row * total

    total, rows = lax.scan(step, jnp.float32(0), x)
    return total + (rows * x).sum() + y.sum()


def vmap_of_symbols(point, x, y):
    return (jax.vmap(lambda row: point(row, s) * jnp.ones((y.shape[0], 1)))(x) ** 2).sum() + y.sum()


SYMBOLIC = {
    two_sizes: (("b,3", "c,3"), [((4, 3), (2, 3)), ((1, 3), (5, 3))]),
    doubled: (("b,3", "2*b,3"), [((4, 3), (8, 3)), ((2, 3), (4, 3))]),
    scan_of_symbols: (("b,3", "c"), [((4, 3), (2,)), ((3, 3), (6,))]),
    vmap_of_symbols: (("b,3", "c"), [((4, 3), (2,)), ((3, 3), (1,))]),
}


@named(("program", "rule"), [*((program, "nonlinear") for program in SYMBOLIC), (two_sizes, "clip")])
def test_symbolic_sizes(program, rule):
    """One export, one capture and one inlined graph serve all sizes, by name."""
    shapes, cases = SYMBOLIC[program]
    args = specs(*shapes, constraints=["b >= 1"])
    fn = of(program, hooked(RULES[rule]))
    grad = jax.grad(fn, argnums=(0, 1))
    gradient = through_bytes(export.export(jax.jit(grad))(*args))
    function = through_bytes(export.export(jax.jit(fn))(*args), vjp_order=1)
    gm = jhop.inline(jhop.make_fx(grad)(*args))
    graph = through_bytes(export.export(jax.jit(gm))(*args))
    assert [str(aval.shape) for aval in gradient.in_avals] == [str(spec.shape) for spec in args]
    assert "    b = x_1.shape[0]  # int\n" in gm.code
    for case in cases:
        values = [jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape) for shape in case]
        expected = jax.jit(jax.grad(of(program, by_hand(RULES[rule])), argnums=(0, 1)))(*values)
        assert differ(expected, jax.jit(jax.grad(of(program, ignored), argnums=(0, 1)))(*values))
        for got in (gradient.call, jax.grad(function.call, argnums=(0, 1)), gm, jax.jit(gm), graph.call):
            agree(got(*values), expected)


def test_broken_constraint_is_the_error_that_jax_gives():
    args = specs("b,3", "2*b,3", constraints=["b >= 3"])
    gradient = export.export(jax.jit(jax.grad(of(doubled, hooked(RULES["linear"])))))(*args)
    with pytest.raises(ValueError, match="b >= 3"):
        gradient.call(jnp.ones((2, 3)), jnp.ones((4, 3)))


def test_symbolic_exported_function_in_a_hooked_one():
    """Sizes go on as symbols through a call of what was exported with other symbols."""
    args = specs("n,3", "m,3")
    function = through_bytes(export.export(jax.jit(of(two_sizes, hooked(RULES["nonlinear"]))))(*args), vjp_order=1)

    def outer(call, point):
        return lambda x, y: call(jnp.concatenate([point(x, s), x]), y) * 2

    gm = jhop.inline(jhop.make_fx(jax.grad(outer(function.call, hooked(RULES["linear"]))))(*specs("b,3", "c,3")))
    assert "f32[2*b,3]" in gm.code
    values = x, jnp.sin(x[:2])
    expected = jax.grad(outer(of(two_sizes, by_hand(RULES["nonlinear"])), by_hand(RULES["linear"])))(*values)
    agree(gm(*values), expected)


# -- platforms, meshes, state ------------------------------------------------------------------------------------------


def test_several_platforms():
    grad = jax.grad(of(plain, hooked(RULES["nonlinear"])))
    exported = through_bytes(export.export(jax.jit(grad), platforms=["cpu", "cuda", "rocm", "tpu"])(x, s))
    assert exported.platforms == ("cpu", "cuda", "rocm", "tpu")
    agree(exported.call(x, s), grad(x, s))


@named("platform", ["cpu", "tpu"])
def test_hook_that_asks_for_the_platform(platform):
    """What a hook does may depend on where it runs: each platform gets its own."""

    def hook(ct):
        return lax.platform_dependent(ct, tpu=lambda ct: ct * 5, default=lambda ct: ct * 7)

    grad = jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())
    exported = export.export(jax.jit(grad), platforms=[platform])(x)
    assert ("dense<5.0" in exported.mlir_module()) == (platform == "tpu")
    assert ("dense<7.0" in exported.mlir_module()) == (platform == "cpu")
    if platform == jax.default_backend():
        agree(exported.call(x), 14 * x)


def test_on_a_mesh():
    mesh = make_mesh((4,), ("a",))

    def body(x):
        hook = jhop.hook(jnp.sin(x), lambda ct: ct + lax.psum(ct * ct, "a"))
        return (hook**2).sum()[None]

    fn = jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    grad = jax.grad(lambda x: fn(x).sum())
    value = jax.device_put(x, NamedSharding(mesh, P("a")))
    exported = through_bytes(export.export(jax.jit(grad))(value))
    assert exported.nr_devices == mesh.size
    ct = 2 * np.sin(x)
    got = jax.jit(exported.call)(value)
    shards = np.split(ct * ct, mesh.size)
    np.testing.assert_allclose(got, (ct + np.tile(sum(shards), (len(shards), 1))) * np.cos(x), rtol=1e-5)
    gm = jhop.inline(jhop.make_fx(grad)(value))
    agree(jax.jit(through_bytes(export.export(jax.jit(gm))(value)).call)(value), got)


class Counter:
    def __init__(self):
        self.steps = 0

    def count(self, ct):
        self.steps += 1
        return ct * self.steps


def test_hook_that_writes_state_is_refused():
    counter = Counter()

    def loss(x):
        return (jhop.hook(x, counter.count) ** 2).sum()

    with pytest.raises(jhop.Unsupported, match=r"hook `Counter.count` .* writes Python state \(`.*steps`\)"):
        export.export(jax.jit(jax.grad(loss)))(x)
    forward = export.export(jax.jit(loss))(x)  # no hook runs in it
    with pytest.raises(jhop.Unsupported, match=r"hook `Counter.count` .* writes Python state \(`.*steps`\)"):
        forward.serialize(vjp_order=1)
    assert counter.steps == 0
    agree(through_bytes(forward).call(x), (x**2).sum())


def test_state_as_input_and_output_may_be_exported():
    """The way that the message names: the inlined graph has the state as an input and an output."""
    counter = Counter()
    gm = jhop.inline(jhop.make_fx(jax.grad(lambda x: (jhop.hook(x, counter.count) ** 2).sum()))(x))
    exported = through_bytes(export.export(jax.jit(lambda x, steps: gm(x, steps)))(x, jnp.int32(0)))
    grad, steps = exported.call(x, jnp.int32(4))
    np.testing.assert_allclose(grad, 2 * x * 5)
    assert (int(steps), counter.steps) == (5, 0)
