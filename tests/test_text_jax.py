"""The JAX text of a graph runs, gives the graph's values, and traces to the graph again."""

import re

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from jhop import _compat
from jhop._graph import GraphModule, Input
from jhop._interp import is_jaxpr
from jhop._text.jax_text import function_name, jax_text, opaque, state_name

x = jnp.arange(12, dtype=jnp.float32).reshape(4, 3) / 7 - 0.5
w = jnp.cos(jnp.arange(12, dtype=jnp.float32)).reshape(3, 4)
row = jnp.array([1.0, -2.0, jnp.inf], dtype=jnp.float32)
table = jnp.linspace(0, 1, 40, dtype=jnp.float32)

# Identities, and rules that are written as what they compute.
_IDENTITIES = {"validate_outputs", "aot_prologue"}
_INLINED = {"custom_jvp_call", "custom_vjp_call"}


def run(gm, *args):
    """Runs the text of a graph in a fresh namespace."""
    namespace = {}
    exec(jax_text(gm), namespace)
    return namespace[function_name(gm)](*args, **opaque(gm))


def steps(jaxpr):
    """Primitives and parameters in order, those of inner jaxprs nested."""
    opened, _ = _compat.open_jaxpr(jaxpr)
    found = []
    for eqn in opened.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in _INLINED:
            found += steps(params["call_jaxpr"])
        elif name == "scalar":
            found.append((params["op"], ()))
        elif name == "accumulate_grad":
            found += [("add", ())] if len(eqn.invars) == 3 else []
        elif name not in _IDENTITIES:
            found.append(
                (name, tuple(sorted((key, plain(value)) for key, value in params.items() if key[:3] != "ft_")))
            )
    return [(name, ()) if name in ("add", "mul") else (name, params) for name, params in found]


def plain(value):
    if isinstance(value, (tuple, list)):
        return str([plain(item) for item in value])
    if is_jaxpr(value):
        return str(steps(value))
    return str(value.item() if isinstance(value, np.generic) else value)


def check(gm, *args):
    """Values and equations of the text are those of the graph."""
    wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(gm(*args))]
    flat = jax.tree.leaves(args)
    for got, value in zip(run(gm, *flat), wanted, strict=True):
        assert np.asarray(got).dtype == value.dtype or isinstance(got, (bool, int, float))
        np.testing.assert_array_equal(np.asarray(got).astype(np.float32), value.astype(np.float32))
    again = jax.make_jaxpr(lambda *flat: run(gm, *flat))(*(v.aval for v in gm.jaxpr.jaxpr.invars))
    assert steps(again) == steps(gm.jaxpr)
    assert "0x" not in jax_text(gm)
    assert jax_text(gm) == jax_text(gm)


def grad_of_relu(x):
    return jax.grad(lambda x: jax.nn.relu(x @ w).sum())(x)


def two_outputs(x):
    q, r = jnp.linalg.qr(x)
    return q @ r


@jax.custom_vjp
def doubled(x):
    return 2.0 * x


doubled.defvjp(lambda x: (2.0 * x, None), lambda _, ct: (2.0 * ct,))


