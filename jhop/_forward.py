"""`jhop.compile`: a function of Tensors, traced once per kind of arguments, its backward ready for the same pipeline.

Inside the traced function a Tensor wraps a tracer, and every differentiable result is a hook point whose backward rule
reads the Tensor's hooks when the backward is traced: after the whole function ran. Two graphs come out, as in PyTorch's
AOTAutograd: a forward that also returns what the backward needs, and a backward whose hooks are opaque. The backward is
one node on the tape; under compiled autograd it is captured together with everything else.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat, backends
from jhop._bound import BoundHook
from jhop._capture import parameter_names
from jhop._compile import MAX_ENTRIES, CompiledGraph
from jhop._errors import JhopError
from jhop._explain import StandsForFunction, graph_report, hooks_of
from jhop._graph import GraphModule
from jhop._guards import Guards
from jhop._history import History, Trace
from jhop._interp import evaluate
from jhop._joint import Joint, Tracing, is_dynamic, value_of
from jhop._kept import Kept, keep, values_of
from jhop._lookups import Lookups
from jhop._node import Edge, Node, freed, full_cts, grad_enabled
from jhop._op import derivatives_of, edges_of
from jhop._reach import narrowed
from jhop._report import Report
from jhop._source import hook_name
from jhop._static import Static
from jhop._tensor import Tensor
from jhop._unfold import Segment, Unfolded, segments_of
from jhop._wording import in_words


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Compiled:
    """One traced version of a function.

    Attributes:
        joint: its graphs.
        forward, backward: the graphs as the backend compiled them.
        aot_id: the number in printed names.
        diff: indices of the differentiated inputs.
        captured: Tensors that the function reaches by itself, which are inputs after its arguments.
        guards: what the function takes for granted.
        trace: why it was traced; `static`: static arguments, in words.
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
    narrowed: dict[Any, CompiledGraph] = dataclasses.field(default_factory=dict)

    @property
    def gm(self) -> GraphModule:
        """The graph that runs at a call."""
        return self.joint.forward

    @functools.cached_property
    def segments(self) -> list[Segment]:
        """What its calls are laid out as on the tape."""
        return segments_of(self.joint)

    @functools.cached_property
    def flows(self) -> tuple[frozenset[int], ...]:
        """Per output that carries a gradient, which edges of the node its cotangent flows to."""
        jaxpr = self.joint.forward.jaxpr
        avals = [variable.aval for variable in _compat.open_jaxpr(jaxpr)[0].invars]
        moving = [i for i, moves in enumerate(self.joint.out_moving) if moves]

        def outs(*values: Any) -> list[Any]:
            found = evaluate(jaxpr, list(values))
            return [found[i] for i in moving]

        return edges_of(derivatives_of(outs, avals, self.diff), self.joint.only_reached(self.diff))

    def backward_for(self, cts: Sequence[Any], wanted: Sequence[bool] | None) -> CompiledGraph:
        """The backward of a pass to which these cotangents came; `wanted` is as for `Node.apply`."""
        assert self.backward is not None  # a node is made only for outputs that carry gradients
        if wanted is None and all(ct is not None for ct in cts):
            return self.backward
        came = tuple(ct is not None for ct in cts)
        asked = iter(wanted or [True] * sum(self.joint.reached))
        results = tuple(used and next(asked) for used in self.joint.reached)
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
        self, edges: Any, avals: Any, compiled: _Compiled, saved: list[Any], values: list[Any],
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

    def apply(self, cts: list[Any], saved: list[Any], wanted: Sequence[bool] | None = None) -> list[Any]:
        full = full_cts(self, cts)
        if self.passes is not None:
            return [full[slot] for slot in self.passes]
        return self.compiled.joint.only_reached(self.compiled.backward_for(cts, wanted)(*saved, *full))

    def record(self, cts: list[Any]) -> list[Any]:
        return self.apply(cts, self.saved())

    @property
    def depends(self) -> tuple[frozenset[int], ...] | None:
        if self.passes is None:
            return None
        return tuple(frozenset(i for i, at in enumerate(self.passes) if at == slot) for slot in range(len(self.avals)))

    def flows(self) -> tuple[frozenset[int], ...] | None:
        return self.depends or self.compiled.flows

    def unfold(self) -> bool:
        if self.passes is not None:
            return False
        if self._call is None:
            raise freed(self)
        values, moving = values_of(self._call[0]), self._call[1]
        joint = self.compiled.joint
        bound = [hook for ref in self._bound if (hook := ref()) is not None]
        laid = Unfolded(joint, self.compiled.segments, values, moving, self.sequence, bound)
        edges = [edge for edge, moves in zip(laid.edges, joint.out_moving, strict=True) if moves]
        self.passes = tuple(slot for slot, edge in enumerate(edges) if edge is not None)
        self.edges = tuple(edge for edge in edges if edge is not None)
        self._history, self._saved = laid.history, []
        return True

    def release(self) -> None:
        self._saved = self._call = self._history = None


