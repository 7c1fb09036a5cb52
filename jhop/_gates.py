"""Hooks on several Tensors at once: when they run, and what waits for them.

Such a hook sees the gradients of all its Tensors and may replace them, so none of these flows on before it ran: the
order of a pass holds their nodes back until the last one is there. Where one gradient depends on another (a Tensor that
was computed from another member, or two hooks that wait for each other), nothing can be held back: the hook still runs
once all gradients are known, but what has flowed on cannot be replaced any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jhop._append import class_name
from jhop._errors import HookError
from jhop._hook import RemovableHandle
from jhop._leaves import declare_state
from jhop._node import Edge, Node
from jhop._source import describe_hook

Place = Callable[[], Edge | None]


class Group:
    """Tensors that share a hook.

    Attributes:
        fn: the hook.
        first: whether it gets the first gradient that is there; otherwise all of them, None where none comes.
        places: per Tensor, what tells where its cotangent goes, if that still exists.
        id: of its handle; it tells before and after which other hooks of a Tensor it runs.
    """

    __slots__ = ("__weakref__", "_lists", "first", "fn", "id", "places")

    def __init__(self, fn: Callable[..., Any], *, first: bool, places: list[Place]):
        self.fn = fn
        self.first = first
        self.places = places
        self._lists: list[Any] = []
        self.id = 0

    def register(self, lists: list[Any]) -> RemovableHandle:
        """Makes the hook lists of the Tensors keep the group alive."""
        handle = RemovableHandle(self)
        self.id = handle.id
        self._lists = [weakref.ref(hooks) for hooks in lists]
        for hooks in lists:
            hooks.groups = {**(hooks.groups or {}), self.id: self}
        LIVE[self.id] = self
        return handle

    def remove(self, handle_id: int) -> None:
        LIVE.pop(handle_id, None)
        for ref in self._lists:
            if (hooks := ref()) is not None and hooks.groups:
                hooks.groups.pop(handle_id, None)


LIVE: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


class Stop(NamedTuple):
    """A point of a pass, before a node, where gradients of a group are taken.

    Attributes:
        group: the group.
        members: (index, where) of those that are complete now and were not taken before.
        fires: whether the hook runs: the rest is known. Of a group that wants the first gradient, each stop does.
        replaces: whether none has flowed on, so that the hook may replace them.
    """

    group: Group
    members: tuple[tuple[int, Edge], ...]
    fires: bool
    replaces: bool


class Gates:
    """Holds nodes back while the order of a pass is found.

    Args:
        nodes: those of the pass.

    Attributes:
        stops: per node, what is to be done before it runs.
    """

    def __init__(self, nodes: set[Node]):
        self.stops: dict[Node, list[Stop]] = {}
        self._due: list[Stop] = []
        self._line: dict[Edge, list[tuple[Group, int]]] = {}  # per value, its groups in order
        self._members: dict[Group, dict[int, Edge]] = {}
        self._held: dict[Group, list[int]] = {}
        self._left: dict[Group, int] = {}
        self._loose: set[Group] = set()  # members flowed on before all were there
        live = (ref() for ref in LIVE.valuerefs())  # a copy: other threads may register hooks now
        for group in sorted((group for group in live if group is not None), key=lambda group: group.id):
            places = ((i, place()) for i, place in enumerate(group.places))
            members = {i: edge for i, edge in places if edge is not None and edge.node in nodes}
            for i, edge in members.items():
                self._line.setdefault(edge, []).append((group, i))
            if members:
                self._members[group], self._left[group], self._held[group] = members, len(members), []
        self._open: dict[Node, list[Edge]] = {}  # the values of a node that are still on their way
        for edge in self._line:
            self._open.setdefault(edge.node, []).append(edge)

    def __bool__(self) -> bool:
        return bool(self._members)

    def arrived(self, node: Node) -> list[Node]:
        """All cotangents of a node are there: the nodes that may run now."""
        return self._forward(list(self._open[node])) if node in self._open else [node]

    def before(self, node: Node) -> None:
        """A node comes next in the order."""
        if self._due:
            self.stops[node], self._due = self._due, []

    def loosen(self) -> list[Node]:
        """Lets go what waits for itself, where nothing else is left to run: the nodes that may run now."""
        while stuck := [group for group, held in self._held.items() if held]:
            group = next((group for group in stuck if self._waits_for_itself(group)), stuck[0])
            self._loose.add(group)
            if free := self._forward(self._stop(group, fires=False)):
                return free
        return []

    def _forward(self, moving: list[Edge]) -> list[Node]:
        """Moves values on to the next group that they wait for."""
        free: list[Node] = []
        while moving:
            edge = moving.pop(0)
            if not self._line[edge]:
                self._open[edge.node].remove(edge)
                if not self._open[edge.node]:
                    del self._open[edge.node]
                    free.append(edge.node)
                continue
            group, index = self._line[edge].pop(0)
            self._held[group].append(index)
            self._left[group] -= 1
            if group.first or group in self._loose or not self._left[group]:
                moving += self._stop(group, fires=group.first or not self._left[group])
        return free

    def _stop(self, group: Group, *, fires: bool) -> list[Edge]:
        members = tuple((i, self._members[group][i]) for i in self._held[group])
        self._held[group] = []
        self._due.append(Stop(group, members, fires, not group.first and group not in self._loose))
        return [edge for _, edge in members]

    def _waits_for_itself(self, group: Group) -> bool:
        """Whether a gradient that is not there depends on one that is held back."""
        members = self._members[group]
        held = [members[i].node for i in self._held[group]]
        missing = {edge.node for edge in members.values()}.difference(held)
        return not missing.isdisjoint(_below(held))


def _below(nodes: Iterable[Node]) -> set[Node]:
    found = set(nodes)
    stack = list(found)
    while stack:
        for edge in stack.pop().edges:
            if edge.node not in found:
                found.add(edge.node)
                stack.append(edge.node)
    return found


class GroupHook:
    """A group's hook as a function of a tuple of cotangents, whose result is checked."""

    __slots__ = ("__wrapped__", "_first", "_replaces")

    def __init__(self, stop: Stop):
        self.__wrapped__ = stop.group.fn
        self._first = stop.group.first
        self._replaces = stop.replaces

    def __call__(self, cts: tuple[Any, ...]) -> tuple[Any, ...] | None:
        returned = self.__wrapped__(cts[0] if self._first else list(cts))
        if returned is None:
            return None
        told = f"register_multi_grad_hook: {describe_hook(self.__wrapped__)}"
        if self._first:
            raise HookError(
                f"{told} with mode='any' must return None, but returned {class_name(returned)}: which gradient it "
                "is given is left open. Use Tensor.register_hook to replace one."
            )
        if not self._replaces:
            raise HookError(
                f"{told} returned gradients, but the gradient of one of its Tensors is computed from that of another "
                "(or two such hooks wait for each other), so some have flowed on already. Return None, or give Tensors "
                "of which none is computed from another."
            )
        if not isinstance(returned, (list, tuple)) or len(returned) != len(cts):
            found = f" of {len(returned)}" if isinstance(returned, (list, tuple)) else ""
            raise HookError(
                f"{told} must return None or a sequence of {len(cts)} gradients, one for each Tensor, but returned "
                f"{class_name(returned)}{found}."
            )
        if any(old is None and new is not None for new, old in zip(returned, cts, strict=True)):
            raise HookError(f"{told} returned a gradient where it was given None: nothing flows there.")
        return tuple(returned)


declare_state(GroupHook, "__wrapped__")
