"""`jhop.strict`: an error where the value from before a hook is used after it, past the hook.

The function is traced to a jaxpr, in which each hook point is one equation on a variable; a later use of the variable
is one of the un-hooked value. Only uses that gradients flow back from count.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat, _state
from jhop._contract import HookFn, is_inexact
from jhop._errors import HookError
from jhop._graph import hooks_in
from jhop._guards import Guards
from jhop._interp import inner_jaxprs
from jhop._lookups import Lookups
from jhop._point import hook_p
from jhop._source import describe_hook, hook_name, is_user_file, origin_of, user_frame
from jhop._static import Static
from jhop._trace_wrapped import trace_wrapped_p


def strict(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function like `fn` that refuses to use a value past the hook on it.

    Only uses of what `jhop.hook` returns are hooked. A later use of the value that it was given is mostly a mistake;
    here it is an error. Uses before the hook, in the order of the program, are none; nor are those that no gradient
    comes back from (`x > 0.0`, `jax.lax.stop_gradient(x)`). What `jhop.hook_fn` hooks may be used elsewhere: its hooks
    are on what one function takes and returns.

    Args:
        fn: a function of JAX that `jax.jit` could trace, to be differentiated: `jax.grad(jhop.strict(loss))`, and not
            `jhop.strict(jax.grad(loss))`. Its arguments may be pytrees of arrays, which are traced, and other objects.

    Returns:
        The function. It traces `fn` once more, for each kind of arguments (structure, shapes, dtypes, other objects),
        and again when what `fn` looks up has changed (a list of hooks, a flag, a global). It looks at loops, branches
        and jitted functions in it, too. Then it calls `fn` as it is, in any transformation.

    Raises:
        HookError: `fn` is not callable. At a call: the value from before a hook is used, or returned, after it; the
            message names the hook and both lines. Or `fn` itself differentiates the function with the hook, where uses
            cannot be told any more.

    Example:
        >>> import jax, jhop
        >>> @jhop.strict
        ... def loss(x):
        ...     hooked = jhop.hook(x, lambda ct: ct.clip(-1.0, 1.0))
        ...     return hooked ** 2 + x
        >>> try:
        ...     jax.grad(loss)(3.0)
        ... except jhop.HookError as error:
        ...     print(str(error).partition(" (")[0])
        jhop.strict: `loss` uses a value past hook `<lambda>`

    There is no counterpart in PyTorch: a hook on a tensor sees all its uses, whenever it is registered.
    """
    if not callable(fn):
        raise HookError(f"jhop.strict: expected a function, got {type(fn).__name__} ({fn!r}).")
    seen = _Seen()

    def checked(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        key = (tree, *(jax.typeof(leaf) if _is_traced(leaf) else Static(leaf) for leaf in leaves))
        with _state.LOCK:  # another thread may be tracing, with symbols in objects that both read
            if (guards := seen.guards.get(key)) is None or not guards.hold():
                seen.guards.pop(key, None)
                if (found := _check(fn, leaves, tree)) is not None:
                    seen.guards[key] = found
        return fn(*args, **kwargs)

    return functools.update_wrapper(checked, fn, updated=())


class _Seen:
    """The kinds of arguments that were checked, and how long that holds; no state of the function, on which a compiled
    program might depend.
    """

    __slots__ = ("guards",)

    def __init__(self) -> None:
        self.guards: dict[Any, Guards] = {}


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, _compat.Tracer) or (isinstance(leaf, (jax.Array, np.ndarray)) and is_inexact(leaf.dtype))


def _check(fn: Callable[..., Any], leaves: list[Any], tree: Any) -> Guards | None:
    """Raises HookError where a function uses a value past a hook; tells when the function is still the same.

    It is None where there are values of another trace in the function.
    """
    traced = [i for i, leaf in enumerate(leaves) if _is_traced(leaf)]

    def of_traced(*values: Any) -> Any:
        given = list(leaves)
        for i, value in zip(traced, values, strict=True):
            given[i] = value
        args, kwargs = jax.tree.unflatten(tree, given)
        # Results that are no arrays are nobody's gradient.
        return [out for out in jax.tree.leaves(fn(*args, **kwargs)) if isinstance(out, jax.Array)]

    lookups = Lookups([(hook_name(fn), fn)])
    with lookups.tracing():
        jaxpr = jax.make_jaxpr(of_traced)(*(leaves[i] for i in traced))
    _look(jaxpr, hook_name(fn))
    guards = lookups.guards([hook.base for hook, _ in hooks_in(jaxpr)], jaxpr)
    return None if lookups.walk.tracers or lookups.walk.holds_tracer else guards


class _Point(NamedTuple):
    """A hook on a variable."""

    hook: HookFn
    eqn: Any


