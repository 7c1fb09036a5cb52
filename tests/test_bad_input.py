"""What is wrong is said at once, by its name, with what was expected and what came; nothing is changed by it."""

import contextlib
import functools
import io
import itertools
import re
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
from jhop._source import describe_hook


@pytest.fixture(autouse=True)
def fresh():
    """Overrides the reset before each test: what is refused must not depend on what was compiled before."""


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def full_graph(gm):
    return jhop.compile(gm, fullgraph=True)


# Hooks that break their contract: [what they return for an f32[2] cotangent, how the message calls that].


class Stranger:
    pass


BROKEN = {
    "scalar": (lambda g: g.sum(), r"float32\[\]"),
    "one element": (lambda g: g[:1], r"float32\[1\]"),
    "broadcast": (lambda g: jnp.stack([g, g]), r"float32\[2,2\]"),
    "half": (lambda g: g.astype(jnp.float16), r"float16\[2\]"),
    "integer": (lambda g: jnp.zeros(2, jnp.int32), r"int32\[2\]"),
    "float": (lambda g: 3.0, "float"),
    "str": (lambda g: "g", "str"),
    "tuple": (lambda g: (g,), "tuple"),
    "list": (lambda g: [g, g], "list"),
    "dict": (lambda g: {"g": g}, "dict"),
    "bool": (lambda g: True, "bool"),
    "object": (lambda g: Stranger(), "Stranger"),
}


def with_leaf_hook(hook):
    x = leaf(1.0, 2.0)
    x.register_hook(hook)
    return x, (x * 2.0).sum()


def with_intermediate_hook(hook):
    x = leaf(1.0, 2.0)
    y = x * 2.0
    y.register_hook(hook)
    return x, y.sum()


def with_hook_in_a_compiled_function(hook):
    def fn(x):
        y = x * 2.0
        y.register_hook(hook)
        return y

    x = leaf(1.0, 2.0)
    return x, jhop.compile(fn)(x).sum()


def with_input_hook_in_a_compiled_function(hook):
    def fn(x):
        x.register_hook(hook)
        return x * 2.0

    x = leaf(1.0, 2.0)
    return x, jhop.compile(fn)(x).sum()


TENSOR_MODES = [
    with_leaf_hook,
    with_intermediate_hook,
    with_hook_in_a_compiled_function,
    with_input_hook_in_a_compiled_function,
]
each_tensor_mode = pytest.mark.parametrize("mode", TENSOR_MODES, ids=lambda mode: mode.__name__)
captured_or_not = pytest.mark.parametrize("captured", [False, True], ids=["alone", "captured"])


def backward(out, captured):
    if captured:
        with jhop.compiled_autograd.enable(full_graph):
            out.backward()
    else:
        out.backward()


def hooked_loss(hook):
    return lambda x: (jhop.hook(x, hook) * 2.0).sum()


FUNCTIONAL_MODES = {
    "grad": lambda hook: jax.grad(hooked_loss(hook))(jnp.ones(2)),
    "jit of grad": lambda hook: jax.jit(jax.grad(hooked_loss(hook)))(jnp.ones(2)),
    "vjp": lambda hook: jax.vjp(hooked_loss(hook), jnp.ones(2))[1](jnp.float32(1.0)),
    "trace_wrapped": lambda hook: jhop.trace_wrapped(jnp.ones(2), fn=hook),
    "jit of trace_wrapped": lambda hook: jax.jit(lambda ct: jhop.trace_wrapped(ct, fn=hook))(jnp.ones(2)),
    "inline": lambda hook: jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook))(jnp.ones(2))),
    "graph": lambda hook: jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook))(jnp.ones(2))(jnp.ones(2)),
}


def named(returns):
    def my_hook(grad):
        return returns(grad)

    return my_hook


SOME = ["scalar", "half", "float"]


@pytest.mark.parametrize("broken", SOME)
@captured_or_not
@each_tensor_mode
def test_broken_hook_of_a_tensor(mode, captured, broken):
    returns, got = BROKEN[broken]
    _, out = mode(named(returns))
    with pytest.raises(jhop.HookError, match=rf"`my_hook`.*must return.*float32\[2\].*returned {got}\."):
        backward(out, captured)


