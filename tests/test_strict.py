"""`jhop.strict`: an error where a value is used past the hook on it."""

import inspect
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import jhop


def clip(ct):
    return ct.clip(-1.0, 1.0)


def line_of(fn, text):
    """`file:line` of the line of a function that has this text in it."""
    lines, first = inspect.getsourcelines(fn)
    (at,) = [i for i, line in enumerate(lines) if text in line]
    return f"test_strict.py:{first + at}"


def refused(fn, *args, use=None, hook="jhop.hook(", run=lambda fn: jax.grad(fn)):
    """Asserts that a function is refused, for a use on the line with the text `use` of it; the message."""
    with pytest.raises(jhop.HookError) as caught:
        run(jhop.strict(fn))(*args)
    message = str(caught.value)
    assert message.startswith(f"jhop.strict: `{fn.__name__}` uses a value past hook `clip` (test_strict.py:")
    assert line_of(fn, hook) in message
    assert "binding it to the same name: x = jhop.hook(x, f)" in message
    assert ("returned after it" if use is None else f"used after it, at {line_of(fn, use)} (`") in message
    return message


def test_a_later_use_is_refused():
    def loss(x):
        z = x * 2.0
        hooked = jhop.hook(z, clip)
        y = hooked * 3.0
        return y + z * 5.0  # past

    message = refused(loss, 1.0, use="# past")
    assert "(`hooked = jhop.hook(z, clip)`)" in message
    for run in (jax.jit, lambda fn: jax.jit(jax.grad(fn)), lambda fn: jhop.jit(jax.grad(fn)), lambda fn: fn):
        refused(loss, jnp.float32(1.0), use="# past", run=run)
    refused(loss, jnp.ones(3), use="# past", run=lambda fn: jax.vmap(jax.grad(fn)))


def test_of_an_input_and_of_a_value_that_it_closes_over():
    def loss(x):
        y = jhop.hook(x, clip)
        return y * x  # past

    refused(loss, 1.0, use="# past")

    def outer(w):
        def inner(x):
            y = jhop.hook(w, clip)
            return y * x + jnp.sin(w)  # closed over

        refused(inner, x, use="# closed over")
        return w

    x = jnp.float32(2.0)
    jax.grad(outer)(3.0)


def test_what_is_returned():
    def loss(x):
        jhop.hook(x, clip)
        return x

    refused(loss, 1.0)


def test_uses_before_the_hook_and_of_the_hooked_value_are_fine():
    calls = []

    @jhop.strict
    def loss(x):
        calls.append(None)
        z = x * 3.0
        x = jhop.hook(x, clip)
        x = jhop.hook(x, lambda ct: ct * 10.0)
        return z + x * 2.0

    for run in (lambda fn: fn, jax.jit, jhop.jit):
        assert float(run(jax.grad(loss))(7.0)) == 3.0 + 1.0  # 2 * 10, clipped
    calls.clear()
    jax.grad(loss)(7.0)
    assert len(calls) == 1  # it was checked before


def test_uses_that_no_gradient_comes_back_from_are_fine():
    @jhop.strict
    def loss(x):
        hooked = jhop.hook(x, clip)
        scale = jax.lax.stop_gradient(x) + jnp.float32(x > 0.0) + jnp.argmax(x).astype(float)
        other = jhop.hook(hooked * 5.0, lambda ct: ct * x)
        jax.debug.callback(lambda value: None, x)
        return (other * scale * jnp.where(x > 1.0, 2.0, 3.0) * jnp.where(jnp.isnan(x), 0.0, hooked)).sum()

    assert float(jax.grad(loss)(2.0)) != 0.0


def test_another_hook_on_the_value_from_before():
    def loss(x):
        y = jhop.hook(x, clip)  # first
        return y + jhop.hook(x, lambda ct: ct * 2.0)  # second

    refused(loss, 1.0, hook="# first", use="# second")


def test_leaves_of_a_pytree():
    def loss(params, x):
        hooked = jhop.hook(params, clip)
        y = hooked["w"] * x + hooked["b"]
        return y + params["b"] ** 2  # decay

    params = {"w": jnp.float32(2.0), "b": jnp.float32(1.0)}
    refused(loss, params, 3.0, use="# decay")


