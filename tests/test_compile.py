"""`jhop.compile` and `jhop.compiled_autograd`: hooks inside and outside, what is traced how often, all or nothing."""

import contextlib
import functools
import gc
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
import jhop.numpy as hnp


def own_backend(gm, example_inputs):
    """A backend that is no more than the graph itself."""
    return lambda *flat: gm(*flat)


TRACING = ["aot_eager", "xla", own_backend]
label = {"ids": lambda b: b if isinstance(b, str) else b.__name__}
each_backend = pytest.mark.parametrize("backend", ["eager", *TRACING], **label)
each_tracing_backend = pytest.mark.parametrize("backend", TRACING, **label)


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def times(factor):
    return lambda grad: grad * factor


def at_most(limit):
    return lambda grad: grad.clip(max=limit)


class Compiler:
    """A `compiler_fn` that counts its calls and keeps the inlined graphs."""

    def __init__(self, backend=jhop.backends.xla, **options):
        self.captured = []
        self.graphs = []
        self._backend = backend
        self._options = {"fullgraph": True, "dynamic": True} | options

    def __call__(self, gm):
        self.captured.append(gm)
        return jhop.compile(gm, backend=self.backend, **self._options)

    def backend(self, gm, example_inputs):
        self.graphs.append(gm)
        return self._backend(gm, example_inputs)


def capturing():
    return jhop.compiled_autograd.enable(Compiler())


@pytest.fixture
def compiler():
    return Compiler()


@pytest.fixture
def calls():
    """A list, to count what runs in Python."""
    return []


@pytest.fixture
def tick(calls):
    """Counts in `calls` without being state that a function reaches, which would be guarded."""
    return calls.append


# Hooks inside a compiled function.


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_hook_on_an_input(backend, context):
    def fn(x):
        x.register_hook(lambda grad: grad * grad)
        return x * 3.0

    x = leaf(0.5, 2.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0, 2.0], context)
    assert x.grad.tolist() == [9.0, 36.0]


def backward(out, gradient, context):
    if context:
        with jhop.compiled_autograd.enable(Compiler()):
            out.backward(jnp.array(gradient))
    else:
        out.backward(jnp.array(gradient))


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_hook_on_an_intermediate(backend, context):
    def fn(x):
        y = x * 3.0
        y.register_hook(lambda grad: grad * grad)
        return y * 2.0

    x = leaf(0.5, 2.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0, 2.0], context)
    assert x.grad.tolist() == [12.0, 48.0]


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
@pytest.mark.parametrize("when", ["before uses", "between uses", "after uses"])
def test_nonlinear_hook_sees_the_whole_sum(backend, context, when):
    def fn(x):
        y = x * 2.0
        if when == "before uses":
            y.register_hook(at_most(5.0))
        z = y * 4.0
        if when == "between uses":
            y.register_hook(at_most(5.0))
        out = z + y * 3.0
        if when == "after uses":
            y.register_hook(at_most(5.0))
        return out

    x = leaf(1.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0], context)
    assert x.grad.tolist() == [10.0]  # per use: 14


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_nonlinear_hook_on_an_input_sees_the_whole_sum(backend, context):
    def fn(x):
        out = x * 4.0 + x * 3.0
        x.register_hook(at_most(5.0))
        return out

    x = leaf(1.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0], context)
    assert x.grad.tolist() == [5.0]


@each_backend
def test_hook_on_an_input_sees_paths_outside_the_function_too(backend):
    def fn(x):
        x.register_hook(at_most(5.0))
        return x * 4.0

    x = leaf(1.0)
    (jhop.compile(fn, backend=backend)(x) + x * 3.0).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [5.0]


@each_backend
def test_hook_on_an_output_inside(backend):
    def fn(x):
        y = x * 2.0
        y.register_hook(at_most(5.0))
        return y

    x = leaf(1.0)
    y = jhop.compile(fn, backend=backend)(x)
    (y * 4.0 + y * 3.0).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [10.0]


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_hook_on_an_output_outside(backend, context):
    x = leaf(1.0)
    y = jhop.compile(lambda x: x * 2.0, backend=backend)(x)
    out = y * 4.0 + y * 3.0
    y.register_hook(at_most(5.0))
    backward(out, [1.0], context)
    assert x.grad.tolist() == [10.0]


