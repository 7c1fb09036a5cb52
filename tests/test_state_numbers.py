"""What a hook does with a lifted Python number, through JAX and NumPy, is what it does with the number itself."""

from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from under import agree

import jhop

X = jnp.cos(jnp.arange(12, dtype=jnp.float32)).reshape(4, 3)

# By what is compiled for any number: expressions of (cotangent, int, float).
ANY_NUMBER = {
    "asarray": lambda ct, n, k: ct * jnp.asarray(k),
    "array": lambda ct, n, k: ct * jnp.array(n).astype(ct.dtype),
    "array of a dtype": lambda ct, n, k: ct * jnp.asarray(n, ct.dtype) * jnp.float32(k),
    "array of the same dtype": lambda ct, n, k: ct * jnp.asarray(n, jnp.int32).astype(ct.dtype),
    "bfloat16": lambda ct, n, k: ct * jnp.bfloat16(k).astype(ct.dtype),
    "float8": lambda ct, n, k: ct * jnp.asarray(k, jnp.float8_e4m3fn).astype(ct.dtype),
    "array of several": lambda ct, n, k: ct * jnp.array([k, 1.0, n], jnp.float32),
    "primitive": lambda ct, n, k: lax.mul(ct, lax.convert_element_type(k, ct.dtype) * jnp.ones_like(ct)),
    "index update": lambda ct, n, k: ct.at[0].add(k).at[1].set(n),
    "loop": lambda ct, n, k: lax.fori_loop(0, 2, lambda i, c: c * k, ct),
    "place in a slice": lambda ct, n, k: lax.dynamic_update_slice(ct, 2.0 * ct[:1], (n, 0)),
    "full": lambda ct, n, k: ct * jnp.full(3, k, jnp.float32),
    "times NumPy's": lambda ct, n, k: ct * jnp.asarray(k * np.full(3, 1.5, np.float32)),
}
# Where NumPy computes, or Python needs an int, each number is compiled for.
THIS_NUMBER = {
    "NumPy array times": lambda ct, n, k: ct * jnp.asarray(np.full(3, 1.5, np.float32) * k),
    "NumPy ufunc": lambda ct, n, k: ct * float(np.sqrt(k)) + np.float32(np.log(k)),
    "NumPy array": lambda ct, n, k: ct * jnp.asarray(np.asarray(k, np.float32)),
    "narrow integer": lambda ct, n, k: ct * jnp.asarray(n, jnp.int8).astype(ct.dtype),
    "length of a loop": lambda ct, n, k: lax.fori_loop(0, n, lambda i, c: c * 1.5, ct),
    "index": lambda ct, n, k: ct * ct[n],
}


@pytest.mark.parametrize("kind", [*ANY_NUMBER, *THIS_NUMBER])
def test_value_is_that_of_eager(kind):
    expression, box = {**ANY_NUMBER, **THIS_NUMBER}[kind], Box(n=0, k=0.0)

    def hook(ct):
        return expression(ct, box.n, box.k)

    fn = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)
    for box.n, box.k in ((1, 2.0), (3, 0.75), (2, 5.5)):
        agree(fn(X), hook(2.0 * X))
    assert fn.versions() == (1 if kind in ANY_NUMBER else 3)


def test_array_full_of_a_number_takes_the_dtype_that_it_meets():
    """It is weakly typed, as JAX makes it of a Python number."""
    box = Box(k=1.5, kept=None)

    def hook(ct):
        box.kept = jnp.full(3, box.k)
        return ct * box.kept

    fn = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)
    x = X[0].astype(jnp.bfloat16)
    for box.k in (1.5, -0.25):
        got, kept = fn(x), box.kept
        agree(got, hook(2 * x))
        assert kept.weak_type and kept.tolist() == [box.k] * 3


def test_number_that_outgrows_a_dtype_is_the_error_of_eager():
    box = Box(n=100)
    fn = jhop.jit(jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * jnp.int8(box.n)) ** 2).sum()), fullgraph=True)
    with jax.numpy_dtype_promotion("standard"):
        agree(fn(X), 200.0 * X)
        box.n = 200
        with pytest.raises(jhop.Unsupported, match="OverflowError"):
            fn(X)


def test_array_made_of_a_number_is_kept_as_an_array():
    box = Box(n=0, array=None)

    def hook(ct):
        box.n += 1
        box.array = jnp.asarray(box.n)

    fn = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)
    for n in (1, 2, 3):
        fn(X)
        assert (type(box.n), box.n, int(box.array)) == (int, n, n)
        assert isinstance(box.array, jax.Array)
