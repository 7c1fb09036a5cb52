"""PyTorch's rules 21 to 36 (docs/RULES.md): what a hook may return, and what it may be."""

import functools
import traceback
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from rules import MODES, each_mode, leaf, note, scalar, times, values

import jhop

each_jit = pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])


@pytest.fixture
def seen():
    return []


def hooked(mode, *hooks, factor=2.0):
    """The gradient of a chain whose middle has these hooks; it would be 3 * `factor`."""

    def fn(x):
        y = x * 3.0
        for hook in hooks:
            y.register_hook(hook)
        return (y * factor).sum()

    x = leaf(1.0, 5.0)
    mode.backward(mode.compile(fn)(x))
    return x.grad.tolist()


@each_mode
def test_rule_021_none_keeps_the_gradient(mode, seen):
    assert hooked(mode, note(seen)) == [6.0, 6.0]
    assert values(seen) == [[2.0, 2.0]]


@each_jit
def test_rule_021_in_a_jax_function_too(compile):
    """As a rule of `jax.custom_vjp`, None would mean zero."""
    assert float(compile(jax.grad(lambda x: jhop.hook(x, lambda ct: None) * 2.0))(1.0)) == 2.0


@each_mode
def test_rule_022_what_it_returns_replaces_the_gradient(mode, seen):
    assert hooked(mode, times(5.0), note(seen)) == [30.0, 30.0]
    assert values(seen) == [[10.0, 10.0]]


@each_mode
def test_rule_023_hooks_chain_in_order_of_registration(mode):
    assert hooked(mode, lambda grad: grad + 1.0, times(10.0)) == [90.0, 90.0]


@each_mode
def test_rule_024_none_inside_a_chain_is_transparent(mode):
    assert hooked(mode, lambda grad: grad + 1.0, lambda grad: None, times(10.0)) == [90.0, 90.0]


@each_mode
def test_rule_025_a_function_registered_twice_runs_twice(mode):
    double = times(2.0)
    assert hooked(mode, double, double) == [24.0, 24.0]


@each_mode
@pytest.mark.parametrize(
    ("value", "name"), [(3.0, "float"), ("g", "str"), ([1.0, 2.0], "list"), (True, "bool")], ids=lambda v: repr(v)
)
def test_rule_026_what_is_no_array_is_an_error_that_names_its_type(mode, value, name):
    with pytest.raises(jhop.HookError, match=rf"must return an array of type float32\[2\].* but returned {name}"):
        hooked(mode, lambda grad: value)
    assert issubclass(jhop.HookError, TypeError)


@each_mode
def test_rule_027_another_shape_is_an_error_though_it_would_broadcast(mode):
    def add_up(grad):
        return grad.sum()

    with pytest.raises(jhop.HookError, match=r"hook `add_up`.* float32\[2\].* returned float32\[\]"):
        hooked(mode, add_up)


@each_mode
def test_rule_028_another_dtype_is_an_error_that_names_both(mode):
    with pytest.raises(jhop.HookError, match=r"type float32\[2\].* returned float16\[2\]"):
        hooked(mode, lambda grad: grad.astype(jnp.float16))
    assert hooked(mode, lambda grad: (grad * 5.0).astype(jnp.float16).astype(grad.dtype)) == [30.0, 30.0]


@each_jit
def test_rule_028_in_a_jax_function_too(compile):
    with pytest.raises(jhop.HookError, match=r"type float32\[2\].* returned float16\[2\]"):
        compile(jax.grad(lambda x: jhop.hook(x, lambda ct: ct.astype(jnp.float16)).sum()))(jnp.ones(2))


@each_mode
def test_rule_029_one_element_is_not_broadcast_in_any_mode(mode):
    """PyTorch's compiled autograd broadcasts it."""

    def fn(x):
        y = x * 3.0
        y.register_hook(lambda grad: jnp.ones(1) * 7.0)
        return y.sum()

    with pytest.raises(jhop.HookError, match=r"type float32\[2,2\].* returned float32\[1\]"):
        mode.backward(mode.compile(fn)(jhop.tensor(jnp.ones((2, 2)), requires_grad=True)))


class Scale:
    """Callable objects and bound methods; without `__name__`."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, grad):
        return grad * self.factor

    def wrong(self, grad):
        return grad.sum() * self.factor


def scaled(factor, grad):
    return grad * factor


@each_mode
@pytest.mark.parametrize(
    "hook",
    [lambda grad: grad * 5.0, functools.partial(scaled, 5.0), Scale(5.0), Scale(5.0).__call__],
    ids=["lambda", "partial", "object", "method"],
)
def test_rule_030_any_callable_is_a_hook(mode, hook):
    assert hooked(mode, hook) == [30.0, 30.0]


@each_mode
@pytest.mark.parametrize("partial", [False, True])
def test_rule_030_errors_need_no_name(mode, partial):
    hook = functools.partial(Scale.wrong, Scale(5.0)) if partial else Scale(5.0).wrong
    with pytest.raises(jhop.HookError, match="wrong"):
        hooked(mode, hook)


@each_mode
def test_rule_031_what_cannot_be_called_is_refused_at_once(mode):
    """PyTorch takes it, and fails in the backward."""
    ran = []

    def fn(x):
        x.register_hook(3)
        ran.append(True)
        return x * 2.0

    with pytest.raises(jhop.HookError, match=r"register_hook: expected a callable hook, got int \(3\)"):
        mode.compile(fn)(scalar(1.0))
    with pytest.raises(jhop.HookError, match=r"jhop.hook: expected a callable hook, got int \(3\)"):
        jhop.hook(jnp.ones(2), 3)
    assert ran == []


@each_mode
def test_rule_032_a_hook_that_scales_in_place_changes_no_other_gradient(mode):
    """The gradients of both operands are one array here; in PyTorch, b's would be 10 too."""

    def in_place(grad):
        grad *= 10.0
        return grad

    def fn(a, b):
        a.register_hook(in_place)
        return a + b

    a, b = scalar(1.0), scalar(2.0)
    mode.backward(mode.compile(fn)(a, b))
    assert (float(a.grad), float(b.grad)) == (10.0, 1.0)


