"""`create_graph=True`: backward passes that are differentiated again, through hooks, to third order.

Where hooks are in play the numbers are worked out by hand: in each pass a hook runs once, on the whole sum that reaches
its Tensor, be it a gradient or a gradient's gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import MODES, each_mode, leaf, orders, power, scalar, some_modes, times

import jhop
import jhop.numpy as hnp


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: lifted operations stay compiled, and must not notice."""


# Without hooks, against JAX.

FUNCTIONS = {
    "elementwise": lambda np_, x: np_.sin(x * x) / (x + 1.0),
    "shapes": lambda np_, x: np_.stack([x, x * x])[::-1] @ np_.where(x > 0.5, np_.stack([x, x]), x).cumsum(),
}


@some_modes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_three_orders_against_jax(mode, name):
    fn, at = FUNCTIONS[name], 0.75
    x = scalar(at)
    expected, plain = [], lambda v: fn(jnp, v)
    for _ in range(4):
        expected.append(float(plain(jnp.float32(at))))
        plain = jax.grad(plain)
    np.testing.assert_allclose(orders(mode, mode.compile(lambda x: fn(hnp, x))(x), x), expected, rtol=1e-4, atol=1e-4)


@some_modes
def test_gradient_penalty_against_jax(mode):
    def fn(np_, w, b, x):
        return (np_.tanh(x @ w + b) ** 2).sum(axis=1)

    w, b = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), jnp.array([0.1, -0.2])
    x = jnp.linspace(0.0, 1.0, 12).reshape(4, 3)

    def penalty(w, b, x):
        slope = jax.grad(lambda x: fn(jnp, w, b, x).sum())(x)
        return ((jnp.sqrt((slope * slope).sum(axis=1)) - 1.0) ** 2).mean()

    tensors = [jhop.tensor(value, requires_grad=True) for value in (w, b, x)]
    out = mode.compile(lambda *args: fn(hnp, *args).sum())(*tensors)
    (slope,) = mode.grad(out, tensors[2], create_graph=True)
    loss = ((hnp.sqrt((slope * slope).sum(axis=1)) - 1.0) ** 2).mean()
    mode.backward(loss, inputs=tensors[:2])
    for tensor, want in zip(tensors, jax.grad(penalty, argnums=(0, 1))(w, b, x), strict=False):
        np.testing.assert_allclose(tensor.grad, want, rtol=1e-4, atol=1e-6)
    assert tensors[2].grad is None


@each_mode
def test_gradient_by_the_cotangent(mode):
    x, ct = scalar(3.0), scalar(2.0)
    (g,) = mode.grad(mode.compile(lambda x: x * x * x)(x), x, ct, create_graph=True)
    assert [float(part) for part in mode.grad(g, [x, ct])] == [36.0, 27.0]


def test_own_derivative_of_a_function_counts_at_each_order():
    @jax.custom_vjp
    def fn(v):
        return v * v

    fn.defvjp(lambda v: (v * v, v), lambda v, ct: (ct * v * v * v,))
    x = scalar(2.0)
    assert orders(MODES[0], jhop.lift(fn)(x), x) == [4.0, 8.0, 12.0, 12.0]  # x**3 and its derivatives
    y = jhop.compile(jhop.lift(fn))(x)
    assert orders(MODES[0], y, x) == [4.0, 8.0, 12.0, 12.0]


# Through hooks.


@each_mode
def test_linear_hook(mode):
    fn, x = power(times(5.0), 2.0)
    # y = x**2, ct of y: 5 * 2y. First: 10 y * 2x. Second: 20 y + 5 * (20 x) * 2x. Third: 60 * 20 x**3 in the same way.
    assert orders(mode, mode.compile(fn)(x), x) == [16.0, 160.0, 20.0 * 4.0 + 200.0 * 4.0, 5 * 20.0 * 4.0 + 400.0 * 2.0]


@each_mode
def test_nonlinear_hook(mode):
    fn, x = power(lambda g: g * g, 1.0)
    # First: (2y)**2 * 2x. Second: 8 y**2, and (16 x y)**2 * 2x by way of y. Third: 1536 x**2 y**2, and
    # (16 y + 1024 x**3 y)**2 * 2x by way of y.
    assert orders(mode, mode.compile(fn)(x), x) == [1.0, 8.0, 520.0, 1536.0 + 1040.0**2 * 2.0]


