"""PyTorch's rules 109 to 129 (docs/RULES.md): captured graphs, and Python state in hooks."""

import functools
import re
import time
from contextlib import nullcontext

import jax.numpy as jnp
import numpy as np
import pytest
from rules import MODES, each_mode, leaf, note, scalar, times, values

import jhop

pytestmark = pytest.mark.leaks  # whatever the modes trace is let go of by the time that its trace ends
compiled_modes = pytest.mark.parametrize("mode", MODES[1:], ids=lambda mode: mode.name)


@pytest.fixture
def seen():
    return []


@pytest.fixture(autouse=True)
def fresh_modes():
    for mode in MODES:
        mode.fresh()


def n_traces(mode, expected):
    """Whether hooks were traced that often; eagerly they are not."""
    return len(mode.compiled) == (0 if mode.name == "eager" else expected)


def gradients(mode, hook, n=3, between=lambda i: None, **options):
    """The gradients of `n` passes through y = 2 x with this hook, then 3 y; each would be 6."""

    def fn(x):
        y = x * 2.0
        y.register_hook(hook)
        return y * 3.0

    fn = mode.compile(fn, **options)
    found, graphs = [], {}

    def compiler_fn(gm):  # as a user would have it: one function for all passes
        return graphs.setdefault(gm, mode(gm))

    for i in range(n):
        between(i)
        x = scalar(1.0)
        with mode.captured(compiler_fn):
            fn(x).backward()
        found.append(float(x.grad))
    return found


def test_rule_109_trace_wrapped_calls_the_function_where_nothing_is_traced(seen):
    assert jhop.trace_wrapped(jnp.array([2.0, 3.0]), fn=note(seen, times(5.0))).tolist() == [10.0, 15.0]
    assert values(seen) == [[2.0, 3.0]]
    x = leaf(1.0, 3.0)
    x.register_hook(lambda grad: jhop.trace_wrapped(grad, fn=note(seen, lambda grad: grad * grad)))
    (x * 3.0).sum().backward()
    assert x.grad.tolist() == [9.0, 9.0]


def test_rule_110_in_make_fx_it_is_one_opaque_call(seen):
    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct * 7.0, fn=note(seen, lambda grad: grad * grad)))(jnp.ones(2))
    assert seen == []
    assert [eqn.primitive.name for eqn in gm.jaxpr.jaxpr.eqns] == ["mul", "trace_wrapped"]
    assert "torch__dynamo__trace_wrapped_higher_order_op_self_invoke(" in gm.print_readable(print_output=False)
    assert gm(jnp.array([1.0, 2.0])).tolist() == [49.0, 196.0]


def test_rule_110_in_the_backward_of_a_jax_function_too():
    hook = times(5.0)
    gm = jhop.backward_graph(lambda x: (jhop.hook(x, hook) * 3.0).sum())(jnp.ones(2))
    assert [found.base for found, _ in gm.hooks] == [hook]
    assert jhop.inline(gm).hooks == []
    assert "result = mul * " in jhop.inline(gm).code


@compiled_modes
def test_rule_111_in_a_compiled_backward_the_body_is_inlined(mode):
    assert gradients(mode, lambda grad: grad * grad, 1) == [18.0]
    (gm,) = mode.compiled
    assert gm.hooks == []
    assert "grad * grad" in gm.code
    if mode.name == "captured":
        assert len(mode.graphs[0].hooks) == 1  # what the compiler was given


class Meter:
    """Python state of a hook."""

    def __init__(self, **state):
        vars(self).update(state)


@each_mode
def test_rule_112_a_counter_in_an_attribute_is_counted(mode):
    meter = Meter(counter=0)

    def hook(grad):
        meter.counter += 1
        return grad * meter.counter

    assert gradients(mode, hook) == [6.0, 12.0, 18.0]
    assert (meter.counter, type(meter.counter)) == (3, int)
    assert n_traces(mode, 1)
    for gm in mode.compiled:
        assert "counter + 1  # int" in gm.code
        assert gm.inputs[-1].source.endswith(".counter")


