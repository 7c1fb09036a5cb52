"""`jhop.compile`: a function of Tensors, traced once per kind of arguments, its backward ready for the same pipeline.

Inside the traced function a Tensor wraps a tracer, and every differentiable result is a hook point whose backward rule
reads the Tensor's hooks when the backward is traced: after the whole function ran. Two graphs come out, as in PyTorch's
AOTAutograd: a forward that also returns what the backward needs, and a backward whose hooks are opaque. The backward is
one node on the tape; under compiled autograd it is captured together with everything else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np

from jhop import _compat, _state, backends
from jhop._capture import Recorder, parameter_names, trace
from jhop._compile import CompiledGraph
from jhop._errors import JhopError
from jhop._graph import GraphModule, Info, Input
from jhop._hook import HookList
from jhop._lift import _Static, traced_result
from jhop._node import Node, freed, grad_enabled
from jhop._source import hook_name, origin_of, user_frames
from jhop._tensor import Tensor
from jhop._text._aten import joint_names
from jhop._walk import Leaf, closed_over_tracers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compiled:
    """One traced version of a function.

    Attributes:
        forward: flat inputs -> outputs, then computed residuals.
        backward: residuals, then cotangents -> cotangents of the differentiated inputs.
        aot_id: the number in printed names.
        residuals: per residual of the backward, the index of the input that it is, or None for a computed one.
        out_tree, out_moving: structure of the results, and which carry gradients.
        diff: indices of the differentiated inputs.
        registered: (input index, hook) for hooks that the function registers on its inputs, in order.
    """

    forward: Callable[..., list[Any]]
    backward: CompiledGraph
    aot_id: int
    residuals: tuple[int | None, ...]
    out_tree: Any
    out_moving: tuple[bool, ...]
    diff: tuple[int, ...]
    registered: tuple[tuple[int, Any], ...]


class CompiledNode(Node):
    """The backward of one call of a compiled function."""

    __slots__ = ("_saved", "compiled", "input_shapes", "label")

    def __init__(self, edges: Any, avals: Any, compiled: _Compiled, saved: list[Any], input_shapes: Any, label: str):
        super().__init__(edges, avals)
        self.compiled = compiled
        self._saved: list[Any] | None = saved
        self.input_shapes = input_shapes
        self.label = label

    def name(self) -> str:
        return "CompiledFunctionBackward"

    def saved(self) -> list[Any]:
        if self._saved is None:
            raise freed(self)
        return self._saved

    def apply(self, cts: list[Any], saved: list[Any]) -> list[Any]:
        return list(self.compiled.backward(*saved, *cts))

    def release(self) -> None:
        self._saved = None


class _Trace:
    """One tracing of a function: the Tensors in it, and the hooks that it registers."""

    def __init__(self) -> None:
        self.inputs: list[tuple[int, Tensor]] = []
        self.points: list[HookList] = []

    def input(self, index: int, value: Any, requires_grad: bool) -> Tensor:
        tensor = Tensor(value, requires_grad=requires_grad)
        tensor._trace = self
        self.inputs.append((index, tensor))
        return tensor

    def result(self, value: Any, moving: bool) -> Any:
        result = traced_result(self, value, moving)
        if isinstance(result, Tensor) and result._hooks is not None:
            self.points.append(result._hooks)
        return result

    def registered(self) -> tuple[tuple[int, Any], ...]:
        return tuple((i, fn) for i, tensor in self.inputs for fn in (tensor._hooks or HookList()).snapshot())

    def close(self) -> None:
        """Tensors of the trace may live on in hooks; they must not carry tracers."""
        for _, tensor in self.inputs:
            tensor._value = None


class CompiledFunction:
    """What `jhop.compile(fn)` returns: `fn`, traced once per structure, shapes and dtypes of its arguments."""

    def __init__(self, fn: Callable[..., Any], backend: Any, fullgraph: bool):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._backend_name = backend
        self._backend = backends.find(backend, "jhop.compile")
        self._fullgraph = fullgraph
        self._cache: dict[Any, _Compiled] = {}
        _functions.append(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._backend is backends.eager:
            return self._fn(*args, **kwargs)  # operation by operation, on the tape
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, Tensor))
        if any(isinstance(leaf, Tensor) and leaf._trace is not None for leaf in leaves):
            return self._fn(*args, **kwargs)  # called inside another compiled function: part of that
        recording = grad_enabled()
        key = (tree, recording, *(_leaf_key(leaf) for leaf in leaves))
        compiled = self._cache.get(key)
        if compiled is None:
            compiled = self._cache[key] = self._trace(args, kwargs, leaves, tree, recording)
        return self._run(compiled, leaves)

    def reset(self) -> None:
        """Forgets what was traced."""
        self._cache.clear()

    def _run(self, compiled: _Compiled, leaves: list[Any]) -> Any:
        values = [_value(leaf) for leaf in leaves if _is_dynamic(leaf)]
        outs = compiled.forward(*values)
        n = len(compiled.out_moving)
        results = [Tensor(value) for value in outs[:n]]
        for index, fn in compiled.registered:
            [leaf for leaf in leaves if _is_dynamic(leaf)][index].register_hook(fn)
        if any(compiled.out_moving):
            dynamic = [leaf for leaf in leaves if _is_dynamic(leaf)]
            edges = [dynamic[i]._edge("jhop.compile") for i in compiled.diff]
            computed = iter(outs[n:])
            saved = [next(computed) if i is None else values[i] for i in compiled.residuals]
            moving = [i for i, moves in enumerate(compiled.out_moving) if moves]
            avals = [jax.typeof(outs[i]) for i in moving]
            shapes = [jnp.shape(value) for value in values]
            node = CompiledNode(edges, avals, compiled, saved, shapes, hook_name(self._fn))
            for slot, i in enumerate(moving):
                results[i] = Tensor(outs[i], requires_grad=True, node=node, slot=slot)
        return jax.tree.unflatten(compiled.out_tree, results)

    # -- tracing -------------------------------------------------------------------------------------------------------

    def _trace(self, args: Any, kwargs: Any, leaves: list[Any], tree: Any, recording: bool) -> _Compiled:
        aot_id = backends.take_aot_id()
        dynamic = [leaf for leaf in leaves if _is_dynamic(leaf)]
        diff = [
            i for i, leaf in enumerate(dynamic) if recording and isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        session = _Trace()
        out_tree: Any = None
        out_moving: tuple[bool, ...] = ()
        vjp_tree: Any = None
        slots: list[Leaf] = []

        def call(values: list[Any]) -> list[Any]:
            """The user's function on tracers: its flat outputs."""
            nonlocal out_tree, out_moving
            rest = iter(enumerate(values))
            given = []
            for leaf in leaves:
                if not _is_dynamic(leaf):
                    given.append(leaf)
                    continue
                index, value = next(rest)
                given.append(session.input(index, value, index in diff) if isinstance(leaf, Tensor) else value)
            in_args, in_kwargs = jax.tree.unflatten(tree, given)
            out = self._fn(*in_args, **in_kwargs)
            outs, out_tree = jax.tree.flatten(out, is_leaf=lambda leaf: isinstance(leaf, Tensor))
            out_moving = tuple(isinstance(o, Tensor) and o.requires_grad for o in outs)
            return [jnp.asarray(o.value if isinstance(o, Tensor) else o) for o in outs]

        def forward(*values: Any) -> list[Any]:
            nonlocal vjp_tree

            def of_diff(*moving: Any) -> Any:
                filled = list(values)
                for i, value in zip(diff, moving, strict=True):
                    filled[i] = value
                outs = call(filled)
                # Values of the forward that hooks close over are residuals of the backward.
                slots.extend(s for point in session.points for fn in point.snapshot() for s in closed_over_tracers(fn))
                moves = [o for o, m in zip(outs, out_moving, strict=True) if m]
                return moves, (outs, [slot.value for slot in slots])

            if not diff:
                return call(list(values))
            moves, pull, (outs, closed) = jax.vjp(of_diff, *(values[i] for i in diff), has_aux=True)
            residuals, vjp_tree = jax.tree.flatten(pull)
            rest = iter(moves)
            return [*(next(rest) if m else o for o, m in zip(outs, out_moving, strict=True)), *residuals, *closed]

        try:
            fwd, _ = trace(forward, [jax.typeof(_value(leaf)) for leaf in dynamic], Recorder())
            names = parameter_names(self._fn, args, kwargs) if len(dynamic) == len(leaves) else []
            return self._split(fwd, aot_id, names, diff, session, out_tree, out_moving, vjp_tree, slots, dynamic)
        finally:
            session.close()

    def _split(self, fwd: Any, aot_id: int, names: list[str], diff: Any, session: _Trace, out_tree: Any,
               out_moving: Any, vjp_tree: Any, slots: Any, dynamic: Any) -> _Compiled:  # fmt: skip
        """Makes the two graphs out of one trace of the forward with its residuals."""
        jaxpr, consts = _compat.open_jaxpr(fwd)
        n = len(out_moving)
        position = {variable: i for i, variable in enumerate(jaxpr.invars)}
        # A residual that is an input is kept by reference; one that is read twice is kept once.
        wanted = jaxpr.outvars[n:]
        kept = {v: position.get(v) for v in wanted if not isinstance(v, jex_core.Literal)}
        order = sorted(kept, key=lambda v: (kept[v] is None, kept[v] or 0))
        residuals = tuple(kept[v] for v in order)
        computed = [v for v in order if kept[v] is None]
        trimmed = jaxpr.replace(
            outvars=[*jaxpr.outvars[:n], *computed], debug_info=jaxpr.debug_info._replace(result_paths=None)
        )
        inputs = tuple(Input(name=names[i] if i < len(names) else f"arg{i}") for i in range(len(jaxpr.invars)))
        gm = GraphModule(
            jaxpr=jex_core.ClosedJaxpr(trimmed, consts), inputs=inputs, name=f"{hook_name(self._fn)}_forward"
        )
        run = self._callable(gm, [_value(leaf) for leaf in dynamic])
        backward = None
        if any(out_moving):
            place = {v: i for i, v in enumerate(order)}
            pull = _pullback(vjp_tree, slots, wanted, place)
            cts = [v.aval for v, moves in zip(jaxpr.outvars[:n], out_moving, strict=True) if moves]
            bwd = self._backward(pull, jaxpr, order, residuals, cts)
            backward = CompiledGraph(
                bwd, backend=self._callable, fullgraph=self._fullgraph, dynamic=False, where="jhop.compile"
            )
        return _Compiled(
            forward=run, backward=backward, aot_id=aot_id, residuals=residuals, out_tree=out_tree,
            out_moving=out_moving, diff=tuple(diff), registered=session.registered(),
        )  # fmt: skip

    def _backward(self, pull: Any, forward: Any, saved: list[Any], residuals: Any, cts: list[Any]) -> GraphModule:
        """The graph of the backward: residuals, then cotangents."""
        closed, info = trace(pull, [*(v.aval for v in saved), *cts], Recorder())
        jaxpr, _ = _compat.open_jaxpr(closed)
        frames = {variable: user_frames(eqn) for eqn in jaxpr.eqns for variable in eqn.outvars}
        for variable, name in joint_names(forward, jaxpr, list(residuals), saved).items():
            at = frames.get(variable)
            info[variable] = Info(name=name, origin=origin_of(*at[0]) if at else None)
        inputs = tuple(Input(name=info[variable].name or "") for variable in jaxpr.invars)
        return GraphModule(jaxpr=closed, inputs=inputs, info=info, name=f"{hook_name(self._fn)}_backward")

    def _callable(self, gm: GraphModule, example: list[Any]) -> Callable[..., list[Any]]:
        if self._backend is backends.xla:
            return backends.xla_program(gm)  # the function took its number when it was traced
        if self._backend is backends.aot_eager:
            return backends.eager(gm, example)
        return self._backend(gm, example)


