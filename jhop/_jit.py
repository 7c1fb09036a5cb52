"""`jhop.jit`: `jax.jit` for functions with hooks. Hooks are inlined, the Python state they touch is lifted.

The function is traced by `jax.jit` itself, with hooks opaque; what comes out goes through the same stages as a captured
backward pass (`_compile.CompiledGraph`), and runs as one `jax.jit` of the same arguments, with the same options.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jhop import _aot, _compat, _state
from jhop._capture import parameter_names
from jhop._close import closes_over_tracer
from jhop._compile import MAX_ENTRIES, CompiledGraph
from jhop._errors import JhopError
from jhop._explain import StandsForFunction, hooks_of
from jhop._graph import GraphModule, Input
from jhop._guards import Guards, all_hold
from jhop._history import OTHER_SETTINGS, History
from jhop._lookups import Lookups
from jhop._options import Options
from jhop._program import DoesNotFit
from jhop._report import Report
from jhop._source import hook_location, hook_name, warn
from jhop._static import Static
from jhop._step import OtherTypes, Signature, Step
from jhop._wording import in_words

_OPTIONS_ONLY: Any = object()  # `@jhop.jit(fullgraph=True)`
WARN_AFTER = 8  # traces of a function for one kind of arguments


def jit(fn: Callable[..., Any] = _OPTIONS_ONLY, *, fullgraph: bool = False, **jax_jit_kwargs: Any) -> Any:
    """Compiles a JAX function, hooks and their Python state included.

    Args:
        fn: a function of arrays and pytrees that JAX can trace; hooks sit on values inside it (`jhop.hook`). Left out,
            a decorator with these options is returned.
        fullgraph: whether a hook that cannot be traced is an error. Otherwise it runs on the host at each run, with a
            warning: the compiled graph is cut there, and inside loops and branches it calls the hook back.
        **jax_jit_kwargs: options of `jax.jit`: static_argnums, static_argnames, donate_argnums, donate_argnames,
            in_shardings, out_shardings, keep_unused, inline, compiler_options ...

    Returns:
        A function of the same arguments. After each call, what hooks wrote is in the Python objects: ints are ints.
        Its methods `trace`, `lower` and `eval_shape` are those of `jax.jit`'s, with hooks inlined; `graph` shows it,
        `explain` says what was lifted, what is guarded and why it was traced.
        Where anything changed that a hook closes over, or that the function itself looked up, the next call knows.

    Raises:
        JhopError: `fn` is not callable, or `jax.jit` has no such option.
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
    if fn is _OPTIONS_ONLY:
        return functools.partial(jit, fullgraph=fullgraph, **jax_jit_kwargs)
    if not callable(fn):
        raise JhopError(f"jhop.jit: expected a function, got {type(fn).__name__}.")
    known = {
        name for name, parameter in inspect.signature(jax.jit).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }  # fmt: skip
    if unknown := sorted(jax_jit_kwargs.keys() - known):
        raise JhopError(
            f"jhop.jit: `jax.jit` has no option {', '.join(unknown)}. Its options are {', '.join(sorted(known))}."
        )
    return Jitted(fn, fullgraph, jax_jit_kwargs)


class _Version(NamedTuple):
    """A function as it was traced for one kind of arguments and one state of what it looked up."""

    guards: Guards
    compiled: CompiledGraph
    signature: Signature
    out_info: Any


class _Direct(NamedTuple):
    """A version and its compiled step, for calls with the arguments as they come."""

    step: Step
    context: Any
    hold: Callable[[], bool]  # whether all guards do


