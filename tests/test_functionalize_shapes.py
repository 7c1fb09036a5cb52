"""`jhop.functionalize` on state of every shape and in every control flow: as eager, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_state as shapes
import test_state_control_flow as flow
from jax import lax

import jhop

named = pytest.mark.parametrize


def agree(got, expected, *, exact):
    """Equal, Python numbers by type and exactly."""
    assert got.keys() == expected.keys()
    for path, theirs in expected.items():
        ours = got[path]
        if exact and isinstance(theirs, (int, float)):
            assert (type(ours), repr(ours)) == (type(theirs), repr(theirs)), path
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6, err_msg=path)


@named(
    ("program", "make"),
    [
        *((flow.in_nested_scans, make) for make in flow.THREADED if make is not flow.keeps_numpy),
        *((program, flow.mixes) for program in (*flow.LOOPS, *flow.CALLS) if program is not flow.in_nested_scans),
        *((flow.in_cond, make) for make in (flow.counts_and_uses, flow.accumulates)),
        (flow.in_switch, flow.averages), (flow.in_cond_in_scan, flow.decays), (flow.in_scan_in_cond, flow.mixes),
    ],
)  # fmt: skip
def test_in_control_flow(program, make):
    hook = make(flow.Box())
    fn = jax.grad(lambda x: program(flow.JAX, lambda v: jhop.hook(v, hook), x))
    pure, state0 = jhop.functionalize(fn)
    xs = jnp.stack([flow.X * (1 - 0.5 * i) for i in range(3)])
    state, outs = lax.scan(lambda s, x: pure(s, x)[::-1], state0, xs)
    eager = jax.grad(lambda x: program(flow.PYTHON, lambda v: jhop.hook(v, hook), x))
    np.testing.assert_allclose(outs, [eager(x) for x in xs], rtol=5e-5, atol=1e-6)
    left = jhop.functionalize(fn)[1]
    assert str(left) != str(state0), "these hooks write nothing"
    agree(state, left, exact=False)


def test_numbers_in_control_flow_without_a_trace():
    hook = flow.mixes(flow.Box())
    fn = jax.grad(lambda x: flow.in_scan(flow.JAX, lambda v: jhop.hook(v, hook), x))
    pure, state = jhop.functionalize(fn)
    outs = []
    for _ in range(2):
        out, state = pure(state, flow.X)
        outs.append(out)
    eager = jax.grad(lambda x: flow.in_scan(flow.PYTHON, lambda v: jhop.hook(v, hook), x))
    np.testing.assert_allclose(outs, [eager(flow.X) for _ in range(2)], rtol=5e-5)
    agree(state, jhop.functionalize(fn)[1], exact=True)


def state_cases():
    found = {}
    for test in vars(shapes).values():
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "parametrize" and mark.args[0] == "case":
                found.update((case.__name__, case) for case in mark.args[1] if callable(case))
    # Those with something between the steps change objects, which are not the state here.
    return [case for case in found.values() if len(case()) == 2]


# These work traced and untraced, not only one of "works" and "is refused".
WORK = set(
    """attribute partial_keyword partial_position bound_method callable_object keyword_default nonlocal_variable
    module_global aliases""".split()
)
# What JAX's numbers are: floats are float32, nothing is raised where one divides by zero, no root is complex.
OTHER_ARITHMETIC = {
    "float_beyond_float32", "division_by_zero_caught_later", "root_that_turns_complex", "infinity_and_nan",
}  # fmt: skip


@named("case", state_cases(), ids=lambda case: case.__name__)
def test_shapes_of_state(case):
    hook, snap = case()
    fn = shapes.gradient(hook)
    pure, state0 = jhop.functionalize(fn)
    if case.__name__ == "late_nonlocal":  # there is no variable before the hook runs
        assert not state0
        return
    before = shapes.frozen(snap())
    traced = [] if case.__name__ in OTHER_ARITHMETIC else [jax.jit(pure)]
    results = [outcome(run, state0) for run in [pure, *traced]]
    assert shapes.frozen(snap()) == before, "the objects were written to"
    if case.__name__ in WORK:
        assert not [result for result in results if isinstance(result, Exception)]
    if all(isinstance(result, Exception) for result in results):
        return
    expected = [np.asarray(fn(shapes.X)) for _ in range(3)]
    left = jhop.functionalize(fn)[1]
    for result, exact in zip(results, (True, False), strict=False):
        if not isinstance(result, Exception):
            np.testing.assert_allclose(result[0], expected, rtol=1e-5)
            agree(result[1], left, exact=exact)


def outcome(run, state):
    outs = []
    try:
        for _ in range(3):
            out, state = run(state, shapes.X)
            outs.append(out)
    except (jhop.JhopError, OverflowError) as error:  # the latter is JAX's, for an int beyond its own
        return error
    return outs, state
