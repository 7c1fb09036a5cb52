"""`jhop.functionalize`: a function with hooks as a pure function of an explicit state.

Which hooks there are is known only once the function is traced, but the state has to exist before. So it is found by
walking what the function can reach (`_walk.Walk`, as hooks are walked), without running anything. The state is a plain
dict from access path to value, with one entry

- for every array that is reached, and
- for every int and float in a place that code which is reached may write (`_stored`). A number that nothing writes is
  a setting, like a flag or a string: it is no part of the state, and is read when the pure function is traced.

What is in the state is read from there alone, by hooks and by the function itself; the objects are only where it has
its names from. Each call of the pure function goes through the stages of `jhop.jit`:

1. capture: entries are put in their places, arrays as tracers; the function is traced, hooks opaque; places get back
   what was in them;
2. inline: hooks run, their state lifted (`_inline`). A Python number among the given values is lifted as itself, so
   hooks' control flow can be answered; of one that is an array while JAX traces nobody can ask anything;
3. run: the program (`_program`) is evaluated where the caller is, under whatever transformation. State inputs are the
   given entries, state outputs the new ones, cast to shape, dtype and weak type of what was given, so that a loop can
   carry them. What is written to any other place is refused by name.

Nothing is kept between calls: `jax.jit` of the pure function is what makes it fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jhop import _compat, _state
from jhop._capture import Recorder, trace
from jhop._close import kept_apart
from jhop._container import Container
from jhop._entries import Entry, NewState, entries_of
from jhop._errors import TO_JIT, JhopError, Unsupported, advising
from jhop._graph import GraphModule, Input
from jhop._inline import inline
from jhop._program import DoesNotFit, Program
from jhop._questions import listed, refuse_questions
from jhop._records import lift_tuples
from jhop._replay import as_number
from jhop._scalar import largest_int, weak_aval
from jhop._source import hook_name, warn
from jhop._walk import MAX_CONTAINERS, Walk

_READS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def functionalize(fn: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Makes a pure function of a function with hooks: their Python state goes in and comes out.

    For those who keep state in a pytree of their own, `lax.scan` over steps, save it, shard it or donate it.

    Args:
        fn: a function of arrays and pytrees that JAX can trace, `jax.grad(loss)` for example. What a hook does happens
            in the backward pass: `fn` contains it.

    Returns:
        (pure_fn, state0).

        state0: a dict from access path (`"G['meter'].steps"`, `"fn.__wrapped__.__closure__[0].cell_contents.norm"`) to
        value: copies of the arrays that `fn` can reach, and the ints and floats in places that code may write. Numbers
        that nothing writes are settings and stay in their objects. It is empty where there is no state.

        pure_fn: `pure_fn(state, *args, **kwargs) -> (out, new_state)`; new_state has the keys of state. Numbers may be
        Python numbers or scalar arrays; each entry comes back with the shape, dtype and weak type that it was
        given with. Python numbers stay exact Python numbers as long as nothing else is given. In arrays they are JAX's:
        ints are int32 (int64 with x64) and wrap, floats are float32, and dividing by zero raises nothing; hooks cannot
        branch on them under jax.jit. What `fn` itself reads is what was there before the step. Python objects are never
        written to. pure_fn may be jitted, differentiated, mapped and scanned; by itself it traces at each call.

    Raises:
        JhopError: `fn` is not callable. At a call: the state has other keys, shapes or dtypes than state0, or what
            `fn` reaches is no longer what it was.
        HookError: at a call, a hook broke its contract.
        Unsupported: at a call, a hook cannot be traced; it asks for the value of a number that is traced; or it writes
            what has no entry, or what does not fit there.

    Example:
        >>> import jax, jhop
        >>> class Counter:
        ...     def __init__(self):
        ...         self.n = 3
        ...     def count(self, ct):
        ...         self.n += 1
        >>> counter = Counter()
        >>> pure, state = jhop.functionalize(jax.grad(lambda x: jhop.hook(x, counter.count) ** 2))
        >>> list(state.values())
        [3]
        >>> def step(state, x):
        ...     grad, state = pure(state, x)
        ...     return state, grad
        >>> state, _ = jax.lax.scan(step, state, jax.numpy.ones(10))
        >>> int(*state.values()), counter.n
        (13, 3)
    """
    if not callable(fn):
        raise JhopError(f"jhop.functionalize: expected a function, got {type(fn).__name__}.")
    with _state.LOCK:
        pure = _Pure(fn)

    def pure_fn(state: dict[str, Any], /, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return pure.call(state, args, kwargs)

    pure_fn.__name__ = pure_fn.__qualname__ = getattr(fn, "__name__", None) or hook_name(fn)
    pure_fn.__doc__ = f"`{hook_name(fn)}` as a pure function, made by `jhop.functionalize`."
    return pure_fn, {entry.path: entry.start() for entry in pure.entries}


@dataclasses.dataclass
class _Given:
    """An entry as it is given to one call.

    Attributes:
        value: as it was given, or the Python number that it is.
        python: what hooks meet while they are traced: that number, one like it, or the array that was there at first.
        on_device: whether it is an input of the device.
    """

    entry: Entry
    value: Any
    python: Any
    on_device: bool

    @property
    def traced(self) -> bool:
        return isinstance(self.value, _compat.Tracer)

    def aval(self) -> Any:
        """Of what stands for it while the function is captured."""
        number = self.entry.number
        return weak_aval(type(self.python)) if number else jax.typeof(self.python)

    def as_input(self) -> Any:
        """The value as an input of the graph."""
        if not self.on_device:
            return self.value
        if self.entry.number:
            return as_number(self.value, type(self.python))
        return _compat.with_weak_type(jnp.asarray(self.value), self.aval().weak_type)


class _Pure:
    """A function, and the entries of its state."""

    def __init__(self, fn: Callable[..., Any]):
        self._fn = fn
        self._name = hook_name(fn)
        walk = self._walk()
        self.entries = entries_of(walk)
        if walk.truncated:
            warn(
                f"jhop.functionalize: `{self._name}` can reach more than {MAX_CONTAINERS} Python objects. State in "
                "those that were not looked at has no entry: hand the function the small objects that it needs."
            )
        self._known = {(id(container.obj), container.kind): container for container in walk.containers}

    def _walk(self) -> Walk:
        walk = Walk([("fn", self._fn)], strict=False)
        lift_tuples(walk)
        return walk

    def call(self, state: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        given = [self._given(entry, value) for entry, value in self._values(state)]
        leaves, tree = jax.tree.flatten((args, kwargs))
        # Python values stay what they are, as in a call of the function itself.
        dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, np.generic))]
        arrays = [leaves[i] for i in dynamic]

        def call_fn(values: Sequence[Any]) -> Any:
            filled = [*leaves]
            for i, value in zip(dynamic, values, strict=True):
                filled[i] = value
            own_args, own_kwargs = jax.tree.unflatten(tree, filled)
            return self._fn(*own_args, **own_kwargs)

        with _state.LOCK, advising(TO_JIT):
            gm, out_tree, state_inputs = self._graph(given, arrays, call_fn)
        inputs = [*arrays, *(item.as_input() for item in given if item.on_device), *state_inputs]
        _, consts = _compat.open_jaxpr(gm.jaxpr)
        traced = any(isinstance(value, _compat.Tracer) for value in [*inputs, *consts])
        try:
            outs = Program(gm, lambda device: device, wait=not traced)(*inputs)
        except DoesNotFit:
            raise JhopError(
                f"jhop.functionalize: a number in the state of `{self._name}` does not fit into 32 bits, in which the "
                "device has to take it. Turn x64 on (JAX_ENABLE_X64=1), or keep it as a float."
            ) from None
        lifted: Any = gm.lifted
        new = NewState(self.entries, [item.value for item in given], self._known)
        with _state.LOCK:
            new.write(lifted.writes, outs)
        return jax.tree.unflatten(out_tree, outs[: lifted.n_outs]), new.values()

    def _values(self, state: Any) -> list[tuple[Entry, Any]]:
        """(entry, its value) for all entries, in order."""
        what = f"jhop.functionalize: the state of `{self._name}`"
        if not isinstance(state, dict):
            raise JhopError(f"{what} comes first, as a dict like the state0 of functionalize; got {_kind(state)}.")
        expected = {entry.path for entry in self.entries}
        missing, extra = sorted(expected - state.keys()), sorted(map(str, state.keys() - expected))
        if missing or extra:
            parts = [f"lacks {listed(missing)}"] * bool(missing) + [f"has no use for {listed(extra)}"] * bool(extra)
            raise JhopError(
                f"{what} {' and '.join(parts)}. Its keys are those of state0, {listed(sorted(expected))}: begin with "
                "state0, pass on each new state whole, and call functionalize again where an older one was saved."
            )
        return [(entry, state[entry.path]) for entry in self.entries]

    def _given(self, entry: Entry, value: Any) -> _Given:
        found = entry.fault(value)
        if found is not None:
            raise JhopError(
                f"jhop.functionalize: the state of `{self._name}` has {found} at `{entry.path}`, where state0 has "
                f"{entry.kind()}. Give each entry the shape and dtype that it has there."
            )
        if not entry.number:
            return _Given(entry, value, entry.first, True)
        if isinstance(value, (np.ndarray, np.generic)):
            value = value.item()  # as it was saved
        if not isinstance(value, jax.Array):
            return _Given(entry, value, value, False)
        kind: type = int if jnp.issubdtype(value.dtype, jnp.integer) else float
        if not isinstance(value, _compat.Tracer):
            return _Given(entry, value, kind(value.item()), True)
        like = kind(entry.first)
        if kind is int and max(like, ~like) > largest_int():
            like = 1  # the device has it as an int
        return _Given(entry, value, like, True)

    def _graph(self, given: list[_Given], arrays: list[Any], call_fn: Any) -> tuple[GraphModule, Any, list[Any]]:
        """(the inlined graph, the structure of the results, the values of its state inputs)."""
        walk = self._walk()
        self._check_unchanged(walk)
        with restored(walk.containers), _compat.cache_of(object()):  # in which nothing is kept of inner functions
            captured, out_tree = self._capture(walk, given, arrays, call_fn)
            for item in given:
                item.entry.put(item.python)
            gm = inline(captured)
            lifted: Any = gm.lifted
            places = {item.entry.place: item for item in given}
            found = [places.get(slot.container.slot(slot.key)) for slot in lifted.slots]
            traced = {item.entry.place: item.entry.path for item in given if item.traced and item.entry.number}
            refuse_questions(gm, traced, self._name)
            values = [
                slot.container.get(slot.key) if item is None else item.as_input()
                for slot, item in zip(lifted.slots, found, strict=True)
            ]
        n = len(gm.inputs) - len(found)
        numbers = [
            dataclasses.replace(given_input, number=None) if item is not None and item.on_device else given_input
            for given_input, item in zip(gm.inputs[n:], found, strict=True)
        ]
        return dataclasses.replace(gm, inputs=(*gm.inputs[:n], *numbers)), out_tree, values

    def _capture(self, walk: Walk, given: list[_Given], arrays: list[Any], call_fn: Any) -> tuple[GraphModule, Any]:
        """The function's graph, hooks opaque; after the arguments, its inputs are the entries on the device."""
        out_tree: Any = None

        def run(*flat: Any) -> list[Any]:
            nonlocal out_tree
            rest = iter(flat[len(arrays) :])
            placed = [(item.entry, next(rest) if item.on_device else item.python) for item in given]
            with restored(walk.containers):
                for entry, value in placed:
                    entry.put(value)
                with kept_apart([container.obj for container in [*walk.containers, *walk.records]]):
                    outs, out_tree = jax.tree.flatten(call_fn(flat[: len(arrays)]))
                for entry, value in placed:
                    if entry.get() is not value:
                        raise Unsupported(
                            f"jhop.functionalize: `{self._name}` itself, not a hook of it, writes `{entry.path}`. That "
                            "happens once per trace: do it in a hook, or take the value as an argument and return it."
                        )
            return outs

        device = [item.aval() for item in given if item.on_device]
        try:
            closed, info = trace(run, [*map(jax.typeof, arrays), *device], Recorder())
        except _READS_VALUES as error:
            if self.entries:
                error.add_note(
                    f"jhop.functionalize: while `{self._name}` is traced, what is in its state has no value: "
                    f"{listed([entry.path for entry in self.entries])}."
                )
            raise
        names = [f"arg{i}" for i in range(len(arrays))] + ["state"] * len(device)
        inputs = tuple(Input(name=name) for name in names)
        return GraphModule(jaxpr=closed, inputs=inputs, info=info(), name=self._name, made_by="functionalize"), out_tree

    def _check_unchanged(self, walk: Walk) -> None:
        """Raises where what the function reaches has other places for state than those that have entries."""
        now = {entry.place: entry.path for entry in entries_of(walk)}
        then = {entry.place: entry.path for entry in self.entries}
        gone = sorted(path for place, path in then.items() if place not in now)
        new = sorted(path for place, path in now.items() if place not in then)
        if gone or new:
            parts = [f"is no longer at {listed(gone)}"] * bool(gone) + [f"is also at {listed(new)}"] * bool(new)
            raise JhopError(
                f"jhop.functionalize: the state that `{self._name}` can reach has changed since: it "
                f"{' and '.join(parts)}. Call functionalize again, after everything was set up."
            )


@contextlib.contextmanager
def restored(containers: Sequence[Container]) -> Iterator[None]:
    """Inside the block, containers may be written to; afterwards, they hold what they held before."""
    snapshots = [(container, container.items()) for container in containers]
    try:
        yield
    finally:
        for container, snapshot in snapshots:
            container.restore(snapshot)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
