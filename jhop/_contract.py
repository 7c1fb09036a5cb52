"""What a hook must keep to, and how JAX sees it: a hashable function of flat arrays that checks its own results."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat
from jhop._append import class_name
from jhop._close import Husk
from jhop._errors import HookError
from jhop._hook_options import PLAIN, Adapted, HookOptions
from jhop._source import describe_hook, hook_name


class HookFn:
    """The function behind a `trace_wrapped` equation: takes the flat inputs, returns the flat outputs.

    Attributes:
        base: the user's callable, whose Python state is lifted; where it closed over tracers, with holes for them.
        call: runs it on flat inputs.
        name: shown in jaxprs and messages, e.g. `jvp[clip]`.
        kind: which of PyTorch's hook kinds it is, for the printed text.
        options: what was asked of it. Of one with `stop`, `call` returns the results, then for each of them an array of
            ones if it is the cotangent itself, which keeps its history, and of zeros if not.
    """

    __slots__ = ("_base", "call", "key", "kind", "name", "options")

    def __init__(
        self, base: Any, call: Callable[..., Any], name: str, key: tuple[Any, ...], kind: str = "hook",
        options: HookOptions = PLAIN,
    ):  # fmt: skip
        self._base = base
        self.call = call
        self.name = name
        self.key = key
        self.kind = kind
        self.options = options

    @property
    def base(self) -> Any:
        return self._base.base if isinstance(self._base, Husk) else self._base

    @property
    def closes_over_values(self) -> bool:
        """Whether the user's callable closed over tracers."""
        return isinstance(self._base, Husk)

    def derive(self, rule: str, call: Callable[..., Any], *key: Any) -> HookFn:
        """A function derived from this one by a transformation; its state stays that of the same hook."""
        return HookFn(self._base, call, f"{rule}[{self.name}]", (rule, self.key, *key), self.kind, self.options)

    def batched(self, in_axes: tuple[int | None, ...], kwargs: dict[str, Any]) -> HookFn:
        """The function over a batch. `kwargs` are for `jax.vmap`."""

        def call(*flat: Any) -> list[Any]:
            return jax.vmap(self.call, in_axes=in_axes, **kwargs)(*flat)

        return self.derive("vmap", call, in_axes, str(kwargs))

    def reached(self, missing: tuple[int, ...], n: int) -> HookFn:
        """The function of those of its `n` values that have a gradient; the hook is given None for the `missing`."""

        def call(*flat: Any) -> list[Any]:
            rest = iter(flat)
            outs = self.call(*(None if i in missing else next(rest) for i in range(n)), *rest)
            return [out for i, out in enumerate(outs) if i % n not in missing]

        return self.derive("reached", call, missing)

    def rules(self) -> set[str]:
        """The transformations that it was derived by."""
        found, key = set[str](), self.key
        while key[0] in ("jvp", "transpose", "vmap", "reached"):
            found.add(key[0])
            key = key[1]
        return found

    # JAX caches by parameters: equal keys mean that one trace may serve both.
    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HookFn) and self.key == other.key

    def __repr__(self) -> str:
        return self.name


