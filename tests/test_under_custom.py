"""`jhop.hook` and JAX's custom rules, around and inside each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

import jhop
from tests import under
from tests.under import check, check_true_gradient

X = jnp.array([0.5, -2.0, 3.0], jnp.float32)
A = jnp.diag(jnp.array([2.0, 3.0, 4.0], jnp.float32)) + 0.25


def a_custom_jvp():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 5.0 * tangents[0]))
    return f


def a_custom_vjp():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (5.0 * ct * x,))
    return f


def around_custom_jvp(point, x, s):
    return (point(a_custom_jvp()(point(x, s)), s) ** 2).sum()


def around_custom_vjp(point, x, s):
    return (point(a_custom_vjp()(point(x, s)), s) ** 2).sum()


def around_relu(point, x, s):
    return (jax.nn.relu(point(x, s)) * jax.nn.gelu(point(x, s))).sum()


def inside_a_function_whose_rule_uses_it(point, x, s):
    @jax.custom_jvp
    def f(x, s):
        return jnp.sin(point(x, s))

    @f.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda x: jnp.sin(point(x, primals[1])) * 3.0, primals[:1], tangents[:1])

    return (f(x, s) ** 2).sum()


def inside_fwd(point, x, s):
    """A hook in `fwd` is not on the way of any cotangent; a gradient taken there is."""

    @jax.custom_vjp
    def f(x, s):
        return jnp.sin(x)

    def fwd(x, s):
        return jnp.sin(x), jax.grad(lambda x: (point(x, s) ** 3).sum())(x)

    f.defvjp(fwd, lambda slope, ct: (ct * slope, jnp.zeros(())))
    return (f(x, s) ** 2).sum()


def inside_bwd(point, x, s):
    @jax.custom_vjp
    def f(x, s):
        return jnp.sin(x)

    def bwd(saved, ct):
        x, s = saved
        return jax.grad(lambda x: (point(x, s) ** 2 * ct).sum())(x), jnp.zeros(())

    f.defvjp(lambda x, s: (jnp.sin(x), (x, s)), bwd)
    return f(x, s).sum()


def with_nondiff_argnums(point, x, s):
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
    def f(scale, x, fn):
        return fn(x) * scale

    f.defvjp(lambda scale, x, fn: (fn(x) * scale, x), lambda scale, fn, x, ct: (ct * scale * fn(x),))
    return (point(f(3.0, point(x, s), jnp.sin), s) ** 2).sum()


def with_symbolic_zeros(point, x, s):
    @jax.custom_vjp
    def f(x, y):
        return jnp.sin(x), jnp.cos(y)

    def fwd(x, y):
        return (jnp.sin(x.value), jnp.cos(y.value)), (x.value, x.perturbed, y.perturbed)

    def bwd(saved, cts):
        x, *_ = saved
        unused = isinstance(cts[1], jax.custom_derivatives.SymbolicZero)
        return (jnp.zeros_like(x) if isinstance(cts[0], jax.custom_derivatives.SymbolicZero) else cts[0] * 2.0), (
            jnp.zeros_like(x) if unused else cts[1]
        )

    f.defvjp(fwd, bwd, symbolic_zeros=True)
    return (point(f(point(x, s), x)[0], s) ** 2).sum()


def jvp_with_symbolic_zeros(point, x, s):
    @jax.custom_jvp
    def f(x, y):
        return x * y

    def rule(primals, tangents):
        assert isinstance(tangents[1], jax.custom_derivatives.SymbolicZero)
        return primals[0] * primals[1], 3.0 * tangents[0]

    f.defjvp(rule, symbolic_zeros=True)
    return (point(f(point(x, s), jnp.float32([1.0, 2.0, 3.0])), s) ** 2).sum()


def custom_gradient(point, x, s):
    @jax.custom_gradient
    def f(x):
        return jnp.sin(x), lambda ct: jax.grad(lambda x: (point(x, s) ** 2 * ct).sum())(x)

    return (f(point(x, s)) ** 2).sum()


def optimized_remat(point, x, s):
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * x * 2.0,), optimize_remat=True)
    return jax.checkpoint(lambda x: jnp.sin(point(f(point(x, s)), s)))(x).sum()


def in_scan(point, x, s):
    f, g = a_custom_jvp(), a_custom_vjp()
    return lax.scan(lambda c, row: (f(point(c, s)) + g(point(row, s)), None), x, jnp.stack([x, 2.0 * x]))[0].sum()


def custom_root(point, x, s):
    def f(y):
        return y**3 - point(x, s)

    def solve(f, y):
        return lax.fori_loop(0, 20, lambda _, y: y - f(y) / (3.0 * y * y), y)

    return (lax.custom_root(f, jnp.sign(x), solve, lambda g, y: y / g(jnp.ones_like(y))) ** 2).sum()


def around_linear_solve(point, x, s):
    def solve(matvec, b):
        return jnp.linalg.inv(A) @ b

    def transpose_solve(vecmat, b):
        return jnp.linalg.inv(A.T) @ b

    return (point(lax.custom_linear_solve(lambda v: A @ v, point(x, s), solve, transpose_solve), s) ** 2).sum()


def matrix_of_a_linear_solve(point, x, s):
    """The hook is on the matrix that the functions close over."""
    d = point(jnp.cos(x) + 2.0, s)
    return (lax.custom_linear_solve(lambda v: d * v, x, lambda _, b: b / d, symmetric=True) ** 2).sum()


def linear_solve_of_jax(point, x, s):
    return (point(jnp.linalg.solve(A + 0.1 * jnp.diag(point(x, s)), point(jnp.sin(x), s)), s) ** 2).sum()


def linear_call(point, x, s):
    return (jax.custom_derivatives.linear_call(lambda r, v: v * r, lambda r, ct: ct * r, s, point(x, s)) ** 2).sum()


def with_closure_convert(point, x, s):
    w = jnp.cos(x)
    converted, consts = jax.closure_convert(lambda z: point(z, s) * w, x)
    return (converted(x, *consts) ** 2).sum()


PROGRAMS = [
    around_custom_jvp, around_relu, inside_a_function_whose_rule_uses_it, inside_fwd, inside_bwd,
    with_nondiff_argnums, with_symbolic_zeros, jvp_with_symbolic_zeros, custom_gradient, optimized_remat, in_scan,
    custom_root, around_linear_solve, matrix_of_a_linear_solve, linear_solve_of_jax, linear_call, with_closure_convert,
]  # fmt: skip


@pytest.mark.parametrize(("rule", "run"), under.PRODUCT)
def test_gradient(rule, run):
    check(around_custom_vjp, rule, run, X)


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(PROGRAMS))
def test_gradient_of(program, rule, run):
    check(program, rule, run, X)


@pytest.mark.parametrize("run", under.RUNS)
@pytest.mark.parametrize("rule", under.RULES)
def test_inside_a_jvp_rule(rule, run):
    """The rule's tangent is transposed, and the hook in it with it, which a hand-written rule could not be."""
    of_rule = under.RULES[rule]

    @jax.custom_jvp
    def f(x, s):
        return jnp.sin(x)

    @f.defjvp
    def _(primals, tangents):
        return f(*primals), 5.0 * under.hooked(of_rule)(tangents[0] * 2.0, primals[1])

    s = jnp.float32(1.5)
    got = under.RUNS[run](jax.grad(lambda x, s: (f(x, s) ** 2).sum()))(X, s)
    under.agree(got, 2.0 * of_rule(5.0 * 2.0 * jnp.sin(X), s))


