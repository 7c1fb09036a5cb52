"""How one equation is written in Python, over `jax`, `jnp` and `lax`.

Nothing here is trusted: a spelling is traced on the equation's own avals, and it is used only if that gives the same
equation back. So the table holds what reads well, and JAX may change what a function does without print becoming wrong.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jhop import _compat
from jhop._interp import is_jaxpr
from jhop._text._jax_source import GLOBALS, RESERVED, literal, number, type_text

# The user's pytrees in a scan: print has flat tuples instead.
_TREES = {"ft_in", "ft_out"}

# Spellings to try first. `{0}` is the first operand, `{all}` all of them, `{axes}` a parameter.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "add": ("{0} + {1}",), "sub": ("{0} - {1}",), "mul": ("{0} * {1}",), "div": ("{0} / {1}",),
    "neg": ("-{0}",), "pow": ("{0} ** {1}",), "integer_pow": ("{0} ** {y}",), "dot_general": ("{0} @ {1}",),
    "and": ("{0} & {1}", "lax.bitwise_and({0}, {1})"), "or": ("{0} | {1}", "lax.bitwise_or({0}, {1})"),
    "xor": ("{0} ^ {1}", "lax.bitwise_xor({0}, {1})"), "not": ("~{0}", "lax.bitwise_not({0})"),
    "lt": ("{0} < {1}",), "le": ("{0} <= {1}",), "gt": ("{0} > {1}",), "ge": ("{0} >= {1}",),
    "eq": ("{0} == {1}",), "ne": ("{0} != {1}",), "add_any": ("{0} + {1}",),
    "convert_element_type": ("{0}.astype({new_dtype})", "lax.convert_element_type({0}, {new_dtype})"),
    "concatenate": ("lax.concatenate([{all}], dimension={dimension})",),
    "iota": ("lax.iota({dtype}, {shape[0]})", "lax.broadcasted_iota({dtype}, {shape}, {dimension})"),
    "dynamic_slice": ("lax.dynamic_slice({0}, ({rest},), {slice_sizes})",),
    "dynamic_update_slice": ("lax.dynamic_update_slice({0}, {1}, ({rest2},))",),
    "sort": ("lax.sort({0}, dimension={dimension}, is_stable={is_stable}, num_keys={num_keys})",
             "lax.sort(({all},), dimension={dimension}, is_stable={is_stable}, num_keys={num_keys})"),
    "argmax": ("lax.argmax({0}, {axes[0]}, {index_dtype})",), "argmin": ("lax.argmin({0}, {axes[0]}, {index_dtype})",),
    "optimization_barrier": ("lax.optimization_barrier(({all},))",), "copy": ("jnp.copy({0})",),
    "random_seed": ("jax.random.key({0})",), "random_wrap": ("jax.random.wrap_key_data({0})",),
    "random_unwrap": ("jax.random.key_data({0})",), "random_fold_in": ("jax.random.fold_in({0}, {1})",),
    "dim_as_value": ("jnp.asarray({dim})",),
}  # fmt: skip


def spellings(eqn: Any) -> Iterator[str]:
    """Templates of expressions that may be the equation, the most readable first."""
    name = eqn.primitive.name
    for template in _SPELLINGS.get(name, ()):
        try:
            yield _with_params(template, eqn.params)
        except (ValueError, KeyError, IndexError, TypeError):
            continue
    for call in (_lax_call, _bind_call):
        try:
            text = call(eqn, name.replace("-", "_"))
        except (ValueError, TypeError):
            continue
        if text is not None:
            yield text


def _with_params(template: str, params: dict[str, Any]) -> str:
    """Fills in parameters, and leaves operands."""

    def value(match: re.Match[str]) -> str:
        key, index = match.groups()
        if key in ("all", "rest", "rest2"):
            return match.group()
        item = params[key] if index is None else params[key][int(index)]
        return _escape(literal(item))

    return re.sub(r"\{([a-z]\w*)(?:\[(\d)\])?\}", value, template)


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def fill_in(template: str, operands: list[str]) -> str:
    """A template with its operands; a negative number that an operator takes gets parentheses."""
    if "(" not in template:
        operands = [f"({text})" if text.startswith("-") else text for text in operands]
    lists = {"all": operands, "rest": operands[1:], "rest2": operands[2:]}
    return template.format(*operands, **{key: ", ".join(items) for key, items in lists.items()})


def _lax_call(eqn: Any, name: str) -> str | None:
    """The function of `lax` that is named like the primitive, its parameters by keyword unless they are the default."""
    function = getattr(lax, name, None)
    if function is None:
        return None
    parameters = list(inspect.signature(function).parameters.values())
    args = [f"{{{i}}}" for i in range(len(eqn.invars))]
    for parameter in parameters[len(args) :]:
        if parameter.name in eqn.params:
            value = eqn.params[parameter.name]
            if parameter.default is parameter.empty or not same(value, parameter.default):
                args.append(f"{parameter.name}={_escape(literal(value))}")
    return f"lax.{name}({', '.join(args)})"


def _bind_call(eqn: Any, name: str) -> str | None:
    """The primitive itself, under the public name that it can be imported by."""
    found = home_of(eqn.primitive)
    if found is None:
        return None
    args = [f"{{{i}}}" for i in range(len(eqn.invars))]
    params = [f"{key}={_escape(literal(value))}" for key, value in eqn.params.items()]
    return f"{found[1]}.bind({', '.join(args + params)})"


@functools.lru_cache(maxsize=256)
def home_of(primitive: Any) -> tuple[str, str] | None:
    """(import statement, expression) of a primitive that some public module holds as a global; None if none does."""
    for name, value in vars(primitives).items():
        if value is primitive:
            return "from jax.extend.core import primitives", f"primitives.{name}"
    homes = []
    for module_name, module in list(sys.modules.items()):
        # `vars`, as `getattr` would make lazy modules load.
        if module is None or "_src" in module_name.split(".") or not hasattr(module, "__dict__"):
            continue
        if not all(part.isidentifier() for part in module_name.split(".")):
            continue
        homes += [(module_name, name) for name, value in list(vars(module).items()) if value is primitive]
    homes = [home for home in homes if home[1].isidentifier() and home[1] not in RESERVED]
    if not homes:
        return None
    module_name, name = min(homes, key=lambda home: (home[0].count("."), home))
    return f"from {module_name} import {name}", name


# -- the check ---------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Whether two parameters mean the same; of jaxprs only the types are compared, their insides are checked apart."""
    if a is b:
        return True
    if is_jaxpr(a) and is_jaxpr(b):
        opened = [_compat.open_jaxpr(item)[0] for item in (a, b)]
        return _types(opened[0]) == _types(opened[1])
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        equal = a == b
        return bool(np.all(equal)) or (not isinstance(equal, bool) and str(a) == str(b))
    except Exception:
        return False