@each_backend
def test_chain_of_hooks_in_order(backend):
    def fn(x):
        y = x * 1.0
        y.register_hook(lambda grad: grad + 1.0)
        y.register_hook(lambda grad: None)
        y.register_hook(times(10.0))
        return y * 2.0

    x = leaf(1.0)
    jhop.compile(fn, backend=backend)(x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [30.0]


@each_backend
def test_hook_removed_inside_does_not_run(backend):
    def fn(x):
        y = x * 1.0
        first, _ = y.register_hook(times(10.0)), y.register_hook(times(3.0))
        first.remove()
        return y * 2.0

    x = leaf(1.0)
    jhop.compile(fn, backend=backend)(x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [6.0]


@each_backend
def test_hook_registered_inside_runs_at_each_call_once(backend):
    def fn(x):
        y = x * 1.0
        y.register_hook(times(3.0))
        return y

    fn, x = jhop.compile(fn, backend=backend), leaf(1.0)
    for _ in range(3):
        fn(x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [9.0]


@each_backend
def test_hook_on_an_intermediate_off_the_path_does_not_run(backend, calls):
    def fn(x):
        y = x * 2.0
        y.register_hook(calls.append)
        return x * 3.0

    jhop.compile(fn, backend=backend)(leaf(1.0)).backward(jnp.array([1.0]))
    assert calls == []


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_intermediate_hook_closes_over_an_array_of_the_forward(backend, context):
    def fn(x):
        y = x * 2.0
        factor = (x * x).value
        y.register_hook(lambda grad: grad * factor)
        return y

    x = leaf(3.0, 1.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0, 1.0], context)
    assert x.grad.tolist() == [18.0, 2.0]


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_intermediate_hook_closes_over_a_tensor_of_the_forward(backend, context):
    def fn(x):
        y = x * 2.0
        factor = x * x
        y.register_hook(lambda grad: grad * factor.value)
        return y

    x = leaf(3.0, 1.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0, 1.0], context)
    assert x.grad.tolist() == [18.0, 2.0]


@each_backend
def test_intermediate_hook_closes_over_the_value_of_each_call(backend):
    def fn(x):
        y = x * 2.0
        factor = (x * x).value
        y.register_hook(lambda grad: grad * factor)
        return y

    fn = jhop.compile(fn, backend=backend)
    first, second = leaf(3.0), leaf(5.0)
    out = [fn(first), fn(second)]
    for tensor in out:
        tensor.backward(jnp.array([1.0]))
    assert (first.grad.tolist(), second.grad.tolist()) == ([18.0], [50.0])


@each_backend
def test_intermediate_hook_closes_over_an_argument(backend):
    def fn(x, scale):
        y = x * 2.0
        y.register_hook(lambda grad: grad * scale)
        return y

    fn, x = jhop.compile(fn, backend=backend), leaf(1.0)
    fn(x, jnp.array([3.0])).backward(jnp.array([1.0]))
    fn(x, jnp.array([10.0])).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [26.0]


@each_backend
def test_input_hook_closes_over_an_argument(backend):
    def fn(x, scale):
        x.register_hook(lambda grad: grad * scale)
        return x * 2.0

    x = leaf(1.0)
    jhop.compile(fn, backend=backend)(x, jnp.array([3.0])).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [6.0]


@each_backend
@pytest.mark.parametrize("context", [False, True], ids=["alone", "captured"])
def test_input_hook_closes_over_a_value_of_the_forward(backend, context):
    def fn(x):
        factor = (x * x).value
        x.register_hook(lambda grad: grad * factor)
        return x * 2.0

    x = leaf(3.0, 1.0)
    backward(jhop.compile(fn, backend=backend)(x), [1.0, 1.0], context)
    assert x.grad.tolist() == [18.0, 2.0]


@each_tracing_backend
def test_constant_closed_over_is_read_at_each_backward(backend):
    box = types.SimpleNamespace(scale=jnp.array([2.0]))

    def fn(x):
        y = x * 1.0
        y.register_hook(lambda grad: grad * box.scale)
        return y

    fn, x = jhop.compile(fn, backend=backend), leaf(1.0)
    fn(x).backward(jnp.array([1.0]))
    box.scale = jnp.array([5.0])
    fn(x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [7.0]


# Arguments and results.


@each_backend
def test_python_int_is_static(backend):
    def fn(x, n):
        for _ in range(n):
            x = x * 2.0
        return x

    fn, x = jhop.compile(fn, backend=backend), leaf(1.0)
    assert [fn(x, 2).tolist(), fn(x, 3).tolist()] == [[4.0], [8.0]]


@each_backend
def test_nested_arguments_and_results(backend):
    def fn(tree, *, scale):
        a, (b, c) = tree["a"], tree["rest"]
        return {"sum": a + b, "parts": [c * scale, (a * b,)]}

    a, b, c = leaf(2.0), leaf(3.0), leaf(5.0)
    out = jhop.compile(fn, backend=backend)({"a": a, "rest": (b, c)}, scale=4.0)
    (out["sum"] + out["parts"][0] + out["parts"][1][0]).backward(jnp.array([1.0]))
    assert [t.grad.tolist() for t in (a, b, c)] == [[4.0], [3.0], [4.0]]


@each_backend
def test_several_outputs_of_which_one_is_used(backend):
    x = leaf(1.0)
    first, _ = jhop.compile(lambda x: (x * 3.0, x * 100.0), backend=backend)(x)
    first.backward(jnp.array([1.0]))
    assert x.grad.tolist() == [3.0]


class Branches:
    """Hooks inside a function of two branches: 2 * x and 3 * y."""

    def __init__(self, backend):
        self.log = []
        self.run = jhop.compile(self.both, backend=backend)

    def add(self, name):
        def hook(grad):
            self.log.append(name)
            return grad + 0.5

        return hook

    def both(self, x, y):
        a, b = x * 2.0, y * 3.0
        a.register_hook(self.add("a"))
        b.register_hook(self.add("b"))
        return a, b


@each_backend
@pytest.mark.parametrize("context", [contextlib.nullcontext, capturing], ids=["as it is", "captured"])
def test_hook_inside_on_a_result_that_nothing_uses_does_not_run(backend, context):
    branches, x, y = Branches(backend), leaf(1.0), leaf(1.0)
    for used, grads in ((0, [3.0, 0.0]), (1, [3.0, 4.5]), (0, [6.0, 4.5])):
        with context():
            branches.run(x, y)[used].sum().backward()
        assert [0.0 if t.grad is None else float(t.grad[0]) for t in (x, y)] == grads
    assert branches.log == ["a", "b", "a"]


@each_backend
@pytest.mark.parametrize("context", [contextlib.nullcontext, capturing], ids=["as it is", "captured"])
def test_hook_inside_that_leads_to_no_input_asked_for_does_not_run(backend, context):
    branches, x, y = Branches(backend), leaf(1.0), leaf(1.0)
    a, b = branches.run(x, y)
    with context():
        (by_y,) = jhop.autograd.grad((a * b).sum(), y, retain_graph=True)
        assert (by_y.tolist(), branches.log) == ([7.5], ["b"])
        (a * b).sum().backward(inputs=[x])
    assert (x.grad.tolist(), y.grad, branches.log) == ([7.0], None, ["b", "a"])


@each_backend
@pytest.mark.parametrize("create_graph", [False, True])
def test_hook_outside_that_leads_to_no_input_asked_for_does_not_run(backend, create_graph):
    branches, x, y = Branches(backend), leaf(1.0), leaf(1.0)
    a, b = branches.run(x, y)
    a.register_hook(branches.add("outside"))
    (by_y,) = jhop.autograd.grad((a * b).sum(), y, create_graph=create_graph)
    assert (by_y.tolist() if not create_graph else by_y.value.tolist(), branches.log) == ([7.5], ["b"])


@each_backend
def test_input_that_is_used_by_what_is_detached_alone_gets_no_gradient(backend):
    x, y = leaf(1.0), leaf(2.0)
    hooked = []
    y.register_post_accumulate_grad_hook(lambda leaf: hooked.append(leaf))
    jhop.compile(lambda x, y: x * (y * 5.0).detach(), backend=backend)(x, y).sum().backward()
    assert (x.grad.tolist(), y.grad, hooked) == ([10.0], None, [])


@each_backend
def test_several_outputs_together(backend):
    x = leaf(1.0)
    first, second = jhop.compile(lambda x: (x * 3.0, x * 100.0), backend=backend)(x)
    jhop.autograd.backward([first, second], [jnp.array([1.0]), jnp.array([2.0])])
    assert x.grad.tolist() == [203.0]


@each_backend
@pytest.mark.parametrize(
    "result",
    [lambda x: x.detach(), lambda x: jhop.tensor([1.0]) * 2.0, lambda x: x.argmax(), lambda x: x.value * 2.0],
    ids=["detached", "constant", "integer", "array"],
)
def test_result_that_requires_no_grad(backend, result):
    moving, still = jhop.compile(lambda x: (x * 2.0, result(x)), backend=backend)(leaf(1.0))
    assert (moving.requires_grad, getattr(still, "requires_grad", False)) == (True, False)


@each_backend
def test_input_that_requires_no_grad_gets_none(backend):
    x, y = leaf(2.0), jhop.tensor([3.0])
    jhop.compile(lambda x, y: x * y, backend=backend)(x, y).backward(jnp.array([1.0]))
    assert (x.grad.tolist(), y.grad) == ([3.0], None)


@each_backend
def test_no_input_requires_grad(backend):
    out = jhop.compile(lambda x: x * 2.0, backend=backend)(jhop.tensor([3.0]))
    assert (out.tolist(), out.requires_grad) == ([6.0], False)


@each_backend
def test_call_under_no_grad(backend):
    fn, x = jhop.compile(lambda x: x * 2.0, backend=backend), leaf(3.0)
    fn(x)
    with jhop.autograd.no_grad():
        assert not fn(x).requires_grad


@each_backend
def test_same_tensor_given_twice(backend):
    x = leaf(3.0)
    jhop.compile(lambda a, b: a * b, backend=backend)(x, x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [6.0]


@each_backend
def test_intermediate_of_the_tape_as_input(backend):
    x = leaf(3.0)
    y = x * x
    y.register_hook(times(10.0))
    jhop.compile(lambda y: y * 2.0, backend=backend)(y).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [120.0]


@each_backend
def test_compiled_inside_compiled(backend):
    @functools.partial(jhop.compile, backend=backend)
    def inner(x):
        y = x * 2.0
        y.register_hook(lambda grad: grad * grad)
        return y

    x = leaf(1.0)
    jhop.compile(lambda x: inner(x * 3.0) * 5.0, backend=backend)(x).backward(jnp.array([1.0]))
    assert x.grad.tolist() == [25 * 2 * 3.0]


@each_tracing_backend
def test_compiled_inside_compiled_is_traced_once(backend, calls):
    @functools.partial(jhop.compile, backend=backend)
    def inner(x):
        calls.append("inner")
        return x * 2.0

    outer, x = jhop.compile(lambda x: inner(x) + 1.0, backend=backend), leaf(1.0)
    outer(x)
    outer(x)
    assert calls == ["inner"]


@each_backend
def test_chain_of_two_compiled_functions(backend):
    def hooked(x):
        y = x * 2.0
        y.register_hook(lambda grad: grad * grad)
        return y

    fn, x = jhop.compile(hooked, backend=backend), leaf(1.0)
    fn(fn(x)).backward(jnp.array([3.0]))
    assert x.grad.tolist() == [648.0]  # 3 -> 9 -> 18 -> 324 -> 648


@each_backend
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(backend, dtype):
    def fn(x):
        x.register_hook(lambda grad: grad * grad)
        return x * 3.0

    x = jhop.tensor([1.0], dtype=dtype, requires_grad=True)
    jhop.compile(fn, backend=backend)(x).backward(jnp.array([1.0], dtype))
    assert (x.grad.dtype, x.grad.tolist()) == (dtype, [9.0])


@each_backend
def test_operations_of_jhop_numpy(backend):
    def fn(x, y):
        parts = hnp.split(hnp.concatenate([x, y]), 2)
        return hnp.where(parts[0] > 0.0, parts[1], hnp.einsum("i,i->", x, y))

    x, y = leaf(1.0, -1.0), leaf(3.0, 4.0)
    jhop.compile(fn, backend=backend)(x, y).sum().backward()
    assert (x.grad.tolist(), y.grad.tolist()) == ([3.0, 4.0], [2.0, -1.0])


def test_compiled_function_keeps_its_name():
    def my_function(x):
        """Says so."""
        return x

    compiled = jhop.compile(my_function)
    assert (compiled.__name__, compiled.__doc__) == ("my_function", "Says so.")


def test_compile_as_a_decorator():
    @jhop.compile
    def double(x):
        return x * 2.0

    assert double(leaf(1.0)).tolist() == [2.0]


def test_inductor_is_xla():
    assert jhop.compile(lambda x: x * 2.0, backend="inductor")(leaf(1.0)).tolist() == [2.0]


# How often a function is traced.


@each_tracing_backend
def test_function_runs_once_for_equal_shapes(backend, calls, tick):
    fn = jhop.compile(lambda x: (tick(1), x * 2.0)[1], backend=backend)
    for value in (1.0, 2.0, 3.0):
        fn(leaf(value))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda: leaf(1.0, 2.0),
        lambda: jhop.tensor([[1.0]], requires_grad=True),
        lambda: jhop.tensor([1.0]),
        lambda: jhop.tensor([1.0], dtype=jnp.float16, requires_grad=True),
    ],
    ids=["shape", "rank", "requires_grad", "dtype"],
)
def test_function_is_traced_anew_for(other, calls, tick):
    fn = jhop.compile(lambda x: (tick(1), x * 2.0)[1])
    fn(leaf(1.0))
    fn(other())
    fn(leaf(4.0))
    fn(other())
    assert len(calls) == 2


def test_function_is_traced_anew_for_each_static_int(calls, tick):
    fn = jhop.compile(lambda x, n: (tick(n), x * float(n))[1])
    for n in (2, 3, 2, 3):
        fn(leaf(1.0), n)
    assert calls == [2, 3]


def test_one_and_true_are_different_static_arguments(calls, tick):
    fn = jhop.compile(lambda x, n: (tick(n), x * 1.0)[1])
    fn(leaf(1.0), 1)
    fn(leaf(1.0), True)
    assert len(calls) == 2


def test_python_float_is_a_value(calls, tick):
    fn = jhop.compile(lambda x, scale: (tick(1), x * scale)[1])
    assert [fn(leaf(1.0), scale).tolist() for scale in (2.0, 3.0)] == [[2.0], [3.0]]
    assert len(calls) == 1


def test_array_argument_is_a_value(calls, tick):
    fn = jhop.compile(lambda x, scale: (tick(1), x * scale)[1])
    assert [fn(leaf(1.0), jnp.array([scale])).tolist() for scale in (2.0, 3.0)] == [[2.0], [3.0]]
    assert len(calls) == 1


def test_function_is_traced_anew_after_reset(calls, tick):
    fn = jhop.compile(lambda x: (tick(1), x * 2.0)[1])
    fn(leaf(1.0))
    jhop.reset()
    fn(leaf(1.0))
    assert len(calls) == 2


def test_static_argument_that_changed_is_noticed():
    fn = jhop.compile(lambda x, options: x * options["scale"])
    options = {"scale": 2.0}
    first = fn(leaf(1.0), options).tolist()
    options["scale"] = 3.0
    assert (first, fn(leaf(1.0), options).tolist()) == ([2.0], [3.0])


def test_what_a_function_appends_to_costs_no_new_trace(calls):
    fn = jhop.compile(lambda x: (calls.append(1), x * 2.0)[1])
    for _ in range(3):
        fn(leaf(1.0))
        fn(leaf(1.0, 2.0))
    assert len(calls) == 2


def test_global_that_a_function_reads_is_noticed():
    box = types.SimpleNamespace(scale=2.0)
    fn = jhop.compile(lambda x: x * box.scale)
    first = fn(leaf(1.0)).tolist()
    box.scale = 3.0
    assert (first, fn(leaf(1.0)).tolist()) == ([2.0], [3.0])


# State in hooks of a compiled function, without compiled autograd.


@each_backend
def test_counter_in_an_intermediate_hook(backend):
    counts = types.SimpleNamespace(n=10)

    def hook(grad):
        counts.n += 1
        return grad * grad

    def fn(x):
        y = x * 2.0
        y.register_hook(hook)
        return y

    fn, x = jhop.compile(fn, backend=backend), leaf(1.0)
    for _ in range(3):
        fn(x).backward(jnp.array([3.0]))
    assert (counts.n, type(counts.n), x.grad.tolist()) == (13, int, [54.0])


@each_backend
def test_gradient_stored_by_a_hook(backend):
    box = types.SimpleNamespace(last=None)

    def hook(grad):
        box.last = grad * 10.0

    def fn(x):
        y = x * 2.0
        y.register_hook(hook)
        return y

    jhop.compile(fn, backend=backend)(leaf(1.0)).backward(jnp.array([3.0]))
    assert isinstance(box.last, jax.Array) and box.last.tolist() == [30.0]


def test_hook_that_cannot_be_traced_runs_on_the_host_with_a_warning(capsys):
    def fn(x):
        y = x * 2.0
        y.register_hook(lambda grad: print("host", grad.tolist()))
        return y

    out, x = jhop.compile(fn)(x := leaf(1.0)), x
    with pytest.warns(UserWarning, match="print"):
        out.backward(jnp.array([3.0]))
    assert (capsys.readouterr().out, x.grad.tolist()) == ("host [3.0]\n", [6.0])


def test_hook_that_cannot_be_traced_is_refused_with_fullgraph(capsys):
    def fn(x):
        y = x * 2.0
        y.register_hook(lambda grad: print("host"))
        return y

    x = leaf(1.0)
    out = jhop.compile(fn, fullgraph=True)(x)
    with pytest.raises(jhop.Unsupported, match="print"):
        out.backward(jnp.array([3.0]))
    assert (capsys.readouterr().out, x.grad) == ("", None)


# Backends of one's own.


def run_with(backend):
    def fn(x):
        y = x * 2.0
        y.register_hook(lambda grad: grad * grad)
        return y

    x = leaf(1.0, 2.0)
    jhop.compile(fn, backend=backend)(x).backward(jnp.array([3.0, 1.0]))
    return x.grad.tolist()


def test_backend_gets_graphs_and_runs_on_example_inputs(calls):
    def backend(gm, example_inputs):
        outs = gm(*example_inputs)
        calls.append((isinstance(gm, jhop.GraphModule), isinstance(outs, list)))
        return gm

    assert (run_with(backend), calls) == ([18.0, 2.0], [(True, True)] * 2)


def test_backend_gets_forward_then_backward(calls):
    def backend(gm, example_inputs):
        calls.append([value.tolist() for value in example_inputs])
        return gm

    run_with(backend)
    assert calls == [[[1.0, 2.0]], [[3.0, 1.0]]]


def test_what_the_backend_returns_is_what_runs():
    def backend(gm, example_inputs):
        return lambda *flat: [value * 7.0 for value in gm(*flat)]

    x = leaf(1.0)
    assert jhop.compile(lambda x: x * 2.0, backend=backend)(x).tolist() == [14.0]


def test_backend_may_return_a_tuple():
    assert run_with(lambda gm, example_inputs: lambda *flat: tuple(gm(*flat))) == [18.0, 2.0]


def test_backend_may_jit_the_graph():
    assert run_with(lambda gm, example_inputs: jax.jit(lambda *flat: gm(*flat))) == [18.0, 2.0]


@pytest.mark.parametrize("returned", [None, 3, [1]], ids=repr)
def test_backend_that_returns_no_callable(returned):
    with pytest.raises(jhop.JhopError, match=f"must return a callable.*{type(returned).__name__}"):
        run_with(lambda gm, example_inputs: returned)


def test_backend_that_returns_no_callable_for_the_backward():
    def backend(gm, example_inputs):
        return gm if gm.name.endswith("_forward") else None

    with pytest.raises(jhop.JhopError, match="must return a callable.*NoneType"):
        run_with(backend)


def test_exception_of_a_backend_is_the_callers():
    def backend(gm, example_inputs):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        run_with(backend)


@pytest.mark.parametrize("name", ["eager", "aot_eager", "xla"])
def test_named_backends_are_functions_of_graph_and_inputs(name):
    gm = jhop.make_fx(lambda ct: ct * 3.0)(jnp.ones(2))
    run = getattr(jhop.backends, name)(gm, [jnp.ones(2)])
    assert [out.tolist() for out in run(jnp.array([1.0, 2.0]))] == [[3.0, 6.0]]


# Compiled autograd: values.


def test_several_leaves(compiler):
    x, y, z = leaf(1.0), leaf(2.0), leaf(3.0)
    y.register_hook(lambda grad: grad * grad)
    with jhop.compiled_autograd.enable(compiler):
        (x * y + y * z + z).backward(jnp.array([1.0]))
    assert [t.grad.tolist() for t in (x, y, z)] == [[2.0], [16.0], [3.0]]


def test_compiled_and_eager_nodes_in_one_backward(compiler):
    def fn(a, b):
        c = a * b
        c.register_hook(at_most(4.0))
        return c * 2.0, c * 3.0

    x, y = leaf(2.0), leaf(3.0)
    first, second = jhop.compile(fn)(x * x, y)
    out = hnp.sin(first * 0.0) + second
    out.register_hook(times(10.0))
    with jhop.compiled_autograd.enable(compiler):
        out.backward(jnp.array([0.5]))
    # out gets 5, first 5 * cos(0) * 0, second 5; c gets 15, at most 4.
    assert ([x.grad.tolist(), y.grad.tolist()], len(compiler.captured)) == ([[4 * 3 * 4.0], [4 * 4.0]], 1)


def test_captured_backward_is_one_graph(compiler):
    x = leaf(1.0)
    y = x * 2.0
    y.register_hook(times(3.0))
    with jhop.compiled_autograd.enable(compiler):
        (hnp.sin(y) + y).sum().backward()
    assert len(compiler.graphs) == 1


def test_captured_backward_runs_no_hook_before_it_is_inlined(calls):
    def hook(grad):
        calls.append("hook")

    def compiler_fn(gm):
        calls.append("captured")
        return gm

    x = leaf(1.0)
    x.register_hook(hook)
    with jhop.compiled_autograd.enable(compiler_fn):
        (x * 2.0).sum().backward()
    assert calls == ["captured", "hook"]


def test_captured_graph_runs_by_itself():
    x = leaf(2.0)
    x.register_hook(lambda grad: grad * grad)
    with jhop.compiled_autograd.enable(lambda gm: gm):
        (x * 3.0).sum().backward()
    assert x.grad.tolist() == [9.0]


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_options_of_the_compiler(dynamic, fullgraph):
    x = leaf(2.0, 1.0)
    x.register_hook(lambda grad: grad * grad.shape[0])
    with jhop.compiled_autograd.enable(Compiler(dynamic=dynamic, fullgraph=fullgraph)):
        (x * x).sum().backward()
    assert x.grad.tolist() == [8.0, 4.0]


def test_state_on_compiled_and_eager_nodes(compiler):
    inside, outside = types.SimpleNamespace(n=0), types.SimpleNamespace(n=0.5)

    def count_inside(grad):
        inside.n += 1
        return grad * 2.0

    def count_outside(grad):
        outside.n += 1.0
        return grad * 3.0

    def fn(x):
        y = x * 1.0
        y.register_hook(count_inside)
        return y

    fn, x = jhop.compile(fn), leaf(1.0)
    for _ in range(3):
        y = fn(x) * 5.0
        y.register_hook(count_outside)
        with jhop.compiled_autograd.enable(compiler):
            y.backward(jnp.array([1.0]))
    assert (inside.n, outside.n, x.grad.tolist()) == (3, 3.5, [90.0])


def test_hooks_that_share_state_see_each_others_writes(compiler):
    box = types.SimpleNamespace(n=1.0)

    def scale(grad):
        box.n = box.n * 2.0
        return grad * box.n

    x, y = leaf(1.0), leaf(1.0)
    x.register_hook(scale)
    y.register_hook(scale)
    with jhop.compiled_autograd.enable(compiler):
        (x * y).sum().backward()
    assert (box.n, sorted([x.grad.item(), y.grad.item()])) == (4.0, [2.0, 4.0])


def test_array_state_is_read_anew_at_each_backward(compiler):
    box = types.SimpleNamespace(total=jnp.zeros(1))

    def accumulate(grad):
        box.total = box.total + grad
        return box.total

    x = leaf(1.0)
    x.register_hook(accumulate)
    results = []
    for _ in range(3):
        x.grad = None
        with jhop.compiled_autograd.enable(compiler):
            (x * 2.0).sum().backward()
        results.append(x.grad.item())
    assert (results, box.total.tolist(), len(compiler.graphs)) == ([2.0, 4.0, 6.0], [6.0], 1)


def test_branch_on_a_counter_is_taken_anew(compiler):
    box = types.SimpleNamespace(n=0)

    def warm_up(grad):
        box.n += 1
        return grad * 0.0 if box.n < 3 else grad

    x = leaf(1.0)
    x.register_hook(warm_up)
    results = []
    for _ in range(4):
        x.grad = None
        with jhop.compiled_autograd.enable(compiler):
            (x * 2.0).sum().backward()
        results.append(x.grad.item())
    assert results == [0.0, 0.0, 2.0, 2.0]


def test_retained_gradient(compiler):
    x = leaf(1.0)
    y = x * 2.0
    y.retain_grad()
    y.register_hook(times(10.0))
    with jhop.compiled_autograd.enable(compiler):
        (y * 3.0).sum().backward()
    assert (y.grad.tolist(), x.grad.tolist()) == ([30.0], [60.0])


def test_retained_gradient_accumulates(compiler):
    x = leaf(1.0)
    y = x * 2.0
    y.retain_grad()
    out = (y * 3.0).sum()
    with jhop.compiled_autograd.enable(compiler):
        out.backward(retain_graph=True)
        out.backward()
    assert (y.grad.tolist(), x.grad.tolist()) == ([6.0], [12.0])


def test_retained_gradient_of_a_compiled_functions_output(compiler):
    x = leaf(1.0)
    y = jhop.compile(lambda x: x * 2.0)(x)
    y.retain_grad()
    with jhop.compiled_autograd.enable(compiler):
        (y * 3.0).sum().backward()
    assert (y.grad.tolist(), x.grad.tolist()) == ([3.0], [6.0])


def test_post_accumulate_hook_sees_and_changes_the_accumulated_gradient(compiler):
    x = leaf(1.0)
    x.grad = jnp.array([100.0])

    def halve(tensor):
        tensor.grad = tensor.grad * 0.5

    x.register_post_accumulate_grad_hook(halve)
    with jhop.compiled_autograd.enable(compiler):
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [51.0]


def test_post_accumulate_hook_with_state(compiler):
    x, box = leaf(1.0), types.SimpleNamespace(n=0)

    def count(tensor):
        box.n += 1

    x.register_post_accumulate_grad_hook(count)
    for _ in range(3):
        with jhop.compiled_autograd.enable(compiler):
            (x * 2.0).sum().backward()
    assert (box.n, x.grad.tolist()) == (3, [6.0])


def test_post_accumulate_hook_with_state_runs_on_one_graph(compiler):
    x, box = leaf(1.0), types.SimpleNamespace(n=0)

    def count(tensor):
        box.n += 1

    x.register_post_accumulate_grad_hook(count)
    for _ in range(3):
        x.grad = None
        with jhop.compiled_autograd.enable(compiler):
            (x * 2.0).sum().backward()
    assert (box.n, len(compiler.graphs)) == (3, 1)


def test_post_accumulate_hook_may_keep_the_gradient(compiler):
    x, box = leaf(1.0), types.SimpleNamespace(last=None)

    def keep(tensor):
        box.last = tensor.grad * 10.0

    x.register_post_accumulate_grad_hook(keep)
    with jhop.compiled_autograd.enable(compiler):
        (x * 2.0).sum().backward()
    assert not isinstance(box.last, jax.core.Tracer) and box.last.tolist() == [20.0]


def test_post_accumulate_hook_may_read_the_value(compiler):
    x = leaf(3.0)

    def decay(tensor):
        tensor.grad = tensor.grad + tensor.value * 0.5

    x.register_post_accumulate_grad_hook(decay)
    with jhop.compiled_autograd.enable(compiler):
        (x * 2.0).sum().backward()
    assert x.grad.tolist() == [3.5]


def test_post_accumulate_hook_reads_the_present_value_on_the_next_run(compiler):
    def decay(tensor):
        tensor.grad = tensor.grad + tensor.value * 0.5

    results = []
    for value in (3.0, 7.0):
        x = leaf(value)
        x.register_post_accumulate_grad_hook(decay)
        with jhop.compiled_autograd.enable(compiler):
            (x * 2.0).sum().backward()
        results.append(x.grad.tolist())
    assert results == [[3.5], [5.5]]


def test_accumulation_into_an_earlier_gradient(compiler):
    x = leaf(1.0)
    (x * 2.0).sum().backward()
    with jhop.compiled_autograd.enable(compiler):
        (x * 3.0).sum().backward()
    assert x.grad.tolist() == [5.0]


def test_kept_graph_runs_captured_then_eagerly(compiler):
    x = leaf(3.0)
    x.register_hook(lambda grad: grad * grad)
    out = (x * x).sum()
    with jhop.compiled_autograd.enable(compiler):
        out.backward(retain_graph=True)
    out.backward()
    assert x.grad.tolist() == [72.0]


def test_graph_is_freed_after_a_captured_backward(compiler):
    x = leaf(3.0)
    out = (x * x).sum()
    with jhop.compiled_autograd.enable(compiler):
        out.backward()
    with pytest.raises(jhop.JhopError, match="freed"):
        out.backward()


def test_autograd_backward_is_captured(compiler):
    x = leaf(1.0)
    y = x * 2.0
    with jhop.compiled_autograd.enable(compiler):
        jhop.autograd.backward([y, y * 3.0], [jnp.array([1.0]), jnp.array([1.0])])
    assert (x.grad.tolist(), len(compiler.captured)) == ([8.0], 1)


def test_equal_arrays_given_to_two_roots(compiler):
    x, y, ct = leaf(1.0), leaf(1.0), jnp.array([2.0])
    with jhop.compiled_autograd.enable(compiler):
        jhop.autograd.backward([x * 3.0, y * 5.0], [ct, ct])
    assert (x.grad.tolist(), y.grad.tolist()) == ([6.0], [10.0])


def test_root_that_is_a_leaf(compiler):
    x = leaf(1.0, 2.0)
    x.register_hook(times(10.0))
    with jhop.compiled_autograd.enable(compiler):
        x.backward(jnp.array([3.0, 4.0]))
    assert x.grad.tolist() == [30.0, 40.0]


def test_two_leaves_of_one_array(compiler):
    value = jnp.array([2.0])
    x, y = jhop.tensor(value, requires_grad=True), jhop.tensor(value, requires_grad=True)
    y.register_hook(times(10.0))
    with jhop.compiled_autograd.enable(compiler):
        (x * 3.0 + y * 5.0).sum().backward()
    assert (x.grad.tolist(), y.grad.tolist()) == ([3.0], [50.0])


# Compiled autograd: how often.


def step(x, y, compiler):
    with jhop.compiled_autograd.enable(compiler):
        (x * y + y).sum().backward()


def test_loop_is_captured_once(compiler):
    x, y = leaf(1.0), leaf(2.0)
    x.register_hook(times(2.0))
    for _ in range(5):
        x.grad = y.grad = None
        step(x, y, compiler)
    assert len(compiler.captured) == 1


def test_loop_over_new_values_is_captured_once_and_right(compiler):
    grads = []
    for value in (1.0, 3.0, 5.0):
        x, y = leaf(value), leaf(value + 1.0)
        with jhop.compiled_autograd.enable(compiler):
            out = x * y
            out.backward(jnp.array([value]))
        grads.append((x.grad.item(), y.grad.item()))
    assert (grads, len(compiler.captured)) == ([(2.0, 1.0), (12.0, 9.0), (30.0, 25.0)], 1)


def test_loop_with_hooked_intermediates_is_captured_once(compiler):
    double, kept, x = times(2.0), [], leaf(1.0)
    for _ in range(4):
        y = x * 3.0
        y.register_hook(double)
        kept.append(y)
        x.grad = None
        with jhop.compiled_autograd.enable(compiler):
            y.sum().backward()
    assert (len(compiler.captured), x.grad.tolist()) == (1, [6.0])


def test_loop_with_new_leaves_of_the_same_hook_is_captured_once(compiler):
    double, leaves = times(2.0), [leaf(1.0) for _ in range(4)]
    for x in leaves:
        x.register_hook(double)
        with jhop.compiled_autograd.enable(compiler):
            (x * 3.0).sum().backward()
    assert (len(compiler.captured), [x.grad.item() for x in leaves]) == (1, [6.0] * 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: y.register_hook(times(10.0)),
        lambda x, y: x.register_hook(times(10.0)),
        lambda x, y: x.register_post_accumulate_grad_hook(lambda tensor: None),
    ],
    ids=["hook on another leaf", "second hook", "post-accumulate hook"],
)
def test_added_hook_is_captured_anew(compiler, change):
    x, y = leaf(1.0), leaf(2.0)
    x.register_hook(times(2.0))
    for changed in (False, True, False):
        if changed:
            change(x, y)
        x.grad = y.grad = None
        step(x, y, compiler)
    assert len(compiler.captured) == 2


