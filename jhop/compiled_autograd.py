"""Compiled autograd: a whole backward pass, over everything on the tape, captured as one graph.

Inside `enable(compiler_fn)`, `backward()` does not run node by node. The engine walks the tape once over tracers, which
gives a `GraphModule` whose inputs are the incoming gradient and everything that nodes saved, whose hooks are opaque,
and whose outputs are the new gradients. `compiler_fn` makes a callable of it. Gradients are assigned after it returned,
so either all of them are, or none.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jhop import _compat, _engine, _state
from jhop._boundary import accumulate_grad, aot_prologue, validate_outputs
from jhop._capture import Backward, Recorder, trace
from jhop._contract import WeakIdentity, identity_key
from jhop._errors import HookError, JhopError, Unsupported
from jhop._forward import CompiledNode
from jhop._graph import GraphModule, Info, Input
from jhop._hook import run_hooks
from jhop._interp import evaluate
from jhop._node import AccumulateGrad, Edge, Node, OpNode
from jhop._schedule import schedule
from jhop._source import describe_hook
from jhop._trace_wrapped import trace_wrapped, trace_wrapped_p
from jhop._walk import declare_state

# Captures by structure of the tape, the least recently used first. It holds hooks, so it must not grow for ever.
_cache: collections.OrderedDict[Any, Callable[..., Any]] = collections.OrderedDict()
_CACHE_SIZE = 128
_lock = threading.Lock()


@contextlib.contextmanager
def enable(compiler_fn: Callable[[GraphModule], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block, this thread's `backward()` captures the pass and runs what `compiler_fn` makes of it.

    Args:
        compiler_fn: `compiler_fn(gm) -> callable` on the graph's flat inputs, for instance
            `lambda gm: jhop.compile(gm, fullgraph=True)`. It is called once per structure of the tape: the result is
            used again for tapes of the same operations, shapes and hooks.

    Raises:
        JhopError: `compiler_fn` is not callable.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
        >>> _ = x.register_hook(lambda grad: grad * grad)
        >>> with jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True)):
        ...     (x * 3.0).sum().backward()
        >>> x.grad.tolist()
        [9.0, 9.0]

    The counterpart in PyTorch is `torch._dynamo.compiled_autograd._enable`.
    """
    if not callable(compiler_fn):
        raise JhopError(
            f"compiled_autograd.enable: expected a function from a GraphModule to a callable, got "
            f"{type(compiler_fn).__name__}."
        )

    def runner(request: _engine.Request) -> list[Any]:
        return _run(compiler_fn, request)

    before = _engine.capture_with(runner)
    try:
        yield
    finally:
        _engine.capture_with(before)


def _run(compiler_fn: Any, request: _engine.Request) -> list[Any]:
    tape = _Tape(request)
    key = (compiler_fn, *tape.key())
    with _lock:
        compiled = _cache.get(key)
        if compiled is not None:
            _cache.move_to_end(key)
    if compiled is None:
        gm = tape.capture()
        compiled = compiler_fn(gm)
        if not callable(compiled):
            raise JhopError(
                "compiled_autograd: compiler_fn must return a callable for the graph it was given, got "
                f"{type(compiled).__name__}."
            )
        with _lock:
            _cache[key] = compiled
            while len(_cache) > _CACHE_SIZE:
                _cache.popitem(last=False)
    grads = list(compiled(*tape.inputs))
    tape.assign(grads)
    if not keep_graph:
        for node in tape.order:
            node.release()


def reset() -> None:
    """Forgets captured backward passes."""
    with _lock:
        _cache.clear()


