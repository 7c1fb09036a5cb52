"""A tape as compiled autograd sees it: what identifies its structure, what a capture of it takes, gives and assigns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jhop import _compat, _engine, _plan
from jhop._capture import Backward, Recorder, trace
from jhop._capture_pass import CapturePass
from jhop._compiled import CompiledNode
from jhop._contract import WeakIdentity, identity_key
from jhop._errors import JhopError
from jhop._graph import GraphModule, Input
from jhop._node import AccumulateGrad, Node, OpNode
from jhop._schedule import schedule
from jhop._trace_wrapped import trace_wrapped_p


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a captured graph returns.

    Attributes:
        written: which of `Tape.owners` get a gradient, in the order of the outputs.
        returned: which of the gradients that are asked for come after these.
    """

    written: tuple[int, ...]
    returned: tuple[int, ...]


class Tape:
    """A tape, and what a capture of it takes as inputs.

    Attributes:
        plan: the nodes, as compiled autograd collects them.
        inputs: arrays: incoming gradients, what nodes saved, leaves and their present gradients, each array once.
        owners: Tensors that may get a gradient: leaves, then those that retain theirs.
    """

    def __init__(self, request: _plan.Request):
        self.seeds = request.seeds
        self.plan = _plan.plan(request, stack=True)
        self.wanted = request.inputs or ()
        self.inputs: list[Any] = []
        self._index: dict[int, int] = {}
        self.seed_index = [self._input(ct) for _, ct in self.seeds]
        self.saved: dict[Node, list[int]] = {}
        for node in self.plan.order:
            arrays: list[Any] = []
            if node in self.plan.ends:
                pass  # it is not run
            elif isinstance(node, AccumulateGrad):
                grad = node.leaf._grad
                arrays = [node.leaf._value] + ([] if grad is None else [getattr(grad, "value", grad)])
            else:
                arrays = node.saved()
            self.saved[node] = [self._input(array) for array in arrays]
        self.leaves = [node for node in self.plan.run if isinstance(node, AccumulateGrad)]
        self._retained = [(node, slot, tensor) for node in self.plan.order for slot, tensor in node.retained()]
        self.owners = [*(node.leaf for node in self.leaves), *(tensor for _, _, tensor in self._retained)]
        for _, _, tensor in self._retained:
            if tensor._grad is not None:
                self._input(getattr(tensor._grad, "value", tensor._grad))
        self.number = {node: i for i, node in enumerate(self.plan.order)}

    def place_of(self, array: Any) -> int:
        """Which input an array is."""
        return self._index[id(array)]

    def _input(self, array: Any) -> int:
        found = self._index.get(id(array))
        if found is None:
            found = self._index[id(array)] = len(self.inputs)
            self.inputs.append(array)
        return found

    def key(self) -> tuple[Any, ...]:
        """Equal for tapes whose captures are the same graph."""
        number, plan = self.number, self.plan
        nodes = tuple(
            (
                _kind(node),
                tuple((number.get(edge.node), edge.slot, edge in plan.idle) for edge in node.edges),
                tuple(self.saved[node]),
                tuple(tuple(map(identity_key, hooks.snapshot())) if hooks else None for hooks in _hook_lists(node)),
                tuple(slot for slot, _ in node.retained()),
                tuple(plan.captures.get(node, ())),
            )
            for node in plan.order
        )
        stops = tuple(
            (number[node], tuple(self._stop_key(stop) for stop in plan.stops[node]))
            for node in plan.order if node in plan.stops
        )  # fmt: skip
        retained = tuple(tensor._grad is None for _, _, tensor in self._retained)
        seeds = tuple((number.get(edge.node), edge.slot, edge in plan.idle) for edge, _ in self.seeds)
        # A hook on a parameter is given the parameter itself.
        owners = tuple(WeakIdentity(node.leaf) if node.leaf._post_hooks else None for node in self.leaves)
        given = tuple(_aval_key(value) for value in self.inputs)
        return nodes, stops, retained, owners, tuple(self.seed_index), seeds, given

    def _stop_key(self, stop: Any) -> tuple[Any, ...]:
        members = tuple(
            (i, self.number[edge.node], edge.slot, len(_engine.hooks_of(edge).split(stop.group.id)[0]))
            for i, edge in stop.members
        )
        group = stop.group
        return identity_key(group.fn), group.first, len(group.places), stop.fires, stop.replaces, members

    def capture(self) -> tuple[GraphModule, Outputs]:
        """The whole pass as a graph with opaque hooks."""
        recorder = Recorder()
        captured = CapturePass(self, recorder)

        def run(*flat: Any) -> list[Any]:
            return captured.trace(list(flat))

        closed, info = trace(run, [jax.typeof(value) for value in self.inputs], recorder)
        places = captured.hook_places
        closed, order = schedule(closed)
        hooks = [place for _, place in sorted(zip(_hook_order(closed, order), places, strict=True))]
        backward = Backward(
            shapes=tuple(jax.numpy.shape(value) for value in self.inputs),
            sizes=tuple(captured.sizes),
            checked=tuple(captured.checked),
            hook_index=tuple(hooks),
            grads=tuple(self.saved[self.leaves[i]][0] for i in captured.written if i < len(self.leaves)),
            number_inputs=any(getattr(node, "has_number", False) for node in self.plan.run),
        )
        inputs = tuple(Input(name=f"input_{i}", source=f"L['inputs'][{i}]") for i in range(len(self.inputs)))
        gm = GraphModule(
            jaxpr=closed, inputs=inputs, info=info(), name="CompiledAutograd0", made_by="compiled_autograd",
            backward=backward,
        )  # fmt: skip
        return gm, Outputs(tuple(captured.written), tuple(captured.returned))

    def assign(self, grads: list[Any], outputs: Outputs) -> list[Any]:
        """Writes the new gradients, once all of them are known to be right; returns those that are asked for."""
        owners = [self.owners[i] for i in outputs.written]
        like = [*owners, *(self.wanted[i].node.avals[self.wanted[i].slot] for i in outputs.returned)]
        if len(grads) != len(like):
            raise JhopError(
                f"compiled_autograd: the compiled backward returned {len(grads)} gradients for {len(like)} Tensors. "
                "A backend's callable must return all outputs of the graph that it was given."
            )
        for wanted, grad in zip(like, grads, strict=True):
            if not isinstance(grad, jax.Array) or grad.shape != wanted.shape or grad.dtype != wanted.dtype:
                raise JhopError(
                    f"compiled_autograd: a Tensor of shape {wanted.shape} and dtype {wanted.dtype} got the gradient "
                    f"{grad!r} from the compiled backward."
                )
        for tensor, grad in zip(owners, grads, strict=False):
            tensor._grad = grad
        results = [None] * self.plan.n_results
        for place, grad in zip(outputs.returned, grads[len(owners) :], strict=True):
            results[place] = grad
        return results


def _hook_order(closed: Any, order: list[int]) -> list[int]:
    """Position, in the scheduled graph, of each hook in order of capture."""
    eqns = _compat.open_jaxpr(closed)[0].eqns
    new = {old: position for position, old in enumerate(order)}
    by_old = {old: eqns[position] for old, position in new.items()}
    return [new[old] for old in sorted(by_old) if by_old[old].primitive is trace_wrapped_p]


def _kind(node: Node) -> Any:
    if isinstance(node, CompiledNode):
        return ("compiled", node.compiled, node.passes)
    if isinstance(node, OpNode):
        return ("op", node.op)
    if isinstance(node, AccumulateGrad):
        return ("accumulate", node.leaf._grad is None)
    return ("node", node)


def _hook_lists(node: Node) -> list[Any]:
    own = [node.leaf._hooks, node.leaf._post_hooks] if isinstance(node, AccumulateGrad) else node.hooks
    return [node.pre_hooks, node.post_hooks, *own]


def _aval_key(value: Any) -> Any:
    return (value.shape, value.dtype) if hasattr(value, "dtype") else type(value)