def test_rule_113_the_printed_graph_has_types_places_and_what_is_no_longer_needed():
    def hook(grad):
        return grad * 5.0

    x = leaf(1.0, 2.0)
    x.register_hook(hook)
    mode = MODES[2]
    mode.backward((x * 3.0).sum())
    (gm,) = mode.compiled
    assert re.search(r"# .*test_rules_capture.py:\d+ in .*hook: return grad \* 5.0\n *result = ", gm.code), gm.code
    assert "  # f32[2]" in gm.code
    text = gm.print_readable(print_output=False)
    assert 'result: "f32[2]" = ' in text
    assert " = None\n" in text


@each_mode
def test_rule_114_a_python_int_is_a_value_from_the_first_trace_on(mode):
    """PyTorch takes the first for a constant and traces again when it changes."""
    meter = Meter(n=10)
    found = gradients(mode, lambda grad: grad * meter.n, 3, lambda i: setattr(meter, "n", 10 + i))
    assert found == [60.0, 66.0, 72.0]
    assert n_traces(mode, 1)


@each_mode
def test_rule_115_a_nonlocal_counter_too(mode):
    n = 0

    def hook(grad):
        nonlocal n
        n += 1
        return grad * n

    assert gradients(mode, hook) == [6.0, 12.0, 18.0]
    assert (n, n_traces(mode, 1)) == (3, True)


COUNTER = 0


@each_mode
def test_rule_116_a_global_counter_too(mode):
    """PyTorch traces at each call."""
    global COUNTER
    COUNTER = 0

    def hook(grad):
        global COUNTER
        COUNTER += 1
        return grad * COUNTER

    assert gradients(mode, hook) == [6.0, 12.0, 18.0]
    assert (COUNTER, n_traces(mode, 1)) == (3, True)


@each_mode
def test_rule_117_items_of_a_dict_are_written_back(mode):
    state = {"n": 0, "norm": jnp.float32(0)}

    def hook(grad):
        state["n"] += 1
        state["norm"] = jnp.abs(grad) * state["n"]
        return grad + state["norm"]

    assert gradients(mode, hook) == [12.0, 18.0, 24.0]
    assert (state["n"], float(state["norm"]), n_traces(mode, 1)) == (3, 9.0, True)


@each_mode
def test_rule_118_a_list_gets_what_is_appended(mode, seen):
    assert gradients(mode, note(seen, times(5.0)), fullgraph=True) == [30.0] * 3
    assert (values(seen), n_traces(mode, 1)) == ([3.0] * 3, True)


@each_mode
def test_rule_119_a_branch_on_a_python_int_is_guarded(mode):
    meter = Meter(n=0)

    def hook(grad):
        meter.n += 1
        if meter.n % 2 == 1:
            return grad * 3.0
        return grad * 5.0

    assert gradients(mode, hook, 5) == [18.0, 30.0, 18.0, 30.0, 18.0]
    assert (meter.n, n_traces(mode, 2)) == (5, True)


@each_mode
def test_rule_120_an_array_in_an_attribute_may_change(mode):
    meter = Meter(scale=jnp.float32(1.0))
    found = gradients(
        mode, lambda grad: grad * meter.scale, 3, lambda i: setattr(meter, "scale", jnp.float32(5.0 + i))
    )
    assert (found, n_traces(mode, 1)) == ([30.0, 36.0, 42.0], True)


@each_mode
def test_rule_121_a_float_in_an_attribute_may_change(mode):
    meter = Meter(scale=1.0)
    found = gradients(mode, lambda grad: grad * meter.scale, 3, lambda i: setattr(meter, "scale", 5.0 + i))
    assert (found, n_traces(mode, 1)) == ([30.0, 36.0, 42.0], True)


@each_mode
def test_rule_122_a_hook_may_close_over_values_of_the_forward(mode):
    def fn(x):
        inner = x * 5.0
        y = x * 2.0

        def scale(grad):
            def deeper(grad):
                return grad * inner.value

            return deeper(grad)

        y.register_hook(scale)
        return y * 3.0

    fn = mode.compile(fn)
    found = []
    for start in (1.0, 2.0, 3.0):
        x = scalar(start)
        mode.backward(fn(x))
        found.append(float(x.grad))
    assert found == [30.0, 60.0, 90.0]


