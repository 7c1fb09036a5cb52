"""PyTorch's rules 130 to 138 (docs/RULES.md): what is captured anew, what a pass checks, how it is asked for."""

import logging
import re

import jax.numpy as jnp
import pytest
from rules import MODES, each_mode, leaf, note, scalar, times, values

import jhop


@pytest.fixture
def seen():
    return []


@pytest.fixture(autouse=True)
def fresh_modes():
    for mode in MODES:
        mode.fresh()


def test_rule_130_a_structure_is_captured_once_and_each_other_one_for_itself():
    """Which operations, hooks, `inputs` and shapes there are is the structure; values and leaves are not."""
    mode = MODES[2]
    hook = times(5.0)

    def one(fn=lambda x, w: x * w, shape=(2,), hook=hook, **options):
        x, w = (jhop.tensor(jnp.full(shape, value), requires_grad=True) for value in (2.0, 3.0))
        x.register_hook(hook)
        given = {name: [x] for name in options}
        mode.backward(fn(x, w).sum(), **given)
        return x.grad.ravel()[0], len(mode.graphs)

    add = lambda x, w: x + w * 7.0  # noqa: E731
    assert [one() for _ in range(3)] == [(15.0, 1)] * 3
    assert [one(add) for _ in range(2)] == [(5.0, 2)] * 2
    assert [one(inputs=True) for _ in range(2)] == [(15.0, 3)] * 2
    compiled = jhop.compile(add)
    assert [one(compiled) for _ in range(2)] == [(5.0, 4)] * 2
    assert one(shape=(3,)) == (15.0, 5)
    assert one(hook=times(11.0)) == (33.0, 5)  # what a hook closes over is a value too
    assert one(hook=lambda grad: grad * 11.0) == (33.0, 6)
    assert one() == (15.0, 6)


def test_rule_130_what_made_a_graph_be_traced_again_is_told():
    class Every:
        def __init__(self):
            self.n = 0

        def __call__(self, grad):
            self.n += 1
            return grad * (5.0 if self.n % 2 else 7.0)

    every, compiled = Every(), []

    def compiler_fn(gm):
        compiled.append(jhop.compile(gm, fullgraph=True))
        return compiled[-1]

    found = []
    for _ in range(4):
        x = scalar(1.0)
        x.register_hook(every)
        with jhop.compiled_autograd.enable(compiler_fn):
            (x * 3.0).backward()
        found.append(float(x.grad))
    assert found == [15.0, 21.0, 15.0, 21.0]
    (graph,) = compiled
    reasons = [trace.reason for trace in jhop.explain(graph).traces]
    assert reasons == ["first call", "`(L['hooks'][0].n + 1) % 2` was True and is False"]


def test_rule_131_names_say_where_values_come_from():
    fn = jhop.compile(lambda x: x * x)
    x = leaf(1.0, 3.0)
    mode = MODES[2]
    mode.backward(fn(x).sum())
    (gm,) = mode.compiled
    text = gm.print_readable(print_output=False)
    assert re.search(r'aot\d+_tangents_1: "f32\[2\]" = ', text)
    assert "# SumBackward (NodeCall 1)" in gm.code
    assert "# AccumulateGrad (NodeCall 3)" in gm.code
    assert x.grad.tolist() == [2.0, 6.0]


def test_rule_132_what_is_logged_is_settled_when_the_context_is_entered(caplog):
    def step(factor, size):
        x = jhop.tensor(jnp.ones(size), requires_grad=True)
        x.register_hook(times(factor))
        (x * 3.0).sum().backward()
        return x.grad.tolist()

    logger = "jhop.recompiles"
    for level, inside in ((logging.WARNING, logging.INFO), (logging.INFO, logging.WARNING)):
        caplog.set_level(logging.INFO, logger)  # restores the logger's level at the end
        logging.getLogger(logger).setLevel(level)
        caplog.clear()
        with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True)):
            logging.getLogger(logger).setLevel(inside)
            assert [step(5.0, size) for size in (2, 3)] == [[15.0] * 2, [15.0] * 3]
        assert bool(caplog.messages) == (level == logging.INFO)


