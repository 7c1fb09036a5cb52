"""Walks a tape backwards: sums the cotangents of each value, runs its hooks once, and calls each node once.

The order is a matter of the graph alone, so it is found first (`_plan`), and a `Pass` then visits the nodes. The same
`Pass` runs on arrays (`backward()` as it is), on tracers (while compiled autograd captures) and, with other arithmetic,
on Tensors (`_record`, for `create_graph`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jhop import _compat, _gradients
from jhop._append import class_name
from jhop._contract import check_contract
from jhop._errors import HookError
from jhop._gates import Group, GroupHook, Stop
from jhop._hook import run_hooks
from jhop._node import AccumulateGrad, Edge, Node, OpNode, set_grad_enabled
from jhop._plan import Plan, Request, plan
from jhop._source import describe_hook
from jhop._trace_wrapped import calls_at_once

_context = threading.local()


def capture_with(runner: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Sets what runs a backward pass in this thread instead of the eager engine; returns what was set."""
    before = getattr(_context, "runner", None)
    _context.runner = runner
    return before


def _saved_of(node: Node) -> list[Any]:
    return node.saved()


class Pass:
    """One backward pass over arrays. Subclasses change what happens at its marks.

    Gradients are written as the pass goes, as hooks on parameters expect, and put back if anything is raised.
    """

    recording = False  # whether what it does, and hooks do, is recorded on the tape

    def __init__(self, plan: Plan, *, keep_graph: bool, saved_of: Callable[[Node], list[Any]] = _saved_of):
        self._plan = plan
        self._wanted = plan.wanted
        self._keep_graph = keep_graph
        self._saved_of = saved_of
        self._before: dict[int, tuple[Any, Any]] = {}  # by id: a Tensor, and its .grad before this pass
        self._results: list[Any] = [None] * plan.n_results
        self._taken: dict[Group, list[Any]] = {}  # the gradients of groups, as far as they are known
        self._rest: dict[Any, Any] = {}  # per value that a group took: its hooks that have not run
        self._at_once = calls_at_once()

    def run(self, seeds: list[tuple[Edge, Any]]) -> list[Any]:
        """Visits the nodes, starting with the given cotangents; the gradients that are asked for, or None."""
        pending: dict[Node, list[Any]] = {}
        stops = self._plan.stops
        recording = set_grad_enabled(self.recording)
        try:
            wants = self._plan.wants
            self._add(pending, [(edge, ct) for edge, ct in seeds if wants(edge)])
            for node in self._plan.order:
                if stops:
                    for stop in stops.get(node, ()):
                        self._stop(stop, pending)
                cts = pending.pop(node, None)
                if cts is not None:
                    self._add(pending, zip(node.edges, self.visit(node, cts), strict=True))
            self.finish()
        except BaseException:
            for leaf, grad in self._before.values():
                leaf._grad = grad
            raise
        finally:
            set_grad_enabled(recording)
        return self._results

    def _add(self, pending: dict[Node, list[Any]], pairs: Iterable[tuple[Edge, Any]]) -> None:
        """Sends cotangents along edges."""
        for (node, slot), ct in pairs:
            if ct is not None:
                slots = pending.get(node)
                if slots is None:
                    slots = pending[node] = [None] * len(node.avals)
                old = slots[slot]
                slots[slot] = ct if old is None else self.add(old, ct)

    def _stop(self, stop: Stop, pending: dict[Node, list[Any]]) -> None:
        """Takes gradients of a group, after the hooks of each that were registered before; runs its hook if it can."""
        group = stop.group
        taken = self._taken.setdefault(group, [None] * len(group.places))
        known = any(ct is not None for ct in taken)
        for i, edge in stop.members:
            cts = pending.get(edge.node)
            if cts is None or cts[edge.slot] is None:
                continue
            hooks, self._rest[edge] = self._rest.get(edge, hooks_of(edge)).split(group.id)
            if hooks:
                cts[edge.slot] = self.tensor_hooks(cts[edge.slot], hooks)
            taken[i] = cts[edge.slot]
        if not stop.fires or (known and group.first) or all(ct is None for ct in taken):
            return
        given = [ct for ct in taken if ct is not None] if group.first else taken
        made = self.tuple_hook(GroupHook(stop), given)
        for i, edge in stop.members:
            if taken[i] is not None:
                pending[edge.node][edge.slot] = made[0 if group.first else i]

    def visit(self, node: Node, cts: list[Any]) -> list[Any]:
        """Hooks, then the node: the cotangents for its edges."""
        plain = not (node.hooks or node.retain or node.pre_hooks or node.post_hooks)
        if plain and self._wanted is None and type(node) is OpNode:  # most nodes
            return self.node(node, cts)
        rest = self._rest
        for slot, hooks in enumerate(node.hooks):
            if rest:
                hooks = rest.get((node, slot), hooks)
            if hooks and cts[slot] is not None:
                cts[slot] = self.tensor_hooks(cts[slot], hooks)
        for slot, tensor in node.retained() if node.retain else ():
            if cts[slot] is not None:
                self.accumulate(tensor, cts[slot])
        leaf = node.leaf if isinstance(node, AccumulateGrad) else None
        if leaf is not None and leaf._hooks:
            hooks = rest.get((node, 0), leaf._hooks)
            if hooks:
                cts[0] = self.tensor_hooks(cts[0], hooks)
        if self._wanted is not None:
            for slot, place in self._plan.captures.get(node, ()):
                self._results[place] = cts[slot]
            if node in self._plan.ends:
                return [None] * len(node.edges)
        if node.pre_hooks or node.post_hooks:
            return self._hooked_node(node, cts)
        return self.node(node, cts) if leaf is None else self._leaf(leaf, cts)

    def _leaf(self, leaf: Any, cts: list[Any]) -> list[Any]:
        self.accumulate(leaf, cts[0])
        self.post_accumulate(leaf)
        return []

    def _hooked_node(self, node: Node, cts: list[Any]) -> list[Any]:
        """A node with hooks of its own: on the tuple of its cotangents before, on both tuples after."""
        for fn in node.pre_hooks.snapshot() if node.pre_hooks else ():
            cts = self.tuple_hook(fn, cts)
        if isinstance(node, AccumulateGrad):
            outs = self._leaf(node.leaf, cts)
            for fn in node.post_hooks.snapshot() if node.post_hooks else ():
                self.end_hook(fn, node.leaf, cts)
            return outs
        outs = self.node(node, cts)
        for fn in node.post_hooks.snapshot() if node.post_hooks else ():
            outs = self.tuple_hook(fn, outs, cts)
        return outs

    def tuple_hook(self, fn: Any, cts: list[Any], *others: list[Any]) -> list[Any]:
        """Calls a hook on tuples; it may replace the first of them."""
        returned = checked_tuple(fn, fn(tuple(cts), *map(tuple, others)), cts)
        if returned is None:
            return cts
        pairs = zip(returned, cts, strict=True)
        return [old if new is None else self.contract(fn, new, old) for new, old in pairs]

    def end_hook(self, fn: Any, leaf: Any, cts: list[Any]) -> None:
        """Calls the hook after a leaf's node, which sends nothing on."""
        self.tuple_hook(fn, [], cts)

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
        return node.apply(cts, self._saved_of(node), self.asked(node))

    def asked(self, node: Node) -> tuple[bool, ...] | None:
        """Per edge of a node, whether its cotangent is asked for; None if all are."""
        return None if self._wanted is None else tuple(map(self._plan.wants, node.edges))

    def contract(self, fn: Any, returned: Any, ct: Any) -> Any:
        """What a hook returned for a cotangent, once it is known to be like it."""
        if type(returned) is type(ct) and returned.aval is ct.aval:  # what it mostly is
            return returned
        return check_contract(fn, returned, jax.typeof(ct))

    def add(self, old: Any, new: Any) -> Any:
        return _add(old, new)

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        if not self._at_once or isinstance(ct, _compat.Tracer):
            return run_hooks(ct, hooks)
        for fn in hooks.snapshot():  # as `run_hooks`, less what it does for pytrees and tracers
            returned = fn(ct)
            if returned is not None:
                ct = self.contract(fn, returned, ct)
        return ct

    def accumulate(self, tensor: Any, ct: Any) -> None:
        """Adds to a Tensor's `.grad`."""
        _gradients.use(tensor, "runs a backward pass that writes")
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