def _look(jaxpr: Any, name: str) -> dict[int, _Point]:
    """Which inputs of a jaxpr have a hook in it. Raises HookError where one is used past its hook."""
    opened, _ = _compat.open_jaxpr(jaxpr)
    hooked: dict[Any, _Point] = {}
    live = _live(opened)
    for eqn in opened.eqns:
        for atom in _variables(eqn.invars):
            if atom in hooked and (use := _use(eqn, atom, live)) is not None:
                raise _error(name, hooked[atom], f"used after it, {_place(use)}")
        if eqn.primitive is trace_wrapped_p and _is_point(eqn.params["fn"]):
            raise HookError(
                f"jhop.strict: `{name}` differentiates the function with {describe_hook(eqn.params['fn'].base)} in it, "
                "after which nobody can tell what the hook is on. Wrap that function: jax.grad(jhop.strict(loss)), and "
                "not jhop.strict(jax.grad(loss))."
            )
        if eqn.primitive is hook_p and not eqn.params["fn"].options.around:
            point = _Point(eqn.params["fn"], eqn)
            hooked |= dict.fromkeys(_variables(eqn.invars[: eqn.params["n"]]), point)
        for inner, places in _inner(eqn):
            found = _look(inner, name)
            for place, point in ((places[i][0], point) for i, point in found.items() if i in places and places[i][1]):
                hooked |= dict.fromkeys(_variables([eqn.invars[place]]), point)
    for atom in _variables(opened.outvars):
        if atom in hooked:
            raise _error(name, hooked[atom], "returned after it")
    return {i: hooked[variable] for i, variable in enumerate(opened.invars) if variable in hooked}


def _is_point(hook: HookFn) -> bool:
    if hook.options.around:
        return False
    key = hook.key
    while isinstance(key[1], tuple) and key[0] not in ("point", "hook"):
        key = key[1]
    return "point" in (key[0], key[-1])


def _live(opened: Any) -> set[Any]:
    """The variables of a jaxpr from which gradients flow back, if there are gradients of its results."""
    live = {variable for variable in _variables(opened.outvars) if is_inexact(variable.aval.dtype)}
    for eqn in reversed(opened.eqns):
        if _flows(eqn, live):
            n = eqn.params["n"] if eqn.primitive is hook_p else len(eqn.invars)  # after these, what a hook closes over
            live |= {variable for variable in _variables(eqn.invars[:n]) if is_inexact(variable.aval.dtype)}
    return live


def _flows(eqn: Any, live: set[Any]) -> bool:
    return eqn.primitive.name != "stop_gradient" and not live.isdisjoint(eqn.outvars)


def _use(eqn: Any, variable: Any, live: set[Any]) -> Any:
    """The equation, here or inside, by which gradients flow back to a variable; None if there is none."""
    if not _flows(eqn, live):
        return None
    if eqn.primitive is hook_p and variable not in _variables(eqn.invars[: eqn.params["n"]]):
        return None
    inner = list(_inner(eqn))
    for jaxpr, places in inner:
        opened, _ = _compat.open_jaxpr(jaxpr)
        within = _live(opened)
        for i, (place, _same) in places.items():
            if eqn.invars[place] is not variable:
                continue
            own = opened.invars[i]
            uses = (_use(step, own, within) for step in opened.eqns if own in _variables(step.invars))
            found = next((use for use in uses if use is not None), None)
            if found is not None and is_user_file(opened.debug_info.func_filename or ""):
                return found
            if found is not None or own in _variables(opened.outvars):
                return eqn  # what is inside of a library's function has the place of its first use anywhere
    return None if inner else eqn


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, jex_core.Literal)]


def _inner(eqn: Any) -> Iterator[tuple[Any, dict[int, tuple[int, bool]]]]:
    """The jaxprs inside an equation.

    With each, by index of its inputs, which input of the equation it is, and whether it is that very value: not one of
    the values that it has in the course of a loop.
    """
    n = len(eqn.invars)
    params = eqn.params
    for jaxpr in inner_jaxprs(eqn):
        n_inner = len(_compat.open_jaxpr(jaxpr)[0].invars)
        if eqn.primitive.name == "scan":
            consts, _ = _compat.scan_split(params)
            yield jaxpr, {i: (i, i < consts) for i in range(n_inner)}
        elif eqn.primitive.name == "while":
            consts, bodies = params["cond_nconsts"], params["body_nconsts"]
            of_body = jaxpr is params["body_jaxpr"]
            own, start = (bodies, consts) if of_body else (consts, 0)
            carry = consts + bodies - own
            yield jaxpr, {i: (start + i, True) if i < own else (carry + i, False) for i in range(n_inner)}
        elif n_inner <= n:  # all of its operands, or all but what chooses a branch
            yield jaxpr, {i: (n - n_inner + i, True) for i in range(n_inner)}
        else:
            yield jaxpr, {}


def _place(eqn: Any) -> str:
    """Where an equation is in the user's code, in words."""
    frame = user_frame(eqn)
    if frame is None:
        return f"by `{eqn.primitive.name}`"
    origin = origin_of(*frame)
    return f"at {os.path.basename(origin.file)}:{origin.line}" + (f" (`{origin.text}`)" if origin.text else "")


def _error(name: str, point: _Point, use: str) -> HookError:
    return HookError(
        f"jhop.strict: `{name}` uses a value past {describe_hook(point.hook.base)}. The value is hooked "
        f"{_place(point.eqn)}, and as it was before the hook it is {use}: gradients from there do not pass the hook. "
        "Use what jhop.hook returns, by binding it to the same name: x = jhop.hook(x, f)."
    )