def test_in_a_jitted_function_and_past_one():
    @jax.jit
    def inner(x):
        return jhop.hook(x, clip) * 3.0

    def loss(x):
        y = inner(x)
        return y + x  # past

    with pytest.raises(jhop.HookError, match=re.escape(f"used after it, at {line_of(loss, '# past')}")):
        jax.grad(jhop.strict(loss))(1.0)

    def within(x):
        @jax.jit
        def inner(x):
            y = jhop.hook(x, clip)
            return y + jnp.sin(x)  # inside

        return inner(x)

    refused(within, 1.0, use="# inside")

    def into(x):
        y = jhop.hook(x, clip)
        return y + jax.jit(lambda a, b: jnp.where(a > 0.0, 2.0, 3.0) + jnp.cos(b) * a)(2.0, x)  # into

    refused(into, 1.0, use="# into")
    fine = jhop.strict(lambda x: jhop.hook(x, clip) * jax.jit(lambda a: jnp.where(a > 0.0, 2.0, 3.0))(x))
    assert float(jax.grad(fine)(1.0)) == 1.0


def test_in_and_around_loops_and_branches():
    def body(x):
        def step(total, _):
            y = jhop.hook(x, clip)
            return total + y + x * 2.0, None  # step

        return jax.lax.scan(step, 0.0, None, length=3)[0]

    refused(body, 1.0, use="# step")

    def carried(x):
        def step(c, _):
            y = jhop.hook(c, clip)
            return y * c, None  # carried

        return jax.lax.scan(step, x, None, length=3)[0]

    refused(carried, 1.0, use="# carried")

    def past(x):
        def step(total, _):
            return total + jhop.hook(x, clip), None

        return jax.lax.scan(step, 0.0, None, length=3)[0] + x  # past

    refused(past, 1.0, use="# past")

    def used_in_scan(x):
        y = jhop.hook(x, clip)
        return jax.lax.scan(lambda total, _: (total + jnp.sin(x), None), y, None, length=3)[0]  # in a scan

    refused(used_in_scan, 1.0, use="# in a scan")

    def branch(x):
        y = jhop.hook(x, clip)
        return jax.lax.cond(x > 0.0, lambda: y, lambda: jnp.sin(x))  # branch

    refused(branch, 1.0, use="# branch")

    def chosen(x):
        y = jhop.hook(x, clip)
        return jax.lax.cond(x > 0.0, lambda: y, lambda: x)  # chosen

    refused(chosen, 1.0, use="# chosen")

    def looped(x):
        y = jhop.hook(x, clip)
        return jax.lax.fori_loop(0, 3, lambda i, c: c * jnp.sin(x), y)  # loop

    refused(looped, 1.0, use="# loop", run=lambda fn: lambda x: jax.jvp(fn, (x,), (1.0,)))

    @jhop.strict
    def fine(x):
        x = jhop.hook(x, clip)
        steps = jax.lax.scan(lambda c, _: (jhop.hook(c, clip) * x, None), x, None, length=2)[0]
        return jax.lax.cond(x > 0.0, lambda: jhop.hook(x, clip), lambda: steps) + jax.lax.while_loop(
            lambda c: (c[0] < 2) & (jax.lax.stop_gradient(x) > 0.0), lambda c: (c[0] + 1, c[1]), (0, 1.0)
        )[1]

    assert float(jax.grad(fine)(2.0)) == 1.0


def test_in_checkpoint_and_custom_derivatives():
    def loss(x):
        @jax.checkpoint
        def inner(x):
            y = jhop.hook(x, clip)
            return jnp.sin(x) * y  # inner

        return inner(x)

    refused(loss, 1.0, use="# inner")

    def relu(x):
        y = jhop.hook(x, clip)
        return y + jax.nn.relu(x)  # relu

    refused(relu, 1.0, use="# relu")


def test_once_per_kind_of_arguments():
    traces = []

    @jhop.strict
    def loss(x, n, flag=None):
        traces.append(None)
        y = jhop.hook(x, clip)
        return (y * n).sum() + (x.sum() if n == 3 else 0.0)

    x = jnp.ones(2)
    for _ in range(2):
        jax.grad(loss)(x, 2.0)
    assert len(traces) == 3  # a check and two calls
    jax.grad(loss)(jnp.ones(3), 2.0)
    jax.grad(loss)(x, 5.0, flag=[1])  # a list is no leaf, its item is
    assert len(traces) == 7
    for _ in range(2):
        with pytest.raises(jhop.HookError, match="uses a value past hook `clip`"):
            jax.grad(loss)(x, 3)
    assert len(traces) == 9  # what was refused is checked again


