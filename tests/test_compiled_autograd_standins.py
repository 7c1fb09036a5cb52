"""Hooks made anew at each pass: one capture serves functions of the same code, whatever values they close over."""

import functools
import logging
import threading

import jax.numpy as jnp
import pytest

import jhop


class Compiler:
    """A `compiler_fn` that counts its calls, and the graphs that it inlines."""

    def __init__(self, **options):
        self.captured, self.graphs = 0, 0
        self._options = {"fullgraph": True} | options

    def __call__(self, gm):
        self.captured += 1
        return jhop.compile(gm, backend=self._backend, **self._options)

    def _backend(self, gm, example):
        self.graphs += 1
        return jhop.backends.xla(gm, example)


@pytest.fixture
def compiler():
    return Compiler()


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def gradient(compiler, *hooks, put=lambda x, y, hook: y.register_hook(hook)):
    """The gradient of 2 * x through hooks."""
    x = leaf(1.0, 2.0)
    y = x * 2.0
    for hook in hooks:
        put(x, y, hook)
    with jhop.compiled_autograd.enable(compiler):
        y.sum().backward()
    return x.grad.tolist()


def scaled(by):
    return lambda grad: grad * by


VALUES = {
    "float": [2.0, 3.0, 5.0], "int": [2, 3, 5], "array": [jnp.array([2.0, 3.0]), jnp.array([5.0, 7.0])],
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_values_that_are_closed_over_are_inputs(values, compiler):
    for value in values:
        expected = (2.0 * jnp.broadcast_to(jnp.asarray(value, jnp.float32), 2)).tolist()
        assert gradient(compiler, scaled(value)) == expected
    assert (compiler.captured, compiler.graphs) == (1, 1)


def test_functions_without_values(compiler):
    for _ in range(3):
        assert gradient(compiler, lambda grad: grad * grad) == [2.0, 2.0]
    assert (compiler.captured, compiler.graphs) == (1, 1)


def test_default_arguments_are_inputs(compiler):
    for by in (2.0, 3.0):
        assert gradient(compiler, lambda grad, by=by: grad * by) == [2.0 * by] * 2
    assert (compiler.captured, compiler.graphs) == (1, 1)


def test_other_code_is_captured_anew_and_the_reason_is_logged(compiler, caplog):
    with caplog.at_level(logging.INFO, "jhop.recompiles"):
        assert gradient(compiler, scaled(3.0)) == [6.0, 6.0]
        assert gradient(compiler, lambda grad: grad + 3.0) == [8.0, 8.0]
    assert compiler.captured == 2
    (record,) = caplog.records
    assert "- hook `<lambda>` (test_compiled_autograd_standins.py:" in record.getMessage()


def chosen(by):
    return lambda grad: grad * 5.0 if by is None else grad * by


def test_value_of_another_type_is_traced_anew(compiler, caplog):
    with caplog.at_level(logging.INFO, "jhop.recompiles"):
        assert [gradient(compiler, chosen(by)) for by in (3.0, None, 7.0)] == [[6.0] * 2, [10.0] * 2, [14.0] * 2]
    assert (compiler.captured, compiler.graphs) == (1, 2)
    (record,) = caplog.records
    assert "changed from 3.0 to None" in record.getMessage()


def test_several_hooks_keep_their_own_values(compiler):
    for first, second in [(2.0, 3.0), (5.0, 7.0)]:
        assert gradient(compiler, scaled(first), scaled(second)) == [2.0 * first * second] * 2
    assert compiler.captured == 1
    same = scaled(11.0)
    assert gradient(compiler, same, same) == [242.0, 242.0]
    assert compiler.captured == 2


def on_node(x, y, hook):
    y.grad_fn.register_prehook(lambda grads: (hook(grads[0]),))


def after_leaf(x, y, hook):
    def update(tensor):
        tensor.grad = tensor.grad * factor

    factor = hook(1.0)
    x.register_post_accumulate_grad_hook(update)


@pytest.mark.parametrize("put", [on_node, after_leaf])
def test_hooks_of_other_kinds(put, compiler):
    found = [gradient(compiler, scaled(by), put=put) for by in (2.0, 3.0, 5.0)]
    assert found == [[4.0, 4.0], [6.0, 6.0], [10.0, 10.0]]


def test_hook_that_writes_what_it_closes_over(compiler):
    def counting():
        calls = 0

        def hook(grad):
            nonlocal calls
            calls += 1
            return grad * calls

        return hook, lambda: calls

    hook, calls = counting()
    assert [gradient(compiler, hook) for _ in range(3)] == [[2.0] * 2, [4.0] * 2, [6.0] * 2]
    other, other_calls = counting()
    assert gradient(compiler, other) == [2.0, 2.0]
    assert (calls(), other_calls()) == (3, 1)


def test_hook_that_closes_over_objects(compiler):
    class Box:
        def __init__(self, by):
            self.by, self.calls = by, 0

    def on(box):
        def hook(grad):
            box.calls += 1
            return grad * box.by

        return hook

    boxes = [Box(2.0), Box(3.0)]
    assert [gradient(compiler, on(box)) for box in boxes * 2] == [[4.0] * 2, [6.0] * 2] * 2
    assert [box.calls for box in boxes] == [2, 2]


def test_hook_whose_default_or_code_is_changed(compiler):
    def hook(grad, by=2.0):
        return grad * by

    assert gradient(compiler, hook) == [4.0, 4.0]
    hook.__defaults__ = (3.0,)
    assert gradient(compiler, hook) == [6.0, 6.0]
    hook.__code__ = (lambda grad, by: grad + by).__code__
    assert gradient(compiler, hook) == [8.0, 8.0]
    assert compiler.captured == 2


def test_passes_that_nobody_asked_to_see():
    found = [gradient(None, scaled(float(by))) for by in range(1, 6)]
    assert found == [[2.0 * by] * 2 for by in range(1, 6)]


def test_threads_with_values_of_their_own(compiler):
    found = {}

    def work(by):
        found[by] = [gradient(compiler, scaled(by)) for _ in range(20)]

    gradient(compiler, scaled(1.0))
    threads = [threading.Thread(target=work, args=(float(by),)) for by in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {by: [[2.0 * by] * 2] * 20 for by in (2.0, 3.0, 4.0, 5.0)}
    assert compiler.captured == 1


def test_graph_that_runs_as_it_is():
    captured = []

    def keep(gm):
        captured.append(gm)
        return gm

    for by in (2.0, 3.0):
        assert gradient(keep, scaled(by)) == [2.0 * by] * 2
    assert len(captured) == 1


def counted(holder):
    """A hook that counts in a variable, by what it holds, and one that multiplies by the variable."""
    calls = 1.0

    def count():
        nonlocal calls
        calls += 1.0

    class Holder:
        def __init__(self):
            self.held = [count]

        def __call__(self, grad):
            self.held[0]()

    def write(grad):
        nonlocal calls
        calls += 1.0

    holders = {
        "function": write,
        "helper": lambda grad: count(),
        "object": Holder(),
        "method": Holder().__call__,
        "partial": functools.partial(lambda count, grad: count(), count),
    }
    return holders[holder], lambda grad: grad * calls


@pytest.mark.parametrize("holder", ["function", "helper", "object", "method", "partial"])
@pytest.mark.parametrize("compiler_fn", [Compiler(), None])
def test_variable_that_another_hook_writes(holder, compiler_fn):
    first, second = counted(holder)
    assert [gradient(compiler_fn, first, second) for _ in range(4)] == [[2.0 * n] * 2 for n in (2.0, 3.0, 4.0, 5.0)]


@pytest.mark.parametrize("compiler_fn", [Compiler(), None])
def test_variable_that_a_hook_of_a_compiled_function_writes(compiler_fn):
    write, multiply = counted("function")

    @jhop.compile
    def doubled(x):
        y = x * 2.0
        y.register_hook(write)
        return y

    def run():
        x = leaf(1.0, 2.0)
        x.register_hook(multiply)
        with jhop.compiled_autograd.enable(compiler_fn):
            doubled(x).sum().backward()
        return x.grad.tolist()

    assert [run() for _ in range(4)] == [[2.0 * n] * 2 for n in (2.0, 3.0, 4.0, 5.0)]


def test_variable_that_another_hook_only_reads(compiler):
    """It closes over an object, too, and so has no stand-in itself."""
    box = []

    def pair(by):
        return (lambda grad: grad * (by + len(box))), lambda grad: grad * by

    first, _ = pair(3.0)
    for by in (3.0, 5.0):
        assert gradient(compiler, first, pair(by)[1]) == [6.0 * by] * 2
    assert compiler.captured == 1


def test_hook_that_writes_to_variables_of_its_own(compiler):
    def made(by):
        def hook(grad):
            def add():
                nonlocal total
                total = total + grad * by

            total = grad * 0.0
            add()
            add()
            return total

        return hook

    assert [gradient(compiler, made(by)) for by in (2.0, 3.0)] == [[8.0, 8.0], [12.0, 12.0]]
    assert compiler.captured == 1