CASES = {
    "elementwise": lambda x: jnp.sin(x) * 2.0 - jnp.exp(-x) / (1.5 + x**2) + abs(x) ** 0.5,
    "matmul": lambda x: (x @ w, x.T @ x, jnp.einsum("ij,kj->ik", x, x), jnp.dot(x[0], w)),
    "precision": lambda x: jnp.matmul(x, w, precision="highest"),
    "reductions": lambda x: (x.sum(0), x.mean(1), x.max(), jnp.argmax(x, 1), jnp.prod(x), jnp.cumsum(x, 0)),
    "scan": lambda x: lax.scan(lambda c, row: (c + row.sum(), row * w[:, 0] * c), 0.0, x, reverse=True),
    "nested scan": lambda x: lax.scan(lambda c, r: lax.scan(lambda d, v: (d + v, d), c, r), 0.0, x),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x)),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, y: y * i, x),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda a: a, lambda a: -a, x),
    "switch": lambda x: lax.switch(jnp.argmax(x[0]), [jnp.sin, jnp.cos, lambda a: a], x),
    "jit": lambda x: jax.jit(lambda a, b: (a + b, a))(x, 2.0),
    "jit options": lambda x: jax.jit(lambda a, b: a * 2.0, keep_unused=True)(x, x),
    "jit twice": lambda x: jnp.where(jnp.where(x > 0, x, 1.0) > 0.5, x, 0.0),
    "where and clip": lambda x: jnp.clip(jnp.where(x > 0, x, -jnp.inf), -1, 2.0),
    "indexing": lambda x: (x[1:, ::2], x[jnp.array([0, 2])], x.at[1].add(1.0), lax.dynamic_slice(x, (1, 0), (2, 2))),
    "shapes": lambda x: (x.reshape(2, 6), jnp.concatenate([x, x]), jnp.stack([x, x]), jnp.pad(x, 1), x[None, ::-1]),
    "sort": lambda x: (jnp.sort(x, 0), jnp.argsort(x, 1), lax.top_k(x, 2)),
    "integers and bools": lambda x: (x > 0, (x * 10).astype(jnp.int32) // 3, ~(x > 0) & (x < 1), jnp.arange(3), 7),
    "bf16": lambda x: (x.astype(jnp.bfloat16) ** 2 + jnp.bfloat16(1)).sum(),
    "literals": lambda x: (x * jnp.nan, x + 1e-30, jnp.minimum(x, -3.5), 2.0**x, (-2.0) - x),
    "complex": lambda x: jnp.abs(jnp.fft.fft(x[0]) * 2j),
    "random": lambda x: x * jax.random.normal(jax.random.key(0), (4, 3)),
    "custom_jvp": jax.nn.relu,
    "custom_vjp": doubled,
    "gradient": grad_of_relu,
    "checkpoint": jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)), policy=jax.checkpoint_policies.everything_saveable),
    "gradient of checkpoint": jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum()),
    "conv": lambda x: lax.conv(x[None, None], jnp.ones((1, 1, 2, 2), jnp.float32), (1, 1), "SAME"),
    "linalg": two_outputs,
    "small constant": lambda x: x + row,
    "large constant": lambda x: x.sum() * table,
    "nothing": lambda x: x,
    "callback": lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_and_traces_again(name):
    check(jhop.make_fx(CASES[name])(x), x)


# What may come in by keyword, as Python source cannot hold it.
_OPAQUE = {
    "checkpoint": {"block_policy"},
    "large constant": {"constant"},
    "callback": {"pure_callback"},
}


@pytest.mark.parametrize("name", CASES)
def test_has_source_for_all_it_can(name):
    gm = jhop.make_fx(CASES[name])(x)
    allowed = _OPAQUE.get(name, set())
    assert set(opaque(gm)) <= allowed


def test_loop_that_jax_changes():
    """A backward scan carries a cotangent that never changes; traced anew, that is a constant of the loop."""
    gm = jhop.make_fx(jax.grad(lambda x: lax.scan(lambda c, row: (c + jnp.sin(row).sum(), None), 0.0, x)[0]))(x)
    np.testing.assert_array_equal(run(gm, x)[0], gm(x))
    assert jax_text(gm).count("= lax.scan(") == 2
    assert jax_text(gm).count("# traced to a loop in which") == 1
    assert not opaque(gm)


def test_text():
    def scale(ct, factor):
        bounded = jnp.clip(ct, -1.0, 1.0)
        return bounded * factor

    text = jax_text(jhop.make_fx(scale)(x, 2.0))
    line = scale.__code__.co_firstlineno
    assert text == (
        "import jax\n"
        "import jax.numpy as jnp\n"
        "from jax import lax\n\n\n"
        "def scale(\n"
        "    ct_1,  # f32[4,3]\n"
        "    factor_1,  # f32[]\n"
        "):\n"
        f"    # test_text_jax.py:{line + 1} in scale: bounded = jnp.clip(ct, -1.0, 1.0)\n"
        "    @jax.jit\n"
        "    def clip(arr, min, max):\n"
        "        convert_element_type = min.astype(jnp.float32)  # f32[]\n"
        "        max_1 = lax.max(convert_element_type, arr)  # f32[4,3]\n"
        "        convert_element_type_1 = max.astype(jnp.float32)  # f32[]\n"
        "        min_1 = lax.min(convert_element_type_1, max_1)  # f32[4,3]\n"
        "        return min_1\n"
        "    bounded = clip(ct_1, -1.0, 1.0)  # f32[4,3]\n"
        f"    # test_text_jax.py:{line + 2} in scale: return bounded * factor\n"
        "    convert_element_type = factor_1.astype(jnp.float32)  # f32[]\n"
        "    mul = bounded * convert_element_type  # f32[4,3]\n"
        "    return (mul,)\n"
    )


