"""Marks of a captured backward pass: where cotangents enter, where a compiled backward begins, where grads accumulate.

Each is a primitive, so that a captured graph says by itself what it is made of, and each vanishes in XLA: two are
identities and the third is at most one addition. They are bound on tracers only; the eager engine does without.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core as jex_core
from jax.interpreters import ad

from jhop import _compat
from jhop._errors import JhopError

validate_outputs_p = jex_core.Primitive("validate_outputs")
validate_outputs_p.multiple_results = True
aot_prologue_p = jex_core.Primitive("aot_prologue")
aot_prologue_p.multiple_results = True
accumulate_grad_p = jex_core.Primitive("accumulate_grad")


def validate_outputs(cts: list[Any]) -> list[Any]:
    """Marks cotangents that were checked against the values they belong to. Any shapes and dtypes; an identity."""
    return list(validate_outputs_p.bind(*cts))


def aot_prologue(saved: list[Any], cts: list[Any], *, aot_id: int, call: int) -> list[Any]:
    """Marks where the backward of a function compiled as number `aot_id` begins: an identity on residuals and cts.

    `call` tells apart several uses of one compiled function in one capture.
    """
    return list(aot_prologue_p.bind(*saved, *cts, n_saved=len(saved), aot_id=aot_id, call=call))


def accumulate_grad(ct: Any, leaf: Any, old: Any | None) -> Any:
    """The new `.grad` of a leaf: `ct`, added to the old one where there is one. All of the leaf's shape and dtype."""
    return accumulate_grad_p.bind(ct, leaf, *([] if old is None else [old]))


def _identity(*args: Any, **params: Any) -> list[Any]:
    return list(args)


def _accumulate_grad_impl(ct: Any, leaf: Any, old: Any = None) -> Any:
    return ct if old is None else old + ct


def _accumulate_grad_abstract_eval(ct: Any, leaf: Any, old: Any = None) -> Any:
    if ct.shape != leaf.shape or ct.dtype != leaf.dtype:
        raise JhopError(f"backward: the gradient of a leaf of type {leaf} came out as {ct}.")
    return ct.update(weak_type=False)


def _accumulate_grad_jvp(primals: Any, tangents: Any) -> Any:
    dots = [dot for i, dot in enumerate(tangents) if i != 1 and type(dot) is not ad.Zero]
    out = accumulate_grad_p.bind(*primals)
    if not dots:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, sum(dots[1:], dots[0])


for _primitive in (validate_outputs_p, aot_prologue_p):
    _primitive.def_impl(_identity)
    _primitive.def_abstract_eval(_identity)
    _compat.register_lowering(_primitive, _identity, multiple_results=True)
    ad.deflinear2(_primitive, lambda cts, *args, **params: list(cts))
accumulate_grad_p.def_impl(_accumulate_grad_impl)
accumulate_grad_p.def_abstract_eval(_accumulate_grad_abstract_eval)
ad.primitive_jvps[accumulate_grad_p] = _accumulate_grad_jvp
_compat.register_lowering(accumulate_grad_p, _accumulate_grad_impl, multiple_results=False)