class CompiledFunction(StandsForFunction):
    """What `jhop.compile(fn)` returns: `fn`, traced once per structure, shapes and dtypes of its arguments."""

    def __init__(self, fn: Callable[..., Any], backend: Any, fullgraph: bool):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._backend_name = backend
        self._backend = backends.find(backend, "jhop.compile")
        self._fullgraph = fullgraph
        self._cache: dict[Any, list[_Compiled]] = {}
        self._history = History()
        _functions.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._backend is backends.eager:
            return self._fn(*args, **kwargs)  # operation by operation, on the tape
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Tensor))
        if any(isinstance(leaf, Tensor) and leaf._trace is not None for leaf in leaves):
            return self._fn(*args, **kwargs)  # called inside another compiled function: part of that
        recording = grad_enabled()
        key = (tree, recording, *(_leaf_key(leaf) for leaf in leaves))
        known = self._cache.setdefault(key, [])
        compiled = next((c for c in reversed(known) if c.guards.hold()), None)
        if compiled is None:
            compiled = self._trace(args, kwargs, leaves, tree, recording, self._reason(key, known))
            known.append(compiled)
            del known[:-MAX_ENTRIES]
        return self._run(compiled, leaves)

    def reset(self) -> None:
        """Forgets what was traced."""
        self._cache.clear()
        self._history.clear()

    def _reason(self, key: Any, known: list[_Compiled]) -> str:
        """Why the function has to be traced, where there are these versions for arguments of this kind."""
        if known:
            return known[-1].guards.broken() or "what it looks up has changed"
        before = next((k for k, versions in reversed(self._cache.items()) if versions), None)
        if before is None:
            return self._history.first()
        return _difference(before, key)

    def _report(self) -> Report:
        graphs = []
        for compiled in [compiled for known in list(self._cache.values()) for compiled in list(known)]:
            graphs.append(graph_report(compiled, hooks_of(compiled.gm), compiled.guards))
            backwards = dict.fromkeys([compiled.backward, *compiled.narrowed.values()])
            graphs += [report for backward in backwards if backward is not None for report in backward.reports()]
        note = 'backend="eager" compiles nothing.' if self._backend is backends.eager else ""
        return Report.of("jhop.compile", hook_name(self._fn), graphs, self._history, note)

    def _run(self, compiled: _Compiled, leaves: list[Any]) -> Any:
        joint = compiled.joint
        dynamic = [*(leaf for leaf in leaves if is_dynamic(leaf)), *compiled.captured]
        values = [value_of(leaf) for leaf in dynamic]
        outs = compiled.forward(*values)
        n = len(joint.out_moving)
        results = [Tensor(value) for value in outs[:n]]
        bound = iter(outs[len(outs) - sum(len(slots) for _, _, slots in joint.registered) :])
        hooks = [
            (index, BoundHook(fn, slots, [next(bound) for _ in slots]) if slots else fn)
            for index, fn, slots in joint.registered
        ]
        handles = [dynamic[index].register_hook(hook) for index, hook in hooks]
        if any(joint.out_moving):
            edges = {i: dynamic[i]._edge("jhop.compile") for i in compiled.diff}
            computed = iter(outs[n:])
            saved = [next(computed) if i is None else values[i] for i in joint.residuals]
            moving = [i for i, moves in enumerate(joint.out_moving) if moves]
            avals = [jax.typeof(outs[i]) for i in moving]
            reached = [edges[i] for i in joint.only_reached(compiled.diff)]
            closing = [hook for _, hook in hooks if isinstance(hook, BoundHook)]
            node = CompiledNode(reached, avals, compiled, saved, values, edges, closing)
            for slot, i in enumerate(moving):
                results[i] = Tensor(outs[i], requires_grad=True, node=node, slot=slot)
        return joint.result(results, handles)

    def _trace(
        self, args: Any, kwargs: Any, leaves: list[Any], tree: Any, recording: bool, reason: str
    ) -> _Compiled:
        aot_id = backends.take_aot_id()
        static = [(f"argument{i}", leaf) for i, leaf in enumerate(leaves) if not is_dynamic(leaf)]
        lookups = Lookups([(hook_name(self._fn), self._fn), *static])
        captured = tuple(lookups.walk.instances(Tensor, _wants_grad)) if recording else ()
        arguments = [leaf for leaf in leaves if is_dynamic(leaf)]
        dynamic = [*arguments, *captured]
        diff = [
            i for i, leaf in enumerate(dynamic) if recording and isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        names = parameter_names(self._fn, args, kwargs) if len(arguments) == len(leaves) else []
        with lookups.tracing():
            joint = Tracing(self._fn, leaves, tree, captured, diff, names).run()
        backward = None
        if joint.backward is not None:
            backward = CompiledGraph(
                joint.backward, backend=self._callable, fullgraph=self._fullgraph, dynamic=False, where="jhop.compile",
                history=self._history, first="first backward pass",
            )  # fmt: skip
        words = tuple(f"{name} = {in_words(value)}" for name, value in static)
        return _Compiled(
            joint=joint,
            forward=self._callable(joint.forward, [value_of(leaf) for leaf in dynamic]),
            backward=backward,
            aot_id=aot_id,
            diff=tuple(diff),
            captured=captured,
            guards=lookups.guards(joint.hooks(), *(gm.jaxpr for gm in joint.graphs()), inputs=captured),
            trace=self._history.add(hook_name(self._fn), joint.forward, reason, words),
            static=words,
        )

    def _callable(self, gm: GraphModule, example: list[Any]) -> Callable[..., list[Any]]:
        if self._backend is backends.xla:
            return backends.xla_program(gm)  # the function took its number when it was traced
        if self._backend is backends.aot_eager:
            return backends.eager(gm, example)
        return backends.run_backend(self._backend, gm, example, "jhop.compile")


_functions: weakref.WeakSet[CompiledFunction] = weakref.WeakSet()


def _wants_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor._trace is None


def _difference(before: Any, now: Any) -> str:
    """What differs between the keys of two kinds of arguments."""
    if before[0] != now[0]:
        return "arguments of another structure"
    if before[1] != now[1]:
        return f"gradients are {'' if now[1] else 'not '}recorded"
    pairs = enumerate(zip(before[2:], now[2:], strict=True))
    index, old, new = next((index, old, new) for index, (old, new) in pairs if old != new)
    if isinstance(old, Static) and isinstance(new, Static):
        words = f"was {in_words(old.value)} and is {in_words(new.value)}"
        return f"another static argument: argument{index} {words}"
    old, new = (in_words(key.value) if isinstance(key, Static) else _type_of(*key) for key in (old, new))
    how = f"was {old} and is {new}" if old != new else "is weakly typed in another way"
    return f"other types of arguments: argument{index} {how}"


def _type_of(is_tensor: bool, requires_grad: bool, aval: Any) -> str:
    grad = " that requires grad" if requires_grad else ""
    return f"{'a Tensor' if is_tensor else 'an array'}{grad}, {aval.str_short()}"


def _leaf_key(leaf: Any) -> Any:
    if not is_dynamic(leaf):
        return Static(leaf)
    aval = jax.typeof(value_of(leaf))
    return (type(leaf) is Tensor, isinstance(leaf, Tensor) and leaf._requires_grad, aval)


_OPTIONS_ONLY: Any = object()  # `@jhop.compile(backend=...)`


def compile(
    fn_or_gm: Any = _OPTIONS_ONLY, *, backend: Any = "xla", fullgraph: bool = False, dynamic: bool | None = None
) -> Callable[..., Any]:
    """Compiles a function of Tensors, or a captured graph.

    Args:
        fn_or_gm: a function of Tensors, arrays and pytrees of them (Python ints and other objects are static); or a
            `GraphModule`, such as compiled autograd hands out.
        backend: "eager", "aot_eager", "xla" (or "inductor", the same), or a function
            `(gm, example_inputs) -> callable` on flat lists.
        fullgraph: whether a hook that cannot be traced is an error. Otherwise it runs on the host at each run, with a
            warning, and the rest of the graph stays compiled; with a backend of your own, the whole graph runs there.
        dynamic: for a graph, whether sizes are symbols in it, so that one trace serves all sizes.

    Returns:
        A callable that takes and returns what the function or graph does.

    Raises:
        JhopError: the backend is unknown, or `fn_or_gm` is neither a function nor a graph.
        Unsupported: at the call, a hook cannot be traced (with fullgraph=True).

    Example:
        >>> import jhop
        >>> @jhop.compile
        ... def f(x):
        ...     y = x * 3.0
        ...     y.register_hook(lambda grad: grad * 10.0)
        ...     return y
        >>> x = jhop.tensor(2.0, requires_grad=True)
        >>> f(x).backward()
        >>> float(x.grad)
        30.0

    The counterpart in PyTorch is `torch.compile`.
    """
    if fn_or_gm is _OPTIONS_ONLY:  # used as a decorator with options
        return functools.partial(compile, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    if isinstance(fn_or_gm, GraphModule):
        return CompiledGraph(
            fn_or_gm, backend=backend, fullgraph=fullgraph, dynamic=bool(dynamic), where="jhop.compile"
        )
    if not callable(fn_or_gm):
        raise JhopError(f"jhop.compile: expected a function or a GraphModule, got {type(fn_or_gm).__name__}.")
    return CompiledFunction(fn_or_gm, backend, fullgraph)


def reset_functions() -> None:
    """Forgets what compiled functions traced."""
    for function in list(_functions):
        function.reset()