def _pullback(vjp_tree: Any, slots: list[Leaf], wanted: list[Any], place: Any) -> Callable[..., list[Any]]:
    """The backward as a function of residuals, then cotangents.

    Args:
        vjp_tree: structure of what `jax.vjp` returned.
        slots: places in hooks that held values of the forward.
        wanted: per leaf of `vjp_tree`, then per slot, the forward's variable or literal for it.
        place: which residual each variable is.
    """
    n_pull = len(wanted) - len(slots)

    def backward(*flat: Any) -> list[Any]:
        values = [atom.val if isinstance(atom, jex_core.Literal) else flat[place[atom]] for atom in wanted]
        with _state.LOCK:
            try:
                for slot, value in zip(slots, values[n_pull:], strict=True):
                    slot.container.put(slot.key, value)
                return list(jax.tree.unflatten(vjp_tree, values[:n_pull])(list(flat[len(place) :])))
            finally:
                for slot in slots:
                    slot.container.put(slot.key, None)  # the forward's tracer, which was there, is dead

    return backward


_functions: list[CompiledFunction] = []


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, jax.Array, np.ndarray, np.generic)) or type(leaf) is float


def _value(leaf: Any) -> Any:
    return leaf._value if isinstance(leaf, Tensor) else leaf


def _leaf_key(leaf: Any) -> Any:
    if not _is_dynamic(leaf):
        return _Static(leaf)
    aval = jax.typeof(_value(leaf))
    return (type(leaf) is Tensor, isinstance(leaf, Tensor) and leaf._requires_grad, aval)


def compile(
    fn_or_gm: Any, *, backend: Any = "xla", fullgraph: bool = False, dynamic: bool | None = None
) -> Callable[..., Any]:
    """Compiles a function of Tensors, or a captured graph.

    Args:
        fn_or_gm: a function of Tensors, arrays and pytrees of them (Python ints and other objects are static); or a
            `GraphModule`, such as compiled autograd hands out.
        backend: "eager", "aot_eager", "xla" (or "inductor", the same), or a function
            `(gm, example_inputs) -> callable` on flat lists.
        fullgraph: whether a hook that cannot be traced is an error. Otherwise the graph it is in runs on the host, with
            a warning.
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
    if isinstance(fn_or_gm, GraphModule):
        return CompiledGraph(
            fn_or_gm, backend=backend, fullgraph=fullgraph, dynamic=bool(dynamic), where="jhop.compile"
        )
    if not callable(fn_or_gm):
        raise JhopError(f"jhop.compile: expected a function or a GraphModule, got {type(fn_or_gm).__name__}.")
    return CompiledFunction(fn_or_gm, backend, fullgraph)


def reset_functions() -> None:
    """Forgets what compiled functions traced."""
    for function in _functions:
        function.reset()