class Jitted(StandsForFunction):
    """What `jhop.jit` returns."""

    def __init__(self, fn: Callable[..., Any], fullgraph: bool, options: dict[str, Any]):
        functools.update_wrapper(self, fn, updated=())
        self._fn = fn
        self._fullgraph = fullgraph
        self._options = Options(fn, options)
        self._jitted = jax.jit(fn, **self._options.given)
        self._cache: dict[Any, list[_Version]] = {}
        self._history = History(hook_location(fn))
        self._direct: dict[Any, _Direct] = {}  # by static arguments
        self._inside: tuple[Guards, object] | None = None
        self._has_static = bool(self._options.static.nums or self._options.static.names)
        self._may_be_direct = True
        self._warned = False
        _jitted.add(self)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if _compat.transforming() and self._is_inner(args, kwargs):
            return self._call_inside(args, kwargs)
        static: Any = ()
        dynamic: Any = args, kwargs
        if self._has_static:
            given, *dynamic = self._options.split(args, kwargs)
            static = (len(args), *((place, Static(arg)) for place, arg in given))
        direct = self._direct.get(static)
        if direct is not None and direct.context == _compat.trace_context():
            try:
                return self._run_direct(direct, *dynamic)
            except OtherTypes:
                self._direct, self._may_be_direct = {}, False
            except _Stale:
                self._direct.pop(static, None)
        version, flat = self._version(args, kwargs)
        outs = version.compiled.run(flat, same_types=True)
        if self._may_be_direct:
            self._make_direct(static, version)
        return jax.tree.unflatten(version.signature.out_tree, outs)

    def _run_direct(self, direct: _Direct, args: Any, kwargs: Any) -> Any:
        """The quick way: `jax.jit` itself looks at the arguments, and its step raises where they are of other types."""
        step, _, hold = direct
        if not step.stateful:
            if not hold():
                raise _Stale
            return step.jitted(*args, **kwargs)
        with _state.LOCK:  # another thread may be tracing, with symbols in objects that both read
            if not hold():
                raise _Stale
            try:
                return step.run(args, kwargs)
            except DoesNotFit:
                raise _Stale from None

    def _make_direct(self, static: Any, version: _Version) -> None:
        entry = version.compiled.last_entry()
        if entry is None or not isinstance(entry.run, Step):
            return
        if len(self._direct) >= MAX_ENTRIES:
            self._direct.clear()
        guards = [version.guards] if entry.gm.lifted is None else [version.guards, entry.gm.lifted.guards]
        self._direct[static] = _Direct(entry.run, _compat.trace_context(), all_hold(guards))

    def _call_inside(self, args: Any, kwargs: Any) -> Any:
        """A call that is part of an outer trace: hooks are inlined out there, or run when `jax.jit` lowers it."""
        if self._inside is None or not self._inside[0].hold():
            guards = Lookups([(hook_name(self._fn), self._fn)]).guards(())  # what hooks read counts too
            self._inside = guards, object()
        # A trace with values of another one in it, such as the state of `jhop.functionalize`, is for this call alone.
        owner = object() if closes_over_tracer(self._fn) else self._inside[1]
        with _compat.cache_of(owner):
            return self._jitted(*args, **kwargs)

    def _is_inner(self, args: Any, kwargs: Any) -> bool:
        """Whether a call is part of what JAX is transforming, and not a computation of its own."""
        leaves = jax.tree.leaves((args, kwargs))
        return (
            _compat.staging() is not None
            or any(isinstance(leaf, _compat.Tracer) for leaf in leaves)
            or closes_over_tracer(self._fn)
        )

    def _version(self, args: Any, kwargs: Any) -> tuple[_Version, list[Any]]:
        """(the version for these arguments, traced if there is none, and the arguments as flat inputs)."""
        static, *dynamic = self._options.split(args, kwargs)
        flat, tree = jax.tree.flatten(tuple(dynamic))
        key = (
            tree,
            tuple((place, Static(arg)) for place, arg in static),
            len(args),
            _compat.trace_context(),
            *map(_aval_key, flat),
        )
        with _state.LOCK:  # another thread may be tracing, with symbols in objects that both read
            known = self._cache.setdefault(key, [])
            version = next((version for version in reversed(known) if version.guards.hold()), None)
            if version is None:
                reason = self._reason(key, known)
                if len(known) >= WARN_AFTER:
                    self._warn_of_traces(reason)
                signature = Signature(self._fn, tree, len(args), list(dynamic[1]), self._options)
                version = self._capture(args, kwargs, signature, reason)
                known.append(version)
                del known[:-MAX_ENTRIES]
        return version, flat

    def _reason(self, key: Any, known: list[_Version]) -> str:
        """Why a version for arguments of this kind has to be traced, where there are these."""
        if known:
            return known[-1].guards.broken() or "what it looks up has changed"
        before, versions = next(((k, v) for k, v in reversed(self._cache.items()) if v), (None, []))
        if before is None:
            return self._history.first()
        names = [given.name for given in versions[-1].compiled.gm.inputs]
        return _difference(before, key, names)

    def _warn_of_traces(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"jhop.jit: `{hook_name(self._fn)}` was traced more than {WARN_AFTER} times for arguments of the same "
                f"types, the last time because {reason}. What the function itself reads is part of what is compiled: "
                "pass what changes as an argument."
            )

    def _capture(self, args: Any, kwargs: Any, signature: Signature, reason: str) -> _Version:
        static = _named_statics(self._options.split(args, kwargs)[0])
        lookups = Lookups([(hook_name(self._fn), self._fn), *static])
        with lookups.tracing():
            # As another function object, whose trace JAX does not know yet.
            traced = jax.jit(_another(self._fn), **self._options.given).trace(*args, **kwargs)
        signature.out_tree = jax.tree.structure(traced.out_info)
        gm = self._graph_of(traced, args, kwargs)
        backend: Any = functools.partial(Step, signature=signature)
        backend.transform, backend.placed = signature.piece, signature.placed
        compiled = CompiledGraph(
            gm, backend=backend, fullgraph=self._fullgraph, dynamic=False,
            where="jhop.jit", history=self._history, first=reason, again=self._history.count > 0,
            static=tuple(f"{name} = {in_words(value)}" for name, value in static),
        )  # fmt: skip
        guards = lookups.guards([hook.base for hook, _ in gm.hooks], gm.jaxpr)
        return _Version(guards, compiled, signature, traced.out_info)

    def _graph_of(self, traced: Any, args: Any, kwargs: Any) -> GraphModule:
        names = parameter_names(self._fn, args, kwargs)
        count = len(traced.jaxpr.in_avals)
        names = names if len(names) == count else [f"arg{i}" for i in range(count)]  # static arguments are no inputs
        inputs = tuple(Input(name=name) for name in names)
        return GraphModule(jaxpr=traced.jaxpr, inputs=inputs, name=hook_name(self._fn), made_by="jit")

    def graph(self, /, *args: Any, **kwargs: Any) -> GraphModule:
        """The graph for these arguments with hooks opaque; `jhop.inline` of it is what runs."""
        return self._version(args, kwargs)[0].compiled.gm

    def trace(self, /, *args: Any, **kwargs: Any) -> _aot.Traced:
        """As `jax.jit(fn).trace`: a stage on the way to a compiled program, hooks inlined, of which `lower` is next.

        Args:
            *args, **kwargs: arguments of the function, or `jax.ShapeDtypeStruct`s in their place.

        Raises:
            Unsupported: a hook cannot be traced.
        """
        version, flat = self._version(args, kwargs)
        _, *dynamic = self._options.split(args, kwargs)
        entry, hooks = version.compiled.entry(flat), hooks_of(version.compiled.gm)
        return _aot.trace(hook_name(self._fn), version.guards, entry, hooks, *dynamic)

    def lower(self, /, *args: Any, **kwargs: Any) -> _aot.Lowered:
        """As `jax.jit(fn).lower`, with hooks inlined: `lower(...).compile()` runs. Arguments and errors as for `trace`.

        Example:
            >>> import jax, jhop
            >>> step = jhop.jit(jax.grad(lambda x: jhop.hook(x, lambda ct: ct * 3.0) ** 2))
            >>> float(step.lower(2.0).compile()(2.0))
            12.0
        """
        return self.trace(*args, **kwargs).lower()

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
        """Shapes and dtypes of the results, as `jax.ShapeDtypeStruct`s. Nothing is compiled, no hook runs."""
        return self._version(args, kwargs)[0].out_info

    def _report(self) -> Report:
        versions = [version for known in list(self._cache.values()) for version in list(known)]
        graphs = [graph for version in versions for graph in version.compiled.reports(version.guards)]
        return Report.of("jhop.jit", hook_name(self._fn), graphs, self._history)

    def versions(self) -> int:
        """How many programs were compiled so far, for all types of arguments and states of what is looked up."""
        return sum(version.compiled.versions() for known in self._cache.values() for version in known)

    def clear_cache(self) -> None:
        """Forgets what was compiled."""
        self._jitted.clear_cache()
        self.reset()

    def __reduce__(self) -> str:
        # As with functions: a copy is the function itself, and it is pickled by name.
        return getattr(self, "__qualname__", hook_name(self._fn))

    def reset(self) -> None:
        """Forgets what was compiled."""
        self._cache.clear()
        self._history.clear()
        self._direct.clear()
        self._inside = None