def test_added_hook_runs(compiler):
    x, y = leaf(1.0), leaf(2.0)
    step(x, y, compiler)
    x.grad = y.grad = None
    y.register_hook(times(10.0))
    step(x, y, compiler)
    assert (x.grad.tolist(), y.grad.tolist()) == ([2.0], [20.0])


def test_removed_hook_no_longer_runs(compiler):
    x, y = leaf(1.0), leaf(2.0)
    handle = x.register_hook(times(10.0))
    step(x, y, compiler)
    x.grad = y.grad = None
    handle.remove()
    step(x, y, compiler)
    assert x.grad.tolist() == [2.0]


def test_another_compiler_gets_its_own_capture():
    x, y, first, second = leaf(1.0), leaf(2.0), Compiler(), Compiler()
    for compiler in (first, second, first):
        x.grad = y.grad = None
        step(x, y, compiler)
    assert (len(first.captured), len(second.captured)) == (1, 1)


def test_retained_gradient_is_captured_anew(compiler):
    x = leaf(1.0)
    results = []
    for retain in (False, True):
        y = x * 2.0
        if retain:
            y.retain_grad()
        x.grad = None
        with jhop.compiled_autograd.enable(compiler):
            y.sum().backward()
        results.append(None if y.grad is None else y.grad.tolist())
    assert results == [None, [1.0]]


