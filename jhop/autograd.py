"""Functions on the tape, by the names that PyTorch has for them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jhop import _batched, _compat, _engine, _plan
from jhop._edges import GradientEdge as GradientEdge
from jhop._edges import edge, edge_of, given_tensors, request_for, seeds_of
from jhop._errors import HookError, JhopError, Unsupported
from jhop._gates import Group
from jhop._hook import RemovableHandle
from jhop._kept import Hooks, keeping
from jhop._lift import lift
from jhop._node import inside, set_grad_enabled
from jhop._tensor import Tensor

__all__ = (
    "GradientEdge", "backward", "detect_anomaly", "enable_grad", "get_gradient_edge", "grad", "no_grad",
    "queue_callback", "register_multi_grad_hook", "saved_tensors_hooks",
)  # fmt: skip

get_gradient_edge = edge  # PyTorch's name


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Inside the block, operations on Tensors of this thread are not recorded.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(1.0, requires_grad=True)
        >>> with jhop.autograd.no_grad():
        ...     y = x * 2.0
        >>> y.requires_grad
        False
    """
    with _recording(False):
        yield


@contextlib.contextmanager
def enable_grad() -> Iterator[None]:
    """Inside the block, operations on Tensors of this thread are recorded, also inside `no_grad`.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(1.0, requires_grad=True)
        >>> with jhop.autograd.no_grad(), jhop.autograd.enable_grad():
        ...     y = x * 2.0
        >>> y.requires_grad
        True
    """
    with _recording(True):
        yield


@contextlib.contextmanager
def _recording(enabled: bool) -> Iterator[None]:
    before = set_grad_enabled(enabled)
    try:
        yield
    finally:
        set_grad_enabled(before)


@contextlib.contextmanager
def detect_anomaly() -> Iterator[None]:
    """Inside the block, a backward pass of this thread that makes NaN is an error that says where.

    The pass runs node by node, also where this block or `compiled_autograd.enable` is in the other, and the backward of
    a compiled function equation by equation, with hooks as plain Python: it is slow. Passes with `create_graph=True`,
    and what is compiled by `jhop.jit` (use `jax.debug_nans`), are not looked at.

    Raises:
        JhopError: during the pass, an operation or a hook was given no NaN and made one. It names the operation's node,
            or within a compiled function the primitive and the source line. Nothing was written then.

    Example:
        >>> import jhop, jhop.numpy as jnp
        >>> x = jhop.tensor(0.0, requires_grad=True)
        >>> y = jnp.sqrt(x) * 0.0
        >>> with jhop.autograd.detect_anomaly():
        ...     try:
        ...         y.backward()
        ...     except jhop.JhopError as error:
        ...         print(str(error).partition(" made")[0])
        autograd.detect_anomaly: SqrtBackward, for input 0 of the operation,

    The counterpart in PyTorch is `torch.autograd.detect_anomaly`.
    """
    before = _engine.capture_with(_engine.CHECKED[0])
    try:
        yield
    finally:
        _engine.capture_with(before)