class _Stale(Exception):
    """A version that no longer holds."""


_jitted: weakref.WeakSet[Jitted] = weakref.WeakSet()


def _another(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as another object."""

    @functools.wraps(fn, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def _named_statics(static: list[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    return [(place if isinstance(place, str) else f"argument{place}", value) for place, value in static]


def _difference(before: Any, now: Any, names: list[str]) -> str:
    """What differs between the keys of two kinds of arguments."""
    if before == now:  # one object in both, which has another hash now
        return "a static argument that was changed in place"
    if before[0] != now[0] or before[2] != now[2]:
        return "arguments of another structure"
    if before[1] != now[1]:
        changed = [
            f"{place if isinstance(place, str) else f'argument{place}'} was {in_words(old.value)} and is "
            f"{in_words(new.value)}"
            for (place, old), (_, new) in zip(before[1], now[1], strict=False)
            if old != new
        ]
        return f"another static argument: {changed[0]}" if changed else "other static arguments"
    if before[3] != now[3]:
        return OTHER_SETTINGS
    pairs = zip(names, before[4:], now[4:], strict=True)
    name, old, new = next((name, old.str_short(), new.str_short()) for name, old, new in pairs if old != new)
    how = f"was {old} and is {new}" if old != new else "is weakly typed or sharded in another way"
    return f"other types of arguments: `{name}` {how}"


def _aval_key(leaf: Any) -> Any:
    try:
        return leaf.aval
    except AttributeError:
        return jax.typeof(leaf)


def reset_jitted() -> None:
    """Forgets what jitted functions compiled."""
    for jitted in list(_jitted):
        jitted.reset()
