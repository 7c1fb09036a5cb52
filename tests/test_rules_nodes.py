"""PyTorch's rules 69 to 80 (docs/RULES.md): order among kinds of hooks, hooks of nodes, the graph."""

import jax
import jax.numpy as jnp
import pytest
from rules import each_mode, leaf, mark, note, scalar, times, values

import jhop
import jhop.numpy as hnp


@pytest.fixture
def seen():
    return []


def before(seen, label, fn=None):
    """A hook before a node, on its one cotangent."""

    def hook(grads):
        seen.append(label)
        return None if fn is None else (fn(grads[0]),)

    return hook


def after(seen, label, fn=None):
    """A hook after a node, on the first of the cotangents that it made."""

    def hook(grad_inputs, grad_outputs):
        seen.append(label)
        return None if fn is None else (fn(grad_inputs[0]), *grad_inputs[1:])

    return hook


@each_mode
def test_rule_069_order_at_a_leaf(mode, seen):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 1.0)(x)
    accumulate = y.grad_fn.next_functions[0][0]

    def last(tensor):
        seen.append("post-accumulate")
        tensor.grad = tensor.grad * 10.0

    accumulate.register_hook(after(seen, "after the node"))
    accumulate.register_prehook(before(seen, "before the node", lambda grad: grad / 5.0))
    x.register_post_accumulate_grad_hook(last)
    x.register_hook(mark(seen, "tensor", lambda grad: grad - 2.0))
    x.grad = jnp.float32(0.5)
    mode.backward(y)
    assert seen == ["tensor", "before the node", "post-accumulate", "after the node"]
    assert float(x.grad) == pytest.approx(((1 - 2) / 5 + 0.5) * 10)


@each_mode
def test_rule_070_order_at_an_intermediate(mode, seen):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.grad_fn.register_hook(after(seen, "after the node", lambda grad: grad - 1.0))
    y.grad_fn.register_prehook(before(seen, "before the node", times(5.0)))
    y.retain_grad()
    y.register_hook(mark(seen, "tensor", lambda grad: grad + 1.0))
    mode.backward(y * 3.0)
    assert seen == ["tensor", "before the node", "after the node"]
    assert (float(y.grad), float(x.grad)) == (4.0, 4.0 * 5.0 * 2.0 - 1.0)


@each_mode
def test_rule_071_hooks_of_a_tensor_run_before_those_of_its_node(mode, seen):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.grad_fn.register_prehook(before(seen, "node 1", times(5.0)))
    y.register_hook(mark(seen, "tensor 1", lambda grad: grad + 1.0))
    y.grad_fn.register_prehook(before(seen, "node 2"))
    y.register_hook(mark(seen, "tensor 2", times(7.0)))
    mode.backward(y * 3.0)
    assert seen == ["tensor 1", "tensor 2", "node 1", "node 2"]
    assert float(x.grad) == (3.0 + 1.0) * 7.0 * 5.0 * 2.0


@each_mode
def test_rule_072_grad_by_a_leaf_runs_its_hooks_and_not_those_of_its_node(mode, seen):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    accumulate = y.grad_fn.next_functions[0][0]
    accumulate.register_prehook(before(seen, "before the node", times(5.0)))
    accumulate.register_hook(after(seen, "after the node"))
    x.register_hook(mark(seen, "tensor", times(7.0)))
    (grad,) = mode.grad(y, x, retain_graph=True)
    assert (float(grad), seen) == (14.0, ["tensor"])
    mode.backward(y)
    assert (float(x.grad), seen[1:]) == (70.0, ["tensor", "before the node", "after the node"])


@each_mode
def test_rule_073_a_prehook_gets_and_may_replace_the_tuple_of_cotangents(mode, seen):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)

    def triple(grads):
        seen.extend(grads)
        return tuple(grad * 3.0 for grad in grads)

    y.grad_fn.register_prehook(triple)
    mode.backward(y)
    assert (float(x.grad), values(seen)) == (6.0, [1.0])


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_073_in_a_jax_function_hook_takes_all_results_at_once(compile):
    def loss(x):
        low, high = jhop.hook((x * 2.0, x * 5.0), lambda cts: (cts[1], cts[0] * 10.0))
        return low * 3.0 + high * 7.0

    assert float(compile(jax.grad(loss))(1.0)) == 2.0 * 7.0 + 5.0 * 30.0


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_073_hook_fn_has_a_hook_before_a_function(compile):
    layer = jhop.hook_fn(lambda x, w: (x * w, x + w), pre=lambda cts: (cts[0] * 3.0, None))
    found = compile(jax.grad(lambda x, w: layer(x, w)[0] * 2.0, argnums=(0, 1)))(5.0, 7.0)
    assert [float(grad) for grad in found] == [42.0, 30.0]


@each_mode
def test_rule_074_a_prehook_returns_a_tuple(mode):
    y = mode.compile(lambda x: x * 2.0)(scalar(1.0))
    y.grad_fn.register_prehook(lambda grads: grads[0] * 3.0)
    with pytest.raises(jhop.HookError, match="must return a tuple of 1 cotangents or None, but returned"):
        mode.backward(y)


@each_mode
@pytest.mark.parametrize("kind", ["before", "after"])
def test_rule_075_of_as_many_as_it_got(mode, kind):
    x, w = scalar(1.0), scalar(2.0)
    y = mode.compile(lambda x, w: x * w)(x, w)
    if kind == "before":
        y.grad_fn.register_prehook(lambda grads: grads * 3)
    else:
        y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: grad_inputs[:1])
    found = "a tuple of 1 cotangents.* of 3" if kind == "before" else "a tuple of 2 cotangents.* of 1"
    with pytest.raises(jhop.HookError, match=found):
        mode.backward(y)


