"""`jhop.trace_wrapped`, `jhop.make_fx`, control flow, and the Python state of hooks under plain JAX."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)


def square(ct):
    return ct * ct


def by_hand(rule):
    """An identity whose cotangent goes through `rule`: what a user of plain JAX would write."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, ct: (rule(ct),))
    return identity


def point(fn):
    return lambda x: jhop.hook(x, fn)


def loss(identity):
    """A loss in which the hooked value is used twice, so that the hook sees a sum."""

    def of(x):
        y = identity(jnp.sin(x))
        return (y * y).sum() + (3.0 * y).sum()

    return of


def agree(got, expected, rtol=2e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), got, expected)




# trace_wrapped.


def test_trace_wrapped_keeps_structure():
    out = jhop.trace_wrapped({"a": jnp.ones(2)}, fn=lambda ct: {"a": ct["a"] * 3.0})
    assert out["a"].tolist() == [3.0, 3.0]


def test_trace_wrapped_hands_on_arguments():
    out = jhop.trace_wrapped(jnp.ones(2), jnp.float32(3.0), fn=lambda ct, k, *, p: ct * k**p, p=2)
    assert out.tolist() == [9.0, 9.0]


def test_trace_wrapped_hands_on_arguments_under_jit():
    out = jax.jit(lambda ct, k: jhop.trace_wrapped(ct, k, fn=lambda ct, k, *, p: ct * k**p, p=2))(jnp.ones(2), 3.0)
    assert out.tolist() == [9.0, 9.0]


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_trace_wrapped_hands_on_pytrees_and_tracers(jit):
    def of(ct, box, k):
        return jhop.trace_wrapped(ct, box, 2.0, fn=lambda ct, box, n, *, k: ct * box["a"][0] * n * k, k=k)

    assert (jax.jit(of) if jit else of)(jnp.ones(2), {"a": [jnp.float32(3.0)]}, 5.0).tolist() == [30.0, 30.0]


def test_trace_wrapped_is_one_equation():
    jaxpr = jax.make_jaxpr(lambda ct: jhop.trace_wrapped(ct, fn=square) * 2.0)(X)
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["trace_wrapped", "mul"]


def test_trace_wrapped_is_differentiated_through():
    f = lambda x: jhop.trace_wrapped(x, fn=lambda v: v**3).sum()  # noqa: E731
    agree([jax.grad(f)(X), jax.jit(jax.grad(f))(X), jax.jacfwd(f)(X)], [3 * X**2] * 3)


def test_trace_wrapped_under_vmap_of_jit():
    f = jax.jit(lambda x: jhop.trace_wrapped(x, fn=lambda v: v / v.sum()))
    agree(jax.vmap(f)(np.array([[1.0, 3.0], [2.0, 2.0]], np.float32)), [[0.25, 0.75], [0.5, 0.5]])


# make_fx.


def test_make_fx_does_not_run_the_hook():
    calls = []
    jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=calls.append))(jnp.ones(2))
    assert calls == []


def test_make_fx_of_a_gradient_does_not_run_the_hook():
    calls = []
    jhop.make_fx(jax.grad(lambda x: (jhop.hook(x, calls.append) ** 2).sum()))(jnp.ones(2))
    assert calls == []


def test_captured_graph_runs_the_hook_at_each_call():
    calls = []
    gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda ct: calls.append(ct.tolist())))(jnp.ones(2))
    gm(jnp.array([1.0, 2.0]))
    gm(jnp.array([3.0, 4.0]))
    assert calls == [[1.0, 2.0], [3.0, 4.0]]


def test_captured_graph_of_pytrees():
    gm = jhop.make_fx(lambda tree, *, k: {"out": (tree["a"] * k, tree["b"][0])})(
        {"a": jnp.ones(2), "b": [jnp.ones(1)]}, k=2.0
    )
    out = gm({"a": jnp.full(2, 3.0), "b": [jnp.zeros(1)]}, k=5.0)
    assert (out["out"][0].tolist(), out["out"][1].tolist()) == ([15.0, 15.0], [0.0])


def _multiply(x):
    return x * x


def _multiply_invoke(grad):
    return jhop.trace_wrapped(grad, fn=_multiply)


def test_captured_graph_prints_pytorchs_words():
    assert (
        jhop.testing.normalize_gm(jhop.make_fx(_multiply_invoke)(jnp.ones(2)).print_readable(False))
        == """\
class _multiply_invoke(torch.nn.Module):
    def forward(self, grad_1: "f32[2]"):
        trace_wrapped: "f32[2]" = torch__dynamo__trace_wrapped_higher_order_op_self_invoke(grad_1);  grad_1 = None
        return trace_wrapped
"""
    )


def test_captured_gradient_runs():
    grad = jax.grad(loss(point(square)))
    agree(jhop.make_fx(grad)(X)(2.0 * X), grad(2.0 * X))


def test_inlined_graph_has_no_opaque_call():
    gm = jhop.inline(jhop.make_fx(jax.grad(loss(point(square))))(X))
    assert "trace_wrapped" not in str(gm.jaxpr)


