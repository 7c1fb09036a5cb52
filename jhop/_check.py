"""`jhop.check`: an assertion about traced values.

While JAX traces, a check is one equation without results, whose effect keeps it from being dropped. Rules say what it
is under each transformation; `_discharge` turns the equations of a graph that jhop compiles into outputs of it, which
are looked at after each run. Under `jax.experimental.checkify` it is a check of that.
"""

from __future__ import annotations

import contextlib
import os
import string
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.interpreters import ad, batching

from jhop import _compat
from jhop._contract import HookFn
from jhop._errors import CheckError, JhopError
from jhop._late import is_late
from jhop._scalar import is_scalar
from jhop._source import describe_hook, is_user_file, origin_of, peeled
from jhop._trace_wrapped import run_pure, trace_wrapped_p
from jhop._watched import thread


def check(pred: Any, msg: str, **fmt: Any) -> None:
    """Raises an error if a condition does not hold, also where the condition is known only once a program ran.

    It may stand in a hook, or in a function that is hooked. On values it raises at once. In what `jhop.jit`,
    `jhop.compile` or `jhop.compiled_autograd.enable` compile, it is part of the program, which tells after each run
    whether all checks held: in loops at any iteration, under `jax.vmap` for any example, of branches in the one that
    was taken. If not, the first one that failed is raised, and nothing is written: no Python state, no `.grad`. A
    function that has checks waits for the device at each call; one that has none is not changed by anything.

    Args:
        pred: a bool or an array of bools of any shape, all of which must hold.
        msg: what the error says. Where there are values, `msg.format(**fmt)`.
        **fmt: arrays and numbers of any shape and dtype, and pytrees of them, for the message; other objects are
            shown as they were when the function was traced. Those that `msg` does not mention are added to it.

    Raises:
        CheckError: `pred` does not hold. It names the line of the check, and has the values as `error.values`.
        JhopError: `pred` is not of bools, or `msg` cannot be formatted with these values. Also when a function with
            checks is compiled by JAX alone (`jax.jit`, or a `scan` or `cond` outside of any jit): compile it with
            `jhop.jit`, or have `jax.experimental.checkify.checkify` look at the checks.

    Example:
        >>> import jax, jhop
        >>> def bounded(ct):
        ...     jhop.check(abs(ct) < 10.0, "gradient is {ct:.1f}", ct=ct)
        >>> grad = jhop.jit(jax.grad(lambda x: jhop.hook(x, bounded) ** 2))
        >>> float(grad(2.0))
        4.0
        >>> try:
        ...     grad(6.0)
        ... except jhop.CheckError as error:
        ...     print(error.values)
        {'ct': 12.0}

    The counterpart in PyTorch is `assert` in a hook, and `torch._assert_async` in what is compiled (rule 36).
    """
    pred = _unwrapped(np.asarray(pred) if isinstance(pred, bool) else pred)
    if getattr(pred, "dtype", None) != np.dtype(bool):
        kind = f"an array of {pred.dtype}" if hasattr(pred, "dtype") else type(pred).__name__
        raise JhopError(f"jhop.check: expected a bool or an array of bools, got {kind}. Compare it with something.")
    leaves, tree = jax.tree.flatten(fmt)
    leaves = list(map(_unwrapped, leaves))
    moving = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    fixed = {i: leaf for i, leaf in enumerate(leaves) if i not in moving}
    site = Site(msg, tree, fixed, moving, _place())
    site.refuse_bad_text()
    staged = _compat.staging() is not None or isinstance(pred, _compat.Tracer)
    if not isinstance(pred, _compat.Tracer) and pred.all():
        return
    values = [leaves[i] for i in moving]
    if not staged and not any(isinstance(value, _compat.Tracer) for value in values):
        raise site.error(values)
    failed = jnp.logical_not(jnp.all(pred) if pred.ndim else pred).astype(jnp.int32)
    bind_check(failed, values, site)


