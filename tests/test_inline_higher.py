"""`jhop.inline` through every equation that holds jaxprs: it enters each, or names the one that it cannot."""

import dataclasses
import functools
from types import SimpleNamespace as Box
from typing import NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from under import make_mesh

import jhop
from tests import under

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)


def wrapped(fn):
    return lambda x: jhop.trace_wrapped(x, fn=fn)


def inner(eqn):
    """The jaxprs anywhere in an equation's parameters, JAX's "hi" primitives included."""
    hi = vars(eqn.params["_prim"]) if "_prim" in eqn.params else {}
    parts = jax.tree.leaves([*eqn.params.values(), *hi.values()], is_leaf=is_jaxpr)
    return jex_core.jaxprs_in_params(dict(enumerate(parts)))


def is_jaxpr(value):
    return isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr))


def equations(jaxpr):
    """All equations of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inside in inner(eqn):
            yield from equations(inside)


def names(gm):
    return [eqn.primitive.name for eqn in equations(gm.jaxpr.jaxpr)]


# Every primitive with a jaxpr among its parameters that JAX's public functions make, with a hook inside.


def with_a_custom_jvp(h):
    f = jax.custom_jvp(lambda x: h(x) * 2.0)
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0] * 2.0))
    return f


def with_a_custom_vjp(h):
    f = jax.custom_vjp(lambda x: h(x) * 2.0)
    f.defvjp(lambda x: (h(x) * 2.0, None), lambda _, ct: (h(ct) * 2.0,))
    return f


def with_optimize_remat(h):
    f = jax.custom_vjp(lambda x: h(x) * 2.0)
    f.defvjp(lambda x: (h(x) * 2.0, x), lambda x, ct: (h(ct) * 2.0 * x,), optimize_remat=True)
    return lambda x: jax.vjp(f, x)[0]


def with_custom_partitioning(h):
    f = custom_partitioning(lambda x: h(x) * 2.0)
    f.def_partition(
        infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
        partition=lambda mesh, args, result: (mesh, lambda x: x, result.sharding, (args[0].sharding,)),
        sharding_rule="i -> i",
    )
    return f


def with_custom_vmap(h):
    f = custom_vmap(lambda x: h(x) * 2.0)
    f.def_vmap(lambda size, batched, x: (f(x), True))
    return f


def with_a_root(h):
    def solve(f, y):
        return lax.fori_loop(0, 20, lambda _, y: y - f(y) / 3.0, y)

    return lambda x: lax.custom_root(lambda y: 3.0 * y - h(x), x, solve, lambda g, y: y / 3.0)


def with_a_ref(h):
    def fn(x):
        ref = jax.new_ref(x)

        @jax.jit
        def work(ref):
            ref[...] = h(ref[...]) * 2.0

        work(ref)
        return ref[...]

    return fn


def with_a_ref_in_scan(h):
    def fn(x):
        ref = jax.new_ref(x)

        def body(c, _):
            ref[...] = h(ref[...]) * 0.5
            return c, None

        lax.scan(body, 0, None, length=3)
        return ref[...]

    return fn


def with_a_kernel(h):
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = h(x_ref[...]) * 2.0

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((3,), jnp.float32), interpret=True)


PROGRAMS = {
    "jit": lambda h: lambda x: jax.jit(lambda x: h(x) * 2.0)(x),
    "jit that donates": lambda h: lambda x: jax.jit(lambda x: h(x) * 2.0, donate_argnums=0)(x + 1.0),
    "scan": lambda h: lambda x: lax.scan(lambda c, row: (h(c) * 0.5, h(row)), x, x)[0],
    "while": lambda h: lambda x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, h(c[1])), (0, x))[1],
    "while's condition": lambda h: lambda x: lax.while_loop(
        lambda c: (h(c[1]).sum() < 90.0) & (c[0] < 9), lambda c: (c[0] + 1, c[1] * 1.5), (0, x))[1],
    "cond": lambda h: lambda x: lax.cond(x[0] > 0, lambda x: h(x) * 2.0, lambda x: x, x),
    "switch, all branches": lambda h: lambda x: lax.switch(
        jnp.int32(x[2]) - 2, [lambda x: h(x), lambda x: h(x) * 2.0, lambda x: h(x + 1.0)], x),
    "cond by platform": lambda h: lambda x: lax.platform_dependent(x, tpu=lambda x: x, default=lambda x: h(x) * 2.0),
    "remat": lambda h: jax.checkpoint(lambda x: jnp.sin(h(jnp.sin(x)))),
    "custom_jvp": with_a_custom_jvp,
    "custom_vjp": with_a_custom_vjp,
    "custom_vjp under jit": lambda h: jax.jit(with_a_custom_vjp(h)),
    "optimize_remat": with_optimize_remat,
    "custom_root": with_a_root,
    "custom_linear_solve": lambda h: lambda x: lax.custom_linear_solve(
        lambda v: v * 2.0, x, lambda _, b: h(b) / 2.0, symmetric=True),
    "custom_linear_solve, both": lambda h: lambda x: lax.custom_linear_solve(
        lambda v: x * v, x, lambda _, b: h(b) / x, lambda _, b: h(b) * h(x)),
    "linear_call": lambda h: lambda x: jax.custom_derivatives.linear_call(
        lambda r, v: h(v) * r, lambda r, ct: ct * r, jnp.float32(2.0), x),
    "custom_vmap": with_custom_vmap,
    "custom_partitioning": with_custom_partitioning,
    "composite": lambda h: lambda x: lax.composite(lambda x: h(x) * 2.0, "my.double")(x),
    "reduce": lambda h: lambda x: lax.reduce(x, np.float32(0.0), lambda a, b: h(a) + b, (0,)),
    "reduce_window": lambda h: lambda x: lax.reduce_window(
        x, np.float32(0.0), lambda a, b: a + h(b), (2,), (1,), "VALID"),
    "scatter": lambda h: lambda x: x.at[jnp.array([0, 1])].apply(lambda v: h(v) * 2.0),
    "associative_scan": lambda h: lambda x: lax.associative_scan(lambda a, b: h(a) + b, x),
    "map in batches": lambda h: lambda x: lax.map(h, x, batch_size=2),
    "a ref in jit": with_a_ref,
    "a ref in scan": with_a_ref_in_scan,
    "pallas_call": with_a_kernel,
    "jit in scan in cond in remat": lambda h: jax.checkpoint(lambda x: lax.cond(
        x[0] > 0, lambda x: lax.scan(lambda c, _: (jax.jit(lambda v: h(v))(c) * 0.5, None), x, None, length=2)[0],
        jnp.sin, x)),
}  # fmt: skip
# What these hold is traced for a place that can take no further input.
NO_STATE = {
    "linear_call": "linear_call", "custom_vmap": "custom_vmap_call", "custom_partitioning": "custom_partitioning",
    "composite": "composite", "reduce": "reduce", "reduce_window": "reduce_window", "scatter": "scatter",
    "optimize_remat": "remat_opt", "pallas_call": "pallas_call",
}  # fmt: skip


@pytest.mark.parametrize("kind", PROGRAMS)
def test_no_hook_is_left(kind):
    program = PROGRAMS[kind](wrapped(lambda v: v * v))
    gm = jhop.make_fx(program)(X)
    assert "trace_wrapped" in names(gm)
    inlined = jhop.inline(gm)
    assert "trace_wrapped" not in names(inlined)
    expected = PROGRAMS[kind](lambda v: v * v)(X)
    np.testing.assert_allclose(jax.jit(lambda x: jax.tree.leaves(inlined(x))[0])(X), expected, rtol=1e-6)
    np.testing.assert_allclose(jhop.jit(program, fullgraph=True)(X), expected, rtol=1e-6)
    assert under.differ(expected, PROGRAMS[kind](lambda v: v)(X))


@pytest.mark.parametrize("kind", PROGRAMS)
def test_text_of_an_inlined_graph(kind):
    inlined = jhop.inline(jhop.make_fx(PROGRAMS[kind](wrapped(lambda v: v * v)))(X))
    compile(inlined.code, kind, "exec")
    inlined.print_readable(False)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_hook_that_makes_an_array(kind):
    """An array made in a body is a constant of it, which some equations may not have."""

    def rule(v):
        return v * jnp.array(np.float32([1.5, 2.5, 3.5]))[: v.size].reshape(v.shape) if v.ndim else v * v

    program = PROGRAMS[kind](wrapped(rule))
    if kind == "pallas_call":
        with pytest.raises(Exception, match="capture"):  # JAX's rule for kernels
            PROGRAMS[kind](rule)(X)
        return
    if kind in ("linear_call", "custom_partitioning"):
        with pytest.raises(jhop.Unsupported, match=f"inside `{kind}`, or that makes an array"):
            jhop.inline(jhop.make_fx(program)(X))
        return
    inlined = jhop.inline(jhop.make_fx(program)(X))
    got = jax.jit(lambda x: jax.tree.leaves(inlined(x))[0])(X)
    np.testing.assert_allclose(got, PROGRAMS[kind](rule)(X), rtol=1e-6)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_hook_that_reads_state(kind):
    box = Box(k=2.0, a=jnp.float32(0.5))

    def rule(v):
        return v * (box.k + box.a)

    program = PROGRAMS[kind](wrapped(rule))
    if kind in NO_STATE:
        with pytest.raises(jhop.Unsupported, match=f"inside `{NO_STATE[kind]}"):
            jhop.inline(jhop.make_fx(program)(X))
        assert (box.k, float(box.a)) == (2.0, 0.5)
        return
    compiled = jhop.jit(program, fullgraph=True)
    for box.k in (2.0, 3.0):
        np.testing.assert_allclose(compiled(X), PROGRAMS[kind](rule)(X), rtol=1e-6)
    inlined = jhop.inline(jhop.make_fx(program)(X))
    assert [given.source.rpartition(".")[2] for given in inlined.inputs if given.role == "state"] == ["k", "a"]
    compile(inlined.code, kind, "exec")


# A primitive of somebody else's, whose jaxpr sits where JAX's own primitives have none.


class Pair(NamedTuple):
    left: object
    right: object


@dataclasses.dataclass(frozen=True)
class Spec:
    body: object
    note: str


class Table(dict):
    """Parameters of equations must have a hash."""

    def __hash__(self):
        return hash(tuple(self))


HOLDERS = {
    "tuple": (lambda j: (1, j), lambda p: p[1]),
    "dict": (lambda j: Table(a=1, body=j), lambda p: p["body"]),
    "named tuple": (lambda j: Pair(None, j), lambda p: p.right),
    "dataclass": (lambda j: Spec(j, "n"), lambda p: p.body),
    "deep": (lambda j: Table(a=(Pair(0, Spec((j,), "n")),)), lambda p: p["a"][0].right.body[0]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_jaxpr_in_a_container_is_entered(holder):
    put, get = HOLDERS[holder]
    theirs = jex_core.Primitive("theirs")

    def run(x, *, held):
        return jax.core.eval_jaxpr(get(held).jaxpr, get(held).consts, x)[0]

    theirs.def_impl(run)
    theirs.def_abstract_eval(lambda x, held: x)
    held = put(jax.make_jaxpr(wrapped(lambda v: v * v))(X))
    inlined = jhop.inline(jhop.make_fx(lambda x: theirs.bind(x, held=held))(X))
    (eqn,) = inlined.jaxpr.jaxpr.eqns
    assert type(eqn.params["held"]) is type(held)
    assert [e.primitive.name for e in get(eqn.params["held"]).jaxpr.eqns] == ["mul"]
    np.testing.assert_array_equal(inlined(X), X * X)


def test_state_in_an_unknown_primitive_is_refused_by_name():
    theirs = jex_core.Primitive("theirs")
    theirs.def_abstract_eval(lambda x, held: x)
    box = Box(k=2.0)
    held = jax.make_jaxpr(wrapped(lambda v: v * box.k))(X)
    with pytest.raises(jhop.Unsupported, match="inside `theirs`"):
        jhop.inline(jhop.make_fx(lambda x: theirs.bind(x, held=held))(X))


# Hooks of hooks.


def gradient_with(fn):
    """A hook that takes a gradient with a hook in it."""
    return lambda ct: jax.grad(lambda y: (jhop.hook(jnp.sin(y), fn) ** 2).sum())(ct)


def three(ct):
    return ct * 3.0


HOOKS = {
    "gradient": gradient_with(three),
    "three deep": gradient_with(gradient_with(gradient_with(jnp.square))),
    "trace_wrapped": wrapped(wrapped(wrapped(three))),
    "jit": lambda ct: jax.jit(gradient_with(three))(ct),
    "scan": lambda ct: lax.scan(lambda c, _: (gradient_with(three)(c) * 0.1, None), ct, None, length=2)[0],
    "scan of trace_wrapped": lambda ct: lax.scan(lambda c, _: (wrapped(three)(c) * 0.1, None), ct, None, length=2)[0],
    "vmap": lambda ct: jax.vmap(gradient_with(three))(ct),
    "remat": lambda ct: jax.grad(jax.checkpoint(lambda y: jnp.sin(jhop.hook(jnp.sin(y), jnp.square)).sum()))(ct),
    "cond": lambda ct: lax.cond(ct[0] > 0, gradient_with(three), gradient_with(jnp.square), ct),
    "hessian": lambda ct: jax.hessian(lambda y: (jhop.hook(jnp.sin(y), jnp.square) ** 2).sum())(ct).sum(0),
    "closure": lambda ct: jax.grad(lambda y: (jhop.hook(jnp.sin(y), lambda c: c * ct) ** 2).sum())(ct),
    "closure in scan": lambda ct: lax.scan(
        lambda c, _: (jax.grad(lambda y: (jhop.hook(y, lambda v: v * c) ** 2).sum())(c) * 0.1, None), ct, None, length=2
    )[0],
    "gradient of a scan": lambda ct: jax.grad(
        lambda y: lax.scan(lambda c, _: (jnp.sin(jhop.hook(c, jnp.square)), None), y, None, length=3)[0].sum())(ct),
    "jhop.jit": lambda ct: jhop.jit(gradient_with(three))(ct),
    "captured graph": lambda ct: jhop.make_fx(gradient_with(three))(X)(ct),
}  # fmt: skip


def loss_with(fn):
    return jax.grad(lambda x: (jhop.hook(jnp.sin(x), fn) ** 2).sum())


@pytest.mark.parametrize("kind", HOOKS)
def test_inlining_is_a_fixpoint(kind):
    fn = loss_with(HOOKS[kind])
    expected = fn(X)
    inlined = jhop.inline(jhop.make_fx(fn)(X))
    assert "trace_wrapped" not in names(inlined)
    np.testing.assert_allclose(jax.tree.leaves(inlined(X))[0], expected, rtol=1e-5)
    np.testing.assert_allclose(jhop.jit(fn, fullgraph=True)(X), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(fn)(X), expected, rtol=1e-5)
    assert str(jhop.inline(inlined).jaxpr) == str(inlined.jaxpr)


@pytest.mark.parametrize("through", ["gradient", "jit", "scan", "vmap", "cond"])
def test_inner_hook_reads_state(through):
    box = Box(k=2.0)

    def inner_hook(ct):
        return ct * box.k

    take = gradient_with(inner_hook)
    outer = {
        "gradient": take,
        "jit": lambda ct: jax.jit(lambda c: take(c))(ct),  # a new function: JAX finds one that it knows again
        "scan": lambda ct: lax.scan(lambda c, _: (take(c) * 0.1, None), ct, None, length=2)[0],
        "vmap": lambda ct: jax.vmap(take)(ct),
        "cond": lambda ct: lax.cond(ct[0] > 0, lambda c: take(c), jnp.negative, ct),
    }[through]
    compiled = jhop.jit(loss_with(outer), fullgraph=True)
    for box.k in (2.0, 3.0, 5.0):
        np.testing.assert_allclose(compiled(X), loss_with(outer)(X), rtol=1e-5)


def test_inner_hook_writes_state():
    """Counted at each run: a hook of a hook is part of it."""
    box = Box(n=0, last=jnp.zeros(3))

    def inner_hook(ct):
        box.n += 1
        box.last = ct
        return ct * box.n

    compiled = jhop.jit(loss_with(gradient_with(inner_hook)), fullgraph=True)
    got = [compiled(X) for _ in range(3)]
    last, box.n = box.last, 0
    expected = [loss_with(gradient_with(inner_hook))(X) for _ in range(3)]
    assert box.n == 3
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(last, box.last, rtol=1e-5)


@pytest.mark.parametrize("through", ["jit", "scan", "cond"])
def test_inner_hook_that_writes_state_in_a_loop_is_refused(through):
    """Traced once, run many times: the count would be wrong, so it is no count."""
    box = Box(n=0)

    def inner_hook(ct):
        box.n += 1
        return ct * 2.0

    outer = {
        "jit": lambda ct: jax.jit(wrapped(inner_hook))(ct),
        "scan": lambda ct: lax.scan(lambda c, _: (wrapped(inner_hook)(c), None), ct, None, length=3)[0],
        "cond": lambda ct: lax.cond(ct[0] > 0, wrapped(inner_hook), jnp.negative, ct),
    }[through]
    with pytest.raises(jhop.Unsupported, match="writes Python state"):
        jhop.jit(loss_with(outer), fullgraph=True)(X)
    assert box.n == 0


def endless(ct):
    return jhop.trace_wrapped(ct, fn=endless)


def endless_gradient(ct):
    return jax.grad(lambda y: (jhop.hook(y, endless_gradient) ** 2).sum())(ct)


@pytest.mark.parametrize("hook", [endless, endless_gradient])
@pytest.mark.parametrize("run", ["jax.jit", "jhop.jit", "inline"])
def test_endless_recursion_is_named(hook, run):
    with pytest.raises(jhop.Unsupported, match=f"`{hook.__name__}`.*recurses without end") as caught:
        under.RUNS[run](loss_with(hook))(X)
    error = caught.value
    while error is not None:
        assert not isinstance(error, RecursionError)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_recursion_that_ends():
    def hook(ct, depth=5):
        return ct if depth == 0 else jhop.trace_wrapped(ct * 2.0, fn=functools.partial(hook, depth=depth - 1))

    np.testing.assert_allclose(jhop.jit(loss_with(hook), fullgraph=True)(X), loss_with(hook)(X))
    assert "trace_wrapped" not in names(jhop.inline(jhop.make_fx(loss_with(hook))(X)))


@pytest.mark.leaks
def test_nothing_leaks_from_hooks_of_hooks():
    with jax.checking_leaks():
        jhop.inline(jhop.make_fx(loss_with(HOOKS["closure"]))(X))


# Source, names, mesh.


def frames(eqn):
    """(file, line) of the innermost frame of an equation that is in this file."""
    codes, offsets = eqn.source_info.traceback.raw_frames()
    for code, offset in zip(codes, offsets, strict=True):
        if code.co_filename == __file__:
            return next(line for start, end, line in code.co_lines() if start <= offset < end)
    return None


def test_source_and_name_stack_stay():
    def body(c, _):
        with jax.named_scope("attention"):
            c = jnp.sin(wrapped(lambda v: v * v)(c))
        return c, None

    def fn(x):
        with jax.named_scope("model"):
            x = jnp.cos(x)
            return lax.scan(body, x, None, length=2)[0] + jax.checkpoint(lambda x: jnp.tan(wrapped(three)(x)))(x)

    gm = jhop.make_fx(fn)(X)
    inlined = jhop.inline(gm)

    def places(gm):
        return {e.primitive.name: (frames(e), str(e.source_info.name_stack)) for e in equations(gm.jaxpr.jaxpr)}

    before, after = places(gm), places(inlined)
    for name in ("cos", "sin", "scan", "tan", "add"):
        assert after[name] == before[name], name
    assert before["sin"][1] == "attention" and before["cos"][1] == "model"
    assert after["mul"][0] is not None


def test_name_scopes_of_a_gradient_stay():
    def fn(x):
        with jax.named_scope("head"):
            return (jhop.hook(jnp.sin(x), jnp.square) ** 2).sum()

    gm = jhop.make_fx(jax.grad(fn))(X)

    def stacks(gm):
        return [str(e.source_info.name_stack) for e in gm.jaxpr.jaxpr.eqns if e.primitive.name == "cos"]

    assert stacks(jhop.inline(gm)) == stacks(gm)
    assert "head" in stacks(gm)[0]


def test_mesh_context_stays():
    mesh = make_mesh((8,), ("i",))

    def fn(x):
        x = jnp.sin(x)
        x = jax.jit(lambda x: jnp.cos(wrapped(three)(x)))(x)
        return lax.scan(lambda c, _: (jnp.tan(wrapped(three)(c)), None), x, None, length=2)[0]

    with jax.set_mesh(mesh):
        gm = jhop.make_fx(fn)(X)
    inlined = jhop.inline(gm)  # outside the mesh
    for found in (gm, inlined):
        contexts = {e.primitive.name: e.ctx.cur_abstract_mesh for e in equations(found.jaxpr.jaxpr)}
        assert all(contexts[name] == mesh.abstract_mesh for name in ("sin", "cos", "scan", "tan")), contexts


def test_hook_runs_in_the_mesh_of_its_equation():
    mesh = make_mesh((8,), ("i",))

    def hook(ct):
        return lax.with_sharding_constraint(ct * 3.0, jax.P("i"))

    x = jnp.arange(8.0)
    with jax.set_mesh(mesh):
        gm = jhop.make_fx(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))(x)
    inlined = jhop.inline(gm)
    (eqn,) = [e for e in equations(inlined.jaxpr.jaxpr) if e.primitive.name == "sharding_constraint"]
    assert eqn.ctx.cur_abstract_mesh == mesh.abstract_mesh
    out = jax.jit(lambda x: jax.tree.leaves(inlined(x))[0])(jax.device_put(x, jax.NamedSharding(mesh, jax.P())))
    np.testing.assert_array_equal(out, 6.0 * x)