def _type_of(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _type_name(value)
    return class_name(value)


def _type_name(value: Any) -> str:
    # Less where it lives, so that an error reads the same under every transformation.
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def check_contract(fn: Any, out: Any, aval: Any) -> Any:
    """Returns the array that a hook returned, once it is known to have its cotangent's shape and dtype.

    It is sharded as the cotangent where shardings are part of types (a mesh with explicit axes).

    Args:
        fn: the hook, for the message.
        out: what it returned for one cotangent; None is not allowed here.
        aval: the cotangent's aval.

    Raises:
        HookError: it is no array, or has another shape or dtype.
    """
    out = getattr(out, "__jhop_array__", out)  # a Tensor returned by a hook counts as its array
    is_array = isinstance(out, (jax.Array, np.ndarray, np.generic))
    if not is_array or (jnp.shape(out), out.dtype) != (aval.shape, aval.dtype):
        raise HookError(
            f"{describe_hook(fn)} must return an array of type {_type_name(aval)}, the shape and dtype of its "
            f"cotangent, but returned {_type_of(out)}. A hook may change values, never shape, dtype or type. "
            "Return None to leave the cotangent as it is."
        )
    if isinstance(out, _compat.Tracer) or not isinstance(out, jax.Array):  # else it is slow, and does nothing
        out = jnp.asarray(out)
    if jax.typeof(out).sharding.spec != aval.sharding.spec:  # on a mesh with explicit axes it is part of the type
        if isinstance(out, _compat.Tracer) or not jax.sharding.get_abstract_mesh().empty:
            out = jax.sharding.reshard(out, aval.sharding)
    if not isinstance(out, _compat.Tracer):
        return _compat.with_weak_type(out, aval.weak_type)
    missing = _compat.varying_axes(aval) - _compat.varying_axes(jax.typeof(out))
    if missing:  # a psum in the hook makes its result the same on every device; its cotangent's type is not
        out = jax.lax.pcast(out, tuple(sorted(missing)), to="varying")
    extra = _compat.varying_axes(jax.typeof(out)) - _compat.varying_axes(aval)
    if extra:
        raise HookError(
            f"{describe_hook(fn)} returned a value that varies over mesh axes {sorted(extra)} over which its "
            "cotangent does not vary. Reduce over them (jax.lax.psum or pmean) before returning."
        )
    return _compat.with_weak_type(out, aval.weak_type)


def flat_caller(
    fn: Any, tree: Any, *, still: dict[int, Any] | None = None, extra_tree: Any = None, options: HookOptions = PLAIN
) -> Callable[..., list[Any]]:
    """`fn` as a function of flat inputs and outputs, with the contract checked.

    Args:
        fn: takes a pytree of cotangents, then what `extra_tree` is made of.
        tree: the pytree's structure.
        still: leaves, by index, that carry no gradient, and what `fn` gets for them: zeros, where what it returns is
            ignored, or None.
        extra_tree: the structure of the tuple of further arguments; by default, there are none.
        options: what was asked of the hook. A cotangent that is None among the inputs is None for `fn`, too.
    """
    zeros = still or {}
    moving = [i for i in range(tree.num_leaves) if i not in zeros]
    run = Adapted(fn, torch_complex=True) if options.torch_complex else fn

    def call(*flat: Any) -> list[Any]:
        arrays = as_arrays(flat)
        cts, rest = arrays[: len(moving)], arrays[len(moving) :]
        given: list[Any] = [zeros.get(i) for i in range(tree.num_leaves)]
        for i, ct in zip(moving, cts, strict=True):
            given[i] = ct
        value = jax.tree.unflatten(tree, given)
        out = run(value, *(jax.tree.unflatten(extra_tree, rest) if extra_tree is not None else ()))
        if out is None:
            return cts
        leaves = _leaves_of(fn, out, tree, given)
        for leaf, ct in zip(leaves, given, strict=True):
            if ct is None and leaf is not None:
                raise HookError(
                    f"{describe_hook(fn)} returned a {_type_of(leaf)} where it was given None: nothing flows there. "
                    "Return None in its place."
                )
        pairs = zip((leaves[i] for i in moving), cts, strict=True)
        return [ct if leaf is None else check_contract(fn, leaf, jax.typeof(ct)) for leaf, ct in pairs]

    return _stopped(call, len(moving)) if options.stop else call


def _leaves_of(fn: Any, out: Any, tree: Any, given: list[Any]) -> list[Any]:
    """What a hook returned, one item per leaf of the `tree` of cotangents that it was given; None keeps one."""
    # None for a leaf keeps it; None in the tree itself is structure.
    whole = jax.tree.unflatten(tree, [0 if ct is None else ct for ct in given])
    own, own_tree = jax.tree.flatten(whole, is_leaf=_is_none)
    leaves, out_tree = jax.tree.flatten(out, is_leaf=_is_none)
    if out_tree == own_tree:
        return [leaf for leaf, mine in zip(leaves, own, strict=True) if mine is not None]
    if tree != jax.tree.structure(0):
        raise HookError(
            f"{describe_hook(fn)} must return a pytree like its cotangent, {tree}, but returned {out_tree}. "
            "Return None to leave the cotangent as it is."
        )
    return [out]  # one array was expected: who checks it reports what came as it is


def _stopped(call: Callable[..., list[Any]], n: int) -> Callable[..., list[Any]]:
    """A hook's function with `stop`: what it makes has no history, and is told from what it keeps. See `HookFn`."""

    def run(*flat: Any) -> list[Any]:
        cts = as_arrays(flat[:n])
        outs = call(*cts, *flat[n:])
        kept = [out is ct for out, ct in zip(outs, cts, strict=True)]
        outs = [out if keeps else jax.lax.stop_gradient(out) for out, keeps in zip(outs, kept, strict=True)]
        pairs = zip(cts, kept, strict=True)
        marks = [ct if ct is None else check_contract(call, jnp.full_like(ct, k), jax.typeof(ct)) for ct, k in pairs]
        return outs + marks

    return run


def as_arrays(values: Sequence[Any]) -> list[Any]:
    """Inputs of a hook as JAX's arrays: literals and constants of jaxprs have no `.at`, and no tracer for an index."""
    return [
        value if isinstance(value, jax.Array) or value is None or _is_float0(value) else jnp.asarray(value)
        for value in values
    ]


def _is_float0(value: Any) -> bool:
    return getattr(value, "dtype", None) == jax.dtypes.float0


@functools.cache
def is_inexact(dtype: Any) -> bool:
    """Whether values of a dtype have gradients."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_none(value: Any) -> bool:
    return value is None


def flat_hook(
    fn: Any, make_call: Callable[[Any], Callable[..., list[Any]]], n: int, key: tuple[Any, ...], *, name: str = "",
    kind: str = "hook", options: HookOptions = PLAIN,
) -> tuple[HookFn, list[Any]]:
    """How JAX sees a hook: (it, the tracers that it closes over, which it takes as operands after its `n` inputs).

    Args:
        fn: the hook.
        make_call: makes the function of flat inputs that runs a hook, such as `flat_caller` does.
        n: how many inputs it has.
        key: hooks with equal keys share what JAX traced of them; one that closes over tracers is equal to no other.
        name: by default, the hook's own.
        kind, options: see `HookFn`.
    """
    name = name or hook_name(fn)
    husk, operands = Husk.of(fn)
    if husk is None:
        return HookFn(fn, make_call(fn), name, key, kind, options), []

    def with_operands(*flat: Any) -> list[Any]:
        with husk.filled(as_arrays(flat[n:])) as filled:
            return make_call(filled)(*flat[:n])

    return HookFn(husk, with_operands, f"closed[{name}]", ("closed", object(), key[0]), kind, options), operands


class _Identity:
    """Compares a hook by identity and keeps it alive, so that its id stays its own."""

    __slots__ = ("fn",)

    def __init__(self, fn: Any):
        self.fn = fn

    def __hash__(self) -> int:
        return id(self.fn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.fn is other.fn


def identity_key(fn: Any) -> Any:
    # `obj.method` makes a new object at each access; what it stands for is (object, function).
    if hasattr(fn, "__self__") and hasattr(fn, "__func__"):
        return (_Identity(fn.__self__), fn.__func__)
    return _Identity(fn)


class WeakIdentity:
    """Compares an object by identity without keeping it alive; once it is gone, equal to nothing else."""

    __slots__ = ("_id", "_ref")

    def __init__(self, obj: Any):
        self._id = id(obj)
        self._ref = weakref.ref(obj)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        mine = self._ref()
        return isinstance(other, WeakIdentity) and mine is not None and mine is other._ref()
