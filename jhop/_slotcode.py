"""Source of functions that read Python state at every call: they do as little as can be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jhop._container import Container
from jhop._names import slot_member

_PLACE = re.compile("\0([kr][0-9]+)\0")  # no source has this character in it, not even in a string


class SlotCode:
    """Makes source in which objects have names; `function` makes the function.

    Args:
        names: what the source may use besides.
    """

    def __init__(self, **names: Any):
        self._names = names
        self._known: dict[int, str] = {}
        self._found: dict[str, str] = {}  # by the source that finds an object, its name
        self._getters: dict[int, Any] = {}
        self._views: dict[tuple[str, str], Any] = {}
        self._read: dict[str, set[Any]] = {}  # keys that are read, by the source of the table
        self.absent: dict[str, set[Any]] = {}  # keys that must not be there, by the source of all that are

    def name(self, value: Any) -> str:
        """A name for an object; one for each, so that what is asked twice can be told."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = f"k{len(self._known)}"
            self._names[known] = value  # also keeps it, so that its id stays its own
        return known

    def holder(self, container: Container) -> str:
        """The object of a container: where it may be another one at each call, the function looks for it once."""
        if container.place is None:
            return self.name(container.obj)
        source = self.read(*container.place)
        return f"\0{self._found.setdefault(source, f'r{len(self._found)}')}\0"

    def table(self, obj: Any) -> str:
        """The `__dict__` of an object, which the function looks up but once; a class keeps the one that it has."""
        return self._view(obj, "table") if isinstance(obj, type) else f"\0{self.name(obj)}\0"

    def keys(self, container: Container) -> str:
        """The keys of a dict or of the `__dict__` of an object."""
        if container.place is not None:
            return f"{self.holder(container)}{'' if container.kind == 'dict' else '.__dict__'}.keys()"
        obj = container.obj
        live = container.kind == "dict" or isinstance(obj, type)
        return self._view(obj, "keys") if live else f"{self.table(obj)}.keys()"

    def _view(self, obj: Any, what: str) -> str:
        """The name of something that shows what is in a dict or a class, now and later."""
        place = self.name(obj), what
        view = self._views.get(place)
        if view is None:
            table = obj.__dict__ if isinstance(obj, type) else obj
            view = self._views[place] = table.keys() if what == "keys" else table
        return self.name(view)

    def read(self, container: Container, key: Any) -> str:
        """What reads a slot. Where there is none, it raises or gives `MISSING`."""
        if not container.weak:
            kind, cls = container.kind, container.cls
            if kind == "cell":
                return f"{self.holder(container)}.cell_contents"
            if kind in ("attrs", "class") and type(key) is str:
                held = container.place is None
                table = self.table(container.obj) if held else f"{self.holder(container)}.__dict__"
                self._read.setdefault(table, set()).add(key)
                return f"{table}[{key!r}]"
            if kind == "dict" and cls is dict and type(key) in (str, int):
                return f"{self.holder(container)}[{key!r}]"
            if kind == "tuple" or (kind == "list" and cls is list):
                return f"{self.holder(container)}[{key}]"
            if kind == "slots":
                member = slot_member(cls, key)
                get = self._getters.setdefault(id(member), member.__get__)  # one object, with one name
                return f"{self.name(get)}({self.holder(container)})"
        return f"{self.name(type(container).get)}({self.name(container)}, {self.name(key)})"

    def lacks(self) -> Iterator[str]:
        """Source of the questions whether the keys in `absent` are not there; all that is read by then must be."""
        for keys, names in self.absent.items():
            question, table = f"{keys}.isdisjoint({self.name(names)})", keys.removesuffix(".keys()")
            there = self._read.get(table)
            if there is not None and there.isdisjoint(names):  # with no more than these, there is none of the others
                question = f"(len({table}) == {len(there)} or {question})"
            yield question

    def function(self, signature: str, lines: Iterable[str]) -> Callable[..., Any]:
        """Makes a function of the lines of its body, which stand in the order in which they run."""
        body = "\n".join(f"    {line}" for line in lines)
        found = {name: source for source, name in self._found.items()}
        often = {name for name, n in Counter(_PLACE.findall("".join([body, *found.values()]))).items() if n > 1}
        seen: set[str] = set()

        def place(match: re.Match[str]) -> str:
            name = match[1]
            if name in seen:
                return name if name in found else f"t{name}"
            if name in found:
                seen.add(name)
                return f"({name} := {_PLACE.sub(place, found[name])})"
            if name not in often:
                return f"{name}.__dict__"
            seen.add(name)
            return f"(t{name} := {name}.__dict__)"

        exec(f"def {signature}:\n{_PLACE.sub(place, body)}\n", self._names)
        return self._names[signature.partition("(")[0]]
