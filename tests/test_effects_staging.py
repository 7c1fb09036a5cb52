"""On Python 3.11, equations that JAX only puts in are put in without the profile function; all else stays seen."""

import contextlib
import functools
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhop import _compat
from jhop._effects import watch
from jhop._errors import Unsupported

profiled = not hasattr(sys, "monitoring")
only_profiled = pytest.mark.skipif(not profiled, reason="Python has sys.monitoring")
ones = jnp.ones(3)
by = {"name": print}  # a hook that calls this mentions nothing that is banned


def traced(hook):
    with watch(hook) as seen:
        jax.make_jaxpr(lambda ct: hook(ct))(ones)
    return [record.name for record in seen.operators]


@pytest.fixture
def profilers(monkeypatch):
    """The profile functions that there are when JAX puts in the equations of jitted functions, one after another."""
    rules, jit = _compat.staging_rules()
    rule, found = rules[jit], []

    def noting(*args, **params):
        found.append(sys.getprofile())
        return rule(*args, **params)

    monkeypatch.setitem(rules, jit, noting)
    return found


@only_profiled
def test_equations_are_put_in_unseen(profilers):
    assert traced(lambda ct: jnp.tanh(ct) * 2.0 + 1.0) == ["mul", "add"]
    assert profilers == [None] * 3


@jax.jit
def not_inlined(x):
    return x * 3.0


@functools.partial(jax.jit, inline=True)
def with_constant(x):
    return x + np.arange(3.0, dtype=np.float32)


@functools.partial(jax.jit, inline=True)
def with_effect(x):
    jax.debug.callback(len, x)
    return x


@only_profiled
@pytest.mark.parametrize("inner", [not_inlined, with_constant, with_effect])
def test_what_is_more_than_put_in_is_seen(inner, profilers):
    traced(inner)
    assert profilers[-1] is not None


@only_profiled
def test_profiler_that_was_there_sees_all(profilers):
    calls = []

    def profile(frame, event, arg):
        if event == "call":
            calls.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        traced(lambda ct: jnp.tanh(ct))
    finally:
        sys.setprofile(None)
    assert None not in profilers
    assert "inline_jaxpr_into_trace" in calls


@only_profiled
def test_profile_function_that_a_hook_sets_stays():
    found = []

    def hook(ct):
        sys.setprofile(None)
        jnp.tanh(ct)
        found.append(sys.getprofile())

    with watch(hook):
        jax.make_jaxpr(lambda ct: hook(ct))(ones)
    assert found == [None]


@jax.custom_jvp
def doubled(x):
    by["name"]("doubled")
    return x * 2.0


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    return doubled(*primals), tangents[0] * 2.0


def speaks(ct):
    by["name"]("speaks")
    return ct * 2.0


def not_staged(ct):
    """An error of JAX's while it stages a call, which the hook catches."""
    with contextlib.suppress(ValueError):
        jax.jit(lambda x: x * 2.0, inline=True, compiler_options={"xla_embed_ir_in_executable": True})(ct)
    by["name"]("after")


@pytest.mark.parametrize(
    "hook",
    [
        jax.jit(speaks, inline=True),
        lambda ct: jax.jit(speaks, inline=True)(ct) + jax.jit(speaks, inline=True)(ct),
        lambda ct: jax.jit(lambda x: doubled(x), inline=True)(ct),
        lambda ct: jax.lax.scan(lambda c, _: (speaks(c * 3.0), None), ct * 2.0, length=2)[0],
        lambda ct: jax.vmap(lambda x: speaks(jnp.tanh(x)))(ct),
        lambda ct: speaks(jnp.tanh(ct) * 2.0),
        not_staged,
    ],
    ids=["jitted", "jitted twice", "custom_jvp", "scan", "vmap", "after", "after an error"],
)
def test_calls_around_it_are_refused(hook, capsys):
    with pytest.raises(Unsupported, match="`print`"):
        traced(hook)
    assert not capsys.readouterr().out


def test_rule_of_jax_is_put_back():
    rules, jit = _compat.staging_rules()
    before, inside, gate = rules[jit], [], threading.Barrier(2)

    def other():
        with watch(speaks):
            gate.wait()  # with no clock, which a watch would refuse
            gate.wait()  # the watch of the first thread has begun and ended
        gate.wait(10)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    gate.wait(10)
    with contextlib.suppress(Unsupported), watch(speaks), watch(speaks):
        inside.append(rules[jit])
        jax.make_jaxpr(speaks)(ones)
    inside.append(rules[jit])
    assert [rule is before for rule in inside] == [not profiled] * 2
    jaxpr = jax.make_jaxpr(lambda x: jnp.tanh(x) * 2.0)(ones)  # in a thread without a watch
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["tanh", "mul"]
    gate.wait(10)
    gate.wait(10)
    thread.join()
    assert rules[jit] is before
    assert sys.getprofile() is None
