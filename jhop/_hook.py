"""Lists of hooks, their handles, and hook points that read such a list.

Two identities put hooks on a value; both send its summed cotangent through `trace_wrapped`, so both enter one pipeline:

- `tensor_point`, behind a Tensor inside a compiled function: a `jax.custom_vjp` identity whose backward rule reads the
  Tensor's hook list when the backward is traced, so that a hook registered after a use still sees the whole sum.
- `hook_p`, behind `jhop.hook` (see `_point`).
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop._errors import HookError, JhopError
from jhop._hook_options import takes_none
from jhop._trace_wrapped import trace_wrapped

_ids = itertools.count()
_changes = threading.local()


def changes() -> int:
    """How often this thread has changed hook lists: a trace in which a hook did that must not serve another run."""
    return getattr(_changes, "count", 0)


class HookList:
    """Hooks of one value, in order of registration. Compared by identity: it is a parameter of JAX functions.

    Attributes:
        groups: hooks that it shares with other values (`_gates.Group`), by the ids of their handles; None before.
        of_several: whether the value is one of several results of an operation inside a function that is traced.
        retained: which of the gradients that such a function retains is that of the value, after all hooks.
    """

    __slots__ = ("__weakref__", "_hooks", "groups", "of_several", "retained")

    def __init__(self) -> None:
        self._hooks: dict[int, Callable[..., Any]] = {}
        self.groups: dict[int, Any] | None = None
        self.of_several = False
        self.retained: int | None = None

    def add(self, fn: Callable[..., Any], where: str = "register_hook") -> RemovableHandle:
        """Registers a hook; the same function may be registered twice and then runs twice.

        Raises:
            HookError: `fn` is not callable.
        """
        if not callable(fn):
            raise HookError(f"{where}: expected a callable hook, got {type(fn).__name__} ({fn!r}).")
        handle = RemovableHandle(self)
        self._hooks[handle.id] = fn
        _changes.count = changes() + 1
        return handle

    def remove(self, handle_id: int) -> None:
        if self._hooks.pop(handle_id, None) is not None:
            _changes.count = changes() + 1

    def ids(self) -> tuple[int, ...]:
        """The ids of the hooks' handles."""
        return tuple(self._hooks)

    def snapshot(self) -> tuple[Callable[..., Any], ...]:
        """The hooks as of now: one removed or added by a running hook counts from the next backward on."""
        return tuple(self._hooks.values())

    def of_none(self) -> list[Callable[..., Any]]:
        """Those that are called with None where nothing reaches the value but its node runs."""
        return [fn for fn in self._hooks.values() if takes_none(fn)]

    def split(self, handle_id: int) -> tuple[HookList, HookList]:
        """Those that were registered before and those that were after a handle was made."""
        before, after = HookList(), HookList()
        for own, fn in self._hooks.items():
            (before if own < handle_id else after)._hooks[own] = fn
        return before, after

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)


class RemovableHandle:
    """Removes its hook with `remove()`, or at the end of a `with` block.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([3.0], requires_grad=True)
        >>> with x.register_hook(lambda ct: ct * 10.0):
        ...     (x * 2.0).backward(jax.numpy.ones(1))
        >>> x.grad.tolist()
        [20.0]
    """

    __slots__ = ("__weakref__", "_hooks", "id")

    def __init__(self, hooks: Any):
        self._hooks: Callable[[], Any] = weakref.ref(hooks)  # what has `remove(id)`
        self.id = next(_ids)

    def follow(self, other: RemovableHandle) -> None:
        """From now on this handle removes what another one does."""
        self._hooks, self.id = other._hooks, other.id

    def refuse(self, message: str) -> None:
        """From now on `remove` raises JhopError."""

        class Compiled:
            @staticmethod
            def remove(handle_id: int) -> None:
                raise JhopError(message)

        self._hooks = Compiled

    def remove(self) -> None:
        """Removes the hook; a second call does nothing.

        Raises:
            JhopError: outside of a compiled function, for a hook that the function put on a value inside it.
        """
        hooks = self._hooks()
        if hooks is not None:
            hooks.remove(self.id)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()


def run_hooks(ct: Any, hooks: HookList, *, kind: str = "tensor_pre_hook") -> Any:
    """Sends a cotangent through hooks in order of registration."""
    for fn in hooks.snapshot():
        ct = trace_wrapped(ct, fn=fn, kind=kind)
    return ct


# -- tensor_point ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tensor_point(hooks: HookList, x: Any) -> Any:
    """Identity on a Tensor's array; its cotangent passes through the Tensor's hooks."""
    return x


def _tensor_point_fwd(hooks: HookList, x: Any) -> tuple[Any, None]:
    return x, None


def _tensor_point_bwd(hooks: HookList, _: None, ct: Any) -> tuple[Any]:
    # Runs when the backward is traced, which is after the whole forward function has run.
    ct = run_hooks(ct, hooks)
    return (ct if hooks.retained is None else retained_p.bind(ct, place=hooks.retained),)


# A mark in the backward of a function that is being traced, at a gradient that it retains. It is taken out again.
retained_p = jex_core.Primitive("retained")
retained_p.def_impl(lambda ct, *, place: ct)
retained_p.def_abstract_eval(lambda ct, *, place: ct)
tensor_point.defvjp(_tensor_point_fwd, _tensor_point_bwd)


def is_tensor_point(eqn: Any) -> bool:
    """Whether an equation is a `tensor_point`."""
    return getattr(eqn.params.get("bwd"), "f", None) is _tensor_point_bwd
