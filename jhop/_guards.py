"""Guards: whether a graph that was traced for one state of the world may be used for the present one.

A traced graph takes for granted every fixed value that its hooks can reach, the types of the lifted ones, and the
answers that lifted numbers gave to Python control flow. All of that is one generated function, `Guards.hold`, which is
quick enough to be called before every run. Where it says no, `Guards.broken` looks for the reason and puts it in words.
"""

from __future__ import annotations

import abc
import ast
import collections
import dataclasses
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jhop._container import MISSING, Container, contents_of
from jhop._expr import CODE_NAMES, Expr, leaves, to_code
from jhop._leaves import Fixed, Leaf
from jhop._slotcode import SlotCode
from jhop._walk import Walk
from jhop._wording import in_words, is_plain, type_in_words

_BY_VALUE = {str, bytes, complex, bool, int, float, types.MethodType}  # `obj.method` is another one each time


@dataclasses.dataclass(frozen=True)
class Guard:
    """One thing that a traced graph takes for granted, in words.

    Attributes:
        kind: "value" (a place holds an equal value), "object" (the same object), "type" (a value of that type),
            "entries" (a container has as many, and the same), "absent" (it has none of these names), "answer" (of
            Python control flow), "code" (of a function), "attribute" (the class of an object and the like), "contents"
            (of an array), "reference" (a weak one) or "classes" (registered with abstract base classes).
        what: Python source that reaches the place from the hooks, or of the question; else a description.
        then: what was found there.
    """

    kind: str
    what: str
    then: str

    def __str__(self) -> str:
        return f"{self.what} {_VERBS.get(self.kind, 'is')} {self.then}"


_VERBS = {"entries": "has", "absent": "has", "answer": "was"}


