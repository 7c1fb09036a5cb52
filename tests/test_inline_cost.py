"""Inlining pays for hooks alone: what it keeps of the rest of a graph, and which of JAX's traces it finds again."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jhop
from jhop import _compat, _walk


def graph_of(fn, *args):
    return jhop.make_fx(fn)(*args)


def halve(ct):
    return ct * 0.5


def three_hooks(hook, inner=lambda x: x * 1.5):
    def fn(ct):
        for _ in range(3):
            ct = inner(jhop.trace_wrapped(ct, fn=hook))
        return ct

    return fn


def test_equations_without_hooks_stay_the_equations_they_are():
    def fn(ct):
        with jax.named_scope("before"):
            ct = jnp.tanh(jnp.sin(ct)) * 2.0
        ct = jhop.trace_wrapped(ct, fn=halve)
        with jax.named_scope("after"):
            return jnp.exp(jnp.cos(ct))

    gm = graph_of(fn, jnp.ones(3))
    inlined = jhop.inline(gm)
    eqns = {eqn.primitive.name: eqn for eqn in gm.jaxpr.eqns}
    kept = {eqn.primitive.name: eqn for eqn in inlined.jaxpr.eqns}
    for name, scope in {"sin": "before", "tanh": "before", "cos": "after", "exp": "after"}.items():
        assert str(kept[name].source_info.name_stack) == scope
        assert kept[name].source_info is eqns[name].source_info
    assert jnp.allclose(inlined(jnp.ones(3)), fn(jnp.ones(3)))


def test_equations_that_read_several_stretches_get_the_right_values():
    def fn(a, b):
        c, d = jnp.sin(a) + 3.0, jnp.cos(b) * 5.0
        c = jhop.trace_wrapped(c, fn=lambda ct: ct * 7.0)
        e = d * c + a
        d = jhop.trace_wrapped(d, fn=lambda ct: ct - 11.0)
        return e * d + c, d, a, 2.0 * b - e

    given = jnp.float32(0.3), jnp.arange(3.0)
    inlined = jhop.inline(graph_of(fn, *given))
    assert not any("stretch" in eqn.primitive.name for eqn in inlined.jaxpr.eqns)
    for x, y in zip(inlined(*given), fn(*given), strict=True):
        assert jnp.allclose(x, y)


def test_effects_keep_their_order():
    seen = []

    def fn(ct):
        ct = jnp.sin(ct) * 2.0
        jax.debug.callback(lambda x: seen.append(("before", float(x))), ct, ordered=True)
        ct = jhop.trace_wrapped(ct * 3.0 + 1.0, fn=halve)
        jax.debug.callback(lambda x: seen.append(("after", float(x))), ct, ordered=True)
        return ct * 5.0 - 1.0

    inlined = jhop.inline(graph_of(fn, jnp.float32(1.0)))
    assert len(inlined.jaxpr.effects) == 1
    out = jax.jit(inlined)(jnp.float32(1.0))
    jax.effects_barrier()
    first = 2.0 * float(jnp.sin(1.0))
    assert [name for name, _ in seen] == ["before", "after"]
    assert [x for _, x in seen] == pytest.approx([first, (3.0 * first + 1.0) / 2])
    assert float(out) == pytest.approx(5.0 * seen[1][1] - 1.0)


def test_hooks_in_a_scan_keep_what_is_around_them():
    def fn(ct):
        def body(c, x):
            with jax.named_scope("within"):
                c = jnp.sin(c) * 1.5
            return jhop.trace_wrapped(c, fn=lambda ct: ct * x) + 1.0, jnp.cos(c) - x

        return jax.lax.scan(body, ct, jnp.arange(1.0, 4.0))

    inlined = jhop.inline(graph_of(fn, jnp.float32(0.2)))
    (scan,) = [eqn for eqn in inlined.jaxpr.eqns if eqn.primitive.name == "scan"]
    body, _ = _compat.open_jaxpr(scan.params["jaxpr"])
    assert "within" in {str(eqn.source_info.name_stack) for eqn in body.eqns if eqn.primitive.name == "sin"}.pop()
    for x, y in zip(jax.tree.leaves(inlined(jnp.float32(0.2))), jax.tree.leaves(fn(jnp.float32(0.2))), strict=True):
        assert jnp.allclose(x, y)


# -- traces that JAX keeps ---------------------------------------------------------------------------------------------


def traces_kept(hook):
    before = _compat._hook_traces
    jhop.inline(graph_of(three_hooks(hook), jnp.ones(2)))
    return _compat._hook_traces is before


class Box:
    def __init__(self):
        self.scale = jnp.float32(2.0)
        self.n = 3
        self.jitted = jax.jit(lambda ct: ct * self.scale)
        self.partial = functools.partial(jnp.multiply, self.scale)

    def user_code(self, ct):
        return self.jitted(ct)

    def body(self, ct):
        return jax.lax.scan(lambda c, _: (c * self.scale, None), ct, None, length=2)[0]

    def by_partial(self, ct):
        return jax.jit(self.partial)(ct)

    def by_number(self, ct):
        return jnp.sum(jnp.stack([ct] * 2), axis=self.n % 2)


class Counter:
    def __init__(self):
        self.n = 3
        self.scale = jnp.float32(2.0)

    def __call__(self, ct):
        self.n += 1
        return jnp.clip(ct, -1.0, 1.0) * self.n * self.scale


def test_traces_of_jax_own_functions_are_kept():
    assert traces_kept(lambda ct: jnp.linalg.norm(ct) * jnp.clip(ct, -1.0, 1.0))
    assert traces_kept(Counter())


@pytest.mark.parametrize("name", ["user_code", "body", "by_partial", "by_number"])
def test_traces_that_may_hold_state_are_forgotten(name):
    assert not traces_kept(getattr(Box(), name))


@pytest.mark.parametrize("name", ["user_code", "body", "by_partial"])
def test_state_in_jitted_code_is_current_in_every_graph(name):
    box, x = Box(), jnp.array([0.25, -0.5])
    hook = getattr(box, name)
    factor = {"body": 4.0}.get(name, 2.0)
    for _ in range(2):  # two graphs; the second finds nothing that closes over symbols of the first
        step = jhop.jit(three_hooks(hook), fullgraph=True)
        assert jnp.allclose(step(x), x * (1.5 * factor) ** 3)
    if name != "by_partial":
        box.scale = box.scale * 3.0
        assert jnp.allclose(step(x), x * (1.5 * factor * 3.0 ** (factor / 2)) ** 3)


def test_limit_of_state_is_per_hook(monkeypatch):
    hooks = [Counter() for _ in range(60)]
    many = {i: [float(i)] for i in range(30)}
    monkeypatch.setattr(_walk, "MAX_CONTAINERS", 20)

    def fn(ct):
        for hook in hooks:
            ct = jhop.trace_wrapped(ct, fn=hook)
        return ct

    assert len(jhop.inline(graph_of(fn, jnp.ones(2))).lifted.writes) == 60
    with pytest.raises(jhop.Unsupported, match="more than 20 objects of one hook's"):
        jhop.inline(graph_of(three_hooks(lambda ct: ct * many[3][0]), jnp.ones(2)))


def test_many_values_of_one_name_are_numbered_without_gaps():
    inlined = jhop.inline(graph_of(three_hooks(halve, lambda x: x * 3.0), jnp.ones(2)))
    names = [node.name for node in inlined.graph.nodes if node.op == "call"]
    assert names == ["result", "mul", "result_1", "mul_1", "result_2", "mul_2"]
