"""What a hook does after a library has run for it, or while one calls it back, is seen as at any other time."""

import contextlib
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
from jhop._effects import watch
from jhop._errors import Unsupported

ones = jnp.ones(3)
by = {"name": print}  # a hook that calls this mentions nothing that is banned


def after_an_error(ct):
    with contextlib.suppress(TypeError, ValueError):
        jnp.reshape(ct, (7,))
    by["name"]("after")


def after_an_error_of_an_operator(ct):
    with contextlib.suppress(TypeError, ValueError):
        ct + jnp.ones(7)
    by["name"]("after")


def after_an_operator(ct):
    ct * 2.0 + 3.0
    by["name"]("after")


def after_a_callback(ct):
    jax.tree.map(lambda x: jnp.sin(x), [ct, ct])
    by["name"]("after")


def after_a_generator(ct):
    list(jnp.sin(x) for x in (ct, ct))
    by["name"]("after")


def after_a_generator_that_is_left(ct):
    def values():
        try:
            yield jnp.sin(ct)
            yield ct
        finally:
            jnp.cos(ct)

    for _ in values():
        break
    by["name"]("after")


def after_a_generator_in_which_an_error_is_raised(ct):
    @contextlib.contextmanager
    def block():
        with contextlib.suppress(KeyError):
            yield jnp.sin(ct)

    with block():
        raise KeyError
    by["name"]("after")


def after_recursion(ct, depth=3):
    if depth:
        jax.tree.map(functools.partial(after_recursion, depth=depth - 1), ct)
        jnp.sin(ct)
    else:
        by["name"]("after")


def after_another_trace(ct):
    jax.make_jaxpr(lambda x: jnp.sin(x) * 2.0)(ct)
    by["name"]("after")


def after_a_grad(ct):
    jax.grad(lambda x: jnp.sum(x * x))(ct)
    by["name"]("after")


def after_another_watch(ct):
    jhop.make_fx(lambda x: jhop.trace_wrapped(x, fn=lambda ct: ct * 2.0))(ones)
    with watch(after_an_operator):
        jnp.sin(ct)
    by["name"]("after")


def after_a_read(ct):
    with contextlib.suppress(jax.errors.ConcretizationTypeError):
        float(ct[0])
    by["name"]("after")


def in_a_callback(ct):
    jnp.sin(ct)
    jax.tree.map(print, [ct])


def in_a_callback_of_the_user(ct):
    jax.tree.map(lambda x: by["name"](x), [jnp.sin(ct)])


def in_the_second_callback(ct):
    calls = []
    jax.tree.map(lambda x: calls.append(jnp.sin(x)) or (len(calls) == 2 and by["name"](x)), [ct, ct])


def in_a_loop_of_jax(ct):
    jax.lax.fori_loop(0, 2, lambda i, x: by["name"](i) or jnp.sin(x), ct)


def through_the_standard_library_in_a_callback(ct):
    jax.tree.map(lambda x: functools.reduce(lambda a, b: by["name"](a), [1, 2]), [jnp.sin(ct)])


def in_a_key_function(ct):
    jnp.sin(ct)
    sorted([2, 1], key=lambda x: by["name"](x) or x)


def in_a_method_that_jax_calls(ct):
    @jax.tree_util.register_pytree_node_class
    class Box:
        def tree_flatten(self):
            by["name"]("asked")
            return (ct,), None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls()

    jax.tree.map(jnp.sin, Box())


HOOKS = [fn for name, fn in list(vars().items()) if name.startswith(("after_", "in_", "through_"))]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_it_is_seen(hook, capsys):
    with pytest.raises(Unsupported, match="`print`"), watch(hook):
        jax.make_jaxpr(lambda ct: hook(ct))(ones)
    assert capsys.readouterr().out == ""


def test_operators_in_callbacks_are_recorded_in_order():
    def hook(ct):
        before = ct * 2.0
        jax.tree.map(lambda x: x - 3.0, [before])
        functools.reduce(operator.add, [ct, ct])
        return np.float32(2.0) / -ct

    with watch(hook) as seen:
        jax.make_jaxpr(lambda ct: hook(ct))(ones)
    assert [record.name for record in seen.operators] == ["mul", "sub", "add", "neg", "rtruediv"]


def test_operators_that_jax_applies_itself_are_not_recorded():
    def hook(ct):
        return jnp.linalg.norm(ct) + jnp.var(ct)

    with watch(hook) as seen:
        jax.make_jaxpr(lambda ct: hook(ct))(ones)
    assert [record.name for record in seen.operators] == ["add"]
