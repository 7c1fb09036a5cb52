"""A backward pass that is itself recorded on the tape: `create_graph`.

Cotangents are Tensors. Each node runs as an operation on Tensors (`Node.record`), and hooks get and return Tensors, so
what they compute is differentiated like everything else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jhop import _engine
from jhop._contract import check_contract
from jhop._lift import apply
from jhop._node import Edge, Node
from jhop._tensor import Tensor


class RecordedPass(_engine.Pass):
    """The engine's pass over Tensors."""

    recording = True

    def run(self, seeds: list[tuple[Edge, Any]]) -> list[Any]:
        return super().run([(edge, _as_tensor(ct)) for edge, ct in seeds])

    def compute(self, node: Node, cts: list[Any]) -> list[Any]:
        return node.record(cts)

    def contract(self, fn: Any, returned: Any, ct: Any) -> Any:
        array = check_contract(fn, returned, jax.typeof(ct.value))
        return returned if isinstance(returned, Tensor) else Tensor(array)

    def add(self, old: Any, new: Any) -> Any:
        return apply(jnp.add, (old, new), {})

    def tensor_hooks(self, ct: Any, hooks: Any) -> Any:
        for fn in hooks.snapshot():
            returned = fn(ct)
            ct = ct if returned is None else self.contract(fn, returned, ct)
        return ct

    def sum_of(self, grad: Any, ct: Any) -> Any:
        return self.add(_as_tensor(grad), ct)


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)


_engine.RECORDED.append(RecordedPass)
