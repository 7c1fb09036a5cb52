"""Writes the equations of a jaxpr as rows: one statement each, in order, nested functions indented.

Rows are what text and HTML both show, so that the two agree.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat
from jhop._boundary import accumulate_grad_p, aot_prologue_p, validate_outputs_p
from jhop._graph import NO_INFO, GraphModule, Info
from jhop._interp import inner_jaxprs
from jhop._scalar import INFIX, PREFIX, fill, scalar_p
from jhop._source import Origin, describe_hook, eqn_name, hook_name, origin_of, user_frames
from jhop._text import _jax_higher as higher
from jhop._text import _jax_ops as ops
from jhop._trace_wrapped import HookFn, trace_wrapped, trace_wrapped_p

_SMALL = 16  # elements of a constant that is written out
_INLINED = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a printed function.

    Attributes:
        kind: "def", "step", "return" or "note".
        code: the statement, without indentation.
        depth: of indentation.
        names: what it assigns, or the name of the function that it defines.
        type: of what it assigns.
        origin: where in the user's source it comes from, a line of another kind of place (`MulBackward (NodeCall 1)`).
        stage: "hook" for what hooks do, else "".
    """

    kind: str
    code: str
    depth: int
    names: str = ""
    type: str = ""
    origin: Origin | str | None = None
    stage: str = ""