def same_type(a: Any, b: Any) -> bool:
    return _full_type(a) == _full_type(b)


def _types(jaxpr: Any) -> list[str]:
    return [_full_type(v.aval) for v in (*jaxpr.invars, *jaxpr.outvars)]


def _full_type(aval: Any) -> str:
    return f"{'~' if getattr(aval, 'weak_type', False) else ''}{type_text(aval)}"


def retraces(
    eqn: Any, lines: list[str], texts: list[str], scope: dict[str, Any], index: Any = None, *, loose: bool = False
) -> bool:
    """Whether code gives an equation back when it is traced.

    Args:
        lines: statements, the last of which returns the outputs.
        texts: of the operands; those that are identifiers become parameters.
        scope: globals that the statements read.
        index: the equation that makes the first operand, where the code makes that too.
        loose: whether any equations will do that give outputs of the same types.
    """
    atoms = eqn.invars if index is None else [index.invars[subject(index)], *eqn.invars[1:]]
    avals = {
        text: atom.aval
        for text, atom in zip(texts, atoms, strict=True)
        if not isinstance(atom, jex_core.Literal) and text not in scope
    }
    namespace = {**GLOBALS, **scope}
    try:
        exec("\n    ".join([f"def check({', '.join(avals)}):", *lines]), namespace)
        jaxpr, _ = _compat.open_jaxpr(jax.make_jaxpr(namespace["check"])(*avals.values()))
        if loose:
            return [_full_type(v.aval) for v in jaxpr.outvars] == [_full_type(v.aval) for v in eqn.outvars]
        if len(jaxpr.eqns) != (1 if index is None else 2):
            return False
        made = jaxpr.eqns[-1]
        names = dict(zip(jaxpr.invars, avals, strict=True))
        return (
            made.primitive is eqn.primitive
            and made.params.keys() == eqn.params.keys()
            and all(same(made.params[key], eqn.params[key]) for key in eqn.params.keys() - _TREES)
            and (eqn.primitive.name != "scan" or _compat.scan_split(made.params) == _compat.scan_split(eqn.params))
            and len(made.invars) == len(eqn.invars)
            and all(map(functools.partial(_same_atom, names), made.invars, eqn.invars, texts))
            and [_full_type(v.aval) for v in made.outvars] == [_full_type(v.aval) for v in eqn.outvars]
            and list(jaxpr.outvars) == list(made.outvars)
        )
    except Exception:
        return False  # whatever went wrong: this is not how the equation is written


def check_key(eqn: Any, template: str, texts: list[str]) -> Any:
    """Equal for checks that have the same answer; None where that cannot be known."""
    place: dict[Any, int] = {}
    operands = tuple(
        text if isinstance(atom, jex_core.Literal) else (place.setdefault(atom, len(place)), _full_type(atom.aval))
        for atom, text in zip(eqn.invars, texts, strict=True)
    )
    key = (eqn.primitive, template, operands, tuple(eqn.params.items()), *(_full_type(v.aval) for v in eqn.outvars))
    try:
        hash(key)
        return key
    except Exception:
        return None


def subject(eqn: Any) -> int:
    """Which operand of a conversion or a clamp is converted or clamped."""
    return 1 if eqn.primitive.name == "clamp" else 0


def _same_atom(names: dict[Any, str], made: Any, wanted: Any, text: str) -> bool:
    if isinstance(wanted, jex_core.Literal):
        if not isinstance(made, jex_core.Literal) or made.aval.dtype != wanted.aval.dtype:
            return False
        return number(made.val) == number(wanted.val)
    # A variable without a name is made by a helper equation.
    return not isinstance(made, jex_core.Literal) and names.get(made, text) == text
