"""Inlining: hooks become part of the graph, and the Python state that they touch becomes its inputs and outputs.

The captured jaxpr is evaluated under a new trace. Where it has a `trace_wrapped` equation, the hook itself runs, on
tracers, with its state swapped for symbols. What it wrote is found afterwards, the objects are restored, and the
result says how to write them after each run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat, _state
from jhop._capture import Recorder, trace
from jhop._close import kept_apart
from jhop._container import MISSING, Container
from jhop._contract import HookFn
from jhop._cut import Callback, leave
from jhop._describe import Described, info_of
from jhop._effects import many_watches, watch
from jhop._errors import TO_JIT, JhopError, Unsupported, advising, last_resort
from jhop._expr import Expr
from jhop._graph import GraphModule, Info, Input
from jhop._guards import Guards
from jhop._inplace import InPlace
from jhop._interp import ClosesOverTracer, evaluate, inner_jaxprs, rewrite
from jhop._leaves import Leaf, is_number
from jhop._lifted import Lifted, Session, asks_identity, check_needs, runs_state_from_c
from jhop._reads import explain
from jhop._rebuild import holds_constants, is_plain_call, is_sealed, rebuild
from jhop._records import let_go, lift_tuples, loosen
from jhop._repeats import Repeats
from jhop._scalar import Scalar, device_kind, is_scalar, weak_aval
from jhop._source import describe_hook
from jhop._splice import Splice, expand, retrace
from jhop._template import Templates
from jhop._thread import Threads
from jhop._trace_wrapped import check_frames, inlining, no_endless_hooks, trace_wrapped_p
from jhop._walk import Walk
from jhop._writeback import after_results, stay_numpy

_CAPTURED = Info(stage="captured")


def inline(
    gm: GraphModule, *, avals: list[Any] | None = None, shapes: Any = (), on_host: Sequence[Any] = ()
) -> GraphModule:
    """Replaces every hook equation by the equations of the hook, and lifts the Python state that hooks touch.

    Args:
        gm: a captured graph; each hook is one `trace_wrapped` equation, at any depth.
        avals: other input avals to trace with, such as ones with symbolic dimensions.
        shapes: the symbols in `avals`, as `GraphModule.shapes`.
        on_host: hooks that stay opaque, as they are to run on the host.

    Returns:
        A graph without `trace_wrapped`: its inputs grow by the state that is read, its outputs by the state that is
        written. `gm` itself is unchanged, and so is every Python object.

    Raises:
        HookError: a hook broke its contract.
        Unsupported: a hook does what cannot be traced, or raised.

    Example:
        >>> import jax.numpy as jnp, jhop
        >>> gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda ct: ct * 3.0))(jnp.ones(2))
        >>> [eqn.primitive.name for eqn in jhop.inline(gm).jaxpr.eqns]
        ['mul']
    """
    if not isinstance(gm, GraphModule):
        raise JhopError(f"jhop.inline: expected a GraphModule, such as jhop.make_fx gives, got {type(gm).__name__}.")
    with _state.LOCK, advising(TO_JIT):
        return _Inliner(gm, shapes, on_host).run(avals)


class _Inliner:
    def __init__(self, gm: GraphModule, shapes: Any, on_host: Sequence[Any]):
        self._gm = gm
        self._on_host = on_host
        self._callbacks: list[Callback] = []
        self._shapes = shapes
        self._jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
        self._recorder = Recorder()
        self._session = Session(self._recorder)
        self._walk = Walk(hook_roots(gm, on_host))
        lift_tuples(self._walk)
        self._repeats = Repeats([(hook, eqn) for hook, eqn in gm.hooks if eqn.primitive is trace_wrapped_p])
        self._session.asks_identity = functools.cache(lambda: asks_identity(self._walk))
        self._session.asks_type = functools.partial(self._walk.mentions, "type")
        self._hides_state = runs_state_from_c(self._walk)
        self._hooked: dict[int, tuple[bool, Any]] = {}  # whether there are hooks in a jaxpr, by its id
        self._writes: list[_state.Write] = []
        self._state_outs: list[Any] = []
        self._lift: _state.Lift | None = None
        self._threads: Threads | None = None
        self._in_place: InPlace | None = None
        self._top: Any = None  # the trace that makes the graph
        self._staging: Any = None  # that of the hook which runs
        self._unread: list[Container] = []
        self._shared: list[Any] = []  # what the hooks stored as it is
        self._watched: list[Any] = []  # weak references to arrays that hooks saw or made

    def run(self, avals: list[Any] | None) -> GraphModule:
        given = avals if avals is not None else [v.aval for v in self._jaxpr.invars]
        state_avals = [_leaf_aval(leaf.value) for leaf in self._walk.leaves]
        try:
            closed, known = trace(self._traced, [*given, *state_avals], self._recorder)
        finally:
            self._session.close()
        self._refuse_leaks()
        jaxpr, consts = _compat.open_jaxpr(closed)
        jaxpr, kept, repeated = expand(jaxpr)
        before = self._gm.info
        jaxpr, slots = self._prune(jaxpr, len(given))
        n_outs = len(self._jaxpr.outvars)
        loosen(self._walk, self._shared)
        let_go(self._walk, self._shared)
        lifted = Lifted(
            slots=slots,
            n_outs=n_outs,
            writes=tuple(after_results(self._writes, n_outs)),
            guards=Guards(self._walk, self._session.answers, ignore=self._unread),
        )
        state_inputs = (
            Input(name="state", role="state", source=s.path, number=type(s.value) if is_number(s.value) else None)
            for s in slots
        )
        return dataclasses.replace(
            self._gm,
            jaxpr=jex_core.ClosedJaxpr(jaxpr, consts),
            inputs=(*self._gm.inputs, *state_inputs),
            info=Described(jaxpr, lambda: info_of(known(), {v: before.get(v, _CAPTURED) for v in kept}, repeated)),
            name="GraphModule",
            made_by="inline",
            in_tree=self._gm.in_tree if not slots and not lifted.writes else None,
            out_tree=self._gm.out_tree if not slots and not lifted.writes else None,
            lifted=lifted,
            callbacks=tuple(self._callbacks),
            shapes=tuple(self._shapes),
        )

    def _traced(self, *flat: Any) -> list[Any]:
        n = len(self._jaxpr.invars)
        symbols = [
            self._symbol(i, leaf, twin) for i, (leaf, twin) in enumerate(zip(self._walk.leaves, flat[n:], strict=True))
        ]
        self._share_nans(symbols)
        for symbol in symbols:
            if is_scalar(symbol):
                self._session.symbols[symbol._expr] = symbol
                self._session.note_step(symbol)
        self._top = self._session.top = _compat.staging()
        with _state.Lift(self._walk, symbols) as lift:
            self._lift, self._threads = lift, Threads(lift, self._session, self._evaluate)
            self._in_place = InPlace(self._walk.leaves, lift)
            self._repeats.begin(lift, flat[n:])
            reached = [container.obj for container in [*self._walk.containers, *self._walk.records]]
            with inlining(self._run_inner_hook), kept_apart(reached), many_watches():
                outs = Splice(self._gm.jaxpr, self._stays).evaluate(list(flat[:n]), self._rule, self._carry)
            self._collect(lift)
            check_needs(self._session)
            self._unread = lift.untouched()
            self._repeats.end()
            self._lift = self._threads = self._in_place = self._top = None
        outs, self._state_outs = [*outs, *self._state_outs], []
        self._session.close()
        return outs

    def _symbol(self, index: int, leaf: Leaf, twin: Any) -> Any:
        """What stands for a lifted value while hooks run."""
        if not is_number(leaf.value):
            return twin
        scalar = Scalar(self._session, Expr("leaf", (index,)), leaf.value, twin)
        # `type(x)` cannot be answered by a stand-in: code that asks it gets the numbers themselves, guarded.
        return scalar._specialise() if self._walk.mentions("type") else scalar

    def _share_nans(self, symbols: list[Any]) -> None:
        """Has one symbol stand for a NaN that is in several places: what holds it may be asked for it by identity."""
        first: dict[int, int] = {}
        for index, leaf in enumerate(self._walk.leaves):
            if type(leaf.value) is not float or leaf.value == leaf.value:
                continue
            same = first.setdefault(id(leaf.value), index)
            asked = first.values() if symbols[index] is leaf.value else [same]  # itself, or what tells when it matters
            for other in asked:
                if other != index:
                    pair = Expr("leaf", (other,)), Expr("leaf", (index,))
                    self._session.guard(Expr("one_nan", pair), other == same)
            symbols[index] = symbols[same]

    def _carry(self, variable: Any, value: Any) -> None:
        """Takes what is known of a captured value over to its new variable."""
        self._recorder.note(value, self._gm.info.get(variable, _CAPTURED))

    def _collect(self, lift: _state.Lift) -> None:
        """Turns what the hooks wrote into templates over further outputs."""

        places: dict[Any, Any] = {}  # (in `_state_outs`, what is kept there), by whether it is a number, and its id

        def note(value: Any, where: str) -> int:
            number = is_scalar(value)
            twin = value._twin if number else value
            if not _compat.same_trace(twin, self._recorder.anchor):
                raise _state.explain_leak(where, twin)
            index, _ = places.setdefault((number, id(twin)), (len(self._state_outs), twin))
            if index == len(self._state_outs):
                # `jnp.asarray(n)` gives the twin of a number, which the host would keep as a number.
                alike = not number and twin.ndim == 0 and getattr(twin, "weak_type", False)
                self._state_outs.append(jax.numpy.copy(twin) if alike else twin)
            return index

        templates = Templates(self._walk.knows, note)
        for write in lift.writes():
            value, where = write.value, write.where()
            if value is not MISSING:
                value = templates.make(value, where)
            self._writes.append(write._replace(key=templates.key(write.key, where), value=value))
        assert self._in_place is not None
        self._writes = self._in_place.filled(stay_numpy(self._writes, lift.held()))
        self._shared = templates.shared

    def _rule(self, eqn: Any, values: list[Any]) -> list[Any] | None:
        if eqn.primitive is trace_wrapped_p:
            hook = eqn.params["fn"]
            if any(hook.base is other for other in self._on_host):
                return leave(eqn, values, self._top, self._callbacks)
            with _compat.in_place_of(eqn, source=False):  # its equations have their own source
                return self._run_or_repeat(hook, values)
        return None if self._stays(eqn) else self._inline_inner(eqn, values)

    def _stays(self, eqn: Any) -> bool:
        """Whether there is no hook in an equation."""
        return eqn.primitive is not trace_wrapped_p and not any(map(self._has_hooks, inner_jaxprs(eqn)))

    def _has_hooks(self, jaxpr: Any) -> bool:
        known = self._hooked.get(id(jaxpr))
        if known is None:
            found = not all(map(self._stays, _compat.open_jaxpr(jaxpr)[0].eqns))
            known = self._hooked[id(jaxpr)] = (found, jaxpr)  # kept, so that its id stays its own
        return known[0]

    def _evaluate(self, jaxpr: Any, args: list[Any]) -> list[Any]:
        return evaluate(jaxpr, args, self._rule)

    def _inline_inner(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Inlines the hooks inside a higher-order equation."""
        if is_plain_call(eqn):  # its body, once, here: as good as outside
            with _compat.in_place_of(eqn, scope=f"jit({eqn.params['name']})"):
                return self._evaluate(eqn.params["jaxpr"], values)
        if not self._walk.containers:  # there is nothing that hooks could write
            return self._inline_pure(eqn, values)
        assert self._threads is not None
        return self._threads.inline(eqn, values, self._inline_pure)

    def _inline_pure(self, eqn: Any, values: list[Any], apart: Callable[..., Any] = lambda fn, *args: fn(*args)) -> Any:
        """Inlines hooks that write no state; `apart` calls each function that runs them."""
        if not is_sealed(eqn):
            constants = holds_constants(eqn)
            with contextlib.suppress(ClosesOverTracer):  # the hook reads lifted state
                return rewrite(
                    eqn, values, lambda jaxpr: retrace(jaxpr, self._rule, self._stays, apart), constants=constants
                )
        return rebuild(eqn, values, lambda jaxpr, args: apart(self._evaluate, jaxpr, args))

    def _run_inner_hook(self, call: Callable[..., list[Any]], flat: Sequence[Any]) -> list[Any]:
        """Runs a hook that a running hook uses, as part of that one."""
        assert self._lift is not None
        check_frames()
        if _compat.staging() is self._staging:
            return call(*flat)
        before = self._lift.mark()
        outs = call(*flat)
        if changes := self._lift.changes(before):
            raise Unsupported(
                "a hook inside what a hook itself compiles or repeats (by jax.jit, lax.scan and the like) writes "
                f"Python state (`{changes[0].container.path}`). Let the outer hook write what the inner one returns."
            )
        return outs

    def _run_or_repeat(self, hook: HookFn, values: list[Any]) -> list[Any]:
        place = self._repeats.place(hook, values)
        if place is None:
            return self._run_hook(hook, values)
        outs = self._repeats.again(place, values)
        if outs is None:
            start = self._repeats.start()
            outs = self._run_hook(hook, values)
            self._repeats.note(place, start, values, outs)
        return outs

    def _run_hook(self, hook: HookFn, values: list[Any]) -> list[Any]:
        assert self._in_place is not None
        answers, clean, staging = len(self._session.answers), False, self._staging
        self._staging, held = _compat.staging(), self._in_place.held()
        self._session.hook = describe_hook(hook.base)
        try:
            with (
                _compat.hook_traces(),
                no_endless_hooks(hook),
                watch(hook.base, trace=_compat.current_trace()) as seen,
            ):
                outs = hook.call(*values)
            clean = not (seen.nested or self._hides_state or len(self._session.answers) > answers)
            if self._session.asked_too_early():
                raise Unsupported(
                    f"{describe_hook(hook.base)} asks for the value of a number that hooks in a branch or loop "
                    "wrote, which is known only once the graph ran. Keep it as an array, and use jnp.where on it."
                )
            self._in_place.note(held, seen.operators, always=self._staging is self._top)
        except Unsupported as error:
            error.hook = hook.base
            raise
        except JhopError:
            raise
        except Exception as error:
            refused = Unsupported(explain(hook.base, error))
            refused.hook = hook.base
            raise refused from error
        finally:
            self._staging = staging
            # JAX keeps traces of what the hook jitted, such as `jnp.sum`. One of the user's own code may have read our
            # symbols, and one that was found by a number's value holds only for it: neither may be found again.
            if not clean:
                _compat.forget_hook_traces()
        for value in [*values, *outs, *(record.result for record in seen.operators)]:
            if isinstance(value, _compat.Tracer):
                self._watched.append(weakref.ref(value))
        for record in seen.operators:
            operands = [item._twin if is_scalar(item) else item for item in record.operands]
            self._recorder.note_operator(record.result, record.name, operands, (record.code, record.lasti))
        for out in outs if hook.kind != "post_acc_grad_hook" else ():
            self._recorder.mark_result(out)  # PyTorch's call of a tensor hook has a local variable `result`
        return list(outs)

    def _refuse_leaks(self) -> None:
        """Raises where a hook kept a tracer in a place that the walk over its state did not find."""
        alive = [ref() for ref in self._watched if ref() is not None]
        for generation in range(3):  # a cycle is no leak, and a young one is found at little cost
            if not alive:
                return
            alive = []  # it would itself keep them
            gc.collect(generation)
            alive = [ref() for ref in self._watched if ref() is not None]
        if alive:
            holders = {type(holder).__name__ for holder in gc.get_referrers(alive[0]) if holder is not alive}
            raise Unsupported(
                "a hook kept a traced array in a place that jhop does not look at (referred to by: "
                f"{', '.join(sorted(holders - {'list_iterator', 'frame'}))}). Keep it in an attribute, a closure, a "
                f"dict or a list that the hook reaches by name, or {last_resort()}."
            )

    def _prune(self, jaxpr: Any, n: int) -> tuple[Any, tuple[Leaf, ...]]:
        """Drops state inputs that no equation and no output reads."""
        used = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, jex_core.Literal)}
        used.update(v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal))
        kept = [(v, leaf) for v, leaf in zip(jaxpr.invars[n:], self._walk.leaves, strict=True) if v in used]
        invars = [*jaxpr.invars[:n], *(v for v, _ in kept)]
        pruned = jaxpr.replace(invars=invars, debug_info=jaxpr.debug_info._replace(arg_names=None))
        # A graph does not keep the arrays alive that state held when it was traced.
        return pruned, tuple(leaf if is_number(leaf.value) else leaf._replace(value=None) for _, leaf in kept)


def hook_roots(gm: GraphModule, on_host: Sequence[Any] = ()) -> list[tuple[str, Any]]:
    """(path, callable) per hook equation that is inlined, in the order in which they run."""
    hooks = [hook for hook, eqn in gm.hooks if eqn.primitive is trace_wrapped_p]
    places = gm.backward.hook_index if gm.backward is not None else range(len(hooks))
    found = [(f"L['hooks'][{place}]", hook.base) for place, hook in zip(places, hooks, strict=True)]
    return [(path, base) for path, base in found if not any(base is hook for hook in on_host)]


def _leaf_aval(value: Any) -> Any:
    """The aval of a lifted value's device twin."""
    return weak_aval(device_kind(value)) if is_number(value) else jax.typeof(value)
