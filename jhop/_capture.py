"""Capture: a function, and what is known of its values, becomes a `GraphModule` whose hooks are opaque.

Tracing is `jax.make_jaxpr`; hooks are `trace_wrapped` equations in it whose functions have not run. A `Recorder`
collects what the jaxpr itself cannot say: the user's names, source positions and operators of single values. It does
so for tracers, and when the trace ends asks each for the variable that stands for it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._errors import JhopError
from jhop._graph import NO_INFO, GraphModule, Info, Input, Operator
from jhop._source import hook_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backward:
    """What print needs to know of a captured backward pass besides its jaxpr.

    Attributes:
        shapes: concrete shapes of the inputs.
        sizes: every dimension size that PyTorch lifts, in its order.
        checked: per `validate_outputs` equation, where the sizes that it checks begin in `sizes`.
        hook_index: per hook equation, in order, its place in PyTorch's list of hooks and backward objects.
        grads: per gradient output, the input index of the leaf.
        number_inputs: whether a Python float was among the captured values.
    """

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    checked: tuple[int, ...]
    hook_index: tuple[int, ...]
    grads: tuple[int, ...]
    number_inputs: bool = False


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A recorded tracer, after the tracers are gone."""

    index: int


class Recorder:
    """Collects `Info` for tracers of one trace."""

    def __init__(self) -> None:
        self._tracers: list[Any] = []
        self._index: dict[int, int] = {}
        self._info: dict[int, Info] = {}
        self.anchor: Any = None  # a tracer of the trace; others belong to inner traces and cannot leave it

    def add(self, value: Any) -> int | None:
        """Remembers a tracer; None for values that are no tracers of this trace."""
        if not isinstance(value, _compat.Tracer) or not _compat.same_trace(value, self.anchor):
            return None
        if isinstance(value, jax.Ref):
            return None  # no function may return one
        index = self._index.get(id(value))
        if index is None:
            index = self._index[id(value)] = len(self._tracers)
            self._tracers.append(value)
        return index

    def note(self, value: Any, info: Info) -> None:
        """Says something of a tracer; what was said first stays."""
        index = self.add(value)
        if index is not None:
            self._info.setdefault(index, info)

    def update(self, value: Any, **fields: Any) -> None:
        """Says something of a tracer, over what was said before; a name, once given, stays."""
        index = self.add(value)
        if index is None:
            return
        before = self._info.get(index, NO_INFO)
        if before.name is None:
            self._info[index] = dataclasses.replace(before, **fields)

    def mark_result(self, value: Any) -> None:
        """Says that a hook computed and returned a tracer."""
        index = self.add(value)
        if index is None:
            return
        info = self._info.get(index, NO_INFO)
        if info is NO_INFO or info.stage == "hook":
            self._info[index] = dataclasses.replace(info, stage="hook_result")

    def take(self) -> list[Any]:
        """The tracers, which are let go of: none may be alive when the trace ends."""
        tracers, self._tracers, self.anchor = self._tracers, [], None
        for index, info in self._info.items():
            if info.operator is not None:
                operands = tuple(self._reference(item) for item in info.operator.operands)
                # A tracer that is left is of an inner trace (`ct > 0` on a JVP's ct): no variable stands for it.
                known = not any(isinstance(item, _compat.Tracer) for item in operands)
                operator = Operator(name=info.operator.name, operands=operands) if known else None
                self._info[index] = dataclasses.replace(info, operator=operator)
        return tracers

    def _reference(self, item: Any) -> Any:
        index = self._index.get(id(item)) if isinstance(item, _compat.Tracer) else None
        return item if index is None else _Reference(index)

    def resolve(self, variables: list[Any]) -> dict[Any, Info]:
        """Info by variable, given the variables of what `take` returned."""

        def operand(item: Any) -> Any:
            return variables[item.index] if isinstance(item, _Reference) else item

        result: dict[Any, Info] = {}
        for index, info in self._info.items():
            variable = variables[index]
            if isinstance(variable, jex_core.Literal):
                continue
            if info.operator is not None:
                operands = tuple(operand(item) for item in info.operator.operands)
                info = dataclasses.replace(info, operator=Operator(name=info.operator.name, operands=operands))
            result.setdefault(variable, info)
        return result


