"""Tracing a function for one call: with symbols for sizes as far as they will do, with numbers for the others."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop._asked import Asked
from jhop._capture import parameter_names
from jhop._guards import Guards
from jhop._inside import is_dynamic, value_of
from jhop._joint import Joint, Tracing
from jhop._lookups import Lookups
from jhop._sizes import Dynamic, Fits, NeedsNumbers, Place, Symbolic, with_symbols
from jhop._source import hook_name
from jhop._tensor import Tensor


class Call(NamedTuple):
    """A call that the function is traced for."""

    args: Any
    kwargs: Any
    leaves: list[Any]
    tree: Any
    recording: bool

    @property
    def arguments(self) -> list[Any]:
        """Those that are inputs of the graph."""
        return [leaf for leaf in self.leaves if is_dynamic(leaf)]

    @property
    def static(self) -> list[tuple[str, Any]]:
        """Name and value of the others."""
        return [(f"argument{i}", leaf) for i, leaf in enumerate(self.leaves) if not is_dynamic(leaf)]


class Attempt:
    """One run of a function over tracers.

    Attributes:
        captured: Tensors that the function reaches by itself.
        values: arrays: arguments, then captured ones.
        diff: indices of those that are differentiated.
        types: what it is traced with.
        fits: for which sizes the result is, if some are symbols.
        joint, guards: the graphs, and when they hold, once it ran.
    """

    joint: Joint
    guards: Guards

    def __init__(self, fn: Any, call: Call):
        self._fn = fn
        self._call = call
        self._lookups = Lookups([(hook_name(fn), fn), *call.static])
        found = self._lookups.walk.instances(Tensor, _wants_grad) if call.recording else ()
        self.captured: tuple[Tensor, ...] = tuple(found)
        inputs = [*call.arguments, *self.captured]
        self.values = [value_of(leaf) for leaf in inputs]
        self.diff = [
            i for i, leaf in enumerate(inputs) if call.recording and isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        whole = len(call.arguments) == len(call.leaves)
        names = parameter_names(fn, call.args, call.kwargs) if whole else []
        self._names = names
        self._places = [*names, *(f"argument{i}" for i in range(len(names), len(inputs)))]
        self.types = Symbolic([jax.typeof(value) for value in self.values], ())
        self.fits: Fits | None = None

    def run(self, dynamic: Dynamic, numbers: set[Place]) -> None:
        """Traces the function, with symbols for those of the wanted sizes that are not in `numbers`.

        Raises:
            Exception: the function raised it, or NeedsNumbers.
        """
        call, asked = self._call, Asked()
        sources = [f"L[{name!r}]" for name in self._places]
        self.types = with_symbols(
            self.types.avals, sources, lambda place: place not in numbers and dynamic.wants(place)
        )
        if self.types.places:
            self.fits = Fits(self.types, asked, self._places)
        with self._lookups.tracing(), asked.noting() if self.fits is not None else contextlib.nullcontext():
            self.joint = joint = Tracing(
                self._fn, call.leaves, call.tree, self.captured, self.diff, self._names, self.types.avals
            ).run()
        if self.fits is not None:
            for gm in joint.graphs():
                self.fits.look(gm.jaxpr)
            self.fits.check([jnp.shape(value) for value in self.values])
            if why := joint.only_for_its_sizes():
                raise NeedsNumbers(self.types.symbols, why, True)
        jaxprs = (gm.jaxpr for gm in joint.graphs())
        self.guards = self._lookups.guards(joint.hooks(), *jaxprs, inputs=self.captured)


def _wants_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor._trace is None