@pytest.mark.parametrize(
    ("mode", "broken"),
    [
        (mode, broken)
        for mode in FUNCTIONAL_MODES
        for broken in (BROKEN if mode in ("trace_wrapped", "inline") else SOME)
    ],
)
def test_broken_hook_of_a_function(mode, broken):
    returns, got = BROKEN[broken]
    with pytest.raises(jhop.HookError, match=rf"`my_hook`.*must return.*float32\[2\].*returned {got}\."):
        FUNCTIONAL_MODES[mode](named(returns))


def test_message_names_the_dtype_that_numpy_has():
    with pytest.raises(jhop.HookError, match=r"returned float64\[2\]\."):
        jhop.trace_wrapped(jnp.ones(2), fn=lambda g: np.zeros(2, np.float64))


@captured_or_not
@each_tensor_mode
def test_message_says_where_the_hook_is(mode, captured):
    _, out = mode(named(lambda g: 3.0))
    with pytest.raises(jhop.HookError, match=r"test_bad_input\.py:\d+"):
        backward(out, captured)


@captured_or_not
@each_tensor_mode
def test_broken_hook_leaves_the_gradient(mode, captured):
    x, out = mode(lambda g: 3.0)
    x.grad = before = jnp.array([5.0, 6.0])
    with pytest.raises(jhop.HookError):
        backward(out, captured)
    assert x.grad is before


@each_tensor_mode
def test_broken_hook_leaves_state_when_captured(mode):
    box = types.SimpleNamespace(n=0, log=[])

    def hook(grad):
        box.n += 1
        box.log.append(grad)
        return grad.sum()

    _, out = mode(hook)
    with pytest.raises(jhop.HookError):
        backward(out, True)
    assert (box.n, box.log) == (0, [])


@captured_or_not
@each_tensor_mode
def test_none_is_allowed(mode, captured):
    x, out = mode(lambda g: None)
    backward(out, captured)
    assert x.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("mode", ["grad", "jit of grad"])
def test_none_is_allowed_in_functions(mode):
    assert FUNCTIONAL_MODES[mode](lambda g: None).tolist() == [2.0, 2.0]


@captured_or_not
def test_hook_that_takes_no_argument(captured):
    _, out = with_leaf_hook(lambda: None)
    with pytest.raises((TypeError, jhop.Unsupported), match="argument"):
        backward(out, captured)


def test_hook_error_is_a_type_error():
    assert issubclass(jhop.HookError, (jhop.JhopError, TypeError)) and issubclass(jhop.Unsupported, jhop.JhopError)


# Registering hooks.

NO_HOOKS = [3, None, "hook", jnp.ones(2)]


