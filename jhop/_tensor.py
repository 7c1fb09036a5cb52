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

from jhop import _compat, _engine, _gradients, _plan
from jhop._append import class_name
from jhop._errors import HookError, JhopError
from jhop._hook import HookList, RemovableHandle
from jhop._leaves import declare_state
from jhop._node import AccumulateGrad, Edge, Node, inside
from jhop._source import warn
from jhop._values import Values, check_floating


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
        array = self._array_of(value, "Tensor.value: expected an array or a Tensor")
        self._check_like(array, "Tensor.value")
        self._value = jnp.asarray(array)

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad

    @property
    def is_leaf(self) -> bool:
        return self._node is None

    @property
    def grad_fn(self) -> Node | None:
        return self._node

    @property
    def retains_grad(self) -> bool:
        return self._retains

    @property
    def grad(self) -> Any:
        _gradients.use(self, "reads")
        return self._grad

    @grad.setter
    def grad(self, grad: Any) -> None:
        if not isinstance(getattr(grad, "value", grad), _compat.Tracer):
            self._outside("Assigning to .grad")
        _gradients.use(self, "writes")
        if grad is not None:
            array = self._array_of(grad, "Tensor.grad: expected an array or None")
            if not isinstance(array, _compat.Tracer):  # a hook that is being traced: its result is checked as a whole
                self._check_like(array, "Tensor.grad")
            grad = grad if isinstance(grad, Tensor) else jnp.asarray(array)
        self._grad = grad

    def _array_of(self, given: Any, expected: str) -> Any:
        array = given.value if isinstance(given, Tensor) else given
        if not isinstance(array, (jax.Array, np.ndarray)):
            raise JhopError(f"{expected}, got {class_name(given)}.")
        return array

    def _check_like(self, array: Any, where: str) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            raise JhopError(
                f"{where}: expected shape {self.shape} and dtype {self.dtype}, as the Tensor has, "
                f"got shape {array.shape} and dtype {array.dtype}."
            )

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

    def register_hook(self, fn: Callable[[Any], Any]) -> RemovableHandle:
        """Registers `fn(grad) -> grad | None`, run once per backward on the summed gradient of this Tensor.

        Args:
            fn: gets an array of this Tensor's shape and dtype and returns another, or None to keep it.

        Returns:
            A handle whose `remove()` removes the hook.

        Raises:
            HookError: `fn` is not callable, or the Tensor does not require grad.

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
        if self._trace is None and inside() is not None:
            return inside().enter(self).register_hook(fn)
        handle = self._hook_list().add(fn, "Tensor.register_hook")
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
        """Makes a later backward store this Tensor's gradient in `.grad`, after its hooks. Nothing new for leaves."""
        self._outside("Tensor.retain_grad")
        self._need_grad("Tensor.retain_grad")
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
                A Tensor among them that is no leaf retains its gradient from then on.

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
        seeds = [(self._edge("backward"), self._seed(gradient, create_graph))]
        _engine.backward(request_for(seeds, retain_graph, create_graph, inputs))

    def _seed(self, gradient: Any, create_graph: bool = False) -> Any:
        """The cotangent to start with: an array, or with `create_graph` a Tensor if one was given."""
        if gradient is None:
            if self.size != 1:
                raise JhopError(
                    f"backward: a gradient can be left out only for a scalar, this Tensor has shape {self.shape}. "
                    "Pass backward(gradient) with an array of this shape, or reduce first, e.g. with .sum()."
                )
            return jnp.ones(self.shape, self.dtype)
        array = self._array_of(gradient, "backward: expected the gradient as an array or a Tensor")
        self._check_like(array, "backward(gradient)")
        if create_graph and isinstance(gradient, Tensor):
            return gradient
        return array if isinstance(array, jax.Array) else jnp.asarray(array)

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


declare_state(Tensor, "_value", "_grad")


def request_for(seeds: Any, retain_graph: bool | None, create_graph: bool, inputs: Any) -> _plan.Request:
    """A backward pass that accumulates into `.grad`, with the arguments of `Tensor.backward`."""
    edges = None
    if inputs is not None:
        tensors = given_tensors(inputs, "backward(inputs)")
        edges = tuple(tensor._edge(f"backward: inputs[{i}]") for i, tensor in enumerate(tensors))
        for tensor in tensors:
            tensor.retain_grad()  # of those that are no leaves
    keep = create_graph if retain_graph is None else retain_graph
    return _plan.Request(seeds=seeds, keep_graph=keep, create_graph=create_graph, inputs=edges)


def given_tensors(given: Any, where: str) -> list[Tensor]:
    """One Tensor or a sequence of them as a list.

    Raises:
        JhopError: it is something else, or empty.
    """
    tensors = [given] if isinstance(given, Tensor) else given
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise JhopError(f"{where}: expected Tensors (one, or a list of them), got {given!r}.")
    if not tensors:
        raise JhopError(f"{where}: expected at least one Tensor, got none.")
    return list(tensors)


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