def _unwrapped(value: Any) -> Any:
    """A value for a message: an array, if one can stand for it in a program; Python numbers stay what they are."""
    value = getattr(value, "__jhop_array__", value)  # a Tensor counts as its array
    if is_late(value):
        return str(value)
    if is_scalar(value):
        return jnp.asarray(value)
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and _compat.has_arrays_of(value.dtype))


class Site:
    """One check in the user's code. Equal only to itself.

    Attributes:
        title: what it is and where, in words.
    """

    def __init__(self, msg: str, tree: Any, fixed: dict[int, Any], moving: list[int], place: str):
        self._msg = msg
        self._tree = tree
        self._fixed = fixed
        self._moving = moving
        self.title = f"jhop.check {place}"
        self._place = place

    def refuse_bad_text(self) -> None:
        """Raises JhopError where the message cannot be made."""
        if not isinstance(self._msg, str):
            raise JhopError(f"jhop.check: expected a message as second argument, got {type(self._msg).__name__}.")
        unknown = sorted(self._mentioned() - set(self._values([0] * len(self._moving))))
        if unknown and self._tree.num_leaves:
            names = ", ".join(f"`{name}`" for name in unknown)
            raise JhopError(f"jhop.check: the message names {names}, of which no value was given: {self._msg!r}.")

    def _mentioned(self) -> set[str]:
        """The values that the message names."""
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(self._msg) if field is not None]
        except ValueError as error:
            if not self._tree.num_leaves:
                return set()  # it is not formatted
            raise JhopError(f"jhop.check: cannot format the message {self._msg!r}: {error}.") from None
        return {field.partition(".")[0].partition("[")[0] for field in fields}

    def _values(self, arrays: Any) -> dict[str, Any]:
        leaves = {**self._fixed, **dict(zip(self._moving, arrays, strict=True))}
        return jax.tree.unflatten(self._tree, [leaves[i] for i in range(len(leaves))])

    def error(self, arrays: Sequence[Any]) -> CheckError:
        """The error for the values of its arrays."""
        values = self._values([_readable(array) for array in arrays])
        message = self._msg
        if values:
            try:
                message = message.format(**values)
            except Exception as error:  # a format that does not fit: the check's own news come first
                message = f"{message} (cannot be formatted: {error})"
            mentioned = self._mentioned()
            rest = [f"{name} = {value}" for name, value in values.items() if name not in mentioned]
            message += f" ({', '.join(rest)})" if rest else ""
        given = {name: jax.tree.map(_as_python, value) for name, value in values.items()}
        return CheckError(f"jhop.check failed {self._place}: {message}", given)


def _readable(array: Any) -> Any:
    """An array as a message shows it: a scalar with the digits that its dtype has, in a type that takes formats."""
    array = np.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    return array if array.ndim else array[()]


