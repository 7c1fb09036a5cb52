"""`jhop.jit`: `jax.jit` for functions with hooks. Hooks are inlined, the Python state they touch is lifted.

The function is traced by `jax.jit` itself, with hooks opaque; what comes out goes through the same stages as a captured
backward pass (`_compile.CompiledGraph`).
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jhop import _compat
from jhop._capture import parameter_names
from jhop._close import closes_over_tracer
from jhop._compile import CompiledGraph
from jhop._errors import JhopError
from jhop._graph import GraphModule, Input
from jhop._interp import evaluate
from jhop._source import hook_name
from jhop._static import Static

_TRACE_OPTIONS = {"static_argnums", "static_argnames", "donate_argnums", "donate_argnames", "keep_unused", "inline"}


def jit(fn: Callable[..., Any], *, fullgraph: bool = False, **jax_jit_kwargs: Any) -> Callable[..., Any]:
    """Compiles a JAX function, hooks and their Python state included.

    Args:
        fn: a function of arrays and pytrees that JAX can trace; hooks sit on values inside it (`jhop.hook`).
        fullgraph: whether a hook that cannot be traced is an error. Otherwise the function then runs operation by
            operation, with its hooks on the host, and a warning says so.
        **jax_jit_kwargs: options of `jax.jit`: static_argnums, static_argnames, donate_argnums, donate_argnames,
            keep_unused, inline.

    Returns:
        A function of the same arguments. After each call, what hooks wrote is in the Python objects: ints are ints.

    Raises:
        JhopError: `fn` is not callable, or an option is not supported.
        HookError: at the call, a hook broke its contract.
        Unsupported: at the call, with fullgraph=True, a hook cannot be traced.

    Example:
        >>> import jax, jhop
        >>> class Counter:
        ...     n = 0
        >>> counter = Counter()
        >>> def count(ct):
        ...     counter.n += 1
        >>> step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, count) ** 2).sum()))
        >>> for _ in range(3):
        ...     _ = step(jax.numpy.ones(2))
        >>> counter.n
        3
    """
    if not callable(fn):
        raise JhopError(f"jhop.jit: expected a function, got {type(fn).__name__}.")
    unknown = set(jax_jit_kwargs) - _TRACE_OPTIONS
    if unknown:
        raise JhopError(
            f"jhop.jit: option {sorted(unknown)} is not supported; supported are {sorted(_TRACE_OPTIONS)}. Put a "
            "`jax.jit` with that option inside the function."
        )
    return Jitted(fn, fullgraph, jax_jit_kwargs)


class Jitted:
    """What `jhop.jit` returns."""

    def __init__(self, fn: Callable[..., Any], fullgraph: bool, options: dict[str, Any]):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._fullgraph = fullgraph
        self._options = options
        self._jitted = jax.jit(fn, **options)
        self._static_nums, self._static_names = _statics(fn, options)
        self._cache: dict[Any, tuple[CompiledGraph, Any]] = {}
        self._direct: _Direct | None = None
        self._may_be_direct = not (self._static_nums or self._static_names)
        _jitted.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _compat.transforming() and self._is_inner(args, kwargs):
            return self._jitted(*args, **kwargs)  # part of an outer trace, whose hooks are inlined out there
        direct = self._direct
        if direct is not None and direct.config == _config() and direct.entry.holds():
            try:
                return direct.run(*args, **kwargs)
            except _OtherTypes:
                self._direct, self._may_be_direct = None, False
        static, dynamic = self._split(args, kwargs) if self._static_names or self._static_nums else ((), (args, kwargs))
        flat, tree = jax.tree.flatten(dynamic)
        key = (tree, static, len(args), _config(), *map(_aval_key, flat))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._capture(args, kwargs, flat)
        compiled, out_tree = found
        outs = compiled.run(flat, same_types=True)
        if self._may_be_direct and self._direct is None:
            self._direct = self._make_direct(compiled, out_tree, tree)
        return jax.tree.unflatten(out_tree, outs)

    def _make_direct(self, compiled: CompiledGraph, out_tree: Any, tree: Any) -> _Direct | None:
        """The quick way for a graph that touches no Python state: one `jax.jit`, whose own cache knows the types."""
        entry = compiled.last_entry()
        gm = entry.gm if entry is not None else None
        if gm is None or gm.lifted is None or gm.lifted.slots or gm.lifted.writes or _compat.open_jaxpr(gm.jaxpr)[1]:
            return None
        avals = [v.aval for v in _compat.open_jaxpr(gm.jaxpr)[0].invars]

        def run(*args: Any, **kwargs: Any) -> Any:
            flat, found = jax.tree.flatten((args, kwargs))
            if found != tree or any(not _same_type(x, aval) for x, aval in zip(flat, avals, strict=True)):
                raise _OtherTypes
            return jax.tree.unflatten(out_tree, evaluate(gm.jaxpr, flat))

        run.__name__ = hook_name(self._fn)
        return _Direct(entry, jax.jit(run, **self._options), _config())

    def _is_inner(self, args: Any, kwargs: Any) -> bool:
        """Whether a call is part of what JAX is transforming, and not a computation of its own."""
        leaves = jax.tree.leaves((args, kwargs))
        return (
            _compat.tracing()
            or any(isinstance(leaf, _compat.Tracer) for leaf in leaves)
            or closes_over_tracer(self._fn)
        )

    def _split(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """(static arguments as a key, the others)."""
        static = [
            *((i, Static(arg)) for i, arg in enumerate(args) if i in self._static_nums),
            *((name, Static(kwargs[name])) for name in sorted(kwargs) if name in self._static_names),
        ]
        positional = tuple(arg for i, arg in enumerate(args) if i not in self._static_nums)
        named = {name: value for name, value in kwargs.items() if name not in self._static_names}
        return tuple(static), (positional, named)

    def _capture(self, args: Any, kwargs: Any, flat: list[Any]) -> tuple[CompiledGraph, Any]:
        traced = self._jitted.trace(*args, **kwargs)
        names = _input_names(self._fn, args, kwargs, len(flat))
        name = hook_name(self._fn)
        gm = GraphModule(
            jaxpr=traced.jaxpr, inputs=tuple(Input(name=name) for name in names), name=name, made_by="jit"
        )
        donated = _donated(traced)
        compiled = CompiledGraph(
            gm, backend=functools.partial(_xla, donated=donated), fullgraph=self._fullgraph, dynamic=False,
            where="jhop.jit",
        )  # fmt: skip
        return compiled, jax.tree.structure(traced.out_info)

    def graph(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The graph for these arguments with hooks opaque; `jhop.inline` of it is what runs."""
        traced = self._jitted.trace(*args, **kwargs)
        return GraphModule(
            jaxpr=traced.jaxpr,
            inputs=tuple(Input(name=name) for name in _input_names(self._fn, args, kwargs, len(traced.jaxpr.in_avals))),
            name=hook_name(self._fn), made_by="jit",
        )  # fmt: skip

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def reset(self) -> None:
        """Forgets what was compiled."""
        self._cache.clear()
        self._direct = None


