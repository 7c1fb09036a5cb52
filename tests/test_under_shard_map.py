"""Hooks under `jax.shard_map`, `jax.smap` and `jax.pmap`: collectives in hooks, nesting, inlining, Python state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from under import RULES, RUNS, agree, by_hand, check, check_true_gradient, hooked, inlined_and_jitted, make_mesh

import jhop

x = jnp.arange(16, dtype=jnp.float32).reshape(8, 2) / 7 - 0.6
# Equations one by one are slow in a shard, and nested ones JAX cannot run.
COMPILED = ("jax.jit", "jhop.jit", inlined_and_jitted)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((4, 2), ("a", "b"))


def added(ct, s):
    return 2 * ct + lax.psum(ct, "a")


def averaged(ct, s):
    return ct * ct + lax.pmean(ct, "a")


def both(ct, s):
    return ct * s + lax.pmean(ct * ct, "a")


both.closes = True


def gathered(ct, s):
    return ct + lax.all_gather(ct, "a").max(0)


def scattered(ct, s):
    return ct + lax.psum_scatter(lax.all_gather(ct, "a"), "a") / 3


def passed_on(ct, s):
    n = lax.axis_size("a")
    return ct - lax.ppermute(ct, "a", [(i, (i + 1) % n) for i in range(n)])


def indexed(ct, s):
    return ct * (2 + lax.axis_index("a")).astype(ct.dtype)


COLLECTIVES = (added, averaged, gathered, scattered, passed_on, indexed)
named = pytest.mark.parametrize


def way(run):
    return RUNS.get(run, run)


def shards(body, mesh, **options):
    """`body(x, s)` over shards of `x`, one number from each, summed."""
    fn = jax.shard_map(lambda x, s: body(x, s)[None], mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), **options)
    return lambda x, s: fn(x, s).sum()


def over(mesh, inner=None, **options):
    """A program that hooks a value in each shard."""

    def body(point, x, s):
        y = point(jnp.sin(x), s)
        return (y**2 * jnp.cos(y)).sum()

    return lambda point, x, s: shards(functools.partial(inner or body, point), mesh, **options)(x, s)


MODES = {"check_vma": {}, "no check_vma": {"check_vma": False}, "partly auto": {"axis_names": {"a"}}}


@named(("mode", "rule"), [("check_vma", rule) for rule in RULES] + [(mode, both) for mode in MODES])
def test_hook_in_each_shard(rule, mode, mesh):
    check(over(mesh, **MODES[mode]), rule, COMPILED, x)


@named(("run", "check_vma"), [("eager", True), ("make_fx", False), ("inline", True)])
def test_equation_by_equation(check_vma, run, mesh):
    check(over(mesh, check_vma=check_vma), averaged, run, x)


@named("rule", COLLECTIVES)
def test_collectives(rule, mesh):
    check(over(mesh), rule, COMPILED, x)


@named("run", COMPILED)
@named("check_vma", [True, False])
def test_psum_alone_is_the_sum_of_all_shards(check_vma, run, mesh):
    """Its result does not vary over the mesh, the cotangent that it stands for does."""

    def body(x):
        return jhop.hook(x, lambda ct: lax.psum(ct, "a")) ** 2

    fn = jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check_vma)
    got = way(run)(jax.grad(lambda x: fn(x).sum()))(x)
    shards = np.split(np.asarray(2 * x), mesh.shape["a"])
    np.testing.assert_allclose(got, np.tile(sum(shards), (len(shards), 1)), rtol=1e-6)


@named("mode", MODES)
@named("rule", ["closing"])
def test_hook_on_a_replicated_weight(rule, mode, mesh):
    """With `check_vma` the hook sees the sum over shards, without it each shard's part; as by hand."""

    def program(point, w, s):
        def body(x, w, s):
            return (jnp.tanh(x @ point(w, s)) ** 2).sum()[None]

        specs = (P("a"), P(), P())
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("a"), **MODES[mode])(x, w, s).sum()

    check(program, rule, COMPILED, jnp.array([[0.5, -1.0], [0.25, 2.0]], jnp.float32))


# -- nesting -----------------------------------------------------------------------------------------------------------


def scan_inside(point, x, s):
    def step(total, row):
        return point(total, s) + point(jnp.sin(row), s), total

    # The sum begins with a row, so that it varies over the mesh as the rest does.
    total, totals = lax.scan(step, x[0], x[1:])
    return (total**2).sum() + totals.sum()


