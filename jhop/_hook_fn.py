"""`jhop.hook_fn`: hooks around the backward of a function, on the cotangents of its result and of its arguments.

Both are hook points (`_point`): one on the result, one on the arguments. A hook on the arguments that also wants the
cotangents of the result gets them along a path of their own, which no value takes: zeros go through the point on the
arguments and then are "added" to the result's tangents. So backwards the result's cotangents arrive at the point.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat
from jhop._contract import check_contract, is_inexact
from jhop._errors import HookError
from jhop._hook_options import HookOptions, checked_options
from jhop._interp import evaluate
from jhop._leaves import declare_state
from jhop._point import put_point
from jhop._source import describe_hook


def hook_fn(
    f: Callable[..., Any], pre: Callable[..., Any] | None = None, post: Callable[..., Any] | None = None, *,
    stop: bool = False, torch_complex: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """Returns a function like `f` whose backward has a hook before it, `pre`, and one after it, `post`.

    Args:
        f: a function of JAX, or an object that is called as one, such as a module. Its arguments may be pytrees of
            arrays of any shapes and dtypes, and other objects.
        pre: `pre(grad_outputs) -> grad_outputs | None`, run once per backward pass and call of `f`, with the cotangents
            of what `f` returned, in its structure. What it returns goes into the backward of `f`; None keeps them.
        post: `post(grad_inputs) -> grad_inputs | None`, run after the backward of `f`, with a tuple of the gradients
            that `f` sends to its positional arguments, in their structure. What it returns goes on in their place. One
            that needs two arguments is called as `post(grad_inputs, grad_outputs)`, the second as `pre` left them; `f`
            is then traced by itself, as `jax.checkpoint` does. Keyword arguments, and what `f` closes over, have no
            hook.
        stop, torch_complex: as for `jhop.hook`.

    Returns:
        The function.

    Both get None for leaves without a gradient, where they must return None: what is no floating array, what nothing
    depends on that is differentiated, and arguments by which nobody differentiates. A hook does not run if all of its
    gradients are None; `post` not without gradients of arguments.

    Raises:
        HookError: one of them is not callable, `post` takes another number of arguments, or an option is not True or
            False. During the backward pass: a hook returned another structure, shape, dtype or type.

    Example:
        >>> import jax, jhop
        >>> layer = jhop.hook_fn(
        ...     lambda x, w: x * w, pre=lambda ct: 10.0 * ct, post=lambda grads, ct: (grads[0] + ct, None)
        ... )
        >>> [float(grad) for grad in jax.grad(layer, argnums=(0, 1))(3.0, 5.0)]
        [60.0, 30.0]

    The counterparts in PyTorch are `register_full_backward_pre_hook` and `register_full_backward_hook` of modules, and
    `register_prehook` and `register_hook` of nodes (which nodes of a tape have in `jhop`, too: `Tensor.grad_fn`).
    """
    for word, given in (("f", f), ("pre", pre), ("post", post)):
        if not callable(given) and (given is not None or word == "f"):
            wanted = "a function" if word == "f" else "a hook or None"
            raise HookError(f"jhop.hook_fn: expected {word} to be {wanted}, got {type(given).__name__} ({given!r}).")
    options = checked_options("jhop.hook_fn", stop=stop, torch_complex=torch_complex)
    options = options._replace(zeros="none", around=True)
    both = _Both(post) if post is not None and _needs_two(post) else None

    def hooked(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if post is None or not any(map(_may_move, leaves)):
            out = f(*args, **kwargs)
        elif both is None:
            out = f(*jax.tree.unflatten(tree, _hooked(leaves, tree, post, options)), **kwargs)
        else:
            out = _Call(f, leaves, tree, kwargs).hooked(both, options)
        if pre is None:
            return out
        results, out_tree = jax.tree.flatten(out)
        return jax.tree.unflatten(out_tree, _hooked(results, out_tree, pre, options))

    return functools.update_wrapper(hooked, f, updated=())


def _may_move(leaf: Any) -> bool:
    """Whether somebody may be differentiating by a leaf."""
    return isinstance(leaf, _compat.Tracer) and is_inexact(leaf.dtype)


def _needs_two(post: Callable[..., Any]) -> bool:
    """Whether a hook after a function wants the cotangents of the result, too."""
    try:
        signature = inspect.signature(post)
    except (TypeError, ValueError):  # it has none, as some builtins
        return False
    for n in (1, 2):
        try:
            signature.bind(*(None,) * n)
        except TypeError:
            continue
        return n == 2
    raise HookError(
        f"jhop.hook_fn: expected post to take one argument (grad_inputs) or two (grad_inputs, grad_outputs), got "
        f"{describe_hook(post)} with {signature}."
    )


def _hooked(leaves: list[Any], tree: Any, fn: Callable[..., Any], options: HookOptions) -> list[Any]:
    """The leaves of a pytree with a hook on those that may move."""
    still: dict[int, Any] = {i: None for i, leaf in enumerate(leaves) if not _may_move(leaf)}
    return leaves if len(still) == len(leaves) else put_point(leaves, tree, fn, still, options, "")


class _Call:
    """One call of a function whose hook on the arguments gets the result's cotangents.

    Args:
        f: the function.
        leaves, tree: its positional arguments.
        kwargs: the others.
    """

    def __init__(self, f: Callable[..., Any], leaves: list[Any], tree: Any, kwargs: dict[str, Any]):
        self._f = f
        self._leaves = leaves
        self._tree = tree
        self._kwargs = kwargs
        self._moving = [i for i, leaf in enumerate(leaves) if _may_move(leaf)]
        self._out_tree: Any = None
        self._others: dict[int, Any] = {}  # results that are no arrays

    def hooked(self, both: _Both, options: HookOptions) -> Any:
        """What the function returns, with the hook on its arguments."""
        # Traced first: what its results are like has to be known before the hook is put on its arguments.
        jaxpr = jax.make_jaxpr(self._outs)(*(self._leaves[i] for i in self._moving))
        avals = iter(jaxpr.out_avals)
        paths = [None if i in self._others else self._path(next(avals)) for i in range(self._out_tree.num_leaves)]
        n = len(self._leaves)
        still: dict[int, Any] = {i: None for i in range(n) if i not in self._moving}
        still |= {n + i: None for i, path in enumerate(paths) if path is None}
        options = options._replace(extra=sum(path is not None for path in paths))
        tree = jax.tree_util.treedef_tuple([self._tree, self._out_tree])
        leaves = put_point([*self._leaves, *paths], tree, both, still, options, "")
        outs = evaluate(jaxpr, [leaves[i] for i in self._moving])
        outs = [jnp.asarray(out, aval.dtype) for out, aval in zip(outs, jaxpr.out_avals, strict=True)]
        for i in sorted(self._others):
            outs.insert(i, self._others[i])
        outs = [out if path is None else _joined(out, path) for out, path in zip(outs, leaves[n:], strict=True)]
        return jax.tree.unflatten(self._out_tree, outs)

    def _path(self, aval: Any) -> Any:
        """Zeros like a result; None if it has no gradient."""
        return check_contract(self._f, jnp.zeros(aval.shape, aval.dtype), aval) if is_inexact(aval.dtype) else None

    def _outs(self, *values: Any) -> list[Any]:
        leaves = list(self._leaves)
        for i, value in zip(self._moving, values, strict=True):
            leaves[i] = value
        outs, self._out_tree = jax.tree.flatten(self._f(*jax.tree.unflatten(self._tree, leaves), **self._kwargs))
        self._others = {i: out for i, out in enumerate(outs) if not isinstance(out, jax.Array)}
        return [out for i, out in enumerate(outs) if i not in self._others]


@jax.custom_jvp
def _joined(out: Any, path: Any) -> Any:
    """`out`, whose cotangent goes to `path` as well, an array of zeros like it."""
    return out


@_joined.defjvp
def _joined_jvp(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] + tangents[1]


class _Both:
    """A hook that gets the gradients of arguments and the cotangents of results, as one on the pair of them."""

    __slots__ = ("__wrapped__",)

    def __init__(self, fn: Callable[..., Any]):
        self.__wrapped__ = fn

    def __call__(self, cts: tuple[Any, Any]) -> tuple[Any, Any] | None:
        ins, outs = cts
        returned = self.__wrapped__(ins, outs)
        if returned is None:
            return None
        wanted, found = (jax.tree.structure(each, is_leaf=lambda leaf: leaf is None) for each in (ins, returned))
        if found != wanted:
            raise HookError(
                f"{describe_hook(self.__wrapped__)} must return a pytree like the gradients of the arguments, "
                f"{wanted}, but returned {found}. Return None to leave them as they are."
            )
        return returned, outs


declare_state(_Both, "__wrapped__")
