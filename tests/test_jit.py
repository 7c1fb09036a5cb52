"""`jhop.jit` as `jax.jit`: arguments, options, avals, and calls from inside other transformations."""

import contextlib
import functools
import gc
import weakref
from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

X = np.array([1.0, 2.0, 3.0], np.float32)


def counted(box):
    def hook(ct):
        box.n += 1
        return ct * 2.0

    return jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())


def reading(box):
    return jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * box.k) ** 2).sum())


# Arguments.


@pytest.mark.parametrize("fullgraph", [True, False])
def test_hook_runs(fullgraph):
    fn = jhop.jit(jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * 3.0) ** 2).sum()), fullgraph=fullgraph)
    assert fn(X).tolist() == (6.0 * X).tolist()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_state_is_counted(fullgraph):
    box = Box(n=0)
    fn = jhop.jit(counted(box), fullgraph=fullgraph)
    assert [fn(X).tolist() for _ in range(3)] == [(4.0 * X).tolist()] * 3
    assert (type(box.n), box.n) == (int, 3)


def test_pytrees_in_and_out():
    fn = jhop.jit(lambda tree, *rest, **named: {"tree": tree, "rest": rest, "named": named, "none": None})
    out = fn({"a": (X, [X])}, X, k={"b": X})
    assert jax.tree.structure(out) == jax.tree.structure(
        {"tree": {"a": (0, [0])}, "rest": (0,), "named": {"k": {"b": 0}}, "none": None}
    )


def test_no_arguments():
    assert jhop.jit(lambda: jnp.ones(2))().tolist() == [1.0, 1.0]


def test_keyword_arguments_in_any_order():
    fn = jhop.jit(lambda x, *, a, b: x * a - b)
    assert fn(X, a=2.0, b=1.0).tolist() == fn(X, b=1.0, a=2.0).tolist() == (X * 2 - 1).tolist()


def test_positional_and_keyword_call_agree():
    fn = jhop.jit(lambda x, y: x - y)
    assert fn(X, 1.0).tolist() == fn(x=X, y=1.0).tolist() == (X - 1).tolist()


def test_default_argument():
    fn = jhop.jit(lambda x, k=2.0: x * k)
    assert (fn(X).tolist(), fn(X, 3.0).tolist()) == ((X * 2).tolist(), (X * 3).tolist())


@pytest.mark.parametrize("options", [{"static_argnums": 1}, {"static_argnums": (1,)}, {"static_argnames": "k"},
                                     {"static_argnames": ["k"]}])  # fmt: skip
@pytest.mark.parametrize("call", [lambda fn, k: fn(X, k), lambda fn, k: fn(X, k=k)], ids=["position", "name"])
def test_static_argument(options, call):
    def power(x, k):
        for _ in range(k):
            x = x * x
        return x

    fn = jhop.jit(power, **options)
    assert [call(fn, k).tolist() for k in (1, 2, 1)] == [(X**2).tolist(), (X**4).tolist(), (X**2).tolist()]


def test_static_argument_counted_from_the_end():
    fn = jhop.jit(lambda x, k: x * k, static_argnums=-1)
    assert [fn(X, k).tolist() for k in (2, 3, 2)] == [(X * k).tolist() for k in (2, 3, 2)]


def test_static_default():
    fn = jhop.jit(lambda x, k=2: x * k, static_argnames="k")
    assert [fn(X).tolist(), fn(X, k=3).tolist(), fn(X, 3).tolist()] == [(X * k).tolist() for k in (2, 3, 3)]


@pytest.mark.parametrize("k", [1, 1.0, True])
def test_equal_static_arguments_of_other_types_are_told_apart(k):
    fn = jhop.jit(lambda x, k: (x * 0 + (1 if isinstance(k, bool) else 2 if isinstance(k, int) else 3)).sum(),
                  static_argnums=1)  # fmt: skip
    for other in (1, 1.0, True):
        fn(np.int32(3), other)
    assert int(fn(np.int32(3), k)) == {bool: 1, int: 2, float: 3}[type(k)]


