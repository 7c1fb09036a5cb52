"""Captured backward passes over tapes of several sizes: what one capture serves, and that gradients are right."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
import jhop.numpy as hnp
from jhop._text.jax_text import function_name, opaque

SIZES = [(3, 4), (6, 7), (5, 9), (6, 2), (3, 4)]


@pytest.fixture(autouse=True)
def forget():
    jhop.compiled_autograd.reset()


def leaf(shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jhop.tensor(values, dtype=jnp.float32, requires_grad=True)


class Compiler:
    """A compiler_fn that keeps what it was given and made."""

    def __init__(self, **options):
        self.options = options
        self.graphs = []
        self.compiled = []

    def __call__(self, gm):
        self.graphs.append(gm)
        self.compiled.append(jhop.compile(gm, fullgraph=True, **self.options))
        return self.compiled[-1]

    @property
    def symbols(self):
        """Per capture, how many symbols it has."""
        return [len({symbol for symbol, _, _ in gm.shapes}) for gm in self.graphs]


class Count:
    """A hook that counts, and keeps a number of its gradient."""

    def __init__(self):
        self.n = 0
        self.total = jnp.float32(0)

    def __call__(self, grad):
        self.n += 1
        self.total = self.total + jnp.sum(grad)
        return grad * self.n / grad.shape[0]


count = Count()


def hooked(value, hook=count):
    value.register_hook(hook)
    return value


def grads(program, shape, compiler=None, inside=True):
    """What a pass from a program's result makes: gradients, and what the hook keeps."""
    count.__init__()
    x = leaf(shape)
    out, *more = program(x) if isinstance(program(leaf(shape)), tuple) else (program(x),)
    ct = jnp.asarray(np.random.default_rng(1).standard_normal(out.shape), jnp.float32)
    if inside:
        with jhop.compiled_autograd.enable(compiler):
            out.backward(ct)
    else:
        out.backward(ct)
    return [x.grad, count.total, count.n, *(tensor.grad for tensor in more)]


def check(program, shape, compiler=None):
    for found, expected in zip(grads(program, shape, compiler), grads(program, shape, inside=False), strict=True):
        assert type(found) is type(expected)
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def two(x):
    return jnp.sin(x), x[1:] * x[:-1], x.sum(0)


def padded(x):
    return jnp.pad(x, ((1, 2), (0, 0)))


@jax.custom_vjp
def steeper(x):
    return jnp.sin(x)


steeper.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x) * x.shape[0],))


def hooked_inside(x):
    doubled = jhop.hook(x * 2.0, lambda ct: ct * ct.shape[0])
    return doubled * doubled


def before(cts):
    return (cts[0] * 3.0,)


def after(ins, outs):
    return (ins[0] / (1 + outs[0].shape[0]),)


def scaled(cts):
    return tuple(ct / len(cts) * ct.shape[1] for ct in cts)


def node_hooks(x):
    y = hooked(hnp.sin(x))
    y.grad_fn.register_prehook(before)
    y.grad_fn.register_hook(after)
    return y * y


def joint_hook(x):
    a, b = x * 2.0, x * 3.0
    jhop.autograd.register_multi_grad_hook((a, b), scaled)
    return a * b


def retained(x):
    y = hooked(hnp.sin(x))
    y.retain_grad()
    return y * y, y


def closing(x):
    square = (x * x).value
    return hooked(x * 2.0, lambda grad: grad * square)


@jhop.compile(dynamic=True)
def compiled_one(x):
    y = hooked(hnp.tanh(x) * x.shape[0])
    return y * y


@jhop.compile(dynamic=True)
def compiled_two(x):
    return (x * 2.0).sum(axis=1), hnp.sin(x)[1:]


