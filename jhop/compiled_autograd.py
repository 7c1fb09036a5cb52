"""Compiled autograd: a whole backward pass, over everything on the tape, captured as one graph.

Inside `enable(compiler_fn)`, `backward()` does not run node by node. The engine walks the tape once over tracers, which
gives a `GraphModule` whose inputs are the incoming gradient and everything that nodes saved, whose hooks are opaque,
and whose outputs are the new gradients. `compiler_fn` makes a callable of it. Gradients are assigned after it returned,
so either all of them are, or none. A pass with `create_graph=True` runs node by node, as its nodes are what a later
pass differentiates; that later pass is captured. One with `is_grads_batched=True` runs node by node, too.

Without a function of the user's there is nobody to show the graph to, so a structure of the tape that was never seen
runs node by node, and is captured when it is seen again: what runs once is not worth a compile. Nothing that the engine
runs is refused later: a structure that cannot be captured goes on node by node, and a warning says so.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp

from jhop import _compat, _engine, _gradients, _plan, backends
from jhop._compile import CompiledGraph
from jhop._errors import JhopError
from jhop._graph import GraphModule
from jhop._logs import logs_recompiles, recompiling, settled
from jhop._misses import Summary, reason
from jhop._node import set_grad_enabled
from jhop._resized import Capture
from jhop._sizes import Dynamic, Fits, with_fewest_numbers
from jhop._source import warn
from jhop._standins import StandIn, standing_in
from jhop._tape import Outputs, Sight

__all__ = ("enable", "reset")

_CACHE_SIZE = 128
_COMPARED = 8  # captures with which a new one is compared
_VERSIONS = 8  # captures of one kind of tape with symbols for sizes


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What is known of a structure of the tape.

    Attributes:
        captured: the captured pass, on flat inputs, and what it returns; None where passes run node by node.
        held: hooks of a captured pass: they stay alive, so that the ids in its key stay theirs.
        alive: weak references to everything else that the key names by its id.
        summary: what the tape was like, if it was captured.
        stand_ins: what is in the capture in place of `Tape.functions`.
        used: of which Tensors its hooks use the gradient.
        sizes: for which sizes of its inputs a captured pass is, if some are symbols.
    """

    captured: tuple[Callable[[list[Any]], list[Any]], Outputs] | None
    held: tuple[Any, ...]
    alive: tuple[Any, ...]
    summary: Summary | None = None
    stand_ins: tuple[StandIn, ...] = ()
    used: _gradients.Used = dataclasses.field(default_factory=_gradients.Used)
    sizes: Fits | None = None

    def fits(self) -> bool:
        """Whether all ids in the key are still those of the same objects."""
        return all([ref() is not None for ref in self.alive])

    def serves(self, tape: Sight) -> bool:
        """Whether it is right for the sizes of another tape of its kind."""
        if self.captured is None or self.sizes is None or not self.fits():
            return False
        return self.sizes.broken([jnp.shape(tape.inputs[i]) for i in self.captured[1].inputs]) is None


class _Kind:
    """What is known of tapes that differ in sizes at most."""

    def __init__(self) -> None:
        self.dynamic = Dynamic(None)
        self.entries: list[_Entry] = []  # with symbols

    def find(self, tape: Sight) -> _Entry | None:
        """An entry that serves a tape."""
        return next((entry for entry in reversed(self.entries) if entry.serves(tape)), None)

    def add(self, entry: _Entry) -> None:
        if entry.sizes is not None:
            self.entries.append(entry)
            del self.entries[:-_VERSIONS]


