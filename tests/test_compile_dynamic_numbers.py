"""`jhop.compile(dynamic=...)` where sizes steer Python code, in functions and hooks: right for each size."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop


def leaves(*shapes):
    rng = np.random.default_rng(0)
    return [jhop.tensor(rng.standard_normal(shape), dtype=jnp.float32, requires_grad=True) for shape in shapes]


def by_size(grad):
    return grad * grad / grad.shape[0]


def hooked(value):
    value.register_hook(by_size)
    return value


def plain(fn, inputs):
    out = fn(*inputs)
    out.sum().backward()
    return [out.value, *(x.grad for x in inputs)]


def captured(fn, inputs):
    out = fn(*inputs)
    with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True, dynamic=True)):
        out.sum().backward()
    return [out.value, *(x.grad for x in inputs)]


def check(way, program, compiled, shapes):
    """Compares the results of a compiled function with those of a run of one operation after another."""
    found, expected = way(compiled, leaves(*shapes)), way(program, leaves(*shapes))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(getattr(one, "value", one), getattr(other, "value", other), rtol=2e-4, atol=2e-5)


def traces(compiled, end=""):
    """The reasons for which the function, or its backward, was traced."""
    return [trace.reason for trace in jhop.explain(compiled).traces if trace.graph.endswith("_backward") == bool(end)]


# What symbols cannot do.


def branches(x):
    return hooked(x * 2.0) * (3.0 if x.shape[0] > 4 else 5.0)


def compares(x):
    return hooked(x * 2.0) * (3.0 if x.shape[0] == 5 else 5.0)


def differs(x):
    return hooked(x * 2.0) * (5.0 if x.shape[0] != 5 else 3.0)


def odd(x):
    return hooked(x * 2.0) * (3.0 if x.shape[0] % 2 else 5.0)


def member(x):
    return hooked(x * 2.0) * (3.0 if x.shape[0] in (5, 7) else 5.0)


def looked_up(x):
    return hooked(x * 2.0) * {5: 3.0}.get(x.shape[0], 5.0)


def printed(x):
    return hooked(x * 2.0) * (3.0 if f"{x.shape}" == "(5,)" else 5.0)


def loops(x):
    for _ in range(x.shape[0]):
        x = hooked(x * 1.5)
    return x


def pairs(x):
    return hooked(x[: x.shape[0] // 2 * 2].reshape(-1, 2) * 2.0)


def unsized(x):
    return hooked(x * 2.0) * float(x.shape[0])


def counted(x):
    return hooked(x * 2.0) * len(x.value)


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (cube(x), x), lambda x, ct: (3 * ct * x**2,))


def own_rule(x):
    return hooked(jhop.lift(cube)(x))


NUMBERS = [branches, compares, differs, odd, member, looked_up, printed, loops, pairs, unsized, counted]


@pytest.mark.parametrize("program", NUMBERS, ids=lambda program: program.__name__)
def test_code_that_needs_a_size_as_a_number_gets_it(program):
    compiled = jhop.compile(program, dynamic=True)
    for n in (4, 5, 6, 5):
        check(plain, program, compiled, [(n,)])


@pytest.mark.parametrize("program", [compares, loops], ids=lambda program: program.__name__)
def test_code_that_needs_a_size_as_a_number_gets_it_when_it_changes(program):
    compiled = jhop.compile(program)
    for n in (4, 5, 6, 5):
        check(plain, program, compiled, [(n,)])


def test_derivative_rule_of_ones_own():
    compiled = jhop.compile(own_rule)
    for n in (4, 6, 7):
        found = []
        for fn in (compiled, own_rule):
            (x,) = leaves((n,))
            (grad,) = jhop.autograd.grad(fn(x).sum(), x, create_graph=True)
            found.append(jhop.autograd.grad((grad * grad).sum(), x)[0])
        np.testing.assert_allclose(*found, rtol=2e-4)


def test_code_that_needs_one_size_has_symbols_for_the_others():
    def by_rows(x):
        return sum([x[i] for i in range(x.shape[0])], hooked(x * 2.0))

    compiled = jhop.compile(by_rows, dynamic=True)
    for shapes in [[(3, 4)], [(3, 5)], [(3, 6)]]:
        check(plain, by_rows, compiled, shapes)
    assert len(traces(compiled)) == 1 and "sizes cannot be symbols" in traces(compiled)[0]


def test_a_question_with_one_answer_for_most_sizes_costs_one_more_trace():
    compiled = jhop.compile(compares, dynamic=True)
    for n in (3, 5, 7, 5, 4, 6):
        check(plain, compares, compiled, [(n,)])
    assert traces(compiled) == ["first call", "code asks whether `x.shape[0]` is 5"]


def test_an_error_of_the_function_is_that_of_its_sizes():
    compiled = jhop.compile(lambda x, y: x + y, dynamic=True)
    with pytest.raises(TypeError, match=r"\(3,\).*\(4,\)"):
        compiled(*leaves((3,), (4,)))
    assert compiled(*leaves((3,), (3,))).shape == (3,)


# Hooks.


class Meter:
    """Counts, sums and keeps the last sum of squares, divided by the size."""

    def __init__(self):
        self.calls = 0
        self.rows = 0
        self.norm = jnp.zeros(())

    def __call__(self, grad):
        self.calls += 1
        self.norm = self.norm * 0.5 + (grad * grad).sum() / grad.shape[0]
        return grad * self.norm


@pytest.mark.parametrize("way", [plain, captured], ids=lambda way: way.__name__)
def test_state_in_hooks_goes_on(way):
    meters = Meter(), Meter()

    def program(meter):
        def fn(x):
            y = x * 3.0
            y.register_hook(meter)
            return y * y

        return fn

    compiled, reference = jhop.compile(program(meters[0]), dynamic=True, fullgraph=True), program(meters[1])
    for n in (3, 4, 7, 3, 9):
        check(way, reference, compiled, [(n,)])
    assert (meters[0].calls, float(meters[0].norm)) == (5, pytest.approx(float(meters[1].norm), rel=1e-5))
    assert traces(compiled) == ["first call"]
    assert len(traces(compiled, "_backward")) == (way is plain)


def halves(grad):
    return grad * 3.0 if grad.shape[0] > 4 else grad * 5.0


def fives(grad):
    return grad * 3.0 if grad.shape[0] == 5 else grad * 5.0


def rows(grad):
    return sum([grad * i for i in range(grad.shape[0])], grad)


@pytest.mark.parametrize("hook", [halves, fives, rows], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("way", [plain, captured], ids=lambda way: way.__name__)
def test_hook_that_needs_a_size_as_a_number_gets_it(hook, way):
    def program(x):
        y = x * 2.0
        y.register_hook(hook)
        return y * y

    compiled = jhop.compile(program, dynamic=True, fullgraph=True)
    for n in (4, 5, 6, 5, 3):
        check(way, program, compiled, [(n,)])
    assert traces(compiled) == ["first call"]


def test_graph_is_refused_for_a_size_that_a_hook_asked_about():
    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=fives))(jnp.ones(3))
    run = jhop.compile(gm, dynamic=True)
    assert [run(jnp.ones(n))[0].item() for n in (3, 4)] == [5.0, 5.0]
    with pytest.raises(jhop.JhopError, match="as it was captured"):
        run(jnp.ones(5))


def test_hook_on_the_host():
    seen = []

    def program(x):
        y = x * 2.0
        y.register_hook(lambda grad: seen.append(np.asarray(grad).shape))
        return y * y

    compiled = jhop.compile(program, dynamic=True)
    with pytest.warns(UserWarning, match="runs on the host"):
        for n in (3, 4, 5):
            x = leaves((n,))[0]
            compiled(x).sum().backward()
    assert seen == [(3,), (4,), (5,)] and traces(compiled) == ["first call"]


def test_backward_over_a_part_of_the_results():
    def both(x, y):
        return hooked(x * 2.0), hooked(y * 3.0)

    compiled = jhop.compile(both, dynamic=True)
    for n in (3, 4, 6):
        for used in (0, 1):
            x, y = leaves((n,), (n,))
            compiled(x, y)[used].sum().backward()
            grads = [None if t.grad is None else t.grad.tolist() for t in (x, y)]
            expected = [[2.0 / n] * n, [3.0 / n] * n]
            assert grads[used] == pytest.approx(expected[used]) and grads[1 - used] is None
    assert traces(compiled) == ["first call"]


# What hooks store.


class Box:
    def __init__(self):
        self.kept, self.items, self.total = None, [], 0


STORED = {
    "size": lambda box, grad: setattr(box, "kept", grad.shape[0]),
    "shape": lambda box, grad: setattr(box, "kept", {"shape": [grad.shape]}),
    "arithmetic": lambda box, grad: setattr(box, "kept", grad.shape[0] * 2 + 1),
    "appended": lambda box, grad: box.items.append(grad.shape[0]),
    "count": lambda box, grad: setattr(box, "total", box.total + grad.shape[0]),
    "slice": lambda box, grad: setattr(box, "kept", slice(0, grad.shape[0])),
}


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("store", STORED.values(), ids=list(STORED))
def test_sizes_that_hooks_store_are_numbers(store, dynamic):
    def run(compiled):
        box = Box()

        def hook(grad):
            store(box, grad)
            return grad * 3.0

        def program(x):
            y = x * 2.0
            y.register_hook(hook)
            return y.sum()

        fn = jhop.compile(program, dynamic=dynamic) if compiled else program
        found = []
        for size in (3, 5, 4, 2):
            (x,) = leaves((size,))
            fn(x).backward()
            found.append((repr(vars(box)), type(box.kept), x.grad.tolist()))
        return found

    assert run(compiled=True) == run(compiled=False)


def test_size_that_a_hook_stores_where_all_sizes_are_symbols():
    box = Box()

    def hook(ct):
        box.kept = ct.shape[0]
        return ct

    step = jhop.jit(jax.grad(lambda x: jhop.hook(x * 2.0, hook).sum()))
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(jhop.Unsupported, match=r"stored the size n in `.*kept`: it is a symbol here"):
        step.trace(jax.ShapeDtypeStruct((n,), jnp.float32))
    assert box.kept is None
    step(jnp.ones(3))
    assert box.kept == 3


@pytest.mark.parametrize("dynamic", [True, None])
def test_hook_in_the_forward_on_values_that_do_not_tell_the_sizes(dynamic):
    def program(x):
        return (x + jhop.trace_wrapped(x.sum(0), fn=lambda total: total * 3.0)) * x.shape[0]

    compiled = jhop.compile(program, dynamic=dynamic)
    for n in (5, 7, 8, 7):
        np.testing.assert_allclose(compiled(jnp.ones((n, 2))), np.full((n, 2), (1.0 + 3.0 * n) * n))
