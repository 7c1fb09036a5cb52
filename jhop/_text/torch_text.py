"""The text of a backward graph in the words of PyTorch's compiled autograd.

Two name spaces are followed at once, as the text is the product of two tracers: names that the captured graph has in
PyTorch (`getitem_9`: three inputs and six sizes come before it), and names that Dynamo gives while it traces that
graph's source, where a value is renamed once, to the first local variable that it is stored to. Equations become
statements one by one: what each means is a matter of its primitive, what it is called one of `GraphModule.info`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex_core

from jhop import _compat
from jhop._boundary import accumulate_grad_p, aot_prologue_p, validate_outputs_p
from jhop._expr import COMPARE, INFIX, PREFIX
from jhop._graph import NO_INFO, GraphModule, Info
from jhop._scalar import apply_step, fill, scalar_p
from jhop._text._analysis import needed_values, resolve, state_outputs, tangent_values
from jhop._text._aten import ATEN, COMMUTATIVE, aten_name, aten_target
from jhop._text._namespace import Namespace, snake_case
from jhop._text._statements import RawCode, Stmt, annotated_symbols, print_module, remove_unused, share_symbols
from jhop._text._steps import CALLS, Value, steps_of
from jhop._text._symbols import ShapeEnv, SymExpr, constant, render, symbol
from jhop._text._words import call_of, device, dtype_code, extra_args, python_value, tensor_type

_OPS = "torch__dynamo_compiled_autograd_ops_"
_TOKENS = {
    **INFIX, **PREFIX, **COMPARE, "getitem": "getitem", "matmul": "@", "and": "&", "or": "|", "xor": "^",
}  # fmt: skip
_REFLECTED = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"}


class Lazy:
    """An annotation whose symbols are looked up when the text is made, as later statements may settle them."""

    def __init__(self, make: Any):
        self._make = make

    def __str__(self) -> str:
        return self._make()


class BackwardPrinter:
    """Turns one backward graph into statements."""

    def __init__(self, gm: GraphModule):
        self._gm = gm
        self._backward = gm.backward
        self._jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
        self._steps, self._same = steps_of(self._jaxpr, self._is_aot)
        self._space = Namespace()
        self._env = ShapeEnv()
        self._value: dict[Any, Any] = {}  # variable -> Stmt, or a Python constant
        self._symbol: dict[Any, SymExpr] = {}  # variable of a lifted number -> expression
        self._placeholders: list[Stmt] = []
        self._body: list[Stmt] = []
        self._sizes: list[Any] = []  # per lifted size, its Stmt or number
        self._checks = 0
        self._items: dict[Any, Stmt] = {}
        self._needed = needed_values(gm, self._steps, self._same)
        self._moving = tangent_values(self._steps)

    def text(self) -> str:
        self._inputs()
        for eqn in self._steps:
            self._equation(eqn)
        output = self._output()
        stmts = [*self._placeholders, *self._body, output]
        bound = {}
        for stmt in self._placeholders:
            name = stmt.target
            if name in self._env.values and self._env.resolve(name).name == name:
                bound[name] = stmt
        stmts = share_symbols(stmts, bound)
        dims = [str(dim) for v in self._jaxpr.invars[: len(self._backward.shapes)] for dim in v.aval.shape]

        def symbols_of(stmt: Stmt) -> list[str]:
            return dims if stmt.target == "L_inputs_" else annotated_symbols(stmt)

        return print_module(remove_unused(stmts, symbols_of=symbols_of), class_name=self._gm.name)

    # -- inputs --------------------------------------------------------------------------------------------------------

    def _placeholder(self, target: str, **fields: Any) -> Stmt:
        stmt = Stmt("placeholder", self._space.make(snake_case(target)), target, **fields)
        self._placeholders.append(stmt)
        return stmt

    def _inputs(self) -> None:
        shapes = self._backward.shapes
        for index, shape in enumerate(shapes):
            for axis, size in enumerate(shape):
                self._env.input_dim(f"L['inputs'][{index}].size()[{axis}]", size)
        inputs = self._placeholder("L_inputs_", placeholder_kind="list")
        for index, variable in enumerate(self._jaxpr.invars[: len(shapes)]):
            stmt = self._add("call_function", "getitem", "getitem", (inputs, index), variable.aval, origin="inputs")
            self._value[variable] = stmt
        for number, variable in enumerate(self._jaxpr.constvars):
            self._value[variable] = RawCode(f"self._tensor_constant{number}")
        self._lift_sizes()
        for variable, given in zip(self._jaxpr.invars[len(shapes) :], self._gm.inputs[len(shapes) :], strict=True):
            self._state_input(variable, given)

    def _lift_sizes(self) -> None:
        """A statement per size that a check of gradients reads; those that nothing reads are not passed at all."""
        checks = [eqn for eqn in self._steps if eqn.primitive is validate_outputs_p]
        counts = [sum(v.aval.ndim for v in eqn.invars) for eqn in checks]
        begins = zip(self._backward.checked, counts, strict=True)
        read = [i for start, count in begins for i in range(start, start + count)]
        for number, index in enumerate(read):
            size = self._backward.sizes[index]
            if size in (0, 1):
                self._sizes.append(size)
                continue
            source = f"L['sizes'][{number}].size()[1]"
            expr = self._env.fresh(source, size, nonnegative=True)
            text = Lazy(lambda expr=expr: self._render(expr))
            self._placeholder(str(expr), annotation=Lazy(lambda text=text: f"Sym({text})"))
            holder = self._placeholder(f"L_sizes_{number}_", annotation=Lazy(lambda text=text: f"f32[0, {text}]"))
            stmt = Stmt("call_method", self._space.make("size"), "size", (holder, 1), origin=("size", number))
            stmt.annotation = Lazy(lambda text=text: f"Sym({text})")
            self._body.append(stmt)
            self._sizes.append((stmt, expr))

    def _state_input(self, variable: Any, given: Any) -> None:
        slot = next(s for s in self._gm.lifted.slots if s.path == given.source)
        if given.source.startswith("G") and given.number is not None:
            self._value[variable] = slot.value  # PyTorch folds numbers in globals into the graph
            return
        target = re.sub(r"[^0-9a-zA-Z]+", "_", given.source)
        if given.number is int:
            expr = self._symbol[variable] = self._env.fresh(given.source, slot.value)
            stmt = self._placeholder(target, annotation=Lazy(lambda: f"Sym({self._render(expr)})"))
        elif given.number is float:
            self._symbol[variable] = self._env.fresh(given.source, slot.value, prefix="zf")
            stmt = self._placeholder(target, annotation="f64[]")
        else:
            stmt = self._placeholder(target, annotation=tensor_type(variable.aval))
        self._value[variable] = stmt

    # -- statements ----------------------------------------------------------------------------------------------------

    def _render(self, expr: SymExpr) -> str:
        return render(expr, self._env.resolve)

    def _add(self, op: str, auto: str, target: str, args: tuple[Any, ...], aval: Any = None, **fields: Any) -> Stmt:
        annotation = fields.pop("annotation", None if aval is None else tensor_type(aval))
        stmt = Stmt(op, self._space.make(snake_case(auto)), target, args, annotation=annotation, **fields)
        self._body.append(stmt)
        return stmt

    def _rename(self, stmt: Stmt, want: str | None) -> None:
        if want is not None:
            stmt.name = self._space.rename(stmt.name, want)

    def _read(self, atom: Any) -> Any:
        atom = resolve(atom, self._same)
        return python_value(atom.val) if isinstance(atom, jex_core.Literal) else self._value[atom]

    def _is_aot(self, eqn: Any) -> bool:
        return any(self._info(v).aot is not None for v in eqn.outvars)

    def _info(self, variable: Any) -> Info:
        return self._gm.info.get(variable, NO_INFO)

    def _equation(self, eqn: Any) -> None:
        primitive = eqn.primitive
        if not eqn.outvars:  # an effect, such as jax.debug.print
            self._function(eqn, ("effect", len(self._body)))
            return
        if primitive is validate_outputs_p:
            self._validate(eqn)
        elif primitive is aot_prologue_p:
            self._prologue(eqn)
        elif primitive is accumulate_grad_p:
            self._accumulate(eqn)
        elif primitive is scalar_p:
            self._scalar(eqn)
        elif self._info(eqn.outvars[0]).aot is not None:
            self._aot(eqn)
        elif self._needed.intersection(eqn.outvars):
            self._hook_step(eqn)

    def _validate(self, eqn: Any) -> None:
        origin = self._info(eqn.outvars[0]).origin
        start, self._checks = self._checks, self._checks + sum(v.aval.ndim for v in eqn.invars)
        rest = iter(self._sizes[start:])
        described = []
        for variable in eqn.invars:
            dims: list[Any] = []
            for dim in variable.aval.shape:
                size = next(rest)
                if isinstance(size, tuple):
                    stmt, expr = size
                    self._env.unify(expr, _sym(dim))
                    dims.append(stmt)
                else:
                    dims.append(size)
            code = dtype_code(variable.aval.dtype)
            described.append(((None, None, RawCode(device()), code, 0, None), dims, False, code))
        args = ([self._read(v) for v in eqn.invars], described)
        stmt = self._add("call_function", "validate_outputs", f"{_OPS}validate_outputs", args, origin=origin)
        count = len(self._backward.shapes) + len(self._backward.sizes)
        self._unpack(stmt, eqn, origin, [f"getitem_{count + index}" for index in range(len(eqn.outvars))])

    def _prologue(self, eqn: Any) -> None:
        info = self._info(eqn.outvars[0])
        n_saved, prefix = eqn.params["n_saved"], _aot_prefix(info)
        saved, cts = eqn.invars[:n_saved], eqn.invars[n_saved:]
        args = (tuple(self._read(v) for v in saved), [], *(self._read(v) for v in cts))
        name = "call_aot_bwd_prologue"
        seen = sum(stmt.target.startswith(f"torch__dynamo_compiled_autograd_{name}") for stmt in self._body)
        target = f"torch__dynamo_compiled_autograd_{name}" + (f"_{seen}" if seen else "")
        origin = "prologue", prefix
        stmt = self._add("call_function", name, target, args, origin=origin)
        self._unpack(stmt, eqn, origin, [f"{prefix}{self._info(variable).name}" for variable in eqn.outvars])

    def _unpack(self, stmt: Stmt, eqn: Any, origin: Any, names: Sequence[str | None]) -> None:
        """Takes the results of an equation from the tuple that `stmt` makes, one statement each."""
        for index, (variable, name) in enumerate(zip(eqn.outvars, names, strict=True)):
            item = self._add("call_function", "getitem", "getitem", (stmt, index), variable.aval, origin=origin)
            self._rename(item, name)
            self._value[variable] = item

    def _aot(self, eqn: Any) -> None:
        """A step of a compiled function's backward: an operator of PyTorch's, named by its joint graph."""
        info = self._info(eqn.outvars[0])
        name = eqn.primitive.name
        atoms = list(eqn.invars)
        if name in COMMUTATIVE and len(atoms) == 2 and self._moves(atoms[1]) and not self._moves(atoms[0]):
            atoms.reverse()  # PyTorch's derivative formulas are written `grad * other`
        args = tuple(self._read(atom) for atom in atoms)
        function, args = call_of(eqn, args) or ("", args)
        target = "torch.einsum" if function == "einsum" else aten_target(name)
        args += extra_args(eqn)
        operator, overload = ATEN.get(name, (name, "default"))
        for variable in eqn.outvars:
            stmt = self._add(
                "call_function", f"{operator}_{overload}".lower(), target, args, variable.aval,
                origin=info.origin,
            )  # fmt: skip
            self._rename(stmt, f"{_aot_prefix(info)}{self._info(variable).name}")
            self._value[variable] = stmt

    def _moves(self, atom: Any) -> bool:
        return not isinstance(atom, jex_core.Literal) and atom in self._moving

    def _accumulate(self, eqn: Any) -> None:
        ct, leaf, *old = (self._read(v) for v in eqn.invars)
        args = ([ct], leaf, old[0] if old else None, False)
        origin = ("accumulate", len(self._body))
        stmt = self._add("call_function", "accumulate_grad", f"{_OPS}AccumulateGrad", args, origin=origin)
        (variable,) = eqn.outvars
        self._value[variable] = self._add(
            "call_function", "getitem", "getitem", (stmt, 0), variable.aval, origin=origin
        )

    def _scalar(self, eqn: Any) -> None:
        (variable,) = eqn.outvars
        operands = fill(eqn.params["template"], [self._read(v) for v in eqn.invars])
        op = eqn.params["op"]
        if not any(isinstance(item, Stmt) for item in operands):
            self._value[variable] = apply_step(op, operands)
            return
        exprs = fill(eqn.params["template"], [self._symbol.get(v, self._value[v]) for v in eqn.invars])
        origin = self._info(variable).origin
        operands = [self._item(v, origin) if isinstance(v, Stmt) else v for v in operands]
        expr = self._symbol[variable] = _apply_symbolic(op, exprs)
        token = INFIX.get(op) or PREFIX.get(op) or f"torch.sym_{op}"
        self._value[variable] = self._add(
            "call_function", op.rstrip("_"), token, tuple(operands), origin=origin,
            annotation=Lazy(lambda: f"Sym({self._render(expr)})"),
        )  # fmt: skip

    def _item(self, stmt: Stmt, origin: Any) -> Stmt:
        """A float of Python state arrives as a tensor; its first reader takes the number out."""
        if stmt.op != "placeholder" or stmt.annotation != "f64[]" or stmt.target == "L_inputs_":
            return stmt
        if stmt not in self._items:
            variable = next(v for v, value in self._value.items() if value is stmt)
            expr = self._symbol[variable]
            self._items[stmt] = self._add(
                "call_method", "item", "item", (stmt,), origin=origin,
                annotation=Lazy(lambda: f"Sym({self._render(expr)})"),
            )  # fmt: skip
        return self._items[stmt]

    def _hook_step(self, eqn: Any) -> None:
        variable = eqn.outvars[0]
        info = self._info(variable)
        origin = info.origin
        if info.operator is not None:
            name = info.operator.name
            operands = [self._operand(item, origin) for item in info.operator.operands]
            if name.startswith("r") and name[1:] in _REFLECTED:
                name, operands = name[1:], operands[::-1]
            target = _TOKENS.get(name) or f"torch.{name}"
            stmt = self._add("call_function", name, target, tuple(operands), variable.aval, origin=origin)
        else:
            stmt = self._function(eqn, origin)
        if len(eqn.outvars) == 1:
            self._rename(stmt, info.name)
            self._value[variable] = stmt
            return
        self._unpack(stmt, eqn, origin, [self._info(other).name for other in eqn.outvars])

    def _function(self, eqn: Any, origin: Any) -> Stmt:
        """A step that no Python operator made: a function of the `torch` name space where it has one."""
        name = eqn.params["name"].strip("_") if eqn.primitive.name in CALLS else aten_name(eqn.primitive.name)
        args = tuple(self._operand(atom, origin) for atom in eqn.invars)
        aval = eqn.outvars[0].aval if len(eqn.outvars) == 1 else None
        name, args = call_of(eqn, args) or (name, args)
        if eqn.primitive.name == "reduce_sum" and len(eqn.params["axes"]) == eqn.invars[0].aval.ndim:
            return self._add("call_method", "sum", "sum", args, aval, origin=origin)
        return self._add("call_function", name, f"torch.{name}", args + extra_args(eqn), aval, origin=origin)

    def _operand(self, item: Any, origin: Any) -> Any:
        if _compat.is_dim_expr(item):
            self._space.make("size")  # PyTorch reads the whole shape and takes one entry
            self._space.make("getitem")
            return self._dim(item)
        if isinstance(item, (jex_core.Var, jex_core.Literal, Value)):
            value = self._read(item)
            return self._item(value, origin) if isinstance(value, Stmt) else value
        return python_value(item)

    def _dim(self, dim: Any) -> Any:
        wanted = self._render(_sym(dim))
        for size in self._sizes:
            if isinstance(size, tuple) and self._render(size[1]) == wanted:
                return size[0]
        return RawCode(str(dim))

    # -- outputs -------------------------------------------------------------------------------------------------------

    def _output(self) -> Stmt:
        grads = self._backward.grads
        n = self._gm.lifted.n_outs if self._gm.lifted is not None else len(self._jaxpr.outvars)
        leaves = sorted(zip(grads, self._jaxpr.outvars[: len(grads)], strict=True), key=lambda pair: pair[0])
        values = [self._read(v) for _, v in leaves] + [self._read(v) for v in self._jaxpr.outvars[len(grads) : n]]
        for index in state_outputs(self._gm, self._steps, n):
            value = self._read(self._jaxpr.outvars[index])
            if not isinstance(value, Stmt) or value.op == "placeholder":
                continue  # a constant, or what can be read from where it came from
            if _is_float(self._symbol.get(self._jaxpr.outvars[index])):
                value = self._add(
                    "call_function", "scalar_tensor", "torch.scalar_tensor", (value,), annotation="f64[]",
                    kwargs={"dtype": RawCode("torch.float64")}, origin=("scalar_tensor", index),
                )  # fmt: skip
            if value not in values:
                values.append(value)
        return Stmt("output", "output", "output", (tuple(values),))


def _is_float(expr: SymExpr | None) -> bool:
    return expr is not None and expr.is_float


def _aot_prefix(info: Info) -> str:
    number, use = info.aot or (0, 0)
    return f"aot{number}_" if use == 0 else f"aot{number}_{use}_"


def _sym(dim: Any) -> Any:
    """A dimension as an expression of the printer's; jhop's symbols are single names."""
    return symbol(str(dim), nonnegative=True) if _compat.is_dim_expr(dim) else constant(int(dim))


def _apply_symbolic(op: str, operands: list[Any]) -> SymExpr:
    lifted = [item if isinstance(item, SymExpr) else constant(item) for item in operands]
    return apply_step(op, lifted)