@pytest.mark.parametrize("run", ["jhop.jit", "inline"])
@pytest.mark.parametrize("program", [around_relu, inside_bwd], ids=lambda program: program.__name__)
def test_second_derivative(program, run):
    check(program, "nonlinear", run, X, derivative=lambda fn: jax.grad(lambda x, s: jnp.sin(jax.grad(fn)(x, s)).sum()))


def test_true_gradient():
    check_true_gradient(linear_solve_of_jax, X, modes=("rev",))


# Functions with a rule for vmap or for partitioning: JAX differentiates neither, but gradients may be taken inside.


def gradient(point, x, s):
    return jax.grad(lambda x: (jnp.sin(point(x, s)) ** 2).sum())(x)


def inside_custom_vmap(point, x, s):
    @custom_vmap
    def f(x):
        return gradient(point, x, s)

    @f.def_vmap
    def _(size, batched, x):
        return 10.0 * jax.vmap(lambda x: gradient(point, x, s))(x), True

    return f(x) + jax.vmap(f)(jnp.stack([x, 2.0 * x])).sum(0)


def inside_custom_partitioning(point, x, s):
    f = custom_partitioning(lambda x, s: gradient(point, x, s))

    def partition(mesh, args, result):
        return mesh, lambda x, s: gradient(point, x, s), result.sharding, tuple(arg.sharding for arg in args)

    f.def_partition(
        infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding, partition=partition,
        sharding_rule="i, -> i",
    )  # fmt: skip
    return f(x, s)


def inside_composite(point, x, s):
    return lax.composite(lambda x, s: gradient(point, x, s), "my.gradient")(x, s)


def inside_linear_solve(point, x, s):
    def solve(matvec, b):
        return b / (2.0 + gradient(point, b, s))

    return lax.custom_linear_solve(lambda v: v * (2.0 + gradient(point, x, s)), x, solve, symmetric=True)


FORWARD = [inside_custom_vmap, inside_custom_partitioning, inside_composite, inside_linear_solve]


@pytest.mark.parametrize(("program", "rule", "run"), under.spread(FORWARD))
def test_gradient_inside(program, rule, run):
    check(program, rule, run, X, derivative=lambda fn: fn)


def test_custom_rule_survives_inlining():
    """A function with its own rule, not yet differentiated, keeps it."""

    @jax.custom_jvp
    def f(x):
        return jhop.trace_wrapped(x, fn=jnp.sin)

    f.defjvp(lambda primals, tangents: (f(*primals), 5.0 * tangents[0]))
    inlined = jhop.inline(jhop.make_fx(f)(X))
    np.testing.assert_array_equal(jax.grad(lambda x: jax.tree.leaves(inlined(x))[0].sum())(X), [5.0] * 3)


def test_forward_mode_passes_by():
    def of(point):
        return jax.jvp(lambda x: around_custom_jvp(point, x, jnp.float32(1.5)), (X,), (jnp.cos(X),))

    under.agree(of(under.hooked(under.nonlinear)), of(under.ignored))