@pytest.mark.parametrize("run", [jax.grad, lambda fn: jhop.jit(jax.grad(fn))])
def test_again_when_what_the_function_looks_up_has_changed(run):
    hooks, flags, counter = [], SimpleNamespace(past=False, scale=2.0), SimpleNamespace(n=0)
    checks = []

    def count(ct):
        counter.n += 1
        return ct * counter.n

    @jhop.strict
    def loss(x):
        checks.append(None)
        y = jhop.hook(x, count)
        for hook in hooks:
            y = jhop.hook(y, hook)
        return y * flags.scale + (x if flags.past else 0.0)

    grad = run(loss)
    assert [float(grad(1.0)) for _ in range(3)] == [2.0, 4.0, 6.0]
    assert len(checks) == (4 if run is jax.grad else 2)  # of which one to check
    flags.past = True
    with pytest.raises(jhop.HookError, match="uses a value past hook `count`"):
        grad(1.0)
    flags.past = False
    hooks.append(clip)
    assert float(grad(1.0)) == 4.0
    hooks.append(lambda ct: jhop.hook(ct, clip))
    flags.past = True
    with pytest.raises(jhop.HookError, match="uses a value past hook `count`"):
        grad(1.0)
    assert counter.n == 4


def test_no_new_trace_of_what_is_compiled_around_it():
    class Count:
        def __init__(self):
            self.runs = 0

        def __call__(self, ct):
            self.runs += 1
            return ct * 2.0

    count = Count()

    @jhop.strict
    def loss(x):
        x = jhop.hook(x, count)
        return (x * 3.0).sum()

    step = jhop.jit(jax.grad(loss), fullgraph=True)
    for _ in range(4):
        assert step(jnp.ones(2)).tolist() == [6.0, 6.0]
    assert (count.runs, step.versions()) == (4, 1)
    assert step(jnp.ones(3)).tolist() == [6.0, 6.0, 6.0]
    assert step(jnp.ones(2)).tolist() == [6.0, 6.0]
    assert (count.runs, step.versions()) == (6, 2)


def test_values_around_a_function_with_hooks_may_be_used_elsewhere():
    layer = jhop.hook_fn(jnp.sin, pre=lambda ct: ct * 2.0, post=lambda grads: (grads[0] * 3.0,))
    both = jhop.hook_fn(lambda x: x, pre=lambda ct: ct * 5.0, post=lambda grads, cts: (grads[0] + cts,))

    def residual(x):
        x = x + layer(x)
        return (x + both(x)).sum()

    x = jnp.array([0.5, -1.0, 2.0])
    expected = 11.0 * (1.0 + 6.0 * jnp.cos(x))
    for grad in (jax.grad(jhop.strict(residual)), jhop.jit(jax.grad(jhop.strict(residual)))):
        assert jnp.allclose(grad(x), expected)

    @jhop.strict
    def with_inner_gradient(x):
        return jax.grad(residual)(x).sum()

    assert jnp.allclose(with_inner_gradient(x), expected.sum())

    def past_a_hook(x):
        hooked = jhop.hook(x, clip)
        return (hooked + layer(x)).sum()

    refused(past_a_hook, x, use="layer(x)")


def test_errors():
    with pytest.raises(jhop.HookError, match="^jhop.strict: expected a function, got int"):
        jhop.strict(3)

    def loss(x):
        return jhop.hook(x, clip) ** 2

    with pytest.raises(jhop.HookError, match=r"`loss` differentiates the function with hook `clip` .*jax.grad"):
        jhop.strict(jax.grad(loss))(jnp.float32(1.0))
    scale = jnp.float32(2.0)
    inner = jax.grad(lambda x, s: jhop.hook(x, lambda ct: ct * s) ** 2)
    with pytest.raises(jhop.HookError, match="differentiates the function with hook `<lambda>`"):
        jhop.strict(lambda x, s: inner(x, s))(jnp.float32(1.0), scale)


def test_it_is_the_function_otherwise():
    @jhop.strict
    def loss(x, *, scale=2.0):
        """Says what it is."""
        return {"y": jhop.hook(x, clip) * scale, "word": "y", "n": None}

    assert (loss.__name__, loss.__doc__) == ("loss", "Says what it is.")
    found = loss(jnp.ones(2), scale=3.0)
    assert (found["y"].tolist(), found["word"], found["n"]) == ([3.0, 3.0], "y", None)


@pytest.mark.leaks
def test_nothing_is_kept_of_the_trace():
    loss = jhop.strict(lambda x: jhop.hook(x, clip) * 2.0)
    assert float(jax.grad(loss)(3.0)) == 1.0