class _Tape:
    """A tape, and what a capture of it takes as inputs.

    Attributes:
        order: the nodes, as compiled autograd collects them.
        inputs: arrays: incoming gradients, what nodes saved, leaves and their present gradients, each array once.
    """

    def __init__(self, seeds: list[tuple[Edge, Any]]):
        self.seeds = seeds
        self.order = _engine.execution_order([edge.node for edge, _ in seeds], stack=True)
        self.inputs: list[Any] = []
        self._index: dict[int, int] = {}
        self.seed_index = [self._input(ct) for _, ct in seeds]
        self.saved: dict[Node, list[int]] = {}
        for node in self.order:
            if isinstance(node, AccumulateGrad):
                grad = node.leaf._grad
                arrays = [node.leaf._value] + ([] if grad is None else [getattr(grad, "value", grad)])
            else:
                arrays = node.saved()
            self.saved[node] = [self._input(array) for array in arrays]
        # Leaves and Tensors that retain their gradient, in order of their inputs.
        self.leaves = [node for node in self.order if isinstance(node, AccumulateGrad)]
        self.retained = [(node, slot, tensor) for node in self.order for slot, tensor in node.retained()]
        for _, _, tensor in self.retained:
            if tensor._grad is not None:
                self._input(getattr(tensor._grad, "value", tensor._grad))
        self.number = {node: i for i, node in enumerate(self.order)}

    def _input(self, array: Any) -> int:
        found = self._index.get(id(array))
        if found is None:
            found = self._index[id(array)] = len(self.inputs)
            self.inputs.append(array)
        return found

    def key(self) -> tuple[Any, ...]:
        """Equal for tapes whose captures are the same graph."""
        number = self.number
        nodes = tuple(
            (
                _kind(node),
                tuple((number[edge.node], edge.slot) for edge in node.edges),
                tuple(self.saved[node]),
                tuple(tuple(map(identity_key, hooks.snapshot())) if hooks else None for hooks in _hook_lists(node)),
                tuple(slot for slot, _ in node.retained()),
            )
            for node in self.order
        )
        retained = tuple(tensor._grad is None for _, _, tensor in self.retained)
        seeds = tuple((number[edge.node], edge.slot) for edge, _ in self.seeds)
        # A hook on a parameter is given the parameter itself.
        owners = tuple(WeakIdentity(node.leaf) if node.leaf._post_hooks else None for node in self.leaves)
        return nodes, retained, owners, tuple(self.seed_index), seeds, tuple(_aval_key(value) for value in self.inputs)

    def capture(self) -> GraphModule:
        """The whole pass as a graph with opaque hooks."""
        recorder = Recorder()
        captured = _CapturePass(self, recorder)

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
            grads=tuple(self.saved[node][0] for node in self.leaves),
            number_inputs=any(getattr(node, "has_number", False) for node in self.order),
        )
        inputs = tuple(Input(name=f"input_{i}", source=f"L['inputs'][{i}]") for i in range(len(self.inputs)))
        return GraphModule(
            jaxpr=closed, inputs=inputs, info=info, name="CompiledAutograd0", made_by="compiled_autograd",
            backward=backward,
        )  # fmt: skip

    def assign(self, grads: list[Any]) -> None:
        """Writes the new gradients, once all of them are known to be right."""
        tensors = [*(node.leaf for node in self.leaves), *(tensor for _, _, tensor in self.retained)]
        if len(grads) != len(tensors):
            raise JhopError(
                f"compiled_autograd: the compiled backward returned {len(grads)} gradients for {len(tensors)} leaves. "
                "A backend's callable must return all outputs of the graph that it was given."
            )
        for tensor, grad in zip(tensors, grads, strict=True):
            if not isinstance(grad, jax.Array) or grad.shape != tensor.shape or grad.dtype != tensor.dtype:
                raise JhopError(
                    f"compiled_autograd: a leaf of shape {tensor.shape} and dtype {tensor.dtype} got the gradient "
                    f"{grad!r} from the compiled backward."
                )
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor._grad = grad


def _hook_order(closed: Any, order: list[int]) -> list[int]:
    """Position, in the scheduled graph, of each hook in order of capture."""
    eqns = _compat.open_jaxpr(closed)[0].eqns
    new = {old: position for position, old in enumerate(order)}
    by_old = {old: eqns[position] for old, position in new.items()}
    return [new[old] for old in sorted(by_old) if by_old[old].primitive is trace_wrapped_p]


def _kind(node: Node) -> Any:
    if isinstance(node, CompiledNode):
        return ("compiled", node.compiled)
    if isinstance(node, OpNode):
        return ("op", node.op)
    if isinstance(node, AccumulateGrad):
        return ("accumulate", node.leaf._grad is None)
    return ("node", node)


def _hook_lists(node: Node) -> list[Any]:
    if isinstance(node, AccumulateGrad):
        return [node.leaf._hooks, node.leaf._post_hooks]
    return list(node.hooks)


def _aval_key(value: Any) -> Any:
    return (value.shape, value.dtype) if hasattr(value, "dtype") else type(value)