class _Direct(NamedTuple):
    """A compiled version that may be called with the arguments as they are, while its guards hold."""

    entry: Any
    run: Callable[..., Any]
    config: Any


class _OtherTypes(Exception):
    """The quick way was called with arguments that it was not made for."""


def _same_type(value: Any, aval: Any) -> bool:
    found = jax.typeof(value)
    return (found.shape, found.dtype, found.weak_type) == (aval.shape, aval.dtype, aval.weak_type)


_jitted: weakref.WeakSet[Jitted] = weakref.WeakSet()


def _config() -> Any:
    """Settings of JAX that change what a trace gives."""
    return jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision


def _aval_key(leaf: Any) -> Any:
    try:
        return leaf.aval
    except AttributeError:
        return jax.typeof(leaf)


def _xla(gm: GraphModule, example_inputs: list[Any], *, donated: tuple[bool, ...]) -> Callable[..., list[Any]]:
    """The xla backend, with donated inputs."""
    _, consts = _compat.open_jaxpr(gm.jaxpr)
    places = tuple(len(consts) + i for i, given in enumerate(donated) if given)
    return gm.lower_with(functools.partial(jax.jit, donate_argnums=places))


def _input_names(fn: Any, args: Any, kwargs: Any, count: int) -> list[str]:
    names = parameter_names(fn, args, kwargs)
    return names if len(names) == count else [f"arg{i}" for i in range(count)]  # static arguments are no inputs


def _donated(traced: Any) -> tuple[bool, ...]:
    return tuple(bool(getattr(info, "donated", False)) for info in jax.tree.leaves(traced.args_info))


def _statics(fn: Any, options: dict[str, Any]) -> tuple[frozenset[int], frozenset[str]]:
    """Static arguments by position and by name, each completed from the other as `jax.jit` does."""
    nums = options.get("static_argnums", ())
    names = options.get("static_argnames", ())
    nums = {nums} if isinstance(nums, int) else set(nums or ())
    names = {names} if isinstance(names, str) else set(names or ())
    try:
        parameters = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return frozenset(nums), frozenset(names)
    nums = {n % len(parameters) for n in nums}
    positions = {name: i for i, name in enumerate(parameters)}
    if names:
        nums |= {positions[name] for name in names if name in positions}
    names |= {parameters[n] for n in nums}
    return frozenset(nums), frozenset(names)


def reset_jitted() -> None:
    """Forgets what jitted functions compiled."""
    for jitted in list(_jitted):
        jitted.reset()

