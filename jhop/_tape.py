"""A tape as compiled autograd sees it: what identifies its structure, what a capture of it takes, gives and assigns."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Mapping
from typing import Any

import jax

from jhop import _compat, _engine, _plan
from jhop._capture import Backward, Recorder, trace
from jhop._capture_pass import CapturePass, PostAccumulate
from jhop._compiled import Compiled, CompiledNode
from jhop._errors import JhopError
from jhop._gates import LIVE
from jhop._graph import GraphModule, Input, hooks_in
from jhop._interp import inner_jaxprs
from jhop._node import ARRAY, AccumulateGrad, Node, OpNode
from jhop._schedule import schedule
from jhop._sizes import Symbolic, kind_of
from jhop._standins import StandIn, replaceable, written_by
from jhop._trace_wrapped import trace_wrapped_p


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a captured graph takes and returns.

    Attributes:
        inputs: which of `Sight.inputs` it takes.
        written: which of `Sight.owners` get a gradient, in the order of the outputs.
        returned: which of the gradients that are asked for come after these.
        last: for each of `written`, the last hook after the accumulation, which may have freed the gradient, or None.
    """

    inputs: tuple[int, ...]
    written: tuple[int, ...]
    returned: tuple[int, ...]
    last: tuple[PostAccumulate | None, ...]