def test_dynamic_graph_serves_other_sizes(compiler):
    hook = lambda grad: grad * grad  # noqa: E731
    results = []
    for values in ((1.0, 2.0), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)):
        x = leaf(*values)
        x.register_hook(hook)
        with jhop.compiled_autograd.enable(compiler):
            (x * 3.0).backward(jnp.ones(len(values)))
        results.append(x.grad.tolist())
    assert results == [[9.0] * 2, [9.0] * 3, [9.0] * 4]


def test_one_compiled_graph_serves_other_sizes(compiler):
    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda c: c * c))(jnp.ones(3))
    run = compiler(gm)
    assert (run(jnp.full(3, 2.0)).tolist(), run(jnp.full(5, 3.0)).tolist()) == ([4.0] * 3, [9.0] * 5)
    assert len(compiler.graphs) == 1


def test_hook_that_reads_a_size_is_right_for_every_size(compiler):
    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda c: c / c.shape[0]))(jnp.ones(4))
    run = compiler(gm)
    assert [run(jnp.ones(n)).tolist() for n in (4, 2)] == [[0.25] * 4, [0.5] * 2]


# Compiled autograd: all or nothing.


def failing_step(compiler, error):
    """A backward that fails; returns (x, y, box) as they are afterwards."""
    box = types.SimpleNamespace(n=5, log=[1])
    x, y = leaf(1.0), leaf(2.0)
    y.grad = jnp.array([7.0])

    def count(grad):
        box.n += 1
        box.log.append(2)

    def maybe_fail(grad):
        if error is not None:
            raise error
        return grad

    for tensor in (x, y):
        tensor.register_hook(count)
        tensor.register_hook(maybe_fail)
    with pytest.raises((jhop.JhopError, LookupError)), jhop.compiled_autograd.enable(compiler):
        (x * y).sum().backward()
    return x, y, box


