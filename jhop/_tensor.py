"""`Tensor`: an array that records what is done to it, and knows its gradient and hooks.

Operations on Tensors are JAX functions that were lifted (`_lift.lift`). Outside compiled functions each makes one node
of the tape; inside, a Tensor wraps a tracer and every result is a hook point (`_hook.tensor_point`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat, _engine, _gradients
from jhop._edges import request_for, seed_of
from jhop._errors import HookError, JhopError
from jhop._hook import HookList, RemovableHandle
from jhop._hook_options import adapted, takes_none
from jhop._leaves import declare_state
from jhop._node import AccumulateGrad, Edge, Node, inside
from jhop._source import warn
from jhop._values import Values, array_of, check_floating, check_like


class Tensor(Values):
    """An array on the tape. Make one with `jhop.tensor`.

    Attributes:
        value: the `jax.Array`. A leaf may get another of its shape and dtype, which recorded graphs do not see.
        grad: the accumulated gradient, a `jax.Array` of the Tensor's shape and dtype, or None.
        requires_grad: whether gradients flow to or through it.
        grad_fn: the node that made it; None for leaves.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
        >>> handle = x.register_hook(lambda grad: grad * 10.0)
        >>> (x * 3.0).sum().backward()
        >>> x.grad.tolist()
        [30.0, 30.0]

    The counterpart in PyTorch is `torch.Tensor`.
    """

    __slots__ = (
        "__weakref__", "_accumulate", "_grad", "_hooks", "_node", "_post_hooks", "_requires_grad", "_retains", "_slot",
        "_trace", "_value",
    )  # fmt: skip
    __array_priority__ = 1000  # NumPy leaves binary operators to us

    def __init__(self, value: Any, requires_grad: bool = False, node: Node | None = None, slot: int = 0):
        self._value = value
        self._requires_grad = requires_grad
        self._node = node
        self._slot = slot
        self._grad: Any = None
        self._hooks: HookList | None = None
        self._post_hooks: HookList | None = None
        self._accumulate: Any = None  # weak reference to the AccumulateGrad node of a leaf
        self._retains = False
        self._trace: Any = None  # the compiled function that is being traced, for a Tensor inside one

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def value(self) -> Any:
        trace = inside()
        return self._value if trace is None else trace.value_of(self)

    @value.setter
    def value(self, value: Any) -> None:
        self._outside("Assigning to .value")
        if not self.is_leaf:
            raise JhopError("Tensor.value: only a leaf can get another value; this Tensor is the result of others.")
        array = array_of(value, "Tensor.value: expected an array or a Tensor")
        check_like(array, self, "Tensor.value")
        self._value = jnp.asarray(array)

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad

    @property
    def is_leaf(self) -> bool:
        return self._node is None if self._trace is None else self._trace.is_leaf(self)

    @property
    def grad_fn(self) -> Node | None:
        if self._trace is not None and self._requires_grad:
            raise JhopError(
                "Tensor.grad_fn: inside a function that jhop.compile traces Tensors have no nodes: a call of it is one "
                "node. Use the grad_fn of what the function returns."
            )
        return self._node

    @property
    def retains_grad(self) -> bool:
        return self._retains

    @property
    def grad(self) -> Any:
        if self._trace is not None:
            self._trace.refuse_grad_of(self)
        _gradients.use(self, "reads")
        return self._grad

    @grad.setter
    def grad(self, grad: Any) -> None:
        self._outside("Assigning to .grad")
        _gradients.use(self, "writes")
        if grad is not None:
            array = array_of(grad, "Tensor.grad: expected an array or None")
            if not isinstance(array, _compat.Tracer):  # a hook that is being traced: its result is checked as a whole
                check_like(array, self, "Tensor.grad")
            grad = grad if isinstance(grad, Tensor) else jnp.asarray(array)
        self._grad = grad

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _outside(self, where: str) -> None:
        """Refuses what has no meaning while a compiled function is traced."""
        if self._trace is not None or inside() is not None:
            raise JhopError(
                f"{where} inside a function that jhop.compile traces would happen once and not at every call. Do it "
                "outside, before or after the call."
            )

    def _need_grad(self, where: str) -> None:
        if not self._requires_grad:
            raise HookError(
                f"{where}: this Tensor does not require grad, so no gradient will ever pass here. Make it with "
                "jhop.tensor(..., requires_grad=True), or call requires_grad_() first."
            )

    def register_hook(
        self, fn: Callable[[Any], Any], *, zeros: str = "skip", torch_complex: bool = False
    ) -> RemovableHandle:
        """Registers `fn(grad) -> grad | None`, run once per backward on the summed gradient of this Tensor.

        Args:
            fn: gets an array of this Tensor's shape and dtype and returns another, or None to keep it.
            zeros: what happens in a pass that reaches another result of the operation which made this Tensor, but not
                this one: with "skip" nothing, with "none" `fn(None)` is called, as in PyTorch, and must return None.
            torch_complex: whether `fn` gets and returns complex gradients in PyTorch's convention, in which the
                gradient is the direction of steepest ascent: the conjugate of JAX's.

        Returns:
            A handle whose `remove()` removes the hook.

        Raises:
            HookError: `fn` is not callable, the Tensor does not require grad, or an option is none of those above; or
                it is `zeros="none"` for one of several results of an operation inside a function that `jhop.compile`
                traces. During the pass: what `fn` returned does not fit.

        Example:
            >>> import jhop
            >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
            >>> _ = x.register_hook(lambda grad: grad * 5.0)
            >>> (x * 3.0).sum().backward()
            >>> x.grad.tolist()
            [15.0, 15.0]

        The counterpart in PyTorch is `torch.Tensor.register_hook`.
        """
        self._need_grad("Tensor.register_hook")
        if torch_complex or zeros != "skip":
            fn = adapted("Tensor.register_hook", fn, zeros, torch_complex)
        if self._trace is None and inside() is not None:
            return inside().enter(self).register_hook(fn)
        if self._trace is not None:
            self._trace.refuse_after("Tensor.register_hook")
        hooks = self._hook_list()
        if takes_none(fn) and hooks.of_several:
            raise HookError(
                "Tensor.register_hook: zeros='none' on one of several results of an operation inside a function that "
                "jhop.compile traces: which of them a pass reaches is not known there. Return the Tensor and register "
                "the hook on what the compiled function returns, or leave out zeros."
            )
        handle = hooks.add(fn, "Tensor.register_hook")
        if self._trace is not None:
            self._trace.handles.append(weakref.ref(handle))
        return handle

    def _hook_list(self) -> HookList:
        """Where its hooks are, outside of compiled functions."""
        if self._node is not None:
            return self._node.hooks_at(self._slot)
        if self._hooks is None:
            self._hooks = HookList()
        return self._hooks

    def _place(self) -> Callable[[], Edge | None]:
        """What tells where its cotangent goes, as long as something on the tape leads there; keeps nothing alive."""
        if self._node is not None:
            node, slot = weakref.ref(self._node), self._slot
            return lambda: None if (found := node()) is None else Edge(found, slot)
        leaf = weakref.ref(self)

        def end() -> Edge | None:
            tensor = leaf()
            found = tensor._accumulate() if tensor is not None and tensor._accumulate is not None else None
            return None if found is None else Edge(found, 0)

        return end

    def register_post_accumulate_grad_hook(self, fn: Callable[[Tensor], None]) -> RemovableHandle:
        """Registers `fn(tensor)`, run after this leaf's `.grad` was updated.

        Raises:
            HookError: `fn` is not callable, or the Tensor is no leaf that requires grad.
        """
        self._outside("Tensor.register_post_accumulate_grad_hook")
        self._need_grad("Tensor.register_post_accumulate_grad_hook")
        if not self.is_leaf:
            raise HookError(
                "Tensor.register_post_accumulate_grad_hook: only leaves accumulate gradients; this Tensor was made by "
                f"{self._node!r}. Use register_hook."
            )
        if self._post_hooks is None:
            self._post_hooks = HookList()
        return self._post_hooks.add(fn, "Tensor.register_post_accumulate_grad_hook")

    def retain_grad(self) -> None:
        """Makes a later backward store this Tensor's gradient in `.grad`, after its hooks. Nothing new for leaves.

        Inside a function that `jhop.compile` traces it is for Tensors that the function returns, whose results at each
        call then retain theirs, and for its arguments.

        Raises:
            HookError: the Tensor does not require grad; or a function that `jhop.compile` traces called it on a value
                which it did not return.

        Example:
            >>> import jhop
            >>> @jhop.compile
            ... def fn(x):
            ...     y = x * 3.0
            ...     y.retain_grad()
            ...     return y, y * y
            >>> y, z = fn(jhop.tensor(2.0, requires_grad=True))
            >>> z.backward()
            >>> float(y.grad)
            12.0

        The counterpart in PyTorch is `torch.Tensor.retain_grad`.
        """
        self._need_grad("Tensor.retain_grad")
        trace = inside() or self._trace
        if trace is not None:
            trace.retain(self if self._trace is not None else trace.enter(self))
            return
        if self._node is not None and not self._retains:
            self._node.retain_at(self._slot, self)
            self._retains = True

    # -- backward ------------------------------------------------------------------------------------------------------

    def backward(
        self, gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
    ) -> None:
        """Runs the backward pass from this Tensor; leaves accumulate into `.grad`.

        Args:
            gradient: the cotangent to start with, of this Tensor's shape and dtype (an array or a Tensor); may be left
                out for a scalar.
            retain_graph: keep what was saved, so that backward can run again; by default, as `create_graph`.
            create_graph: record the pass itself: hooks get and may return Tensors, `.grad` becomes a Tensor, and both
                can be differentiated again.
            inputs: a Tensor or a sequence of Tensors: only the nodes on paths to them run, and only they accumulate.
                A Tensor among them that is no leaf retains its gradient from then on. There may be edges (`jhop.edge`)
                among them, of which only those of leaves accumulate.

        Raises:
            JhopError: no gradient was given for a non-scalar, it has another shape or dtype, the Tensor or one of
                `inputs` does not require grad, or the graph was freed by an earlier backward. Nothing was written then.

        Example:
            >>> import jhop
            >>> x = jhop.tensor(3.0, requires_grad=True)
            >>> (x * x * x).backward(create_graph=True)
            >>> slope, x.grad = x.grad, None
            >>> slope.backward()
            >>> float(slope), float(x.grad)
            (27.0, 18.0)
        """
        self._outside("Tensor.backward")
        seeds = [(self._edge("backward"), seed_of(self, gradient, create_graph))]
        _engine.backward(request_for(seeds, retain_graph, create_graph, inputs))

    def _edge(self, where: str) -> Edge:
        """Where this Tensor's cotangent goes."""
        if not self._requires_grad:
            raise JhopError(
                f"{where}: this Tensor does not require grad and was not made from one that does, so there is nothing "
                "to differentiate."
            )
        if self._node is not None:
            return Edge(self._node, self._slot)
        node = self._accumulate() if self._accumulate is not None else None
        if node is None:
            node = AccumulateGrad(self, jax.typeof(self._value))
            self._accumulate = weakref.ref(node)
        return Edge(node, 0)

    def detach(self) -> Tensor:
        """A Tensor of the same value that takes no part in this graph; hooks stay behind."""
        if self._trace is not None:
            return self._trace.result(self._value, False)
        return Tensor(self._value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Sets whether gradients are wanted for this leaf; returns the Tensor."""
        self._outside("Tensor.requires_grad_")
        if not self.is_leaf and not requires_grad:
            raise JhopError("Tensor.requires_grad_: only a leaf can stop requiring grad; use detach().")
        if requires_grad:
            check_floating(self.dtype, "Tensor.requires_grad_")
        self._requires_grad = requires_grad or not self.is_leaf
        return self

    # -- as an object --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Tensor]:
        if self.ndim == 0:
            raise TypeError("iteration over a 0-d Tensor")
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A leaf of the same value and gradient; hooks stay behind, as in PyTorch."""
        if not self.is_leaf:
            raise JhopError("copy.deepcopy: only leaf Tensors can be copied; this one is part of a graph. detach() it.")
        copied = Tensor(self._value, requires_grad=self._requires_grad)
        copied._grad = self._grad
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        if not self.is_leaf:
            raise JhopError("pickle: only leaf Tensors can be pickled; this one is part of a graph. detach() it first.")
        if self._hooks or self._post_hooks:
            warn("pickle: a Tensor's hooks are not pickled with it. Register them anew on what is loaded.")
        return functools.partial(tensor, requires_grad=self._requires_grad), (np.asarray(self._value),)

    def __repr__(self) -> str:
        text = repr(self._value).replace("Array(", "jhop.tensor(", 1)
        if isinstance(self._value, _compat.Tracer):
            text = f"jhop.tensor({self._value})"
        end = f", grad_fn={self._node!r})" if self._node is not None else ", requires_grad=True)"
        return f"{text[:-1]}{end}" if self._requires_grad else text


declare_state(Tensor, "_value", "_grad", "_requires_grad")


def tensor(data: Any, *, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """Makes a leaf Tensor.

    Args:
        data: anything that `jax.numpy.asarray` takes, or a Tensor (whose value is taken).
        dtype: as for `jax.numpy.asarray`.
        requires_grad: whether a backward pass accumulates into its `.grad`.

    Returns:
        A leaf of the data's shape.

    Raises:
        JhopError: `requires_grad` for an integer or bool dtype.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([2.0, 3.0], requires_grad=True)
        >>> (x * x).sum().backward()
        >>> x.grad.tolist()
        [4.0, 6.0]
    """
    value = jnp.asarray(data.value if isinstance(data, Tensor) else data, dtype=dtype)
    if requires_grad:
        check_floating(value.dtype, "jhop.tensor(requires_grad=True)")
    return Tensor(value, requires_grad=requires_grad)
