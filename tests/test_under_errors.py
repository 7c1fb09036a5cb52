"""A hook that breaks its contract is told so in the same words wherever it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from under import make_mesh

import jhop

X = np.array([0.5, -2.0, 3.0], np.float32)


def scan(f):
    return lambda x: lax.scan(lambda c, r: (c, f(c * r)), x, jnp.array([1.0, 2.0]))[1].sum()


def cond(f):
    return lambda x: lax.cond(x.sum() > 0, f, lambda x: 2 * x.sum(), x)


def shard_map(devices, **kwargs):
    def of(f):
        mesh = make_mesh((devices,), ("d",))
        each = jax.shard_map(lambda xs: f(xs[0])[None], mesh=mesh, in_specs=P("d"), out_specs=P("d"), **kwargs)
        return jax.jit(lambda x: each(jnp.stack([x] * mesh.size)).sum())

    return of


WHERE = {
    "eager": lambda f: jax.grad(f)(X),
    "jit": lambda f: jax.jit(jax.grad(f))(X),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(X),
    "jhop.jit": lambda f: jhop.jit(jax.grad(f))(X),
    "jhop.jit fullgraph": lambda f: jhop.jit(jax.grad(f), fullgraph=True)(X),
    "inline": lambda f: jhop.inline(jhop.make_fx(jax.grad(f))(X)),
    "scan": lambda f: jax.grad(scan(f))(X),
    "jit of scan": lambda f: jax.jit(jax.grad(scan(f)))(X),
    "jhop.jit of scan": lambda f: jhop.jit(jax.grad(scan(f)))(X),
    "cond": lambda f: jax.grad(cond(f))(X),
    "jit of cond": lambda f: jax.jit(jax.grad(cond(f)))(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X[None]),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x[None]).sum())(X),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(f)))(np.stack([X, X])),
    "vmap with an axis": lambda f: jax.vmap(jax.grad(f), axis_name="i")(np.stack([X, X])),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(X),
    "jit of checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(X),
    "checkpointed scan": lambda f: jax.jit(jax.grad(scan(jax.checkpoint(f))))(X),
    "hessian": lambda f: jax.jit(jax.hessian(lambda x: f(jnp.sin(x))))(X),
    "linear_transpose": lambda f: jax.linear_transpose(f, X)(jnp.float32(1)),
    "disable_jit": lambda f: jax.disable_jit()(lambda: jax.grad(jax.jit(f))(X))(),
    "shard_map": lambda f: jax.grad(shard_map(8)(f))(X),
    "shard_map on one device": lambda f: jax.jit(jax.grad(shard_map(1)(f)))(X),
    "shard_map without check_vma": lambda f: jax.grad(shard_map(8, check_vma=False)(f))(X),
}

WRONG = {
    "shape": (lambda ct: ct.sum(), "float32[]"),
    "one element": (lambda ct: ct[:1], "float32[1]"),
    "dtype": (lambda ct: ct.astype(jnp.float16), "float16[3]"),
    "integer": (lambda ct: jnp.zeros(3, jnp.int32), "int32[3]"),
    "tuple": (lambda ct: (ct,), "tuple"),
    "dict": (lambda ct: {"ct": ct}, "dict"),
    "float": (lambda ct: 1.0, "float"),
    "str": (lambda ct: "ct", "str"),
    "object": (lambda ct: object(), "object"),
}


def hooked(fn):
    return lambda x: (2 * jhop.hook(x, fn)).sum()


def message(fn, where):
    with pytest.raises(jhop.HookError) as caught:
        WHERE[where](hooked(fn))
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_error_says_what_was_expected_and_what_came(wrong):
    fn, found = WRONG[wrong]
    fn.__name__ = fn.__qualname__ = f"bad_{wrong.replace(' ', '_')}"
    line = fn.__code__.co_firstlineno
    assert message(fn, "eager") == (
        f"hook `{fn.__name__}` (test_under_errors.py:{line}) must return an array of type float32[3], the shape and "
        f"dtype of its cotangent, but returned {found}. A hook may change values, never shape, dtype or type. Return "
        "None to leave the cotangent as it is."
    )


@pytest.mark.parametrize("wrong", ["shape", "dtype", "tuple", "float"])
@pytest.mark.parametrize("where", [where for where in WHERE if where != "eager"])
def test_error_is_the_same_everywhere(where, wrong):
    fn = WRONG[wrong][0]
    assert message(fn, where) == message(fn, "eager")


@pytest.mark.parametrize("where", WHERE)
def test_structure_of_a_pytree_is_named_everywhere(where):
    def swap(ct):
        return {"a": ct["a"]}

    def of(x):
        tree = jhop.hook({"a": x, "b": 2 * x}, swap)
        return (tree["a"] + 3 * tree["b"]).sum()

    line = swap.__code__.co_firstlineno
    with pytest.raises(jhop.HookError) as caught:
        WHERE[where](of)
    assert str(caught.value) == (
        f"hook `swap` (test_under_errors.py:{line}) must return a pytree like its cotangent, PyTreeDef({{'a': *, 'b': "
        "*}), but returned PyTreeDef({'a': *}). Return None to leave the cotangent as it is."
    )


class Clip:
    def step(self, ct):
        return ct[0]


HOOKS = {"Clip.step": Clip().step, "Clip": type("Clip", (), {"__call__": Clip.step})(), "partial(Clip.step)": None}
HOOKS["partial(Clip.step)"] = functools.partial(Clip.step, Clip())


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("where", ["eager", "jit", "scan", "shard_map", "vmap of grad"])
def test_error_names_hooks_of_every_kind(name, where):
    assert message(HOOKS[name], where).startswith(f"hook `{name}` (test_under_errors.py:")


@pytest.mark.parametrize("where", WHERE)
def test_hook_that_closes_over_a_tracer_is_named(where):
    def closing(x):
        def wrong(ct):
            return (ct * y).sum()

        y = jnp.cos(x) * 3
        return (2 * jhop.hook(x, wrong)).sum()

    if where == "linear_transpose":
        pytest.skip("the cosine is not linear")
    with pytest.raises(jhop.HookError, match=r"^hook `wrong` \(test_under_errors.py:\d+\) must return .*float32\[\]"):
        WHERE[where](closing)


# At once, where the hook is put.


@pytest.mark.parametrize("wrong", [None, 3, "clip", [len]], ids=repr)
@pytest.mark.parametrize("where", ["eager", "jit", "scan", "vmap of grad", "shard_map"])
def test_hook_that_is_not_callable(where, wrong):
    with pytest.raises(jhop.HookError, match=r"^jhop.hook: expected a callable hook, got \w+ \("):
        WHERE[where](hooked(wrong))


NOTHING = {
    "integers": (jnp.arange(3), r"int32"),
    "bools": (np.array([True]), "bool"),
    "key": (jax.random.key(0), r"key<fry>"),
    "pytree": ({"n": 3, "b": True}, r"bool, int32"),
    "none": (None, "no array"),
    "empty": ([], "no array"),
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_value_without_a_floating_leaf(name, jit):
    value, found = NOTHING[name]
    of = lambda value: jhop.hook(value, lambda ct: ct)  # noqa: E731
    with pytest.raises(jhop.HookError, match=rf"^jhop.hook: only floating and complex values .* got {found}\. Hook"):
        (jax.jit(of) if jit else of)(value)


@pytest.mark.parametrize(
    "leaf",
    ["a string", object(), len, np.array(["a"]), np.zeros(2, [("k", float)])],
    ids=["str", "object", "function", "array of strings", "array of records"],
)
def test_leaf_that_is_no_array(leaf):
    with pytest.raises(jhop.HookError, match=rf"^jhop.hook: expected an array or .* got a leaf {type(leaf).__name__}"):
        jhop.hook({"x": X, "other": leaf}, lambda ct: ct)


@pytest.mark.parametrize("where", ["eager", "jit", "scan", "vmap of grad", "shard_map", "checkpoint"])
def test_error_of_the_hooks_own_is_passed_on(where):
    def broken(ct):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        WHERE[where](hooked(broken))


def test_error_is_repeated():
    grad = jax.jit(jax.grad(hooked(WRONG["shape"][0])))
    for _ in range(2):
        with pytest.raises(jhop.HookError, match=r"float32\[\]"):
            grad(X)
