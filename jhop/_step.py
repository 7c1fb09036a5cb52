"""An inlined graph as one `jax.jit` of the user's own arguments, Python state beside them."""

from __future__ import annotations

from typing import Any

import jax

from jhop import _compat
from jhop._graph import GraphModule
from jhop._options import Options
from jhop._program import Program
from jhop._source import hook_name


class OtherTypes(Exception):
    """A step was called with arguments of types that it was not made for."""


class Signature:
    """How a function was called.

    Attributes:
        name: of the function; XLA's programs are called after it.
        in_tree: structure of (positional, named) arguments, less the static ones.
        out_tree: structure of the results.
    """

    def __init__(self, fn: Any, in_tree: Any, n_args: int, names: list[str], options: Options):
        self.name = getattr(fn, "__name__", hook_name(fn))
        self.in_tree = in_tree
        self.out_tree: Any = None
        self._n_args = n_args
        self._names = names
        self._options = options

    def jit(self, run: Any, *, state: bool) -> Any:
        """`jax.jit` of a function of these arguments, with the user's options."""
        return jax.jit(run, **self._options.for_program(self._n_args, self._names, state=state))


    def piece(self, run: Any) -> Any:
        """`jax.jit` of a part of a graph that is cut, with the user's options for the compiler."""
        return jax.jit(run, **self._options.for_piece())

    def placed(self, run: Any, n_outs: int) -> Any:
        """A function of flat inputs with arguments placed and donated, and results placed, as the user's options say.

        Args:
            run: takes the arguments' leaves, then state; returns the results' leaves, then new values of state.
            n_outs: how many leaves the results have.
        """
        into, out_of = self._options.for_placing(self._n_args, self._names)
        if not into and not out_of:
            return run
        arguments = jax.jit(lambda *args, **kwargs: (args, kwargs), **into)
        results = jax.jit(lambda results: results, **out_of)
        n_given = self.in_tree.num_leaves

        def call(*flat: Any) -> list[Any]:
            given, state = list(flat[:n_given]), flat[n_given:]
            if into:
                args, kwargs = jax.tree.unflatten(self.in_tree, given)
                given = jax.tree.leaves(arguments(*args, **kwargs))
            outs = run(*given, *state)
            if not out_of:
                return outs
            made = results(jax.tree.unflatten(self.out_tree, outs[:n_outs]))
            return [*jax.tree.leaves(made), *outs[n_outs:]]

        return call