class _CapturePass(_engine.Pass):
    """The engine's pass over tracers, with marks where PyTorch's graph has nodes."""

    def __init__(self, tape: _Tape, recorder: Recorder):
        super().__init__(keep_graph=True)
        self._tape = tape
        self._recorder = recorder
        self._flat: list[Any] = []
        self._grads: dict[int, Any] = {}
        self._uses: dict[int, int] = {}  # how often a compiled function occurs
        self._origin: Any = None
        self.sizes: list[int] = []
        self.checked: list[int] = []
        self.n_hooks = 0
        self.hook_places: list[int] = []

    def trace(self, flat: list[Any]) -> list[Any]:
        """Runs the pass; the new gradients of leaves, then of Tensors that retain theirs."""
        tape = self._tape
        self._flat = flat
        seeds = [flat[i] for i in tape.seed_index]
        self._origin = "GraphRoot (NodeCall 0)"
        self.checked.append(0)
        for edge, _ in tape.seeds:
            self.sizes.extend(edge.node.avals[edge.slot].shape)
        checked = validate_outputs(seeds)
        self._note(checked)
        self.run(tape.order, [(edge, ct) for (edge, _), ct in zip(tape.seeds, checked, strict=True)])
        tensors = [*(node.leaf for node in tape.leaves), *(tensor for _, _, tensor in tape.retained)]
        return [self._grads[id(tensor)] for tensor in tensors]

    def _note(self, values: list[Any], **known: Any) -> None:
        for value in values:
            self._recorder.note(value, Info(origin=self._origin, stage="captured", **known))

    def visit(self, node: Node, cts: list[Any]) -> list[Any]:
        self._origin = f"{node.name()} (NodeCall {self._tape.number[node] + 1})"
        return super().visit(node, cts)

    def hooked_node(self, node: Node, cts: list[Any]) -> list[Any]:
        raise Unsupported(
            f"compiled_autograd: {node.name()} has hooks on the node itself, which cannot be captured yet. Hook its "
            "Tensors with register_hook, or run backward() outside of enable()."
        )

    def node(self, node: Node, cts: list[Any]) -> list[Any]:
        saved = [self._flat[i] for i in self._tape.saved[node]]
        cts = _engine.full_cts(node, cts)
        if isinstance(node, CompiledNode):
            return self._compiled(node, saved, cts)
        self.checked.append(len(self.sizes))
        for edge in node.edges:
            self.sizes.extend(edge.node.avals[edge.slot].shape)
        outs = node.apply(cts, saved)
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
        assert compiled.backward is not None
        gm = compiled.backward.gm
        values = aot_prologue(saved, cts, aot_id=compiled.aot_id, call=use)
        self._note(values)

        def note(variable: Any, value: Any) -> None:
            info = gm.info.get(variable, Info())
            origin = self._origin if info.origin is None else info.origin
            self._recorder.update(value, name=info.name, origin=origin, aot=(compiled.aot_id, use), stage="captured")

        for eqn in _compat.open_jaxpr(gm.jaxpr)[0].eqns:
            if eqn.primitive is trace_wrapped_p:
                self._hook_place()
        return compiled.joint.only_reached(evaluate(gm.jaxpr, values, note=note))

    def _hook_place(self) -> None:
        self.hook_places.append(self.n_hooks)
        self.n_hooks += 1

    def add(self, old: Any, new: Any) -> Any:
        total = old + new
        self._note([total])
        return total

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        for _ in hooks.snapshot():
            self._hook_place()
        out = run_hooks(ct, hooks)
        self._note([out])
        return out

    def accumulate(self, tensor: Any, ct: Any) -> None:
        index = self._tape._index[id(tensor._value)] if tensor.is_leaf else None
        leaf = self._flat[index] if index is not None else ct
        old = tensor._grad
        held = None if old is None else self._tape._index.get(id(getattr(old, "value", old)))
        self._grads[id(tensor)] = grad = accumulate_grad(ct, leaf, None if held is None else self._flat[held])
        self._note([grad])

    def post_accumulate(self, leaf: Any) -> None:
        for fn in leaf._post_hooks.snapshot() if leaf._post_hooks else ():
            self._hook_place()
            hook = PostAccumulate(fn, leaf)
            out = trace_wrapped(self._grads[id(leaf)], fn=hook, kind="post_acc_grad_hook")
            self._note([out])
            self._grads[id(leaf)] = out

    def finish(self, order: list[Node]) -> None:
        pass


class PostAccumulate:
    """A post-accumulate hook as a function of the new gradient: it sees and changes `leaf.grad`."""

    __slots__ = ("__wrapped__", "_leaf")

    def __init__(self, fn: Callable[[Any], None], leaf: Any):
        self.__wrapped__ = fn
        self._leaf = weakref.ref(leaf)  # a capture that is kept for later does not keep the parameter

    def __call__(self, grad: Any) -> Any:
        leaf = self._leaf()
        if leaf is None:
            return None
        with _state.LOCK:
            before, leaf._grad = leaf._grad, grad
            try:
                _engine.run_post_hook(self.__wrapped__, leaf)
                if leaf._grad is None:
                    raise HookError(
                        f"post-accumulate {describe_hook(self.__wrapped__)} set .grad to None. Under compiled autograd "
                        "a gradient is an output of the graph; free it after backward()."
                    )
                return getattr(leaf._grad, "value", leaf._grad)
            finally:
                leaf._grad = before


declare_state(PostAccumulate, "__wrapped__", "_leaf")
