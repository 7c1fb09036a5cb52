"""How one equation is written in Python, over `jax`, `jnp` and `lax`.

Nothing here is trusted: a spelling is traced on the equation's own avals, and it is used only if that gives the same
equation back. So the table holds what reads well, and JAX may change what a function does without print becoming wrong.
"""

from __future__ import annotations

import builtins
import enum
import functools
import inspect
import keyword
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from jhop import _compat
from jhop._interp import is_jaxpr

GLOBALS = {"jax": jax, "jnp": jnp, "lax": lax, "np": np, "functools": functools, "primitives": primitives}
_RESERVED = {*keyword.kwlist, *keyword.softkwlist, *GLOBALS, "jhop", "abs", "int", "float", "_"}
_SCALAR_TYPES = {"bool": "jnp.bool_"}

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
    "dim_as_value": ("jnp.asarray({dim})",),
}  # fmt: skip


class Names:
    """Hands out identifiers, each once.

    A child's names are free again for its siblings, and never hide one of its parents'. A global name is one that no
    scope uses, so that it means the same everywhere.
    """

    def __init__(self, parent: Names | None = None):
        self._values: set[str] = set(parent._values) if parent else set(_RESERVED)
        self._functions: set[str] = set(parent._functions) if parent else set()
        self._globals: set[str] = parent._globals if parent else set()
        self._ever: set[str] = parent._ever if parent else set(_RESERVED)

    def make(self, wanted: str) -> str:
        """`wanted` as an identifier, with a number added where it is taken."""
        name = _first(wanted, self._values | self._functions | self._globals)
        self._values.add(name)
        self._ever.add(name)
        return name

    def make_function(self, wanted: str) -> str:
        """A name for a nested function, which is called at once: a later function may have the same."""
        plain = wanted.isidentifier() and not keyword.iskeyword(wanted)
        name = _first(wanted, self._values | self._globals, base=wanted if plain else None)
        self._functions.add(name)
        self._ever.add(name)
        return name

    def make_global(self, wanted: str) -> str:
        name = _first(wanted, self._ever)
        self.reserve(name)
        return name

    def reserve(self, name: str) -> bool:
        """Makes `name` a global; False if some scope uses it otherwise."""
        if name in self._ever and name not in self._globals:
            return False
        self._globals.add(name)
        self._ever.add(name)
        return True

    def snapshot(self) -> tuple[set[str], set[str]]:
        return set(self._values), set(self._functions)

    def restore(self, snapshot: tuple[set[str], set[str]]) -> None:
        self._values, self._functions = set(snapshot[0]), set(snapshot[1])


def _first(wanted: str, taken: set[str], *, base: str | None = None) -> str:
    base = base or identifier(wanted)
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def identifier(wanted: str) -> str:
    """The nearest identifier: `<lambda>` gives `lambda_`, `jvp[clip]` gives `jvp_clip`."""
    name = re.sub(r"\W+", "_", wanted, flags=re.ASCII).strip("_") or "value"
    name = f"_{name}" if name[0].isdigit() else name
    return f"{name}_" if keyword.iskeyword(name) else name


def type_text(aval: Any) -> str:
    """`f32[4,8]`; never fails."""
    try:
        name = str(aval.dtype)
        short = re.sub(r"^(bfloat|float|uint|int|complex)(?=\d)", lambda m: {"bfloat": "bf", "uint": "u"}.get(m[0], m[0][0]), name)
        return f"{short}[{','.join(map(str, aval.shape))}]"
    except Exception:
        return type(aval).__name__


