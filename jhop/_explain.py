"""`jhop.explain`: what was lifted, what is guarded, how many graphs there are and why each was traced, in words."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from jhop import _compat, _state
from jhop._container import MISSING
from jhop._errors import JhopError
from jhop._guards import Guards
from jhop._history import arguments_of
from jhop._inline import hook_roots
from jhop._interp import inner_jaxprs
from jhop._report import GraphReport, Hook, Report, State
from jhop._source import hook_location, hook_name, peeled
from jhop._wording import type_in_words


class Explains:
    """What `jhop.explain` can explain."""

    def explain(self) -> Report:
        """What was lifted, what is guarded, how many graphs there are and why each was traced; see `jhop.explain`."""
        with _state.LOCK:  # another thread may be tracing, with symbols in objects
            return self._report()

    def _report(self) -> Report:
        raise NotImplementedError


class StandsForFunction(Explains):
    """The same of what has taken a function's place, and is a method where that would be."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)


def explain(fn: Any) -> Report:
    """Says what jhop knows of a compiled function: nothing is traced or run for it, and nothing changes.

    Args:
        fn: what `jhop.jit` or `jhop.compile` returned, also as a bound method, or a stage of `jhop.jit` ahead of time.

    Returns:
        A report that prints as text. Its `graphs` are those that there are, each with `arguments`, `hooks`, lifted
        `state`, `guards`, `equations`, why it runs `on_host`, and whether it is `broken`; its `traces` say in order
        why each trace was made. All of it is text and numbers.

    Raises:
        JhopError: `fn` is not such a function.

    Example:
        >>> import jax, jhop, types
        >>> counter = types.SimpleNamespace(n=0)
        >>> def count(ct):
        ...     counter.n += 1
        >>> step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, count) ** 2).sum()))
        >>> for size in (2, 2, 3):
        ...     _ = step(jax.numpy.ones(size))
        >>> report = jhop.explain(step)
        >>> [str(state) for state in report.graphs[0].state]
        ["G['counter'].n: int, read and written"]
        >>> [trace.reason for trace in report.traces]
        ['first call', 'other types of arguments: `x` was float32[2] and is float32[3]']
    """
    compiled = peeled(fn)
    if isinstance(compiled, Explains):
        return compiled.explain()
    if callable(fn):
        raise JhopError(
            f"jhop.explain: `{hook_name(fn)}` was not compiled by jhop. Wrap it with jhop.jit (or jhop.compile, if it "
            "takes Tensors) first, call that, and explain what you called."
        )
    raise JhopError(
        f"jhop.explain: expected a function that jhop.jit or jhop.compile returned, got {type(fn).__name__}."
    )


def graph_report(entry: Any, hooks: tuple[Hook, ...], guards: Guards | None) -> GraphReport:
    """What there is to say of one graph. Inside `_state.LOCK`.

    Args:
        entry: with `gm`, the graph that runs; `trace`; `static`, static arguments in words; `refused`, why hooks in it
            run on the host.
        hooks: those in it.
        guards: what the function takes for granted that it is the graph of.
    """
    lifted = entry.gm.lifted
    all_guards = [each for each in (guards, lifted and lifted.guards) if each is not None]
    broken = next((each for each in all_guards if not each.hold()), None)
    return GraphReport(
        trace=entry.trace,
        arguments=(*arguments_of(entry.gm), *entry.static),
        hooks=hooks,
        state=_state_of(lifted) if lifted is not None else (),
        guards=lifted.guards.described() if lifted is not None else (),
        function_guards=guards.described() if guards is not None else (),
        equations=_equations(entry.gm.jaxpr, set()),
        on_host=None if entry.refused is None else str(entry.refused),
        cut=entry.refused is not None and lifted is not None,
        broken=None if broken is None else broken.broken() or "what it depends on has changed",
    )


def hooks_of(gm: Any) -> tuple[Hook, ...]:
    """The hooks of a graph in which they are opaque."""
    return tuple(Hook(path, hook_name(fn), *(hook_location(fn) or (None, None))) for path, fn in hook_roots(gm))


def _state_of(lifted: Any) -> tuple[State, ...]:
    found: dict[str, State] = {}
    for slot in lifted.slots:
        now = type_in_words(slot.container.get(slot.key))
        found.setdefault(slot.path, State(slot.path, now, True, False))
    for container, key, _ in lifted.writes:
        path = container.path_of(key)
        value = container.obj if container.whole else container.get(key)
        if path in found:
            found[path] = dataclasses.replace(found[path], written=True)
        else:
            found[path] = State(path, "nothing" if value is MISSING else type_in_words(value), False, True)
    return tuple(found.values())


def _equations(jaxpr: Any, seen: set[int]) -> int:
    opened = _compat.open_jaxpr(jaxpr)[0]
    if id(opened) in seen:
        return 0
    seen.add(id(opened))
    return sum(1 + sum(_equations(inner, seen) for inner in inner_jaxprs(eqn)) for eqn in opened.eqns)
