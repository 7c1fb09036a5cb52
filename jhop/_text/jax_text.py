"""A graph as Python source over `jax`, `jnp` and `lax`, that runs and that traces to the same graph.

The text is imports and one function. It takes the flat inputs of the graph, lifted state included, and returns the
tuple of its flat outputs, new state last. What Python source cannot hold comes in as keyword-only parameters, each
described in the signature: hooks that are still opaque, closed-over arrays of more than a few elements, and equations
with no public spelling. `opaque(gm)` gives them by name:

    namespace = {}
    exec(gm.code, namespace)
    outs = namespace[function_name(gm)](*inputs, **opaque(gm))

Marks that are identities (`validate_outputs`, `aot_prologue`), steps of lifted numbers (`scalar`) and custom derivative
rules are written as what they compute, so those equations are not there when the text is traced again.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._graph import GraphModule
from jhop._interp import solve
from jhop._text._jax_rows import Row, Shared, origin_text, place_of
from jhop._text._jax_source import Names, identifier, size_text, tuple_of, type_text
from jhop._text._jax_writer import Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """An input, an output or an object of a program: `what` says what it is, for state where it lives."""

    name: str
    type: str
    what: str = ""
    is_state: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A graph in the form in which it is printed.

    Attributes:
        name: of the function.
        inputs, outputs: in order.
        objects: the keyword-only parameters.
        rows: the body, less `return`.
        imports: statements.
        opaque: the keyword arguments.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    objects: tuple[Value, ...]
    rows: tuple[Row, ...]
    imports: tuple[str, ...]
    opaque: dict[str, Any]


def jax_text(gm: GraphModule) -> str:
    """The graph as Python source; see the module's docstring for how it is run."""
    program = program_of(gm)
    lines = [*program.imports, "", ""]
    lines += _signature(program)
    place = None
    for row in program.rows:
        indent = "    " * row.depth
        if row.origin is not None and place_of(row.origin) != place:
            place = place_of(row.origin)
            lines.append(f"{indent}# {origin_text(row.origin)}")
        lines.append(f"{indent}{row.code}" + (f"  # {row.type}" if row.type else ""))
    return "\n".join([*lines, *_return(program), ""])


def opaque(gm: GraphModule) -> dict[str, Any]:
    """The keyword arguments that the text of `gm` needs: hooks, large closed-over arrays, equations without source."""
    return program_of(gm).opaque


def function_name(gm: GraphModule) -> str:
    """The name of the function in the text of `gm`."""
    return Names().make(identifier(gm.name))


def program_of(gm: GraphModule) -> Program:
    """What text and HTML show of a graph."""
    jaxpr, consts = _compat.open_jaxpr(gm.jaxpr)
    shared = Shared(gm=gm)
    names = Names()
    name = names.make(identifier(gm.name))
    writer = Writer(shared, names)
    # Sizes have their symbols' names, so those come before all others.
    places = {symbol: (index, axis) for symbol, index, axis in reversed(gm.shapes)}
    known = [(symbol, *place) for symbol, place in reversed(places.items()) if writer.names.reserve(symbol)]
    inputs = []
    slots = gm.lifted.slots if gm.lifted is not None else ()
    owners = [_owner(slot) for slot in slots]
    owners = [*[""] * (len(gm.inputs) - len(owners)), *owners]
    for variable, given, owner in zip(jaxpr.invars, gm.inputs, owners, strict=True):
        is_state = given.role == "state"
        wanted = state_name(given.source, owner) if is_state else given.name
        writer.env[variable] = writer.names.make(wanted)
        if given.number is not None:
            shared.numbers.add(variable)
        kind = given.number.__name__ if given.number is not None else type_text(variable.aval)
        inputs.append(Value(name=writer.env[variable], type=kind, what=given.source, is_state=is_state))
    for symbol, index, axis in known:
        dim = jaxpr.invars[index].aval.shape[axis]
        shared.scope[symbol] = solve(dim, dim)
        size = size_text(dim, f"{inputs[index].name}.shape[{axis}]")
        writer.add("step", f"{symbol} = {size}", names=symbol, type="int")
    outs = writer.run(jaxpr, consts)
    what = _state_outputs(gm)
    outputs = tuple(
        Value(
            name=text, what=what.get(i, ""), is_state=i in what,
            type=_number_type(atom) if _is_number(atom, shared) else type_text(atom.aval),
        )
        for i, (text, atom) in enumerate(zip(outs, jaxpr.outvars, strict=True))
    )  # fmt: skip
    return Program(
        name=name,
        inputs=tuple(inputs),
        outputs=outputs,
        objects=tuple(Value(name=key, type="", what=text) for key, (_, text) in shared.opaque.items()),
        rows=tuple(writer.rows),
        imports=_imports(writer, outs),
        opaque={key: value for key, (value, _) in shared.opaque.items()},
    )