@each_mode
def test_rule_076_a_hook_after_a_node_sees_both_sides(mode, seen):
    """Constants have no place in the first tuple; PyTorch shows None there."""
    x, w = scalar(3.0), scalar(5.0)

    def look(grad_inputs, grad_outputs):
        seen.extend([*grad_inputs, *grad_outputs])
        return (grad_inputs[0] + grad_outputs[0], None)

    y = mode.compile(lambda x, w: x * w)(x, w)
    y.grad_fn.register_hook(look)
    mode.backward(y)
    assert values(seen) == [5.0, 3.0, 1.0]
    assert (float(x.grad), float(w.grad)) == (6.0, 3.0)


@each_mode
def test_rule_076_a_constant_has_no_place(mode, seen):
    x = scalar(3.0)
    y = mode.compile(lambda x: x * jnp.float32(2.0))(x)
    y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.extend(grad_inputs))
    mode.backward(y)
    assert values(seen) == [2.0]


@each_mode
@pytest.mark.parametrize("kind", ["before", "after"])
def test_rule_077_no_hook_makes_a_cotangent_of_none(mode, kind):
    x, w = leaf(1.0), leaf(2.0)
    if kind == "before":  # nothing comes to the node from the first of its results
        first, y = mode.compile(lambda x, w: hnp.split(hnp.concatenate([x, w]), 2))(x, w)
        first.grad_fn.register_prehook(lambda grads: (jnp.ones(1), grads[1]))
        inputs = None
    else:  # and nobody wants that of its second input
        y = mode.compile(lambda x, w: x * w)(x, w)
        y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: (grad_inputs[0], jnp.ones(1)))
        inputs = [x]
    with pytest.raises(jhop.HookError, match="returned a cotangent where it was given None: nothing flows there"):
        mode.backward(y.sum(), inputs=inputs)
    assert x.grad is w.grad is None


def dense(x, w):
    return jnp.tanh(x @ w)


@each_mode
def test_rule_078_hooks_around_a_module_are_hooks_of_the_node_of_its_lifted_call(mode, seen):
    x, w = jhop.tensor([[1.0, 2.0]]), jhop.tensor([[0.0], [0.0]], requires_grad=True)
    y = mode.compile(jhop.lift(dense))(x, w)
    y.grad_fn.register_prehook(before(seen, "before", times(5.0)))
    y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: seen.append(("after", len(grad_inputs))))
    mode.backward(y.sum())
    assert seen == ["before", ("after", 1)]  # one: the input needs no gradient
    assert w.grad.tolist() == [[5.0], [10.0]]


@pytest.mark.parametrize("compile", [jax.jit, jhop.jit], ids=["jax.jit", "jhop.jit"])
def test_rule_078_hook_fn_has_hooks_around_a_function_or_module(compile):
    def post(ins, out):
        assert ins[1:] == (None, None)  # nobody differentiates by these
        return ins[0] + out, None, None

    layer = jhop.hook_fn(lambda x, w, n: x * w * n, pre=lambda ct: ct * 10.0, post=post)
    assert float(compile(jax.grad(lambda x, w: layer(x, w, 2.0) * 3.0))(5.0, 7.0)) == 30.0 * 14.0 + 30.0


@each_mode
def test_rule_079_the_graph_can_be_walked_and_annotated(mode):
    x = scalar(1.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    z = y + 1.0
    (node, slot), *_ = z.grad_fn.next_functions
    assert (z.grad_fn.name(), node, slot) == ("AddBackward", y.grad_fn, 0)
    assert node.name() == ("CompiledFunctionBackward" if mode.name == "compiled" else "MultiplyBackward")
    assert [(n.name(), slot) for n, slot in node.next_functions] == [("AccumulateGrad", 0)]
    node.metadata["note"] = 7
    assert y.grad_fn.metadata == {"note": 7}
    mode.backward(z)
    assert y.grad_fn.metadata == {"note": 7}
    assert x.grad_fn is None


@each_mode
def test_rule_080_a_past_version_is_a_tensor_of_its_own_to_differentiate_by(mode):
    x = scalar(3.0)
    old = mode.compile(lambda x: x * 1.0)(x)
    y = old
    y *= 5.0
    out = mode.compile(lambda y: y * y)(y)
    assert [float(grad) for grad in mode.grad(out, [old, y])] == [150.0, 30.0]


@each_mode
def test_rule_080_a_backward_can_be_split_at_a_value(mode, seen):
    x = scalar(3.0)
    y = mode.compile(lambda x: x * 2.0)(x)
    y.register_hook(note(seen, times(7.0)))
    z = mode.compile(lambda y: y * 5.0)(y)
    (ct,) = mode.grad(z, y)
    assert (float(ct), x.grad) == (35.0, None)
    (grad,) = mode.grad(y, x, ct / 7.0)
    assert (float(grad), values(seen)) == (70.0, [5.0, 5.0])


@each_mode
def test_rule_080_an_edge_stands_for_a_past_version(mode):
    x = scalar(2.0)
    y = mode.compile(lambda x: x * 3.0)(x)
    old = jhop.edge(y)
    y *= 2.0
    new = jhop.autograd.get_gradient_edge(y)
    assert [float(g) for g in mode.grad(y * 5.0, [old, new])] == [10.0, 5.0]


@each_mode
def test_rule_080_an_edge_splits_a_backward(mode, seen):
    x = scalar(2.0)
    y = mode.compile(lambda x: x * 3.0)(x)
    y.register_hook(note(seen, times(7.0)))
    edge = jhop.edge(y)
    (found,) = mode.grad(y * y, edge)
    with mode.captured():
        jhop.autograd.backward(edge, found)
    assert (float(x.grad), values(seen)) == (12.0 * 7.0 * 7.0 * 3.0, [12.0, 84.0])
