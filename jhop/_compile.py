"""The run stage: a captured graph becomes a callable that inlines, guards, runs and writes back.

`CompiledGraph` is what `jhop.compile(gm)` returns, and what both faces run: `jhop.jit` on what it captured from a JAX
function, compiled autograd on what it captured from a tape.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax

from jhop import _compat, _state, backends
from jhop._asked import Asked
from jhop._cut import CannotRunOnHost, refusal_of, refuse_under_vmap, shared, sharing, waiting
from jhop._discharge import discharge
from jhop._errors import AHEAD, FULLGRAPH, Unsupported, advising, let_go_of_frames
from jhop._explain import Explains, graph_report, hooks_of
from jhop._graph import GraphModule, hooks_in
from jhop._guards import Guards
from jhop._history import OTHER_SETTINGS, History, Told, Trace
from jhop._hook import changes
from jhop._inline import inline
from jhop._program import DoesNotFit, Program
from jhop._report import GraphReport, Report
from jhop._sizes import Fits, NeedsNumbers, Symbolic, sealed_with_symbols, with_symbols
from jhop._source import describe_hook, first_line, warn
from jhop._trace_wrapped import trace_wrapped_p
from jhop._undo import Undo

MAX_ENTRIES = 32  # versions of one graph; the oldest gives way
MAX_KNOWN = 1024  # shapes that a version is known to fit
_told = Told()  # of hooks in graphs by themselves: there may be one for each backward pass
_compiled: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One traced and compiled version of a graph."""

    gm: GraphModule
    run: Callable[..., list[Any]]
    shapes: tuple[Any, ...]
    trace: Trace
    static: tuple[str, ...]
    refused: Unsupported | None = None  # why it runs on the host
    undo: Undo | None = None  # for what hooks write there
    fits: Fits | None = None  # which other shapes it is for; None: no others
    known: set[Any] = dataclasses.field(default_factory=set)  # shapes that it was found to fit
    context: Any = dataclasses.field(default_factory=_compat.trace_context)

    def holds(self) -> bool:
        """Whether JAX's settings are the same, and the guards hold."""
        same = self.context == _compat.trace_context() and (self.undo is None or self.undo.look())
        return same and (self.gm.lifted is None or self.gm.lifted.guards.hold())

    def broken(self) -> str:
        """Why it does not hold."""
        if self.context != _compat.trace_context():
            return OTHER_SETTINGS
        if self.undo is not None and not self.undo.holds:
            return "a hook on the host and one that is traced now share state"
        broken = self.gm.lifted and self.gm.lifted.guards.broken()
        return broken or "what its hooks depend on has changed"

    def writes(self) -> bool:
        """Whether running it changes Python state, or may find that numbers changed their type."""
        lifted = self.gm.lifted
        return lifted is not None and bool(lifted.writes or lifted.slots)

    def read(self) -> list[Any]:
        """The present values of the state inputs."""
        return [] if self.gm.lifted is None else self.gm.lifted.read()