@each_mode
def test_rule_033_a_gradient_that_a_hook_keeps_stays_as_it_is(mode, seen):
    x = scalar(1.0)
    x.register_hook(note(seen))
    mode.backward(mode.compile(lambda x: x * 3.0)(x))
    x.grad *= 5.0
    mode.backward(mode.compile(lambda x: x * 7.0)(x))
    assert (values(seen), float(x.grad)) == ([3.0, 7.0], 22.0)


@each_mode
def test_rule_034_an_exception_in_a_hook_reaches_the_caller_and_no_gradient_is_set(mode):
    """In PyTorch leaves that the pass has done before the exception keep their gradient."""

    def boom(grad):
        raise ValueError("boom 7")

    def fn(x, z):
        y = x * 2.0
        y.register_hook(boom)
        return (y * 3.0 + z).sum()

    x, z = leaf(1.0, 2.0), leaf(5.0)
    z.grad = jnp.array([11.0])
    with pytest.raises((ValueError, jhop.Unsupported), match="boom 7"):
        mode.backward(mode.compile(fn, fullgraph=True)(x, z))
    assert (x.grad, z.grad.tolist()) == (None, [11.0])


@each_mode
def test_rule_035_compiled_it_is_unsupported_with_the_exception_as_its_cause(mode):
    def boom(grad):
        raise ValueError("boom 7")

    def fn(x):
        y = x * 2.0
        y.register_hook(boom)
        return y * 3.0

    try:
        mode.backward(mode.compile(fn, fullgraph=True)(scalar(1.0)))
    except ValueError as error:
        assert (mode.name, str(error)) == ("eager", "boom 7")
    except jhop.Unsupported as error:
        assert mode.name != "eager"
        assert "hook `boom`" in str(error)
        assert isinstance(error.__cause__, ValueError)
        assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "boom"
    else:
        pytest.fail("the hook did not run")


@each_mode
@pytest.mark.parametrize("holds", [True, False])
def test_rule_036_an_assertion_about_values_runs_where_there_are_values(mode, holds):
    """Eagerly as it is; compiled, on the host, with `fullgraph=False`."""

    def positive(grad):
        assert float(grad.sum()) > (0.0 if holds else 100.0), "too small"
        return grad * 5.0

    def fn(x):
        y = x * 3.0
        y.register_hook(positive)
        return (y * 2.0).sum()

    x = leaf(1.0, 5.0)
    y = mode.compile(fn)(x)
    told = nullcontext() if mode.name == "eager" else pytest.warns(UserWarning, match="`positive`")
    expected = nullcontext() if holds else pytest.raises(AssertionError, match="too small")
    with told, expected, mode.captured(jhop.compile):
        y.backward()
    assert (None if x.grad is None else x.grad.tolist()) == ([30.0, 30.0] if holds else None)


@each_mode
@pytest.mark.parametrize("holds", [True, False])
def test_rule_036_a_check_is_part_of_what_is_compiled(mode, holds):
    seen = []

    def small(grad):
        seen.append(grad.sum())
        jhop.check(grad.max() < (3.0 if holds else 1.0), "gradient {grad}", grad=grad)
        return grad * 5.0

    def fn(x):
        y = x * 3.0
        y.register_hook(small)
        return (y * 2.0).sum()

    x = leaf(1.0, 5.0)
    y = mode.compile(fn, fullgraph=True)(x)
    expected = nullcontext() if holds else pytest.raises(jhop.CheckError, match=r"`small` .*: gradient \[2\. 2\.\]")
    with expected, mode.captured():
        y.backward()
    assert (None if x.grad is None else x.grad.tolist()) == ([30.0, 30.0] if holds else None)
    assert len(seen) == (1 if holds or mode.name == "eager" else 0)


@pytest.mark.parametrize("mode", MODES[1:], ids=lambda mode: mode.name)
def test_rule_036_in_one_graph_it_is_refused_with_the_remedy(mode):
    def positive(grad):
        assert grad.sum() > 0.0

    def fn(x):
        y = x * 3.0
        y.register_hook(positive)
        return (y * 2.0).sum()

    with pytest.raises(jhop.Unsupported, match=r"(?s)`positive`.*branches on the value.*fullgraph=False"):
        mode.backward(mode.compile(fn, fullgraph=True)(leaf(1.0, 5.0)))


@each_mode
def test_rule_036_an_assertion_about_shapes_is_traced(mode):
    def pair(grad):
        assert grad.shape == (2,)
        return grad * 5.0

    assert hooked(mode, pair) == [30.0, 30.0]

