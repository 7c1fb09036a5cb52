"""The Tensors inside a function that is being traced, and the hooks that it registers."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jhop._errors import HookError, JhopError
from jhop._hook import HookList, RemovableHandle
from jhop._lift import traced_result
from jhop._node import grad_enabled
from jhop._tensor import Tensor


class Result(NamedTuple):
    """What a function returned in one place: a Tensor in two places is one Tensor, an argument is that Tensor itself.

    Attributes:
        kind: "output" of the forward graph, "input", or "handle", of a hook on an input.
        place: which of the outputs, of the inputs, or of `Joint.registered`.
    """

    kind: str
    place: int


class Inside:
    """One tracing of a function: the Tensors in it, and the hooks that it registers."""

    def __init__(self, name: str) -> None:
        self.inputs: list[tuple[int, Tensor]] = []
        self.points: list[tuple[HookList, Any]] = []
        self.results: list[Any] = []  # weak references to the Tensors made in here
        self.captured: dict[int, Tensor] = {}  # by id of the Tensor outside
        self.handles: list[Any] = []  # weak references to those of hooks that were registered in here
        self.retaining: list[Tensor] = []  # those in here on which `retain_grad` was called
        self._name = name
        self._ended = False

    def refuse_after(self, where: str) -> None:
        """Refuses what would have no effect, as the function has run: its hooks run later.

        Raises:
            HookError: the function has run.
        """
        if self._ended:
            raise HookError(
                f"{where}: a hook that `{self._name}`, which jhop.compile compiled, registered calls it on a Tensor of "
                "that function. What is compiled has the hooks that it was compiled with. Call it in the function, or "
                "have the hook use a Tensor from outside of it."
            )

    def enter(self, outside: Tensor) -> Tensor:
        """The Tensor in here that stands for one which the function reached by itself."""
        found = self.captured.get(id(outside))
        if found is None and outside.requires_grad and grad_enabled():
            raise JhopError(
                f"jhop.compile: `{self._name}` uses a Tensor that requires grad and that it did not get as an "
                "argument, in a way that jhop cannot follow; its gradient would be lost. Pass it as an argument."
            )
        return outside if found is None else found

    def value_of(self, tensor: Tensor) -> Any:
        """The array of a Tensor: no gradient flows through it, and one from outside is an input if it may change."""
        found = tensor if tensor._trace is not None else self.captured.get(id(tensor))
        return tensor._value if found is None else jax.lax.stop_gradient(found._value)

    def input(self, index: int, value: Any, requires_grad: bool) -> Tensor:
        tensor = Tensor(value, requires_grad=requires_grad)
        tensor._trace = self
        self.inputs.append((index, tensor))
        return tensor

    def result(self, value: Any, moving: bool) -> Any:
        if not moving and isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.inexact):
            value = jax.lax.stop_gradient(value)  # computed without recording, or detached
        result = traced_result(self, value, moving)
        if isinstance(result, Tensor):
            self.results.append(weakref.ref(result))
        if isinstance(result, Tensor) and result._hooks is not None:
            self.points.append((result._hooks, result._value))
        return result

    def retain(self, tensor: Tensor) -> None:
        """Notes that a Tensor in here retains its gradient."""
        self.refuse_after("Tensor.retain_grad")
        tensor._retains = True
        if not any(tensor is other for other in self.retaining):
            self.retaining.append(tensor)

    def outputs(self, results: list[Any]) -> tuple[list[Any], list[Result]]:
        """What the forward graph returns: the results, each once, less inputs and handles; and what each result is.

        Raises:
            JhopError: a result is the handle of a hook on a value inside.
        """
        places = self.of_inputs()
        inputs = {id(tensor): index for index, tensor in self.inputs}
        known: dict[int, int] = {}  # by id of a Tensor, which output it is
        outs: list[Any] = []
        found: list[Result] = []
        for result in results:
            if isinstance(result, RemovableHandle):
                if result.id not in places:
                    raise JhopError(
                        f"jhop.compile: `{self._name}` returned the handle of a hook on a value inside it, "
                        "which is compiled with it, or one that was removed. Return handles of hooks on its arguments "
                        "only."
                    )
                found.append(Result("handle", places[result.id]))
            elif id(result) in inputs:
                found.append(Result("input", inputs[id(result)]))
            else:
                index = known.setdefault(id(result), len(outs)) if isinstance(result, Tensor) else len(outs)
                found.append(Result("output", index))
                if index == len(outs):
                    outs.append(result)
        return outs, found

    def retained(self, outs: list[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which results, and which inputs, retain their gradients.

        Raises:
            HookError: so does a Tensor that is neither.
        """
        results: list[int] = []
        inputs: list[int] = []
        for tensor in self.retaining:
            index = next((i for i, other in self.inputs if other is tensor), None)
            place = next((i for i, out in enumerate(outs) if out is tensor), None)
            if index is not None:
                inputs.append(index)
            elif place is not None and tensor._hooks is not None:
                tensor._hooks.retained = len(results)
                results.append(place)
            else:
                raise HookError(
                    f"Tensor.retain_grad: `{self._name}`, which jhop.compile traces, calls it on a value of shape "
                    f"{tensor.shape} that it does not return, so nobody could look at its .grad. Return the Tensor, or "
                    "register a hook on it that keeps the gradient in a list."
                )
        return tuple(results), tuple(inputs)

    def is_leaf(self, tensor: Tensor) -> bool:
        """Whether a Tensor in here is the result of no operation that is differentiated.

        Raises:
            JhopError: it is an input for which that is another matter at each call.
        """
        if tensor.requires_grad and any(tensor is other for _, other in self.inputs):
            raise JhopError(
                f"Tensor.is_leaf: `{self._name}`, which jhop.compile traces, asks it of a Tensor of shape "
                f"{tensor.shape} that it was given; a later call may give it another kind. Ask before the call, and "
                "give the answer as an argument."
            )
        return not tensor.requires_grad

    def refuse_grad_of(self, tensor: Tensor) -> None:
        """Refuses to tell the gradient of a Tensor in here whose counterpart outside may have one.

        Raises:
            JhopError: it is an input, or retains its gradient.
        """
        if tensor._retains or any(tensor is other for _, other in self.inputs):
            raise JhopError(
                f"Tensor.grad: `{self._name}`, which jhop.compile traces, or a hook in it reads the .grad of a Tensor "
                f"of shape {tensor.shape} that it was given or that it returns, which is not known when it is traced. "
                "Give the function the gradient as an argument of its own, or read it outside."
            )

    def _of_inputs(self) -> list[tuple[int, int, Any]]:
        """(id of the handle, input, hook) for hooks on inputs, in order of registration: inputs may be one Tensor."""
        hooks = ((i, tensor._hooks) for i, tensor in self.inputs if tensor._hooks is not None)
        found = [(at, i, fn) for i, own in hooks for at, fn in zip(own.ids(), own.snapshot(), strict=True)]
        return sorted(found, key=lambda hook: hook[0])

    def registered(self) -> list[tuple[int, Any]]:
        """(input, hook) for hooks on inputs, in order of registration."""
        return [(i, fn) for _, i, fn in self._of_inputs()]

    def of_inputs(self) -> dict[int, int]:
        """By the id of its handle, which of `registered` each hook on an input is."""
        return {handle_id: i for i, (handle_id, _, _) in enumerate(self._of_inputs())}

    def held(self) -> list[tuple[Any, int]]:
        """Handles of hooks on inputs that are still there, and which of `registered` each is of.

        Hooks on values inside are in the backward graph, from which no handle can take them.
        """
        places = self.of_inputs()
        inside = {handle_id for hooks, _ in self.points for handle_id in hooks.ids()}
        found = []
        for ref in self.handles:
            handle = ref()
            if handle is not None and handle.id in places:
                found.append((ref, places[handle.id]))
            elif handle is not None and handle.id in inside:
                handle.refuse(
                    f"RemovableHandle.remove: the hook is on a value inside `{self._name}`, which jhop.compile "
                    "compiled with it. Remove it in the function, or put it on an argument or a result."
                )
        return found

    def close(self) -> None:
        """Tensors of the trace may live on in hooks; they must not carry tracers."""
        for tensor in [*(tensor for _, tensor in self.inputs), *(ref() for ref in self.results)]:
            if tensor is not None:
                tensor._value = None
        self.points.clear()
        self.retaining.clear()
        self._ended = True


def is_dynamic(leaf: Any) -> bool:
    """Whether an argument is an input of the graph; other arguments are part of it."""
    return isinstance(leaf, (Tensor, jax.Array, np.ndarray, np.inexact)) or type(leaf) is float


def value_of(leaf: Any) -> Any:
    """The array of an argument."""
    return leaf._value if isinstance(leaf, Tensor) else leaf
