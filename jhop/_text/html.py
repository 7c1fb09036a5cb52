"""A graph as a piece of HTML that shows what its text shows, for notebooks.

It needs nothing from outside and no script. Colours are translucent, so that they do on light pages and on dark ones.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from html import escape

from jhop._graph import GraphModule
from jhop._source import Origin
from jhop._text._jax_rows import Row, origin_text, place_of
from jhop._text.jax_text import Program, Value, program_of

_SHOWN = 200  # rows before the fold

_STYLE = """
.jhop-gm { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; max-width: 100%;
  text-align: left; }
.jhop-gm .jhop-head { font-weight: bold; padding: 2px 6px; }
.jhop-gm .jhop-part { opacity: .75; padding: 4px 6px 0; font-style: italic; }
.jhop-gm .jhop-row { display: grid; grid-template-columns: 11em 9em minmax(22em, 1fr) 14em; gap: 0 1em; padding: 0 6px;
  border-left: 4px solid transparent; white-space: pre; }
.jhop-gm .jhop-row:hover { outline: 1px solid rgba(128, 128, 128, .5); }
.jhop-gm .jhop-type, .jhop-gm .jhop-place { opacity: .7; }
.jhop-gm .jhop-name, .jhop-gm .jhop-place { overflow: hidden; text-overflow: ellipsis; }
.jhop-gm a { color: inherit; }
.jhop-gm .jhop-input { border-left-color: #3b82f6; background: rgba(59, 130, 246, .10); }
.jhop-gm .jhop-step { border-left-color: #8b949e; background: rgba(139, 148, 158, .06); }
.jhop-gm .jhop-hook { border-left-color: #f59e0b; background: rgba(245, 158, 11, .16); }
.jhop-gm .jhop-key { display: inline-block; padding: 0 6px; margin-right: 1em; border-left-width: 4px;
  border-left-style: solid; }
.jhop-gm summary { cursor: pointer; white-space: pre; padding: 0 6px; }
""".strip()


def html(gm: GraphModule) -> str:
    """The graph as HTML: inputs, state, one row per statement, and outputs, each with its place in the source.

    Nested functions fold, and so does all that is beyond the first 200 rows.
    """
    program = program_of(gm)
    made_by = f" <span class='jhop-type'>made by {escape(gm.made_by)}</span>"
    parts = [
        f"<div class='jhop-gm'><style>{_STYLE}</style>",
        f"<div class='jhop-head'>{escape(program.name)}{made_by}</div>",
        "<div class='jhop-part'><span class='jhop-key jhop-input'>inputs and residuals</span>"
        "<span class='jhop-key jhop-step'>steps</span><span class='jhop-key jhop-hook'>hooks</span></div>",
        *_values("inputs", [value for value in program.inputs if not value.is_state]),
        *_values("state inputs", [value for value in program.inputs if value.is_state]),
        *_values("given by keyword", list(program.objects)),
        "<div class='jhop-part'>body</div>",
        *_body(program),
        *_values("outputs", [value for value in program.outputs if not value.is_state], "step"),
        *_values("state outputs", [value for value in program.outputs if value.is_state], "step"),
        "</div>",
    ]
    return "\n".join(parts)


def _cells(kind: str, name: str, type_: str, code: str, place: str = "") -> str:
    cells = (("name", escape(name)), ("type", escape(type_)), ("code", escape(code)), ("place", place))
    inner = "".join(f"<span class='jhop-{key}'>{text}</span>" for key, text in cells)
    return f"<div class='jhop-row jhop-{kind}'>{inner}</div>"


def _values(title: str, values: list[Value], kind: str = "input") -> list[str]:
    if not values:
        return []
    rows = [_cells(kind, value.name, value.type, value.what) for value in values]
    return [f"<div class='jhop-part'>{escape(title)}</div>", *_folded(rows)]


def _folded(rows: Sequence[str]) -> list[str]:
    """Rows, those beyond the first 200 folded."""
    if len(rows) <= _SHOWN:
        return list(rows)
    rest = rows[_SHOWN:]
    return [*rows[:_SHOWN], f"<details><summary>... {len(rest)} more</summary>", *rest, "</details>"]


def _body(program: Program) -> list[str]:
    return _folded(_blocks(program.rows))


def _blocks(rows: Sequence[Row]) -> list[str]:
    """One piece of HTML per row; a nested function, with its rows, is one piece."""
    made: list[str] = []
    place, index = None, 0
    while index < len(rows):
        row = rows[index]
        index += 1
        shown = row.origin is not None and place_of(row.origin) != place
        if row.origin is not None:
            place = place_of(row.origin)
        if row.kind != "def":
            made.append(_row(row, shown))
            continue
        end = index
        while end < len(rows) and rows[end].depth > row.depth:
            end += 1
        inner = "\n".join(_folded(_blocks(rows[index:end])))
        code = "    " * (row.depth - 1) + row.code
        head = f"<summary class='jhop-step'>{escape(code)} ... {end - index} lines</summary>"
        made.append(f"<details>{head}\n{inner}</details>")
        index = end
    return made


def _row(row: Row, shown: bool) -> str:
    kind = "hook" if row.stage == "hook" else "step"
    place = _place(row.origin) if row.origin is not None and shown else ""
    names = row.names if row.kind == "step" else ""
    return _cells(kind, names, row.type, "    " * (row.depth - 1) + row.code, place)


def _place(origin: Origin | str) -> str:
    """`file:line`, linked where the file is on disk, with the code as tooltip."""
    if isinstance(origin, str):
        return escape(origin)
    text = escape(f"{os.path.basename(origin.file)}:{origin.line}")
    title = escape(origin_text(origin))
    if not os.path.isabs(origin.file):
        return f"<span title='{title}'>{text}</span>"
    return f"<a href='file://{escape(urllib.parse.quote(origin.file))}#L{origin.line}' title='{title}'>{text}</a>"