@pytest.mark.parametrize("bad", NO_HOOKS, ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize(
    "register",
    [
        lambda bad: leaf(1.0).register_hook(bad),
        lambda bad: (leaf(1.0) * 2.0).register_hook(bad),
        lambda bad: leaf(1.0).register_post_accumulate_grad_hook(bad),
        lambda bad: jhop.hook(jnp.ones(2), bad),
        lambda bad: jhop.trace_wrapped(jnp.ones(2), fn=bad),
    ],
    ids=["leaf", "intermediate", "post-accumulate", "hook", "trace_wrapped"],
)
def test_hook_that_is_not_callable(register, bad):
    with pytest.raises(jhop.HookError, match=f"callable.*{type(bad).__name__}"):
        register(bad)


def test_hook_that_is_not_callable_inside_a_compiled_function():
    with pytest.raises(jhop.HookError, match="callable.*int"):
        jhop.compile(lambda x: x.register_hook(3))(leaf(1.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jhop.tensor([1.0]),
        lambda: jhop.tensor([1]),
        lambda: leaf(1.0).detach(),
        lambda: jhop.tensor([1.0]) * 2.0,
        lambda: leaf(1.0).argmax(),
    ],
    ids=["constant", "integer", "detached", "result of a constant", "integer result"],
)
@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hook_where_no_gradient_will_pass(make, method):
    with pytest.raises(jhop.HookError, match=f"{method}.*does not require grad"):
        getattr(make(), method)(lambda grad: None)


def test_hook_on_what_was_made_under_no_grad():
    with jhop.autograd.no_grad():
        y = leaf(1.0) * 2.0
    with pytest.raises(jhop.HookError, match="does not require grad"):
        y.register_hook(lambda grad: None)


def test_hook_on_a_constant_inside_a_compiled_function():
    with pytest.raises(jhop.HookError, match="does not require grad"):
        jhop.compile(lambda x: x.detach().register_hook(lambda grad: None))(leaf(1.0))


def test_retain_grad_where_no_gradient_will_pass():
    with pytest.raises(jhop.HookError, match="retain_grad.*does not require grad"):
        jhop.tensor([1.0]).retain_grad()


def test_post_accumulate_hook_on_an_intermediate():
    with pytest.raises(jhop.HookError, match="only leaves.*MultiplyBackward"):
        (leaf(1.0) * 2.0).register_post_accumulate_grad_hook(lambda tensor: None)


@captured_or_not
def test_post_accumulate_hook_that_returns_something(captured):
    x = leaf(1.0, 2.0)
    x.register_post_accumulate_grad_hook(lambda tensor: tensor.grad)
    with pytest.raises(jhop.HookError, match="must return None"):
        backward((x * 2.0).sum(), captured)


@captured_or_not
def test_post_accumulate_hook_that_sets_another_shape(captured):
    def cut(tensor):
        tensor.grad = tensor.grad[:1]

    x = leaf(1.0, 2.0)
    x.register_post_accumulate_grad_hook(cut)
    with pytest.raises(jhop.JhopError, match=r"(?s)2.*1"):
        backward((x * 2.0).sum(), captured)
    assert x.grad is None


def test_post_accumulate_hook_is_named_by_its_own_file():
    def cut(tensor):
        tensor.grad = tensor.grad[:1]

    x = leaf(1.0, 2.0)
    x.register_post_accumulate_grad_hook(cut)
    with pytest.raises(jhop.JhopError, match=r"`cut` \(test_bad_input\.py"):
        backward((x * 2.0).sum(), True)


@pytest.mark.parametrize(
    ("value", "found"),
    [(lambda: jnp.arange(3), "int32"), (lambda: (jnp.arange(3), True), "int32, bool"), (lambda: [], "no array")],
    ids=["integer", "pytree", "empty"],
)
def test_functional_hook_on_what_has_no_gradient(value, found):
    with pytest.raises(jhop.HookError, match=f"only floating and complex.*got {found}"):
        jhop.hook(value(), lambda ct: None)


def test_trace_wrapped_without_a_cotangent():
    with pytest.raises(jhop.HookError, match="cotangent as first argument"):
        jhop.trace_wrapped(fn=lambda ct: ct)


# Making Tensors and setting gradients.


@pytest.mark.parametrize("data", [[1, 2], [True], np.array([1], np.uint8)], ids=["int", "bool", "uint8"])
def test_integers_cannot_require_grad(data):
    with pytest.raises(jhop.JhopError, match="only floating and complex.*got dtype"):
        jhop.tensor(data, requires_grad=True)


def test_integers_cannot_begin_to_require_grad():
    x = jhop.tensor([1])
    with pytest.raises(jhop.JhopError, match="requires_grad_.*int32"):
        x.requires_grad_()
    assert not x.requires_grad


def test_intermediate_cannot_stop_requiring_grad():
    with pytest.raises(jhop.JhopError, match="only a leaf"):
        (leaf(1.0) * 2.0).requires_grad_(False)


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (lambda: jnp.ones(3), r"expected shape \(2,\).*got shape \(3,\)"),
        (lambda: jnp.ones(2, jnp.float16), "float32.*float16"),
        (lambda: 1.0, "expected an array or None, got float"),
        (lambda: [1.0, 2.0], "expected an array or None, got list"),
    ],
    ids=["shape", "dtype", "float", "list"],
)
def test_gradient_that_does_not_fit(grad, message):
    x = leaf(1.0, 2.0)
    with pytest.raises(jhop.JhopError, match=message):
        x.grad = grad()
    assert x.grad is None


# Backward.

BAD_SEEDS = {
    "shape": (lambda: jnp.ones(3), r"expected shape \(2,\).*got shape \(3,\)"),
    "broadcastable": (lambda: jnp.ones(1), r"expected shape \(2,\).*got shape \(1,\)"),
    "dtype": (lambda: jnp.ones(2, jnp.float16), "float32.*float16"),
    "integers": (lambda: jnp.ones(2, jnp.int32), "float32.*int32"),
    "list": (lambda: [1.0, 1.0], "got list"),
    "float": (lambda: 1.0, "got float"),
    "missing": (lambda: None, r"only for a scalar.*\(2,\)"),
}