def _as_python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _place() -> str:
    """Where the user's code calls jhop.check, in words."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    where = origin_of(frame.f_code, frame.f_lasti)
    place = f"in `{where.function.rpartition('<locals>.')[2]}` ({os.path.basename(where.file)}:{where.line})"
    hook = thread.current.hook if thread.current is not None else None
    if hook is None or getattr(peeled(hook), "__code__", None) is frame.f_code:
        return place
    return f"{place}, called by {describe_hook(hook)}"


class Placed(NamedTuple):
    """A site, and which of an equation's arrays, or a record's, it has its message of."""

    site: Any
    places: tuple[int, ...]


def find_failed(failed: Any, values: Sequence[Any], sites: Sequence[Placed]) -> CheckError | None:
    """The error of the check that failed.

    Args:
        failed: which of `sites` it was, from 1 on; 0 if none was.
        values: the arrays.
    """
    number = int(failed)
    if number == 0:
        return None
    site, places = sites[number - 1]
    return site.error([values[i] for i in places])


# The equation: which of its sites failed (from 1 on; 0 for none), then arrays.


class _CheckEffect(jex_core.Effect):
    """What keeps a check from being dropped."""

    def __repr__(self) -> str:
        return "Check"


_EFFECT = _CheckEffect()
_compat.allow_effect(_CheckEffect)
check_p = jex_core.Primitive("check")
check_p.multiple_results = True
check_p.is_effectful = lambda _params: True


def bind_check(failed: Any, values: Sequence[Any], site: Any) -> None:
    """Puts a check into what is traced, or makes it.

    Args:
        failed: 1 if it failed, 0 if not, of int32.
        values: arrays.
        site: has a `title`, and makes an `error` of the arrays.
    """
    check_p.bind(failed, *map(jnp.asarray, values), sites=(Placed(site, tuple(range(len(values)))),))


def has_checks(jaxpr: Any) -> bool:
    """Whether there are checks in a jaxpr or an equation, at any depth."""
    return _EFFECT in jaxpr.effects


def _check_impl(failed: Any, *values: Any, sites: Any) -> list[Any]:
    error = find_failed(failed, values, sites)
    if error is not None:
        raise error
    return []


def _check_abstract_eval(*avals: Any, sites: Any) -> Any:
    return [], {_EFFECT}


def _check_jvp(primals: Any, tangents: Any, *, sites: Any) -> Any:
    return check_p.bind(*primals, sites=sites), []


def _check_linearize(nonzero: Any, *primals: Any, sites: Any) -> Any:
    return check_p.bind(*primals, sites=sites), [], [], lambda residuals, *tangents: []


def _check_batch(args: Any, dims: Any, *, sites: Any) -> Any:
    failed, *values = args
    lane = jnp.int32(0)
    if dims[0] is not None:
        lane = jnp.argmax(failed != 0)  # the first that is
        failed = failed[lane]
    values = [
        value if dim is None else jax.lax.dynamic_index_in_dim(value, lane, dim, keepdims=False)
        for value, dim in zip(values, dims[1:], strict=True)
    ]
    return check_p.bind(failed, *values, sites=sites), []


def _check_lowered(*args: Any, sites: Any) -> list[Any]:
    raise JhopError(
        f"{sites[0].site.title} is in a function that was compiled by JAX alone (jax.jit, or a loop outside of "
        "any jit), where nobody looks at whether it holds. Compile the function with `jhop.jit`, or wrap it in "
        "`jax.experimental.checkify.checkify`, which returns the error."
    )


check_p.def_impl(_check_impl)
check_p.def_effectful_abstract_eval(_check_abstract_eval)
ad.primitive_jvps[check_p] = _check_jvp
_compat.def_linearize(check_p, _check_linearize)
batching.primitive_batchers[check_p] = _check_batch
_compat.register_lowering(check_p, _check_lowered, multiple_results=True)


# jax.experimental.checkify


class _Text(str):
    """A message that is not formatted as texts are."""

    site: Any

    def format(self, *arrays: Any, **_: Any) -> str:
        return str(self.site.error(arrays))


def _check_for_checkify(*args: Any, sites: Any) -> Any:
    def run(failed: Any, *values: Any) -> list[Any]:
        for number, (site, places) in enumerate(sites, 1):
            text = _Text(site.title)
            text.site = site
            checkify.check(failed != number, text, *(values[i] for i in places))
        return []

    return jax.make_jaxpr(run)(*args)


class _Thread(threading.local):
    capturing = False


_thread = _Thread()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While active, hooks stay opaque to checkify, as somebody else will inline them and their checks."""
    before, _thread.capturing = _thread.capturing, True
    try:
        yield
    finally:
        _thread.capturing = before


def _hook_for_checkify(*args: Any, fn: HookFn, out_avals: Any) -> Any:
    """A hook as checkify sees it: its equations, if it can be traced here; else it stays as it is."""
    if _thread.capturing:
        return None
    try:
        return jax.make_jaxpr(lambda *values: run_pure(fn, values))(*args)
    except JhopError:  # told where it is compiled, if it still is wrong there
        return None


_compat.register_checkify(check_p, _check_for_checkify)
_compat.register_checkify(trace_wrapped_p, _hook_for_checkify)
