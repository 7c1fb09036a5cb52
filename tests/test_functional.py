"""`jhop.hook` and `jhop.trace_wrapped` under JAX's transformations, against `jax.custom_vjp` written by hand."""

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


RULES = {
    "square": square,
    "clip": lambda ct: jnp.clip(ct, -1.0, 4.0),
    "affine": lambda ct: 2.0 * ct + 1.0,
    "reversal": lambda ct: ct[::-1],
    "normalise": lambda ct: ct / jnp.sqrt((ct * ct).sum()),
}

REVERSE = {
    "grad": lambda f: jax.grad(f)(X),
    "value_and_grad": lambda f: jax.value_and_grad(f)(X),
    "vjp": lambda f: jax.vjp(f, X)[1](jnp.float32(-2.0)),
    "jacrev": lambda f: jax.jacrev(f)(X),
    "jit of grad": lambda f: jax.jit(jax.grad(f))(X),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X),
    "jit of grad of jit of checkpoint": lambda f: jax.jit(jax.grad(jax.jit(jax.checkpoint(f))))(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(np.stack([X, 2.0 * X])),
    "linear_transpose of linearize": lambda f: jax.linear_transpose(jax.linearize(f, X)[1], X)(jnp.float32(1.0)),
}


@pytest.mark.parametrize(
    ("how", "rule"),
    [(how, "square") for how in REVERSE] + [("jit of grad", rule) for rule in RULES if rule != "square"],
)
def test_reverse_mode(how, rule):
    agree(REVERSE[how](loss(point(RULES[rule]))), REVERSE[how](loss(by_hand(RULES[rule]))))


def test_hook_is_an_identity_forward():
    x = jnp.array(X)
    assert jhop.hook(x, square) is x


@pytest.mark.parametrize("how", [jax.jit, jax.vmap, jax.checkpoint], ids=lambda how: how.__name__)
def test_hook_is_an_identity_forward_under(how):
    assert how(point(square))(X).tolist() == X.tolist()


def test_grad_of_several_arguments():
    def of(x, y):
        return (jhop.hook(x, square) * jhop.hook(y, jnp.negative)).sum()

    assert [g.tolist() for g in jax.grad(of, (0, 1))(X, X + 1.0)] == [((X + 1.0) ** 2).tolist(), (-X).tolist()]


def test_only_later_uses_of_the_result_are_hooked():
    def of(x):
        y = jhop.hook(x, square)
        return (2.0 * y + 5.0 * x).sum()

    assert jax.grad(of)(X).tolist() == [9.0] * 3


def test_nested_hooks_run_last_registered_first():
    def of(x):
        x = jhop.hook(x, lambda ct: ct + 1.0)
        x = jhop.hook(x, lambda ct: ct * 10.0)
        return (2.0 * x).sum()

    assert jax.grad(of)(X).tolist() == [21.0] * 3


def test_hook_that_returns_none_keeps_the_cotangent():
    assert jax.grad(lambda x: (2.0 * jhop.hook(x, lambda ct: None)).sum())(X).tolist() == [2.0] * 3


def test_hook_runs_with_values_under_grad_alone():
    seen = []
    jax.grad(lambda x: (2.0 * jhop.hook(x, lambda ct: seen.append(ct.tolist()))).sum())(X)
    assert seen == [[2.0] * 3]


def test_hook_on_an_unused_value_does_not_run():
    seen = []
    jax.grad(lambda x: (jhop.hook(x, seen.append), (2.0 * x).sum())[1])(X)
    assert seen == []


def test_hook_on_a_value_under_stop_gradient_does_not_run():
    seen = []
    jax.grad(lambda x: (lax.stop_gradient(jhop.hook(x, seen.append)) * x).sum())(X)
    assert seen == []


def test_hook_runs_at_each_call_of_a_pullback():
    seen = []
    _, pull = jax.vjp(lambda x: 2.0 * jhop.hook(x, lambda ct: seen.append(ct.tolist())), jnp.array(X))
    for seed in (1.0, 3.0):
        pull(jnp.full(3, seed))
    assert seen == [[2.0] * 3, [6.0] * 3]


CLOSING = {
    "grad": lambda of: jax.grad(of)(X),
    "jit of grad": lambda of: jax.jit(jax.grad(of))(X),
    "grad of jit": lambda of: jax.grad(jax.jit(of))(X),
    "vmap of grad": lambda of: jax.vmap(jax.grad(of))(X[None])[0],
    "grad of vmap": lambda of: jax.grad(lambda x: jax.vmap(of)(x[None])[0])(X),
}