class Guards:
    """What a traced graph depends on.

    Args:
        walk: what the hooks could reach when they were traced.
        answers: host expressions over `walk.leaves`, with the truth value that each had.
        frozen: numbers and arrays are part of the graph, not inputs: they too must stay what they are.
        ignore: containers that do not count.
        ignore_slots: single slots that do not count, as (id of the container, key).
        ignore_keys: containers of which it does not count which slots they have.

    Attributes:
        answers: the questions that were asked.
    """

    def __init__(
        self,
        walk: Walk,
        answers: list[tuple[Expr, bool]],
        *,
        frozen: bool = False,
        ignore: Collection[Container] = (),
        ignore_slots: Collection[tuple[int, Any]] = (),
        ignore_keys: Collection[Container] = (),
    ):
        skip = {id(container) for container in ignore}
        slots, free = set(ignore_slots), skip | {id(container) for container in ignore_keys}
        self._attributes = [found for found in walk.attributes if _matters(*found)]
        self._alive = [(reference, type(reference())) for reference, _ in walk.alive]
        self._abc_token = abc.get_cache_token() if walk.asks_abstract_classes else None

        def counts(slot: Fixed | Leaf) -> bool:
            at: Any = slot.container, slot.key
            while at is not None:
                if id(at[0]) in skip or (id(at[0]), at[1]) in slots:
                    return False
                at = at[0].place
            return True

        self._shapes = [(*slot[:2], type(slot.value), in_words(slot.value)) for slot in walk.shapes if counts(slot)]
        self._records = [each for each in walk.records if each.place is not None and counts(Fixed(*each.place, None))]
        self._others = frozenset(id(container.obj) for container in walk.containers if container.place is None)
        tuples = [record for record in self._records if record.kind == "tuple"]
        self._keys = [
            (container, _keys_of(container))
            for container in [*walk.containers, *tuples]
            if id(container) not in free
        ]
        self._contents: list[tuple[Any, Any]] = []
        leaves_kept = [leaf for leaf in walk.leaves if counts(leaf)]
        fixed = [item for item in walk.fixed if counts(item)]
        self._fixed = [item for item in fixed if not walk.is_weak(item.value)]
        self._weak = [
            (*item[:2], weakref.ref(item.value), in_words(item.value)) for item in fixed if walk.is_weak(item.value)
        ]
        if frozen:
            self._fixed += [Fixed(leaf.container, leaf.key, leaf.value) for leaf in leaves_kept]
            held = [*(leaf.value for leaf in leaves_kept), *walk.instances(object, lambda value: True)]
            self._contents = [(value, then) for value in held if (then := contents_of(value)) is not None]
        # Not the values: a graph must not keep the arrays alive that state held when it was traced.
        self._leaves = [_Lifted.of(leaf) for leaf in leaves_kept if not frozen]
        self.answers = [Answer(expr, answer, walk.leaves) for expr, answer in dict.fromkeys(answers)]
        self.hold = all_hold([self])

    def terms(self, code: SlotCode) -> list[str]:
        """Source of the questions whether everything is as it was."""
        name, read = code.name, code.read
        terms = [f"{name(obj)}.{attribute} is {name(value)}" for obj, attribute, value in self._attributes]
        terms += [f"type({name(reference)}()) is {name(cls)}" for reference, cls in self._alive]
        terms += [f"{read(container, key)} is {name(reference)}()" for container, key, reference, _ in self._weak]
        terms += [f"type({read(container, key)}) is {name(cls)}" for container, key, cls, _ in self._shapes]
        for container, key, value in self._fixed:
            if _is_by_value(value):
                kept = name(value)
                same = f"str(v) == str({kept})" if _is_zero(value) else f"v == {kept}"
                terms.append(f"((v := {read(container, key)}) is {kept} or type(v) is type({kept}) and {same})")
            else:
                terms.append(f"{read(container, key)} is {name(value)}")
        for container, present in self._keys:
            terms += _keys_code(container, present, code)
        for leaf in self._leaves:
            now, kind = read(leaf.container, leaf.key), leaf.kind
            array = isinstance(kind, tuple)
            terms.append(f"{name(_is_of(kind))}({now})" if array else f"type({now}) is {name(kind)}")
        if self._abc_token is not None:
            terms.append(f"{name(abc.get_cache_token)}() == {name(self._abc_token)}")
        if ids := [f"id({code.holder(record)})" for record in self._records if record.kind != "tuple"]:
            terms.append(f"{name(self._others)}.isdisjoint(({', '.join(ids)},))")
            terms += [f"len({{{', '.join(ids)}}}) == {len(ids)}"] * (len(ids) > 1)
        terms += [f"{name(answer)}.now() is {answer.then}" for answer in self.answers]
        terms += [f"{name(contents_of)}({name(value)}) == {name(then)}" for value, then in self._contents]
        return terms

    def described(self) -> tuple[Guard, ...]:
        """All that counts, in words. Values are not asked for anything: no code of the user's runs."""
        found = [Guard("answer", f"`{answer.in_words()}`", str(answer.then)) for answer in self.answers]
        for container, key, value in self._fixed:
            kind = "value" if is_plain(value) else "object"
            found.append(Guard(kind, container.path_of(key), in_words(value)))
        found += [Guard("type", container.path_of(key), cls.__name__) for container, key, cls, _ in self._shapes]
        found += [Guard("type", leaf.path, leaf.type) for leaf in self._leaves]
        for container, keys in self._keys:
            if container.names is None and container.kind != "cell":
                count = "1 entry" if len(keys) == 1 else f"{len(keys)} entries"
                found.append(Guard("entries", container.path, count))
            elif absent := sorted(map(str, (container.names or set()).difference(keys))):  # what is there, is read
                found.append(Guard("absent", container.path, f"no {', '.join(map(repr, absent))}"))
        for obj, name, value in self._attributes:
            kind, what = ("code", "") if name == "__code__" else ("attribute", f"`{name}` of ")
            found.append(Guard(kind, f"{what}{in_words(obj)}", "the same" if kind == "code" else in_words(value)))
        found += [Guard("contents", f"what is in {in_words(value)}", "the same") for value, _ in self._contents]
        found += [Guard("object", container.path_of(key), words) for container, key, _, words in self._weak]
        for reference, cls in self._alive:
            there = cls is not type(None)
            to = f" ({in_words(reference())})" if there else ""
            found.append(Guard("reference", f"what a weak reference is to{to}", "there" if there else "gone"))
        if self._abc_token is not None:
            found.append(Guard("classes", "what is registered with abstract base classes", "the same"))
        return tuple(dict.fromkeys(found))

    def broken(self) -> str | None:
        """The first thing that changed, in words, or None."""
        for obj, name, value in self._attributes:
            if getattr(obj, name, MISSING) is not value:
                return f"`{name}` of {in_words(obj)} was replaced"
        for reference, cls in self._alive:
            if type(reference()) is not cls:
                return "what a weak reference refers to is gone, or of another class"
        for container, key, reference, words in self._weak:
            if container.get(key) is not reference():
                return _changed(container.path_of(key), words, in_words(container.get(key)))
        for container, key, cls, then in self._shapes:
            if type(now := container.get(key)) is not cls:
                return _changed(container.path_of(key), then, in_words(now))
        for container, key, value in self._fixed:
            now = container.get(key)
            if now is not value and not (_is_by_value(value) and _equal(now, value)):
                return _changed(container.path_of(key), in_words(value), in_words(now))
        for value, then in self._contents:
            if contents_of(value) != then:
                return f"what is in a {type(value).__name__} changed"
        for container, keys in self._keys:
            if _keys_of(container) != keys:
                return f"`{container.path}` has other entries than before"
        for leaf in self._leaves:
            now = leaf.container.get(leaf.key)
            if _kind(now) != leaf.kind:
                return _changed(leaf.path, leaf.then, in_words(now))
        for answer in self.answers:
            try:
                now = answer.now()
            except Exception as error:  # such as a division by what has become zero
                return f"`{answer.in_words()}` was {answer.then} and raises {type(error).__name__}"
            if now is not answer.then:
                return f"`{answer.in_words()}` was {answer.then} and is {now}"
        objects = self._others.union(id(record.obj) for record in self._records if record.kind != "tuple")
        if len(objects) < len(self._others) + sum(record.kind != "tuple" for record in self._records):
            return "one object is in two places that held different ones"
        if self._abc_token not in (None, abc.get_cache_token()):
            return "a class was registered with an abstract base class"
        return None