class Sight:
    """A tape as far as it has to be looked at to know whether it was captured before.

    Attributes:
        nodes: those that it reaches, or those of its plan, if it had to be made.
        inputs: arrays: incoming gradients, what nodes saved, leaves and their present gradients, each array once.
        owners: Tensors that may get a gradient.
        key: equal for tapes whose captures are the same graph, as long as all that it names by id is there:
        hooks: that are hooks, or the code of some, and
        given: leaves that a hook is given itself.
        named: the hooks of its values and nodes, in order.
        functions: those that it names by their code alone: a capture has stand-ins for them.
    """

    def __init__(self, request: _plan.Request):
        self.seeds = request.seeds
        self.wanted = request.inputs or ()
        self._request = request
        # To find the order in which nodes run takes as long as all the rest, and is a matter of what is in the key.
        self._grows = request.inputs is None and not LIVE
        self.nodes = list(dict.fromkeys([edge.node for edge, _ in self.seeds])) if self._grows else self.plan.order
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.inputs: list[Any] = []
        self._avals: list[Any] = []
        self._index: dict[int, int] = {}
        self.hooks: list[Any] = []
        self.given: list[Any] = []
        self.named: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self._places: dict[int, int] = {}  # in `functions`, by id
        self.owners: list[Any] = []
        self._compiled: list[Compiled] = []
        self._saved: list[list[Any]] = []
        seed_index = tuple([self._input(ct) for _, ct in self.seeds])
        self.key = (seed_index, *self._structure(), *self._rest(), self._shared(), Types(self._avals))

    @functools.cached_property
    def plan(self) -> _plan.Plan:
        """The nodes as compiled autograd collects them."""
        return _plan.plan(self._request, stack=True)

    @property
    def run(self) -> list[Node]:
        """The nodes that are run."""
        return self.nodes if self._grows else self.plan.run

    @property
    def kind(self) -> tuple[Any, ...]:
        """The key, less the sizes of the inputs."""
        *rest, types = self.key
        return *rest, tuple([aval if isinstance(aval, type) else kind_of(aval) for aval in types])

    def place_of(self, array: Any) -> int:
        """Which of `inputs` an array is."""
        return self._index[id(array)]

    def saved_of(self, node: Node) -> list[Any]:
        """What a node reads, unpacked."""
        return self._saved[self.number[node]]

    def _input(self, array: Any) -> int:
        place = self._index.setdefault(id(array), len(self.inputs))
        if place == len(self.inputs):
            self.inputs.append(array)
            self._avals.append(array.aval if type(array) is ARRAY else _aval_key(array))
        return place

    def _structure(self) -> tuple[Any, ...]:
        """The part of the key that is found node by node, with few calls for each of them: it is made at each pass."""
        nodes, number, grows = self.nodes, self.number, self._grows
        number_of, place_of, ends = number.get, self._index.get, () if grows else self.plan.ends
        flat: list[Any] = []
        more: list[Any] = []
        kept, inputs, avals, index = self._saved, self.inputs, self._avals, self._index
        for node in nodes:  # it may become longer
            saved = [] if ends and node in ends else node.saved()
            kept.append(saved)
            if type(node) is OpNode:  # it says how many edges and saved values there are
                flat.append(node.op)
                plain = not (node.hooks or node.retain or node.pre_hooks or node.post_hooks)
            else:
                flat.append(_kind(node))
                flat.append(len(saved))
                plain = False
            for child, slot in node.edges:
                at = number_of(child)
                if at is None and grows:
                    at = number[child] = len(nodes)
                    nodes.append(child)
                flat.append(at)
                flat.append(slot)
            for array in saved:
                place = place_of(id(array))
                if place is None:
                    place = index[id(array)] = len(inputs)
                    inputs.append(array)
                    avals.append(array.aval if type(array) is ARRAY else _aval_key(array))
                flat.append(place)
            if not plain:
                more.append(self._hooks(node))
        return tuple(flat), tuple(more)

    def _hooks(self, node: Node) -> Any:
        """What is to be known of a node with hooks, or of one that writes gradients."""
        hooks: list[Any] = [node.pre_hooks, node.post_hooks, *node.hooks]
        slots = []
        owner = None
        if isinstance(node, CompiledNode):
            self._compiled.append(node.compiled)
        if isinstance(node, AccumulateGrad):
            leaf = node.leaf
            hooks += [leaf._hooks, leaf._post_hooks]
            if self._grows or node not in self.plan.ends:
                self.owners.append(leaf)
                if leaf._post_hooks:
                    owner = id(leaf)
                    self.given.append(leaf)
        for slot, tensor in node.retained():
            grad = tensor._grad
            slots.append((slot, None if grad is None else self._input(getattr(grad, "value", grad))))
            self.owners.append(tensor)
        names = tuple([tuple([self._name_of(fn) for fn in found.snapshot()]) if found else None for found in hooks])
        return self.number[node], owner, names, tuple(slots)

    def name(self, hook: Any) -> Any:
        """What a hook is called in the key."""
        if hasattr(hook, "__self__") and hasattr(hook, "__func__"):  # each access to a method makes another object
            return self.name(hook.__self__), self.name(hook.__func__)
        self.hooks.append(hook)
        return id(hook)

    def _name_of(self, hook: Any) -> Any:
        """As `name`, for hooks of which other functions of the same code may take the place."""
        self.named.append(hook)
        if not replaceable(hook):
            return self.name(hook)
        self.hooks += [hook.__code__, hook.__globals__]
        place = self._places.setdefault(id(hook), len(self.functions))
        if place == len(self.functions):
            self.functions.append(hook)
        return id(hook.__code__), id(hook.__globals__), len(hook.__defaults__ or ()), place

    def _shared(self) -> tuple[int, ...]:
        """Names functions by identity after all, which close over variables that other hooks may write to."""
        closing = [fn for fn in self.functions if fn.__closure__]
        others = [fn for fn in self.named if id(fn) not in self._places] if closing else []
        others += [fn for compiled in self._compiled for fn in compiled.joint.hooks()] if closing else []
        if not others:
            return ()
        written = written_by(others)
        shared = [fn for fn in closing if any(id(cell) in written for cell in fn.__closure__ or ())]
        for fn in shared:
            del self._places[id(fn)]
        return tuple(map(self.name, shared))

    def place_of_function(self, hook: Any) -> int | None:
        """Which of `functions` a hook is."""
        return self._places.get(id(hook))

    def _rest(self) -> tuple[Any, ...]:
        """The rest of the key: where the pass starts, and what is not done of what it reaches."""
        number = self.number
        seeds = tuple([(number.get(edge.node), edge.slot) for edge, _ in self.seeds])
        if self._grows:
            return (seeds,)
        plan = self.plan
        stops = tuple(
            (number[node], tuple(self._stop_key(stop) for stop in plan.stops[node]))
            for node in plan.order if node in plan.stops
        )  # fmt: skip
        idle = frozenset([(number.get(edge.node), edge.slot) for edge in plan.idle])
        taken = tuple([(number[node], tuple(at)) for node, at in plan.captures.items() if node in number])
        return seeds, stops, idle, taken, frozenset([number[node] for node in plan.ends])

    def _stop_key(self, stop: Any) -> tuple[Any, ...]:
        members = tuple(
            (i, self.number[edge.node], edge.slot, len(_engine.hooks_of(edge).split(stop.group.id)[0]))
            for i, edge in stop.members
        )
        group = stop.group
        self.named.append(group.fn)
        return self.name(group.fn), group.first, len(group.places), stop.fires, stop.replaces, members

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
        for tensor, grad, hook in zip(owners, grads, outputs.last, strict=False):
            tensor._grad = None if hook is not None and hook.freed else grad
        results = self.no_results()
        for place, grad in zip(outputs.returned, grads[len(owners) :], strict=True):
            results[place] = grad
        return results

    def no_results(self) -> list[Any]:
        """None for each of the gradients that are to be returned."""
        return [None] * (len(self.wanted) if self._request.returned else 0)