@each_mode
def test_rule_123_another_hook_on_the_same_structure_costs_no_trace_of_the_forward(mode):
    traced = [0]

    def fn(x, traced=traced.append):
        traced(1)
        return x * 2.0

    fn = mode.compile(fn)
    found = []
    for factor in (5.0, 7.0, 11.0):
        x = scalar(1.0)
        x.register_hook(times(factor))
        mode.backward(fn(x))
        found.append(float(x.grad))
    assert found == [10.0, 14.0, 22.0]
    assert len(traced) - 1 == (1 if mode.name == "compiled" else 3)


def scaled(grad, k):
    return grad * k


@each_mode
def test_rule_124_changed_keywords_of_a_partial_count(mode):
    hook = functools.partial(scaled, k=5.0)
    found = gradients(mode, hook, 3, lambda i: hook.keywords.update(k=5.0 + i))
    assert (found, n_traces(mode, 1)) == ([30.0, 36.0, 42.0], True)


@compiled_modes
def test_rule_125_print_is_refused_where_the_whole_graph_is_wanted(mode, capsys):
    def shout(grad):
        print("gradient", grad)

    with pytest.raises(jhop.Unsupported, match=r"(?s)a call to `print` in hook `shout`.*jax\.debug\.print"):
        gradients(mode, shout, 1, fullgraph=True)
    assert capsys.readouterr().out == ""


@compiled_modes
@pytest.mark.parametrize("what", ["time", "numpy"])
def test_rule_126_the_clock_and_numpy_are_refused(mode, what):
    """NumPy cannot compute on values that are traced; PyTorch takes its functions for its own."""

    def clock(grad):
        return grad * time.time()

    def convert(grad):
        return grad * np.tanh(np.asarray(grad))

    hook, message = {"time": (clock, r"`time.time` in hook `clock`"), "numpy": (convert, "hook `convert`.*numpy")}[what]
    with pytest.raises(jhop.Unsupported, match=f"(?s){message}"):
        gradients(mode, hook, 1, fullgraph=True)


@each_mode
def test_rule_126_numpy_on_what_is_not_traced_is_fine(mode):
    table = (5.0, 7.0)
    assert gradients(mode, lambda grad: grad * np.float32(np.max(table))) == [42.0] * 3


@compiled_modes
def test_rule_127_a_branch_on_a_gradient_is_refused_with_what_to_use(mode):
    def hook(grad):
        if grad.item() > 0:
            return grad * 5.0
        return grad

    def compare(grad):
        if grad > 0:
            return grad * 5.0
        return grad

    with pytest.raises(jhop.Unsupported, match="reads the value of an array"):
        gradients(mode, hook, 1, fullgraph=True)
    with pytest.raises(jhop.Unsupported, match=r"(?s)branches on the value.*`jnp.where` or `jax.lax.cond`"):
        gradients(mode, compare, 1, fullgraph=True)
    assert gradients(mode, lambda grad: jnp.where(grad > 0, grad * 5.0, grad), 1) == [30.0]


@each_mode
def test_rule_128_without_fullgraph_such_a_hook_runs_on_the_host_at_each_run(mode, seen):
    def hook(grad):
        seen.append(float(grad))
        return grad * (5.0 if float(grad) > 0 else 1.0)

    x = scalar(1.0)
    x.register_hook(hook)
    fn = mode.compile(lambda x: x * 2.0)
    compiler_fn = functools.partial(jhop.compile, fullgraph=False)
    found = []
    for i in range(3):
        x.grad = None
        warned = pytest.warns(UserWarning, match="`hook`") if (mode.name, i) == ("captured", 0) else nullcontext()
        with warned, mode.captured(compiler_fn):
            fn(x).backward()
        found.append(float(x.grad))
    assert (found, seen) == ([10.0] * 3, [2.0] * 3)


@compiled_modes
def test_rule_129_of_a_hook_that_fails_to_be_traced_nothing_is_written(mode):
    meter = Meter(n=2, kept=None)

    def hook(grad):
        meter.n += 1
        meter.kept = grad
        if float(grad) > 0:
            meter.n += 10
        return grad

    with pytest.raises(jhop.Unsupported, match="reads the value"):
        gradients(mode, hook, 1, fullgraph=True)
    assert vars(meter) == {"n": 2, "kept": None}