@pytest.mark.parametrize("how", CLOSING)
def test_hook_closes_over_a_value_of_the_forward(how):
    def of(x):
        y = x * 2.0
        return (3.0 * jhop.hook(y, lambda ct: ct * y)).sum()

    agree(CLOSING[how](of), 2 * 3.0 * 2.0 * X)


@pytest.mark.parametrize("how", CLOSING)
def test_hook_closes_over_an_argument(how):
    agree(CLOSING[how](lambda x: (3.0 * jhop.hook(jnp.sin(x), lambda ct: ct * x)).sum()), 3.0 * X * np.cos(X))


# Forward mode: as if there were no hook.

FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "jvp of jvp": lambda f: jax.jvp(lambda x: jax.jvp(f, (x,), (X,))[1], (X,), (X,)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "vmap of jvp": lambda f: jax.vmap(lambda x: jax.jvp(f, (x,), (x,)))(np.stack([X, -X])),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f))(X),
}


@pytest.mark.parametrize("how", FORWARD)
def test_forward_mode_passes_the_hook_by(how):
    agree(FORWARD[how](loss(point(square))), FORWARD[how](loss(lambda x: x)))


@pytest.mark.parametrize("how", FORWARD)
def test_forward_mode_does_not_run_the_hook(how):
    def hook(ct):
        raise AssertionError("ran")

    FORWARD[how](loss(point(hook)))


# Higher orders: the hook is part of what is differentiated.

HIGHER = {
    "hessian": lambda f: jax.hessian(f)(X),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f))(X),
    "grad of grad": lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())(X),
    "third": lambda f: jax.grad(lambda x: jax.grad(lambda x: jax.grad(f)(x).sum())(x).sum())(X),
    "hessian-vector product": lambda f: jax.jvp(jax.grad(f), (X,), (X[::-1],)),
    "vmap of hessian": lambda f: jax.vmap(jax.hessian(f))(np.stack([X, -X])),
    "jit of jacfwd of grad": lambda f: jax.jit(jax.jacfwd(jax.grad(f)))(X),
    "grad of jit of grad": lambda f: jax.grad(lambda x: jax.jit(jax.grad(f))(x).sum())(X),
    "grad of vmap of grad": lambda f: jax.grad(lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])).sum())(X),
}


@pytest.mark.parametrize(
    ("how", "rule"), [(how, "square") for how in HIGHER] + [("hessian", "clip"), ("hessian", "normalise")]
)
def test_higher_orders(how, rule):
    agree(HIGHER[how](loss(point(RULES[rule]))), HIGHER[how](loss(by_hand(RULES[rule]))), rtol=1e-5)


def test_third_derivative_in_closed_form():
    # d/dx of hook(x ** 3) is (3 x^2)^2 = 9 x^4 under a hook that squares, at the value's own cotangent 3 x^2.
    def cube(x):
        return jhop.hook(x, square) ** 3

    assert float(jax.grad(jax.grad(jax.grad(cube)))(2.0)) == 9 * 4 * 3 * 4.0


# vmap.


def test_hook_under_vmap_sees_one_example():
    shapes = []

    def hook(ct):
        shapes.append(ct.shape)
        return ct / jnp.abs(ct).max()

    batch = np.stack([X, 2.0 * X])
    got = jax.vmap(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()))(batch)
    agree(got, np.stack([X / 3.0, X / 3.0]))
    assert set(shapes) == {(3,)}


def test_grad_of_vmap_hooks_each_example():
    batch = np.stack([X, 2.0 * X])
    identity = lambda f: jax.grad(lambda xs: jax.vmap(loss(f))(xs).sum())(batch)  # noqa: E731
    agree(identity(point(RULES["normalise"])), identity(by_hand(RULES["normalise"])))


def test_hook_outside_vmap_sees_the_batch():
    batch = np.stack([X, 2.0 * X])
    got = jax.grad(lambda xs: jax.vmap(lambda x: 2.0 * x)(jhop.hook(xs, lambda ct: ct / ct.sum())).sum())(batch)
    agree(got, np.full((2, 3), 1.0 / 6.0))


def test_unmapped_argument_gets_the_sum_over_examples():
    seen = []
    w = jnp.float32(2.0)

    def of(w):
        w = jhop.hook(w, lambda ct: seen.append(float(ct)))
        return jax.vmap(lambda x: w * x)(X).sum()

    jax.grad(of)(w)
    assert seen == [1.5]


def test_collective_in_a_hook_under_vmap():
    def hook(ct):
        return lax.pmean(ct, "i")

    got = jax.vmap(jax.grad(lambda x, w: jhop.hook(x, hook) * w), axis_name="i")(X, X)
    agree(got, np.full(3, 0.5))