@dataclasses.dataclass(kw_only=True)
class Shared:
    """What all scopes of one text have in common.

    Attributes:
        opaque: objects that Python source cannot hold, by the keyword-only parameter that brings them: (object, what
            it is).
        numbers: variables that are Python numbers when the text runs.
        scope: other globals that the text reads.
        imports: statements that it needs beyond `jax`, `jnp` and `lax`.
    """

    gm: GraphModule
    opaque: dict[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    numbers: set[Any] = dataclasses.field(default_factory=set)
    scope: dict[str, Any] = dataclasses.field(default_factory=dict)
    imports: set[str] = dataclasses.field(default_factory=set)


class _Jhop:
    """What the text reads of `import jhop`."""

    trace_wrapped = staticmethod(trace_wrapped)


class OpaqueEquation:
    """An equation as a function of its inputs that returns the list of its outputs."""

    def __init__(self, eqn: Any):
        self._eqn = eqn

    def __call__(self, *args: Any) -> list[Any]:
        return _compat.bind_eqn(self._eqn, list(args))


class _FlatHook:
    """A hook that a transformation derived, in the form in which `jhop.trace_wrapped` takes hooks."""

    def __init__(self, hook: HookFn):
        self._hook = hook
        self.__name__ = hook.name

    def __call__(self, *args: Any) -> Any:
        return self._hook.call(*args)[0]


class Writer:
    """Writes one scope. `env` holds the source of every variable that can be read."""

    def __init__(self, shared: Shared, names: ops.Names, depth: int = 1):
        self.shared = shared
        self.names = names
        self.depth = depth
        self.env: dict[Any, str] = {}
        self.rows: list[Row] = []
        self.folded: dict[Any, Any] = {}

    def child(self) -> Writer:
        return Writer(self.shared, ops.Names(self.names), self.depth + 1)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def row(self, kind: str, code: str, **fields: Any) -> Row:
        return Row(kind=kind, code=code, depth=self.depth, **fields)

    def add(self, kind: str, code: str, **fields: Any) -> None:
        self.rows.append(self.row(kind, code, **fields))

    def info(self, variable: Any) -> Info:
        return self.shared.gm.info.get(variable, NO_INFO)

    def opaque(self, value: Any, wanted: str, what: str) -> str:
        """The name of a keyword-only parameter that brings `value`."""
        for name, (known, _) in self.shared.opaque.items():
            if known is value:
                return name
        name = self.names.make_global(wanted)
        self.shared.opaque[name] = (value, what)
        return name

    # -- values --------------------------------------------------------------------------------------------------------

    def name_of(self, variable: Any, wanted: str) -> str:
        name = self.env[variable] = self.names.make(self.info(variable).name or wanted)
        return name

    def atom(self, atom: Any, *, plain: bool = False) -> str:
        if not isinstance(atom, jex_core.Literal):
            return self.env[atom]
        try:
            return ops.literal_texts(atom)[0 if plain else -1]
        except ValueError:
            return self.opaque(atom.val, "constant", f"a constant, {ops.type_text(atom.aval)}")

    def operands(self, eqn: Any, *, plain: bool = False) -> list[str]:
        return [self.atom(atom, plain=plain) for atom in eqn.invars]

    def constant(self, variable: Any, value: Any) -> None:
        """Gives a name to a closed-over array: its elements where they are few, else a parameter."""
        try:
            if np.size(value) > _SMALL:
                raise ValueError("too large to be written out")
            dtype = ops.dtype_text(np.asarray(value).dtype)
            code = f"np.array({_elements(np.asarray(value).tolist())}, dtype={dtype})"
        except Exception:
            what = f"a closed-over array, {ops.type_text(variable.aval)}"
            self.env[variable] = self.opaque(value, "constant", what)
            return
        name = self.name_of(variable, "constant")
        self.add("step", f"{name} = {code}", names=name, type=ops.type_text(variable.aval))

    # -- equations -----------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: list[Any]) -> list[str]:
        """Writes a jaxpr whose inputs have names; the source of its outputs."""
        for variable, value in zip(jaxpr.constvars, consts):
            if variable not in self.env:
                self.constant(variable, value)
        self.folded.update(higher.foldable(jaxpr.eqns))
        local = _local_names(jaxpr.eqns)
        for eqn in jaxpr.eqns:
            if eqn.outvars and eqn.outvars[0] in self.folded:
                continue  # written as part of the equation that reads it
            self.equation(eqn, local.get(eqn.outvars[0]) if eqn.outvars else None)
        return [self.atom(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, local: str | None) -> None:
        """Writes one equation in the first way that works; the last way always does."""
        before, names, opaque = list(self.rows), self.names.snapshot(), dict(self.shared.opaque)
        for write in (self._own, self._inlined, self._higher, self._plain):
            try:
                if write(eqn, local):
                    return
            except Exception:  # print must not fail, whatever a primitive's parameters are
                pass
            self.rows, self.shared.opaque = list(before), dict(opaque)
            self.names.restore(names)
        for atom in eqn.invars:
            if not isinstance(atom, jex_core.Literal) and atom in self.folded:
                self.equation(self.folded.pop(atom), None)  # the call did not make it after all
                return self.equation(eqn, local)
        what = f"the equation `{eqn.primitive}`, which has no public spelling"
        name = self.opaque(OpaqueEquation(eqn), eqn.primitive.name, what)
        self._assign(eqn, f"{name}({', '.join(self.operands(eqn))})", (len(eqn.outvars),), local)

    def _wanted(self, eqn: Any, local: str | None) -> str:
        if eqn.primitive.name in ("jit", "pjit"):
            return str(eqn.params["name"])
        return local or eqn.primitive.name

    def _assign(self, eqn: Any, expression: str, groups: tuple[int, ...] | None, local: str | None, **fields: Any) -> None:
        targets = self._targets(eqn, local)
        if groups is None:
            left = ", ".join(targets)
        else:
            rest = iter(targets)
            parts = [higher.tuple_of([next(rest) for _ in range(count)]) for count in groups]
            left = ", ".join(targets) if len(parts) == 1 and len(targets) > 1 else ", ".join(parts)
        code = f"{left} = {expression}" if left else expression
        self._step(eqn, code, targets, **fields)

    def _targets(self, eqn: Any, local: str | None) -> list[str]:
        wanted = self._wanted(eqn, local)
        return [self.name_of(v, local or wanted) for v in eqn.outvars]

    def _step(self, eqn: Any, code: str, targets: list[str], **fields: Any) -> None:
        info = self.info(eqn.outvars[0]) if eqn.outvars else NO_INFO
        fields.setdefault("stage", "hook" if info.stage.startswith("hook") else "")
        origin = self._origin(eqn)
        types = ", ".join(ops.type_text(v.aval) for v in eqn.outvars)
        self.add("step", code, names=", ".join(targets), type=types, origin=origin, **fields)

    def _origin(self, eqn: Any) -> Origin | str | None:
        known = self.info(eqn.outvars[0]).origin if eqn.outvars else None
        return known if isinstance(known, (Origin, str)) else origin_of_eqn(eqn)

    # -- jhop's own primitives -----------------------------------------------------------------------------------------

    def _own(self, eqn: Any, local: str | None) -> bool:
        primitive = eqn.primitive
        texts = self.operands(eqn)
        if primitive in (validate_outputs_p, aot_prologue_p):
            targets = self._targets(eqn, local)
            self._step(eqn, f"{', '.join(targets)} = {', '.join(texts)}", targets)
        elif primitive is accumulate_grad_p:
            self._assign(eqn, texts[0] if len(texts) < 3 else f"{texts[2]} + {texts[0]}", None, local)
        elif primitive is scalar_p:
            self.shared.numbers.update(eqn.outvars)
            self._assign(eqn, _arithmetic(eqn, self.operands(eqn, plain=True)), None, local)
        elif primitive is trace_wrapped_p:
            self._hook(eqn, texts, local)
        else:
            return False
        return True

    def _hook(self, eqn: Any, texts: list[str], local: str | None) -> None:
        hook = eqn.params["fn"]
        if len(eqn.outvars) != 1 or not ops.same_type(eqn.invars[0].aval, eqn.outvars[0].aval):
            raise ValueError("the call has another form than jhop.trace_wrapped gives it")
        # A hook that no transformation changed, on one array, is the user's own function.
        own = hook.key[0] == "hook" and hook.key[2] == jax.tree.structure(0) and hook.key[3] == len(texts) - 1
        value = hook.base if own else _known_flat(self.shared, hook)
        what = describe_hook(hook.base) if own else f"{hook.name}, of {describe_hook(hook.base)}"
        name = self.opaque(value, _hook_word(hook_name(hook.base) if own else hook.name), what)
        kind = "" if hook.kind == "hook" else f", kind={hook.kind!r}"
        self.shared.imports.add("import jhop")
        self._assign(eqn, f"jhop.trace_wrapped({', '.join(texts)}, fn={name}{kind})", None, local, stage="hook")

    # -- JAX's primitives ----------------------------------------------------------------------------------------------

    def _inlined(self, eqn: Any, local: str | None) -> bool:
        """Custom derivative rules have no effect once derivatives are taken: what they are rules of is written."""
        key = _INLINED.get(eqn.primitive.name)
        if key is None or key not in eqn.params:
            return False
        opened, consts = _compat.open_jaxpr(eqn.params[key])
        self.add("note", f"# {eqn.primitive.name}, written as what it calls")
        self.env.update(zip(opened.invars, self.operands(eqn), strict=True))
        self.env.update(zip(eqn.outvars, self.run(opened, consts), strict=True))
        return True

    def _higher(self, eqn: Any, local: str | None) -> bool:
        if not inner_jaxprs(eqn):
            return False
        names = self.names.snapshot()
        for write in (higher.WRITERS.get(eqn.primitive.name), higher.bind_with_functions):
            self.names.restore(names)
            try:
                call = write(self, eqn) if write is not None else None
            except Exception:  # the next way may do
                continue
            if call is not None and (self._checked(eqn, call) or _in_mesh(eqn)) and self._import_home(eqn, call.expression):
                # What a call is for stands above its functions.
                self.rows += [dataclasses.replace(row, origin=row.origin or self._origin(eqn)) for row in call.rows[:1]]
                self.rows += call.rows[1:]
                self._assign(eqn, call.expression, call.groups, local)
                return True
        return False

    def _checked(self, eqn: Any, call: higher.Call) -> bool:
        lines = [("    " * (row.depth - self.depth)) + row.code for row in call.rows]
        parts = call.groups
        if parts is None:
            lines.append(f"return {call.expression}")
        else:
            lines.append(f"made = {call.expression}")
            lines.append("return made" if len(parts) == 1 else "return (*made[0], *made[1])")
        return ops.retraces(eqn, lines, call.texts, self._scope(eqn, call.expression), index=call.index)

    def _plain(self, eqn: Any, local: str | None) -> bool:
        literals = any(isinstance(atom, jex_core.Literal) for atom in eqn.invars)
        numbers = any(atom in self.shared.numbers for atom in eqn.invars if not isinstance(atom, jex_core.Literal))
        for template in ops.spellings(eqn):
            if numbers and template.startswith("{0}."):
                continue  # a Python number has no such method
            for plain in (True, False) if literals else (True,):
                texts = self.operands(eqn, plain=plain)
                expression = ops.fill_in(template, texts)
                groups = self._result_of(eqn, expression, texts)
                if groups is not None and self._import_home(eqn, expression):
                    self._assign(eqn, expression, groups or None, local)
                    return True
        return False

    def _result_of(self, eqn: Any, expression: str, texts: list[str]) -> tuple[int, ...] | None:
        """What the expression of an equation returns: () for an array, (n,) for n of them; None if it is wrong."""
        count = len(eqn.outvars)
        if _in_mesh(eqn):
            return (count,) if eqn.primitive.multiple_results else ()
        scope = self._scope(eqn, expression)
        if eqn.primitive.multiple_results:
            lines = [f"made = {expression}", "assert isinstance(made, (tuple, list))", "return made"]
            if ops.retraces(eqn, lines, texts, scope):
                return (count,)
        return () if count == 1 and ops.retraces(eqn, [f"return {expression}"], texts, scope) else None

    def _scope(self, eqn: Any, expression: str) -> dict[str, Any]:
        scope = {name: value for name, (value, _) in self.shared.opaque.items()}
        scope |= {"jhop": _Jhop, **self.shared.scope}
        home = ops.home_of(eqn.primitive) if ".bind(" in expression else None
        return scope | ({home[1]: eqn.primitive} if home is not None else {})

    def _import_home(self, eqn: Any, expression: str) -> bool:
        """Imports a primitive that is bound by its own name; False if that name is taken."""
        home = ops.home_of(eqn.primitive) if ".bind(" in expression else None
        if home is None or not expression.startswith(f"{home[1]}.bind("):
            return True
        if "." not in home[1]:
            if not self.names.reserve(home[1]):
                return False
            self.shared.scope[home[1]] = eqn.primitive
        self.shared.imports.add(home[0])
        return True


def _in_mesh(eqn: Any) -> bool:
    """Inside shard_map a step cannot be traced by itself, as its axes are known only there."""
    return any(_compat.varying_axes(v.aval) for v in (*eqn.invars, *eqn.outvars))


def _elements(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_elements, value)) + "]"
    return ops.number(value)


def _arithmetic(eqn: Any, texts: list[str]) -> str:
    """One step of arithmetic on lifted numbers, in Python."""
    op = eqn.params["op"]
    operands = [
        text if given is None else ops.number(text)
        for given, text in zip(eqn.params["template"], fill(eqn.params["template"], texts), strict=True)
    ]
    operands = [f"({text})" if text.startswith("-") else text for text in operands]
    if op in INFIX:
        return f"{operands[0]} {INFIX[op]} {operands[1]}"
    # `float(n)` refuses tracers, and the product is the same number.
    return f"{PREFIX[op]}{operands[0]}" if op in PREFIX else f"{operands[0]} * 1.0" if op == "float" else f"{op}({operands[0]})"


def _hook_word(name: str) -> str:
    return "hook" if name == "<lambda>" else name.replace("<lambda>", "hook")


def _known_flat(shared: Shared, hook: HookFn) -> Any:
    """One object per derived hook, however often it occurs."""
    for value, _ in shared.opaque.values():
        if isinstance(value, _FlatHook) and value._hook is hook:
            return value
    return _FlatHook(hook)


def origin_of_eqn(eqn: Any) -> Origin | None:
    frames = user_frames(eqn)
    return origin_of(*frames[0]) if frames else None


def place_of(origin: Origin | str) -> Any:
    """Equal for origins that print shows once."""
    return origin if isinstance(origin, str) else (origin.file, origin.line)


def origin_text(origin: Origin | str) -> str:
    """`clip.py:12 in clip: return ct * scale`, the same wherever the file lies."""
    if isinstance(origin, str):
        return origin
    function = origin.function.rpartition("<locals>.")[2]
    text = f": {origin.text}" if origin.text else ""
    return f"{os.path.basename(origin.file)}:{origin.line} in {function}{text}"


def _local_names(eqns: list[Any]) -> dict[Any, str]:
    """The user's variables, by the first output of the equation that makes their value.

    Transposed and linearised equations have the frames of the forward ones that they come from, so they are left out;
    and of the equations that one expression makes, only the last has its value.
    """
    found: dict[Any, str] = {}
    place: dict[Any, Any] = {}
    for eqn in eqns:
        here = user_frames(eqn)[:1]
        for atom in eqn.invars:
            if not isinstance(atom, jex_core.Literal) and here and place.get(atom) == here:
                found.pop(atom, None)
        if not here or not eqn.outvars:
            continue
        place.update(dict.fromkeys(eqn.outvars, here))
        stack = str(eqn.source_info.name_stack)
        name = None if "transpose(" in stack or "jvp(" in stack else eqn_name(eqn)
        if name is not None:
            found[eqn.outvars[0]] = name
    return found
