"""`jhop.explain`: what was lifted, what is guarded, how many graphs there are and why each was traced, in words.

A report is made of what the caches hold at that moment. It is text all through, and keeps no hook or graph alive.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import textwrap
import types
from typing import Any

from jhop import _compat, _state
from jhop._container import MISSING
from jhop._errors import JhopError
from jhop._guards import Guard, Guards
from jhop._history import History, Trace, arguments_of
from jhop._inline import hook_roots
from jhop._interp import inner_jaxprs
from jhop._source import hook_location, hook_name
from jhop._wording import type_in_words

MAX_LINES = 24  # in one part of the text; the fields have all


@dataclasses.dataclass(frozen=True)
class Hook:
    """A hook of a graph. `path` is what the paths of its state begin with; file and line are those of its code."""

    path: str
    name: str
    file: str | None
    line: int | None

    def __str__(self) -> str:
        place = f" ({os.path.basename(self.file)}:{self.line})" if self.file else ""
        return f"{self.path} is `{self.name}`{place}"


@dataclasses.dataclass(frozen=True)
class State:
    """A piece of Python state that became an input or output of a graph.

    Attributes:
        path: Python source that reaches it from the hooks.
        type: what is there now: int, float, float32[3], numpy float32[3], list, ... or "nothing".
        read, written: whether the graph takes its value as an input, and whether hooks change it.
    """

    path: str
    type: str
    read: bool
    written: bool

    def __str__(self) -> str:
        use = "read and written" if self.read and self.written else "written" if self.written else "read"
        return f"{self.path}: {self.type}, {use}"


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph: of one kind of arguments, and one state of what it depends on.

    Attributes:
        trace: when and why it was traced.
        arguments: name and type of each argument, static ones last.
        hooks: in the order in which they run.
        state: what was lifted.
        guards: what it takes for granted of what its hooks read.
        function_guards: the same of what the function read while it was traced.
        equations: how many the graph has, those of inner functions, loops and branches counted once.
        on_host: why it runs on the host, operation by operation; None where it is compiled.
        broken: why the next call cannot use it; None where it can.
    """

    trace: Trace
    arguments: tuple[str, ...]
    hooks: tuple[Hook, ...]
    state: tuple[State, ...]
    guards: tuple[Guard, ...]
    function_guards: tuple[Guard, ...]
    equations: int
    on_host: str | None
    broken: str | None

    def __str__(self) -> str:
        return self.text(None)

    def text(self, before: GraphReport | None) -> str:
        """As text, less what is the same as for the graph before."""
        where = "compiled" if self.on_host is None else "run on the host, one operation at a time"
        lines = [
            f"Graph {self.trace.number}: `{self.trace.graph}` for {', '.join(self.arguments) or 'no arguments'}",
            f"  {_count(self.equations, 'equation')}, {where}",
            f"  traced because: {self.trace.reason}",
        ]
        same = {} if before is None else before._parts()
        for head, part in self._parts().items():
            if same.get(head) == part and len(part) > 1:
                assert before is not None
                lines.append(f"  {head}: as for graph {before.trace.number}")
            elif part:
                lines.append(f"  {head}:")
                lines += [f"    {line}" for item in _shortened(part) for line in _wrapped(item)]
        return "\n".join(lines)

    def _parts(self) -> dict[str, list[str]]:
        shown = {state.path for state in self.state}
        return {
            "on the host because": (self.on_host or "").splitlines(),
            "of no use to the next call, because": [] if self.broken is None else [self.broken],
            "hooks": [str(hook) for hook in self.hooks],
            "lifted Python state": [str(state) for state in self.state],
            "guarded for the hooks": _guard_lines(self.guards, shown),
            "guarded for the function itself": _guard_lines(self.function_guards, shown),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jhop.explain` returns. It prints as text.

    Attributes:
        made_by: the public function that compiled it.
        name: of the function or graph.
        graphs: those that there are now, in the order in which they were traced.
        traces: all traces in order, also of graphs that gave way since; the last hundred are kept.
        forgotten: how many older traces are not in `traces`.
        note: why there are no graphs, or "".
    """

    made_by: str
    name: str
    graphs: tuple[GraphReport, ...]
    traces: tuple[Trace, ...]
    forgotten: int
    note: str

    @classmethod
    def of(cls, made_by: str, name: str, graphs: list[GraphReport], history: History, note: str = "") -> Report:
        """A report of these graphs."""
        traces = history.traces()
        return cls(
            made_by=made_by,
            name=name,
            graphs=tuple(sorted(graphs, key=lambda graph: graph.trace.number)),
            traces=traces,
            forgotten=history.count - len(traces),
            note="" if graphs else note or history.nothing(),
        )

    def __str__(self) -> str:
        count, traced = len(self.graphs), self.forgotten + len(self.traces)
        head = f"`{self.name}`, by {self.made_by}: {_count(count, 'graph')}, {_count(traced, 'trace')}"
        parts = [head if self.graphs else f"{head}\n{self.note}"]
        parts += [graph.text(before) for graph, before in zip(self.graphs, [None, *self.graphs], strict=False)]
        if traced:
            older = [f"  {_count(self.forgotten, 'older trace')} not kept"] if self.forgotten else []
            parts.append("\n".join(["Traces", *older, *(f"  {trace}" for trace in self.traces)]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Explains:
    """What `jhop.explain` can explain."""

    def explain(self) -> Report:
        """What was lifted, what is guarded, how many graphs there are and why each was traced; see `jhop.explain`."""
        with _state.LOCK:  # another thread may be tracing, with symbols in objects
            return self._report()

    def _report(self) -> Report:
        raise NotImplementedError


def explain(fn: Any) -> Report:
    """Says what jhop knows of a compiled function: nothing is traced or run for it, and nothing changes.

    Args:
        fn: what `jhop.jit` or `jhop.compile` returned, also as a bound method, or a stage of `jhop.jit` ahead of time.

    Returns:
        A report that prints as text. Its `graphs` are those that there are, each with `arguments`, `hooks`, lifted
        `state`, `guards`, `equations`, why it runs `on_host`, and whether it is `broken`; its `traces` say in order
        why each trace was made. All of it is text and numbers.

    Raises:
        JhopError: `fn` is not such a function.

    Example:
        >>> import jax, jhop
        >>> class Counter:
        ...     n = 0
        >>> counter = Counter()
        >>> def count(ct):
        ...     counter.n += 1
        >>> step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, count) ** 2).sum()))
        >>> for size in (2, 2, 3):
        ...     _ = step(jax.numpy.ones(size))
        >>> report = jhop.explain(step)
        >>> [str(state) for state in report.graphs[0].state]
        ["G['Counter'].n: int, read", "G['counter'].n: int, written"]
        >>> [trace.reason for trace in report.traces]
        ['first call', 'other types of arguments: `x` was float32[2] and is float32[3]']
    """
    compiled = fn
    while isinstance(compiled, (types.MethodType, functools.partial)):
        compiled = compiled.__func__ if isinstance(compiled, types.MethodType) else compiled.func
    if isinstance(compiled, Explains):
        return compiled.explain()
    if callable(fn):
        raise JhopError(
            f"jhop.explain: `{hook_name(fn)}` was not compiled by jhop. Wrap it with jhop.jit (or jhop.compile, if it "
            "takes Tensors) first, call that, and explain what you called."
        )
    raise JhopError(
        f"jhop.explain: expected a function that jhop.jit or jhop.compile returned, got {type(fn).__name__}."
    )


def graph_report(entry: Any, hooks: tuple[Hook, ...], guards: Guards | None) -> GraphReport:
    """What there is to say of one graph. Inside `_state.LOCK`.

    Args:
        entry: with `gm`, the graph that runs; `trace`; `static`, static arguments in words; `refused`, why it runs on
            the host.
        hooks: those in it.
        guards: what the function takes for granted that it is the graph of.
    """
    lifted = entry.gm.lifted
    all_guards = [each for each in (guards, lifted and lifted.guards) if each is not None]
    broken = next((each for each in all_guards if not each.hold()), None)
    return GraphReport(
        trace=entry.trace,
        arguments=(*arguments_of(entry.gm), *entry.static),
        hooks=hooks,
        state=_state_of(lifted) if lifted is not None else (),
        guards=lifted.guards.described() if lifted is not None else (),
        function_guards=guards.described() if guards is not None else (),
        equations=_equations(entry.gm.jaxpr, set()),
        on_host=None if entry.refused is None else str(entry.refused),
        broken=None if broken is None else broken.broken() or "what it depends on has changed",
    )


def hooks_of(gm: Any) -> tuple[Hook, ...]:
    """The hooks of a graph in which they are opaque."""
    return tuple(Hook(path, hook_name(fn), *(hook_location(fn) or (None, None))) for path, fn in hook_roots(gm))


def _state_of(lifted: Any) -> tuple[State, ...]:
    found: dict[str, State] = {}
    for slot in lifted.slots:
        now = type_in_words(slot.container.get(slot.key))
        found.setdefault(slot.path, State(slot.path, now, True, False))
    for container, key, _ in lifted.writes:
        path = container.path_of(key)
        value = container.obj if container.whole else container.get(key)
        if path in found:
            found[path] = dataclasses.replace(found[path], written=True)
        else:
            found[path] = State(path, "nothing" if value is MISSING else type_in_words(value), False, True)
    return tuple(found.values())


def _equations(jaxpr: Any, seen: set[int]) -> int:
    opened = _compat.open_jaxpr(jaxpr)[0]
    if id(opened) in seen:
        return 0
    seen.add(id(opened))
    return sum(1 + sum(_equations(inner, seen) for inner in inner_jaxprs(eqn)) for eqn in opened.eqns)


# Text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more"]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 112, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


_LISTED = {"type": "same types", "object": "same objects", "entries": "same entries", "code": "same code"}
_RARE = ("absent", "attribute", "reference", "classes")


def _guard_lines(guards: tuple[Guard, ...], shown: set[str]) -> list[str]:
    """Values and answers one per line; lists of what changes less often; of what hardly ever does, the number.

    Args:
        shown: paths whose types are known already.
    """
    rare = [guard for guard in guards if guard.kind in _RARE or _is_module(guard)]
    rest = [guard for guard in guards if guard not in rare and not (guard.kind == "type" and guard.what in shown)]
    lines = [str(guard) for guard in rest if guard.kind not in _LISTED]
    for kind, head in _LISTED.items():
        listed = [guard for guard in rest if guard.kind == kind]
        found = [f"{guard.what} ({guard.then})" if kind == "type" else guard.what for guard in listed]
        if len(found) > MAX_LINES:
            found = [*found[:MAX_LINES], f"and {len(found) - MAX_LINES} more"]
        if found:
            lines.append(f"{head}: {', '.join(found)}")
    if rare:
        lines.append(f"and {len(rare)} that hardly ever change, such as modules and classes; `guards` has all")
    return lines


def _is_module(guard: Guard) -> bool:
    return guard.kind == "object" and guard.then.startswith("module ")