@pytest.mark.parametrize("bad", BAD_SEEDS)
@captured_or_not
def test_incoming_gradient_that_does_not_fit(captured, bad):
    make, message = BAD_SEEDS[bad]
    out = leaf(1.0, 2.0) * 2.0
    with pytest.raises(jhop.JhopError, match=message):
        with jhop.compiled_autograd.enable(full_graph) if captured else contextlib.nullcontext():
            out.backward(make())


@pytest.mark.parametrize("bad", BAD_SEEDS)
def test_incoming_gradient_that_does_not_fit_runs_no_hook(bad):
    x, seen = leaf(1.0, 2.0), []
    x.register_hook(seen.append)
    with pytest.raises(jhop.JhopError):
        (x * 2.0).backward(BAD_SEEDS[bad][0]())
    assert (seen, x.grad) == ([], None)


def test_backward_may_be_repeated_after_a_bad_gradient():
    x = leaf(3.0, 4.0)
    out = x * x
    with pytest.raises(jhop.JhopError):
        out.backward()
    out.backward(jnp.ones(2))
    assert x.grad.tolist() == [6.0, 8.0]


@pytest.mark.parametrize(
    "make", [lambda: jhop.tensor(1.0), lambda: leaf(1.0).sum().detach()], ids=["constant", "detached"]
)
def test_backward_from_what_requires_no_grad(make):
    with pytest.raises(jhop.JhopError, match="does not require grad"):
        make().backward()


@captured_or_not
@pytest.mark.parametrize("compiled", [False, True], ids=["tape", "compiled"])
def test_second_backward_through_a_freed_graph(captured, compiled):
    x = leaf(3.0, 1.0)
    square = jhop.compile(lambda x: x * x) if compiled else lambda x: x * x
    out = square(x).sum()
    backward(out, captured)
    with pytest.raises(jhop.JhopError, match="freed.*retain_graph=True"):
        backward(out, captured)
    assert x.grad.tolist() == [6.0, 2.0]


def test_second_backward_through_a_freed_part_runs_no_hook():
    x, seen = leaf(3.0), []
    y = x * x
    y.sum().backward()
    z = y * 2.0
    z.register_hook(seen.append)
    with pytest.raises(jhop.JhopError, match="freed"):
        z.sum().backward()
    assert (seen, x.grad.tolist()) == ([], [6.0])


def test_another_number_of_gradients_than_of_roots():
    x = leaf(1.0)
    with pytest.raises(jhop.JhopError, match="got 2 and 1"):
        jhop.autograd.backward([x, x], [jnp.ones(1)])
    assert x.grad is None


@pytest.mark.parametrize("bad", [3, [3], None], ids=repr)
def test_root_that_is_no_tensor(bad):
    with pytest.raises(jhop.JhopError, match="expected Tensors"):
        jhop.autograd.backward(bad)


# Compiling, capturing, printing.


@pytest.mark.parametrize("bad", ["tpu", "XLA", "", 3, None, ["xla"]], ids=repr)
@pytest.mark.parametrize("what", ["function", "graph"])
def test_unknown_backend(what, bad):
    target = (lambda x: x) if what == "function" else jhop.make_fx(lambda x: x * 2.0)(jnp.ones(2))
    with pytest.raises(jhop.JhopError, match=f"unknown backend {re.escape(repr(bad))}.*'eager'.*'xla'"):
        jhop.compile(target, backend=bad)


@pytest.mark.parametrize("bad", [3, None, "f", [len]], ids=repr)
@pytest.mark.parametrize(
    "front", [jhop.compile, jhop.make_fx, jhop.inline, jhop.lift], ids=lambda front: front.__name__
)
def test_what_is_neither_function_nor_graph(front, bad):
    with pytest.raises(jhop.JhopError, match=f"expected a.*got {type(bad).__name__}"):
        front(bad)


def test_inline_of_a_function():
    with pytest.raises(jhop.JhopError, match="expected a GraphModule.*got function"):
        jhop.inline(lambda x: x)


@pytest.fixture
def graph():
    return jhop.make_fx(lambda a, b: a * b.mean())(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    "args",
    [
        lambda: ((jnp.ones(2),), {}),
        lambda: ((jnp.ones(2),) * 3, {}),
        lambda: ((jnp.ones(2),), {"b": jnp.ones(2)}),
        lambda: (([jnp.ones(2), jnp.ones(2)],), {}),
    ],
    ids=["too few", "too many", "by keyword", "list"],
)
def test_graph_called_with_other_arguments(graph, args):
    args, kwargs = args()
    with pytest.raises(jhop.JhopError, match="expected arguments of the structure"):
        graph(*args, **kwargs)


