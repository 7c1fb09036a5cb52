"""`GraphModule`: a traced graph that is callable, printable, and knows where each of its values came from.

Every stage of the pipeline takes one and gives another: capture makes one with opaque hooks, inlining one without
hooks and with lifted state, a backend turns it into a callable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.extend.core as jex_core

from jhop import _compat
from jhop._contract import HookFn
from jhop._errors import JhopError
from jhop._interp import evaluate, inner_jaxprs, sizes_of, symbol_places, with_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """A Python operator that the user's code applied: `name` as in the `operator` module, operands as written.

    An operand is a jaxpr variable, a symbolic dimension, or the Python value itself, so that `g * 2` and `g * 2.0`
    stay apart although both are one `mul` equation.
    """

    name: str
    operands: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of a value besides its equation.

    Attributes:
        name: the user's own name for it: a local variable, or a parameter.
        origin: where it was computed; equal origins belong together in print.
        operator: the Python operator that made it, if one did.
        aot: (id, use) of the compiled function whose backward it belongs to.
        stage: which step of a backward pass made it ("hook", ...).
    """

    name: str | None = None
    origin: Hashable = None
    operator: Operator | None = None
    aot: tuple[int, int] | None = None
    stage: str = ""

    def renamed(self, new: Mapping[Any, Any]) -> Info:
        """The same of a value that was computed alike from others: `new` has those by the variables of these."""
        if self.operator is None:
            return self
        operands = (new.get(item, item) if isinstance(item, jex_core.Var) else item for item in self.operator.operands)
        return dataclasses.replace(self, operator=Operator(name=self.operator.name, operands=tuple(operands)))


NO_INFO = Info()