def raising_backend(gm, example_inputs):
    raise LookupError("compile")


def raising_program(gm, example_inputs):
    def run(*flat):
        raise LookupError("run")

    return run


def short_program(gm, example_inputs):
    return lambda *flat: jhop.backends.xla(gm, example_inputs)(*flat)[:1]


def raising_compiler(gm):
    raise LookupError("capture")


FAILURES = {
    "hook": (Compiler(), ValueError("hook")),
    "backend": (Compiler(raising_backend), None),
    "program": (Compiler(raising_program), None),
    "compiler_fn": (raising_compiler, None),
    "compiler_fn returns nothing": (lambda gm: None, None),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_backward_leaves_gradients(failure):
    x, y, _ = failing_step(*FAILURES[failure])
    assert (x.grad, y.grad.tolist()) == (None, [7.0])


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_backward_leaves_state(failure):
    *_, box = failing_step(*FAILURES[failure])
    assert (box.n, box.log) == (5, [1])


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_backward_leaves_no_context(failure, calls):
    failing_step(*FAILURES[failure])
    x = leaf(1.0)
    x.register_hook(lambda grad: calls.append(isinstance(grad, jax.core.Tracer)))
    (x * 2.0).sum().backward()
    assert calls == [False]


def test_failed_backward_may_be_repeated(compiler):
    fail, x = [True], leaf(3.0)

    def hook(grad):
        if fail:
            raise LookupError("mine")
        return grad * 2.0

    x.register_hook(hook)
    out = (x * x).sum()
    with jhop.compiled_autograd.enable(compiler):
        with pytest.raises(jhop.Unsupported, match="LookupError: mine"):
            out.backward()
        fail.clear()
        out.backward()
    assert x.grad.tolist() == [12.0]


def test_error_of_a_hook_is_chained(compiler):
    def hook(grad):
        raise LookupError("mine")

    x = leaf(3.0)
    x.register_hook(hook)
    with pytest.raises(jhop.Unsupported, match="hook") as caught, jhop.compiled_autograd.enable(compiler):
        (x * x).sum().backward()
    assert isinstance(caught.value.__cause__, LookupError)


def test_program_that_returns_too_few_gradients():
    x, y = leaf(1.0), leaf(2.0)
    with pytest.raises(jhop.JhopError, match="1 gradients? for 2"):
        with jhop.compiled_autograd.enable(lambda gm: lambda *flat: gm(*flat)[:1]):
            (x * y).sum().backward()


def test_program_that_returns_another_shape_changes_nothing():
    x, y = leaf(1.0), leaf(2.0)
    with pytest.raises(jhop.JhopError, match="gradient"):
        with jhop.compiled_autograd.enable(lambda gm: lambda *flat: [gm(*flat)[0], jnp.ones(7)]):
            (x * y).sum().backward()
    assert (x.grad, y.grad) == (None, None)


def test_backend_that_drops_outputs_changes_no_state():
    box = types.SimpleNamespace(n=5)

    def count(grad):
        box.n += 1

    x, y = leaf(1.0), leaf(2.0)
    x.register_hook(count)
    with pytest.raises((jhop.JhopError, IndexError)):
        with jhop.compiled_autograd.enable(Compiler(short_program)):
            (x * y).sum().backward()
    assert (box.n, x.grad, y.grad) == (5, None, None)


def test_state_is_not_written_if_gradients_cannot_be_assigned():
    box = types.SimpleNamespace(n=5)

    def count(grad):
        box.n += 1

    def compiler_fn(gm):
        run = jhop.compile(gm, fullgraph=True)
        return lambda *flat: run(*flat)[:1]

    x, y = leaf(1.0), leaf(2.0)
    x.register_hook(count)
    with pytest.raises(jhop.JhopError), jhop.compiled_autograd.enable(compiler_fn):
        (x * y).sum().backward()
    assert (x.grad, y.grad) == (None, None)


# Compiled autograd: the context.


def test_context_ends_after_an_exception(compiler):
    with pytest.raises(KeyError), jhop.compiled_autograd.enable(compiler):
        raise KeyError
    (leaf(1.0) * 2.0).sum().backward()
    assert compiler.captured == []


def test_inner_context_wins_and_ends():
    outer, inner, x = Compiler(), Compiler(), leaf(1.0)
    with jhop.compiled_autograd.enable(outer):
        with jhop.compiled_autograd.enable(inner):
            (x * 2.0).sum().backward()
        (x * 3.0).sum().backward()
    assert (len(outer.captured), len(inner.captured), x.grad.tolist()) == (1, 1, [5.0])


def test_context_is_of_one_thread(compiler, calls):
    def elsewhere():
        (leaf(1.0) * 2.0).sum().backward()
        calls.append(len(compiler.captured))

    with jhop.compiled_autograd.enable(compiler):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert calls == [0]


@pytest.mark.parametrize("bad", [3, "xla"], ids=repr)
def test_compiler_fn_must_be_callable(bad):
    with pytest.raises(jhop.JhopError, match=f"expected a function.*{type(bad).__name__}"):
        with jhop.compiled_autograd.enable(bad):
            pass


def test_four_threads_with_tensors_of_their_own():
    n, results, errors = 4, {}, []
    gate = threading.Barrier(n)

    def work(k):
        try:
            box = types.SimpleNamespace(n=0)

            def count(grad):
                box.n += 1
                return grad * float(k)

            x = leaf(float(k))
            x.register_hook(count)
            compiler = Compiler()
            fn = jhop.compile(lambda x: x * x)
            gate.wait()
            for _ in range(3):
                out = fn(x) if k % 2 else x * x
                with jhop.compiled_autograd.enable(compiler):
                    out.sum().backward()
            results[k] = (box.n, x.grad.item())
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, n + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (errors, results) == ([], {k: (3, 3 * 2.0 * k * k) for k in range(1, n + 1)})


def test_four_threads_with_a_compiled_function_and_hook_in_common():
    n, grads, errors = 4, {}, []
    gate = threading.Barrier(n)

    @jhop.compile
    def fn(x):
        y = x * 2.0
        y.register_hook(lambda grad: grad * grad)
        return y

    def work(k):
        try:
            x = leaf(1.0)
            gate.wait()
            for _ in range(3):
                fn(x).backward(jnp.array([float(k)]))
            grads[k] = x.grad.item()
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (errors, grads) == ([], {k: 6.0 * k * k for k in range(n)})


def test_gradient_of_numpy_state_stays_numpy(compiler):
    x, box = leaf(1.0), types.SimpleNamespace(scale=np.array([3.0], np.float32))
    x.register_hook(lambda grad: grad * box.scale)
    with jhop.compiled_autograd.enable(compiler):
        (x * 2.0).sum().backward()
    assert (x.grad.tolist(), type(box.scale)) == ([6.0], np.ndarray)


# What is kept.


def test_compiled_function_is_freed():
    def fn(x):
        return x * 2.0

    alive = weakref.ref(fn)
    jhop.compile(fn)(leaf(1.0))
    del fn
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_leaf_is_freed_after_a_captured_backward(kind):
    def hook(value):
        return None

    x = leaf(1.0)
    getattr(x, kind)(hook)
    alive = weakref.ref(x)
    with jhop.compiled_autograd.enable(full_graph):
        (x * 3.0).sum().backward()
    del x
    gc.collect()
    assert alive() is None


def full_graph(gm):
    return jhop.compile(gm, fullgraph=True)