def test_inlined_graph_runs():
    grad = jax.grad(loss(point(square)))
    (out,) = jax.tree.leaves(jhop.inline(jhop.make_fx(grad)(X))(2.0 * X))
    agree(out, grad(2.0 * X))


def test_inlining_changes_no_object():
    box = types.SimpleNamespace(n=3)

    def count(ct):
        box.n += 1
        return ct * 2.0

    jhop.inline(jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=count))(jnp.ones(2)))
    assert box.n == 3


# State under plain JAX.


def counting(box):
    def count(ct):
        box.n = box.n + 1
        return ct * 2.0

    return jax.grad(lambda x: (jhop.hook(x, count) ** 2).sum())


def test_state_counts_under_grad_alone():
    box = types.SimpleNamespace(n=0)
    for _ in range(3):
        counting(box)(X)
    assert box.n == 3


def test_state_read_under_plain_jit_is_fine():
    box = types.SimpleNamespace(k=3.0)
    got = jax.jit(jax.grad(lambda x: jhop.hook(x, lambda ct: ct * box.k).sum()))(X)
    assert got.tolist() == [3.0] * 3


WRITES = {
    "attribute": lambda box, ct: setattr(box, "n", box.n + 1),
    "list": lambda box, ct: box.items.append(ct),
    "list of numbers": lambda box, ct: box.items.append(1),
    "dict": lambda box, ct: box.table.update(last=ct),
    "array": lambda box, ct: setattr(box, "total", box.total + ct),
    "array in place": lambda box, ct: box.buffer.__setitem__(0, 1.0),
    "array by another name": lambda box, ct: box.buffers[0].fill(2.0),
}


def writing(kind):
    """(object, the gradient of a function whose hook writes to it)."""
    box = types.SimpleNamespace(n=0, items=[], table={"n": 1}, total=jnp.zeros(3))
    box.buffer = np.zeros(3)
    box.buffers = [box.buffer]

    def write(ct):
        WRITES[kind](box, ct)
        return ct * 2.0

    return box, jax.grad(lambda x: (jhop.hook(x, write) ** 2).sum())


PLAIN = {
    "jit": lambda grad: jax.jit(grad)(X),
    "jit of vmap": lambda grad: jax.jit(jax.vmap(grad))(np.stack([X, X])),
    "jit of hessian": lambda grad: jax.jit(jax.jacrev(grad))(X),
    "jit of scan": lambda grad: jax.jit(lambda x: lax.scan(lambda c, _: (grad(c), None), x, None, length=2)[0])(X),
}


@pytest.mark.parametrize("kind", WRITES)
def test_state_written_under_plain_jit_is_refused(kind):
    _, grad = writing(kind)
    with pytest.raises(jhop.Unsupported, match=r"`write`.*writes Python state.*jhop\.jit"):
        jax.jit(grad)(X)


@pytest.mark.parametrize("kind", WRITES)
def test_state_written_under_plain_jit_is_not_written(kind):
    box, grad = writing(kind)
    total = box.total
    with pytest.raises(jhop.Unsupported):
        jax.jit(grad)(X)
    assert (box.n, box.items, box.table, box.total is total) == (0, [], {"n": 1}, True)
    assert box.buffers[0] is box.buffer and not box.buffer.any()


@pytest.mark.parametrize("how", PLAIN)
def test_state_written_deeper_under_plain_jit_is_refused(how):
    box, grad = writing("attribute")
    with pytest.raises(jhop.Unsupported, match=r"jhop\.jit"):
        PLAIN[how](grad)
    assert box.n == 0


def test_refusal_under_plain_jit_is_repeated():
    box = types.SimpleNamespace(n=0)
    grad = jax.jit(counting(box))
    for _ in range(2):
        with pytest.raises(jhop.Unsupported, match=r"jhop\.jit"):
            grad(X)
    assert box.n == 0


def test_state_written_under_jit_without_a_gradient_is_refused():
    box = types.SimpleNamespace(n=0)

    def count(ct):
        box.n += 1

    with pytest.raises(jhop.Unsupported, match=r"jhop\.jit"):
        jax.jit(lambda ct: jhop.trace_wrapped(ct, fn=count))(X)
    assert box.n == 0


def loud(ct):
    print("heard")
    return ct * 2.0


@pytest.mark.parametrize("how", PLAIN)
def test_print_under_plain_jit_is_refused(how, capsys):
    grad = jax.grad(lambda x: (jhop.hook(x, loud) ** 2).sum())
    with pytest.raises(jhop.Unsupported, match="print.*`loud`"):
        PLAIN[how](grad)
    assert capsys.readouterr().out == ""


def test_print_under_grad_alone_prints(capsys):
    jax.grad(lambda x: (jhop.hook(x, loud) ** 2).sum())(X)
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.parametrize(
    "hook", [lambda ct: ct * float(ct[0]), lambda ct: ct if ct[0] > 0 else -ct], ids=["reads", "branches"]
)
def test_reading_values_under_plain_jit_is_an_error(hook):
    with pytest.raises((jhop.Unsupported, jax.errors.ConcretizationTypeError)):
        jax.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))(X)