def literal(value: Any) -> str:
    """Python source of a parameter.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, enum.Enum):
        cls = type(value)
        if getattr(lax, cls.__name__, None) is cls:
            return f"lax.{cls.__name__}.{value.name}"
    elif isinstance(value, (bool, np.bool_, int, np.integer, str, bytes)) or value is None or value is Ellipsis:
        return repr(value.item() if isinstance(value, np.generic) else value)
    elif isinstance(value, (float, complex, np.inexact)):
        return number(value)
    elif isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return dtype_text(np.dtype(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        return _from_lax(value, value._fields)
    elif isinstance(value, tuple):
        return "(" + "".join(f"{literal(item)}, " for item in value).removesuffix(" " if len(value) == 1 else ", ") + ")"
    elif isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    elif isinstance(value, jax.sharding.PartitionSpec):
        return f"jax.sharding.PartitionSpec({', '.join(map(literal, value))})"
    elif _compat.is_dim_expr(value):
        return str(value)
    elif isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return value.__name__
    elif hasattr(value, "__dataclass_fields__"):
        return _from_lax(value, value.__dataclass_fields__)
    raise ValueError(f"no source for {type(value).__name__}")


def _from_lax(value: Any, fields: Any) -> str:
    """A record whose class `lax` makes public, such as `lax.GatherDimensionNumbers`."""
    cls = type(value)
    if getattr(lax, cls.__name__, None) is not cls:
        raise ValueError(f"no source for {cls.__name__}")
    return f"lax.{cls.__name__}({', '.join(f'{name}={literal(getattr(value, name))}' for name in fields)})"


def dtype_text(dtype: Any) -> str:
    name = _SCALAR_TYPES.get(str(dtype), f"jnp.{dtype}")
    if not name.removeprefix("jnp.").isidentifier() or getattr(jnp, name.removeprefix("jnp."), None) is None:
        raise ValueError(f"no source for dtype {dtype}")
    return name


def number(value: Any) -> str:
    """A number as Python writes it."""
    item = value.item() if hasattr(value, "item") else value
    if isinstance(item, float) and not math.isfinite(item):
        return "jnp.nan" if math.isnan(item) else "jnp.inf" if item > 0 else "-jnp.inf"
    if isinstance(item, complex) and not (math.isfinite(item.real) and math.isfinite(item.imag)):
        return f"complex(float({str(item.real)!r}), float({str(item.imag)!r}))"
    return repr(item)


def literal_texts(atom: Any) -> tuple[str, ...]:
    """Spellings of a scalar in a jaxpr: plain, and with its dtype where it has one of its own."""
    plain = number(np.asarray(atom.val))
    if getattr(atom.aval, "weak_type", False):
        return (plain,)
    return plain, f"{dtype_text(atom.aval.dtype)}({plain})"


# -- spellings ---------------------------------------------------------------------------------------------------------


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
    homes = [home for home in homes if home[1].isidentifier() and home[1] not in _RESERVED]
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


def retraces(eqn: Any, lines: list[str], texts: list[str], scope: dict[str, Any], index: Any = None) -> bool:
    """Whether code gives an equation back when it is traced.

    Args:
        lines: statements, the last of which returns the outputs.
        texts: of the operands; those that are identifiers become parameters.
        scope: globals that the statements read.
        index: the equation that makes the first operand, where the code makes that too.
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
        if len(jaxpr.eqns) != (1 if index is None else 2):
            return False
        made = jaxpr.eqns[-1]
        names = dict(zip(jaxpr.invars, avals, strict=True))
        return (
            made.primitive is eqn.primitive
            and made.params.keys() == eqn.params.keys()
            and all(same(made.params[key], eqn.params[key]) for key in eqn.params)
            and len(made.invars) == len(eqn.invars)
            and all(map(functools.partial(_same_atom, names), made.invars, eqn.invars, texts))
            and [_full_type(v.aval) for v in made.outvars] == [_full_type(v.aval) for v in eqn.outvars]
            and list(jaxpr.outvars) == list(made.outvars)
        )
    except Exception:
        return False  # whatever went wrong: this is not how the equation is written


def subject(eqn: Any) -> int:
    """Which operand of a conversion or a clamp is converted or clamped."""
    return 1 if eqn.primitive.name == "clamp" else 0


def _same_atom(names: dict[Any, str], made: Any, wanted: Any, text: str) -> bool:
    if isinstance(wanted, jex_core.Literal):
        if not isinstance(made, jex_core.Literal) or made.aval.dtype != wanted.aval.dtype:
            return False
        return bool(np.array_equal(np.asarray(made.val), np.asarray(wanted.val))) or number(made.val) == number(wanted.val)
    # A variable without a name is made by a helper equation.
    return not isinstance(made, jex_core.Literal) and names.get(made, text) == text
