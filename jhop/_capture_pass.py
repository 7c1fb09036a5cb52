"""The engine's pass over tracers: it becomes one graph, with marks where PyTorch's graph has nodes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from jhop import _compat, _engine, _gradients, _state
from jhop._boundary import accumulate_grad, aot_prologue, validate_outputs
from jhop._capture import Recorder
from jhop._compiled import CompiledNode
from jhop._graph import Info
from jhop._hook_options import call_with_none
from jhop._interp import evaluate
from jhop._leaves import declare_state
from jhop._node import Node, full_cts
from jhop._trace_wrapped import trace_wrapped, trace_wrapped_p


class CapturePass(_engine.Pass):
    """The engine's pass over tracers.

    Args:
        tape: the tape.
        recorder: takes notes.
        types: per node, the types of its outputs, where these are not those that the node knows.

    Attributes:
        written, returned: what its results are, see `_tape.Outputs`.
    """

    def __init__(self, tape: Any, recorder: Recorder, types: Mapping[Node, list[Any]]):
        super().__init__(tape.plan, keep_graph=True)
        self._tape = tape
        self._recorder = recorder
        self._types = types
        self._flat: list[Any] = []
        self._grads: dict[int, Any] = {}
        self.last: dict[int, PostAccumulate] = {}  # by id of a leaf: the last hook after its accumulation
        self._uses: dict[int, int] = {}  # how often a compiled function occurs
        self._origin: Any = None
        self.sizes: list[int] = []
        self.checked: list[int] = []
        self.n_hooks = 0
        self.hook_places: list[int] = []
        self.written: list[int] = []
        self.returned: list[int] = []

    def trace(self, flat: list[Any]) -> list[Any]:
        """Runs the pass; the new gradients of leaves and Tensors that retain theirs, then those that are asked for."""
        try:
            return self._trace(flat)
        finally:  # what holds tracers
            for held in (self._flat, self._grads, self._taken, self._results):
                held.clear()

    def _trace(self, flat: list[Any]) -> list[Any]:
        tape = self._tape
        self._flat = flat
        seeds = [flat[i] for i in tape.seed_index]
        self._origin = "GraphRoot (NodeCall 0)"
        self.checked.append(0)
        for edge, _ in tape.seeds:
            self.sizes.extend(edge.node.avals[edge.slot].shape)
        checked = validate_outputs(seeds)
        self._note(checked)
        results = self.run([(edge, ct) for (edge, _), ct in zip(tape.seeds, checked, strict=True)])
        self.written = [i for i, tensor in enumerate(tape.owners) if id(tensor) in self._grads]
        self.returned = [i for i, result in enumerate(results) if result is not None]
        return [self._grads[id(tape.owners[i])] for i in self.written] + [results[i] for i in self.returned]

    def _note(self, values: list[Any], **known: Any) -> None:
        for value in values:
            self._recorder.note(value, Info(origin=self._origin, stage="captured", **known))

    def visit(self, node: Node, cts: list[Any]) -> list[Any]:
        self._origin = f"{node.name()} (NodeCall {self._tape.number[node] + 1})"
        return super().visit(node, cts)

    def tuple_hook(self, fn: Any, cts: list[Any], *others: list[Any]) -> list[Any]:
        self._hook_place()
        kind = "post_hook" if others else "pre_hook"
        # None is structure in a pytree: the hook is given it where no cotangent came.
        outs = list(trace_wrapped(tuple(cts), *map(tuple, others), fn=TupleHook(self._tape.stand_in(fn)), kind=kind))
        self._note([out for out in outs if out is not None])
        return outs

    def end_hook(self, fn: Any, leaf: Any, cts: list[Any]) -> None:
        # It is given no cotangent to replace, so it is tied to the new gradient, which it comes after.
        self._hook_place()
        grad = self._grads[id(leaf)]
        self._grads[id(leaf)] = out = trace_wrapped(grad, cts[0], fn=EndHook(self._tape.stand_in(fn)), kind="post_hook")
        self._note([out])

    def compute(self, node: Node, cts: list[Any]) -> list[Any]:
        saved = [self._flat[self._tape.place_of(array)] for array in self._tape.saved_of(node)]
        if isinstance(node, CompiledNode) and node.passes is None:
            return self._compiled(node, saved, cts)
        self.checked.append(len(self.sizes))
        for edge in node.edges:
            self.sizes.extend(edge.node.avals[edge.slot].shape)
        outs = node.apply(full_cts(node, cts, self._types.get(node)), saved, self.asked(node))
        self._note(outs)
        checked = validate_outputs(outs)
        self._note(checked)
        return checked

    def _compiled(self, node: CompiledNode, saved: list[Any], cts: list[Any]) -> list[Any]:
        self.n_hooks += 1  # the backward object itself stands in PyTorch's list of hooks
        for shape in [aval.shape for aval in node.avals] + node.input_shapes:
            self.sizes.extend(shape)
        for edge in node.edges:
            self.sizes.extend(edge.node.avals[edge.slot].shape)
        compiled = node.compiled
        use = self._uses[compiled.aot_id] = self._uses.get(compiled.aot_id, -1) + 1
        gm = compiled.backward_for(cts, self.asked(node)).gm
        full = full_cts(node, cts, self._types.get(node))
        values = aot_prologue(saved, full, aot_id=compiled.aot_id, call=use)
        self._note(values)

        def note(variable: Any, value: Any) -> None:
            info = gm.info.get(variable, Info())
            origin = self._origin if info.origin is None else info.origin
            self._recorder.update(value, name=info.name, origin=origin, aot=(compiled.aot_id, use), stage="captured")

        for eqn in _compat.open_jaxpr(gm.jaxpr)[0].eqns:
            if eqn.primitive is trace_wrapped_p:
                self._hook_place()
        return compiled.joint.sent(evaluate(gm.jaxpr, values, gm.rule_for(values), note=note))

    def _hook_place(self) -> None:
        self.hook_places.append(self.n_hooks)
        self.n_hooks += 1

    def add(self, old: Any, new: Any) -> Any:
        total = old + new
        self._note([total])
        return total

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        for fn in hooks.snapshot():
            self._hook_place()
            ct = trace_wrapped(ct, fn=self._tape.stand_in(fn), kind="tensor_pre_hook")
        self._note([ct])
        return ct

    def none_hook(self, fn: Any, cts: list[Any]) -> None:
        # There is no cotangent of its own to call it on, so it is tied to one that reaches the node.
        self._hook_place()
        slot = next(i for i, ct in enumerate(cts) if ct is not None)
        cts[slot] = trace_wrapped(cts[slot], fn=NoneHook(self._tape.stand_in(fn)), kind="tensor_pre_hook")
        self._note([cts[slot]])

    def accumulate(self, tensor: Any, ct: Any) -> None:
        place_of = self._tape.place_of
        leaf = self._flat[place_of(tensor._value)] if tensor.is_leaf else ct
        old = tensor._grad
        held = None if old is None else self._flat[place_of(getattr(old, "value", old))]
        self._grads[id(tensor)] = grad = accumulate_grad(ct, leaf, held)
        self._note([grad])

    def post_accumulate(self, leaf: Any) -> None:
        for fn in leaf._post_hooks.snapshot() if leaf._post_hooks else ():
            self._hook_place()
            hook = self.last[id(leaf)] = PostAccumulate(self._tape.stand_in(fn), leaf, self.last.get(id(leaf)))
            out = trace_wrapped(self._grads[id(leaf)], fn=hook, kind="post_acc_grad_hook")
            self._note([out])
            self._grads[id(leaf)] = out

    def finish(self) -> None:
        pass


class PostAccumulate:
    """A post-accumulate hook as a function of the new gradient: it sees and changes `leaf.grad`.

    Attributes:
        freed: 1 if the hook, in the last run, left `leaf.grad` at None. The graph returns a gradient all the same.
            It is state of the hook, and a number, as flags are guarded.
    """

    __slots__ = ("__wrapped__", "_before", "_leaf", "freed")

    def __init__(self, fn: Callable[[Any], None], leaf: Any, before: PostAccumulate | None):
        self.__wrapped__ = fn
        self._leaf = weakref.ref(leaf)  # a capture that is kept for later does not keep the parameter
        self._before = before
        self.freed = 0

    def __call__(self, grad: Any) -> Any:
        leaf = self._leaf()
        if leaf is None:
            return None
        with _state.LOCK:
            before = leaf._grad
            leaf._grad = None if self._before is not None and self._before.freed else grad
            try:
                with _gradients.there(leaf):
                    _engine.run_post_hook(self.__wrapped__, leaf)
                self.freed = int(leaf._grad is None)
                return grad if leaf._grad is None else getattr(leaf._grad, "value", leaf._grad)
            finally:
                leaf._grad = before


class TupleHook:
    """A hook on tuples of cotangents, whose result is checked."""

    __slots__ = ("__wrapped__",)

    def __init__(self, fn: Callable[..., Any]):
        self.__wrapped__ = fn

    def __call__(self, cts: tuple[Any, ...], *others: tuple[Any, ...]) -> Any:
        return _engine.checked_tuple(self.__wrapped__, self.__wrapped__(cts, *others), cts)


class EndHook:
    """The hook after a leaf's node as a function of the leaf's new gradient, which it does not see."""

    __slots__ = ("__wrapped__",)

    def __init__(self, fn: Callable[..., Any]):
        self.__wrapped__ = fn

    def __call__(self, grad: Any, ct: Any) -> None:
        _engine.checked_tuple(self.__wrapped__, self.__wrapped__((), (ct,)), ())


class NoneHook:
    """The hook of a value that nothing reaches, as a function of another one's cotangent, which it does not see."""

    __slots__ = ("__wrapped__",)

    def __init__(self, fn: Callable[..., Any]):
        self.__wrapped__ = fn

    def __call__(self, ct: Any) -> None:
        call_with_none(self.__wrapped__)


declare_state(NoneHook, "__wrapped__")
declare_state(TupleHook, "__wrapped__")
declare_state(EndHook, "__wrapped__")
declare_state(PostAccumulate, "__wrapped__", "_leaf", "_before", "freed")
