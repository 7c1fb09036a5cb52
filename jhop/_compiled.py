"""One traced version of a function, and its call as a node of the tape."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp

from jhop import _compat
from jhop._bound import BoundHook
from jhop._compile import CompiledGraph
from jhop._graph import GraphModule
from jhop._guards import Guards
from jhop._history import Trace
from jhop._interp import evaluate
from jhop._joint import Joint
from jhop._kept import Kept, keep, values_of
from jhop._node import Edge, Node, freed, full_cts
from jhop._op import derivatives_of, edges_of
from jhop._reach import narrowed
from jhop._sizes import Fits
from jhop._tensor import Tensor
from jhop._unfold import Segment, Unfolded, segments_of

MAX_SIZES = 256  # for which a version is laid out


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """One traced version of a function.

    Attributes:
        joint: its graphs.
        forward, backward: the graphs as the backend compiled them.
        aot_id: the number in printed names.
        diff: indices of the differentiated inputs.
        captured: Tensors that the function reaches by itself, which are inputs after its arguments.
        guards: what the function takes for granted.
        trace: why it was traced; `static`: static arguments, in words.
        fits: for which sizes it is, if some of them are symbols.
        narrowed: the backwards of passes that some of the hooks have no part in.
    """

    joint: Joint
    forward: Callable[..., list[Any]]
    backward: CompiledGraph | None
    aot_id: int
    diff: tuple[int, ...]
    captured: tuple[Tensor, ...]
    guards: Guards
    trace: Trace
    static: tuple[str, ...]
    fits: Fits | None = None
    narrowed: dict[Any, CompiledGraph] = dataclasses.field(default_factory=dict)
    _segments: dict[Any, tuple[Joint, list[Segment]]] = dataclasses.field(default_factory=dict)

    @property
    def gm(self) -> GraphModule:
        """The graph that runs at a call."""
        return self.joint.forward

    def misfit(self, shapes: list[Any]) -> str | None:
        """Why it is not for arguments of these shapes, where no others are known to fit; None if it is."""
        return None if self.fits is None else self.fits.broken([*shapes, *(t.shape for t in self.captured)])

    def segments(self, values: list[Any]) -> tuple[Joint, list[Segment]]:
        """What a call with inputs of these sizes is laid out as on the tape."""
        sizes = tuple(map(jnp.shape, values)) if self.fits is not None else ()
        found = self._segments.get(sizes)
        if found is None:
            if len(self._segments) >= MAX_SIZES:
                self._segments.clear()
            joint = self.joint.with_numbers(values)
            found = self._segments[sizes] = joint, segments_of(joint)
        return found

    @functools.cached_property
    def flows(self) -> tuple[frozenset[int], ...]:
        """Per output that carries a gradient, which edges of the node its cotangent flows to."""
        jaxpr = self.joint.forward.jaxpr
        avals = [variable.aval for variable in _compat.open_jaxpr(jaxpr)[0].invars]
        moving = [i for i, moves in enumerate(self.joint.out_moving) if moves]

        def outs(*values: Any) -> list[Any]:
            found = evaluate(jaxpr, list(values))
            return [found[i] for i in moving]

        flows = edges_of(derivatives_of(outs, avals, self.diff), self.joint.only_reached(self.diff))
        n = sum(self.joint.reached)
        kept = [frozenset(n + k for k in self.joint.retained_by(i)) for i in moving]
        return tuple(inputs | retained for inputs, retained in zip(flows, kept, strict=True))

    def backward_for(self, cts: Sequence[Any], wanted: Sequence[bool] | None) -> CompiledGraph:
        """The backward of a pass to which these cotangents came; `wanted` is as for `Node.apply`."""
        assert self.backward is not None  # a node is made only for outputs that carry gradients
        if wanted is None and all(ct is not None for ct in cts):
            return self.backward
        came = tuple(ct is not None for ct in cts)
        asked = iter(wanted or [True] * (sum(self.joint.reached) + len(self.joint.retained)))
        results = (*[used and next(asked) for used in self.joint.reached], *asked)
        found = self.narrowed.get((came, results))
        if found is None:
            gm = narrowed(self.backward.gm, came, results)
            found = self.backward if gm is self.backward.gm else self.backward.like(gm, "first pass over a part of it")
            self.narrowed[came, results] = found
        return found

    refused = None  # a forward has no state, so its hooks are compiled or an error


class CompiledNode(Node):
    """The backward of one call of a compiled function.

    It keeps the call's inputs besides what the backward graph needs, as other nodes do: `create_graph` needs them. The
    first such pass unfolds it; from then on it only passes cotangents on, to the nodes that do the work.

    Attributes:
        passes: which outputs it passes on, once it is unfolded; None before.
    """

    many = True
    __slots__ = ("_bound", "_call", "_history", "_saved", "compiled", "input_shapes", "passes")

    def __init__(
        self, edges: Any, avals: Any, compiled: Compiled, saved: list[Any], values: list[Any],
        moving: dict[int, Edge], bound: list[BoundHook],
    ):  # fmt: skip
        super().__init__(edges, avals)
        self.compiled = compiled
        self.input_shapes = [jnp.shape(value) for value in values]
        self.passes: tuple[int, ...] | None = None
        packed: dict[int, Any] = {}  # most of what is saved is among the inputs
        self._saved: list[Any] | Kept | None = keep(saved, packed)
        self._call: tuple[list[Any] | Kept, dict[int, Edge]] | None = (keep(values, packed), moving)
        self._bound = [weakref.ref(hook) for hook in bound]
        self._history: Any = None

    def name(self) -> str:
        return "CompiledFunctionBackward"

    def check(self) -> None:
        if self._saved is None:
            raise freed(self)

    def saved(self) -> list[Any]:
        if self._saved is None:
            raise freed(self)
        return values_of(self._saved)

    def history(self) -> dict[int, Edge]:
        """Per differentiated input of the call, where its cotangent goes."""
        return {} if self._call is None else self._call[1]

    def apply(self, cts: list[Any], saved: list[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        full = full_cts(self, cts)
        if self.passes is not None:
            return [full[slot] for slot in self.passes]
        return self.compiled.joint.sent(self.compiled.backward_for(cts, wanted)(*saved, *full))

    def record(self, cts: list[Any]) -> list[Any]:
        return self.apply(cts, self.saved())

    @property
    def depends(self) -> tuple[frozenset[int], ...] | None:
        if self.passes is None:
            return None
        return tuple(frozenset(i for i, at in enumerate(self.passes) if at == slot) for slot in range(len(self.avals)))

    def flows(self) -> tuple[frozenset[int], ...] | None:
        return self.depends or self.compiled.flows

    def keeps_for(self, edge: int, leads: Sequence[bool], slots: Collection[int]) -> bool:
        joint = self.compiled.joint
        kept = joint.retained[edge - sum(joint.reached)]
        return kept.slot in slots or any(leads[i] for i in kept.edges)

    def unfold(self) -> bool:
        if self.passes is not None:
            return False
        if self._call is None:
            raise freed(self)
        values, moving = values_of(self._call[0]), self._call[1]
        joint, segments = self.compiled.segments(values)
        bound = [hook for ref in self._bound if (hook := ref()) is not None]
        laid = Unfolded(joint, segments, values, moving, self.sequence, bound)
        for kept, (sink, _) in zip(joint.retained, self.edges[sum(joint.reached) :], strict=True):
            # One that does not move with the inputs is all that comes from outside.
            node, slot = laid.edges[kept.result] or Edge(self, kept.slot)
            for _, tensor in sink.retained():
                node.retain_at(slot, tensor)
        edges = [edge for edge, moves in zip(laid.edges, joint.out_moving, strict=True) if moves]
        self.passes = tuple(slot for slot, edge in enumerate(edges) if edge is not None)
        self.edges = tuple(edge for edge in edges if edge is not None)
        self._history, self._saved = laid.history, []
        return True

    def release(self) -> None:
        self._saved = self._call = self._history = None