def hooks_of(edge: Edge) -> Any:
    """The hooks of the Tensor that an edge leads to."""
    node = edge.node
    return node.leaf._hooks if isinstance(node, AccumulateGrad) else node.hooks_at(edge.slot)


def run_post_hook(fn: Callable[[Any], Any], leaf: Any) -> None:
    """Runs a post-accumulate hook.

    Raises:
        HookError: it returned something.
    """
    returned = fn(leaf)
    if returned is not None:
        raise HookError(
            f"post-accumulate {describe_hook(fn)} must return None, but returned {class_name(returned)}. "
            "It is given the Tensor: change its .grad instead."
        )


def checked_tuple(fn: Any, returned: Any, before: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a node hook returned for the cotangents `before`: a tuple of as many, or None, which keeps them.

    Raises:
        HookError: it is something else, or has a cotangent where nothing flows.
    """
    if returned is None:
        return None
    if not isinstance(returned, tuple) or len(returned) != len(before):
        raise HookError(
            f"{describe_hook(fn)} of a node must return a tuple of {len(before)} cotangents or None, but returned "
            f"{class_name(returned)}" + (f" of {len(returned)}." if isinstance(returned, tuple) else ".")
        )
    if any(old is None and new is not None for new, old in zip(returned, before, strict=True)):
        raise HookError(
            f"{describe_hook(fn)} of a node returned a cotangent where it was given None: nothing flows there. "
            "Return None in its place."
        )
    return returned


@jax.jit
def _add(old: Any, new: Any) -> Any:
    return old + new


# What runs a pass that is recorded: `_record` fills it, which stands above Tensors, as this file does not.
RECORDED: list[type[Pass]] = []

# What runs a pass that looks for NaN: `_anomaly` fills it, which stands above compiled functions.
CHECKED: list[Callable[[Request], list[Any]]] = []


def backward(request: Request) -> list[Any]:
    """Runs a whole backward pass from checked cotangents, captured if compiled autograd is on.

    Returns:
        The gradients at `inputs`, None where none came; an empty list if none are to be returned.
    """
    outer = getattr(_context, "ending", None)
    ending: list[Callable[[], Any]] = []  # a pass that a hook runs has its own
    _context.ending = ending
    try:
        results = _backward(request)
        for fn in ending:  # one of these may queue another
            fn()
        return results
    finally:
        _context.ending = outer


def at_end(fn: Callable[[], Any]) -> bool:
    """Queues a function for the end of this thread's backward pass; says whether there is one."""
    ending = getattr(_context, "ending", None)
    if ending is not None:
        ending.append(fn)
    return ending is not None


def _backward(request: Request) -> list[Any]:
    runner = getattr(_context, "runner", None)
    tracing = any(isinstance(ct, _compat.Tracer) for _, ct in request.seeds)
    if runner is not None and not tracing and not request.create_graph:
        return runner(request)
    return by_node(request)


def by_node(request: Request, saved_of: Callable[[Node], list[Any]] = _saved_of) -> list[Any]:
    """Runs a backward pass node by node; arguments and result are as for `backward`.

    Args:
        request: the pass.
        saved_of: what nodes kept, where somebody has asked them before.
    """
    found = plan(request)
    for node in found.run:
        node.check()  # a freed node is found before any hook has run
    if request.create_graph and any([node.unfold() for node in found.run]):
        found = plan(request)
    kind = RECORDED[0] if request.create_graph else Pass
    return kind(found, keep_graph=request.keep_graph, saved_of=saved_of).run(request.seeds)
