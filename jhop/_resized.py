"""Captures of a backward pass that serve tapes of several sizes, with symbols for those that were seen to change.

The first tape of a kind is captured with numbers. When one like it comes that has other sizes, these are symbols in its
capture, which then serves all tapes of the kind, as `Fits` says. XLA still compiles for each size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat
from jhop._asked import Asked
from jhop._compiled import CompiledNode
from jhop._contract import is_inexact
from jhop._graph import GraphModule
from jhop._interp import sizes_of
from jhop._node import AccumulateGrad, Edge, Node, OpNode
from jhop._sizes import Dynamic, Fits, NeedsNumbers, Place, Symbolic, for_one_size, with_symbols
from jhop._tape import Outputs, Sight, Tape


class Capture:
    """A capture of a tape's pass.

    Attributes:
        tape: what is captured.
        values: its inputs.
        types: what they are in the capture.
        fits: for which sizes it is right, if some are symbols.
        gm, outputs: the graph, and what it takes and returns, once it ran.
    """

    gm: GraphModule
    outputs: Outputs

    def __init__(self, sight: Sight):
        self.tape = Tape(sight)
        self.values = self.tape.inputs
        self.types = Symbolic([jax.typeof(value) for value in self.values], ())
        self.fits: Fits | None = None

    def run(self, dynamic: Dynamic, numbers: set[Place]) -> None:
        """Captures the pass, with symbols for those of the wanted sizes that are not in `numbers`.

        Raises:
            Exception: code of an operation raised it, or NeedsNumbers.
        """
        asked = Asked()
        names = [f"input_{i}" for i in range(len(self.values))]
        sources = [f"L['inputs'][{i}]" for i in range(len(self.values))]
        flow = Flow(self.tape)
        self.types = with_symbols(
            self.types.avals, sources,
            lambda place: place[0] not in flow.computed and place not in numbers and dynamic.wants(place),
        )  # fmt: skip
        if not self.types.places:
            self.gm, self.outputs = self.tape.capture()
            return
        self.fits = Fits(self.types, asked, names)
        with asked.noting():
            flow.run(self.types.avals)
            self.gm, self.outputs = self.tape.capture(self.types, flow.avals)
        shapes = [jnp.shape(value) for value in self.values]
        self.fits.look(self.gm.jaxpr)
        self.fits.check(shapes)
        if why := self.fits.broken(shapes) or for_one_size([self.gm]):
            raise NeedsNumbers(self.types.symbols, why, True)


class Flow:
    """Types of a tape's inputs as they follow from one another: what an operation returned has the sizes that come out.

    Attributes:
        computed: inputs that are results of the tape's nodes, or gradients, and not where its values come from.
        avals: per node, the types of its outputs, once `run` found them.
    """

    def __init__(self, tape: Tape):
        self._tape = tape
        self._order = [node for node in reversed(tape.plan.order) if tape.saved_of(node)]  # inputs before results
        self._leaves = {tape.place_of(tape.saved_of(n)[0]) for n in self._order if isinstance(n, AccumulateGrad)}
        known = set(self._order)
        self.avals: dict[Node, list[Any]] = {}
        self.computed: set[int] = set()
        for node in self._order:
            arguments, made = self._parts(node)
            self.computed |= {tape.place_of(array) for array, edge in arguments.values() if edge.node in known}
            self.computed |= set(map(tape.place_of, made))
        self.computed |= {tape.place_of(ct) for edge, ct in tape.seeds if edge.node in known}
        self.computed |= {place for node in self._order for place, _ in self._grads(node)}
        self.computed -= self._leaves

    def run(self, types: list[Any]) -> None:
        """Fills in the types of computed inputs, and of the nodes' outputs.

        Args:
            types: those of the tape's inputs, right for all that is not computed.
        """
        for node in self._order:
            arguments, made = self._parts(node)
            for array, edge in arguments.values():
                self._set(types, self._tape.place_of(array), edge)
            self.avals[node] = self._outputs(node, types, made)
            for place, slot in self._grads(node):
                self._set(types, place, Edge(node, slot))
        for edge, ct in self._tape.seeds:
            self._set(types, self._tape.place_of(ct), edge)

    def _set(self, types: list[Any], place: int, edge: Edge) -> None:
        found = self.avals.get(edge.node)
        if found is not None and place in self.computed:
            types[place] = types[place].update(shape=found[edge.slot].shape)

    def _parts(self, node: Node) -> tuple[dict[int, tuple[Any, Edge]], list[Any]]:
        """Per argument of its function that has a history (saved array, where it comes from); what else it computed."""
        saved = self._tape.saved_of(node)
        if isinstance(node, OpNode):
            pairs = zip(node.op.diff, node.edges, strict=True)
            return {i: (saved[i], edge) for i, edge in pairs}, []
        if isinstance(node, CompiledNode) and node.compiled.fits is not None:
            residuals, history = node.compiled.joint.residuals, node.history()
            arguments = {i: (a, history[i]) for i, a in zip(residuals, saved, strict=True) if i in history}
            return arguments, [array for i, array in zip(residuals, saved, strict=True) if i is None]
        return {}, []

    def _grads(self, node: Node) -> list[tuple[int, int]]:
        """(input, output) for gradients of outputs of a node that Tensors have already."""
        found = [(slot, tensor._grad) for slot, tensor in node.retained()]
        if isinstance(node, AccumulateGrad):
            found.append((0, node.leaf._grad))
        return [(self._tape.place_of(getattr(g, "value", g)), slot) for slot, g in found if g is not None]

    def _outputs(self, node: Node, types: list[Any], made: list[Any]) -> list[Any]:
        place_of, saved = self._tape.place_of, self._tape.saved_of(node)
        if isinstance(node, AccumulateGrad):
            return [types[place_of(saved[0])]]
        if isinstance(node, OpNode):
            outs = jax.make_jaxpr(node.op.forward)(*(types[place_of(array)] for array in saved)).out_avals
            return [aval for aval in outs if is_inexact(aval.dtype)]
        if not isinstance(node, CompiledNode) or node.compiled.fits is None:
            return list(node.avals)
        return self._call(node, types, made)

    def _call(self, node: CompiledNode, types: list[Any], made: list[Any]) -> list[Any]:
        """The types of what a call of a function returned that was traced with symbols of its own."""
        joint, place_of = node.compiled.joint, self._tape.place_of
        shapes = {i: self.avals[e.node][e.slot].shape for i, e in node.history().items() if e.node in self.avals}
        for i, array in zip(joint.residuals, self._tape.saved_of(node), strict=True):
            if i is not None:
                shapes[i] = types[place_of(array)].shape
        gm = joint.forward
        jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
        places = [place for place in gm.shapes if place[1] in shapes]
        every = [shapes.get(i) for i in range(len(jaxpr.invars))]
        sizes = sizes_of([v.aval for v in jaxpr.invars], places, every)
        found = [
            variable.aval.update(shape=tuple(_compat.evaluate_dim(dim, sizes) for dim in variable.aval.shape))
            for variable in jaxpr.outvars[: len(joint.out_moving) + len(made)]
        ]
        n = len(joint.out_moving)
        for array, aval in zip(made, found[n:], strict=True):
            types[place_of(array)] = types[place_of(array)].update(shape=aval.shape)
        return [aval for aval, moves in zip(found[:n], joint.out_moving, strict=True) if moves]
