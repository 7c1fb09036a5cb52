"""A traced hook may not read values of arrays, and it does not help it to catch the error."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)
log = types.SimpleNamespace(text="")


def gradient(hook, jit, **options):
    return jit(jax.grad(lambda x: (jhop.hook(x * 1.5, hook) ** 2).sum()), **options)(X)


def float_and_except(ct):
    try:
        return ct * float(ct[1])
    except Exception:
        return ct


def branch_and_suppress(ct):
    with contextlib.suppress(Exception):
        if ct[1] > 0:
            return ct
    return ct * 3


def within_jax(ct):
    try:
        return ct * jnp.arange(jnp.argmax(ct), dtype=ct.dtype).sum()
    except TypeError:
        return ct


def numpy_and_continue(ct):
    for scale in (2.0, 3.0):
        try:
            return jnp.asarray(np.asarray(ct) * np.float32(scale))
        except jax.errors.JAXTypeError:
            continue
    return ct


def in_a_loop_of_jax(ct):
    def body(carry, x):
        try:
            return carry, x if x > 0 else -x
        except Exception:
            return carry, x

    return jax.lax.scan(body, 0.0, ct)[1]


def text(ct):
    log.text = f"{ct}"
    return ct


def text_that_is_caught(ct):
    with contextlib.suppress(Exception):
        log.text = repr(ct)
    return ct * 2


READS = [float_and_except, branch_and_suppress, within_jax, numpy_and_continue, in_a_loop_of_jax]


@pytest.mark.parametrize("hook", [*READS, text, text_that_is_caught])
@pytest.mark.parametrize("jit", [jhop.jit, jax.jit])
def test_reading_is_refused_though_the_hook_catches_the_error(hook, jit):
    log.text = "before"
    with pytest.raises(jhop.Unsupported) as caught:
        gradient(hook, jit, **({"fullgraph": True} if jit is jhop.jit else {}))
    message = str(caught.value)
    assert message.startswith(f"hook `{hook.__name__}` (test_reads.py:{hook.__code__.co_firstlineno}) cannot be traced")
    assert f'File "{__file__}", line ' in message and "arrays have no values" in message
    assert ("fullgraph=False" if jit is jhop.jit else "compile with `jhop.jit`") in message
    if jit is jhop.jit:  # JAX chains one of its own
        assert (caught.value.__cause__ is None) == hook.__name__.startswith("text")
    assert log.text == "before"


@pytest.mark.parametrize("hook", [*READS, text])
def test_on_the_host_it_does_what_eager_code_does(hook):
    with pytest.warns(UserWarning, match="arrays have no values"):
        got = gradient(hook, jhop.jit)
    assert not hook.__name__.startswith("text") or log.text == "[ 1.5 -3.   6. ]"
    np.testing.assert_allclose(got, 1.5 * np.asarray(hook(X * 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "hook",
    [
        lambda ct: ct * float(ct[0]),
        lambda ct: ct if ct.sum() > 0 else -ct,
        lambda ct: ct * ct.max().item(),
        lambda ct: ct * len(f"{ct[0]:.3f}"),
        lambda ct: ct + jnp.zeros(ct.argmax()).sum(),
    ],
)
def test_plain_jit_names_jhop_jit(hook):
    with pytest.raises(jhop.Unsupported, match=r"or compile with `jhop\.jit`, which runs this hook on the host"):
        gradient(hook, jax.jit)


def test_what_is_no_read():
    def hook(ct):
        text = f"{ct.shape} {ct.dtype} {ct.ndim} {len(ct)}"
        with contextlib.suppress(KeyError):
            text = {}["missing"]
        first, *rest = ct
        # JAX asks for values here, and goes on without them.
        jax.hessian(lambda x: (x**3).sum())(ct)  # makes text of its own objects, with arrays in them
        return jnp.stack([first, *rest]) * len(text) + jnp.where(ct > 0, jnp.take(ct, ct.argmax()), 0.0)

    expected = 1.5 * np.asarray(hook(X * 3))
    np.testing.assert_allclose(gradient(hook, jhop.jit, fullgraph=True), expected, rtol=1e-6)
    np.testing.assert_allclose(gradient(hook, jax.jit), expected, rtol=1e-6)