def remat_inside(point, x, s):
    block = jax.checkpoint(lambda x: jnp.sin(point(jnp.cos(x), s)))
    return (block(x) ** 2).sum()


def jit_inside(point, x, s):
    return jax.jit(lambda x: jnp.sin(point(x * 2, s)) ** 2)(x).sum()


def cond_inside(point, x, s):
    return lax.cond(lax.axis_index("a") % 2 == 0, lambda x: point(x, s) ** 2, jnp.sin, x).sum()


def vmap_inside(point, x, s):
    def one(row):
        return point(row, s) ** 2 * lax.psum(row, "rows")

    return jax.vmap(one, axis_name="rows")(x).sum()


def grad_inside(point, x, s):
    return (jax.grad(lambda x: (point(x, s) ** 3).sum())(x) ** 2).sum()


def hook_outside_too(point, x, s):
    return (point(jnp.cos(point(x, s)), s) ** 2).sum()


INSIDE = (scan_inside, remat_inside, jit_inside, cond_inside, vmap_inside, grad_inside, hook_outside_too)


@named("rule", [both])
@named("inner", INSIDE)
def test_structure_in_a_shard(inner, rule, mesh):
    rule = "closing" if inner is cond_inside else rule  # no collective that only some devices reach
    # JAX refuses a collective over a name that is no mesh axis where it checks over which axes values vary.
    check(over(mesh, inner, check_vma=inner is not vmap_inside), rule, COMPILED, x)


def in_scan(per_shard, point, x, s):
    def step(total, scale):
        return total + per_shard(point, x * scale, s), None

    return lax.scan(step, jnp.float32(0), jnp.array([0.5, 2.0, -1.0], jnp.float32))[0]


def in_remat(per_shard, point, x, s):
    return jax.checkpoint(lambda x: per_shard(point, jnp.sin(x), s))(x)


def in_jit(per_shard, point, x, s):
    return jax.jit(lambda x, s: per_shard(point, x, s))(x, s)


def in_vmap(per_shard, point, x, s):
    return jax.vmap(lambda scale: per_shard(point, x * scale, s))(jnp.array([0.5, 2.0], jnp.float32)).sum()


def in_vmap_over_the_mesh(per_shard, point, x, s):
    scales = jnp.array([0.5, 2.0], jnp.float32)
    return jax.vmap(lambda scale: per_shard(point, x * scale, s), spmd_axis_name="b")(scales).sum()


OUTSIDE = (in_scan, in_remat, in_jit, in_vmap, in_vmap_over_the_mesh)


@named("rule", [both])
@named("outer", OUTSIDE)
def test_shards_in_a_structure(outer, rule, mesh):
    check(functools.partial(outer, over(mesh)), rule, COMPILED, x)


def over_both(ct, s):
    return ct * ct + lax.psum(ct, ("a", "b"))


@named("rule", ["closing", over_both])
def test_nested(rule, mesh):
    def program(point, x, s):
        def inner(y, s):
            return point(jnp.sin(y), s) ** 2

        def outer(x, s):
            y = x if rule is over_both else point(jnp.cos(x), s)  # here `b` is not in scope
            specs = {"in_specs": (P(None, "b"), P()), "out_specs": P(None, "b"), "check_vma": False}
            return jax.shard_map(inner, axis_names={"b"}, **specs)(y, s)

        specs = {"in_specs": (P("a"), P()), "out_specs": P("a"), "check_vma": False}
        return jax.shard_map(outer, mesh=mesh, axis_names={"a"}, **specs)(x, s).sum()

    # With `check_vma` JAX cannot lower derivatives of nested ones; scalars it cannot keep for them either.
    check(program, rule, COMPILED, x, jnp.array([[1.5]], jnp.float32))


@named("rule", [both])
@named("check_vma", [True, False])
def test_mesh_of_the_context(check_vma, rule, mesh):
    with jax.set_mesh(mesh):
        check(over(None, check_vma=check_vma), rule, COMPILED, x)


@named("rule", [both])
def test_pmap(rule, mesh):
    def program(point, x, s):
        return jax.pmap(lambda x, s: point(jnp.sin(x), s) ** 2, axis_name="a", in_axes=(0, None))(x, s).sum()

    check(program, rule, COMPILED, x[: jax.device_count()])


@pytest.mark.skipif(not hasattr(jax, "smap"), reason="this JAX has no jax.smap")
@named("rule", [both])
def test_smap(rule, mesh):
    def program(point, x, s):
        fn = jax.smap(lambda x, s: point(jnp.sin(x), s) ** 2, in_axes=(0, None), out_axes=0, axis_name="a")
        return fn(x, s).sum()

    with jax.set_mesh(mesh):
        check(program, rule, COMPILED, x)