def test_rule_133_the_context_ends_and_both_ways_give_the_same(seen):
    mode = MODES[2]

    def step():
        x = leaf(1.0, 3.0)
        y = x * x
        y.register_hook(lambda grad: grad * 5.0)
        return x, (y * 7.0).sum()

    found = []
    for i in range(4):
        x, y = step()
        if i % 2:
            mode.backward(y, retain_graph=True)
            before = len(mode.graphs)
            y.backward()
            assert len(mode.graphs) == before
        else:
            y.backward(retain_graph=True)
            mode.backward(y)
        found.append(x.grad.tolist())
    assert found == [[140.0, 420.0]] * 4
    with pytest.raises(ZeroDivisionError):
        with mode.captured():
            raise ZeroDivisionError
    x, y = step()
    before = len(mode.graphs)
    y.backward()
    assert len(mode.graphs) == before == 2  # with `.grad` at None, and not


@each_mode
def test_rule_134_hooks_on_intermediates_work_in_compiled_functions(mode, seen):
    def fn(x):
        y = x * 2.0
        z = y * 4.0
        z.register_hook(note(seen, times(3.0)))
        y.register_hook(note(seen, lambda grad: grad.clip(max=10.0)))
        return z + y * 3.0

    x = scalar(1.0)
    mode.backward(mode.compile(fn)(x))
    assert (values(seen), float(x.grad)) == ([1.0, 15.0], 20.0)


def test_rule_135_shapes_and_dtypes_are_checked_between_nodes():
    mode = MODES[2]
    x = leaf(1.0, 3.0)
    mode.backward((x * 3.0).sum())
    (gm,) = mode.compiled
    assert [eqn.primitive.name for eqn in gm.jaxpr.jaxpr.eqns].count("validate_outputs") == 3
    assert "ops_validate_outputs([" in gm.print_readable(print_output=False)
    y = (x * 5.0).sum()
    wrong = lambda gm: lambda *flat: [out[:1] for out in gm(*flat)]  # noqa: E731
    with pytest.raises(jhop.JhopError, match=r"a Tensor of shape \(2,\) and dtype float32 got the gradient"):
        with jhop.compiled_autograd.enable(wrong):
            y.backward(retain_graph=True)
    assert x.grad.tolist() == [3.0, 3.0]


@each_mode
def test_rule_136_backward_says_what_is_wrong_and_returns_none(mode):
    x = leaf(2.0, 3.0)
    fn = mode.compile(lambda x: x * x)
    y = fn(x)
    bad = [
        (y, (), r"a gradient can be left out only for a scalar, this Tensor has shape \(2,\)"),
        (y, (jnp.ones(3),), r"expected shape \(2,\) and dtype float32.* got shape \(3,\)"),
        (y, (jnp.ones(2, jnp.float16),), "dtype float16"),
        (y, (3.0,), "expected the gradient as an array or a Tensor, got float"),
        (jhop.tensor(1.0), (), "this Tensor does not require grad"),
    ]
    for root, args, message in bad:
        with pytest.raises(jhop.JhopError, match=f"backward.*{message}"):
            mode.backward(root, *args)
    assert x.grad is None
    with mode.captured():
        assert y.backward(jnp.array([1.0, 5.0])) is None
    with pytest.raises(jhop.JhopError, match="already run and its saved arrays were freed. Give retain_graph=True"):
        mode.backward(y, jnp.ones(2))
    assert x.grad.tolist() == [4.0, 30.0]


@each_mode
def test_rule_137_an_unused_input_is_an_error_or_none_or_zeros(mode):
    x, w = scalar(2.0), leaf(3.0, 4.0)
    fn = mode.compile(lambda x, w: x * 3.0)
    with pytest.raises(jhop.JhopError, match=r"no output depends on inputs\[1\], of shape \(2,\)"):
        mode.grad(fn(x, w), [x, w])
    assert mode.grad(fn(x, w), [x, w], allow_unused=True) == (3.0, None)
    used, unused = mode.grad(fn(x, w), [x, w], materialize_grads=True)
    assert (float(used), unused.tolist()) == (3.0, [0.0, 0.0])


@each_mode
def test_rule_138_roots_given_twice_count_twice(mode):
    x = scalar(3.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    with mode.captured():
        jhop.autograd.backward([y, y])
    assert float(x.grad) == 4.0
