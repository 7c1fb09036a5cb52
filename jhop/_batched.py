"""One backward pass for many cotangents: the engine's pass under `jax.vmap`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jhop import _compat, _engine, _plan, _state
from jhop._errors import JhopError
from jhop._hook import HookList
from jhop._source import hook_name
from jhop._trace_wrapped import trace_wrapped
from jhop._walk import Walk


def backward(request: _plan.Request) -> list[Any]:
    """Runs a pass whose cotangents have one more axis, the first; so have its results.

    Returns:
        As `_engine.backward`.

    Raises:
        JhopError: a Tensor on the way retains its gradient.
        Unsupported: a hook writes to its state what differs from example to example.
    """
    found = _plan.plan(request)
    for node in found.run:
        node.check()
    edges = [edge for edge, _ in request.seeds]
    reached: list[bool] = []

    def one(cts: list[Any]) -> list[Any]:
        results = _BatchedPass(found, keep_graph=request.keep_graph).run(list(zip(edges, cts, strict=True)))
        reached[:] = [result is not None for result in results]
        return [result for result in results if result is not None]

    outs = iter(jax.vmap(one)([ct for _, ct in request.seeds]))
    return [next(outs) if here else None for here in reached]


class _BatchedPass(_engine.Pass):
    """A pass over what stands for one example of many."""

    def accumulate(self, tensor: Any, ct: Any) -> None:
        raise JhopError(
            f"autograd.grad(is_grads_batched=True): a Tensor of shape {tensor.shape} on the way retains its gradient "
            "(retain_grad()), of which there is one for each example. Give it among `inputs` instead."
        )

    def tensor_hooks(self, ct: Any, hooks: HookList) -> Any:
        for fn in hooks.snapshot():
            with _lifted(fn):
                ct = trace_wrapped(ct, fn=fn, kind="tensor_pre_hook")
        return ct

    def none_hook(self, fn: Any, cts: list[Any]) -> None:
        with _lifted(fn):
            super().none_hook(fn, cts)

    def tuple_hook(self, fn: Any, cts: list[Any], *others: list[Any]) -> list[Any]:
        with _lifted(fn):
            return super().tuple_hook(fn, cts, *others)


@contextlib.contextmanager
def _lifted(fn: Any) -> Iterator[None]:
    """Inside, a hook writes its state for all examples at once.

    Raises:
        Unsupported: what it writes differs from example to example.
    """
    walk = Walk([(hook_name(fn), fn)], strict=False)
    with _state.LOCK:
        with _state.Lift(walk, [leaf.value for leaf in walk.leaves]) as lift:
            yield
            writes = list(lift.writes())
        for container, key, value in writes:
            for part in jax.tree.leaves(value):
                if _compat.is_mapped(part):
                    raise _state.explain_leak(container.path_of(key), part)
        _state.commit(writes)
