"""`Op`: what the tape knows of one function at one structure of arguments.

Its forward is the function under `jax.jit`; its pullback is `jax.vjp` of the function, under `jax.jit` too, recomputed
from the inputs (XLA drops what the derivative does not need). JAX caches both per avals. A pullback that is itself to
be differentiated (`create_graph`) is one more function of the inputs and the cotangents, so it is recorded as one more
operation, and so on to any order; there is no other rule for higher derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jhop import _compat, _jit
from jhop._contract import is_inexact
from jhop._graph import hooks_in
from jhop._node import Edge, OpNode, grad_enabled
from jhop._static import Static
from jhop._tensor import Tensor

DYNAMIC = Static("<dynamic>")  # stands for an argument that is a value
CACHE_SIZE = 4096  # functions and kinds of arguments; a new lambda at each call must not fill the memory


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One function at one structure of arguments: `forward(*dynamic)` and `pullback(saved, cts)`.

    Attributes:
        fn: the function, for names.
        pullback: takes a cotangent for each output that can have one, or None where it is zero.
        diff: which of the dynamic arguments are differentiated; a node has an edge for each.
        depends: per output, which edges its cotangent flows to; None if that was not looked for.
    """

    fn: Any
    forward: Callable[..., Any]
    pullback: Callable[..., Any]
    diff: tuple[int, ...]
    depends: tuple[frozenset[int], ...] | None = None
    _backward: dict[Any, _BackwardOp | None] = dataclasses.field(default_factory=dict)
    _flows: dict[Any, tuple[frozenset[int], ...]] = dataclasses.field(default_factory=dict)

    def flows(self, avals: tuple[Any, ...]) -> tuple[frozenset[int], ...]:
        """What `depends` is for arguments of these types."""
        if avals not in self._flows:

            def outs(*values: Any) -> list[Any]:
                return [value for value in jax.tree.leaves(self.forward(*values)) if carries(value)]

            _bound(self._flows)[avals] = edges_of(derivatives_of(outs, avals, self.diff), self.diff)
        return self._flows[avals]

    def record(self, saved: list[Any], edges: Sequence[Edge], cts: list[Tensor | None]) -> list[Tensor]:
        """Runs the pullback as an operation on the tape.

        Args:
            saved: the arguments of the recorded call.
            edges: where the cotangents of the differentiated ones go: each is a Tensor there.
            cts: cotangents of the outputs, None for those that nothing depends on.
        """
        given = [ct for ct in cts if ct is not None]
        values = [*saved, *(ct.value for ct in given)]
        sources = dict(zip(self.diff, edges, strict=True)) if grad_enabled() else {}
        for i, ct in enumerate(given, len(saved)):
            if grad_enabled() and ct.requires_grad:
                sources[i] = ct._edge("backward")
        pull = functools.partial(self._pull, len(saved), tuple(ct is not None for ct in cts))
        found = self._backward_op(pull, values, tuple(sorted(sources)))
        if found is None:
            return [Tensor(value) for value in pull(*values)]
        kept = [values[i] for i in found.needed]
        outs = found.op.forward(*kept)
        avals = tuple(map(jax.typeof, outs))
        numbers = any(type(value) is float for value in kept)
        node = OpNode(tuple(sources[i] for i in found.moving), avals, found.op, kept, found.op.fn, numbers)
        return [
            Tensor(out, requires_grad=True, node=node, slot=slot) if found.op.depends[slot] else Tensor(out)
            for slot, out in enumerate(outs)
        ]

    def _pull(self, n_saved: int, present: tuple[bool, ...], *values: Any) -> list[Any]:
        """The pullback as a function of flat values: (saved arguments, then the cotangents that are there)."""
        rest = iter(values[n_saved:])
        return list(self.pullback(list(values[:n_saved]), [next(rest) if there else None for there in present]))

    def _backward_op(self, pull: Any, values: list[Any], moving: tuple[int, ...]) -> _BackwardOp | None:
        """The pullback as an operation, where these of its arguments have history; None if no result depends on it."""
        avals = tuple(map(jax.typeof, values))
        key = avals, pull.args, moving
        if key not in self._backward:
            _bound(self._backward)[key] = self._make_backward_op(pull, avals, moving)
        return self._backward[key]

    def _make_backward_op(self, pull: Any, avals: Any, moving: tuple[int, ...]) -> _BackwardOp | None:
        depends = derivatives_of(pull, avals, moving)
        moved = tuple(i for i in moving if any(i in inputs for inputs in depends))
        if not moved:
            return None
        # What is not read is not kept: of a linear function nothing, so its pullback is on cotangents alone.
        used = _compat.inputs_used(jax.make_jaxpr(pull)(*avals), [True] * len(depends))
        needed = tuple(i for i, read in enumerate(used) if read or i in moved)

        def of_needed(*kept: Any) -> list[Any]:
            given = dict(zip(needed, kept, strict=True))
            return pull(*(given[i] if i in given else jnp.zeros(a.shape, a.dtype) for i, a in enumerate(avals)))

        of_needed.__name__ = f"{name_of(self.fn)}_backward"
        op = make_op(
            of_needed,
            jax.tree.structure((tuple(0 for _ in needed), {})),
            (DYNAMIC,) * len(needed),
            tuple(needed.index(i) for i in moved),
            edges_of(depends, moved),
            jit=hook_aware,
        )
        return _BackwardOp(op, needed, moved)