# -- hooks and state ---------------------------------------------------------------------------------------------------


class Box:
    def __init__(self):
        self.counter = 0
        self.rate = 0.5
        self.total = jnp.zeros(3, jnp.float32)


def hook_with_state(box):
    def scale(ct):
        box.counter += 2
        box.total = box.total + ct
        scaled = ct * box.counter
        return scaled * box.rate

    return scale


def test_opaque_hook_comes_by_keyword():
    calls = []

    def clip(ct):
        calls.append(1)
        return jnp.clip(ct, -1.0, 1.0)

    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct * 4.0, fn=clip))(x)
    assert opaque(gm) == {"clip": clip}
    assert not calls
    assert f"    clip,  # hook `clip` (test_text_jax.py:{clip.__code__.co_firstlineno})\n" in jax_text(gm)
    check(gm, x)


@pytest.mark.parametrize(
    "transform",
    [jax.grad, lambda f: jax.vmap(jax.grad(f)), lambda f: jax.grad(lambda v: jax.grad(f)(v).sum())],
    ids=["grad", "vmap", "second order"],
)
def test_derived_hooks(transform):
    f = transform(lambda v: jnp.sin(jhop.hook(v, lambda ct: ct**2)).sum())
    value = x if "vmap" in str(jax.make_jaxpr(f)) else x[0]
    check(jhop.make_fx(f)(value), value)


def test_hook_in_scan():
    def f(x):
        def step(total, row):
            return total + jhop.hook(row, lambda ct: ct * 3.0).sum(), None

        return lax.scan(step, 0.0, x)[0]

    gm = jhop.make_fx(jax.grad(f))(x)
    assert len(opaque(gm)) == 1
    np.testing.assert_array_equal(run(gm, x)[0], gm(x))
    assert re.search(r"        trace_wrapped = jhop.trace_wrapped\(\w+, fn=hook\)", jax_text(gm))


def test_lifted_state():
    box = Box()
    gm = jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook_with_state(box)))(x[0]))
    state = gm.lifted.read()
    check(gm, x[0], *state)
    text = jax_text(gm)
    assert re.search(r"    box_counter,  # int: .*\.counter\n", text)
    assert re.search(r"    box_rate,  # float: .*\.rate\n", text)
    assert re.search(r"    box_total,  # f32\[3\]: .*\.total\n", text)
    assert "add = box_counter + 2  # int\n" in text
    assert "    return (\n        result,  # f32[3]\n" in text
    assert re.search(r"        add,  # int: .*\.counter\n", text)
    assert box.counter == 0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_backward_of_a_switch(index):
    """Its index is an input, so it is no `lax.switch`; its branches are functions of their own."""
    branches = [lambda a: jnp.sin(jhop.hook(a, lambda ct: ct * 3.0)), lambda a: a * a, jnp.cos]
    gm = jhop.inline(jhop.backward_graph(lambda x, i: lax.switch(i, branches, x))(x, jnp.int32(0)))
    given = {"ct": x + 1.0, "clamp": jnp.int32(index)}
    args = [given.get(item.name, x * 0.5) for item in gm.inputs]
    np.testing.assert_array_equal(run(gm, *args)[0], gm(*args)[0])
    assert not opaque(gm)


LOOPS = {
    "scan": lambda h: lambda x: lax.scan(lambda c, row: (c * jnp.sin(h(row)), None), x[0], x)[0],
    "nested scan": lambda h: lambda x: lax.scan(
        lambda c, _: (lax.scan(lambda d, row: (d * h(row), None), c, x)[0], None), x[0], None, length=2)[0],
    "remat in a scan": lambda h: lambda x: lax.scan(
        jax.checkpoint(lambda c, row: (jnp.sin(h(c * row)), None)), x[0], x)[0],
    "relu in a scan": lambda h: lambda x: lax.scan(lambda c, row: (c + jax.nn.relu(h(row)), None), x[0], x)[0],
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOPS)
def test_lifted_number_in_a_loop(kind):
    """A Python number stays one in functions that close over it: it has no method `astype`."""
    box = Box()
    fn = LOOPS[kind](lambda a: jhop.hook(a, lambda ct: ct * jnp.asarray(box.rate, ct.dtype)))
    gm = jhop.inline(jhop.make_fx(jax.grad(lambda x: fn(x).sum()))(x))
    assert gm.lifted.read() == [0.5]
    (got,), (wanted,) = run(gm, x, 0.5), gm(x, 0.5)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert not np.allclose(got, gm(x, 0.75)[0])