class Tape:
    """A tape that is to be captured, in the order in which it runs.

    Attributes:
        plan, inputs: as for `Sight`.
        owners: Tensors that may get a gradient: leaves, then those that retain theirs.
        stand_ins: what is in the capture in place of `Sight.functions`.
    """

    def __init__(self, sight: Sight):
        self._sight = sight
        self.stand_ins = [StandIn(fn) for fn in sight.functions]
        self.seeds, self.plan, self.saved_of = sight.seeds, sight.plan, sight.saved_of
        self.inputs: list[Any] = []
        self._index: dict[int, int] = {}
        self.number = {node: i for i, node in enumerate(self.plan.order)}
        self.seed_index = [self._input(ct) for _, ct in self.seeds]
        for node in self.plan.order:
            for array in self.saved_of(node):
                self._input(array)
        self._leaves = [node.leaf for node in self.plan.run if isinstance(node, AccumulateGrad)]
        retained = [tensor for node in self.plan.order for _, tensor in node.retained()]
        for tensor in retained:
            if tensor._grad is not None:
                self._input(getattr(tensor._grad, "value", tensor._grad))
        self.owners = [*self._leaves, *retained]

    def place_of(self, array: Any) -> int:
        """Which input an array is."""
        return self._index[id(array)]

    def _input(self, array: Any) -> int:
        place = self._index.setdefault(id(array), len(self.inputs))
        if place == len(self.inputs):
            self.inputs.append(array)
        return place

    def stand_in(self, hook: Any) -> Any:
        """What a capture has in place of a hook."""
        place = self._sight.place_of_function(hook)
        return hook if place is None else self.stand_ins[place].fn

    def capture(
        self, types: Symbolic | None = None, results: Mapping[Node, list[Any]] | None = None
    ) -> tuple[GraphModule, Outputs]:
        """The whole pass as a graph with opaque hooks.

        Args:
            types: of the inputs, if they have symbols.
            results: per node, the types of its outputs then.
        """
        recorder = Recorder()
        captured = CapturePass(self, recorder, results or {})

        def run(*flat: Any) -> list[Any]:
            return captured.trace(list(flat))

        avals = [jax.typeof(value) for value in self.inputs] if types is None else types.avals
        closed, info = trace(run, avals, recorder)
        closed, order = schedule(closed)
        hooks = _hook_index(closed, order, captured)
        backward = Backward(
            shapes=tuple(jax.numpy.shape(value) for value in self.inputs),
            sizes=tuple(captured.sizes),
            checked=tuple(captured.checked),
            hook_index=tuple(hooks),
            grads=tuple(self.place_of(self._leaves[i]._value) for i in captured.written if i < len(self._leaves)),
            number_inputs=any(getattr(node, "has_number", False) for node in self.plan.run),
        )
        inputs = tuple(Input(name=f"input_{i}", source=f"L['inputs'][{i}]") for i in range(len(self.inputs)))
        gm = GraphModule(
            jaxpr=closed, inputs=inputs, info=info(), name="CompiledAutograd0", made_by="compiled_autograd",
            backward=backward, shapes=() if types is None else types.places,
        )  # fmt: skip
        place = {id(tensor): i for i, tensor in enumerate(self._sight.owners)}
        outputs = Outputs(
            inputs=tuple(map(self._sight.place_of, self.inputs)),
            written=tuple(place[id(self.owners[i])] for i in captured.written),
            returned=tuple(captured.returned),
            last=tuple(captured.last.get(id(self.owners[i])) for i in captured.written),
        )
        return gm, outputs


def _hook_index(closed: Any, order: list[int], captured: CapturePass) -> list[int]:
    """Per hook of the scheduled graph, its place in PyTorch's list; hooks inside of operations come last."""
    eqns = _compat.open_jaxpr(closed)[0].eqns
    by_capture = sorted((old, new) for new, old in enumerate(order) if eqns[new].primitive is trace_wrapped_p)
    places = {new: place for (_, new), place in zip(by_capture, captured.hook_places, strict=True)}
    further = itertools.count(captured.n_hooks)
    found = []
    for new, eqn in enumerate(eqns):
        found += [places[new]] if new in places else []
        for inner in inner_jaxprs(eqn):
            found += [next(further) for _, within in hooks_in(inner) if within.primitive is trace_wrapped_p]
    return found


def _kind(node: Node) -> Any:
    if isinstance(node, CompiledNode):
        return ("compiled", node.compiled, node.passes)
    if isinstance(node, OpNode):
        return node.op
    if isinstance(node, AccumulateGrad):
        return ("accumulate", node.leaf._grad is None)
    if node.keeps:
        return "retained"
    return ("node", node)


def _aval_key(value: Any) -> Any:
    # Python numbers and arrays of them have equal avals.
    return jax.typeof(value) if hasattr(value, "dtype") else type(value)


class Types(tuple[Any, ...]):
    """The avals of a tape's inputs, hashed by the shapes of a few: to hash an aval takes long.

    To compare them does not: what one compiled operation returns at each call has one aval, and the same one.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(tuple([getattr(aval, "shape", aval) for aval in self[:8]]))