def _is_number(atom: Any, shared: Shared) -> bool:
    return not isinstance(atom, jex_core.Literal) and atom in shared.numbers


def _number_type(atom: Any) -> str:
    return {"f": "float", "b": "bool"}.get(atom.aval.dtype.kind, "int")


def _owner(slot: Any) -> str:
    """The class of the object that has a lifted attribute."""
    container = slot.container
    return type(container.obj).__name__ if container.kind in ("attrs", "slots") else ""


def state_name(path: str, owner: str = "") -> str:
    """A name after an access path: `L['hooks'][1].keywords['fn'].keywords['obj'].counter` gives `obj_counter`.

    Where the path names only the attribute, as through a closure, the class of its `owner` comes first.
    """
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]|([A-Za-z_]\w*)", path)
    words: list[str] = []
    for key, number, attribute in parts:
        word = key or attribute
        if word in ("L", "G", "hooks", "keywords", "args", "__closure__", "cell_contents", "__self__", "func", "fn"):
            words.clear()
        elif word == "__defaults__":
            words[:] = ["default"]
        elif number and words:
            words[-1] += f"_{number}"  # the place in a container that has a name
        elif word:
            words.append(word)
    if owner and len(words) == 1:
        words.insert(0, owner)
    return identifier("_".join(words[-2:]).lower()) if words else "state"


def _state_outputs(gm: GraphModule) -> dict[int, str]:
    """Where each output that is new state is written to."""
    found: dict[int, str] = {}

    def visit(spec: Any, path: str) -> None:
        kind, content = spec[0], spec[1]
        if kind in ("number", "array"):
            found.setdefault(content, path)
        elif kind in ("dict", "object"):
            for key, item in content:
                visit(item, f"{path}[{key!r}]" if kind == "dict" else f"{path}.{key}")
        elif kind != "const":
            for index, item in enumerate(content):
                visit(item, f"{path}[{index}]")

    for write in gm.lifted.writes if gm.lifted is not None else ():
        path = write.container.path if write.key is None else write.container.path_of(write.key)
        if isinstance(write.value, tuple):  # and not a slot that was deleted
            visit(write.value, path)
    n_outs = gm.lifted.n_outs if gm.lifted is not None else 0
    return {index: path for index, path in found.items() if index >= n_outs}


def _imports(writer: Writer, outs: list[str]) -> tuple[str, ...]:
    """Import statements for what the body reads."""
    body = "\n".join([*(row.code for row in writer.rows), *outs])
    wanted = [
        ("functools.", "import functools"), ("jax.", "import jax"), ("jnp.", "import jax.numpy as jnp"),
        ("np.", "import numpy as np"), ("lax.", "from jax import lax"),
    ]  # fmt: skip
    used = {line for prefix, line in wanted if re.search(rf"(?<![\w.]){re.escape(prefix)}", body)}
    used |= {"import jax", "import jax.numpy as jnp", "from jax import lax"} | writer.shared.imports
    return tuple(sorted(used, key=lambda line: (line.startswith("from"), line)))


def _signature(program: Program) -> list[str]:
    lines = [f"def {program.name}("] if program.inputs or program.objects else [f"def {program.name}():"]
    for value in program.inputs:
        state = f": {value.what}" if value.is_state else ""
        lines.append(f"    {value.name},  # {value.type}{state}")
    if program.objects:
        lines.append("    *,")
        lines += [f"    {value.name},  # {value.what}" for value in program.objects]
    return [*lines, "):"] if len(lines) > 1 else lines


def _return(program: Program) -> list[str]:
    if not any(value.is_state for value in program.outputs):
        return [f"    return {tuple_of([value.name for value in program.outputs])}"]
    lines = []
    for value in program.outputs:
        state = f": {value.what}" if value.is_state else ""
        lines.append(f"        {value.name},  # {value.type}{state}")
    return ["    return (", *lines, "    )"]
