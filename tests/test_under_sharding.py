"""Hooks on sharded values: GSPMD, meshes with explicit axes, `with_sharding_constraint`, mixed meshes, `vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P
from under import RULES, RUNS, agree, by_hand, differ, hooked, ignored, inlined_and_jitted, make_mesh

import jhop

x = jnp.arange(32, dtype=jnp.float32).reshape(8, 4) / 9 - 1.6
w = jnp.cos(jnp.arange(16, dtype=jnp.float32)).reshape(4, 4)
s = jnp.float32(1.5)
named = pytest.mark.parametrize
COMPILED = {"jax.jit": jax.jit, "jhop.jit": RUNS["jhop.jit"], "inline": inlined_and_jitted}


def mesh_of(*kinds):
    return make_mesh((4, 2), ("a", "b"), *kinds)


def on(mesh, spec, value):
    return jax.device_put(value, NamedSharding(mesh, spec))


def network(point, value, s):
    hidden = jnp.tanh(point(value["x"], s) @ point(value["w"], s))
    return (point(hidden, s) ** 2).sum()


def specs_of(tree):
    """How results are sharded, without axes that say nothing."""

    def spec(value):
        parts = list(value.sharding.spec) if isinstance(value.sharding, NamedSharding) else []
        while parts and parts[-1] is None:
            parts.pop()
        return parts

    return jax.tree.map(spec, tree)


def same(transform, program, rule, value, derivative=jax.grad):
    """Values and shardings of results are those of hand-written rules."""

    def of(point):
        return derivative(lambda value, s: program(point, value, s))

    expected = jax.jit(of(by_hand(rule)))(value, s)
    assert differ(expected, jax.jit(of(ignored))(value, s))
    got = transform(of(hooked(rule)))(value, s)
    agree(got, expected)
    assert specs_of(got) == specs_of(expected)
    return got


def second(fn):
    return jax.grad(lambda x, s: sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(fn)(x, s))))


# -- GSPMD -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "batch": (P("a"), P()),
    "model": (P(None, "b"), P("b")),
    "both": (P("a", "b"), P("b")),
    "one axis of two": (P(("a", "b")), P(None, "a")),
}


@named(
    ("layout", "rule", "run"),
    [("both", rule, run) for rule in ("linear", "clip", "closing") for run in COMPILED]
    + [(layout, "nonlinear", "jhop.jit") for layout in LAYOUTS],
)
def test_sharded_by_the_compiler(layout, rule, run):
    mesh = mesh_of("Auto", "Auto")
    value = {"x": on(mesh, LAYOUTS[layout][0], x), "w": on(mesh, LAYOUTS[layout][1], w)}
    got = same(COMPILED[run], network, RULES[rule], value)
    agree(got, jax.grad(lambda value: network(by_hand(RULES[rule]), value, s))({"x": x, "w": w}), rtol=1e-3)


@named("run", COMPILED)
def test_shardings_that_are_asked_for(run):
    """A constraint inside a hook, and outside, decides where its result lies."""
    mesh = mesh_of("Auto", "Auto")

    def constrained(ct, s):
        return lax.with_sharding_constraint(ct * ct, NamedSharding(mesh, P(None, "b")))

    def program(point, value, s):
        return (point(value, s) ** 2).sum()

    got = same(COMPILED[run], program, constrained, on(mesh, P("a"), x))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "b")), got.ndim)


@named("run", COMPILED)
def test_inner_jit_with_shardings(run):
    mesh = mesh_of("Auto", "Auto")
    rows, columns = NamedSharding(mesh, P("a")), NamedSharding(mesh, P(None, "b"))

    def program(point, value, s):
        inner = jax.jit(lambda x: jnp.sin(point(x, s)), in_shardings=rows, out_shardings=columns)
        return (inner(jnp.cos(value)) ** 2).sum()

    same(COMPILED[run], program, RULES["nonlinear"], on(mesh, P("a"), x))


@named("run", COMPILED)
def test_examples_over_the_mesh(run):
    mesh = mesh_of("Auto", "Auto")

    def program(point, value, s):
        def one(row):
            row = lax.with_sharding_constraint(row, NamedSharding(mesh, P("b")))
            return (point(jnp.sin(row), s) ** 2).sum() / lax.axis_size("rows")

        return jax.vmap(one, axis_name="rows", spmd_axis_name="a")(value).sum()

    def summed(ct, s):
        return ct * ct + lax.psum(ct, "rows")

    value = on(mesh, P("a"), x)
    expected = jax.grad(lambda v: (jnp.sin(v) ** 2).sum() / 8)(x)
    ct = np.asarray(2 * jnp.sin(x) / 8)
    got = COMPILED[run](jax.grad(lambda value, s: program(hooked(summed), value, s)))(value, s)
    np.testing.assert_allclose(got, (ct * ct + ct.sum(0)) * np.cos(x), rtol=1e-5, atol=1e-6)
    assert differ(got, expected)
    same(COMPILED[run], program, RULES["nonlinear"], value)


# -- explicit axes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def explicit():
    mesh = mesh_of("Explicit", "Explicit")
    with jax.set_mesh(mesh):
        yield mesh


@named(
    ("rule", "run"),
    [("closing", run) for run in ("jax.jit", "inline", "eager")] + [(rule, "jhop.jit") for rule in RULES],
)
def test_sharding_in_types(rule, run, explicit):
    value = {"x": on(explicit, P("a", "b"), x), "w": on(explicit, P("b"), w)}

    def program(point, value, s):
        hidden = jnp.matmul(point(value["x"], s), point(value["w"], s), out_sharding=P("a", None))
        return (point(jnp.tanh(hidden), s) ** 2).sum()

    got = same({**COMPILED, "eager": lambda fn: fn}[run], program, RULES[rule], value)
    assert specs_of(got) == {"x": ["a", "b"], "w": ["b"]}


def simple(point, value, s):
    return (point(jnp.sin(value), s) ** 2).sum()


def mapped(point, value, s):
    return jax.vmap(lambda row: (point(jnp.sin(row), s) ** 2).sum())(value).sum()


def scanned(point, value, s):
    start = jnp.zeros(8, jnp.float32, out_sharding=P("a"))
    return lax.scan(lambda total, row: (total + point(jnp.sin(row), s) * row, None), start, value.T)[0].sum()


def rematted(point, value, s):
    return (jax.checkpoint(lambda value: jnp.sin(point(jnp.cos(value), s)))(value) ** 2).sum()


def jitted(point, value, s):
    return jax.jit(lambda value: (point(jnp.cos(value), s) ** 2).sum())(value)


def part_by_hand(point, value, s):
    def body(value, s):
        return (point(jnp.sin(value), s) ** 2).sum()[None]

    specs = {"in_specs": (P("a"), P()), "out_specs": P("a"), "axis_names": {"a"}}
    return jax.shard_map(body, **specs)(value, s).sum()


def all_by_hand(point, value, s):
    def body(value, s):
        return (point(jnp.sin(value), s) ** 2).sum()[None]

    return jax.shard_map(body, in_specs=(P("a"), P()), out_specs=P("a"))(value, s).sum()


@named("run", COMPILED)
@named("program", [mapped, scanned, rematted, jitted, part_by_hand, all_by_hand])
def test_structure_with_sharding_in_types(program, run, explicit):
    same(COMPILED[run], program, RULES["closing"], on(explicit, P("a"), x))


@named("run", COMPILED)
@named("program", [part_by_hand, all_by_hand])
def test_collective_with_sharding_in_types(program, run, explicit):
    def added(ct, s):
        return ct * ct + lax.psum(ct, "a")

    same(COMPILED[run], program, added, on(explicit, P("a"), x))


@named("run", COMPILED)
@named("program", [simple, mapped])
def test_second_derivative_with_sharding_in_types(program, run, explicit):
    same(COMPILED[run], program, RULES["nonlinear"], on(explicit, P("a"), x), derivative=second)


@named("run", [*COMPILED, "eager", "make_fx"])
@named("result", ["replicated", "other axis"])
def test_result_sharded_otherwise_becomes_as_the_cotangent(result, run, explicit):
    """The type of the cotangent holds, shapes and dtypes aside, without a word; `custom_vjp` has an error for it."""
    hooks = {
        "replicated": lambda ct: jnp.full(ct.shape, 3.0, ct.dtype),
        "other axis": lambda ct: reshard(3 * ct, P(None, "b")),
    }
    grad = jax.grad(lambda value: (jhop.hook(jnp.sin(value), hooks[result]) ** 2).sum())
    value = on(explicit, P("a"), x)
    runs = {**COMPILED, "eager": lambda fn: fn, "make_fx": RUNS["make_fx"]}
    expected = (3 if result == "replicated" else 6 * jnp.sin(x)) * jnp.cos(x)
    got = runs[run](grad)(value)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert specs_of(got) == ["a"]


@named("run", ["jax.jit", "jhop.jit", "inline", "eager"])
def test_contract_error_says_the_same_on_a_mesh(run, explicit):
    def narrow(ct):
        return ct.astype(jnp.bfloat16)

    grad = jax.grad(lambda value: (jhop.hook(value, narrow) ** 2).sum())
    runs = {**COMPILED, "eager": lambda fn: fn}
    message = r"must return an array of type float32\[8,4\],.* but returned bfloat16\[8,4\]"
    with pytest.raises(jhop.HookError, match=message):
        runs[run](grad)(on(explicit, P("a"), x))


# -- mixed meshes ------------------------------------------------------------------------------------------------------


@named("run", COMPILED)
@named("kinds", [("Explicit", "Auto"), ("Auto", "Explicit")])
def test_mixed_axes(kinds, run):
    """An explicit axis in types, the other left to the compiler, a third kind, manual, in `shard_map`."""
    mesh = mesh_of(*kinds)
    explicit = "ab"[kinds.index("Explicit")]

    def manual(point, value, s):
        def body(value, s):
            return point(jnp.sin(value), s) ** 2

        specs = {"in_specs": (P(explicit), P()), "out_specs": P(explicit), "axis_names": {explicit}}
        return jax.shard_map(body, **specs)(value, s).sum()

    with jax.set_mesh(mesh):
        value = on(mesh, P(explicit), x)
        same(COMPILED[run], simple, RULES["clip"], value)
        same(COMPILED[run], manual, lambda ct, s: ct * ct + lax.psum(ct, explicit), value)


# -- Python state ------------------------------------------------------------------------------------------------------


class Meter:
    def __init__(self, total):
        self.steps = 0
        self.total = total

    def watch(self, ct):
        self.steps += 1
        self.total = self.total + ct
        return ct * self.steps


@named("kind", ["Auto", "Explicit"])
def test_state_stays_sharded(kind):
    mesh = mesh_of(kind, kind)
    with jax.set_mesh(mesh):
        meter = Meter(on(mesh, P("a"), jnp.zeros_like(x)))
        step = jhop.jit(jax.grad(lambda value: (jhop.hook(value, meter.watch) ** 2).sum()), fullgraph=True)
        value = on(mesh, P("a"), x)
        for count in (1, 2, 3):
            np.testing.assert_allclose(step(value), 2 * x * count, rtol=1e-6)
        assert meter.steps == 3
        np.testing.assert_allclose(meter.total, 6 * x, rtol=1e-6)
        assert specs_of(meter.total) == ["a"]