@pytest.mark.parametrize("bad", [lambda: jnp.ones(4), lambda: jnp.ones((2, 2))], ids=["size", "rank"])
def test_graph_called_with_other_shapes(graph, bad):
    # Sizes are numbers in the graph: the mean would divide by 2 whatever comes.
    with pytest.raises(jhop.JhopError, match="shape|float32"):
        graph(jnp.ones(2), bad())


@pytest.mark.parametrize("bad", [lambda: jnp.ones(2, jnp.int32), lambda: "b"], ids=["dtype", "type"])
def test_graph_called_with_other_types(graph, bad):
    with pytest.raises(jhop.JhopError):
        graph(jnp.ones(2), bad())


def test_inlined_graph_called_with_too_many_inputs():
    box = types.SimpleNamespace(n=1)

    def count(ct):
        box.n += 1

    gm = jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=count))(jnp.ones(2)))
    with pytest.raises(jhop.JhopError, match="expected 2 inputs.*got 4"):
        gm(jnp.ones(2), 1, 2, 3)


@pytest.mark.parametrize("dialect", ["tensorflow", "", None, 3], ids=repr)
def test_unknown_dialect(graph, dialect):
    with pytest.raises(jhop.JhopError, match=f"unknown dialect {dialect!r}.*'torch' or 'jax'"):
        graph.print_readable(False, dialect=dialect)


def test_unknown_dialect_prints_nothing(graph, capsys):
    with pytest.raises(jhop.JhopError):
        graph.print_readable(dialect="tensorflow")
    assert capsys.readouterr().out == ""


# Hooks under compiled autograd that do what cannot be captured.


def branches(grad):
    return grad if grad.sum() > 0 else -grad


def reads(grad):
    return grad * float(grad.sum())


def converts(grad):
    return jnp.asarray(np.asarray(grad))


def indexes(grad):
    return grad.at[int(grad[0])].set(0.0)


def raises(grad):
    raise LookupError("mine")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (branches, "branches on the value of an array"),
        (reads, "reads the value of an array"),
        (converts, "reads the value of an array"),
        (indexes, "reads the value of an array"),
        (raises, "LookupError: mine"),
    ],
)
@each_tensor_mode
def test_hook_that_cannot_be_captured(mode, hook, message):
    x, out = mode(hook)
    with pytest.raises(jhop.Unsupported, match=f"`{hook.__name__}`.*{message}"):
        backward(out, True)
    assert x.grad is None


@each_tensor_mode
def test_message_quotes_the_line(mode):
    _, out = mode(branches)
    with pytest.raises(jhop.Unsupported, match=r"return grad if grad\.sum\(\) > 0 else -grad"):
        backward(out, True)


# State that cannot be lifted


class HoldsLock:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, ct):
        with self.lock:
            return ct * 2


def counts_with(numbers, second=itertools.count(5)):  # noqa: B008
    def hook(ct):
        return ct * next(numbers)

    def by_default(ct, size=2, second=second):
        return ct * next(second) * size

    return hook, by_default


steps, console = itertools.count(1), io.TextIOWrapper(io.BytesIO())


@pytest.mark.parametrize(
    ("hook", "line", "words"),
    [
        (HoldsLock(), "with self.lock:", "Lock around the call"),
        (counts_with(itertools.count(1))[0], "return ct * next(numbers)", "a count: an iterator keeps a position"),
        (counts_with(itertools.count(1))[1], "return ct * next(second) * size", "an iterator keeps a position"),
        (functools.partial(lambda ct, file: file.write("") and ct, file=console), "file.write", "a TextIOWrapper"),
        (lambda ct: [next(steps) for _ in ct] and ct, "next(steps)", "an iterator keeps a position"),
    ],
)
def test_state_that_cannot_be_lifted_is_named_with_the_hook_and_the_line(hook, line, words):
    def other(ct):
        return ct * 3

    def loss(x):
        return (jhop.hook(jhop.hook(x, other), hook) ** 2).sum()

    for jit, options in ((jhop.jit, {"fullgraph": True}), (jax.jit, {})):
        with pytest.raises(jhop.Unsupported) as caught:
            jit(jax.grad(loss), **options)(jnp.ones(3))
        message = str(caught.value)
        assert message.startswith(f"{describe_hook(hook)} reads `") and words in message
        assert f'File "{__file__}", line ' in message and line in message.splitlines()[2]

