"""Writes the equations of a jaxpr as rows: one statement each, in order, nested functions indented.

Rows are what text and HTML both show, so that the two agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

from jhop import _compat
from jhop._boundary import accumulate_grad_p, aot_prologue_p, validate_outputs_p
from jhop._expr import reads_device, to_code
from jhop._graph import NO_INFO, Info
from jhop._interp import inner_jaxprs
from jhop._replay import replay_p
from jhop._scalar import scalar_p
from jhop._source import Origin, describe_hook, hook_name
from jhop._text import _jax_higher as higher
from jhop._text import _jax_ops as ops
from jhop._text import _jax_rows as pieces
from jhop._text._jax_rows import Row, Shared
from jhop._text._jax_source import Names, dtype_text, elements_text, literal_texts, tuple_of, type_text
from jhop._trace_wrapped import trace_wrapped_p

_SMALL = 16  # elements of a constant that is written out
_INLINED = ("custom_jvp_call", "custom_vjp_call", "closed_call", "core_call")


class Writer:
    """Writes one scope. `env` holds the source of every variable that can be read."""

    def __init__(self, shared: Shared, names: Names, depth: int = 1):
        self.shared = shared
        self.names = names
        self.depth = depth
        self.env: dict[Any, str] = {}
        self.rows: list[Row] = []
        self.folded: dict[Any, Any] = {}

    def child(self) -> Writer:
        return Writer(self.shared, Names(self.names), self.depth + 1)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def row(self, kind: str, code: str, **fields: Any) -> Row:
        return Row(kind=kind, code=code, depth=self.depth, **fields)

    def add(self, kind: str, code: str, **fields: Any) -> None:
        self.rows.append(self.row(kind, code, **fields))

    def info(self, variable: Any) -> Info:
        return self.shared.gm.info.get(variable, NO_INFO)

    def opaque(self, value: Any, wanted: str, what: str) -> str:
        """The name of a keyword-only parameter that brings `value`."""
        name = self.shared.names.get(id(value), "")
        if name in self.shared.opaque and self.shared.opaque[name][0] is value:
            return name
        name = self.shared.names[id(value)] = self.names.make_global(wanted)
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
            return literal_texts(atom)[0 if plain else -1]
        except ValueError:
            return self.opaque(atom.val, "constant", f"a constant, {type_text(atom.aval)}")

    def bind(self, variables: Sequence[Any], atoms: Sequence[Any], outside: Writer) -> None:
        """Makes the inputs of a nested function what they are outside of it, Python numbers among them."""
        self.env.update(zip(variables, map(outside.atom, atoms), strict=True))
        for variable, atom in zip(variables, atoms, strict=True):
            if not isinstance(atom, jex_core.Literal) and atom in self.shared.numbers:
                self.shared.numbers.add(variable)

    def operands(self, eqn: Any, *, plain: bool = False) -> list[str]:
        return [self.atom(atom, plain=plain) for atom in eqn.invars]

    def constant(self, variable: Any, value: Any) -> None:
        """Gives a name to a closed-over array: its elements where they are few, else a parameter."""
        try:
            if np.size(value) > _SMALL:
                raise ValueError("too large to be written out")
            dtype = dtype_text(np.asarray(value).dtype)
            code = f"jnp.array({elements_text(np.asarray(value).tolist())}, dtype={dtype})"
        except Exception:
            what = f"a closed-over array, {type_text(variable.aval)}"
            self.env[variable] = self.opaque(value, "constant", what)
            return
        name = self.name_of(variable, "constant")
        self.add("step", f"{name} = {code}", names=name, type=type_text(variable.aval))

    # -- equations -----------------------------------------------------------------------------------------------------

    def run(self, jaxpr: Any, consts: list[Any]) -> list[str]:
        """Writes a jaxpr whose inputs have names; the source of its outputs."""
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            if variable not in self.env:
                self.constant(variable, value)
        self.folded.update(higher.foldable(jaxpr.eqns))
        local = pieces.local_names(jaxpr.eqns)
        for eqn in jaxpr.eqns:
            if eqn.outvars and eqn.outvars[0] in self.folded:
                continue  # written as part of the equation that reads it
            self.equation(eqn, local.get(eqn.outvars[0]) if eqn.outvars else None)
        return [self.atom(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, local: str | None) -> None:
        """Writes one equation in the first way that works; the last way always does."""
        rows, length, names, objects = self.rows, len(self.rows), self.names.snapshot(), len(self.shared.opaque)
        for write in (self._own, self._inlined, self._higher, self._plain):
            try:
                if write(eqn, local):
                    return
            except Exception:  # print must not fail, whatever a primitive's parameters are
                pass
            self.rows = rows
            del rows[length:]
            while len(self.shared.opaque) > objects:
                self.shared.opaque.popitem()
            self.names.restore(names)
        for atom in eqn.invars:
            if not isinstance(atom, jex_core.Literal) and atom in self.folded:
                self.equation(self.folded.pop(atom), None)  # the call did not make it after all
                return self.equation(eqn, local)
        what = f"the equation `{eqn.primitive}`, which has no public spelling"
        name = self.opaque(pieces.OpaqueEquation(eqn), eqn.primitive.name, what)
        self._assign(eqn, f"{name}({', '.join(self.operands(eqn))})", (len(eqn.outvars),), local)

    def _wanted(self, eqn: Any, local: str | None) -> str:
        if eqn.primitive.name in ("jit", "pjit"):
            return higher.function_word(eqn.params["name"])
        if eqn.primitive is scalar_p:
            return str(eqn.params["op"])
        return local or eqn.primitive.name

    def _assign(self, eqn: Any, expression: str, groups: Any, local: str | None, **fields: Any) -> None:
        targets = self._targets(eqn, local)
        if groups is None:
            left = ", ".join(targets)
        else:
            rest = iter(targets)
            parts = [tuple_of([next(rest) for _ in range(count)]) for count in groups]
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
        fields.setdefault("type", ", ".join(type_text(v.aval) for v in eqn.outvars))
        self.add("step", code, names=", ".join(targets), origin=origin, **fields)

    def _origin(self, eqn: Any) -> Origin | str | None:
        known = self.info(eqn.outvars[0]).origin if eqn.outvars else None
        return known if isinstance(known, (Origin, str)) else pieces.origin_of_eqn(eqn)

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
            kind = eqn.params["kind"].__name__
            self._assign(eqn, pieces.arithmetic(eqn, self.operands(eqn, plain=True)), None, local, type=kind)
        elif primitive is replay_p and not reads_device(eqn.params["expr"]):
            self.shared.numbers.update(eqn.outvars)
            numbers = self.operands(eqn, plain=True)
            self.shared.imports.add("from functools import reduce")
            code = to_code(eqn.params["expr"], numbers.__getitem__)
            self._assign(eqn, code, None, local, type=eqn.params["kind"].__name__)
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
        one, further = jax.tree.structure(0), jax.tree.structure((0,) * (len(texts) - 1))
        own = hook.key[0] == "hook" and hook.key[2:4] == (one, further)
        value = hook.base if own else pieces.known_flat(self.shared, hook)
        what = describe_hook(hook.base) if own else f"{hook.name}, of {describe_hook(hook.base)}"
        name = self.opaque(value, pieces.hook_word(hook_name(hook.base) if own else hook.name), what)
        kind = "" if hook.kind == "hook" else f", kind={hook.kind!r}"
        self.shared.imports.add("import jhop")
        self._assign(eqn, f"jhop.trace_wrapped({', '.join(texts)}, fn={name}{kind})", None, local, stage="hook")

    # -- JAX's primitives ----------------------------------------------------------------------------------------------

    def _inlined(self, eqn: Any, local: str | None) -> bool:
        """Custom derivative rules have no effect once derivatives are taken: what they are rules of is written."""
        if eqn.primitive.name not in _INLINED:
            return False
        opened, consts = _compat.open_jaxpr(eqn.params["call_jaxpr"])
        self.add("note", f"# {eqn.primitive.name}, written as what it calls")
        self.bind(opened.invars, eqn.invars, self)
        self.env.update(zip(eqn.outvars, self.run(opened, consts), strict=True))
        return True

    def _higher(self, eqn: Any, local: str | None) -> bool:
        if not inner_jaxprs(eqn):
            return False
        names = self.names.snapshot()
        own = higher.WRITERS.get(eqn.primitive.name)
        # A loop that is not traced to the same equation, as JAX hoists what does not change in it, is still the loop.
        ways = [(own, False), (own if eqn.primitive.name in ("scan", "while") else None, True)]
        for write, loose in [*ways, (higher.bind_with_functions, False)]:
            self.names.restore(names)
            try:
                call = write(self, eqn) if write is not None else None
            except Exception:  # the next way may do
                continue
            if call is None or not (pieces.in_mesh(eqn) or self._checked(eqn, call, loose=loose)):
                continue
            if self._import_home(eqn, call.expression):
                if loose:
                    self.add("note", "# traced to a loop in which what does not change is a constant")
                self._call(eqn, call, local)
                return True
        return False

    def _call(self, eqn: Any, call: higher.Call, local: str | None) -> None:
        """Writes nested functions and their call; the origin stands above them, and they are a hook's if it is."""
        stage = "hook" if eqn.outvars and self.info(eqn.outvars[0]).stage.startswith("hook") else ""
        rows = [dataclasses.replace(row, stage=row.stage or stage) for row in call.rows]
        if rows:
            rows[0] = dataclasses.replace(rows[0], origin=rows[0].origin or self._origin(eqn))
        self.rows += rows
        self._assign(eqn, call.expression, call.groups, local)

    def _checked(self, eqn: Any, call: higher.Call, *, loose: bool) -> bool:
        lines = [("    " * (row.depth - self.depth)) + row.code for row in call.rows]
        parts = call.groups
        if parts is None:
            lines.append(f"return {call.expression}")
        else:
            lines.append(f"made = {call.expression}")
            lines.append("return made" if len(parts) == 1 else "return (*made[0], *made[1])")
        scope = self._scope(eqn, call.expression)
        return ops.retraces(eqn, lines, call.texts, scope, call.index, loose=loose)

    def _plain(self, eqn: Any, local: str | None) -> bool:
        literals = any(isinstance(atom, jex_core.Literal) for atom in eqn.invars)
        numbers = any(atom in self.shared.numbers for atom in eqn.invars if not isinstance(atom, jex_core.Literal))
        for template in ops.spellings(eqn):
            if numbers and template.startswith("{0}."):
                continue  # a Python number has no such method
            for plain in (True, False) if literals else (True,):
                texts = self.operands(eqn, plain=plain)
                expression = ops.fill_in(template, texts)
                key = ops.check_key(eqn, template, texts)
                if key is None or key not in self.shared.checked:
                    self.shared.checked[key] = self._result_of(eqn, expression, texts)
                groups = self.shared.checked[key]
                if groups is not None and self._import_home(eqn, expression):
                    self._assign(eqn, expression, groups or None, local)
                    return True
        return False

    def _result_of(self, eqn: Any, expression: str, texts: list[str]) -> tuple[int, ...] | None:
        """What the expression of an equation returns: () for an array, (n,) for n of them; None if it is wrong."""
        count = len(eqn.outvars)
        if pieces.in_mesh(eqn):
            return (count,) if eqn.primitive.multiple_results else ()
        scope = self._scope(eqn, expression)
        if eqn.primitive.multiple_results:
            lines = [f"made = {expression}", "assert isinstance(made, (tuple, list))", "return made"]
            if ops.retraces(eqn, lines, texts, scope):
                return (count,)
        return () if count == 1 and ops.retraces(eqn, [f"return {expression}"], texts, scope) else None

    def _scope(self, eqn: Any, expression: str) -> dict[str, Any]:
        scope = {name: value for name, (value, _) in self.shared.opaque.items()}
        scope |= {"jhop": pieces.Jhop, **self.shared.scope}
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
