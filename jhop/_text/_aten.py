"""Names of JAX primitives in PyTorch's vocabulary, and the names that PyTorch's ahead-of-time graphs give to values."""

from __future__ import annotations

from typing import Any

import jax.extend.core as jex_core

from jhop._text._namespace import Namespace

# primitive -> (operator, overload); `torch.ops.aten.{operator}.{overload}` in print. Others keep JAX's own name.
ATEN = {
    "add": ("add", "Tensor"), "add_any": ("add", "Tensor"), "sub": ("sub", "Tensor"), "mul": ("mul", "Tensor"),
    "div": ("div", "Tensor"), "neg": ("neg", "default"), "integer_pow": ("pow", "Tensor_Scalar"),
    "pow": ("pow", "Tensor_Tensor"), "exp": ("exp", "default"), "log": ("log", "default"), "sin": ("sin", "default"),
    "cos": ("cos", "default"), "tanh": ("tanh", "default"), "logistic": ("sigmoid", "default"),
    "sqrt": ("sqrt", "default"), "rsqrt": ("rsqrt", "default"), "abs": ("abs", "default"),
    "sign": ("sign", "default"), "max": ("maximum", "default"), "min": ("minimum", "default"),
    "reduce_sum": ("sum", "dim_IntList"), "dot_general": ("mm", "default"), "transpose": ("permute", "default"),
    "reshape": ("reshape", "default"), "broadcast_in_dim": ("expand", "default"), "select_n": ("where", "self"),
    "gt": ("gt", "Tensor"), "ge": ("ge", "Tensor"), "lt": ("lt", "Tensor"), "le": ("le", "Tensor"),
    "eq": ("eq", "Tensor"), "ne": ("ne", "Tensor"), "convert_element_type": ("_to_copy", "default"),
    "squeeze": ("squeeze", "dims"), "stop_gradient": ("detach", "default"),
}  # fmt: skip

COMMUTATIVE = {"add", "add_any", "mul"}


def aten_name(primitive: str) -> str:
    """The operator's name, which is also the stem of the names of its results."""
    return ATEN.get(primitive, (primitive, ""))[0]


def aten_target(primitive: str) -> str:
    """The callable as printed."""
    operator, overload = ATEN.get(primitive, (primitive, "default"))
    return f"torch.ops.aten.{operator}.{overload}"


def joint_names(forward: Any, backward: Any, given: list[int | None], computed: list[Any]) -> dict[Any, str]:
    """Names of a backward graph's values, as if forward and backward had been traced into one graph.

    Args:
        forward: the forward's jaxpr.
        backward: the backward's jaxpr: residuals, then cotangents.
        given: per residual, the index of the forward input that it is, or None.
        computed: per residual, the forward's variable for it where `given` is None.

    Returns:
        Names by variable of `backward`: `primals_k`, `tangents_k`, and operator names numbered through both graphs.
    """
    space = Namespace()
    names: dict[Any, str] = {}
    forward_names: dict[Any, str] = {}
    for index in range(len(forward.invars)):
        space.make(f"primals_{index + 1}")
    for eqn in forward.eqns:
        for variable in eqn.outvars:
            forward_names[variable] = space.make(aten_name(eqn.primitive.name))
    n = len(given)
    for variable, place, source in zip(backward.invars[:n], given, computed, strict=True):
        if place is not None:
            names[variable] = f"primals_{place + 1}"
        elif isinstance(source, jex_core.Literal) or source not in forward_names:
            names[variable] = space.make("saved")
        else:
            names[variable] = forward_names[source]
    for number, variable in enumerate(backward.invars[n:]):
        names[variable] = space.make(f"tangents_{number + 1}")
    for eqn in backward.eqns:
        for variable in eqn.outvars:
            names[variable] = space.make(aten_name(eqn.primitive.name))
    return names