def test_static_argument_with_state():
    box = Box(n=0)

    def loss(x, k):
        def hook(ct):
            box.n += k
            return ct * k

        return (jhop.hook(x, hook) ** 2).sum()

    fn = jhop.jit(jax.grad(loss), static_argnums=1, fullgraph=True)
    assert [fn(X, 2).tolist(), fn(X, 3).tolist(), fn(X, 2).tolist()] == [(2 * k * X).tolist() for k in (2, 3, 2)]
    assert box.n == 7


def test_unhashable_static_argument_is_refused():
    with pytest.raises((ValueError, TypeError)):
        jhop.jit(lambda x, k: x * k[0], static_argnums=1)(X, [2.0])


def test_donated_argument():
    x = jnp.asarray(X) + 0
    jhop.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()


def test_donated_argument_by_name():
    x = jnp.asarray(X) + 0
    jhop.jit(lambda x: x + 1, donate_argnames="x")(x=x)
    assert x.is_deleted()


def test_donated_argument_with_state():
    box, x = Box(n=0), jnp.asarray(X) + 0
    fn = jhop.jit(counted(box), donate_argnums=0)
    assert fn(x).tolist() == (4.0 * X).tolist()
    assert (x.is_deleted(), box.n) == (True, 1)


def test_unknown_option_is_refused():
    with pytest.raises(jhop.JhopError, match=r"`jax.jit` has no option typo. Its options are .*out_shardings"):
        jhop.jit(lambda x: x, typo=None)


@pytest.mark.parametrize("bad", [None, 3, "f"])
def test_what_is_no_function_is_refused(bad):
    with pytest.raises(jhop.JhopError, match="function"):
        jhop.jit(bad)


def test_name_and_doc_are_kept():
    def named(x):
        """Says something."""
        return x

    fn = jhop.jit(named)
    assert (fn.__name__, fn.__doc__, fn.__wrapped__) == ("named", "Says something.", named)


def test_decorated_method():
    class Model:
        k = 3.0

        @functools.partial(jhop.jit, static_argnums=0)
        def step(self, x):
            return x * self.k

    assert Model().step(X).tolist() == (X * 3).tolist()


# Several avals.


def test_function_is_traced_once_per_type():
    seen = []

    def fn(x):
        seen.append(x.aval)
        return x * 2

    jitted = jhop.jit(fn)
    for x in (X, X, X[:2], X.astype(np.float16), np.int32(1), np.int32(2), 1, 2, 1.5, 2.5):
        np.testing.assert_array_equal(jitted(x), x * 2)
    assert len(seen) == 6


def test_state_is_shared_by_all_types():
    box = Box(n=0)
    fn = jhop.jit(counted(box), fullgraph=True)
    fn(X), fn(X[:2]), fn(X), fn(X.astype(np.float16))
    assert box.n == 4


def test_weak_types_are_told_apart():
    fn = jhop.jit(lambda x: x * jnp.bfloat16(2))
    assert fn(2.0).dtype == jnp.bfloat16
    with pytest.raises(jax.dtypes.TypePromotionError):
        fn(np.float32(2.0))


def test_x64_may_be_switched_on():
    fn = jhop.jit(lambda x: x + jnp.zeros(3).sum().astype(x.dtype) * 0 + jnp.zeros(()).itemsize)
    assert fn(X)[0] == 5.0
    with jax.enable_x64(True):
        assert fn(X)[0] == 9.0
    assert fn(X)[0] == 5.0


def test_without_jit():
    box = Box(n=0)
    fn = jhop.jit(counted(box))
    with jax.disable_jit():
        assert [fn(X).tolist() for _ in range(2)] == [(4.0 * X).tolist()] * 2
    assert box.n == 2


def test_jitted_function_is_freed():
    class Big:
        pass

    big = Big()
    ref = weakref.ref(big)
    fn = jhop.jit(lambda x, big=big: x if big else -x)
    fn(X)
    del fn, big
    gc.collect()
    assert ref() is None


# Inside other transformations.