class _Cache:
    """Entries by key, the least recently used first. It holds hooks, so it must not grow for ever."""

    def __init__(self) -> None:
        self._entries: collections.OrderedDict[Any, _Entry] = collections.OrderedDict()
        self._latest: _Entry | None = None  # what was used last: it takes a while to compare the key of a long tape
        self._lock = threading.Lock()

    def find(self, key: Any) -> _Entry | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None or not found.fits():
                return None
            if found is not self._latest:
                self._entries.move_to_end(key)
                self._latest = found
            return found

    def add(self, key: Any, entry: _Entry) -> _Entry:
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = self._latest = entry
            while len(self._entries) > _CACHE_SIZE:
                self._entries.popitem(last=False)
        return entry

    def summaries(self) -> list[Summary]:
        """Of what was captured last, the latest last."""
        with self._lock:
            entries = list(itertools.islice(reversed(self._entries.values()), _COMPARED))
        return [entry.summary for entry in reversed(entries) if entry.summary is not None]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._latest = None


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _kind_of(key: Any) -> _Kind:
    """The kind of tapes with this key, less sizes."""
    return _Kind()


_captured, _seen = _Cache(), _Cache()  # hooks that are new at each pass fill the second one only


@contextlib.contextmanager
def enable(compiler_fn: Callable[[GraphModule], Callable[..., Any]] | None = None) -> Iterator[None]:
    """Inside the block, this thread's `backward()` captures the pass and runs what `compiler_fn` makes of it.

    Args:
        compiler_fn: `compiler_fn(gm) -> callable` on the graph's flat inputs, for instance
            `lambda gm: jhop.compile(gm, fullgraph=True)`. It is called once per structure of the tape: the result is
            used again for tapes of the same operations, shapes and hooks; functions of the same code that write to no
            variable outside and close over plain values count as the same hook. For the second shapes of a structure
            it is given a graph with symbols for the sizes that changed, which serves further ones, unless code of the
            user's needs numbers. By default, the first pass of a structure runs node by node, as it does outside of
            the block, and from the second on it is compiled, as by `jhop.compile(gm)`. Hooks that cannot be traced run
            on the host then; where that will not do either, the structure goes on node by node. A warning says so.

    Raises:
        JhopError: `compiler_fn` is not callable. During a pass, given a `compiler_fn`: a hook reads or writes the
            `.grad` of a Tensor whose gradient the pass writes; only post-accumulate hooks of that Tensor may.

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
    if compiler_fn is not None and not callable(compiler_fn):
        raise JhopError(
            "compiled_autograd.enable: expected a function from a GraphModule to a callable, or None, got "
            f"{type(compiler_fn).__name__}."
        )

    def runner(request: _plan.Request) -> list[Any]:
        recording = set_grad_enabled(False)  # hooks run, and are traced, as in a pass that runs node by node
        try:
            return _run(compiler_fn, request)
        finally:
            set_grad_enabled(recording)

    before = _engine.capture_with(runner)
    if before in _engine.CHECKED:  # passes are looked at in this thread, and so run node by node
        _engine.capture_with(before)
    try:
        with settled():
            yield
    finally:
        _engine.capture_with(before)


def _run(compiler_fn: Any, request: _plan.Request) -> list[Any]:
    tape = Sight(request)
    if not tape.nodes:
        return tape.no_results()
    outside = None if compiler_fn is None else tape.name(compiler_fn), _compat.trace_context()
    key = *outside, *tape.key
    found = _captured.find(key)
    if found is None or found.used.any_of(tape.owners):
        if compiler_fn is None and _seen.find(key) is None:
            results = _engine.by_node(request, tape.saved_of)
            _seen.add(key, _entry_of(tape, None))
            return results
        kind = _kind_of((*outside, *tape.kind))
        found = kind.find(tape)
        if found is None or found.used.any_of(tape.owners):
            summary = Summary.of(tape, compiler_fn)
            if logs_recompiles() and (before := _captured.summaries()):
                recompiling("the backward pass", None, reason(summary, before))
            try:
                found = _capture(compiler_fn, tape, kind.dynamic, summary)
            except _NotCaptured as refused:
                return _refused(refused, key, tape, request)
            kind.add(found)
        _captured.add(key, found)
    if found.captured is None:
        return _engine.by_node(request, tape.saved_of)
    run, outputs = found.captured
    try:
        with standing_in(found.stand_ins, tape.functions) if found.stand_ins else contextlib.nullcontext():
            with _gradients.to_come(tape.owners, found.used):
                results = run([tape.inputs[i] for i in outputs.inputs])
    except (_NotCaptured, _gradients.GradientTooEarly) as refused:
        if compiler_fn is not None:
            raise
        return _refused(refused, key, tape, request)
    results = tape.assign(results, outputs)
    if not request.keep_graph:
        for node in tape.run:
            node.release()
    return results


def _capture(compiler_fn: Any, tape: Sight, dynamic: Dynamic, summary: Summary) -> _Entry:
    """Captures a pass; it is compiled when it runs.

    Raises:
        _NotCaptured: it cannot be captured, and there is no function of the user's that it is captured for.
    """
    run: Callable[[list[Any]], list[Any]]
    try:
        made, _ = with_fewest_numbers(lambda: Capture(tape), dynamic)
    except Exception as error:
        if compiler_fn is None:
            raise _NotCaptured(error) from error
        raise
    compiled = (_Whole if compiler_fn is None else compiler_fn)(made.gm)
    if not callable(compiled):
        raise JhopError(
            "compiled_autograd: compiler_fn must return a callable for the graph it was given, got "
            f"{type(compiled).__name__}."
        )
    if isinstance(compiled, CompiledGraph) and compiled.gm is made.gm:
        run = functools.partial(compiled.run, same_types=compiled.of_one_kind())
    else:
        run = lambda flat: list(compiled(*flat))  # noqa: E731
    entry = _entry_of(tape, (run, made.outputs))
    filled = any(stand_in.has_values for stand_in in made.tape.stand_ins)
    stand_ins = tuple(made.tape.stand_ins) if filled else ()
    return dataclasses.replace(entry, summary=summary, stand_ins=stand_ins, sizes=made.fits)


def _entry_of(tape: Sight, captured: Any) -> _Entry:
    """An entry for the key of a tape; of one that is not captured, it keeps nothing alive that it need not."""
    alive, held = [weakref.ref(leaf) for leaf in tape.given], tape.hooks
    if captured is None:
        held = [hook for hook in tape.hooks if not _has_weak_references(hook)]
        alive += [weakref.ref(hook) for hook in tape.hooks if _has_weak_references(hook)]
    return _Entry(captured, tuple(held), tuple(alive))


def _has_weak_references(obj: Any) -> bool:
    return type(obj).__weakrefoffset__ != 0


class _NotCaptured(Exception):
    """A pass that was to be captured without anybody having asked for it cannot be."""


class _Whole(CompiledGraph):
    """A captured pass that nobody asked for: what keeps it from being traced is no error."""

    def __init__(self, gm: GraphModule):
        super().__init__(gm, backend=backends.xla, fullgraph=False, dynamic=False, where="compiled_autograd")

    def _add(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._add(*args, **kwargs)
        except Warning:  # which the user wants to have as errors
            raise
        except Exception as error:
            raise _NotCaptured(error) from error


def _refused(refused: Exception, key: Any, tape: Sight, request: _plan.Request) -> list[Any]:
    """Runs a pass that cannot be captured node by node. What is wrong in itself is an error there, too."""
    why = refused.__cause__ if isinstance(refused, _NotCaptured) else refused
    results = _engine.by_node(request, tape.saved_of)
    _captured.add(key, _entry_of(tape, None))
    warn(
        "compiled_autograd: a backward pass runs node by node, as it does without compiled_autograd.enable, from now "
        f"on, because it cannot be captured: {why}"
    )
    return results


def reset() -> None:
    """Forgets captured backward passes."""
    _captured.clear()
    _seen.clear()
    _kind_of.cache_clear()
