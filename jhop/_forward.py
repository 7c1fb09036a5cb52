"""`jhop.compile`: a function of Tensors, traced once per kind of arguments, its backward ready for the same pipeline.

Inside the traced function a Tensor wraps a tracer, and every differentiable result is a hook point whose backward rule
reads the Tensor's hooks when the backward is traced: after the whole function ran. Two graphs come out, as in PyTorch's
AOTAutograd: a forward that also returns what the backward needs, and a backward whose hooks are opaque. The backward is
one node on the tape; under compiled autograd it is captured together with everything else.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop import _compat, backends
from jhop._attempt import Attempt, Call
from jhop._bound import BoundHook
from jhop._compile import MAX_ENTRIES, CompiledGraph
from jhop._compiled import Compiled, CompiledNode
from jhop._discharge import discharge, looking
from jhop._errors import JhopError
from jhop._explain import StandsForFunction, graph_report, hooks_of
from jhop._graph import GraphModule
from jhop._history import OTHER_SETTINGS, History
from jhop._inside import is_dynamic, value_of
from jhop._node import Edge, RetainedGrad, grad_enabled
from jhop._report import Report
from jhop._sizes import Dynamic, kind_of, with_fewest_numbers
from jhop._source import hook_location, hook_name
from jhop._static import Static
from jhop._tensor import Tensor
from jhop._wording import in_words

MAX_KINDS = 4096  # of arguments, with their sizes, of which a function knows what to run


class _Kind(NamedTuple):
    """Arguments that differ in their sizes at most.

    Attributes:
        versions: those with symbols for sizes.
        dynamic: which sizes are to be symbols.
    """

    versions: list[Compiled]
    dynamic: Dynamic


class CompiledFunction(StandsForFunction):
    """What `jhop.compile(fn)` returns: `fn`, traced once per structure, shapes and dtypes of its arguments."""

    def __init__(self, fn: Callable[..., Any], backend: Any, fullgraph: bool, dynamic: bool | None):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._backend = backends.find(backend, "jhop.compile")
        self._fullgraph = fullgraph
        self._dynamic = dynamic
        self._cache: dict[Any, list[Compiled]] = {}  # by the exact kind of arguments
        self._kinds: dict[Any, _Kind] = {}  # by the kind of arguments, less sizes
        self._last: Any = None  # the key of the last trace
        self._history = History(hook_location(fn))
        _functions.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._backend is backends.eager:
            return self._fn(*args, **kwargs)  # operation by operation, on the tape
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Tensor))
        if any(isinstance(leaf, Tensor) and leaf._trace is not None for leaf in leaves):
            return self._fn(*args, **kwargs)  # called inside another compiled function: part of that
        recording = grad_enabled()
        key = (tree, recording, _compat.trace_context(), *(_leaf_key(leaf) for leaf in leaves))
        compiled = next((c for c in reversed(self._cache.get(key, ())) if c.guards.hold()), None)
        if compiled is None:
            compiled = self._find(key, Call(args, kwargs, leaves, tree, recording))
        return self._run(compiled, leaves)

    def _find(self, key: Any, call: Call) -> Compiled:
        """A version for arguments of a kind that no version is known to be for: one for other sizes, or a new one."""
        kind = self._kinds.setdefault(_sizeless(key), _Kind([], Dynamic(self._dynamic)))
        shapes = [jnp.shape(value_of(leaf)) for leaf in call.arguments]
        compiled = next((c for c in reversed(kind.versions) if c.guards.hold() and c.misfit(shapes) is None), None)
        if compiled is None:
            compiled = self._trace(call, kind.dynamic, self._reason(key, kind, shapes))
            self._last = key
        if compiled.fits is not None and compiled not in kind.versions:
            kind.versions.append(compiled)
            del kind.versions[:-MAX_ENTRIES]
        if len(self._cache) >= MAX_KINDS:
            self._cache.clear()
        known = self._cache.setdefault(key, [])
        known.append(compiled)
        del known[:-MAX_ENTRIES]
        return compiled

    def reset(self) -> None:
        """Forgets what was traced."""
        self._cache.clear()
        self._kinds.clear()
        self._last = None
        self._history.clear()

    def _reason(self, key: Any, kind: _Kind, shapes: list[Any]) -> str:
        """Why the function has to be traced, where there are these versions for arguments of this kind."""
        if known := self._cache.get(key):
            return known[-1].guards.broken() or "what it looks up has changed"
        if self._last is None:
            return self._history.first()
        if kind.versions:
            last = kind.versions[-1]
            if (why := last.misfit(shapes) or last.guards.broken()) is not None:
                return why
        return _difference(self._last, key) + (f"; {kind.dynamic.why}" if kind.dynamic.why else "")

    def _report(self) -> Report:
        graphs = []
        versions = dict.fromkeys(compiled for known in list(self._cache.values()) for compiled in list(known))
        for compiled in versions:
            graphs.append(graph_report(compiled, hooks_of(compiled.gm), compiled.guards))
            backwards = dict.fromkeys([compiled.backward, *compiled.narrowed.values()])
            graphs += [report for backward in backwards if backward is not None for report in backward.reports()]
        note = 'backend="eager" compiles nothing.' if self._backend is backends.eager else ""
        return Report.of("jhop.compile", hook_name(self._fn), graphs, self._history, note)

    def _run(self, compiled: Compiled, leaves: list[Any]) -> Any:
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
            sinks = [RetainedGrad(jax.typeof(outs[kept.result])) for kept in joint.retained]
            closing = [hook for _, hook in hooks if isinstance(hook, BoundHook)]
            reached += [Edge(sink, 0) for sink in sinks]
            node = CompiledNode(reached, avals, compiled, saved, values, edges, closing)
            for slot, i in enumerate(moving):
                results[i] = Tensor(outs[i], requires_grad=True, node=node, slot=slot)
            for sink, kept in zip(sinks, joint.retained, strict=True):
                sink.retain_at(0, results[kept.result])
                results[kept.result]._retains = True
        for i in joint.retaining:
            dynamic[i].retain_grad()
        return joint.result(results, dynamic, handles)

    def _trace(self, call: Call, dynamic: Dynamic, reason: str) -> Compiled:
        """Traces the function."""
        aot_id = backends.take_aot_id()
        attempt, why = with_fewest_numbers(lambda: Attempt(self._fn, call), dynamic)
        joint = attempt.joint
        if why and reason not in why:
            reason = f"{reason}; {why}"
        backward = None
        if joint.backward is not None:
            backward = CompiledGraph(
                joint.backward, backend=self._callable, fullgraph=self._fullgraph, dynamic=False, where="jhop.compile",
                history=self._history, first="first backward pass",
            )  # fmt: skip
        words = tuple(f"{name} = {in_words(value)}" for name, value in call.static)
        return Compiled(
            joint=joint,
            forward=self._callable(joint.forward, attempt.values),
            backward=backward,
            aot_id=aot_id,
            diff=tuple(attempt.diff),
            captured=attempt.captured,
            guards=attempt.guards,
            fits=attempt.fits,
            trace=self._history.add(hook_name(self._fn), joint.forward, reason, words, again=self._last is not None),
            static=words,
        )

    def _callable(self, gm: GraphModule, example: list[Any]) -> Callable[..., list[Any]]:
        gm = discharge(gm)
        return looking(gm, self._compiled(gm, example))

    def _compiled(self, gm: GraphModule, example: list[Any]) -> Callable[..., list[Any]]:
        if self._backend is backends.xla:
            return backends.xla_program(gm)  # the function took its number when it was traced
        if self._backend is backends.aot_eager:
            return backends.eager(gm, example)
        return backends.run_backend(self._backend, gm, example, "jhop.compile")


_functions: weakref.WeakSet[CompiledFunction] = weakref.WeakSet()


def _difference(before: Any, now: Any) -> str:
    """What differs between the keys of two kinds of arguments."""
    if before[0] != now[0]:
        return "arguments of another structure"
    if before[1] != now[1]:
        return f"gradients are {'' if now[1] else 'not '}recorded"
    if before[2] != now[2]:
        return OTHER_SETTINGS
    pairs = enumerate(zip(before[3:], now[3:], strict=True))
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


def _sizeless(key: Any) -> Any:
    """The key of a kind of arguments, less their sizes."""
    outside, leaves = key[:3], key[3:]
    return *outside, *(leaf if isinstance(leaf, Static) else (*leaf[:2], kind_of(leaf[2])) for leaf in leaves)


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
        dynamic: whether sizes are symbols, so that one trace serves all sizes. True: all that can be (not those of 0
            and 1; equal sizes share a symbol until they differ). None: for a function, those that were seen to change;
            for a graph, none. False: none. Code that needs a size as a number gets it, and is traced for each.

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
    return CompiledFunction(fn_or_gm, backend, fullgraph, dynamic)


def reset_functions() -> None:
    """Forgets what compiled functions traced."""
    for function in list(_functions):
        function.reset()

