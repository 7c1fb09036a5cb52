"""Writing back what hooks left in Python objects: all of it, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jhop import _state
from jhop._container import MISSING, Container, builtin_kind
from jhop._errors import Unsupported
from jhop._leaves import is_array
from jhop._slotcode import SlotCode
from jhop._template import NUMBER_TYPES, map_outputs, parts_of, rebuild, with_parts


class _StayNumpy:
    """Makes templates of others."""

    def __init__(self, held: dict[tuple[int, str], dict[Any, Any]], shared: frozenset[int]):
        self._held = held
        self._shared = shared  # ids of the templates of tuples in two places, in which no NumPy array could be read
        self._done: dict[int, Any] = {}  # by id of a template: one object that is stored twice stays one

    def like(self, spec: Any, before: Any, where: str) -> Any:
        """A template with NumPy arrays where there are some in what was there before."""
        kind = spec[0]
        if kind == "array" and type(before) is np.ndarray and is_array(before):
            return _stay_numpy(spec, before, where)
        if id(spec) in self._shared:
            return spec
        if id(spec) not in self._done:
            path = Container(before, "attrs" if kind == "object" else "list", where).path_of
            old = self._items(before)
            self._done[id(spec)] = with_parts(
                spec, [self.like(part, old.get(key), path(key)) for key, part in parts_of(spec)]
            )
        return self._done[id(spec)]

    def _items(self, before: Any) -> dict[Any, Any]:
        if isinstance(before, tuple):
            return dict(enumerate(tuple.__iter__(before)))
        kind = builtin_kind(before)
        found = [self._held.get((id(before), each), {}) for each in ([kind] if kind else ["attrs", "slots"])]
        return {key: value for items in found for key, value in items.items()}


def stay_numpy(writes: Sequence[_state.Write], held: dict[tuple[int, str], dict[Any, Any]]) -> list[_state.Write]:
    """NumPy arrays that hooks replaced by what they computed from them stay NumPy arrays, in what was replaced too.

    Args:
        writes: slots, with templates as values.
        held: what containers held before hooks ran, by id and kind.
    """
    values = [write.value for write in writes if write.value is not MISSING]
    met: Counter[int] = Counter()
    for spec in values:  # which grows
        met[id(spec)] += 1
        values += [part for _, part in parts_of(spec)] if met[id(spec)] == 1 else ()
    tuples = {id(spec) for spec in values if spec[0] in ("tuple", "namedtuple")}
    stay = _StayNumpy(held, frozenset(key for key in tuples if met[key] > 1))
    made = []
    for write in writes:
        before = held.get((id(write.container.obj), write.container.kind), {}).get(write.key)
        same = write.value is MISSING
        made.append(write if same else write._replace(value=stay.like(write.value, before, write.where())))
    return made


def _stay_numpy(spec: Any, before: np.ndarray, where: str) -> Any:
    if jax.dtypes.canonicalize_dtype(before.dtype) != before.dtype:
        raise Unsupported(
            f"a hook writes `{where}`, a NumPy array of dtype {before.dtype}, which JAX would narrow to "
            f"{jax.dtypes.canonicalize_dtype(before.dtype)}. Use that dtype, or turn x64 on (JAX_ENABLE_X64=1)."
        )
    return ("numpy", spec[1])


def after_results(writes: list[_state.Write], n_outs: int) -> list[_state.Write]:
    """Templates count state outputs from 0; the graph's outputs begin with its results."""
    done: dict[int, Any] = {}
    return [
        write if write.value is MISSING else write._replace(value=map_outputs(write.value, lambda i: i + n_outs, done))
        for write in writes
    ]


def write_back(writes: Sequence[_state.Write], n_outs: int) -> Callable[[Sequence[Any]], None]:
    """A function of a graph's outputs after the results that writes them where templates say.

    Args:
        writes: slots, with templates as values.
        n_outs: how many results there are.
    """
    return _quick(writes, n_outs) or (lambda outs: _commit(writes, [*[None] * n_outs, *outs]))


def _commit(writes: Sequence[_state.Write], outs: list[Any]) -> None:
    made: dict[int, Any] = {}
    _state.commit(
        [
            write._replace(
                container=write.container.as_of_now(),
                value=MISSING if write.value is MISSING else rebuild(write.value, outs, made),
            )
            for write in writes
        ]
    )


def _quick(writes: Sequence[_state.Write], n_outs: int) -> Callable[[Sequence[Any]], None] | None:
    """Generated code for numbers and arrays in places that cannot refuse them; None where there are others."""
    code = SlotCode(numbers=NUMBER_TYPES)
    values, puts = [], []
    places: list[str] = []  # what is found first: what is written may stand where it is looked for
    tables: dict[str, str] = {}
    for i, (container, key, template) in enumerate(writes):
        if template is MISSING or template[0] not in ("number", "array") or container.weak:
            return None
        values.append(f"v{i} = outs[{template[1] - n_outs}]")
        if template[0] == "number":
            number = code.name(template[2])
            values.append(f"if type(v{i}) is not {number} and type(v{i}) not in numbers: v{i} = {number}(v{i})")
        holder = code.holder(container)
        if container.place is not None:
            places.append(holder)
        if container.kind == "cell":
            puts.append(f"{holder}.cell_contents = v{i}")
        elif container.kind == "attrs" and type(key) is str:
            table = tables.setdefault(holder, f"t{len(tables)}")
            puts.append(f"{table}[{key!r}] = v{i}")
        elif container.kind == "dict" and container.cls is dict and type(key) in (str, int):
            puts.append(f"{holder}[{key!r}] = v{i}")
        else:
            return None
    looked_up = [f"{table} = {holder}.__dict__" for holder, table in tables.items()]
    return code.function("write(outs)", [*values, *places, *looked_up, *puts, "return None"])