@contextlib.contextmanager
def saved_tensors_hooks(pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> Iterator[None]:
    """Inside the block, what operations of this thread keep for their backward is kept as `pack` says.

    A node keeps the arguments of its operation; a call of a compiled function, its inputs and what its backward graph
    needs. `pack` runs when the operation is recorded, `unpack` once in each backward pass that runs the node, also
    under compiled autograd. Of nested blocks, the innermost counts. Python numbers are kept as they are.

    Args:
        pack: `pack(array) -> anything`, for each array that is kept: one that is two arguments is packed twice, except
            for a compiled function. What it returns may be anything: another array, a file name, an index.
        unpack: `unpack(anything) -> array`, which is given that and returns an array of the shape and dtype that were
            packed.

    Raises:
        HookError: one of them is not callable. During the pass: what `unpack` returned has another shape or dtype.
        JhopError: used inside a function that `jhop.compile` traces.

    Example: keep activations in half the bytes. (On the host, it is `jax.device_get` and `jnp.asarray`; or
    `jax.device_put` both ways, with `array.sharding.with_memory_kind("pinned_host")` there.)

        >>> import jhop, jax.numpy as jnp
        >>> x = jhop.tensor([1.0, 3.0], requires_grad=True)
        >>> with jhop.autograd.saved_tensors_hooks(
        ...     lambda array: array.astype(jnp.bfloat16), lambda kept: kept.astype(jnp.float32)
        ... ):
        ...     y = (x * x).sum()
        >>> y.backward()
        >>> x.grad.tolist()
        [2.0, 6.0]

    The counterpart in PyTorch is `torch.autograd.graph.saved_tensors_hooks`.
    """
    for name, fn in (("pack", pack), ("unpack", unpack)):
        if not callable(fn):
            raise HookError(
                f"autograd.saved_tensors_hooks: expected {name} as a function, got {type(fn).__name__} ({fn!r})."
            )
    if inside() is not None:
        raise JhopError(
            "autograd.saved_tensors_hooks inside a function that jhop.compile traces has nothing to keep: the function "
            "becomes one operation. Call the function inside the block instead."
        )
    with keeping(Hooks(pack, unpack)):
        yield


def backward(
    tensors: Tensor | Sequence[Tensor],
    gradients: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Runs one backward pass from several Tensors; a Tensor that is given twice counts twice.

    Args:
        tensors: where to start: Tensors, or edges (`jhop.edge`).
        gradients: per Tensor or edge, its cotangent (same shape and dtype), or None for scalars.
        retain_graph, create_graph, inputs: as for `Tensor.backward`.

    Raises:
        JhopError: as for `Tensor.backward`, or another number of gradients than of Tensors.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(3.0, requires_grad=True)
        >>> jhop.autograd.backward([x * x, x * 5.0])
        >>> float(x.grad)
        11.0

    The counterpart in PyTorch is `torch.autograd.backward`.
    """
    seeds = seeds_of(tensors, gradients, "autograd.backward", create_graph)
    _engine.backward(request_for(seeds, retain_graph, create_graph, inputs))


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    *,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Any, ...]:
    """The gradients of `outputs` by `inputs`, as they are after the hooks of the inputs; no leaf's `.grad` is touched.

    Only what lies on paths from outputs to inputs runs. Of an input itself the Tensor's hooks run, the hooks of the
    node that made it do not; nor do post-accumulate hooks.

    Args:
        outputs: the Tensors, or edges (`jhop.edge`), to differentiate; several are summed, one that is given twice
            counts twice.
        inputs: the Tensors or edges to differentiate by: leaves or not, each as often as you like.
        grad_outputs: per output its cotangent (an array or a Tensor of its shape and dtype), or None for a scalar.
        retain_graph: keep what was saved, so that another pass can run; by default, as `create_graph`.
        create_graph: record the pass, so that its results can be differentiated, also by `grad_outputs`. Hooks then get
            Tensors and should compute with their operators and `jhop.numpy`, which take arrays as well.
        allow_unused: whether None stands for the gradient by an input that no output depends on. Otherwise that is an
            error. By default, as `materialize_grads`.
        is_grads_batched: `grad_outputs` have one more axis, the first, and so have the results: one pass for many
            cotangents. Hooks run once, on one example's cotangent that JAX traces (`jax.vmap`). With `create_graph` it
            is one pass for each example.
        materialize_grads: zeros in place of None.

    Returns:
        One gradient per input, of its shape and dtype: arrays, or Tensors with `create_graph`.

    Raises:
        JhopError: an output or input does not require grad; an input is unused and `allow_unused` is not set; a
            cotangent is missing or has another shape or dtype; the graph was freed by an earlier pass.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(3.0, requires_grad=True)
        >>> _ = x.register_hook(lambda grad: grad * 2.0)
        >>> (slope,) = jhop.autograd.grad(x * x * x, x, create_graph=True)
        >>> (bend,) = jhop.autograd.grad(slope, x)
        >>> float(slope), float(bend)
        (54.0, 72.0)

    The counterpart in PyTorch is `torch.autograd.grad`.
    """
    if materialize_grads and allow_unused is False:
        raise JhopError(
            "autograd.grad: expected no allow_unused=False with materialize_grads=True, which gives zeros for unused "
            "inputs. Leave out one of the two."
        )
    by = given_tensors(inputs, "autograd.grad(inputs)", edges=True)
    for i, tensor in enumerate(by):
        if isinstance(tensor, Tensor) and not tensor.requires_grad:
            raise JhopError(
                f"autograd.grad: inputs[{i}], of shape {tensor.shape}, does not require grad. Make it with "
                "jhop.tensor(..., requires_grad=True), or leave it out."
            )
    edges = tuple(edge_of(item, "autograd.grad") for item in by)
    keep = create_graph if retain_graph is None else retain_graph

    def request(gradients: Any, keep_graph: bool) -> _plan.Request:
        return _plan.Request(
            seeds=seeds_of(outputs, gradients, "autograd.grad", create_graph), keep_graph=keep_graph,
            create_graph=create_graph, inputs=edges, returned=True,
        )  # fmt: skip

    if is_grads_batched:
        found = _for_each(request, _examples(outputs, grad_outputs), keep)
    else:
        found = _engine.backward(request(grad_outputs, keep))
    return tuple(
        _result(i, tensor, value, create_graph, allow_unused or materialize_grads, materialize_grads)
        for i, (tensor, value) in enumerate(zip(by, found, strict=True))
    )


def queue_callback(fn: Callable[[], Any]) -> None:
    """Runs `fn()` when the backward pass that is under way has ended: called from a hook, in that hook's thread.

    All gradients are written then. Callbacks run in the order in which they were queued, also those that a callback
    queues. If the pass raises, none runs.

    Args:
        fn: a function without arguments; what it returns is ignored.

    Raises:
        HookError: `fn` is not callable, or no backward pass is under way.
        Unsupported: the hook is being traced. Where hooks that cannot be traced run on the host (`fullgraph=False`),
            this one does; with `fullgraph=True` it is an error.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(2.0, requires_grad=True)
        >>> _ = x.register_hook(lambda grad: jhop.autograd.queue_callback(lambda: print("done:", float(x.grad))))
        >>> (x * 3.0).backward()
        done: 3.0

    The counterpart in PyTorch is `torch.autograd.Variable._execution_engine.queue_callback`.
    """
    if not callable(fn):
        raise HookError(f"autograd.queue_callback: expected a function, got {type(fn).__name__} ({fn!r}).")
    if _compat.staging() is not None:
        raise Unsupported(
            "autograd.queue_callback is called by a hook that is being traced: it would queue its function at the "
            "trace and at no run. Call the function after backward(), or compile with fullgraph=False, where the hook "
            "runs on the host."
        )
    if not _engine.at_end(fn):
        raise HookError(
            "autograd.queue_callback: expected a backward pass to be under way in this thread, found none. Call it "
            "from a hook."
        )


def register_multi_grad_hook(
    tensors: Sequence[Tensor], fn: Callable[[Any], Any], *, mode: str = "all"
) -> RemovableHandle:
    """Registers one hook on several Tensors.

    With mode "all", `fn(grads) -> sequence | None` runs once per backward pass, when the gradients of all Tensors that
    the pass reaches are complete: `grads` is a list in the order of `tensors`, None for those that it does not reach.
    The gradients that it returns take the place of these, None keeps one; none of them flows on before it ran. Where
    the gradient of one Tensor is computed from that of another, some have flowed on: then it may only look on. With
    mode "any", `fn(grad) -> None` runs once per pass, on the first of these gradients.

    On each Tensor it has its turn among the hooks of that Tensor, in order of registration.

    Args:
        tensors: two or more Tensors, or one, each once: leaves or not.
        fn: gets arrays of the Tensors' shapes and dtypes (Tensors with `create_graph`), returns others like them.
        mode: "all" or "any".

    Returns:
        A handle whose `remove()` removes the hook from all Tensors.

    Raises:
        HookError: `fn` is not callable, `mode` is another, or a Tensor does not require grad or is given twice. During
            the pass: what `fn` returned is no sequence of that length, has another shape or dtype in it, or a gradient
            where it was given None; or it returned something where it may only look on.
        JhopError: `tensors` are no Tensors, or a function that `jhop.compile` traces is running.

    Example:
        >>> import jhop, jax.numpy as jnp
        >>> x, y = (jhop.tensor(value, requires_grad=True) for value in (1.0, 2.0))
        >>> def clip(grads):
        ...     norm = jnp.sqrt(sum(grad * grad for grad in grads))
        ...     return [grad / norm for grad in grads]
        >>> handle = jhop.autograd.register_multi_grad_hook([x, y], clip)
        >>> (x * 3.0 + y * 4.0).backward()
        >>> round(float(x.grad), 3), round(float(y.grad), 3)
        (0.6, 0.8)

    The counterpart in PyTorch is `torch.autograd.graph.register_multi_grad_hook`, which ignores what `fn` returns.
    """
    where = "autograd.register_multi_grad_hook"
    members = given_tensors(tensors, where)
    if mode not in ("all", "any"):
        raise HookError(f"{where}: expected mode 'all' or 'any', got {mode!r}.")
    if not callable(fn):
        raise HookError(f"{where}: expected a callable hook, got {type(fn).__name__} ({fn!r}).")
    for i, tensor in enumerate(members):
        tensor._outside(where)
        tensor._need_grad(f"{where}: tensors[{i}]")
        if any(tensor is other for other in members[:i]):
            raise HookError(f"{where}: tensors[{i}], of shape {tensor.shape}, is given twice. Give each Tensor once.")
    group = Group(fn, first=mode == "any", places=[tensor._place() for tensor in members])
    return group.register([tensor._hook_list() for tensor in members])


def _result(i: int, tensor: Tensor, value: Any, create_graph: bool, allow_unused: bool, zeros: bool) -> Any:
    """The gradient by one input, where the pass found `value`."""
    if value is None and zeros:
        value = jnp.zeros(tensor.shape, tensor.dtype)
    if value is None:
        if not allow_unused:
            raise JhopError(
                f"autograd.grad: no output depends on inputs[{i}], of shape {tensor.shape}. Give allow_unused=True to "
                "get None for it, or materialize_grads=True to get zeros."
            )
        return None
    return Tensor(value) if create_graph and not isinstance(value, Tensor) else value


def _examples(outputs: Any, gradients: Any) -> list[Any]:
    """Checked cotangents with one more axis, which is as long in all of them."""
    single = isinstance(outputs, (Tensor, GradientEdge)) and not isinstance(gradients, (list, tuple))
    given = [gradients] if single else gradients
    shapes = [np.shape(getattr(ct, "value", ct)) for ct in given or [None]]
    if given is None or any(ct is None for ct in given) or len({shape[:1] for shape in shapes} - {()}) != 1:
        raise JhopError(
            "autograd.grad(is_grads_batched=True): expected grad_outputs with one more axis, the first, of one length "
            f"for all, got shapes {shapes}."
        )
    return list(given)


def _for_each(request: Callable[[Any, bool], _plan.Request], given: list[Any], keep: bool) -> list[Any]:
    """The results of a pass for each example of the cotangents, stacked."""
    examples = [[ct[i] for ct in given] for i in range(len(given[0]))]
    first = request(examples[0], keep)
    if not first.create_graph:
        cts = [jnp.asarray(getattr(ct, "value", ct)) for ct in given]
        seeds = [(edge, ct) for (edge, _), ct in zip(first.seeds, cts, strict=True)]
        return _batched.backward(dataclasses.replace(first, seeds=seeds))
    # Recorded, a pass is of Tensors, which stand for one value each.
    passes = [_engine.backward(request(cts, keep or cts is not examples[-1])) for cts in examples]
    return [None if row[0] is None else _stack(list(row)) for row in zip(*passes, strict=True)]


_stack = lift(jnp.stack)
