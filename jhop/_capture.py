"""Capture: a function, and what is known of its values, becomes a `GraphModule` whose hooks are opaque.

Tracing is `jax.make_jaxpr`; hooks are `trace_wrapped` equations in it whose functions have not run. A `Recorder`
collects what the jaxpr itself cannot say: the user's names, source positions and operators of single values. It does
so through public JAX alone: at the end of the trace one equation takes every recorded tracer, which tells the variable
that stands for it, and that equation is cut off again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat
from jhop._errors import JhopError
from jhop._graph import NO_INFO, GraphModule, Info, Input, Operator
from jhop._source import Frame, hook_name, origin_of

_noted_p = jex_core.Primitive("noted")  # its equation tells the variables of tracers


@_noted_p.def_abstract_eval
def _noted_abstract_eval(*_avals: Any) -> Any:
    return jax.core.ShapedArray((), np.dtype(bool))


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


class _Reference(NamedTuple):
    """A recorded tracer, after the tracers are gone."""

    place: int


_reference = functools.partial(tuple.__new__, _Reference)  # as `_Reference`, with no Python code of its own
Known = Callable[[], dict[Any, Info]]
_BY_HOOK = Info(stage="hook")


class Recorder:
    """Collects `Info` for tracers of one trace."""

    def __init__(self) -> None:
        self._tracers: list[Any] = []
        self._index: dict[int, int] = {}
        self._info: dict[int, Info] = {}
        self._operators: dict[int, tuple[str, list[Any], Frame]] = {}
        self.anchor: Any = None  # a tracer of the trace; others belong to inner traces and cannot leave it

    def add(self, value: Any) -> int | None:
        """Remembers a tracer; None for values that are no tracers of this trace."""
        index = self._index.get(id(value))  # no other object's id: the tracer is kept
        if index is not None:
            return index
        if not _compat.same_trace(value, self.anchor) or not isinstance(value, _compat.Tracer):
            return None
        # No equation but its own may take a reference; to ask for that class is slow.
        if type(value.aval) is not jax.core.ShapedArray and isinstance(value, jax.Ref):
            return None
        index = self._index[id(value)] = len(self._tracers)
        self._tracers.append(value)
        return index

    def note(self, value: Any, info: Info) -> None:
        """Says something of a tracer; what was said first stays."""
        index = self.add(value)
        if index is not None:
            self._info.setdefault(index, info)

    def note_operator(self, value: Any, name: str, operands: Sequence[Any], place: Frame) -> None:
        """Says which operator of a hook's made a tracer; as for `note`, what was said first stays.

        Args:
            name: as in `Operator`.
            operands: tracers and Python values.
            place: the instruction.
        """
        references: list[Any] = []
        for operand in operands:
            index = self._index.get(id(operand))
            if index is None and type(operand) in _NUMBERS:
                references.append(operand)
                continue
            if index is None and isinstance(operand, _compat.Tracer):
                index = self.add(operand)
            # For one of an inner trace (`ct > 0` on a JVP's ct), no variable stands. What holds others (the index of
            # `ct[0, ct.argmax()]`, the dict that `copy.deepcopy` hands on) would keep them alive.
            if index is None and _holds_tracer(operand):
                references = []
                break
            references.append(operand if index is None else _reference((index,)))
        index = self.add(value)
        if index is not None and index not in self._info:
            self._info[index] = _BY_HOOK
            self._operators[index] = name, references, place

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
        return tracers

    def resolve(self, variables: Sequence[Any]) -> dict[Any, Info]:
        """Info by variable, given the variables of what `take` returned."""
        result: dict[Any, Info] = {}
        for index, info in self._info.items():
            variable = variables[index]
            if isinstance(variable, jex_core.Literal):
                continue
            if (applied := self._operators.get(index)) is not None:
                name, operands, place = applied
                read = tuple([variables[item.place] if type(item) is _Reference else item for item in operands])
                operator = Operator(name=name, operands=read) if operands else None
                info = Info(name=info.name, origin=origin_of(*place), operator=operator, aot=info.aot, stage=info.stage)
            result.setdefault(variable, info)
        return result


_NUMBERS = (int, float, bool)


def _holds_tracer(operand: Any) -> bool:
    """Whether an operand is, or may be, a container with tracers in it."""
    if isinstance(operand, (tuple, list)):
        return any(map(_holds_tracer, operand))
    if isinstance(operand, slice):
        return any(map(_holds_tracer, (operand.start, operand.stop, operand.step)))
    return isinstance(operand, (_compat.Tracer, dict))


def trace(fn: Callable[..., list[Any]], avals: list[Any], recorder: Recorder) -> tuple[Any, Known]:
    """Traces a function of flat inputs and outputs.

    Args:
        fn: takes one tracer per aval, returns the list of outputs, and tells `recorder` what it knows.
        avals: the inputs' avals.

    Returns:
        (closed jaxpr, a function that gives the info by variable: a graph that runs need not know it).
    """
    n_outs = 0

    def run(*flat: Any) -> list[Any]:
        nonlocal n_outs
        recorder.anchor = flat[0] if flat else None
        outs = list(fn(*flat))
        n_outs = len(outs)
        tracers = recorder.take()
        return [*outs, _noted_p.bind(*tracers)] if tracers else outs

    closed = jax.make_jaxpr(run)(*avals)
    jaxpr, consts = _compat.open_jaxpr(closed)
    if len(jaxpr.outvars) == n_outs:
        return closed, dict
    *eqns, noted = jaxpr.eqns
    debug_info = jaxpr.debug_info._replace(result_paths=None)
    trimmed = jaxpr.replace(eqns=eqns, outvars=jaxpr.outvars[:n_outs], debug_info=debug_info)
    return jex_core.ClosedJaxpr(trimmed, consts), lambda: recorder.resolve(noted.invars)


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

        closed, known = trace(run, flat, Recorder())
        names = parameter_names(fn, args, kwargs)
        inputs = tuple(Input(name=f"{name}_1") for name in names)
        info, (jaxpr, _) = known(), _compat.open_jaxpr(closed)
        for variable, given in zip(jaxpr.invars, inputs, strict=True):
            info.setdefault(variable, dataclasses.replace(NO_INFO, name=given.name))
        name = hook_name(fn).split(".")[-1]
        return GraphModule(
            jaxpr=closed, inputs=inputs, info=info, name=name, made_by="make_fx", in_tree=in_tree, out_tree=out_tree
        )

    return captured
