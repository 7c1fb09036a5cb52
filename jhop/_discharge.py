"""Checks (`jhop.check`) as outputs of a graph, which are looked at after each run.

A check writes to a record, which belongs to the graph: which check failed first, and with what values. That goes
through loops and branches as Python state does that hooks write (`_thread`). In the end the record is among the
outputs of the graph.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.interpreters import batching

from jhop import _compat, _state
from jhop._capture import trace
from jhop._check import Placed, check_p, find_failed, has_checks
from jhop._container import Container
from jhop._describe import Described, info_of
from jhop._errors import Unsupported
from jhop._graph import GraphModule, Input
from jhop._inline import _CAPTURED, _Inliner
from jhop._interp import evaluate, inner_jaxprs, rewrite
from jhop._rebuild import rebuild
from jhop._splice import Splice, expand, retrace
from jhop._thread import Threads
from jhop._walk import Walk


class Checks(NamedTuple):
    """The checks of a graph, whose last outputs are the number of the one that failed, and the values of all.

    Attributes:
        sites: the checks.
        n: how many outputs there are of them.
    """

    sites: tuple[Placed, ...]
    n: int

    def look(self, outs: Sequence[Any]) -> None:
        """Raises CheckError if a check failed, by the outputs of a run. It waits for the device."""
        error = find_failed(outs[len(outs) - self.n], outs[len(outs) - self.n + 1 :], self.sites)
        if error is not None:
            raise error


def discharge(gm: GraphModule) -> GraphModule:
    """A graph whose checks are outputs of it, after all others: see `GraphModule.checks`. Itself if it has none.

    Args:
        gm: hooks are inlined, or run on the host.

    Raises:
        Unsupported: a check is inside of something out of which nothing gets.
    """
    if not has_checks(gm.jaxpr):
        return gm
    with _state.LOCK:
        return _Discharger(gm).discharged()


def without_checks(closed: Any) -> Any:
    """A closed jaxpr less its checks, which somebody else looks at."""

    def rule(eqn: Any, values: list[Any]) -> list[Any]:
        return [] if eqn.primitive is check_p else rewrite(eqn, values, without_checks)

    return retrace(closed, rule, lambda eqn: not has_checks(eqn)) if has_checks(closed) else closed


def looking(gm: GraphModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """A run of a graph that raises CheckError where a check failed; itself if there are none."""
    if gm.checks is None:
        return run

    def call(*flat: Any) -> Any:
        outs = run(*flat)
        gm.checks.look(outs)
        return outs

    return call


class _Layout:
    """What a record of the checks in a jaxpr has in which place. As only one check is told, they share places.

    Attributes:
        sites: all that there are.
        avals: of the arrays.
        eqns: by id of an equation that tells which of some checks failed (a check, or a `shard_map` with some): where
            its sites begin in `sites`, and the places of its arrays.
    """

    def __init__(self, jaxpr: Any):
        self.sites: list[Placed] = []
        self.avals: list[Any] = []
        self.eqns: dict[int, tuple[int, list[int]]] = {}
        self._known: dict[Any, int] = {}
        self._look_into(jaxpr)

    def _look_into(self, jaxpr: Any) -> None:
        for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
            if id(eqn) in self.eqns or not has_checks(eqn):
                continue
            if eqn.primitive is check_p:
                self._add(eqn, eqn.params["sites"], [atom.aval for atom in eqn.invars[1:]])
            elif _compat.binds_axes(eqn):
                inner = _Layout(eqn.params["jaxpr"])
                self._add(eqn, inner.sites, inner.avals)
            else:
                for inner in inner_jaxprs(eqn):
                    self._look_into(inner)

    def _add(self, eqn: Any, sites: Sequence[Placed], avals: list[Any]) -> None:
        met: collections.Counter[Any] = collections.Counter()
        places = []
        for aval in avals:
            kind = aval.shape, aval.dtype
            met[kind] += 1
            places.append(self._known.setdefault((kind, met[kind]), len(self.avals)))
            if places[-1] == len(self.avals):
                self.avals.append(aval)
        self.eqns[id(eqn)] = len(self.sites), places
        self.sites += [Placed(site, tuple(places[i] for i in own)) for site, own in sites]


class _Discharger(_Inliner):
    """Inlines checks as if they were hooks that write to the record."""

    def __init__(self, gm: GraphModule):
        walk = Walk([])
        self._record: dict[Any, Any] = {}  # "failed", then the values by number
        self._container = Container(self._record, "dict", "jhop.check")
        walk.containers.append(self._container)
        super().__init__(gm, gm.shapes, (), walk)
        self._layout = _Layout(gm.jaxpr)

    def discharged(self) -> GraphModule:
        gm = self._gm
        try:
            closed, known = trace(self._traced, [v.aval for v in self._jaxpr.invars], self._recorder)
        except Unsupported as error:
            checks = ", ".join(dict.fromkeys(placed.site.title for placed in self._layout.sites))
            raise Unsupported(
                f"whether a check holds ({checks}) cannot be told from where it stands: {error}"
            ) from error
        finally:
            self._session.close()
        opened, consts = _compat.open_jaxpr(closed)
        jaxpr, kept, repeated = expand(opened)
        before = gm.info
        return dataclasses.replace(
            gm,
            jaxpr=jex_core.ClosedJaxpr(jaxpr, consts),
            info=Described(jaxpr, lambda: info_of(known(), {v: before.get(v, _CAPTURED) for v in kept}, repeated)),
            in_tree=None,
            out_tree=None,
            checks=Checks(tuple(self._layout.sites), 1 + len(self._layout.avals)),
        )

    def _traced(self, *flat: Any) -> list[Any]:
        self._top = self._session.top = _compat.staging()
        with _state.Lift(self._walk, []) as lift:
            self._lift, self._threads = lift, Threads(lift, self._session, self._evaluate)
            self._record["failed"] = jnp.int32(0)
            self._record.update((i, jnp.zeros(aval.shape, aval.dtype)) for i, aval in enumerate(self._layout.avals))
            outs = Splice(self._gm.jaxpr, self._stays).evaluate(list(flat), self._rule, self._carry)
            outs += [self._record["failed"], *(self._record[i] for i in range(len(self._layout.avals)))]
            self._lift = self._threads = self._top = None
        self._session.close()
        return outs

    def _rule(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        if eqn.primitive is check_p:
            self._note(eqn, *values)
            return []
        if self._stays(eqn):
            return None
        return self._on_mesh(eqn, values) if _compat.binds_axes(eqn) else self._inline_inner(eqn, values)

    def _on_mesh(self, eqn: Any, values: list[Any]) -> list[Any]:
        """A `shard_map`: each device has its own record, of which one gets out, the same on all."""

        def run(jaxpr: Any, args: list[Any]) -> list[Any]:
            axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
            gm = _graph_of(jex_core.ClosedJaxpr(*_compat.open_jaxpr(jaxpr)))
            gm = _Discharger(gm).discharged()
            outs = evaluate(gm.jaxpr, args)
            n = len(outs) - gm.checks.n
            return [*outs[:n], *_of_one_device(outs[n:], axes)]

        n = len(eqn.outvars)
        outs = rebuild(eqn, values, run, more=1 + len(self._layout.eqns[id(eqn)][1]))
        self._note(eqn, *outs[n:])
        return outs[:n]

    def _note(self, eqn: Any, failed: Any, *values: Any) -> None:
        """Writes to the record, as a hook would, what an equation tells."""
        assert self._lift is not None
        if id(eqn) not in self._layout.eqns:
            raise Unsupported("JAX traces what is there anew each time. Move the check out")
        start, places = self._layout.eqns[id(eqn)]
        earlier = self._record["failed"]
        first = (earlier == 0) & (failed != 0)
        pairs = [("failed", failed + jnp.int32(start)), *zip(places, values, strict=True)]
        for key, value in pairs:
            self._lift.put(self._container, key, jnp.where(first, value, self._record[key]))

    def _stays(self, eqn: Any) -> bool:
        return not has_checks(eqn)


def _graph_of(closed: Any) -> GraphModule:
    return GraphModule(jaxpr=closed, inputs=tuple(Input(name="") for _ in closed.in_avals))


def _of_one_device(record: list[Any], axes: tuple[str, ...]) -> list[Any]:
    """The record of the first device on which a check failed, for all devices of these axes of a mesh."""
    failed = record[0]
    device = jax.lax.axis_index(axes)
    first = jax.lax.pmin(jnp.where(failed != 0, device, jnp.iinfo(device.dtype).max), axes)

    def of_first(value: Any) -> Any:
        numbers = value.astype(jnp.int32) if value.dtype == bool else value
        found = jax.lax.psum(jnp.where(device == first, numbers, jnp.zeros_like(numbers)), axes)
        return found.astype(value.dtype)

    return list(map(of_first, record))


# `jax.vmap` makes a `cond` whose index is mapped run all its branches, and a `while` go on for examples that are done.
# A check may not look at those: it has to be an output before that.


def _one_example(primitive: Any, params: dict[str, Any], values: tuple[Any, ...]) -> list[Any]:
    """An equation on one example, with its checks after it."""
    closed = jax.make_jaxpr(lambda *args: primitive.bind(*args, **params))(*map(jax.typeof, values))
    gm = discharge(_graph_of(closed))
    outs = evaluate(gm.jaxpr, list(values))
    check_p.bind(*outs[len(outs) - gm.checks.n :], sites=gm.checks.sites)
    return outs[: len(outs) - gm.checks.n]


def _batch_apart(primitive: Any, concerned: Callable[[Any, Any], bool]) -> None:
    """Has checks leave equations of a primitive before they are batched, where they are `concerned` (dims, params)."""
    ordinary = batching.fancy_primitive_batchers[primitive]

    def batch(axis_data: Any, args: Any, dims: Any, **params: Any) -> Any:
        if not concerned(dims, params):
            return ordinary(axis_data, args, dims, **params)
        run = jax.vmap(lambda *values: _one_example(primitive, params, values), in_axes=tuple(dims),
                       **_compat.vmap_kwargs(axis_data, mapped=any(dim is not None for dim in dims)))
        outs = run(*args)
        return outs, [0] * len(outs)

    batching.fancy_primitive_batchers[primitive] = batch


def _branches_checked(dims: Any, params: Any) -> bool:
    return dims[0] is not None and any(map(has_checks, params["branches"]))


def _body_checked(dims: Any, params: Any) -> bool:
    return has_checks(params["body_jaxpr"]) or has_checks(params["cond_jaxpr"])


_batch_apart(jax.lax.cond_p, _branches_checked)
_batch_apart(jax.lax.while_p, _body_checked)
