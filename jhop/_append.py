"""Lists that tell whether they were read: one that a hook only appends to need not be guarded.

`self.norms.append(norm)` is the commonest thing that hooks do to lists. If the length or the items of such a list
counted as read, every run would find them changed and trace anew.
"""

from __future__ import annotations

from typing import Any

import jax


class AppendList(list[Any]):
    """Stands for a list while hooks are traced. Appending and extending are no reads; everything else is."""

    __slots__ = ("original", "reads", "start")

    def __init__(self, original: list[Any], items: list[Any]):
        super().__init__(items)
        self.original = original
        self.start = len(items)
        self.reads = 0  # how often it was read

    def extend(self, items: Any) -> None:
        if items is self:
            self.reads += 1
        list.extend(self, items)

    def __iadd__(self, items: Any) -> AppendList:  # type: ignore[misc]
        self.extend(items)
        return self

    def __radd__(self, items: Any) -> Any:
        # A list would read this one from C, past its methods.
        self.reads += 1
        return items + self.raw() if isinstance(items, list) else NotImplemented

    def __reduce__(self) -> Any:
        self.reads += 1
        return (list, (list(self.raw()),))

    def raw(self) -> list[Any]:
        """The items, without that counting as a read."""
        return [list.__getitem__(self, i) for i in range(list.__len__(self))]

    def appended(self) -> list[Any] | None:
        """What was appended if nothing else was done to the list, else None."""
        return None if self.reads else self.raw()[self.start :]


def class_name(value: Any) -> str:
    """The name of a value's type as users know it: where something stands for their list or number, of that."""
    known = value.original if isinstance(value, AppendList) else value
    return known.__class__.__name__  # not `type`: a `_scalar.Scalar` says there what it stands for


_READS = """__getitem__ __setitem__ __delitem__ __iter__ __len__ __contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
__add__ __mul__ __imul__ __rmul__ __reversed__ __repr__ __bool__ copy count index insert pop remove reverse sort
clear"""


def _reading(name: str) -> Any:
    inner = getattr(list, name, None) or (lambda self: list.__len__(self) > 0)  # list has no __bool__ of its own

    def method(self: AppendList, *args: Any, **kwargs: Any) -> Any:
        self.reads += 1
        return inner(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in _READS.split():
    setattr(AppendList, _name, _reading(_name))
AppendList.__hash__ = None


def _flatten(value: AppendList) -> tuple[list[Any], None]:
    value.reads += 1
    return value.raw(), None


jax.tree_util.register_pytree_node(AppendList, _flatten, lambda _, items: list(items))
