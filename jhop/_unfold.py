"""A compiled function's call as operations on the tape, for `create_graph`.

A backward graph has lost what a second derivative needs: how its residuals depend on the inputs, and which hooks the
gradients of intermediate values pass. So the call is laid out again from what the function does (`Joint.primal`): cut
at its hooked values into segments, each one operation with derivatives of any order. Without hooks inside that is one
operation for the whole function. The hooks then run as on any other Tensor, once, on the sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._bound import BoundHook
from jhop._hook import HookList
from jhop._joint import Joint
from jhop._node import Edge, OpNode
from jhop._op import DYNAMIC, Op, carries, derivatives_of, edges_of, make_op


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """Equations between hooked values, as one function.

    Attributes:
        eqns: the equations.
        inputs: variables that they read.
        outputs: variables that later segments read or the function returns; first come `points`.
        points: places in `Joint.points` of the hooked values among its outputs, the latest first.
    """

    eqns: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    points: list[int]
    ops: dict[Any, Op] = dataclasses.field(default_factory=dict)

    def op(self, avals: tuple[Any, ...], moving: tuple[int, ...]) -> Op:
        """Its operation where these of its inputs have history."""
        found = self.ops.get((avals, moving))
        if found is None:
            found = self.ops[avals, moving] = self._make(avals, moving)
        return found

    def _make(self, avals: tuple[Any, ...], moving: tuple[int, ...]) -> Op:
        def compiled(*values: Any) -> list[Any]:
            env = dict(zip(self.inputs, values, strict=True))
            for eqn in self.eqns:
                args = [atom.val if isinstance(atom, jex_core.Literal) else env[atom] for atom in eqn.invars]
                env.update(zip(eqn.outvars, _compat.bind_eqn(eqn, args), strict=True))
            return [env[variable] for variable in self.outputs]

        def differentiable(*values: Any) -> list[Any]:
            return [value for value in compiled(*values) if carries(value)]

        depends = [set[int]() for _ in jax.eval_shape(differentiable, *avals)]
        if moving:
            depends = derivatives_of(differentiable, avals, moving)
        tree = jax.tree.structure((tuple(0 for _ in avals), {}))
        return make_op(compiled, tree, (DYNAMIC,) * len(avals), moving, edges_of(depends, moving))


def segments_of(joint: Joint) -> list[Segment]:
    """Cuts what a function does at its hooked values: a segment for each number of them on the way to a value."""
    jaxpr, _ = _compat.open_jaxpr(joint.primal)
    n = len(jaxpr.outvars) - len(joint.points)
    point_of = {variable: i for i, variable in enumerate(jaxpr.outvars[n:])}
    depth = dict.fromkeys([*jaxpr.constvars, *jaxpr.invars], 0)
    hooked: dict[Any, Any] = {}  # per hooked variable, the one before the hook
    eqns: dict[int, list[Any]] = {}
    points: dict[int, list[Any]] = {}
    for eqn in jaxpr.eqns:
        at = max((depth[v] for v in eqn.invars if not isinstance(v, jex_core.Literal)), default=0)
        point = eqn.outvars[0] if eqn.outvars and eqn.outvars[0] in point_of else None
        if point is not None:
            hooked[point] = next(v for v in eqn.invars if not isinstance(v, jex_core.Literal))
            points.setdefault(at, []).append(point)
        else:
            eqns.setdefault(at, []).append(eqn)
        depth.update(dict.fromkeys(eqn.outvars, at + (point is not None)))
    found = []
    last = {v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)}
    for at in sorted({*eqns, *points}):
        own = dict.fromkeys(v for eqn in eqns.get(at, ()) for v in eqn.outvars)
        mine = points.get(at, [])[::-1]
        elsewhere = last | {v for other in eqns if other != at for eqn in eqns[other] for v in _variables(eqn)}
        elsewhere |= {hooked[v] for other in points if other != at for v in points[other]}
        read = [*(v for eqn in eqns.get(at, ()) for v in _variables(eqn)), *(hooked[v] for v in mine)]
        outputs = [*(hooked[v] for v in mine), *(v for v in own if v in elsewhere)]
        inputs = list(dict.fromkeys(v for v in read if v not in own))
        found.append(Segment(eqns.get(at, []), inputs, outputs, [point_of[v] for v in mine]))
    return found


def _variables(eqn: Any) -> list[Any]:
    return [atom for atom in eqn.invars if not isinstance(atom, jex_core.Literal)]


class SegmentNode(OpNode):
    """The node of a segment."""

    many = True
    __slots__ = ()


class Unfolded:
    """One call of a compiled function, laid out on the tape.

    Args:
        joint: the function.
        segments: see `segments_of`.
        values: the call's inputs.
        edges: per input that is differentiated, where its cotangent goes.
        sequence: that of the node that it stands for.
        bound: the hooks that the call registered on its inputs and that close over values of it.

    Attributes:
        edges: per result, where its cotangent goes; None if nowhere.
        history: where values that hooks close over come from, which no result may lead to.
    """

    def __init__(
        self, joint: Joint, segments: list[Segment], values: list[Any], edges: dict[int, Edge], sequence: float,
        bound: list[BoundHook],
    ):  # fmt: skip
        jaxpr, consts = _compat.open_jaxpr(joint.primal)
        end = len(jaxpr.outvars) - len(joint.points)
        self._values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        self._edges: dict[Any, Edge | None] = {jaxpr.invars[i]: edge for i, edge in edges.items()}
        lists: dict[int, HookList] = {}
        for number, segment in enumerate(segments, 1):
            node = self._run(segment, jaxpr.outvars[end:])
            if node is not None:
                node.sequence = sequence - 1 + number / (len(segments) + 1)
                lists.update({i: node.hooks_at(slot) for slot, i in enumerate(segment.points)})
        rest = iter(jaxpr.outvars[len(joint.out_moving) : end])
        self.history: list[Edge | None] = []
        for i, point in enumerate(joint.points):
            for fn, slots in point:
                hook = self._bind(BoundHook(fn, slots, []), rest) if slots else fn
                if i in lists:
                    lists[i].add(hook)
        for hook in bound:
            self._bind(hook, rest)
        self.edges = [self._edge(atom) for atom in jaxpr.outvars[: len(joint.out_moving)]]

    def _run(self, segment: Segment, points: list[Any]) -> OpNode | None:
        values = [self._values[v] for v in segment.inputs]
        edges = [self._edges.get(v) for v in segment.inputs]
        moving = tuple(i for i, edge in enumerate(edges) if edge is not None)
        op = segment.op(tuple(map(jax.typeof, values)), moving)
        outs = op.forward(*values)
        slots = [i for i, out in enumerate(outs) if carries(out)]
        node = None
        if moving and slots:
            has_number = any(type(value) is float for value in values)
            avals = tuple(jax.typeof(outs[i]) for i in slots)
            ends = tuple(edge for edge in edges if edge is not None)
            node = SegmentNode(ends, avals, op, values, op.fn, has_number)
        variables = [*(points[i] for i in segment.points), *segment.outputs[len(segment.points) :]]
        self._values.update(zip(variables, outs, strict=True))
        if node is not None:
            flows = node.depends or ()
            self._edges.update({variables[i]: Edge(node, slot) for slot, i in enumerate(slots) if flows[slot]})
        return node

    def _edge(self, atom: Any) -> Edge | None:
        return None if isinstance(atom, jex_core.Literal) else self._edges.get(atom)

    def _bind(self, hook: BoundHook, atoms: Iterator[Any]) -> BoundHook:
        """Gives a hook the values that it closes over, and their history."""
        mine = [next(atoms) for _ in hook.slots]
        edges = [self._edge(atom) for atom in mine]
        hook.values = [atom.val if isinstance(atom, jex_core.Literal) else self._values[atom] for atom in mine]
        hook.remember(edges)
        self.history += edges
        return hook