@each_mode
def test_clip(mode):
    fn, x = power(lambda g: hnp.clip(g, -5.0, 5.0), 1.5)
    # First: 2y * 2x. Second: 2 * 2y, and min(4x, 5) * 2x by way of y: without the hook, 18.
    assert orders(mode, mode.compile(fn)(x), x, 2) == [5.0625, 13.5, 9.0 + 15.0]


@each_mode
def test_clip_that_is_active_cuts_the_second_derivative(mode):
    fn, x = power(lambda g: hnp.clip(g, -5.0, 5.0), 3.0)
    # First: 5 * 2x. Second: 5 * 2, and nothing by way of y.
    assert orders(mode, mode.compile(fn)(x), x, 2) == [81.0, 30.0, 10.0]


class Counter:
    def __init__(self):
        self.n = 0.0

    def __call__(self, g):
        self.n = self.n + 1.0
        return g * self.n


@each_mode
def test_hook_with_state(mode):
    counter = Counter()
    fn, x = power(counter, 2.0)
    # First, n = 1: 2y * 2x. Second, n = 2: 4y, and 2 * (4x) * 2x by way of y. Third, n = 3: 32 x, and 3 * 4 * 2x.
    assert orders(mode, mode.compile(fn)(x), x) == [16.0, 32.0, 16.0 + 64.0, 64.0 + 48.0]
    assert counter.n == 3.0


@each_mode
def test_hook_on_a_leaf(mode):
    x = scalar(2.0)
    x.register_hook(lambda g: g * g)
    # First: (3 x**2)**2. Second: (36 x**3)**2.
    assert orders(mode, mode.compile(lambda x: x * x * x)(x), x, 2) == [8.0, 144.0, 288.0**2]


@each_mode
def test_hook_on_an_argument_inside(mode):
    def fn(x):
        x.register_hook(lambda g: g * g)
        return x * x * x

    x = scalar(2.0)
    assert orders(mode, mode.compile(fn)(x), x, 2) == [8.0, 144.0, 288.0**2]


@each_mode
def test_hook_that_uses_a_tensor_of_the_forward(mode):
    def fn(x):
        y = x * 2.0
        late = y * y  # computed from the hooked value
        y.register_hook(lambda g: g * late)
        return y * 3.0

    x = scalar(1.0)
    # First: 3 * y**2 * 2. Second: the ct of y, 12 y, times y**2, times 2; y = 2.
    assert orders(mode, mode.compile(fn)(x), x, 2) == [6.0, 24.0, 192.0]


@each_mode
def test_hook_on_an_argument_that_uses_a_tensor_of_the_forward(mode):
    def fn(x):
        cube = x * x * x
        x.register_hook(lambda g: g * cube)
        return x * x

    x = scalar(2.0)
    # First: 2x * x**3. Second: its derivative 8 x**3 times x**3. Third: 48 x**5 times x**3.
    assert orders(mode, mode.compile(fn)(x), x) == [4.0, 32.0, 512.0, 48.0 * 2.0**8]


@each_mode
def test_hook_that_uses_a_tensor_which_no_result_depends_on(mode):
    def fn(x):
        y, u = x * 2.0, x * 1.0
        u.register_hook(times(5.0))
        v = u * 2.0
        v.register_hook(times(7.0))
        apart = v * v
        y.register_hook(lambda g: g * apart)
        return y * 3.0

    x = scalar(1.0)
    # First: 3 (2x)**2 * 2. Second: the ct of v, 12 v = 24, times 7, times 2, times 5.
    assert orders(mode, mode.compile(fn)(x), x, 2) == [6.0, 24.0, 24.0 * 7.0 * 2.0 * 5.0]


@each_mode
def test_array_of_the_forward_in_a_hook_is_a_constant(mode):
    def fn(x):
        y = x * x
        factor = y.value
        y.register_hook(lambda g: g * factor)
        return y * 3.0

    x = scalar(2.0)
    assert orders(mode, mode.compile(fn)(x), x, 2) == [12.0, 3.0 * 4.0 * 4.0, 3.0 * 4.0 * 2.0]


