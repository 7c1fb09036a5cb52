"""Reports of what was compiled, as `jhop.explain` gives them: text and numbers that keep no hook or graph alive."""

from __future__ import annotations

import dataclasses
import html
import os
import textwrap
from collections.abc import Iterable

from jhop._guards import Guard
from jhop._history import History, Trace

WIDTH = 118  # columns of the text
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
        on_host: why hooks in it run on the host; None where none does.
        cut: whether the rest of it is compiled then, and not run on the host too.
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
    cut: bool
    broken: str | None

    def __str__(self) -> str:
        return self.text(None)

    def text(self, before: GraphReport | None) -> str:
        """As text, less what is the same as for the graph before."""
        how = ", cut at hooks that run on the host" if self.cut else ", run on the host one by one"
        lines = [
            f"Graph {self.trace.number}: {self.trace.what()}",
            f"  {_count(self.equations, 'equation')}{'' if self.on_host is None else how}",
            f"  traced because: {self.trace.reason}",
        ]
        same = {} if before is None else before._parts()
        for head, part in self._parts().items():
            if same.get(head) == part and len(part) > 1:
                assert before is not None
                lines.append(f"  {head}: as for graph {before.trace.number}")
            elif part:
                lines.append(f"  {head}:")
                lines += [f"    {line}" for line in _shortened(part)]
        return _wrapped(lines)

    def _parts(self) -> dict[str, list[str]]:
        shown = {state.path for state in self.state}
        return {
            "on the host because": (self.on_host or "").splitlines(),
            "does not fit now, because": [] if self.broken is None else [self.broken],
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
        parts = [head if self.graphs else _wrapped([head, self.note])]
        parts += [graph.text(before) for graph, before in zip(self.graphs, [None, *self.graphs], strict=False)]
        if traced:
            older = [f"  {_count(self.forgotten, 'older trace')} not kept"] if self.forgotten else []
            parts.append(_wrapped(["Traces", *older, *(f"  {trace}" for trace in self.traces)]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


# Text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[: MAX_LINES - 1], f"... and {len(lines) - MAX_LINES + 1} more"]


def _wrapped(lines: Iterable[str]) -> str:
    """Lines as text, long ones going on in the next, further to the right."""
    made: list[str] = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        made += textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(made)


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
