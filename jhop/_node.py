"""The tape: one `Node` per recorded operation, linked to the nodes of its inputs.

A node takes the cotangents of its outputs and gives those of its inputs. What it knows of derivatives is one function,
made by `jax.vjp`; this file has no derivative rules.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop._errors import JhopError
from jhop._hook import HookList
from jhop._kept import Kept, context, values_of

ARRAY = type(jnp.zeros(()))  # the class of concrete arrays
_sequence = itertools.count()


class _Mode(threading.local):
    """What this thread is doing."""

    recording = True  # whether operations on Tensors are recorded
    inside: Any = None  # the compiled function that is being traced (`_joint.Inside`)


mode = _Mode()


class Edge(NamedTuple):
    """Where a cotangent goes: the `slot`-th output of a node."""

    node: Node
    slot: int


edge_of = functools.partial(tuple.__new__, Edge)  # of a pair, as `Edge` of two arguments: in half the time


def grad_enabled() -> bool:
    """Whether operations on Tensors are recorded in this thread."""
    return mode.recording


def set_grad_enabled(enabled: bool) -> bool:
    """Turns recording on or off in this thread; returns what it was."""
    before, mode.recording = mode.recording, enabled
    return before


def inside() -> Any:
    """The compiled function that is being traced in this thread (`_joint.Inside`), or None."""
    return mode.inside


def set_inside(trace: Any) -> Any:
    """Says which compiled function is being traced in this thread; returns what was said before."""
    before, mode.inside = mode.inside, trace
    return before


class Node:
    """One step of a backward pass.

    Attributes:
        edges: per differentiated input, where its cotangent goes.
        avals: avals of the outputs whose cotangents it takes.
        sequence: grows with creation; later nodes run earlier.
        hooks: per output, the hooks of the Tensor there.
    """

    __slots__ = ("__weakref__", "_metadata", "avals", "edges", "hooks", "post_hooks", "pre_hooks", "retain", "sequence")

    many = False  # whether it stands for many operations, of which a pass may need those for some outputs only
    keeps = False  # whether it only keeps a gradient, as a side effect of the nodes that lead to it

    def __init__(self, edges: Sequence[Edge], avals: Sequence[Any]):
        self.edges = tuple(edges)
        self.avals = tuple(avals)
        self.sequence: float = next(_sequence)
        self.hooks: list[HookList | None] | tuple[()] = ()  # one per output, once there are any
        self.retain: list[Any] | tuple[()] = ()  # per output, a weak reference to a Tensor that keeps its gradient
        self.pre_hooks: HookList | None = None
        self.post_hooks: HookList | None = None
        self._metadata: dict[Any, Any] | None = None

    def name(self) -> str:
        """The node's name, such as `MultiplyBackward`."""
        return type(self).__name__

    @property
    def next_functions(self) -> tuple[tuple[Node, int], ...]:
        """(node, output) pairs that cotangents flow to."""
        return tuple((edge.node, edge.slot) for edge in self.edges)

    def hooks_at(self, slot: int) -> HookList:
        """The hook list of one output, made at first use."""
        if not self.hooks:
            self.hooks = [None] * len(self.avals)
        found = self.hooks[slot]
        if found is None:
            found = self.hooks[slot] = HookList()
        return found

    def retain_at(self, slot: int, tensor: Any) -> None:
        """Makes a Tensor keep the gradient of one output."""
        if not self.retain:
            self.retain = [None] * len(self.avals)
        self.retain[slot] = weakref.ref(tensor)

    def retained(self) -> list[tuple[int, Any]]:
        """(output, Tensor) for Tensors that keep their gradient and are still there."""
        return [(slot, ref()) for slot, ref in enumerate(self.retain) if ref is not None and ref() is not None]

    @property
    def metadata(self) -> dict[Any, Any]:
        """The user's own notes on this node."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    def register_prehook(self, fn: Callable[..., Any]) -> Any:
        """Registers `fn(grad_outputs) -> tuple | None`, run before this node, after the hooks of its Tensors.

        Args:
            fn: gets a tuple with the cotangent of each output, None where none came, and returns another of as many
                (None in it keeps a cotangent), or None to keep all.

        Returns:
            A handle whose `remove()` removes the hook.

        Raises:
            HookError: `fn` is not callable. During the pass: it returned something else, or a cotangent of another
                shape or dtype, or one where it was given None.

        Example:
            >>> import jhop
            >>> x = jhop.tensor(2.0, requires_grad=True)
            >>> y = x * x
            >>> _ = y.grad_fn.register_prehook(lambda grads: (grads[0] * 10.0,))
            >>> y.backward()
            >>> float(x.grad)
            40.0

        The counterpart in PyTorch is `torch.autograd.graph.Node.register_prehook`.
        """
        if self.pre_hooks is None:
            self.pre_hooks = HookList()
        return self.pre_hooks.add(fn, "Node.register_prehook")

    def register_hook(self, fn: Callable[..., Any]) -> Any:
        """Registers `fn(grad_inputs, grad_outputs) -> tuple | None`, run after this node.

        The hook after the node of a leaf (`AccumulateGrad`) runs when `.grad` is written and post-accumulate hooks have
        run; its `grad_inputs` is empty. Such a node lives as long as a graph, or somebody else, holds it.

        Args:
            fn: gets the cotangents that the node computed, None where none flows or is wanted, and those that it was
                given. It returns a tuple in place of the first (None in it keeps a cotangent), or None to keep all.

        Returns, raises:
            As `register_prehook`.

        Example:
            >>> import jhop
            >>> x = jhop.tensor(2.0, requires_grad=True)
            >>> y = x * 3.0
            >>> _ = y.grad_fn.register_hook(lambda grad_inputs, grad_outputs: (grad_inputs[0] + grad_outputs[0],))
            >>> y.backward()
            >>> float(x.grad)
            4.0

        The counterpart in PyTorch is `torch.autograd.graph.Node.register_hook`.
        """
        if self.post_hooks is None:
            self.post_hooks = HookList()
        return self.post_hooks.add(fn, "Node.register_hook")

    def check(self) -> None:
        """Raises JhopError if the node was freed."""

    def saved(self) -> list[Any]:
        """Arrays that the node keeps for its backward. It is asked once per pass: they may have to be unpacked."""
        return []

    def apply(self, cts: list[Any], saved: list[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        """Cotangents of the inputs, one per edge, from those of the outputs and the saved arrays (or tracers).

        Args:
            cts: per output, None where nothing came.
            wanted: per edge, whether its cotangent is asked for; None if all are. The others may be anything.
        """
        raise NotImplementedError

    def record(self, cts: list[Any]) -> list[Any]:
        """As `apply`, on Tensors and recorded on the tape, so that the result can be differentiated again.

        Args:
            cts: per output, a Tensor, or None where nothing depends on it.
        """
        raise JhopError(f"backward: {self.name()} cannot be run with create_graph=True.")

    @property
    def depends(self) -> tuple[frozenset[int], ...] | None:
        """Per output, the edges that its cotangent flows to; None if nobody knows without looking (`flows`)."""
        return None

    def flows(self) -> tuple[frozenset[int], ...] | None:
        """As `depends`, found out where it takes a while; None if it is all edges for each output."""
        return self.depends

    def keeps_for(self, edge: int, leads: Sequence[bool], slots: Collection[int]) -> bool:
        """Whether the gradient at an edge to a node that keeps it is part of a pass.

        Args:
            edge: which of `edges`.
            leads: per edge, whether the pass asks for what it leads to.
            slots: outputs whose own cotangents the pass asks for.
        """
        return True

    def unfold(self) -> bool:
        """Makes nodes that can be recorded of one that cannot; says whether the node has other edges now."""
        return False

    def release(self) -> None:
        """Frees what was saved; the node cannot run again."""

    def __repr__(self) -> str:
        return f"<{self.name()}>"


class OpNode(Node):
    """The node of one lifted function call.

    Args:
        op: `op.pullback(saved, cts) -> cotangents`, pure and cached by the caller (`_op.Op`).
        fn: the function, for the node's name.
        has_number: whether a Python float is among what was saved.
    """

    __slots__ = ("_fn", "_saved", "has_number", "op")

    def __init__(
        self, edges: tuple[Edge, ...], avals: tuple[Any, ...], op: Any, saved: list[Any], fn: Any, has_number: bool
    ):  # fmt: skip
        # As `Node.__init__`, in one function: this is made at each operation.
        self.edges: tuple[Edge, ...] = edges
        self.avals: tuple[Any, ...] = avals
        self.sequence = next(_sequence)
        self.hooks = self.retain = ()
        self.pre_hooks = self.post_hooks = None
        self._metadata = None
        self.op = op
        hooks = context.hooks
        self._saved: list[Any] | Kept | None = saved if hooks is None else Kept(hooks, saved)
        self._fn = fn
        self.has_number = has_number

    def name(self) -> str:
        label = getattr(self._fn, "__name__", type(self._fn).__name__)
        return "".join(part.capitalize() for part in label.strip("_").split("_")) + "Backward"

    def check(self) -> None:
        if self._saved is None:
            raise freed(self)

    def saved(self) -> list[Any]:
        kept = self._saved
        if type(kept) is list:
            return kept
        if kept is None:
            raise freed(self)
        return values_of(kept)

    def apply(self, cts: list[Any], saved: list[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        return self.op.pullback(saved, full_cts(self, cts))

    def record(self, cts: list[Any]) -> list[Any]:
        return self.op.record(self.saved(), self.edges, cts)

    @property
    def depends(self) -> tuple[frozenset[int], ...] | None:
        return self.op.depends

    def flows(self) -> tuple[frozenset[int], ...] | None:
        if self.op.depends is not None or self._saved is None:
            return self.op.depends
        kept = self._saved
        return self.op.flows(kept.avals if isinstance(kept, Kept) else tuple(map(jax.typeof, kept)))

    def release(self) -> None:
        self._saved = None


class RetainedGrad(Node):
    """The end of a path to a result of a compiled function that retains its gradient: see `retain_at`."""

    __slots__ = ()
    keeps = True

    def __init__(self, aval: Any):
        super().__init__((), (aval,))


class AccumulateGrad(Node):
    """The end of a path: adds the cotangent to a leaf's `.grad`."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Any, aval: Any):
        super().__init__((), (aval,))
        self.leaf = leaf

    def saved(self) -> list[Any]:
        """What it reads: the leaf and its present gradient."""
        grad = self.leaf._grad
        return [self.leaf._value] if grad is None else [self.leaf._value, getattr(grad, "value", grad)]

    def apply(self, cts: list[Any], saved: list[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        return []


def full_cts(node: Node, cts: list[Any], avals: Sequence[Any] | None = None) -> list[Any]:
    """Cotangents with zeros for outputs that nothing depends on; `avals` if these are others than the node's own."""
    if len(cts) == 1:
        return cts  # a node is visited only when something arrived
    pairs = zip(cts, node.avals if avals is None else avals, strict=True)
    return [jnp.zeros(aval.shape, aval.dtype) if ct is None else ct for ct, aval in pairs]


def freed(node: Node) -> JhopError:
    """The error for a second backward through a node whose saved arrays are gone."""
    return JhopError(
        f"backward: {node.name()} was already run and its saved arrays were freed. Give retain_graph=True to the "
        "first backward() if you need a second one through the same graph."
    )