@pytest.mark.parametrize("out_axis", [0, 1])
def test_vmap_over_other_axes(out_axis, in_axis=1):
    batch = np.arange(6, dtype=np.float32).reshape(2, 3)
    grads = [
        jax.vmap(jax.grad(loss(f)), in_axes=in_axis, out_axes=out_axis)(batch) for f in (point(square), by_hand(square))
    ]
    agree(*grads)


# Pytrees, dtypes.


def test_pytree_is_hooked_as_a_whole():
    def hook(ct):
        norm = jnp.sqrt((ct["a"] ** 2).sum() + (ct["b"][0] ** 2).sum())
        return jax.tree.map(lambda part: part / norm, ct)

    def of(tree):
        tree = jhop.hook(tree, hook)
        return 3.0 * tree["a"].sum() + 4.0 * tree["b"][0].sum()

    got = jax.grad(of)({"a": jnp.ones(1), "b": [jnp.ones(1)]})
    agree(got, {"a": [0.6], "b": [[0.8]]})


def test_pytree_with_integer_leaves_keeps_them():
    tree = {"n": jnp.array([3]), "x": jnp.array(X)}
    out = jax.jit(lambda tree: jhop.hook(tree, lambda ct: None))(tree)
    assert (out["n"].dtype, out["n"].tolist()) == (jnp.int32, [3])


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_pytree_with_integer_leaves_hooks_the_floating_ones(jit):
    def hook(ct):
        return {"n": ct["n"], "x": ct["x"] * 10.0}

    def of(x):
        tree = jhop.hook({"n": jnp.array([3]), "x": x}, hook)
        return (tree["x"] * tree["n"].astype(x.dtype)).sum()

    grad = jax.jit(jax.grad(of)) if jit else jax.grad(of)
    assert grad(X).tolist() == [30.0] * 3


def test_hook_sees_float0_for_integer_leaves():
    seen = []

    def of(x):
        tree = jhop.hook({"n": jnp.array([3]), "x": x}, lambda ct: seen.append(ct["n"].dtype))
        return tree["x"].sum()

    jax.grad(of)(X)
    assert seen == [jax.dtypes.float0]


def test_leaf_that_nothing_uses_gets_zeros():
    seen = []

    def of(pair):
        a, _ = jhop.hook(pair, lambda ct: seen.append(ct[1].tolist()))
        return a.sum()

    jax.grad(of)((jnp.ones(1), jnp.ones(2)))
    assert seen == [[0.0, 0.0]]


def test_hook_may_return_none_for_a_leaf():
    def of(pair):
        a, b = jhop.hook(pair, lambda ct: (None, ct[1] * 10.0))
        return a.sum() + b.sum()

    assert [g.tolist() for g in jax.grad(of)((jnp.ones(1), jnp.ones(1)))] == [[1.0], [10.0]]


@pytest.mark.parametrize(
    "wrong", [lambda ct: (ct[0],), lambda ct: [ct[0], ct[1]], lambda ct: {"a": ct[0]}, lambda ct: 1.0]
)
def test_hook_that_returns_another_structure(wrong):
    with pytest.raises(jhop.HookError, match="must return a pytree like its cotangent"):
        jax.grad(lambda pair: sum(v.sum() for v in jhop.hook(pair, wrong)))((jnp.ones(1), jnp.ones(1)))


def test_complex_cotangent_is_jaxs():
    z = np.array([1.0 + 2.0j, -0.5j], np.complex64)

    def of(identity):
        return jax.grad(lambda z: jnp.abs(identity(z) * z).sum())(z)

    rule = lambda ct: ct * (0.0 + 2.0j)  # noqa: E731
    agree(of(point(rule)), of(by_hand(rule)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_half_precision(dtype, jit):
    grad = jax.grad(lambda x: (jhop.hook(x, square) * 3.0).sum())
    got = (jax.jit(grad) if jit else grad)(jnp.array(X, dtype))
    assert (got.dtype, got.tolist()) == (dtype, [9.0] * 3)


def test_double_precision():
    with jax.enable_x64(True):
        got = jax.grad(lambda x: (jhop.hook(x, lambda ct: ct / 3.0) * x).sum())(np.array([1.0]))
        assert (got.dtype, got.tolist()) == (jnp.float64, [1.0 / 3.0 + 1.0])


def test_python_scalar_is_hooked():
    assert float(jax.grad(lambda x: 3.0 * jhop.hook(x, square))(2.0)) == 9.0


def test_hook_may_be_a_jitted_function():
    assert jax.grad(lambda x: (3.0 * jhop.hook(x, jax.jit(square))).sum())(X).tolist() == [9.0] * 3


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
}


def writing(kind):
    """(object, the gradient of a function whose hook writes to it)."""
    box = types.SimpleNamespace(n=0, items=[], table={"n": 1}, total=jnp.zeros(3))

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
