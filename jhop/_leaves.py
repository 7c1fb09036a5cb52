"""Slots of Python objects: which values in them are lifted, and which are taken for granted."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jhop import _compat
from jhop._classes import OPAQUE_ROOTS, module_of
from jhop._container import Container


class Leaf(NamedTuple):
    """A slot with a number, array or tracer."""

    container: Container
    key: Any
    path: str
    value: Any


class Fixed(NamedTuple):
    """A slot whose value the traced graph takes for granted."""

    container: Container
    key: Any
    value: Any


def is_number(value: Any) -> bool:
    """Numbers that are lifted; bools are flags, and steer control flow too often to be worth lifting."""
    return type(value) is int or type(value) is float


def is_array(value: Any) -> bool:
    """Arrays that are lifted."""
    cls = type(value)
    library = module_of(cls).partition(".")[0] in OPAQUE_ROOTS
    if not library or not (isinstance(value, jax.Array) or cls is np.ndarray) or issubclass(cls, _compat.Tracer):
        return False  # a NumPy scalar is a value like a string: exact, and guarded
    return _compat.has_arrays_of(value.dtype)


# Library classes that hold state a hook may read, with the slots that hold it.
DECLARED: dict[type, tuple[str, ...]] = {}


def declare_state(cls: type, *slots: str) -> None:
    """Says which slots of a library class hold state: jhop's own classes are not walked like a user's."""
    DECLARED[cls] = slots