def trace(fn: Callable[..., list[Any]], avals: list[Any], recorder: Recorder) -> tuple[Any, dict[Any, Info]]:
    """Traces a function of flat inputs and outputs.

    Args:
        fn: takes one tracer per aval, returns the list of outputs, and tells `recorder` what it knows.
        avals: the inputs' avals.

    Returns:
        (closed jaxpr, info by variable).
    """
    variables: list[Any] = []

    def run(*flat: Any) -> list[Any]:
        recorder.anchor = flat[0] if flat else None
        outs = list(fn(*flat))
        variables[:] = map(_compat.atom_of, recorder.take())
        return outs

    closed = jax.make_jaxpr(run)(*avals)
    jaxpr, consts = _compat.open_jaxpr(closed)
    plain = jaxpr.replace(debug_info=jaxpr.debug_info._replace(result_paths=None))
    return jex_core.ClosedJaxpr(plain, consts), recorder.resolve(variables)


def parameter_names(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """One name per flat argument, after the parameter that it is given to."""
    names: list[str] = []
    try:
        signature = inspect.signature(fn)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return [f"arg{i}" for i in range(len(jax.tree.leaves((args, kwargs))))]
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            groups = [(key, value[key]) for key in sorted(value)]
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            groups = [(f"{name}_{i}", item) for i, item in enumerate(value)]
        else:
            groups = [(name, value)]
        for group, item in groups:
            count = len(jax.tree.leaves(item))
            names += [group] if count == 1 else [f"{group}_{i}" for i in range(count)]
    return names


def make_fx(fn: Callable[..., Any]) -> Callable[..., GraphModule]:
    """Captures a JAX function: `jhop.make_fx(fn)(*args)` is its graph, each hook one opaque call.

    Args:
        fn: any function of arrays and pytrees that JAX can trace.

    Returns:
        A function of the same arguments that returns a callable `GraphModule`. No hook has run.

    Raises:
        HookError: `fn` is not callable.

    Example:
        >>> import jax.numpy as jnp, jhop
        >>> def scale(grad):
        ...     return jhop.trace_wrapped(grad, fn=lambda ct: 3.0 * ct)
        >>> gm = jhop.make_fx(scale)(jnp.ones(2))
        >>> [node.name for node in gm.graph.nodes]
        ['grad_1', 'trace_wrapped', 'output']

    The counterpart in PyTorch is `torch.fx.experimental.proxy_tensor.make_fx`.
    """
    if not callable(fn):
        raise JhopError(f"jhop.make_fx: expected a function, got {type(fn).__name__}.")

    def captured(*args: Any, **kwargs: Any) -> GraphModule:
        flat, in_tree = jax.tree.flatten((args, kwargs))
        out_tree: Any = None

        def run(*values: Any) -> list[Any]:
            nonlocal out_tree
            args, kwargs = jax.tree.unflatten(in_tree, values)
            outs, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            return outs

        closed, info = trace(run, flat, Recorder())
        names = parameter_names(fn, args, kwargs)
        inputs = tuple(Input(name=f"{name}_1") for name in names)
        jaxpr, _ = _compat.open_jaxpr(closed)
        for variable, given in zip(jaxpr.invars, inputs, strict=True):
            info.setdefault(variable, dataclasses.replace(NO_INFO, name=given.name))
        name = hook_name(fn).split(".")[-1]
        return GraphModule(
            jaxpr=closed, inputs=inputs, info=info, name=name, made_by="make_fx", in_tree=in_tree, out_tree=out_tree
        )

    return captured
