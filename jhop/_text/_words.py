"""How single things print in PyTorch's words: dtypes, types, literals, devices, extra arguments."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jhop._text._statements import RawCode

# Number and short name of each dtype in PyTorch.
DTYPES = {
    "uint8": (0, "u8"), "int8": (1, "i8"), "int16": (2, "i16"), "int32": (3, "i32"), "int64": (4, "i64"),
    "float16": (5, "f16"), "float32": (6, "f32"), "float64": (7, "f64"), "complex64": (9, "c64"),
    "complex128": (10, "c128"), "bool": (11, "b8"), "bfloat16": (15, "bf16"),
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """PyTorch's short name of a dtype; JAX's own where PyTorch has none."""
    return DTYPES.get(str(dtype), (0, str(dtype)))[1]


def tensor_type(aval: Any) -> str:
    """`f32[2, s21]`: an array's dtype and shape as printed."""
    return f"{dtype_name(aval.dtype)}[{', '.join(str(dim) for dim in aval.shape)}]"


def dtype_code(dtype: Any) -> int:
    """PyTorch's number of a dtype."""
    return DTYPES.get(str(dtype), (0, ""))[0]


def python_value(value: Any) -> Any:
    """A literal as Python prints it."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) or hasattr(value, "dtype"):
        return np.asarray(value).item() if np.ndim(value) == 0 else RawCode(f"array{np.shape(value)}")
    return value


def einsum_spec(dimension_numbers: Any, left: int, right: int) -> str:
    """The `torch.einsum` equation of a `dot_general` on arrays of `left` and `right` dimensions."""
    (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names_l, names_r = [""] * left, [""] * right
    for i, j in [*zip(batch_l, batch_r, strict=True), *zip(contract_l, contract_r, strict=True)]:
        names_l[i] = names_r[j] = next(letters)
    names_l = [name or next(letters) for name in names_l]
    names_r = [name or next(letters) for name in names_r]
    batch = [names_l[i] for i in batch_l]
    free_l = [name for i, name in enumerate(names_l) if i not in batch_l and i not in contract_l]
    free_r = [name for j, name in enumerate(names_r) if j not in batch_r and j not in contract_r]
    return f"{''.join(names_l)},{''.join(names_r)}->{''.join(batch + free_l + free_r)}"


def call_of(eqn: Any, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]] | None:
    """(function, arguments) where PyTorch's function takes other arguments than JAX's primitive; None elsewhere."""
    if eqn.primitive.name == "select_n" and len(args) == 3:
        return "where", (args[0], args[2], args[1])  # JAX gives the value for False first
    if eqn.primitive.name != "dot_general":
        return None
    left, right = (v.aval.ndim for v in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    if (left, right) == (2, 2) and tuple(map(tuple, numbers[0])) == ((1,), (0,)) and not numbers[1][0]:
        return "mm", args
    return "einsum", (einsum_spec(numbers, left, right), *args)


def extra_args(eqn: Any) -> tuple[Any, ...]:
    """Parameters that PyTorch's operator takes as arguments."""
    name, params = eqn.primitive.name, eqn.params
    if name == "integer_pow":
        return (params["y"],)
    if name == "reduce_sum":
        return (list(params["axes"]),)
    if name == "reshape":
        return (list(params["new_sizes"]),)
    if name == "broadcast_in_dim":
        return (list(params["shape"]),)
    if name == "transpose":
        return (list(params["permutation"]),)
    return ()


def device() -> str:
    return "device(type='cpu')" if jax.default_backend() == "cpu" else "device(type='cuda', index=0)"