def test_lifted_number_in_a_function_with_its_own_derivative():
    box, double = Box(), jax.custom_jvp(lambda k: lax.convert_element_type(k, jnp.float32) * 2.0)
    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * 2.0))
    gm = jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda ct: ct * double(box.rate)))(x))
    assert "written as what it calls" in jax_text(gm)
    np.testing.assert_array_equal(run(gm, x, 0.75)[0], x * 1.5)


def test_large_ints_stay_exact():
    box = Box()
    gm = jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=hook_with_state(box)))(x[0]))
    state = [2**40 if type(value) is int else value for value in gm.lifted.read()]
    assert 2**40 + 2 in [value for value in run(gm, x[0], *state) if type(value) is int]


def captured_backward():
    graphs = []
    t = jhop.tensor(x, requires_grad=True)
    t.register_hook(lambda grad: grad * grad)

    def keep(gm):
        graphs.append(gm)
        return gm

    with jhop.compiled_autograd.enable(keep):
        for _ in range(2):  # the second time there is a gradient to add to
            (jhop.numpy.sin(t) * 3.0).sum().backward()
    return graphs, t


def test_captured_backward():
    graphs, t = captured_backward()
    for gm in graphs:
        args = [jnp.full(v.aval.shape, 0.5, v.aval.dtype) for v in gm.jaxpr.jaxpr.invars]
        check(gm, *args)
        check(jhop.inline(gm), *args)
    text = jax_text(graphs[1])
    assert "# GraphRoot (NodeCall 0)\n" in text
    assert "jhop.trace_wrapped(" in text and "kind='tensor_pre_hook'" in text
    assert "accumulate_grad = " in text


def test_symbolic_shapes():
    (n,) = jax.export.symbolic_shape("n")
    closed = jax.make_jaxpr(lambda x: (x * 2.0).reshape(-1) + x.shape[0])(jax.ShapeDtypeStruct((n, 3), jnp.float32))
    gm = GraphModule(jaxpr=closed, inputs=(Input(name="x"),), shapes=(("n", 0, 0),))
    assert "    n = x.shape[0]  # int\n" in jax_text(gm)
    for value in (x, x[:2]):
        np.testing.assert_array_equal(run(gm, value)[0], gm(value)[0])
    again = jax.make_jaxpr(lambda *flat: run(gm, *flat))(closed.jaxpr.invars[0].aval)
    assert [name for name, _ in steps(again)] == [name for name, _ in steps(closed)]
    assert not opaque(gm)


# -- symbolic sizes ----------------------------------------------------------------------------------------------------


def hooked(value):
    return jhop.hook(value, lambda ct: ct * ct * 3.0)


def rows(value):
    return value.shape[0]


def with_lengths(x, y):
    total, scaled = lax.scan(lambda c, row: (c + hooked(row).sum(), row * c), 0.0, x)
    return total + (scaled * y[0]).sum()


SYMBOLIC = {
    "elementwise": lambda x, y: jnp.sin(x).sum() * hooked(y).sum(),
    "broadcast": lambda x, y: (hooked(x)[:, None] * y[None]).sum(),
    "expressions": lambda x, y: (hooked(jnp.vstack([x, y, x])).ravel() * jnp.ones(6 * rows(x) + 3 * rows(y))).sum(),
    "parts": lambda x, y: (hooked(x)[: x.shape[0] // 2] ** 2).sum() + y[x.shape[0] % 2 :].sum(),
    "powers": lambda x, y: (jnp.ones((x.shape[0] ** 2, y.shape[0] + 1)) * hooked(x)[0, 0]).sum() + y.sum(),
    "iota": lambda x, y: (hooked(x) * jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]).sum() + y.sum(),
    "mean": lambda x, y: hooked(x).mean() + y.var(),
    "pad": lambda x, y: jnp.cumsum(jnp.pad(hooked(x), ((0, y.shape[0]), (1, 1)))).sum(),
    "matmul": lambda x, y: (hooked(x) @ y.T).max(0).sum(),
    "jit": lambda x, y: jax.jit(lambda x, y: hooked(jnp.vstack([x, y])).sum())(x, y),
    "scan": with_lengths,
    "vmap": lambda x, y: jax.vmap(lambda row: hooked(row) * jnp.ones(x.shape[0] * 2)[:, None])(y).sum(),
}  # fmt: skip
GRAPHS = {
    "make_fx": lambda f: jhop.make_fx(f),
    "inline": lambda f: lambda *args: jhop.inline(jhop.make_fx(jax.grad(f, argnums=(0, 1)))(*args)),
}


def symbolic(*shapes, constraints=()):
    scope = jax.export.SymbolicScope(constraints)
    return [jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), jnp.float32) for shape in shapes]


