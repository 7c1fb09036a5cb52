"""Why a backward pass has to be captured: what differs between its tape and one that was captured before, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jhop import _compat
from jhop._compiled import CompiledNode
from jhop._history import OTHER_SETTINGS
from jhop._node import AccumulateGrad, Node, OpNode
from jhop._source import describe_hook
from jhop._standins import replaceable
from jhop._tape import Sight

_NONE = "not there"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a tape is like. It keeps nothing of it alive.

    Attributes:
        compiler: what tells the function that it was captured for from others.
        nodes: per node, its name.
        edges: per node, the nodes that its cotangents flow to, as numbers.
        what: per node, the id of what it computes.
        types: per input, its type in words.
        hooks: per hook, (what tells it from others, in words).
        grads: per leaf, whether it had a gradient.
        request: what the pass was asked for, in words.
        context: JAX's settings.
    """

    compiler: Any
    nodes: tuple[str, ...]
    edges: tuple[Any, ...]
    what: tuple[int, ...]
    types: tuple[str, ...]
    hooks: tuple[tuple[Any, str], ...]
    grads: tuple[bool, ...]
    request: tuple[str, ...]
    context: Any

    @staticmethod
    def of(tape: Sight, compiler_fn: Any) -> Summary:
        order, number = tape.nodes, tape.number
        return Summary(
            compiler=_identity(compiler_fn),
            nodes=tuple(node.name() for node in order),
            edges=tuple(tuple((number.get(edge.node), edge.slot) for edge in node.edges) for node in order),
            what=tuple(map(_what, order)),
            types=tuple(_type(value) for value in tape.inputs),
            hooks=tuple((_told_by(fn), describe_hook(fn)) for fn in tape.named),
            grads=tuple(node.leaf._grad is not None for node in order if isinstance(node, AccumulateGrad)),
            request=_request(tape),
            context=_compat.trace_context(),
        )

    def differences(self, before: Summary) -> list[str]:
        """What differs from another tape, in words; most of it follows from what comes first."""
        if self.nodes != before.nodes:
            return [_nodes(before.nodes, self.nodes)]
        found = []
        if self.edges != before.edges:
            found.append("the nodes lead to one another in another way")
        if (at := _first(before.what, self.what)) is not None:
            found.append(
                f"node {at} ({self.nodes[at]}) is that of another function, or has other static arguments"
            )
        if (at := _first(before.types, self.types)) is not None:
            found.append(f"input {at} was {_item(before.types, at) or _NONE} and is {_item(self.types, at) or _NONE}")
        if (at := _first(before.hooks, self.hooks)) is not None:
            old, new = (words[1] if words else "no hook" for words in (_item(before.hooks, at), _item(self.hooks, at)))
            found.append(f"{old} was there and now {new} is" if old != new else f"{new} is another object")
        if (at := _first(before.grads, self.grads)) is not None:
            old, new = ("an array" if grads[at] else "None" for grads in (before.grads, self.grads))
            found.append(f".grad of leaf {at} was {old} and is {new}")
        if self.request != before.request:
            pairs = zip(before.request, self.request, strict=True)
            found += [f"{new}, and before: {old}" for old, new in pairs if old != new]
        if self.context != before.context:
            found.append(OTHER_SETTINGS)
        if self.compiler != before.compiler:
            found.append("compiler_fn is another function object: give enable() the same one each time")
        return found or ["an object that the pass depends on is another one, or gone"]


def reason(now: Summary, before: Sequence[Summary]) -> str:
    """What differs from the captured tape that is most like this one."""
    found: list[list[str]] = [now.differences(other) for other in reversed(before)]
    nearest = min(found, key=_distance)
    return "; ".join(nearest)


def _distance(found: list[str]) -> tuple[bool, int]:
    return found[0].startswith("the tape"), len(found)


def _nodes(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    at = _first(before, now) or 0
    counts = f"the tape has {len(now)} nodes" + (f", and had {len(before)}" if len(now) != len(before) else "")
    return f"{counts}: node {at} was {_item(before, at) or _NONE} and is {_item(now, at) or _NONE}"


def _first(before: Sequence[Any], now: Sequence[Any]) -> int | None:
    """The first place where two sequences differ."""
    pairs = zip(before, now, strict=False)
    at = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(before), len(now)))
    return None if at == len(before) == len(now) else at


def _item(items: Sequence[Any], at: int) -> Any:
    return items[at] if at < len(items) else None


def _what(node: Node) -> int:
    if isinstance(node, CompiledNode):
        return id(node.compiled)
    return id(node.op) if isinstance(node, OpNode) else 0


def _told_by(hook: Any) -> Any:
    if replaceable(hook):
        return id(hook.__code__)
    return _identity(hook)


def _identity(fn: Any) -> Any:
    return id(getattr(fn, "__self__", None)), id(getattr(fn, "__func__", fn))


def _type(value: Any) -> str:
    return f"{value.dtype}[{','.join(map(str, value.shape))}]" if hasattr(value, "dtype") else type(value).__name__


def _request(tape: Sight) -> tuple[str, ...]:
    plan, number = tape.plan, tape.number
    names = [node.name() for node in tape.nodes]
    starts = ", ".join(f"{names[number[edge.node]]}[{edge.slot}]" for edge, _ in tape.seeds if edge.node in number)
    inputs = "all leaves" if plan.wanted is None else f"{len(tape.wanted)} inputs ({len(names)} nodes lead there)"
    retained = sum(len(node.retained()) for node in tape.nodes)
    return f"it starts at {starts}", f"gradients of {inputs} are asked for", f"{retained} Tensors retain gradients"