class _Lifted(NamedTuple):
    """A slot with a lifted value, and what the value was in words."""

    container: Container
    key: Any
    path: str
    kind: Any
    then: str
    type: str

    @staticmethod
    def of(leaf: Leaf) -> _Lifted:
        words = in_words(leaf.value), type_in_words(leaf.value)
        return _Lifted(leaf.container, leaf.key, leaf.path, _kind(leaf.value), *words)


class Answer:
    """A question that was asked of lifted numbers, and its answer then.

    Attributes:
        expr: over the numbers.
        then: the answer.
        text: the question, as Python source.
        slots: what it depends on.
    """

    def __init__(self, expr: Expr, then: bool, slots: list[Leaf]):
        used = sorted(leaves(expr))
        self.expr = expr
        self.then = then
        self.text = to_code(expr, lambda i: slots[i].path)
        self.slots = [slots[i] for i in used]
        code = to_code(expr, lambda i: f"v{i}")
        used_names = {"abs": abs, "int": int, "float": float, "str": str, "range": range, "id": id}
        names = {"__builtins__": used_names, **CODE_NAMES}
        self._check = eval(f"lambda {', '.join(f'v{i}' for i in used)}: {code}", names)

    def in_words(self) -> str:
        """The question as Python source, with no more brackets than it needs."""
        try:
            return ast.unparse(ast.parse(self.text, mode="eval"))
        except SyntaxError:  # a path through what has no name in Python, such as `<lambda>`
            return self.text

    def now(self) -> bool:
        return bool(self._check(*(slot.container.get(slot.key) for slot in self.slots)))


def all_hold(guards: Iterable[Guards]) -> Callable[[], bool]:
    """One function that says whether everything is as it was, and asks nothing twice."""
    code = SlotCode()
    terms = dict.fromkeys(term for each in guards for term in each.terms(code))
    terms.update(dict.fromkeys(code.lacks()))
    body = "\n            and ".join(terms) or "True"
    return code.function("hold()", ["try:", f"    return ({body})", "except Exception:", "    return False"])


def _matters(obj: Any, attribute: str, value: Any) -> bool:
    """Not defaults of parameters that a function does not have: reading them costs, most where audit hooks are set."""
    return attribute != "__kwdefaults__" or value is not None or obj.__code__.co_kwonlyargcount > 0


