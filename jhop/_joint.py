"""One trace of a function of Tensors, cut into a forward and a backward graph.

The function runs once, on Tensors that wrap tracers, under `jax.vjp`. What `jax.vjp` keeps for the backward becomes
outputs of the forward graph and inputs of the backward one. The backward is traced after the function has returned, so
hooks that were registered late are in it; they stay opaque.
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

from jhop import _compat
from jhop._capture import Recorder, trace
from jhop._close import closed_over_tracers, substituted
from jhop._discharge import without_checks
from jhop._errors import JhopError
from jhop._graph import GraphModule, Info, Input, hooks_in
from jhop._hook import RemovableHandle, is_tensor_point
from jhop._inside import Inside, Result, is_dynamic, value_of
from jhop._interp import evaluate, inner_jaxprs, inputs_for_sizes
from jhop._leaves import Leaf
from jhop._node import set_inside
from jhop._retained import Retained, behind, with_retained
from jhop._sizes import for_one_size
from jhop._source import hook_name, origin_of, user_frames
from jhop._tensor import Tensor
from jhop._text._aten import joint_names

Point = tuple[tuple[Any, tuple[Leaf, ...]], ...]  # (hook, its slots for values of the forward), in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
    """The two graphs of one traced function.

    Attributes:
        forward: flat inputs -> outputs, then computed residuals.
        backward: residuals, then cotangents -> cotangents of the differentiated inputs; None if no output has any.
        residuals: per residual of the backward, the index of the input that it is, or None for a computed one.
        out_tree, out_moving: structure of the results, and which outputs carry gradients.
        results: per result, what it is: a `Result`.
        registered: (input index, hook, slots) for hooks that the function registers on its inputs, in order; `slots`
            are places in the hook for values of the forward, which are its last outputs.
        held: handles that outlive the trace (weak references), and which of `registered` each is of.
        retained: results that retain their gradients, which are the backward's last outputs.
        retaining: inputs that retain theirs.
        reached: per differentiated input, whether an output that carries a gradient depends on it.
        primal: what the function does, less its checks: flat inputs -> outputs, values that hooks on intermediates
            close over, those that hooks on inputs do, hooked intermediates.
        points: per hooked intermediate, its hooks.
    """

    forward: GraphModule
    backward: GraphModule | None
    residuals: tuple[int | None, ...]
    out_tree: Any
    out_moving: tuple[bool, ...]
    registered: tuple[tuple[int, Any, tuple[Leaf, ...]], ...]
    results: tuple[Result, ...]
    held: tuple[tuple[Any, int], ...]
    retained: tuple[Retained, ...]
    retaining: tuple[int, ...]
    reached: tuple[bool, ...]
    primal: Any
    points: tuple[Point, ...]

    def graphs(self) -> list[GraphModule]:
        """The graphs that there are."""
        return [gm for gm in (self.forward, self.backward) if gm is not None]

    def hooks(self) -> list[Any]:
        """The user's callables that its graphs run."""
        opaque = [hook.base for gm in self.graphs() for hook, _ in hooks_in(gm.jaxpr)]
        return opaque + [fn for _, fn, _ in self.registered]

    def result(self, values: list[Any], inputs: list[Any], handles: list[RemovableHandle]) -> Any:
        """What a call returns.

        Args:
            values: the outputs.
            inputs: what it was given, and Tensors that the function reaches by itself.
            handles: those of the hooks that the call registered. What the function kept of them when it was traced
                removes these from now on.
        """
        for ref, i in self.held:
            if (held := ref()) is not None:
                held.follow(handles[i])
        of_kind = {"output": values, "input": inputs, "handle": handles}
        return jax.tree.unflatten(self.out_tree, [of_kind[kind][place] for kind, place in self.results])

    def with_numbers(self, values: list[Any]) -> Joint:
        """The function for the sizes of these inputs: its `primal` has no symbols; itself if it had none."""
        if not self.forward.shapes:
            return self
        fill = self.forward.rule_for(values, derivatives=True)
        opened, _ = _compat.open_jaxpr(self.primal)
        hooked = set(opened.outvars[len(opened.outvars) - len(self.points) :])

        def rule(eqn: Any, given: list[Any]) -> Any:
            if not is_tensor_point(eqn):
                return fill(eqn, given)
            # Its rule is made for the types that it was traced with; what is wanted of it is the variable.
            return [jax.lax.optimization_barrier(given[0])] if eqn.outvars[0] in hooked else given

        avals = [jax.typeof(value) for value in values]
        primal, _ = trace(lambda *flat: evaluate(self.primal, list(flat), rule), avals, Recorder())
        return dataclasses.replace(self, primal=primal)

    def only_for_its_sizes(self) -> str:
        """What in it is made for the sizes of its trace and can be used for no others, in words; "" if nothing."""
        if any(map(_has_rule, _compat.open_jaxpr(self.primal)[0].eqns)):
            return "the derivative rule of a `custom_vjp` function is made for one size"
        return for_one_size(self.graphs())

    def only_reached(self, cts: Any) -> list[Any]:
        """Of one item per differentiated input, such as its cotangent, those of the inputs that gradients reach."""
        return [ct for ct, used in zip(cts, self.reached, strict=True) if used]

    def sent(self, outs: list[Any]) -> list[Any]:
        """Of what a backward returns, what goes to the edges of its node."""
        n = len(self.reached)
        return [*self.only_reached(outs[:n]), *outs[n:]]

    def retained_by(self, result: int) -> frozenset[int]:
        """Which of the retained gradients that of a result is a part of."""
        jaxpr, _ = _compat.open_jaxpr(self.primal)
        found = behind(jaxpr, [jaxpr.outvars[result]])
        return frozenset(k for k, kept in enumerate(self.retained) if jaxpr.outvars[kept.result] in found)