PROGRAMS = {
    "elementwise": lambda x: hooked(x * 3.0 + 1.0) * x,
    "mean": lambda x: hooked(x * x).mean(axis=0),
    "std": lambda x: hnp.std(hooked(x * 2.0), axis=0) * x,
    "divided": lambda x: hooked(x * x).sum() / x.shape[0],
    "flat": lambda x: hooked((x.reshape(-1)) ** 2) * 2.0,
    "stacked": lambda x: hooked(hnp.stack([x, x * 2.0])).reshape(2, -1),
    "indexed": lambda x: hooked(x[1:] * x[:-1]) * x[-1] + x[0],
    "changed": lambda x: hooked(x * 3.0).at[0].set(5.0),
    "joined": lambda x: hnp.concatenate([hooked(x * 3.0), x[:1]]),
    "gram": lambda x: hooked(x * 2.0).T @ x,
    "constant": lambda x: hooked(x * jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]),
    "sorted": lambda x: hnp.sort(hooked(x * 3.0), axis=0),
    "first": lambda x: hooked(jhop.lift(two)(x)[0] * 3.0),
    "second": lambda x: hooked(jhop.lift(two)(x)[1] * 3.0),
    "padded": lambda x: jhop.lift(padded)(hooked(x * 3.0)),
    "custom": lambda x: hooked(jhop.lift(steeper)(x)),
    "inside": lambda x: hooked(jhop.lift(hooked_inside)(x)),
    "nodes": node_hooks,
    "joint": joint_hook,
    "retained": retained,
    "closing": closing,
    "compiled": lambda x: compiled_one(x) * x,
    "compiled twice": lambda x: compiled_one(compiled_one(x * 2.0)[1:]),
    "compiled, first result": lambda x: compiled_two(x)[0] * 3.0,
    "compiled, second result": lambda x: hooked(compiled_two(x)[1] * 3.0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_capture_serves_the_sizes_that_change(name):
    compiler = Compiler()
    for shape in SIZES:
        check(PROGRAMS[name], shape, compiler)
    assert compiler.symbols == [0, 2]
    # A hook that closes over an array of the gradient's size is traced for each.
    assert [compiled.versions() for compiled in compiler.compiled] == [1, 3 if name == "closing" else 1]


@pytest.mark.parametrize("options", [{"dynamic": True}, {"backend": "aot_eager"}, {"backend": "eager"}], ids=str)
def test_ways_to_compile(options):
    compiler = Compiler(**options)
    for shape in SIZES:
        check(PROGRAMS["indexed"], shape, compiler)
    assert compiler.symbols == [0, 2]


def test_functions_that_give_back_what_they_were_given():
    graphs = []
    for shape in SIZES:
        check(PROGRAMS["mean"], shape, lambda gm, graphs=graphs: graphs.append(gm) or gm)
    assert len(graphs) == len(SIZES)  # another function each time

    def given(gm):
        graphs.append(gm)
        return gm

    graphs.clear()
    for shape in SIZES:
        check(PROGRAMS["mean"], shape, given)
    assert len(graphs) == 2


def test_only_sizes_that_change_are_symbols():
    compiler = Compiler()
    w = leaf((4, 4), seed=3)

    def program(x):
        w.grad = None
        return hooked(hnp.tanh(x @ w)), w

    for shape in [(8, 4), (4, 4), (5, 4), (2, 4)]:
        check(program, shape, compiler)
    assert compiler.symbols == [0, 1]
    assert compiler.graphs[1].jaxpr.in_avals[-1].shape == (4, 4)


def test_gradients_that_are_there_already():
    compiler = Compiler()

    def twice(x):
        (hooked(hnp.sin(x)) * 3.0).sum().backward()
        return hooked(x * 3.0) * x

    for shape in SIZES:
        check(twice, shape, compiler)
    assert compiler.symbols == [0, 2]


# What is captured apart.


def test_sizes_of_0_and_1():
    compiler = Compiler()
    for shape in [(3, 4), (6, 4), (1, 4), (0, 4), (5, 4), (1, 4), (0, 4)]:
        check(PROGRAMS["mean"], shape, compiler)
    assert compiler.symbols == [0, 1, 0, 0]


def test_equal_sizes_share_a_symbol_until_they_differ():
    compiler = Compiler()
    other = {}

    def program(x):
        y = other.setdefault(x.shape[0], leaf((x.shape[0] + (x.shape[0] > 6),), seed=2))
        y.grad = None
        return hooked(x.reshape(-1, 1) * y), y

    for n in (3, 5, 6, 7, 8, 4):
        check(program, (n,), compiler)
    assert compiler.symbols == [0, 1, 2]


PLACES = {
    "from the start": lambda x: x[5] * x[0],
    "from the end": lambda x: x[-8] * x[-1],
    "of an inner dimension": lambda x: (x * x)[:, 5],
    "behind an ellipsis": lambda x: (x * x)[None, ..., -7, 0],
    "that are read": lambda x: x.at[5].get() * 3.0,
    "that are multiplied": lambda x: x.at[-6, 5].multiply(2.0),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", PLACES)
def test_places_that_are_not_there_are_those_that_jax_takes(name, dynamic):
    compiler = Compiler()
    compiled = jhop.compile(PLACES[name], dynamic=dynamic) if dynamic else PLACES[name]
    for size in (8, 9, 5, 4, 7, 10):
        found, expected = leaf((size, size)), leaf((size, size))
        (PLACES[name](expected) ** 2).sum().backward()
        with jhop.compiled_autograd.enable(compiler):
            (compiled(found) ** 2).sum().backward()
        np.testing.assert_allclose(found.grad, expected.grad, rtol=1e-5)
    assert compiler.symbols[1] == 1


def asks(x):
    return x * (3.0 if x.shape[0] == 5 else 2.0)


def branches(x):
    return x * (3.0 if x.shape[0] > 4 else 2.0)


def by_size(grad):
    return grad * (10.0 if grad.shape[0] == 6 else 3.0)


@jax.custom_vjp
def by_number(x):
    return jnp.sin(x)


def spectrum(x):
    return jnp.abs(jnp.fft.rfft(x, axis=0))  # JAX's rule for its gradient asks whether the size is odd


def selected(x):
    return x[jnp.nonzero(x[:, 0] > 0, size=x.shape[0], fill_value=-1)[0]] ** 2


def by_bins(grad):
    return grad * jnp.digitize(grad, jnp.array([-0.5, 0.5])).astype(jnp.float32)


def catches(x):
    try:
        return x * (3.0 if x.shape[0] > 4 else 2.0)
    except Exception:
        return x * 7.0


def suppresses(grad):
    with contextlib.suppress(Exception):
        return grad * float(np.ones(grad.shape[0]).sum())


def outgrows(x):
    return x * (1.0 / x.size**6)  # more than 32 bits from 36 on


by_number.defvjp(lambda x: (jnp.sin(x), (x.shape, x)), lambda r, ct: (ct * jnp.ones(r[0]) * float(r[0][0]),))


@pytest.mark.parametrize(
    "program",
    [
        lambda x: hooked(jhop.lift(asks)(x)),
        lambda x: hooked(jhop.lift(branches)(x)),
        lambda x: hooked(x * 2.0, by_size),
        lambda x: hooked(jhop.lift(by_number)(x)),
        lambda x: hooked(hnp.broadcast_to(x.sum(axis=0), x.shape)) * x,
        lambda x: hooked(x.reshape(x.shape[0] * x.shape[1], 1)) * 2.0,
        lambda x: jhop.lift(spectrum)(hooked(x * 2.0)),
        lambda x: jhop.lift(selected)(hooked(x * 2.0)),
        lambda x: hooked(x * 2.0, by_bins),
        lambda x: hooked(jhop.lift(catches)(x), suppresses),
        lambda x: hooked(jhop.lift(outgrows)(x), outgrows),
    ],
    ids=[
        "asks", "branches", "hook", "number", "broadcast", "reshape", "transform", "selected", "bins", "caught",
        "outgrown",
    ],
)  # fmt: skip
def test_code_that_is_steered_by_a_size(program):
    compiler = Compiler()
    for shape in [(3, 4), (8, 4), (5, 4), (6, 4), (5, 7), (6, 8), (2, 2), (1, 1)]:
        check(program, shape, compiler)


def double(leaf):
    leaf.grad = leaf.grad * 2.0


def test_leaves_that_a_hook_is_given_are_told_apart():
    compiler = Compiler()
    for _ in range(3):
        w = leaf((4,))
        w.register_post_accumulate_grad_hook(double)
        for rows in (3, 7, 5, 9):
            w.grad, data = None, leaf((rows, 4)).value
            with jhop.compiled_autograd.enable(compiler):
                (w * data).sum().backward()
            np.testing.assert_allclose(w.grad, 2.0 * data.sum(axis=0), rtol=1e-4, atol=1e-6)
    assert compiler.symbols[:4] == [0, 1, 0, 1]  # the third may have the place in memory of the first


def mapped(x):
    return jax.vmap(lambda row: jhop.hook(row * 2.0, lambda ct: ct * ct.sum() * ct.shape[0]))(x)


def transposed(x):
    def linear(v):
        return jhop.hook(v * 3.0, lambda ct: ct * ct.shape[0])

    return jax.linear_transpose(linear, x)(jnp.sin(x))[0]


@pytest.mark.parametrize("fn", [mapped, transposed])
def test_hooks_in_mapped_and_transposed_functions(fn):
    compiler = Compiler()
    for shape in [*SIZES, (9, 4), (9, 9), (4, 9)]:
        check(lambda x: hooked(jhop.lift(fn)(x) * x), shape, compiler)
    assert set(compiler.symbols) == {0}


# Without a function of the user's.


def test_enable_by_itself(caplog):
    with caplog.at_level(logging.INFO, "jhop.recompiles"):
        check(PROGRAMS["elementwise"], (2, 9))  # so that there is one to compare with
        check(PROGRAMS["elementwise"], (2, 9))
        caplog.clear()
        for shape in SIZES:
            for _ in range(3):
                check(PROGRAMS["mean"], shape)
    said = [record.getMessage() for record in caplog.records if "the backward pass" in record.getMessage()]
    assert len(said) == 2 and "float32[4] and is float32[7]" in said[1]


def test_reset_forgets():
    compiler = Compiler()
    for shape in SIZES[:3]:
        check(PROGRAMS["mean"], shape, compiler)
    jhop.compiled_autograd.reset()
    for shape in SIZES[:3]:
        check(PROGRAMS["mean"], shape, compiler)
    assert compiler.symbols == [0, 2, 0, 2]


def test_text_of_a_capture_with_symbols():
    compiler = Compiler()
    for shape in SIZES[:2]:
        check(lambda x: hooked(x * x, by_size).mean(axis=0), shape, compiler)
    gm = compiler.graphs[1]
    assert '"f32[s' in gm.print_readable(print_output=False)
    namespace = {}
    exec(gm.code, namespace)
    values = [jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32) for shape in ((5,), (9, 5))]
    given = [values[len(aval.shape) - 1] for aval in gm.jaxpr.in_avals]
    for found, expected in zip(namespace[function_name(gm)](*given, **opaque(gm)), gm(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