# What makes text of a graph, by name. `jhop._text` fills it: printers know graphs, graphs do not know printers.
PRINTERS: dict[str, Callable[[GraphModule], str]] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a graph: `role` is "array" for values given by the caller, "state" for lifted Python state."""

    name: str
    role: str = "array"
    source: str = ""
    number: type | None = None  # int or float for a lifted Python number


def hooks_in(jaxpr: Any) -> list[tuple[HookFn, Any]]:
    """(hook, equation) for what is opaque in a jaxpr, at any depth, in the order of the equations."""
    found: list[tuple[HookFn, Any]] = []
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        hook = eqn.params.get("fn")
        if isinstance(hook, HookFn):
            found.append((hook, eqn))
        for inner in inner_jaxprs(eqn):
            found += hooks_in(inner)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GraphModule:
    """A traced function.

    Attributes:
        jaxpr: the closed jaxpr; inputs are flat.
        inputs: one description per input.
        info: per variable of the jaxpr, see `Info`.
        name: of the class or function in print.
        made_by: the stage that made it.
        in_tree, out_tree: structure of arguments and results; None where both are flat.
        backward: what is known of the backward pass that this is, if it is one (`jhop._capture.Backward`).
        lifted: the Python state that is lifted, if any (`jhop._inline.Lifted`).
        callbacks: hooks that the graph calls back inside loops, as they cannot be traced (`jhop._cut.Callback`).
        checks: what there is to look at after each run, if checks are among the outputs (`jhop._discharge.Checks`).
        shapes: symbols of symbolic dimensions, as (symbol, input index, axis); found in the jaxpr where not given.

    Example:
        >>> import jax.numpy as jnp, jhop
        >>> gm = jhop.make_fx(lambda ct: jhop.trace_wrapped(ct, fn=lambda ct: ct * 3.0))(jnp.ones(2))
        >>> gm(jnp.ones(2)).tolist()
        [3.0, 3.0]
    """

    jaxpr: Any
    inputs: tuple[Input, ...]
    info: Mapping[Any, Info] = dataclasses.field(default_factory=dict, repr=False)
    name: str = "GraphModule"
    made_by: str = "capture"
    in_tree: Any = None
    out_tree: Any = None
    backward: Any = None
    lifted: Any = None
    callbacks: tuple[Any, ...] = ()
    checks: Any = None
    shapes: tuple[tuple[str, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.shapes:
            object.__setattr__(self, "shapes", symbol_places(self._avals()))

    @functools.cached_property
    def hooks(self) -> list[tuple[HookFn, Any]]:
        """(hook, equation) for each opaque hook, as `hooks_in` finds them."""
        return hooks_in(self.jaxpr)

    def _avals(self) -> list[Any]:
        return [v.aval for v in _compat.open_jaxpr(self.jaxpr)[0].invars]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph, one equation at a time: hooks that are still opaque run with the values that they get.

        Args:
            *args: as the captured function took them, or flat inputs (arrays, then lifted numbers and arrays).

        Returns:
            As the captured function returned it, or the flat list of outputs.

        Raises:
            JhopError: the arguments do not have the captured structure.
        """
        flat = self.flatten(args, kwargs)
        self.check(flat)
        return self.unflatten(evaluate(self.jaxpr, flat, self.rule_for(flat)))

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flat inputs from arguments, checked against what was captured."""
        if self.in_tree is None:
            flat, expected = list(args), len(self.inputs)
            if kwargs or len(flat) != expected:
                names = ", ".join(item.name for item in self.inputs)
                raise JhopError(f"{self.name}: expected {expected} inputs ({names}), got {len(flat)}.")
            return flat
        flat, tree = jax.tree.flatten((args, kwargs))
        if tree != self.in_tree:
            raise JhopError(
                f"{self.name}: expected arguments of the structure that it was captured with, {self.in_tree}, "
                f"got {tree}. Capture again for other arguments."
            )
        return flat

    def check(self, flat: list[Any]) -> None:
        """Raises JhopError where an input is not of the type that was captured."""
        jaxpr, _ = _compat.open_jaxpr(self.jaxpr)
        for value, variable, given in zip(flat, jaxpr.invars, self.inputs, strict=True):
            aval = variable.aval
            if given.number is not None:
                continue
            try:
                found = jax.typeof(value)
            except TypeError:
                raise JhopError(
                    f"{self.name}: expected input `{given.name}` as an array of type {aval.str_short()}, got "
                    f"{type(value).__name__}."
                ) from None
            shape, dtype = found.shape, found.dtype
            same = len(shape) == aval.ndim and all(
                _compat.is_dim_expr(dim) or dim == size for dim, size in zip(aval.shape, shape, strict=True)
            )
            if not same or (dtype != aval.dtype and not aval.weak_type):
                raise JhopError(
                    f"{self.name}: expected input `{given.name}` of type {aval.str_short()}, as it was captured, got "
                    f"{found.str_short()}. Capture again for other types."
                )
        if self.shapes:
            self._check_sizes([jax.numpy.shape(value) for value in flat])

    def _check_sizes(self, shapes: list[Any]) -> None:
        """Raises JhopError where one symbol would stand for two sizes."""
        sizes = self._sizes(shapes)
        for aval, shape, given in zip(self._avals(), shapes, self.inputs, strict=True):
            for axis, dim in enumerate(getattr(aval, "shape", ())):
                known = _compat.dim_symbols(dim) <= sizes.keys()
                if known and (wanted := _compat.evaluate_dim(dim, sizes)) != shape[axis]:
                    told = ", ".join(f"{name} = {sizes[name]}" for name in sorted(_compat.dim_symbols(dim)))
                    raise JhopError(
                        f"{self.name}: expected axis {axis} of input `{given.name}` as {dim} = {wanted}, where other "
                        f"inputs say {told}, got {shape[axis]}."
                    )

    def unflatten(self, outs: list[Any]) -> Any:
        return outs if self.out_tree is None else jax.tree.unflatten(self.out_tree, outs)

    def rule_for(self, flat: list[Any], *, derivatives: bool = False) -> Any:
        """The evaluation rule for these inputs: it fills in the sizes of symbolic dimensions. See `with_sizes`."""
        if not self.shapes:
            return None
        return with_sizes(self._sizes([jax.numpy.shape(value) for value in flat]), derivatives=derivatives)

    def _sizes(self, shapes: list[Any]) -> dict[str, Any]:
        return sizes_of(self._avals(), self.shapes, shapes)

    def with_numbers(self, flat: list[Any]) -> GraphModule:
        """The graph for the sizes of these inputs, without symbols; itself if it has none."""
        if not self.shapes:
            return self
        sizes = self._sizes([jax.numpy.shape(value) for value in flat])
        avals = [
            aval.update(shape=tuple(_compat.evaluate_dim(dim, sizes) for dim in aval.shape)) for aval in self._avals()
        ]
        jaxpr = jax.make_jaxpr(lambda *values: evaluate(self.jaxpr, list(values), with_sizes(sizes)))(*avals)
        return dataclasses.replace(self, jaxpr=jaxpr, info={}, shapes=())

    # -- print ---------------------------------------------------------------------------------------------------------

    def print_readable(self, print_output: bool = True, *, dialect: str = "torch") -> str:
        """The graph as text, printed unless `print_output` is False.

        Args:
            dialect: "torch" for the text of PyTorch's compiled autograd, "jax" for Python code that runs.

        Raises:
            JhopError: there is no such dialect.
        """
        if dialect not in ("torch", "jax"):
            raise JhopError(f"print_readable: unknown dialect {dialect!r}. Expected 'torch' or 'jax'.")
        text = PRINTERS[dialect](self)
        if print_output:
            print(text)
        return text

    @property
    def code(self) -> str:
        """The graph as Python source over `jax`, `jnp` and `lax`."""
        return self.print_readable(False, dialect="jax")

    @property
    def graph(self) -> Graph:
        """The graph as a list of nodes."""
        return Graph(self)

    def __str__(self) -> str:
        return self.code

    # `jax.jit(gm)` asks a callable for these; of one that lacks them it takes the text, which is the whole program.

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __code__(self) -> Any:
        return type(self).__call__.__code__

    def _repr_html_(self) -> str:
        return PRINTERS["html"](self)


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """One input, equation or output. `args` are the names of the nodes it reads, or the values of literals."""

    op: str
    name: str
    target: str
    args: tuple[Any, ...]
    aval: Any
    info: Info

    def __repr__(self) -> str:
        return self.name


class Graph:
    """The nodes of a `GraphModule`, in order.

    Example:
        >>> import jax.numpy as jnp, jhop
        >>> gm = jhop.make_fx(lambda ct: ct * 2.0)(jnp.ones(3))
        >>> [node.op for node in gm.graph.nodes]
        ['placeholder', 'call', 'output']
    """

    def __init__(self, gm: GraphModule):
        jaxpr, _ = _compat.open_jaxpr(gm.jaxpr)
        names: dict[Any, str] = {}
        taken: dict[str, int] = {}  # names, with the last number that was tried behind each
        self.nodes: list[GraphNode] = []

        def name_of(variable: Any, wanted: str) -> str:
            base = gm.info.get(variable, NO_INFO).name or wanted
            name, count = base, taken.get(base, 0)
            while name in taken:
                count += 1
                name = f"{base}_{count}"
            taken[base] = count
            taken.setdefault(name, 0)
            names[variable] = name
            return name

        def atom(item: Any) -> Any:
            return item.val if isinstance(item, jex_core.Literal) else names[item]

        for variable in jaxpr.constvars:
            self.nodes.append(GraphNode("constant", name_of(variable, "const"), "", (), variable.aval, NO_INFO))
        for variable, given in zip(jaxpr.invars, gm.inputs, strict=True):
            info = gm.info.get(variable, NO_INFO)
            name = name_of(variable, given.name)
            self.nodes.append(GraphNode("placeholder", name, given.source, (), variable.aval, info))
        for eqn in jaxpr.eqns:
            args = tuple(atom(item) for item in eqn.invars)
            for variable in eqn.outvars:
                name = name_of(variable, eqn.primitive.name)
                info = gm.info.get(variable, NO_INFO)
                self.nodes.append(GraphNode("call", name, eqn.primitive.name, args, variable.aval, info))
        self.nodes.append(GraphNode("output", "output", "", tuple(map(atom, jaxpr.outvars)), None, NO_INFO))