def some(*shapes):
    return [jnp.cos(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape) for shape in shapes]


def agrees(gm, f, *args):
    """The text, the graph and the function give the same; only forward hooks come from outside."""
    wanted = jax.tree.leaves(f(*args))
    for values in (run(gm, *args), jax.tree.leaves(gm(*args))):
        for got, value in zip(values, wanted, strict=True):
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes_come_by_name(name, graph):
    f = SYMBOLIC[name]
    gm = GRAPHS[graph](f)(*symbolic("b,3", "c,3", constraints=["b >= 2", "c >= 2"]))
    text = jax_text(gm)
    assert "    b = x_1.shape[0]  # int\n    c = y_1.shape[0]  # int\n" in text
    assert all("hook" in key for key in opaque(gm)), list(opaque(gm))
    for b, c in ((4, 2), (5, 3)):
        agrees(gm, f if graph == "make_fx" else jax.grad(f, argnums=(0, 1)), *some((b, 3), (c, 3)))
    again = jax.make_jaxpr(lambda *flat: run(gm, *flat))(*(v.aval for v in gm.jaxpr.jaxpr.invars))
    assert [str(aval) for aval in again.out_avals] == [str(aval) for aval in gm.jaxpr.out_avals]


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_backward_graph(name):
    f = SYMBOLIC[name]
    gm = jhop.backward_graph(f)(*symbolic("b,3", "c,3", constraints=["b >= 2", "c >= 2"]))
    inlined = jhop.inline(gm)
    assert not opaque(inlined) and all("hook" in key for key in opaque(gm))
    for graph in (gm, inlined):
        avals = [v.aval for v in graph.jaxpr.jaxpr.invars]
        sizes = {"b": 4, "c": 3}
        args = some(*(tuple(_compat.evaluate_dim(dim, sizes) for dim in aval.shape) for aval in avals))
        args = [arg.astype(aval.dtype) for arg, aval in zip(args, avals, strict=True)]
        for got, wanted in zip(run(graph, *args), graph(*args), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_symbolic_backward_graph_runs():
    """The sizes that residuals do not tell come from the argument that has them."""

    def f(b, other):
        return jnp.sin(b).sum() + other.sum()

    gm = jhop.backward_graph(f)(*symbolic("b,3", "c,2"))
    assert [given.name for given in gm.inputs] == ["ct", "cos", "other"]
    (cos, other) = some((4, 3), (5, 2))
    for values in (run(gm, jnp.float32(2), cos, other), gm(jnp.float32(2), cos, other)):
        np.testing.assert_allclose(values[0], 2 * cos)
        np.testing.assert_array_equal(values[1], np.full((5, 2), 2, np.float32))


def test_symbol_like_a_parameter():
    gm = jhop.make_fx(lambda b, sin: (b * jnp.ones(b.shape[0]), jnp.sin(sin)))(*symbolic("b_1", "sin"))
    assert "    b_1 = b_1_1.shape[0]  # int\n    sin = sin_1.shape[0]  # int\n" in jax_text(gm)
    agrees(gm, lambda b, s: (b, jnp.sin(s)), *some((4,), (2,)))


@pytest.mark.parametrize(
    ("shape", "line"),
    [("2*b+1", "(x_1.shape[0] - 1) // 2"), ("3*b", "x_1.shape[0] // 3"), ("b-2", "x_1.shape[0] + 2")],
)
def test_symbol_that_is_no_size_by_itself(shape, line):
    def f(x):
        return jnp.ones(x.shape[0] + 1) * x[0]

    gm = jhop.make_fx(f)(*symbolic(shape, constraints=["b >= 3"]))
    assert f"    b = {line}  # int\n" in jax_text(gm)
    agrees(gm, f, *some((9,)))
    assert not opaque(gm)


def test_largest_and_smallest():
    def f(x, y):
        return jnp.ones(jax.core.max_dim(x.shape[0], y.shape[0])), jnp.ones(jax.core.min_dim(x.shape[0], 3))

    gm = jhop.make_fx(f)(*symbolic("b", "c"))
    assert "jax.core.max_dim(b, c)" in jax_text(gm) or "jax.core.max_dim(c, b)" in jax_text(gm)
    agrees(gm, f, *some((4,), (7,)))
    assert not opaque(gm)


def test_size_that_cannot_be_solved():
    """`b*c` tells neither: the equation is opaque, and the text still runs where its size is not needed."""
    gm = jhop.make_fx(lambda x: x * jnp.ones(x.shape[0]))(*symbolic("b*c"))
    assert list(opaque(gm)) == ["broadcast_in_dim"]


def test_sizes_that_do_not_agree_are_refused():
    gm = jhop.make_fx(lambda x, y: (x * 2.0, y))(*symbolic("b,3", "2*b"))
    assert [value.shape for value in gm(*some((4, 3), (8,)))] == [(4, 3), (8,)]
    with pytest.raises(jhop.JhopError, match=r"axis 0 of input `y_1` as 2\*b = 8, where other inputs say b = 4, got 7"):
        gm(*some((4, 3), (7,)))


@pytest.mark.parametrize("graph", [*GRAPHS, "backward_graph"])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_torch_words_name_sizes(name, graph):
    graphs = {**GRAPHS, "backward_graph": jhop.backward_graph}
    gm = graphs[graph](SYMBOLIC[name])(*symbolic("b,3", "c,3", constraints=["b >= 2", "c >= 2"]))
    text = gm.print_readable(False)
    assert "[b, 3]" in text or "[c, 3]" in text


# -- whatever comes ----------------------------------------------------------------------------------------------------

twice_p = jex_core.Primitive("twice")
twice_p.def_impl(lambda x, *, by: x * by)
twice_p.def_abstract_eval(lambda x, *, by: x)


class Odd:
    """A parameter that cannot be printed, and is equal to nothing."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __repr__(self):
        raise RuntimeError("no repr")


def test_unknown_primitive_is_imported_from_where_it_is():
    gm = jhop.make_fx(lambda x: twice_p.bind(x, by=2) + 1.0)(x)
    assert re.search(r"from \S*test_text_jax import twice_p\n", jax_text(gm))
    assert "twice = twice_p.bind(x_1, by=2)  # f32[4,3]\n" in jax_text(gm)
    check(gm, x)


def local_primitive(multiple):
    odd_p = jex_core.Primitive("odd-one")
    odd_p.multiple_results = multiple
    odd_p.def_impl(lambda x, *, odd: [x + 1, x] if multiple else x + 1)
    odd_p.def_abstract_eval(lambda x, *, odd: [x, x] if multiple else x)
    return odd_p


@pytest.mark.parametrize("multiple", [False, True])
def test_odd_parameters(multiple):
    odd_p = local_primitive(multiple)
    gm = jhop.make_fx(lambda x: odd_p.bind(x, odd=Odd()))(x)
    assert list(opaque(gm)) == ["odd_one"]
    assert "odd_one,  # the equation `odd-one`, which has no public spelling\n" in jax_text(gm)
    for got, wanted in zip(run(gm, x), jax.tree.leaves(gm(x)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_names_that_are_no_identifiers():
    closed = jax.make_jaxpr(lambda a, b, c: a + b + c)(1.0, 2.0, 3.0)
    inputs = tuple(Input(name=name) for name in ("class", "jnp", "a b"))
    gm = GraphModule(jaxpr=closed, inputs=inputs, name="1 <odd> name")
    assert function_name(gm) == "_1_odd_name"
    assert [float(value) for value in run(gm, 1.0, 2.0, 4.0)] == [7.0]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['hooks'][1].keywords['fn'].keywords['obj'].counter", "obj_counter"),
        ("L['hooks'][0].__closure__[0].cell_contents.counter", "counter"),
        ("G['Box'].counter", "box_counter"),
        ("G['config']['steps'][0]", "config_steps_0"),
        ("G['class']", "class_"),
        ("L['hooks'][1].__defaults__[0]", "default_0"),
        ("", "state"),
    ],
)
def test_state_name(path, name):
    assert state_name(path) == name


def test_state_name_of_closure_has_the_class():
    assert state_name("L['hooks'][0].__closure__[0].cell_contents.counter", "Box") == "box_counter"