def _has_rule(eqn: Any) -> bool:
    if eqn.primitive.name == "custom_vjp_call":
        return not is_tensor_point(eqn)
    return any(_has_rule(inner) for jaxpr in inner_jaxprs(eqn) for inner in _compat.open_jaxpr(jaxpr)[0].eqns)


class Tracing:
    """Traces `fn` once.

    Args:
        fn: the function.
        leaves, tree: its flat arguments and their structure.
        captured: Tensors that it reaches by itself; they are inputs after the arguments.
        diff: indices of the inputs to differentiate.
        names: the inputs' names.
        avals: the inputs' types, which may have symbols for sizes.
    """

    def __init__(
        self, fn: Any, leaves: list[Any], tree: Any, captured: Any, diff: list[int], names: list[str], avals: list[Any]
    ):
        self._fn = fn
        self._leaves = leaves
        self._tree = tree
        self._captured = captured
        self._diff = diff
        self._names = names
        self._avals = avals
        self._inside = Inside(hook_name(fn))
        self._slots: list[Leaf] = []  # where hooks on intermediate values hold values of the forward
        self._points: list[Point] = []
        self._registered: list[tuple[int, Any, tuple[Leaf, ...]]] = []
        self._results: list[Result] = []
        self._retained: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._held: list[tuple[Any, int]] = []
        self._out_tree: Any = None
        self._out_moving: tuple[bool, ...] = ()
        self._vjp_tree: Any = None

    def run(self) -> Joint:
        before = set_inside(self._inside)
        try:
            primal, _ = trace(self._primal, self._avals, Recorder())
        finally:
            set_inside(before)
        closed, _ = trace(functools.partial(self._forward, primal), self._avals, Recorder())
        return self._cut(closed, primal)

    def _call(self, values: list[Any]) -> list[Any]:
        """The user's function on tracers: its flat outputs."""
        rest = iter(enumerate(values))
        given = []
        for leaf in self._leaves:
            if not is_dynamic(leaf):
                given.append(leaf)
                continue
            index, value = next(rest)
            moves = index in self._diff
            given.append(self._inside.input(index, value, moves) if isinstance(leaf, Tensor) else value)
        for (index, value), outside in zip(rest, self._captured, strict=True):
            self._inside.captured[id(outside)] = self._inside.input(index, value, True)
        args, kwargs = jax.tree.unflatten(self._tree, given)
        out = self._fn(*args, **kwargs)
        outs, self._out_tree = jax.tree.flatten(out, is_leaf=lambda leaf: isinstance(leaf, Tensor))
        outs = [self._inside.enter(o) if isinstance(o, Tensor) and o._trace is None else o for o in outs]
        outs, self._results = self._inside.outputs(outs)
        self._check_results(outs)
        self._retained = self._inside.retained(outs)
        self._out_moving = tuple(isinstance(o, Tensor) and o.requires_grad for o in outs)
        return [jnp.asarray(value_of(o)) for o in outs]

    def _check_results(self, outs: list[Any]) -> None:
        for out in outs:
            if not isinstance(out, (Tensor, jax.Array, np.ndarray, np.generic, int, float, complex)):
                raise JhopError(
                    f"jhop.compile: `{hook_name(self._fn)}` returned a {type(out).__name__}; a compiled function "
                    "returns Tensors, arrays, numbers and pytrees of them."
                )

    def _primal(self, *values: Any) -> list[Any]:
        """Outputs; values that hooks on intermediates close over; those that hooks on inputs do; hooked intermediates.

        It is traced before anything is differentiated, so it says what the function does, its hook points included.
        """
        try:
            return self._with_points(self._call(list(values)))
        finally:
            self._inside.close()
            for slot in [*self._slots, *(slot for _, _, slots in self._registered for slot in slots)]:
                slot.container.put(slot.key, None)  # the tracer that is there is about to be dead

    def _with_points(self, outs: list[Any]) -> list[Any]:
        points = [(hooks, value) for hooks, value in self._inside.points if hooks or hooks.retained is not None]
        closed: list[Any] = []

        def slots_of(fn: Any) -> tuple[Leaf, ...]:
            found = closed_over_tracers(fn)
            closed.extend(slot.value for slot in found)
            return tuple(slot._replace(value=None) for slot in found)

        self._points = [tuple((fn, slots_of(fn)) for fn in hooks.snapshot()) for hooks, _ in points]
        self._slots = [slot for point in self._points for _, slots in point for slot in slots]
        self._held = self._inside.held()
        self._registered = [(i, fn, slots_of(fn)) for i, fn in self._inside.registered()]
        return [*outs, *closed, *(value for _, value in points)]

    def _forward(self, primal: Any, *values: Any) -> list[Any]:
        """Outputs; residuals; values that hooks on intermediates close over; and those that hooks on inputs do."""
        n = len(self._out_moving)
        end = len(primal.out_avals) - len(self._points)
        hooked = set(_compat.open_jaxpr(primal)[0].outvars[end:])

        def rule(eqn: Any, given: list[Any]) -> Any:
            # What has no hooks is no place for one any more: to differentiate it takes long.
            return given if is_tensor_point(eqn) and eqn.outvars[0] not in hooked else None

        if not self._diff:
            return evaluate(primal, list(values), rule)[:n]

        def of_diff(*moving: Any) -> Any:
            filled = list(values)
            for i, value in zip(self._diff, moving, strict=True):
                filled[i] = value
            outs = evaluate(primal, filled, rule)[:end]
            moves = [o for o, m in zip(outs, self._out_moving, strict=False) if m]
            return moves, (outs[:n], outs[n:])

        moves, pull, (outs, closed) = jax.vjp(of_diff, *(values[i] for i in self._diff), has_aux=True)
        residuals, self._vjp_tree = jax.tree.flatten(pull)
        rest = iter(moves)
        return [*(next(rest) if m else o for o, m in zip(outs, self._out_moving, strict=True)), *residuals, *closed]

    def _cut(self, closed: Any, primal: Any) -> Joint:
        """Makes the two graphs out of the forward with its residuals."""
        jaxpr, consts = _compat.open_jaxpr(closed)
        n = len(self._out_moving)
        position = {variable: i for i, variable in enumerate(jaxpr.invars)}
        # A residual that is an input is kept by reference; one that is read twice is kept once.
        n_bound = sum(len(slots) for _, _, slots in self._registered)
        end = len(jaxpr.outvars) - n_bound
        wanted = jaxpr.outvars[n:end]
        kept = {v: position.get(v) for v in wanted if not isinstance(v, jex_core.Literal)}
        cts = [v.aval for v, moves in zip(jaxpr.outvars[:n], self._out_moving, strict=True) if moves]
        if cts:
            kept |= {v: position[v] for v in inputs_for_sizes(jaxpr, [*cts, *(v.aval for v in kept)])}
        order = sorted(kept, key=lambda v: (kept[v] is None, kept[v] or 0))
        residuals = tuple(kept[v] for v in order)
        computed = [v for v in order if kept[v] is None]
        trimmed = jaxpr.replace(
            outvars=[*jaxpr.outvars[:n], *computed, *jaxpr.outvars[end:]],
            debug_info=jaxpr.debug_info._replace(result_paths=None),
        )
        names = [*self._names, *(f"arg{i}" for i in range(len(self._names), len(jaxpr.invars)))]
        name = hook_name(self._fn)
        forward = GraphModule(
            jaxpr=jex_core.ClosedJaxpr(trimmed, consts),
            inputs=tuple(Input(name=given) for given in names),
            name=f"{name}_forward",
        )
        backward = None
        reached, retained = self._reached(primal), self._kept(primal)
        if any(self._out_moving):
            pull = self._pullback(wanted, {v: i for i, v in enumerate(order)})
            slots = [kept.slot for kept in retained]
            backward = _backward_graph(pull, jaxpr, order, residuals, cts, f"{name}_backward", slots)
        return Joint(
            forward=forward, backward=backward, residuals=residuals, out_tree=self._out_tree,
            out_moving=self._out_moving, registered=tuple(self._registered),
            results=tuple(self._results), held=tuple(self._held), retained=retained,
            retaining=self._retained[1], reached=reached, primal=without_checks(primal), points=tuple(self._points),
        )  # fmt: skip

    def _reached(self, primal: Any) -> tuple[bool, ...]:
        """Which differentiated inputs the outputs with gradients depend on, past what is detached."""
        jaxpr, _ = _compat.open_jaxpr(primal)
        needed = behind(jaxpr, [v for v, moves in zip(jaxpr.outvars, self._out_moving, strict=False) if moves])
        return tuple(jaxpr.invars[i] in needed for i in self._diff)

    def _kept(self, primal: Any) -> tuple[Retained, ...]:
        """The results that retain their gradients."""
        jaxpr, _ = _compat.open_jaxpr(primal)
        inputs = [i for i, used in zip(self._diff, self._reached(primal), strict=True) if used]
        found = []
        for result in self._retained[0]:
            needed = behind(jaxpr, [jaxpr.outvars[result]])
            edges = frozenset(edge for edge, i in enumerate(inputs) if jaxpr.invars[i] in needed)
            found.append(Retained(result, sum(self._out_moving[:result]), edges))
        return tuple(found)

    def _pullback(self, wanted: list[Any], place: dict[Any, int]) -> Callable[..., list[Any]]:
        """The backward as a function of residuals, then cotangents.

        Args:
            wanted: per leaf of what `jax.vjp` returned, then per slot, the forward's variable or literal for it.
            place: which residual each variable is.
        """
        slots, tree = self._slots, self._vjp_tree
        n_pull = len(wanted) - len(slots)

        def backward(*flat: Any) -> list[Any]:
            values = [atom.val if isinstance(atom, jex_core.Literal) else flat[place[atom]] for atom in wanted]
            with substituted(slots, values[n_pull:]):
                return list(jax.tree.unflatten(tree, values[:n_pull])(list(flat[len(place) :])))

        return backward


def _backward_graph(
    pull: Any, forward: Any, saved: list[Any], residuals: Any, cts: list[Any], name: str, slots: list[int]
) -> GraphModule:
    """The graph of the backward: residuals, then cotangents, named as in PyTorch's joint graph.

    Its outputs are the inputs' cotangents, then the gradients that results retain, whose cotangents are at `slots`.
    """
    closed, known = trace(pull, [*(v.aval for v in saved), *cts], Recorder())
    info = known()
    closed = with_retained(closed, slots, len(cts)) if slots else closed
    jaxpr, _ = _compat.open_jaxpr(closed)
    frames = {variable: user_frames(eqn) for eqn in jaxpr.eqns for variable in eqn.outvars}
    for variable, given in joint_names(forward, jaxpr, list(residuals), saved).items():
        at = frames.get(variable)
        info[variable] = Info(name=given, origin=origin_of(*at[0]) if at else None)
    inputs = tuple(Input(name=info[variable].name or "") for variable in jaxpr.invars)
    return GraphModule(jaxpr=closed, inputs=inputs, info=info, name=name)
