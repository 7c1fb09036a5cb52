"""`jhop.compile(dynamic=...)`: what one trace serves, what has to be traced again, and that gradients are right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
import jhop.numpy as hnp


def leaves(*shapes):
    rng = np.random.default_rng(0)
    return [jhop.tensor(rng.standard_normal(shape), dtype=jnp.float32, requires_grad=True) for shape in shapes]


def by_size(grad):
    return grad * grad / grad.shape[0]


def hooked(value):
    value.register_hook(by_size)
    return value


def elementwise(x):
    return hooked(x * 3.0) * 2.0


def matmul(x, w):
    return hooked(hnp.tanh(x @ w)).mean()


def shared(x, y):
    return hooked(x * y) + x


def mean(x):
    return hooked(x * x).mean(axis=0)


def divided(x):
    return hooked(x * x).sum() / x.shape[0]


def multiplied(x):
    return x.shape[0] * hooked(x * 2.0) * x.shape[1]


def broadcast(x, b):
    return hnp.maximum(hooked(x + b), 0.0).sum(axis=1)


def flat(x):
    return (hooked(x.reshape(-1)) ** 2).sum()


def reshaped(x):
    return hooked(x.reshape(x.shape[0] * x.shape[1], 1)) * 2.0


def indexed(x):
    return hooked(x[1:] * x[:-1]) * x[-1] + x[0]


def gathered(x):
    return hooked(x[jnp.array([0, 1, 0])]) * 3.0


def joined(x):
    return hooked(hnp.concatenate([x, x * 2.0]))[x.shape[0] // 2 :]


def relu(x):
    return hooked(jhop.lift(jax.nn.relu)(x)) * 2.0


def softmax(x):
    return hnp.cumsum(hooked(jhop.lift(functools.partial(jax.nn.softmax, axis=-1))(x)), axis=0).std()


def scanned(x):
    body = lambda carry, row: (carry + row, jnp.sin(carry) * row)  # noqa: E731
    return hooked(jhop.lift(lambda v: jax.lax.scan(body, jnp.zeros(v.shape[1:]), v)[1])(x)) * x


def input_hooked(x):
    return hooked(x) * 3.0


def closed_over(x):
    square = (x * x).value
    y = x * 2.0
    y.register_hook(lambda grad: grad * square)
    return y


def two_results(x):
    y = hooked(x * 2.0)
    return (y * 3.0).sum() + hooked(x * x).sum()


def iota(x):
    return hooked(x * 2.0) * jnp.arange(x.shape[0], dtype=jnp.float32)


ONE = [(3,), (7,)]
TWO = [(3, 4), (6, 7)]
SYMBOLIC = {
    elementwise: [[s] for s in ONE], input_hooked: [[s] for s in ONE], closed_over: [[s] for s in ONE],
    two_results: [[s] for s in ONE], iota: [[s] for s in ONE], shared: [[s, s] for s in ONE],
    mean: [[s] for s in TWO], divided: [[s] for s in TWO], multiplied: [[s] for s in TWO], flat: [[s] for s in TWO],
    reshaped: [[s] for s in TWO], indexed: [[s] for s in TWO], gathered: [[s] for s in TWO],
    joined: [[s] for s in TWO], relu: [[s] for s in TWO], softmax: [[s] for s in TWO], scanned: [[s] for s in TWO],
    broadcast: [[s, s[1:]] for s in TWO], matmul: [[(3, 4), (4, 5)], [(7, 9), (9, 2)], [(6, 4), (4, 5)]],
}  # fmt: skip
each_program = pytest.mark.parametrize("program", SYMBOLIC, ids=lambda program: program.__name__)


def plain(fn, inputs):
    out = fn(*inputs)
    out.sum().backward()
    return [out.value, *(x.grad for x in inputs)]


def captured(fn, inputs):
    out = fn(*inputs)
    with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True, dynamic=True)):
        out.sum().backward()
    return [out.value, *(x.grad for x in inputs)]


def twice(fn, inputs):
    grads = jhop.autograd.grad((fn(*inputs) ** 2).sum(), inputs, create_graph=True)
    total = functools.reduce(lambda a, b: a + b, [(grad * grad).sum() for grad in grads])
    second = jhop.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [*(grad.value for grad in grads), *second]


def check(way, program, compiled, shapes):
    """Compares the results of a compiled function with those of a run of one operation after another."""
    found, expected = way(compiled, leaves(*shapes)), way(program, leaves(*shapes))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(getattr(one, "value", one), getattr(other, "value", other), rtol=2e-4, atol=2e-5)


def traces(compiled, end=""):
    """The reasons for which the function, or its backward, was traced."""
    return [trace.reason for trace in jhop.explain(compiled).traces if trace.graph.endswith("_backward") == bool(end)]


@each_program
def test_one_trace_serves_every_size(program):
    compiled = jhop.compile(program, dynamic=True, fullgraph=True)
    for shapes in SYMBOLIC[program]:
        check(plain, program, compiled, shapes)
    assert (traces(compiled), traces(compiled, "_backward")) == (["first call"], ["first backward pass"])


@pytest.mark.parametrize("way", [captured, twice], ids=lambda way: way.__name__)
@pytest.mark.parametrize("program", [matmul, closed_over, input_hooked, indexed, relu], ids=lambda p: p.__name__)
def test_one_trace_serves_every_size_in_other_passes(program, way):
    compiled = jhop.compile(program, dynamic=True, fullgraph=True)
    for shapes in SYMBOLIC[program][:2]:
        check(way, program, compiled, shapes)
    assert (traces(compiled), traces(compiled, "_backward")) == (["first call"], [])


@pytest.mark.parametrize("backend", ["aot_eager", lambda gm, example: lambda *flat: gm(*flat)], ids=["named", "own"])
def test_backends(backend):
    compiled = jhop.compile(matmul, backend=backend, dynamic=True, fullgraph=True)
    for shapes in SYMBOLIC[matmul]:
        check(plain, matmul, compiled, shapes)
    assert traces(compiled) == ["first call"]


# What is traced again.


def test_a_size_becomes_a_symbol_when_it_first_changes():
    compiled = jhop.compile(mean)
    for shapes in [[(3, 4)], [(5, 4)], [(6, 4)], [(3, 4)], [(9, 4)]]:
        check(plain, mean, compiled, shapes)
    kinds = [trace.arguments[0] for trace in jhop.explain(compiled).traces if trace.graph == "mean"]
    assert kinds[0] == "x: float32[3,4]" and len(kinds) == 2 and kinds[1].endswith(",4]")


def test_each_size_becomes_a_symbol_by_itself():
    compiled = jhop.compile(mean)
    for shapes in [[(3, 4)], [(5, 4)], [(5, 7)], [(8, 9)], [(2, 5)]]:
        check(plain, mean, compiled, shapes)
    assert len(traces(compiled)) == 3


def test_sizes_that_are_numbers_are_traced_for_each():
    compiled = jhop.compile(mean, dynamic=False)
    for shapes in [[(3, 4)], [(5, 4)], [(6, 4)], [(3, 4)]]:
        check(plain, mean, compiled, shapes)
    assert len(traces(compiled)) == 3


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_of_0_and_1_are_traced_apart(size):
    compiled = jhop.compile(elementwise, dynamic=True)
    for n in (4, size, 6, size):
        x = leaves((n,))[0]
        compiled(x).sum().backward()
        assert x.grad.shape == (n,)
    first, second = traces(compiled)
    assert (first, second) == ("first call", f"`x.shape[0]` is {size}, and sizes of 0 and 1 are traced apart")


def outer(x, y):
    return hooked(x.reshape(-1, 1) * y)


def test_equal_sizes_share_a_symbol_until_they_differ():
    compiled = jhop.compile(outer, dynamic=True)
    for shapes in [[(3,), (3,)], [(5,), (5,)], [(5,), (4,)], [(2,), (7,)], [(6,), (6,)]]:
        check(plain, outer, compiled, shapes)
    assert traces(compiled) == ["first call", "`y.shape[0]` was equal to `x.shape[0]`, which is 5, and is 4"]


def test_tensors_that_the_function_reaches_by_itself():
    (w,) = leaves((4, 4))
    compiled, reference = jhop.compile(lambda x: hooked(x @ w) * 2.0, dynamic=True), lambda x: hooked(x @ w) * 2.0
    for shapes in [[(3, 4)], [(7, 4)], [(4, 4)]]:
        check(plain, reference, compiled, shapes)
        w.grad, found = None, []
        for fn in (compiled, reference):
            fn(*leaves(*shapes)).sum().backward()
            found.append(w.grad)
            w.grad = None
        np.testing.assert_allclose(*found, rtol=2e-4)
    assert traces(compiled) == ["first call"]


def test_static_arguments_have_traces_of_their_own():
    compiled = jhop.compile(lambda x, n: hooked(x * 2.0) * n, dynamic=True)
    outs = [compiled(*leaves((size,)), n).shape for n in (2, 3) for size in (4, 5, 6)]
    assert outs == [(4,), (5,), (6,)] * 2
    assert len(traces(compiled)) == 2
