"""Walks a tape backwards: sums the cotangents of each value, runs its hooks once, and calls each node once.

The order is a matter of the graph alone, so it is found first (`execution_order`), and a `Pass` then visits the nodes.
The same `Pass` runs on arrays (`backward()` as it is) and on tracers (while compiled autograd captures).
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat
from jhop._contract import check_contract
from jhop._errors import HookError
from jhop._hook import run_hooks
from jhop._node import AccumulateGrad, Edge, Node, set_grad_enabled
from jhop._source import describe_hook

_context = threading.local()


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
            leaves as soon as they are ready, other nodes latest first.
    """
    counts = _dependencies(roots)
    ready: list[Any] = []
    order: list[Node] = []

    def push(node: Node) -> None:
        if stack:
            ready.append((0, 0, node))
        else:
            heapq.heappush(ready, (0 if isinstance(node, AccumulateGrad) else 1, -node.sequence, node))

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


class Pass:
    """One backward pass over arrays. Subclasses change what happens at its marks.

    Gradients are written as the pass goes, as hooks on parameters expect, and put back if anything is raised.
    """

    def __init__(self, *, keep_graph: bool):
        self._keep_graph = keep_graph
        self._before: dict[int, tuple[Any, Any]] = {}  # by id: a Tensor, and its .grad before this pass

    def run(self, order: list[Node], seeds: list[tuple[Edge, Any]]) -> None:
        """Runs the nodes of `order`, starting with the given cotangents."""
        pending: dict[Node, list[Any]] = {}
        recording = set_grad_enabled(False)
        try:
            for edge, ct in seeds:
                self._add(pending, edge, ct)
            for node in order:
                cts = pending.pop(node, None)
                if cts is not None:
                    for edge, ct in zip(node.edges, self.visit(node, cts), strict=True):
                        if ct is not None:
                            self._add(pending, edge, ct)
            self.finish(order)
        except BaseException:
            for leaf, grad in self._before.values():
                leaf._grad = grad
            raise
        finally:
            set_grad_enabled(recording)

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
        if isinstance(node, AccumulateGrad):
            leaf = node.leaf
            if leaf._hooks:
                cts[0] = self.tensor_hooks(cts[0], leaf._hooks)
            self.accumulate(leaf, cts[0])
            self.post_accumulate(leaf)
            return []
        if node.pre_hooks or node.post_hooks:
            return self.hooked_node(node, cts)
        return self.node(node, cts)

    def hooked_node(self, node: Node, cts: list[Any]) -> list[Any]:
        """A node with hooks of its own: on the tuple of its cotangents before, on both tuples after."""
        for fn in node.pre_hooks.snapshot() if node.pre_hooks else ():
            cts = _replaced(fn, fn(tuple(cts)), cts)
        outs = self.node(node, cts)
        for fn in node.post_hooks.snapshot() if node.post_hooks else ():
            outs = _replaced(fn, fn(tuple(outs), tuple(cts)), outs)
        return outs

    def node(self, node: Node, cts: list[Any]) -> list[Any]:
        return node.apply(full_cts(node, cts), node.saved())

    def add(self, old: Any, new: Any) -> Any:
        return _add(old, new)

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        return run_hooks(ct, hooks)

    def accumulate(self, tensor: Any, ct: Any) -> None:
        """Adds to a Tensor's `.grad`."""
        old = tensor._grad
        self._before.setdefault(id(tensor), (tensor, old))
        tensor._grad = ct if old is None else _add(getattr(old, "value", old), ct)

    def post_accumulate(self, leaf: Any) -> None:
        for fn in leaf._post_hooks.snapshot() if leaf._post_hooks else ():
            run_post_hook(fn, leaf)

    def finish(self, order: list[Node]) -> None:
        if not self._keep_graph:
            for node in order:
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


def _replaced(fn: Any, returned: Any, before: list[Any]) -> list[Any]:
    """What a node hook made of a tuple of cotangents; None keeps them."""
    if returned is None:
        return before
    if not isinstance(returned, tuple) or len(returned) != len(before):
        raise HookError(
            f"{describe_hook(fn)} of a node must return a tuple of {len(before)} cotangents or None, but returned "
            f"{type(returned).__name__}" + (f" of {len(returned)}." if isinstance(returned, tuple) else ".")
        )
    pairs = zip(returned, before, strict=True)
    return [old if new is None else check_contract(fn, new, jax.typeof(old)) for new, old in pairs]


@jax.jit
def _add(old: Any, new: Any) -> Any:
    return old + new


def full_cts(node: Node, cts: list[Any]) -> list[Any]:
    """Cotangents with zeros for outputs that nothing depends on."""
    return [jnp.zeros(aval.shape, aval.dtype) if ct is None else ct for ct, aval in zip(cts, node.avals, strict=True)]


def backward(seeds: list[tuple[Edge, Any]], *, keep_graph: bool) -> None:
    """Runs a whole backward pass from checked cotangents, captured if compiled autograd is on."""
    roots = [edge.node for edge, _ in seeds]
    runner = getattr(_context, "runner", None)
    tracing = any(isinstance(ct, _compat.Tracer) for _, ct in seeds)
    if runner is not None and not tracing:
        runner(seeds, keep_graph)
    else:
        for node in (order := execution_order(roots)):
            node.saved()  # a freed node is found before any hook has run
        Pass(keep_graph=keep_graph).run(order, seeds)
