"""Writing back what hooks left in Python objects: all of it, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jhop import _state
from jhop._container import MISSING
from jhop._template import NUMBER_TYPES, rebuild


def write_back(writes: Sequence[_state.Write]) -> Callable[[list[Any]], None]:
    """A function of a graph's outputs that writes them where templates say.

    Args:
        writes: slots, with templates as values.
    """
    return _quick(writes) or (lambda outs: _commit(writes, outs))


def _commit(writes: Sequence[_state.Write], outs: list[Any]) -> None:
    made: dict[int, Any] = {}
    _state.commit(
        [
            write if write.value is MISSING else write._replace(value=rebuild(write.value, outs, made))
            for write in writes
        ]
    )


def _quick(writes: Sequence[_state.Write]) -> Callable[[list[Any]], None] | None:
    """Generated code for numbers and arrays in places that cannot refuse them; None where there are others."""
    names: dict[str, Any] = {"numbers": NUMBER_TYPES}
    values, tables, puts = [], [], []
    for i, (container, key, template) in enumerate(writes):
        if template is MISSING or template[0] not in ("number", "array") or container.weak:
            return None
        values.append(f"    v{i} = outs[{template[1]}]")
        if template[0] == "number":
            names[f"k{i}"] = template[2]
            values.append(f"    if type(v{i}) not in numbers: v{i} = k{i}(v{i})")
        names[f"o{i}"] = container.obj
        if container.kind == "cell":
            puts.append(f"    o{i}.cell_contents = v{i}")
        elif container.kind == "attrs" and type(key) is str:
            tables.append(f"    t{i} = o{i}.__dict__")
            puts.append(f"    t{i}[{key!r}] = v{i}")
        elif container.kind == "dict" and type(container.obj) is dict and type(key) in (str, int):
            puts.append(f"    o{i}[{key!r}] = v{i}")
        else:
            return None
    source = "\n".join(["def write(outs):", *values, *tables, *puts, "    return None"])
    exec(source, names)
    return names["write"]