def _is_by_value(value: Any) -> bool:
    """Whether another object that is equal will do. A subclass may have an `__eq__` of its own."""
    return any(type(value) is cls for cls in _BY_VALUE) or issubclass(type(value), (np.dtype, np.generic))


def _is_zero(value: Any) -> bool:
    """Whether a value is one of several zeros that compare equal."""
    return isinstance(value, (float, complex, np.inexact)) and value == 0


def _equal(now: Any, then: Any) -> bool:
    return type(now) is type(then) and (str(now) == str(then) if _is_zero(then) else bool(now == then))


def _keys_code(container: Container, present: Any, code: SlotCode) -> list[str]:
    """Source that checks that a container has the entries it had. Those it may not have, the code collects."""
    name, cls = code.name, container.cls
    if container.weak:
        return [f"{name(_keys_of)}({name(container)}) == {name(present)}"]
    if cls is list or cls is collections.deque or container.kind == "tuple":
        return [f"len({code.holder(container)}) == {len(present)}"]
    if container.kind == "cell" and present:
        return []  # what is in it is read anyway
    if (cls is dict or container.kind in ("attrs", "class")) and container.names is not None:
        if cls is dict and container.place is None and not container.obj and container.path.endswith(".__dict__"):
            return [f"not {name(container.obj)}"]  # a function without attributes, as most are: quick, and enough
        # Entries that were there are read anyway; only others could be new.
        if absent := container.names.difference(present):
            code.absent.setdefault(code.keys(container), set()).update(absent)
        return []
    if cls is dict and all(key[0] in _TOLD_BY_TYPE for key in present):
        holder = code.holder(container)
        types = name([key[0] for key in present])
        keys = f"tuple({holder}) == {name(tuple(key for _, key in present))}"
        return [keys, f"[*map({name(type)}, {holder})] == {types}"] if present else [keys]
    return [f"{name(_keys_of)}({name(container)}) == {name(present)}"]


def _keys_of(container: Container) -> Any:
    """The keys, in order where the order is a part of what a hook can see."""
    if container.names is not None:  # names of attributes and variables
        return frozenset(key for key, _ in container.items())
    keys = [_told(key) for key, _ in container.items()]
    return tuple(keys) if container.ordered else frozenset(keys)


_TOLD_BY_TYPE = frozenset({str, int, bool, bytes, type(None)})  # equal ones of these are the same


class _Same:
    """An object as a key that equals no other's, even if the object does."""

    __slots__ = ("_obj",)

    def __init__(self, obj: Any):
        self._obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._obj is other._obj

    def __hash__(self) -> int:
        return id(self._obj)


def _told(key: Any) -> tuple[type, Any]:
    """A key as something that equals only what a hook cannot tell from it: `True == 1 == 1.0`."""
    cls = type(key)
    if cls in _TOLD_BY_TYPE:
        return cls, key
    if cls is tuple:
        return cls, tuple(map(_told, key))
    if cls is frozenset:
        return cls, frozenset(map(_told, key))
    return cls, str(key) if cls is float or cls is complex else _Same(key)


def _kind(value: Any) -> Any:
    """What of a lifted value is fixed: a number's type, an array's type, shape, dtype and whether that is weak."""
    if isinstance(value, jax.Array):
        return jax.Array, value.shape, value.dtype, getattr(value, "weak_type", False)  # keys of `jax.random` have none
    if isinstance(value, np.ndarray):
        return np.ndarray, value.shape, value.dtype
    return type(value)


def _is_of(kind: Any) -> Callable[[Any], bool]:
    """A function that says whether an array is of a kind; quick where one program gave this array and the last one."""
    last: Any = None

    def check(value: Any) -> bool:
        nonlocal last
        aval = getattr(value, "aval", None)
        if aval is not None and aval is last:
            return True
        found: bool = _kind(value) == kind
        last = aval if found else last
        return found

    return check


def _changed(path: str, then: str, now: str) -> str:
    if then == now:
        return f"`{path}` is another object than before ({now})"
    return f"`{path}` changed from {then} to {now}"