@dataclasses.dataclass(frozen=True)
class _BackwardOp:
    """A pullback as an operation on some of (saved arguments, then cotangents).

    Attributes:
        op: takes the needed ones.
        needed: the values that it reads.
        moving: those among them that have history on which a result depends.
    """

    op: Any
    needed: tuple[int, ...]
    moving: tuple[int, ...]


def derivatives_of(fn: Callable[..., list[Any]], avals: Sequence[Any], moving: Sequence[int]) -> list[set[int]]:
    """Per output of a function, those of the inputs `moving` by which its derivative is not zero everywhere."""

    def dots(*values: Any) -> list[Any]:
        fixed, given = list(values[: len(avals)]), values[len(avals) :]

        def of_moving(*parts: Any) -> list[Any]:
            for i, part in zip(moving, parts, strict=True):
                fixed[i] = part
            return fn(*fixed)

        return list(jax.jvp(of_moving, tuple(fixed[i] for i in moving), given)[1])

    try:
        closed = jax.make_jaxpr(dots)(*avals, *(avals[i].to_tangent_aval() for i in moving))
    except Exception:  # it has no second derivative: the error comes from who asks for one
        return [set(moving)] * len(jax.eval_shape(fn, *avals))
    n = len(closed.out_avals)
    used = [_compat.inputs_used(closed, [k == slot for k in range(n)])[len(avals) :] for slot in range(n)]
    return [{i for i, reads in zip(moving, row, strict=True) if reads} for row in used]


def edges_of(depends: list[set[int]], moving: Sequence[int]) -> tuple[frozenset[int], ...]:
    """What `derivatives_of` found, by place among the inputs that have edges."""
    places = {i: place for place, i in enumerate(moving)}
    return tuple(frozenset(places[i] for i in inputs if i in places) for inputs in depends)


def _bound(cache: dict[Any, Any]) -> dict[Any, Any]:
    """A cache with room for one more."""
    if len(cache) >= CACHE_SIZE:
        cache.clear()
    return cache


def carries(value: Any) -> bool:
    """Whether gradients flow through a value."""
    return isinstance(value, jax.Array) and is_inexact(value.dtype)


def name_of(fn: Any) -> str:
    """What a function is called in the names of nodes."""
    return getattr(fn, "__name__", type(fn).__name__)


def hook_aware(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` under `jax.jit`; under `jhop.jit` if it runs hooks, as their Python state may change from call to call."""
    plain = jax.jit(fn)
    chosen: Any = None

    def run(*args: Any) -> Any:
        nonlocal chosen
        if chosen is plain or _compat.staging() is not None:
            return plain(*args)  # in a trace, hooks stay opaque
        if chosen is None:
            chosen = _jit.jit(fn) if hooks_in(plain.trace(*args).jaxpr) else plain
        return chosen(*args)

    return run


def make_op(
    fn: Any, tree: Any, static: tuple[Static, ...], diff: tuple[int, ...],
    depends: tuple[frozenset[int], ...] | None = None, *, jit: Callable[..., Any] = jax.jit,
) -> Op:  # fmt: skip
    """An `Op` of a function.

    Args:
        fn: the function.
        tree: structure of its arguments.
        static: per flat argument, its value, or `DYNAMIC`.
        diff, depends: as in `Op`.
        jit: what compiles it.
    """

    def raw(*dynamic: Any) -> Any:
        values = iter(dynamic)
        leaves = [next(values) if item is DYNAMIC else item.value for item in static]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fn(*args, **kwargs)

    def pullback(saved: list[Any], cts: list[Any]) -> list[Any]:
        def of_moving(*moving: Any) -> list[Any]:
            filled = list(saved)
            for index, value in zip(diff, moving, strict=True):
                filled[index] = value
            outs = [value for value in jax.tree.leaves(raw(*filled)) if carries(value)]
            return [value for value, ct in zip(outs, cts, strict=True) if ct is not None]

        _, pull = jax.vjp(of_moving, *(saved[index] for index in diff))
        return list(pull([ct for ct in cts if ct is not None]))

    raw.__name__ = name_of(fn)
    pullback.__name__ = f"{name_of(fn)}_backward"
    return Op(fn, jit(raw), hook_aware(pullback), diff, depends)