# -- derivatives -------------------------------------------------------------------------------------------------------


def second(fn):
    return jax.grad(lambda x, s: (jax.grad(fn)(x, s) ** 2).sum())


@named("check_vma", [True, False])
@named("rule", [both])
def test_second_derivative(rule, check_vma, mesh):
    check(over(mesh, check_vma=check_vma), rule, COMPILED, x, derivative=second)


def test_true_gradient(mesh):
    check_true_gradient(over(mesh), x)


@named("run", COMPILED)
def test_forward_mode_ignores_the_hook(run, mesh):
    program = over(mesh)

    def tangent(point):
        return lambda x, s: jax.jvp(lambda x: program(point, x, s), (x,), (jnp.cos(x),))[1]

    agree(way(run)(tangent(hooked(added)))(x, jnp.float32(2)), tangent(lambda x, s: x)(x, jnp.float32(2)))


# -- inlining ----------------------------------------------------------------------------------------------------------


def equations(jaxpr, name):
    opened = getattr(jaxpr, "jaxpr", jaxpr)
    found = [eqn for eqn in opened.eqns if eqn.primitive.name == name]
    for eqn in opened.eqns:
        for param in eqn.params.values():
            if hasattr(param, "eqns") or hasattr(param, "jaxpr"):
                found += equations(param, name)
    return found


@named("mode", MODES)
def test_inlined_equation_is_the_same_but_for_its_body(mode, mesh):
    program = over(mesh, **MODES[mode])
    gm = jhop.make_fx(jax.grad(lambda x: program(hooked(added), x, jnp.float32(2))))(x)
    inlined = jhop.inline(gm)
    before, after = equations(gm.jaxpr, "shard_map"), equations(inlined.jaxpr, "shard_map")
    assert len(before) == len(after) == 2
    for old, new in zip(before, after, strict=True):
        assert old.params.keys() == new.params.keys()
        for key in old.params.keys() - {"jaxpr"}:
            assert old.params[key] == new.params[key], key
        assert [v.aval for v in old.outvars] == [v.aval for v in new.outvars]
    assert equations(gm.jaxpr, "trace_wrapped") and not equations(inlined.jaxpr, "trace_wrapped")
    assert equations(inlined.jaxpr, "psum") or equations(inlined.jaxpr, "psum_invariant")


def test_hook_that_hooks(mesh):
    def twice(ct, s):
        return 3 * jax.grad(lambda ct: (jhop.hook(ct, lambda inner: inner * lax.psum(inner, "a")) ** 2).sum())(ct)

    def plain(ct, s):
        return 3 * (2 * ct) * lax.psum(2 * ct, "a")

    expected = jax.grad(lambda x: over(mesh)(by_hand(plain), x, jnp.float32(1)))(x)
    for run in COMPILED:
        agree(way(run)(jax.grad(lambda x: over(mesh)(hooked(twice), x, jnp.float32(1))))(x), expected)


def test_symbolic_sizes(mesh):
    def program(point, x, s):
        return over(mesh)(point, jnp.concatenate([x, jnp.ones((8, 2 * x.shape[1]), jnp.float32)], 1), s)

    def grad(point):
        return jax.grad(lambda x: program(point, x, jnp.float32(1)))

    (size,) = jax.export.symbolic_shape("b")
    gm = jhop.inline(jhop.make_fx(grad(hooked(added)))(jax.ShapeDtypeStruct((8, size), jnp.float32)))
    inputs = [v for eqn in equations(gm.jaxpr, "shard_map") for v in eqn.params["jaxpr"].invars]
    assert any(f"{8 // mesh.shape['a']},3*b" in str(v.aval) for v in inputs)
    for value in (x, x[:, :1]):
        agree(jax.jit(gm)(value), jax.jit(grad(by_hand(added)))(value))