class CompiledGraph(Explains):
    """A captured graph, compiled at first use and whenever what it depends on has changed.

    Args:
        gm: a graph with opaque hooks.
        backend: a function `(gm, example_inputs) -> callable`.
        fullgraph: whether a hook that cannot be traced is an error; otherwise it runs on the host.
        dynamic: whether sizes are made symbols, so that one trace serves all of them; those of `gm` itself stay so.
        where: the public function that made it, for messages.
        history: where traces are noted; by default its own.
        first: why the first trace is made.
        static: static arguments of the function that it is the graph of, in words.
        again: whether the function was traced before, so that the first trace is logged too.
    """

    def __init__(
        self, gm: GraphModule, *, backend: Any, fullgraph: bool, dynamic: bool, where: str,
        history: History | None = None, first: str | None = None, static: tuple[str, ...] = (), again: bool = False,
    ):  # fmt: skip
        self.gm = gm
        self._backend = backends.find(backend, where)
        self._foreign = backends.transform_of(self._backend) is None  # it takes whole graphs only
        self._fullgraph = fullgraph
        self._dynamic = dynamic
        self._where = where
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()
        self._last: _Entry | None = None
        self._warned = False
        self._numbers_only: str | None = None  # why sizes cannot be symbols, if that was found
        self.history = history or History(told=_told)
        self._first = first
        self._again = again
        self._static = static
        _compiled.add(self)

    def like(self, gm: GraphModule, first: str) -> CompiledGraph:
        """Another graph, compiled in the same way; `first` says why it is traced."""
        return CompiledGraph(
            gm, backend=self._backend, fullgraph=self._fullgraph, dynamic=self._dynamic, where=self._where,
            history=self.history, first=first, static=self._static,
        )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph; arguments and results as for the `GraphModule`. State is written after everything else."""
        return self.gm.unflatten(self.run(self.gm.flatten(args, kwargs)))

    def run(self, flat: list[Any], *, same_types: bool = False) -> list[Any]:
        """Runs the graph on flat inputs; `same_types` if all calls have inputs of the same shapes and dtypes."""
        with _state.LOCK:  # another thread may be tracing, with symbols in objects that both read
            entry = self._last
            if not (same_types and entry is not None and entry.holds()):
                entry = self._find(flat)
            state = entry.read()
            # What is read must be what is written over; but a hook that is called back may be on another thread.
            if entry.writes() and not entry.gm.callbacks:
                try:
                    return self._run(entry, flat, state)
                except DoesNotFit:
                    entry = self._add(flat, reason="a number of the state has another type, or outgrew 32 bits")
                    return self._run(entry, flat, entry.read())
        return self._run(entry, flat, state)

    def of_one_kind(self) -> bool:
        """Whether all its calls have inputs of the same shapes and dtypes."""
        return not self._dynamic and not self.gm.shapes

    def _find(self, flat: list[Any], *, on_host: bool = True) -> _Entry:
        shapes = _shapes_of(flat)
        reason = None
        for entry in reversed(self._entries):
            if self._matches(entry, shapes):
                if entry.holds():
                    self._last = entry
                    return entry
                reason = reason or entry.broken()
        if self._entries:
            reason = reason or self._difference(self._entries[-1], shapes)
        return self._add(flat, reason=reason, on_host=on_host)

    def _matches(self, entry: _Entry, shapes: tuple[Any, ...]) -> bool:
        if entry.shapes == shapes or shapes in entry.known:
            return True
        if entry.fits is None or not _same_kinds(entry.shapes, shapes):
            return False
        if entry.fits.broken([shape for shape, _ in shapes]) is not None:
            return False
        if len(entry.known) < MAX_KNOWN:
            entry.known.add(shapes)
        return True

    def _difference(self, entry: _Entry, shapes: tuple[Any, ...]) -> str:
        """What differs between the inputs of a version and those of the present call."""
        if entry.fits is not None and _same_kinds(entry.shapes, shapes):
            return entry.fits.broken([shape for shape, _ in shapes]) or "the inputs have other shapes or dtypes"
        for given, before, now in zip(self.gm.inputs, entry.shapes, shapes, strict=True):
            if before != now:
                why = f"; it needs sizes as numbers: {self._numbers_only}" if self._numbers_only else ""
                return f"input `{given.name}` was {_type_in_words(*before)} and is {_type_in_words(*now)}{why}"
        return "the inputs have other shapes or dtypes"

    def _add(self, flat: list[Any], *, reason: str | None, on_host: bool = True) -> _Entry:
        before, lists = backends.aot_ids(), changes()
        try:
            with advising(FULLGRAPH):
                gm, fits = self._inline(flat)
        except Unsupported as error:
            if self._fullgraph or not on_host:
                raise
            entry = self._cut(flat, error, reason) or self._on_host(flat, error, reason)
            let_go_of_frames(error)  # which the entry keeps
        else:
            example = [*flat, *(gm.lifted.read() if gm.lifted is not None else [])]
            run = backends.run_backend(self._backend, gm, example, self._where)
            entry = _Entry(gm, run, _shapes_of(flat), self._note(gm, reason), self._static, fits=fits)
            # PyTorch traces a graph with a Python float among its inputs twice, and numbers both attempts.
            floats = any(item.number is float for item in gm.inputs)
            if backends.aot_ids() != before and (floats or getattr(gm.backward, "number_inputs", False)):
                backends.take_aot_id()
        if changes() != lists:
            return entry  # a hook removed or registered hooks, which the next run must do again
        with self._lock:
            self._entries.append(entry)
            if len(self._entries) > MAX_ENTRIES:
                del self._entries[0]
                self._warn_of_traces(entry.trace.reason)
        self._last = entry
        return entry

    def _note(self, gm: GraphModule, reason: str | None) -> Trace:
        again = self._again or bool(self._entries)
        return self.history.add(self.gm.name, gm, reason or self._first, self._static, again=again)

    def _warn_of_traces(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"`{self.gm.name}` was traced more than {MAX_ENTRIES} times, the last time because "
                f"{reason}. What changes at every call should be a number or an array in an attribute, not something "
                "that Python control flow depends on."
            )

    def _inline(self, flat: list[Any]) -> tuple[GraphModule, Fits | None]:
        """The inlined graph, and which other shapes it is for."""
        types = self._symbolic(flat) if self._numbers_only is None else None
        if types is not None:
            fits = Fits(types, asked := Asked(), [given.name for given in self.gm.inputs])
            try:
                with asked.noting():
                    gm = discharge(inline(self.gm, avals=types.avals, shapes=types.places))
                fits.look(gm.jaxpr)
                fits.check([jax.numpy.shape(value) for value in flat])
                if name := sealed_with_symbols(gm.jaxpr):
                    raise NeedsNumbers(types.symbols, f"the operation `{name}` is made for one size", True)
                return gm, fits
            except Exception as error:  # some code needs sizes as numbers: trace with numbers, whatever the reason was
                if getattr(error, "always", True):
                    self._numbers_only = fits.in_words(first_line(error))
        gm = self.gm.with_numbers(flat)
        gm.check(flat)
        return discharge(inline(gm)), None

    def _symbolic(self, flat: list[Any]) -> Symbolic | None:
        """The types to trace with, if there are symbols among their sizes."""
        if self.gm.shapes:
            return Symbolic([v.aval for v in _compat.open_jaxpr(self.gm.jaxpr)[0].invars], self.gm.shapes)
        if not self._dynamic:
            return None
        sources = [f"L['inputs'][{index}]" for index in range(len(flat))]
        types = with_symbols([jax.typeof(value) for value in flat], sources, lambda place: True)
        return types if types.places else None

    def _run(self, entry: _Entry, flat: list[Any], state: list[Any]) -> list[Any]:
        if entry.undo is None:
            return self._run_and_write(entry, flat, state)
        with entry.undo.on_error():
            return self._run_and_write(entry, flat, state)

    def _run_and_write(self, entry: _Entry, flat: list[Any], state: list[Any]) -> list[Any]:
        lifted = entry.gm.lifted
        outs = backends.checked(entry.gm, entry.run(*flat, *state), self._where, types=self._foreign)
        if entry.gm.checks is not None:
            entry.gm.checks.look(outs)
        if lifted is None:
            return outs
        if lifted.writes:
            for out in outs[lifted.n_outs :]:
                if isinstance(out, _compat.Tracer) and _compat.is_mapped(out):
                    raise _state.explain_leak(lifted.writes[0].where(), out)
            lifted.commit(outs[lifted.n_outs :])
        return outs[: lifted.n_outs]

    def _cut(self, flat: list[Any], refused: Unsupported, reason: str | None) -> _Entry | None:
        """A graph that is cut at the hooks that cannot be traced; None where that will not do."""
        transform = backends.transform_of(self._backend)
        found = list({id(hook.base): hook.base for hook, _ in self.gm.hooks}.values())
        reasons: dict[int, str] = {}  # by place in `found`
        error: Unsupported | None = refused
        new: dict[int, str] = {}
        while transform is not None:
            if error is not None:
                refusals = [(i, refusal_of(hook, error)) for i, hook in enumerate(found)]
                new = {i: str(refusal) for i, refusal in refusals if refusal is not None}
            there = [found[i] for i in {**reasons, **new}]
            if new.keys() <= reasons.keys():
                return None
            reasons |= {i: why for i, why in new.items() if i not in reasons}
            try:
                gm = self.gm.with_numbers(flat)
                gm.check(flat)
                with advising(FULLGRAPH):
                    gm, error = discharge(inline(gm, on_host=there)), None
            except CannotRunOnHost as another:
                raise another from refused
            except Unsupported as another:
                error = another
                continue
            new = {i: f"it shares {path} with a hook that cannot" for i, path in sharing(gm, found, there).items()}
            if not new:
                for i, why in reasons.items():
                    if self.history.tell(describe_hook(found[i])):
                        warn(
                            f"{describe_hook(found[i])} runs on the host at each run. The compiled graph is cut in "
                            "two there, and inside a loop or a branch it calls back: the device waits for the hook, "
                            f"and nothing is fused across it. It cannot be traced: {why}"
                        )
                run = waiting(self._placed(gm, Program(gm, transform)), gm.callbacks)
                undo = Undo([found[i] for i in reasons], gm.callbacks, functools.partial(shared, gm))
                return _Entry(gm, run, _shapes_of(flat), self._note(gm, reason), self._static, refused, undo)
        return None

    def _placed(self, gm: GraphModule, run: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """A run of a graph that is cut, with what the backend says of where its inputs and outputs are."""
        n_outs = len(_compat.open_jaxpr(gm.jaxpr)[0].outvars) if gm.lifted is None else gm.lifted.n_outs
        return self._backend.placed(run, n_outs) if hasattr(self._backend, "placed") else run

    def _on_host(self, flat: list[Any], error: Unsupported, reason: str | None) -> _Entry:
        """The whole graph, operation by operation."""
        gm = self.gm.with_numbers(flat)
        jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
        found = [(hook, eqn) for hook, eqn in hooks_in(jaxpr) if eqn.primitive is trace_wrapped_p]
        if not found or any(eqn not in jaxpr.eqns for _, eqn in found):
            raise error  # hooks inside loops and other inner functions: only tracing gets there
        for hook, _ in found:
            refuse_under_vmap(hook)
        names = ", ".join(describe_hook(hook.base) for hook, _ in found)
        if self.history.tell(names):
            warn(
                f"The graph runs on the host, one operation at a time, with every hook called at each run ({names}), "
                f"because one of them cannot be traced: {error}"
            )
        run = self._placed(gm, backends.eager(gm, flat))
        undo = Undo([hook.base for hook, _ in found])
        return _Entry(gm, run, _shapes_of(flat), self._note(gm, reason), self._static, error, undo)

    def entry(self, flat: list[Any]) -> _Entry:
        """The version for these inputs, traced if there is none. Inputs may be `jax.ShapeDtypeStruct`s.

        Raises:
            Unsupported: a hook cannot be traced, even if it could run on the host.
        """
        with _state.LOCK, advising(AHEAD):
            entry = self._find(flat, on_host=False)
        if entry.refused is not None:
            raise copy.copy(entry.refused) from entry.refused.__cause__  # what is raised gets frames
        return entry

    def versions(self) -> int:
        """How many versions there are."""
        return len(self._entries)

    def reports(self, guards: Guards | None = None) -> list[GraphReport]:
        """What there is to say of each version; `guards` are those of the function that it is the graph of."""
        hooks = hooks_of(self.gm)
        return [graph_report(entry, hooks, guards) for entry in list(self._entries)]

    def _report(self) -> Report:
        return Report.of(self._where, self.gm.name, self.reports(), self.history)

    def last_entry(self) -> _Entry | None:
        """The version that ran last."""
        return self._last

    def reset(self) -> None:
        """Forgets what was compiled."""
        with self._lock:
            self._entries.clear()
            self.history.clear()
        self._last = None
        self._numbers_only = None


def _shapes_of(flat: list[Any]) -> tuple[Any, ...]:
    return tuple((value.shape, value.dtype) if hasattr(value, "dtype") else ((), type(value)) for value in flat)


def _same_kinds(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether inputs differ in their sizes at most."""
    pairs = zip(before, now, strict=True)
    return all(len(old) == len(new) and old_dtype == new_dtype for (old, old_dtype), (new, new_dtype) in pairs)


def _type_in_words(shape: tuple[Any, ...], dtype: Any) -> str:
    if isinstance(dtype, type):
        return dtype.__name__
    return f"{dtype}[{','.join(map(str, shape))}]"


def reset_compiled() -> None:
    """Forgets every compiled version of every graph."""
    with _state.LOCK:
        for compiled in list(_compiled):
            compiled.reset()
        _told.clear()
