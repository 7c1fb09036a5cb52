"""`jhop.jit`'s stages ahead of time: traced, lowered, compiled, as `jax.stages` has them.

Each wraps JAX's own stage and hands on what it does not know. What jhop adds: a compiled program reads and writes the
Python state of its hooks, and refuses to run once what it took for granted has changed.
"""

from __future__ import annotations

from typing import Any

from jhop import _state
from jhop._errors import JhopError, Unsupported
from jhop._explain import Explains, graph_report
from jhop._guards import Guards
from jhop._program import DoesNotFit
from jhop._report import Hook, Report
from jhop._step import Step


class _Stage(Explains):
    """A stage of JAX's, with what jhop knows of the function."""

    def __init__(self, stage: Any, name: str, guards: Guards, entry: Any, hooks: tuple[Hook, ...]):
        self._stage = stage
        self._name = name
        self._guards = guards
        self._entry = entry
        self._hooks = hooks

    def __getattr__(self, name: str) -> Any:
        if name in ("_stage", "_entry"):  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self._stage, name)

    def _next(self, cls: Any, stage: Any) -> Any:
        return cls(stage, self._name, self._guards, self._entry, self._hooks)

    def _report(self) -> Report:
        graph = graph_report(self._entry, self._hooks, self._guards)
        return Report("jhop.jit", self._name, (graph,), (graph.trace,), 0, "")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} of jhop.jit>"


class Traced(_Stage):
    """A function traced for some arguments, hooks inlined; attributes are those of `jax.stages.Traced`.

    Where hooks have Python state, `jaxpr`, `args_info` and `out_info` show it as a list before the arguments and one
    after the results. `jax.export` has its present values as constants, as it has what a function closes over.
    """

    def __init__(self, stage: Any, name: str, guards: Guards, entry: Any, hooks: tuple[Hook, ...], arguments: Any):
        super().__init__(stage, name, guards, entry, hooks)
        self._arguments = arguments

    def lower(self, *, lowering_platforms: tuple[str, ...] | None = None, _private_parameters: Any = None) -> Any:
        """Lowers to StableHLO.

        Args:
            lowering_platforms: platforms to lower for, by default that of the process.

        Raises:
            Unsupported: `jax.export` asks, and hooks write Python state.
        """
        step: Step = self._entry.run
        if _private_parameters is not None:  # asked by jax.export, which makes its own use of JAX's stage
            if step.writes:
                raise Unsupported(
                    f"jax.export of `{self._name}`: an exported program cannot reach the Python state of its hooks, or "
                    f"tell of checks ({', '.join(step.state_paths())}). Pass it as an argument, and "
                    "return what changes."
                )
            if step.has_state:
                with _state.LOCK:
                    self._stage = step.trace_as_is(*self._arguments)  # of which jax.export asks for the jaxpr next
            return self._stage.lower(lowering_platforms=lowering_platforms, _private_parameters=_private_parameters)
        return self._next(Lowered, self._stage.lower(lowering_platforms=lowering_platforms))


class Lowered(_Stage):
    """A lowered function; attributes and methods are those of `jax.stages.Lowered`."""

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """Compiles; arguments as for `jax.stages.Lowered.compile`."""
        return self._next(Compiled, self._stage.compile(*args, **kwargs))


class Compiled(_Stage):
    """A compiled function; it takes the arguments that are not static. The rest is as in `jax.stages.Compiled`."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the program, reads and writes the Python state of its hooks.

        Raises:
            JhopError: what was taken for granted when it was traced has changed since.
            TypeError: the arguments have other types than the program was compiled for.
        """
        with _state.LOCK:
            reason = None if self._guards.hold() else self._guards.broken()
            if reason is None and not self._entry.holds():
                reason = self._entry.gm.lifted.guards.broken()
            if reason is None:
                try:
                    return self._entry.run.run(args, kwargs, self._stage)
                except DoesNotFit:
                    reason = "a number of its state has another type, or no longer fits into 32 bits"
        raise JhopError(
            f"jhop.jit: the compiled `{self._name}` no longer fits what its code looks up: {reason}. Lower and compile "
            "it again, or call the jitted function itself, which does so when it has to."
        )


def trace(name: str, guards: Guards, entry: Any, hooks: tuple[Hook, ...], args: Any, kwargs: Any) -> Traced:
    """The first stage, of one version of a function."""
    step: Step = entry.run
    with _state.LOCK:
        return Traced(step.trace(args, kwargs), name, guards, entry, hooks, (args, kwargs))
