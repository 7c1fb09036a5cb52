"""Compiled autograd: a whole backward pass, over everything on the tape, captured as one graph.

Inside `enable(compiler_fn)`, `backward()` does not run node by node. The engine walks the tape once over tracers, which
gives a `GraphModule` whose inputs are the incoming gradient and everything that nodes saved, whose hooks are opaque,
and whose outputs are the new gradients. `compiler_fn` makes a callable of it. Gradients are assigned after it returned,
so either all of them are, or none. A pass with `create_graph=True` runs node by node, as its nodes are what a later
pass differentiates; that later pass is captured. One with `is_grads_batched=True` runs node by node, too.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jhop import _engine, _plan
from jhop._errors import JhopError
from jhop._graph import GraphModule
from jhop._node import set_grad_enabled
from jhop._tape import Outputs, Tape

# Captures by structure of the tape, the least recently used first. It holds hooks, so it must not grow for ever.
_cache: collections.OrderedDict[Any, tuple[Callable[..., Any], Outputs]] = collections.OrderedDict()
_CACHE_SIZE = 128
_lock = threading.Lock()


@contextlib.contextmanager
def enable(compiler_fn: Callable[[GraphModule], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block, this thread's `backward()` captures the pass and runs what `compiler_fn` makes of it.

    Args:
        compiler_fn: `compiler_fn(gm) -> callable` on the graph's flat inputs, for instance
            `lambda gm: jhop.compile(gm, fullgraph=True)`. It is called once per structure of the tape: the result is
            used again for tapes of the same operations, shapes and hooks.

    Raises:
        JhopError: `compiler_fn` is not callable.

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
    if not callable(compiler_fn):
        raise JhopError(
            f"compiled_autograd.enable: expected a function from a GraphModule to a callable, got "
            f"{type(compiler_fn).__name__}."
        )

    def runner(request: _plan.Request) -> list[Any]:
        recording = set_grad_enabled(False)  # hooks run, and are traced, as in a pass that runs node by node
        try:
            return _run(compiler_fn, request)
        finally:
            set_grad_enabled(recording)

    before = _engine.capture_with(runner)
    try:
        yield
    finally:
        _engine.capture_with(before)


def _run(compiler_fn: Any, request: _plan.Request) -> list[Any]:
    tape = Tape(request)
    if not tape.plan.order:
        return [None] * tape.plan.n_results
    key = (compiler_fn, *tape.key())
    with _lock:
        found = _cache.get(key)
        if found is not None:
            _cache.move_to_end(key)
    if found is None:
        gm, outputs = tape.capture()
        compiled = compiler_fn(gm)
        if not callable(compiled):
            raise JhopError(
                "compiled_autograd: compiler_fn must return a callable for the graph it was given, got "
                f"{type(compiled).__name__}."
            )
        with _lock:
            found = _cache[key] = compiled, outputs
            while len(_cache) > _CACHE_SIZE:
                _cache.popitem(last=False)
    compiled, outputs = found
    results = tape.assign(list(compiled(*tape.inputs)), outputs)
    if not request.keep_graph:
        for node in tape.plan.run:
            node.release()
    return results


def reset() -> None:
    """Forgets captured backward passes."""
    with _lock:
        _cache.clear()