@each_mode
def test_hook_that_returns_an_array_ends_the_history(mode):
    fn, x = power(lambda g: g.value * 5.0 if isinstance(g, jhop.Tensor) else g * 5.0, 2.0)
    # First: 5 * 2y * 2x, of which only 2x has history.
    assert orders(mode, mode.compile(fn)(x), x, 2) == [16.0, 160.0, 80.0]


@each_mode
def test_hook_that_keeps_the_gradient(mode):
    fn, x = power(lambda g: None, 2.0)
    assert orders(mode, mode.compile(fn)(x), x) == [16.0, 32.0, 48.0, 48.0]


@each_mode
def test_hook_runs_once_on_the_sum_of_first_and_second_derivatives(mode):
    fn, x = power(lambda g: g * g, 1.0)
    out = mode.compile(fn)(x)
    (slope,) = mode.grad(out, x, create_graph=True)
    (found,) = mode.grad(out + slope, x)
    # slope = (2y)**2 * 2x. By way of y comes 2y of `out` and 16 x y of `slope`, together: (18)**2 * 2x.
    assert float(found) == 8.0 + 18.0**2 * 2.0


@each_mode
def test_several_hooks_in_a_row_and_side_by_side(mode):
    def fn(x):
        a = x * 2.0
        a.register_hook(lambda g: g * g)
        b, c = a * a, a * 3.0
        b.register_hook(times(3.0))
        c.register_hook(lambda g: g + 1.0)
        return b * c

    x = scalar(1.0)
    # a = 2: ct of b is 3c = 18, of c b + 1 = 5; of a 18 * 2a + 5 * 3 = 87, squared; times 2.
    first = 87.0**2 * 2.0
    # first = 2 s**2, s = 6 a c + 3 (b + 1) with ct 4 s = 348 of s. ct of c: 348 * 6a + 1. ct of b: 348 * 3 * 3.
    # ct of a: 348 * 6c + 3 (ct of c) + 2a (ct of b), squared; times 2.
    of_a = 348.0 * 36.0 + 3.0 * (348.0 * 12.0 + 1.0) + 4.0 * (348.0 * 9.0)
    np.testing.assert_allclose(orders(mode, mode.compile(fn)(x), x, 2), [24.0, first, of_a**2 * 2.0], rtol=1e-6)


def test_hooks_run_in_the_order_of_a_pass_that_is_not_recorded():
    runs = []
    for create_graph in (False, True):
        x, seen = scalar(2.0), []
        a = x * 2.0
        b, c = a * 3.0, a * 5.0
        for tensor, label in ((x, "x"), (a, "a"), (b, "b"), (c, "c")):
            tensor.register_hook(lambda g, label=label, seen=seen: seen.append((label, float(g))))
        jhop.autograd.grad(b * c, x, create_graph=create_graph)
        runs.append(seen)
    assert runs[0] == runs[1]
    assert [label for label, _ in runs[0]] == ["c", "b", "a", "x"]


def test_node_hooks_are_differentiated():
    x = scalar(3.0)
    y = x * x
    y.grad_fn.register_prehook(lambda outs: (outs[0] * outs[0],))
    y.grad_fn.register_hook(lambda ins, outs: (ins[0] * 2.0, ins[1] * 3.0))
    # z = y**2: (2y)**2 * x * (2 + 3). Second: 20 y**2, and by way of y 40 x y, squared, times 5 x.
    (first,) = jhop.autograd.grad(y * y, x, create_graph=True)
    (second,) = jhop.autograd.grad(first, x)
    assert (float(first), float(second)) == (20.0 * 81.0 * 3.0, 20.0 * 81.0 + (40.0 * 27.0) ** 2 * 15.0)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda g: g.sum(), "shape and dtype"),
        (lambda g: 3.0, "returned float"),
        (lambda g: g.astype(jnp.float16), "float16"),
    ],
)
def test_what_a_hook_returns_is_checked(hook, message):
    x = leaf(1.0, 2.0)
    x.register_hook(hook)
    with pytest.raises(jhop.HookError, match=message):
        (x * x).sum().backward(create_graph=True)
    assert x.grad is None


def test_jax_function_in_a_hook_is_told_of_jhop_numpy():
    x = leaf(1.0, 2.0)
    x.register_hook(lambda g: jnp.clip(g, -1.0, 1.0))
    with pytest.raises(jhop.JhopError, match=r"Use jhop\.numpy"):
        (x * x).sum().backward(create_graph=True)