OUTER = {
    "jit": lambda fn: jax.jit(fn)(X),
    "vmap": lambda fn: jax.vmap(fn)(np.stack([X, X]))[0],
    "jit of vmap": lambda fn: jax.jit(jax.vmap(fn))(np.stack([X, X]))[0],
    "grad": lambda fn: jax.grad(lambda x: (fn(x) * X).sum())(X),
    "jvp": lambda fn: jax.jvp(fn, (X,), (X,))[1],
    "scan": lambda fn: jax.lax.scan(lambda c, _: (fn(c), None), X, None, length=2)[0],
    "eval_shape": lambda fn: np.zeros(jax.eval_shape(fn, X).shape),
    "jhop.jit": lambda fn: jhop.jit(fn)(X),
}


@pytest.mark.parametrize("outer", OUTER)
def test_pure_hook_under_an_outer_transformation(outer):
    fn = jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * 3.0) ** 2).sum())
    np.testing.assert_allclose(OUTER[outer](jhop.jit(fn)), OUTER[outer](fn))


@pytest.mark.parametrize("outer", ["jit", "jit of vmap", "scan"])
def test_state_written_under_an_outer_jit_is_refused(outer):
    box = Box(n=0)
    with pytest.raises(jhop.Unsupported):
        OUTER[outer](jhop.jit(counted(box)))
    assert box.n == 0


@pytest.mark.parametrize("outer", ["vmap", "grad", "jvp"])
def test_state_written_under_an_outer_transformation_is_as_in_eager_or_refused(outer):
    box, other = Box(n=0), Box(n=0)
    try:
        OUTER[outer](jhop.jit(counted(box)))
    except jhop.Unsupported:
        assert box.n == 0
        return
    OUTER[outer](counted(other))
    assert box.n == other.n


def test_state_written_under_an_outer_jhop_jit():
    box = Box(n=0)
    fn = jhop.jit(lambda x: inner(x) * 2.0, fullgraph=True)
    inner = jhop.jit(counted(box))
    with contextlib.suppress(jhop.Unsupported):
        fn(X), fn(X)
        assert box.n == 2
        return
    assert box.n == 0


@pytest.mark.parametrize("how", ["jhop.jit", "trace_wrapped"])
def test_constant_argument_under_an_outer_jit_does_not_run_the_hook_once(how):
    """The arguments are no tracers, but the call is part of what `jax.jit` traces once and replays."""
    box = Box(n=0)

    def hook(ct):
        box.n += 1
        return ct * 2.0

    inner = jhop.jit(counted(box)) if how == "jhop.jit" else lambda x: jhop.trace_wrapped(x, fn=hook)
    outer = jax.jit(lambda y: y + inner(X))
    with contextlib.suppress(jhop.Unsupported):
        for _ in range(3):
            outer(X)
    assert box.n in (0, 3)


def test_constant_argument_under_an_outer_grad_runs_the_hook_each_time():
    box = Box(n=0)
    inner = jhop.jit(counted(box))
    for _ in range(3):
        jax.grad(lambda y: (y * inner(X)).sum())(X)
    assert box.n == 3


@pytest.mark.parametrize("outer", [jax.grad, jax.jit, jax.value_and_grad], ids=lambda fn: fn.__name__)
def test_function_that_closes_over_an_outer_tracer(outer):
    def fn(jit):
        return outer(lambda y: jit(lambda x: (x * y).sum())(X))(jnp.float32(2.0))

    assert jax.tree.map(float, fn(jhop.jit)) == jax.tree.map(float, fn(jax.jit))


# Second derivatives and batches: hooks run as often as in eager.

ORDERS = {
    "hessian": lambda f: jax.hessian(f),
    "grad of grad": lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()),
    "jacrev": lambda f: jax.jacrev(f),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])),
    "value and grad": lambda f: jax.value_and_grad(f),
    "twice": lambda f: lambda x: (jax.grad(f)(x), jax.grad(f)(x * 2)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_hook_counts_as_in_eager(order):
    found = []
    for compile in (lambda fn: fn, functools.partial(jhop.jit, fullgraph=True)):
        box = Box(n=0)

        def hook(ct, box=box):
            box.n += 1
            return ct * 2.0

        fn = compile(ORDERS[order](lambda x, hook=hook: (jhop.hook(x, hook) ** 3).sum()))
        outs = [fn(jnp.asarray(X)) for _ in range(2)]
        found.append((box.n, jax.tree.map(np.asarray, outs)))
    assert found[1][0] == found[0][0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[1][1], found[0][1])
