"""Derivatives of higher order: reverse mode differentiates through the hook's own body, forward mode knows no hook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from under import RULES, RUNS, agree, by_hand, check, check_true_gradient, hooked, ignored

import jhop

X = np.array([0.5, -1.0, 0.75], np.float32)
S = jnp.float32(1.5)


def program(point, x, s):
    y = point(jnp.sin(x), s)
    return (y * y * y).sum() + (3 * y).sum()


def closing_over_its_input(point, x, s):
    """The tracer that a hook closes over is differentiated too."""
    return (point(x**3, jnp.cos(x) * s) * x).sum()


def grad_of_sum(f):
    return jax.grad(lambda x, s: jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, f(x, s))))


REVERSE_INSIDE = {
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
    "jacfwd of grad": lambda f: jax.jacfwd(jax.grad(f)),
    "hessian": jax.hessian,
    "grad of grad": lambda f: grad_of_sum(jax.grad(f)),
    "hessian-vector product": lambda f: lambda x, s: jax.jvp(lambda x: jax.grad(f)(x, s), (x,), (x[::-1],)),
    "linearized grad": lambda f: lambda x, s: jax.linearize(lambda x: jax.grad(f)(x, s), x)[1](x[::-1]),
    "grad of jit of grad": lambda f: grad_of_sum(jax.jit(jax.grad(f))),
    "grad of checkpoint of grad": lambda f: grad_of_sum(jax.checkpoint(jax.grad(f))),
    "vmap of hessian": lambda f: lambda x, s: jax.vmap(lambda x: jax.hessian(f)(x, s))(jnp.stack([x, x / 2])),
    "grad of vmap of grad": lambda f: grad_of_sum(
        lambda x, s: jax.vmap(lambda x: jax.grad(f)(x, s))(jnp.stack([x, x / 2]))
    ),
}

THIRD = {
    "grad of grad of grad": lambda f: grad_of_sum(grad_of_sum(jax.grad(f))),
    "jacfwd of jacrev of grad": lambda f: jax.jacfwd(jax.jacrev(jax.grad(f))),
    "jacrev of jacfwd of grad": lambda f: jax.jacrev(jax.jacfwd(jax.grad(f))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", REVERSE_INSIDE)
def test_second_order(how, rule):
    check(program, rule, "jax.jit", X, derivative=REVERSE_INSIDE[how])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["hessian", "grad of grad"])
def test_second_order_in_every_run(how, rule, run):
    check(program, rule, run, X, derivative=REVERSE_INSIDE[how])


@pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])
@pytest.mark.parametrize("how", ["hessian", "jacrev of grad", "grad of grad", "grad of jit of grad"])
def test_tracer_closed_over_is_differentiated(how, run):
    check(closing_over_its_input, "closing", run, X, derivative=REVERSE_INSIDE[how])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", THIRD)
def test_third_order(how, rule):
    check(program, rule, "jax.jit", X, derivative=THIRD[how])


@pytest.mark.parametrize("run", ["eager", "jhop.jit"])
def test_third_order_in_other_runs(run):
    check(closing_over_its_input, "closing", run, X, derivative=THIRD["grad of grad of grad"])


in_runs = pytest.mark.parametrize("run", ["eager", "jax.jit", "jhop.jit"])


@in_runs
@pytest.mark.parametrize("rule", RULES)
def test_forward_mode_of_forward_mode_has_no_hook(rule, run):
    def of(point):
        return jax.jacfwd(jax.jacfwd(lambda x, s: program(point, x, s)))

    agree(RUNS[run](of(hooked(RULES[rule])))(X, S), of(ignored)(X, S))


@in_runs
@pytest.mark.parametrize("rule", RULES)
def test_reverse_mode_of_forward_mode_hooks_tangents(rule, run):
    """Forward mode leaves the hook on the tangent, where reverse mode finds it; the value itself has none."""

    def by_formula(x, s):
        tangents = jnp.cos(x) * jnp.eye(3)
        slopes = 3 * jnp.sin(x) ** 2 + 3
        return jax.vmap(lambda tangent: (slopes * by_hand(RULES[rule])(tangent, s)).sum())(tangents)

    of = jax.jacrev(jax.jacfwd(lambda x, s: program(hooked(RULES[rule]), x, s)))
    agree(RUNS[run](of)(X, S), jax.jacrev(by_formula)(X, S))


def test_closed_forms():
    # hook(x) ** 3 under a hook that squares: (3 x^2)^2, then 36 x^3, then 108 x^2.
    def cube(x):
        return jhop.hook(x, lambda ct: ct * ct) ** 3

    orders = [jax.grad(cube), jax.grad(jax.grad(cube)), jax.grad(jax.grad(jax.grad(cube)))]
    assert [float(f(2.0)) for f in orders] == [144.0, 288.0, 432.0]
    assert [float(jax.jit(f)(2.0)) for f in orders] == [144.0, 288.0, 432.0]


def test_a_hook_of_the_second_derivative_alone():
    # The hook sits on the gradient itself, so that only the second derivative goes through it.
    def of(x):
        return (jhop.hook(jax.grad(lambda x: (x**3).sum())(x), lambda ct: ct * 5) ** 2).sum()

    agree(jax.jit(jax.grad(of))(X), jnp.array(5 * 2 * (3 * X**2) * 6 * X))


@pytest.mark.parametrize("program", [program, closing_over_its_input], ids=["plain", "closing"])
def test_true_gradient(program):
    check_true_gradient(program, X, order=2)