def compiled_text(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return sorted(line.split("=", 1)[1].split("(")[0].split(")")[0] for line in text.splitlines() if " = " in line)


def test_compiles_to_what_is_written_by_hand(mesh):
    program = over(mesh)

    def grad(point):
        return jax.grad(lambda x, s: program(point, x, s))

    s = jnp.float32(2)
    expected = compiled_text(grad(by_hand(added)), x, s)
    assert compiled_text(grad(hooked(added)), x, s) == expected
    gm = jhop.inline(jhop.make_fx(grad(hooked(added)))(x, s))
    assert compiled_text(lambda x, s: gm(x, s), x, s) == expected


# -- Python state ------------------------------------------------------------------------------------------------------


class Scaler:
    def __init__(self):
        self.factor = 2.0
        self.table = jnp.array([1.0, 3.0], jnp.float32)
        self.seen = 0

    def scale(self, ct):
        return ct * self.factor * self.table + lax.psum(ct, "a")

    def count(self, ct):
        self.seen += 1
        return ct * 2.0


def scaled(ct, factor, table):
    return ct * factor * table + lax.psum(ct, "a")


@named(("inner", "check_vma"), [(None, True), (None, False), (scan_inside, True), (remat_inside, False)])
def test_state_is_read_anew_at_each_call(inner, check_vma, mesh):
    scaler = Scaler()
    program = over(mesh, inner, check_vma=check_vma)

    def point(value, s):
        return jhop.hook(value, scaler.scale)

    step = jhop.jit(jax.grad(lambda x: program(point, x, jnp.float32(1))), fullgraph=True)
    for factor in (2.0, -1.5):
        scaler.factor, scaler.table = factor, scaler.table + 1
        hand = by_hand(lambda ct, s, factor=factor, table=scaler.table: scaled(ct, factor, table))
        agree(step(x), jax.jit(jax.grad(lambda x, hand=hand: program(hand, x, jnp.float32(1))))(x))
    gm = jhop.inline(jhop.make_fx(jax.grad(lambda x: program(point, x, jnp.float32(1))))(x))
    state = [given.source.rpartition(".")[2] for given in gm.inputs if given.role == "state"]
    assert sorted(state) == ["factor", "table"]


def test_state_written_inside_under_jax_jit_is_refused(mesh):
    scaler = Scaler()
    grad = jax.grad(lambda x: over(mesh)(lambda value, s: jhop.hook(value, scaler.count), x, jnp.float32(1)))
    with pytest.raises(jhop.Unsupported, match=r"writes Python state \(`.*\.seen`\)"):
        jax.jit(grad)(x)
    assert scaler.seen == 0


def test_array_kept_by_a_hook_inside_is_refused(mesh):
    """What a shard computes does not leave it by way of an object."""
    scaler = Scaler()

    def keep(ct):
        scaler.table = ct[0]

    grad = jax.grad(lambda x: over(mesh)(lambda value, s: jhop.hook(value, keep), x, jnp.float32(1)))
    before = scaler.table
    for run in COMPILED:
        with pytest.raises(jhop.Unsupported, match="writes Python state"):
            way(run)(grad)(x)
        assert scaler.table is before


# -- the contract ------------------------------------------------------------------------------------------------------


def wrong_shape(ct):
    return ct[0]


def wrong_dtype(ct):
    return ct.astype(jnp.bfloat16)


@named("run", ["eager", *COMPILED])
@named("hook", [wrong_shape, wrong_dtype])
def test_broken_contract(hook, run, mesh):
    def message(fn):
        with pytest.raises(jhop.HookError, match=f"hook `{hook.__name__}`.* must return an array of type") as caught:
            fn()
        return str(caught.value)

    inside = jax.grad(lambda x: over(mesh)(lambda value, s: jhop.hook(value, hook), x, jnp.float32(1)))
    outside = jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())
    assert message(lambda: way(run)(inside)(x)) == message(lambda: way(run)(outside)(x[: 8 // mesh.shape["a"]]))


@named("run", ["eager", *COMPILED])
def test_result_that_varies_more_than_the_cotangent(run, mesh):
    def of_its_own(ct):
        return ct * lax.axis_index("a").astype(ct.dtype)

    def body(x, w):
        return (x * jhop.hook(w, of_its_own)).sum()[None]

    fn = jax.shard_map(body, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    with pytest.raises(jhop.HookError, match=r"hook `.*of_its_own`.* varies over mesh axes \['a'\]"):
        way(run)(jax.grad(lambda w: fn(x, w).sum()))(jnp.ones(2, jnp.float32))


@named("run", ["jhop.jit", "inline"])
def test_unknown_axis_is_named(run, mesh):
    grad = jax.grad(lambda x: over(mesh)(hooked(lambda ct, s: ct * lax.axis_size("nowhere")), x, jnp.float32(1)))
    with pytest.raises(jhop.Unsupported, match=r"hook `<lambda>` .* unbound axis name: nowhere"):
        way(run)(grad)(x)
