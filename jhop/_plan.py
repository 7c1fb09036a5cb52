"""Which nodes a backward pass visits, and in which order."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable
from typing import Any

from jhop._gates import LIVE, Gates, Stop
from jhop._node import AccumulateGrad, Edge, Node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a backward pass is asked for.

    Attributes:
        seeds: where it starts, and with which cotangents: arrays, or Tensors with `create_graph`.
        keep_graph: whether what was saved is kept for another pass.
        create_graph: whether the pass itself is recorded, so that its results can be differentiated.
        inputs: the values whose gradients are wanted; None for all leaves.
        returned: whether these gradients are returned, and no `.grad` of a leaf is touched.
    """

    seeds: list[tuple[Edge, Any]]
    keep_graph: bool
    create_graph: bool = False
    inputs: tuple[Edge, ...] | None = None
    returned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which nodes a pass visits.

    Attributes:
        order: the nodes, each after all those that send cotangents to it.
        wanted: those nodes as a set, if there are others that cotangents could flow to.
        ends: nodes where gradients are taken and nothing flows on: only the hooks of their Tensors run.
        idle: results of functions that lead to nothing wanted, though others of the same node do.
        captures: per node, (output, place in the results) of gradients that are returned.
        n_results: how many are.
        stops: per node, where hooks on several Tensors take their gradients before it is visited.
    """

    order: list[Node]
    wanted: set[Node] | None = None
    ends: frozenset[Node] = frozenset()
    idle: frozenset[Edge] = frozenset()
    captures: dict[Node, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    n_results: int = 0
    stops: dict[Node, list[Stop]] = dataclasses.field(default_factory=dict)

    @property
    def run(self) -> list[Node]:
        """The nodes that are run, and not only visited."""
        return [node for node in self.order if node not in self.ends] if self.ends else self.order

    def wants(self, edge: Edge) -> bool:
        """Whether a cotangent goes there."""
        return self.wanted is None or (edge.node in self.wanted and edge not in self.idle)


def _dependencies(roots: Iterable[Node]) -> dict[Node, int]:
    """Per reachable node, how many edges lead to it. No recursion: tapes may be long."""
    counts = dict.fromkeys(roots, 0)
    stack = list(counts)
    while stack:
        for node, _ in stack.pop().edges:
            if node in counts:
                counts[node] += 1
            else:
                counts[node] = 1
                stack.append(node)
    return counts


def execution_order(roots: list[Node], *, stack: bool = False, gates: Gates | None = None) -> list[Node]:
    """The order in which nodes run: every node after all those that send cotangents to it.

    Args:
        roots: where the pass starts.
        stack: the order in which compiled autograd collects nodes (last edge first); otherwise the eager engine's:
            leaves as soon as and in the order that they are ready, other nodes latest first.
        gates: what holds nodes back, if anything does.
    """
    counts = _dependencies(roots)
    ready: list[Any] = []
    turn = itertools.count()
    order: list[Node] = []

    def push_by_age(node: Node) -> None:
        is_leaf = isinstance(node, AccumulateGrad)
        heapq.heappush(ready, (0, next(turn), node) if is_leaf else (1, -node.sequence, node))

    def held_or_pushed(node: Node) -> None:
        for free in gates.arrived(node) if gates is not None else ():
            push(free)

    push = ready.append if stack else push_by_age
    arrived = push if gates is None else held_or_pushed
    for node in dict.fromkeys(roots):
        if counts[node] == 0:
            arrived(node)
    while True:
        while ready:
            node = ready.pop() if stack else heapq.heappop(ready)[2]
            order.append(node)
            if gates is not None:
                gates.before(node)
            for child, _ in node.edges:
                left = counts[child] = counts[child] - 1
                if left == 0:
                    arrived(child)
        for node in gates.loosen() if gates is not None else ():
            push(node)
        if not ready:
            return order


def plan(request: Request, *, stack: bool = False) -> Plan:
    """Finds the nodes to visit: with `inputs`, those on the paths to them. `stack` is as for `execution_order`."""
    roots = [edge.node for edge, _ in request.seeds]
    order = execution_order(roots, stack=stack)
    if request.inputs is None:
        order, stops = _gated(order, roots, set(order), stack) if LIVE else (order, {})
        return Plan(order=order, stops=stops)
    targets = {edge.node for edge in request.inputs}
    running = set() if request.returned else targets.intersection(order)
    wanted = targets.intersection(order)
    idle: set[Edge] = set()
    for node in reversed(order):
        leads = [edge.node in wanted and edge not in idle for edge in node.edges]
        if any(leads):
            running.add(node)
            wanted.add(node)
        if node.many and node in running:
            slots = {edge.slot for edge in request.inputs if edge.node is node}
            for i, (end, _) in enumerate(node.edges):
                if end.keeps and node.keeps_for(i, leads, slots):
                    wanted.add(end)
                    leads[i] = True
        flows = node.flows() if node.many and node in wanted else None
        for slot, edges in enumerate(flows or ()):
            if Edge(node, slot) not in request.inputs and not any(leads[i] for i in edges):
                idle.add(Edge(node, slot))
    captures: dict[Node, list[tuple[int, int]]] = {}
    for place, edge in enumerate(request.inputs if request.returned else ()):
        captures.setdefault(edge.node, []).append((edge.slot, place))
    order = [node for node in order if node in wanted]
    order, stops = _gated(order, roots, wanted, stack) if LIVE else (order, {})
    return Plan(
        order=order,
        wanted=wanted,
        ends=frozenset(wanted - running),
        idle=frozenset(idle),
        captures=captures,
        n_results=len(request.inputs) if request.returned else 0,
        stops=stops,
    )


def _gated(
    order: list[Node], roots: list[Node], nodes: set[Node], stack: bool
) -> tuple[list[Node], dict[Node, list[Stop]]]:
    """The order of these nodes in which hooks on several Tensors have their turn, and where that is."""
    gates = Gates(nodes)
    if not gates:
        return order, {}
    order, stops = [], {}
    due: list[Stop] = []
    for node in execution_order(roots, stack=stack, gates=gates):
        due += gates.stops.get(node, ())
        if node in nodes:
            order.append(node)
            if due:
                stops[node], due = due, []
    return order, stops
