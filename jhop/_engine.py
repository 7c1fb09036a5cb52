"""Walks a tape backwards: sums the cotangents of each value, runs its hooks once, and calls each node once.

The order is a matter of the graph alone, so it is found first (`plan`), and a `Pass` then visits the nodes. The same
`Pass` runs on arrays (`backward()` as it is), on tracers (while compiled autograd captures) and, with other arithmetic,
on Tensors (`_record`, for `create_graph`).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jhop import _compat
from jhop._contract import check_contract
from jhop._errors import HookError
from jhop._hook import run_hooks
from jhop._node import AccumulateGrad, Edge, Node, set_grad_enabled
from jhop._source import describe_hook

_context = threading.local()


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
    """

    order: list[Node]
    wanted: set[Node] | None = None
    ends: frozenset[Node] = frozenset()
    idle: frozenset[Edge] = frozenset()
    captures: dict[Node, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    n_results: int = 0

    @property
    def run(self) -> list[Node]:
        """The nodes that are run, and not only visited."""
        return [node for node in self.order if node not in self.ends]

    def wants(self, edge: Edge) -> bool:
        """Whether a cotangent goes there."""
        return self.wanted is None or (edge.node in self.wanted and edge not in self.idle)


def capture_with(runner: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Sets what runs a backward pass in this thread instead of the eager engine; returns what was set."""
    before = getattr(_context, "runner", None)
    _context.runner = runner
    return before


def _dependencies(roots: Iterable[Node]) -> dict[Node, int]:
    """Per reachable node, how many edges lead to it. No recursion: tapes may be long."""
    counts = dict.fromkeys(roots, 0)
    stack = list(counts)
    while stack:
        for edge in stack.pop().edges:
            if edge.node not in counts:
                counts[edge.node] = 0
                stack.append(edge.node)
            counts[edge.node] += 1
    return counts


def execution_order(roots: list[Node], *, stack: bool = False) -> list[Node]:
    """The order in which nodes run: every node after all those that send cotangents to it.

    Args:
        roots: where the pass starts.
        stack: the order in which compiled autograd collects nodes (last edge first); otherwise the eager engine's:
            leaves as soon as and in the order that they are ready, other nodes latest first.
    """
    counts = _dependencies(roots)
    ready: list[Any] = []
    turn = itertools.count()
    order: list[Node] = []

    def push(node: Node) -> None:
        if stack:
            ready.append((0, 0, node))
        else:
            is_leaf = isinstance(node, AccumulateGrad)
            heapq.heappush(ready, (0, next(turn), node) if is_leaf else (1, -node.sequence, node))

    for node in dict.fromkeys(roots):
        if counts[node] == 0:
            push(node)
    while ready:
        node = (ready.pop() if stack else heapq.heappop(ready))[2]
        order.append(node)
        for edge in node.edges:
            counts[edge.node] -= 1
            if counts[edge.node] == 0:
                push(edge.node)
    return order


def plan(request: Request, *, stack: bool = False) -> Plan:
    """Finds the nodes to visit: with `inputs`, those on the paths to them. `stack` is as for `execution_order`."""
    order = execution_order([edge.node for edge, _ in request.seeds], stack=stack)
    if request.inputs is None:
        return Plan(order=order)
    targets = {edge.node for edge in request.inputs}
    running = set() if request.returned else targets.intersection(order)
    wanted = targets.intersection(order)
    idle: set[Edge] = set()
    for node in reversed(order):
        leads = [edge.node in wanted and edge not in idle for edge in node.edges]
        if any(leads):
            running.add(node)
            wanted.add(node)
        flows = node.flows() if node.many and node in wanted else None
        for slot, edges in enumerate(flows or ()):
            if Edge(node, slot) not in request.inputs and not any(leads[i] for i in edges):
                idle.add(Edge(node, slot))
    captures: dict[Node, list[tuple[int, int]]] = {}
    for place, edge in enumerate(request.inputs if request.returned else ()):
        captures.setdefault(edge.node, []).append((edge.slot, place))
    return Plan(
        order=[node for node in order if node in wanted],
        wanted=wanted,
        ends=frozenset(wanted - running),
        idle=frozenset(idle),
        captures=captures,
        n_results=len(request.inputs) if request.returned else 0,
    )


class Pass:
    """One backward pass over arrays. Subclasses change what happens at its marks.

    Gradients are written as the pass goes, as hooks on parameters expect, and put back if anything is raised.
    """

    recording = False  # whether what it does, and hooks do, is recorded on the tape

    def __init__(self, plan: Plan, *, keep_graph: bool):
        self._plan = plan
        self._wanted = plan.wanted
        self._keep_graph = keep_graph
        self._before: dict[int, tuple[Any, Any]] = {}  # by id: a Tensor, and its .grad before this pass
        self._results: list[Any] = [None] * plan.n_results

    def run(self, seeds: list[tuple[Edge, Any]]) -> list[Any]:
        """Visits the nodes, starting with the given cotangents; the gradients that are asked for, or None."""
        pending: dict[Node, list[Any]] = {}
        wants = self._plan.wants
        recording = set_grad_enabled(self.recording)
        try:
            for edge, ct in seeds:
                if wants(edge):
                    self._add(pending, edge, ct)
            for node in self._plan.order:
                cts = pending.pop(node, None)
                if cts is not None:
                    for edge, ct in zip(node.edges, self.visit(node, cts), strict=True):
                        if ct is not None:
                            self._add(pending, edge, ct)
            self.finish()
        except BaseException:
            for leaf, grad in self._before.values():
                leaf._grad = grad
            raise
        finally:
            set_grad_enabled(recording)
        return self._results

    def _add(self, pending: dict[Node, list[Any]], edge: Edge, ct: Any) -> None:
        slots = pending.setdefault(edge.node, [None] * len(edge.node.avals))
        old = slots[edge.slot]
        slots[edge.slot] = ct if old is None else self.add(old, ct)

    def visit(self, node: Node, cts: list[Any]) -> list[Any]:
        """Hooks, then the node: the cotangents for its edges."""
        for slot, hooks in enumerate(node.hooks):
            if hooks and cts[slot] is not None:
                cts[slot] = self.tensor_hooks(cts[slot], hooks)
        for slot, tensor in node.retained() if node.retain else ():
            if cts[slot] is not None:
                self.accumulate(tensor, cts[slot])
        leaf = node.leaf if isinstance(node, AccumulateGrad) else None
        if leaf is not None and leaf._hooks:
            cts[0] = self.tensor_hooks(cts[0], leaf._hooks)
        if self._wanted is not None:
            for slot, place in self._plan.captures.get(node, ()):
                self._results[place] = cts[slot]
            if node in self._plan.ends:
                return [None] * len(node.edges)
        if leaf is not None:
            self.accumulate(leaf, cts[0])
            self.post_accumulate(leaf)
            return []
        if node.pre_hooks or node.post_hooks:
            return self.hooked_node(node, cts)
        return self.node(node, cts)

    def hooked_node(self, node: Node, cts: list[Any]) -> list[Any]:
        """A node with hooks of its own: on the tuple of its cotangents before, on both tuples after."""
        for fn in node.pre_hooks.snapshot() if node.pre_hooks else ():
            cts = self._replaced(fn, fn(tuple(cts)), cts)
        outs = self.node(node, cts)
        for fn in node.post_hooks.snapshot() if node.post_hooks else ():
            outs = self._replaced(fn, fn(tuple(outs), tuple(cts)), outs)
        return outs

    def _replaced(self, fn: Any, returned: Any, before: list[Any]) -> list[Any]:
        """What a node hook made of a tuple of cotangents; None keeps them."""
        if returned is None:
            return before
        if not isinstance(returned, tuple) or len(returned) != len(before):
            raise HookError(
                f"{describe_hook(fn)} of a node must return a tuple of {len(before)} cotangents or None, but returned "
                f"{type(returned).__name__}" + (f" of {len(returned)}." if isinstance(returned, tuple) else ".")
            )
        if any(old is None and new is not None for new, old in zip(returned, before, strict=True)):
            raise HookError(
                f"{describe_hook(fn)} of a node returned a cotangent where it was given None: nothing flows there. "
                "Return None in its place."
            )
        pairs = zip(returned, before, strict=True)
        return [old if new is None else self.contract(fn, new, old) for new, old in pairs]

    def node(self, node: Node, cts: list[Any]) -> list[Any]:
        """The cotangents of a node's inputs, None where none flows or is wanted."""
        wanted, depends = self._wanted, node.depends
        if depends is None and len(cts) > 1 and any(ct is None for ct in cts):
            depends = node.flows()
        if wanted is None and depends is None:
            return self.compute(node, cts)
        asked = self.asked(node)
        if asked is not None and not any(asked):
            return [None] * len(node.edges)
        outs = self.compute(node, cts)
        if asked is not None:
            outs = [out if here else None for out, here in zip(outs, asked, strict=True)]
        if depends is not None:
            flows = frozenset[int]().union(*(depends[slot] for slot, ct in enumerate(cts) if ct is not None))
            outs = [out if i in flows else None for i, out in enumerate(outs)]
        return outs

    def compute(self, node: Node, cts: list[Any]) -> list[Any]:
        return node.apply(cts, node.saved(), self.asked(node))

    def asked(self, node: Node) -> tuple[bool, ...] | None:
        """Per edge of a node, whether its cotangent is asked for; None if all are."""
        return None if self._wanted is None else tuple(map(self._plan.wants, node.edges))

    def contract(self, fn: Any, returned: Any, ct: Any) -> Any:
        """What a hook returned for a cotangent, once it is known to be like it."""
        return check_contract(fn, returned, jax.typeof(ct))

    def add(self, old: Any, new: Any) -> Any:
        return _add(old, new)

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        return run_hooks(ct, hooks)

    def accumulate(self, tensor: Any, ct: Any) -> None:
        """Adds to a Tensor's `.grad`."""
        old = tensor._grad
        self._before.setdefault(id(tensor), (tensor, old))
        tensor._grad = ct if old is None else self.sum_of(old, ct)

    def sum_of(self, grad: Any, ct: Any) -> Any:
        """A `.grad`, which may be a Tensor, and what is to be added to it."""
        return _add(getattr(grad, "value", grad), ct)

    def post_accumulate(self, leaf: Any) -> None:
        for fn in leaf._post_hooks.snapshot() if leaf._post_hooks else ():
            run_post_hook(fn, leaf)

    def finish(self) -> None:
        if not self._keep_graph:
            for node in self._plan.run:
                node.release()


def run_post_hook(fn: Callable[[Any], Any], leaf: Any) -> None:
    """Runs a post-accumulate hook.

    Raises:
        HookError: it returned something.
    """
    returned = fn(leaf)
    if returned is not None:
        raise HookError(
            f"post-accumulate {describe_hook(fn)} must return None, but returned {type(returned).__name__}. "
            "It is given the Tensor: change its .grad instead."
        )


@jax.jit
def _add(old: Any, new: Any) -> Any:
    return old + new


# What runs a pass that is recorded: `_record` fills it, which stands above Tensors, as this file does not.
RECORDED: list[type[Pass]] = []


def backward(request: Request) -> list[Any]:
    """Runs a whole backward pass from checked cotangents, captured if compiled autograd is on.

    Returns:
        The gradients at `inputs`, None where none came; an empty list if none are to be returned.
    """
    runner = getattr(_context, "runner", None)
    tracing = any(isinstance(ct, _compat.Tracer) for _, ct in request.seeds)
    if runner is not None and not tracing and not request.create_graph:
        return runner(request)
    found = plan(request)
    for node in found.run:
        node.saved()  # a freed node is found before any hook has run
    if request.create_graph and any([node.unfold() for node in found.run]):
        found = plan(request)
    kind = RECORDED[0] if request.create_graph else Pass
    return kind(found, keep_graph=request.keep_graph).run(request.seeds)
