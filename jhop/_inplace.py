"""NumPy arrays in state that hooks change in place (`self.calls += 1`): after a run it is those arrays that changed.

While a hook is traced, what stands for such an array is immutable, and `+=` on it makes another. That it was `+=` is
read from the hook's bytecode. Then every slot that held the array goes on with the new content, also where the hook
has only a local name for it, and after the run the content goes into the array itself, which others may hold. With a
JAX array on the right (`self.total += ct`), NumPy makes a new array as well: that of JAX takes over.
"""

from __future__ import annotations

import dis
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jhop import _compat
from jhop._container import MISSING
from jhop._errors import Unsupported, last_resort
from jhop._leaves import Leaf
from jhop._state import Lift, Write
from jhop._template import outputs_in, plain
from jhop._watched import OperatorRecord

_BINARY_OP = dis.opmap["BINARY_OP"]
_IN_PLACE = range(13, 26)  # its arguments from NB_INPLACE_ADD to NB_INPLACE_XOR, since Python 3.11


def _is_in_place(record: OperatorRecord) -> bool:
    instruction = record.code.co_code[record.lasti : record.lasti + 2]
    return len(instruction) == 2 and instruction[0] == _BINARY_OP and instruction[1] in _IN_PLACE


class InPlace:
    """What hooks do to the NumPy arrays that are lifted.

    Args:
        leaves: all that is lifted.
        lift: where they are swapped for symbols.
    """

    def __init__(self, leaves: Sequence[Leaf], lift: Lift):
        self._leaves = [leaf for leaf in leaves if type(leaf.value) is np.ndarray]
        self._lift = lift
        self._changed: set[int] = set()  # by place in `_leaves`
        self._replaced: set[int] = set()

    def held(self) -> list[Any]:
        """What the slots hold, before a hook runs; for `note`."""
        return [self._lift.held_now(leaf.container, leaf.key) for leaf in self._leaves]

    def note(self, before: list[Any], records: list[OperatorRecord], *, always: bool) -> None:
        """Notes what a hook did.

        Args:
            before: what the slots held.
            records: the operators that it used.
            always: whether the hook runs in each run of the graph, and in this order.

        Raises:
            Unsupported: what happened to an array cannot be told.
        """
        if not before:
            return
        content = self._contents(before, records)
        for i, (leaf, old, now) in enumerate(zip(self._leaves, before, self.held(), strict=True)):
            if i in content and now is old:
                self._lift.put(leaf.container, leaf.key, content[i])
            elif now is not old and now is not content.get(i):
                if i in content or i in self._changed:
                    raise self._refused(leaf, "and something puts another array in its place")
                self._replaced.add(i)
            if i in content and i in self._replaced and not always:
                raise self._refused(leaf, "and another hook puts a new array in its place")
            if i in content and i not in self._replaced:
                self._changed.add(i)

    def _contents(self, before: list[Any], records: list[OperatorRecord]) -> dict[int, Any]:
        """What the arrays that a hook changed in place have in them then, by place."""
        places: dict[int, list[int]] = {}  # by id of what stands for a NumPy array, that of arrays in state
        for i, value in enumerate(before):
            places.setdefault(id(value), []).append(i)
        content: dict[int, Any] = {}
        for record in records:
            arrays = [each for each in record.operands if isinstance(each, jax.Array)]
            if not all(id(each) in places for each in arrays):
                continue  # it has one of JAX, and so is the result
            same = places[id(record.operands[0])] if _is_in_place(record) else []
            places[id(record.result)] = same
            for i in same:
                self._check(self._leaves[i], record.result)
                self._check_others(self._leaves[i], record)
                content[i] = record.result
        return content

    def _check_others(self, leaf: Leaf, record: OperatorRecord) -> None:
        """Raises where what stood for an array is used after it was changed, or is in other slots too."""
        value = record.operands[0]
        if _compat.reads_after(value, record.result):
            raise self._refused(leaf, "and goes on to use it by another name")
        own = {other.container.slot(other.key) for other in self._leaves}
        for mark in self._lift.mark():
            for key, held in mark.items:
                if held is value and mark.container.slot(key) not in own:
                    raise self._refused(leaf, f"which is also in `{mark.container.path_of(plain(key))}`")

    def _check(self, leaf: Leaf, result: Any) -> None:
        array = leaf.value
        if (result.shape, result.dtype) != (array.shape, array.dtype):
            kind = f"{result.dtype}{list(result.shape)}"
            raise self._refused(leaf, f"which is {array.dtype}{list(array.shape)}, by a value of {kind}")
        for other in self._leaves:
            if other is not leaf and np.may_share_memory(other.value, array):
                raise self._refused(leaf, f"and `{other.path}` shares its memory")

    def _refused(self, leaf: Leaf, why: str) -> Unsupported:
        return Unsupported(
            f"a hook changes the NumPy array `{leaf.path}` in place (`+=` and the like), {why}. Make a new one of it "
            f"(`a = a + x`), keep a jax array there, or {last_resort()}."
        )

    def filled(self, writes: list[Write]) -> list[Write]:
        """Writes that put new content into the arrays which hooks changed in place.

        Raises:
            Unsupported: it was in a place whose array cannot be told.
        """
        made = Counter(index for write in writes if write.value is not MISSING for index in outputs_in(write.value))
        rest = {self._leaves[i].container.slot(self._leaves[i].key): self._leaves[i] for i in self._changed}
        found = []
        for write in writes:
            slot = write.container.slot(write.key)
            if slot in rest and write.value is not MISSING and write.value[0] == "numpy":
                if made[write.value[1]] > 1:
                    raise self._refused(rest[slot], "which is put in another place, too")
                del rest[slot]
                write = write._replace(value=("filled", *write.value[1:]))
            found.append(write)
        for leaf in rest.values():
            raise self._refused(leaf, "in what cannot be written item by item")
        return found