class Step:
    """What `jhop.jit` makes of an inlined graph: a backend of `CompiledGraph`, and more than that.

    As a backend's callable it takes and returns flat lists. `run` takes the arguments as the user gave them.

    Attributes:
        jitted: the `jax.jit`. Of a graph without state it takes and returns what the user's function does; else it
            takes a list of arrays first (constants, state) and returns (results, state).
        stateful: whether it does.
        has_state: whether there is Python state, and not only constants; checks count as such.
        writes: whether any of it is written.
    """

    def __init__(self, gm: GraphModule, example_inputs: list[Any], *, signature: Signature):
        self._gm = gm
        self._lifted: Any = gm.lifted
        self._signature = signature
        jaxpr, consts = _compat.open_jaxpr(gm.jaxpr)
        self._n_given = sum(given.role == "array" for given in gm.inputs)
        self._n_outs = self._lifted.n_outs
        self._n_consts = len(consts)
        self._avals = [v.aval for v in jaxpr.invars[: self._n_given]]
        self._checks: Any = gm.checks
        self.has_state = bool(self._lifted.slots or self._lifted.writes or self._checks)
        self.writes = bool(self._lifted.writes or self._checks)
        self.stateful = bool(consts) or self.has_state
        self._program = Program(gm, self._jit)
        self.jitted = self._program.device

    def _jit(self, device: Any) -> Any:
        n_consts, n_outs, out_tree = self._n_consts, self._n_outs, self._signature.out_tree

        def results(state: list[Any], args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
            flat, tree = jax.tree.flatten((args, kwargs))
            if tree != self._signature.in_tree or any(map(_differs, flat, self._avals)):
                raise OtherTypes
            outs = device(*state[:n_consts], *flat, *state[n_consts:])
            return jax.tree.unflatten(out_tree, outs[:n_outs]), outs[n_outs:]

        def pure(*_args: Any, **_kwargs: Any) -> Any:
            return results(self._program.consts, _args, _kwargs)[0]

        def with_state(_state: list[Any], /, *_args: Any, **_kwargs: Any) -> Any:
            return results(_state, _args, _kwargs)

        pure.__name__ = with_state.__name__ = self._signature.name
        plain = self._signature.jit(pure, state=False)
        run = self._signature.jit(with_state, state=True) if self.stateful else plain
        self._ahead = run if self.has_state else plain
        return run

    def __call__(self, *flat: Any) -> list[Any]:
        args, kwargs = jax.tree.unflatten(self._signature.in_tree, flat[: self._n_given])
        if not self.stateful:
            return jax.tree.leaves(self.jitted(*args, **kwargs))
        results, changed = self.call(args, kwargs, flat[self._n_given :])
        return [*jax.tree.leaves(results), *changed]

    def call(self, args: Any, kwargs: Any, state: Any, jitted: Any = None) -> tuple[Any, list[Any]]:
        """(results, new values of state) for arguments as the user gave them and the values of the state inputs.

        Args:
            jitted: `self.jitted`, compiled ahead of time.
        """
        numbers, arrays = self._program.split(state, self._n_given)
        results, outs = (jitted or self.jitted)([*self._program.consts, *arrays], *args, **kwargs)
        return results, self._program.join(numbers, outs, self._n_outs)

    def run(self, args: Any, kwargs: Any, jitted: Any = None) -> Any:
        """Reads state, calls, and writes state back.

        Raises:
            DoesNotFit: a number of state no longer has the type that it had. Nothing was written.
        """
        if jitted is not None and not self.has_state:
            return jitted(*args, **kwargs)
        if not self.stateful:
            return self.jitted(*args, **kwargs)
        results, changed = self.call(args, kwargs, self._lifted.read(), jitted)
        if self._checks is not None:
            self._checks.look(changed)
        if self._lifted.writes:
            self._lifted.commit(changed)
        return results

    def state_paths(self) -> list[str]:
        """Where its Python state is."""
        written = (write.container.path_of(write.key) for write in self._lifted.writes)
        checks = [] if self._checks is None else [placed.site.title for placed in self._checks.sites]
        return list(dict.fromkeys([*(slot.path for slot in self._lifted.slots), *written, *checks]))

    def trace(self, args: Any, kwargs: Any) -> Any:
        """JAX's first stage ahead of time. Constants are a part of such a program, as they are in `jax.jit`'s."""
        if not self.has_state:
            return self._ahead.trace(*args, **kwargs)
        _, arrays = self._program.split(self._lifted.read(), self._n_given)
        return self._ahead.trace([*self._program.consts, *arrays], *args, **kwargs)

    def trace_as_is(self, args: Any, kwargs: Any) -> Any:
        """JAX's first stage of a program that has the values which its state has now as constants.

        Only for a graph that writes no state.
        """
        program, state = Program(self._gm, lambda device: device), self._lifted.read()

        def fixed(*_args: Any, **_kwargs: Any) -> Any:
            outs = program(*jax.tree.leaves((_args, _kwargs)), *state)
            return jax.tree.unflatten(self._signature.out_tree, outs[: self._n_outs])

        fixed.__name__ = self._signature.name
        return self._signature.jit(fixed, state=False).trace(*args, **kwargs)


def _differs(value: Any, aval: Any) -> bool:
    found = jax.typeof(value)
    same = (found.shape, found.dtype, found.weak_type) == (aval.shape, aval.dtype, aval.weak_type)
    return not same or _spec(found) != _spec(aval)


def _spec(aval: Any) -> Any:
    """How an array is sharded, which is a part of its type on explicit axes of a mesh."""
    return getattr(getattr(aval, "sharding", None), "spec", None)
