"""Random hook programs, as Python source: state of many shapes, hooks that read and write it, a function with hooks.

A program is the text of a module. It makes its objects, defines `HOOKS`, and a function `program(flow, point, x, up)`,
in which `point(i, value)` puts hook i on a value and `flow` has the control flow. What a program can do is what jhop
promises to trace or to run on the host; four modes say where hooks sit, which bounds what they do:

- "plain": outside, in `checkpoint` and in an inner `jit`; hooks do anything;
- "loops": in `scan` and `fori_loop` too; as jhop unrolls such loops, hooks do anything but compute with huge ints;
- "branches": in `cond` too, where hooks write numbers and arrays and ask for nothing;
- "anywhere": in `while_loop` and long scans as well, where hooks do what they do in "loops": not all can be traced.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

HEAD = """\
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

XS = jnp.array([1.5, 0.5, 1.25])
K = 3
RATE = 0.5
SCALE = 0.75
COUNT = 0
TOTALS = {"n": 1, "x": 0.25}


class Child:
    def __init__(self, n, m):
        self.n = n
        self.m = m


def bump(o):
    o.n += 1
    return o.n % 5


def leap(o):
    o.n += 7
    return o.n % 3


HELPERS = [bump]


def descend(flow, fn, v):
    def body(carry):
        i, w = carry
        return i + 1, w - 0.1 * jax.grad(lambda w: (fn(w) ** 2).sum())(w)

    return flow.while_loop(lambda carry: carry[0] < 3, body, (0, jax.lax.stop_gradient(v)))[1]
"""

# Fields of objects: what each begins as, and the places in it that hold a value of a kind, where `@` is the field.
FIELDS = {
    "n": (["3", "-2", "0", "11"], {"int": ["@"]}),
    "steps": (["0", "5"], {"int": ["@"]}),
    "big": (["2**40", "-(2**33) + 1", "2**31 - 1", "7"], {"big": ["@"]}),
    "x": (["0.5", "-1.25", "2.0"], {"float": ["@"]}),
    "decay": (["0.75", "1.5"], {"float": ["@"]}),
    "on": (["True", "False"], {"bool": ["@"]}),
    "name": (["'warm'", "'cold'"], {"str": ["@"]}),
    "maybe": (["None", "jnp.ones(3)"], {"maybe": ["@"]}),
    "m": (["jnp.zeros(3)", "jnp.array([0.5, -1.0, 2.0])"], {"array": ["@"]}),
    "last": (["jnp.float32(0.25)", "jnp.float32(-2)"], {"scalar": ["@"]}),
    "w": (["np.array([0.5, 1.0, 1.5], np.float32)", "np.ones(3, np.float32)"], {"numpy": ["@"]}),
    "s": (["np.float32(0.5)", "np.float32(1.5)"], {"npscalar": ["@"]}),
    "items": (["[1, 2]", "[4]", "[0, 3, 1]"], {"list": ["@"]}),
    "alt": (["[5]", "[2, 2]"], {"list": ["@"]}),
    "log": (["[]", "[jnp.ones(3)]"], {"log": ["@"]}),
    "table": (["{'n': 1, 'k': 4}", "{'n': 0}"], {"int": ["@['n']"], "dict": ["@"]}),
    "rates": (["{'x': 0.5}", "{'x': 1.25, 'y': 2.0}"], {"float": ["@['x']"]}),
    "sums": (["{'m': jnp.zeros(3)}"], {"array": ["@['m']"], "arrays": ["@"]}),
    "seen": (["set()", "{1, 2}"], {"set": ["@"]}),
    "ring": (["collections.deque([0.5, 1.0], maxlen=3)", "collections.deque([2.0])"], {"deque": ["@"]}),
    "tree": (
        ["{'a': [1, {'b': [2.0], 'c': [7]}], 'm': jnp.ones(3)}"],
        {"int": ["@['a'][0]"], "float": ["@['a'][1]['b'][0]"], "list": ["@['a'][1]['c']"], "array": ["@['m']"]},
    ),
    "pair": (["(2, jnp.ones(3))"], {"pair": ["@"]}),
    "child": (["Child(1, jnp.zeros(3))"], {"int": ["@.n"], "array": ["@.m"], "child": ["@"]}),
}  # fmt: skip
PLAIN = ("int", "big", "float", "array", "scalar")  # what may be written in a branch

# Statements by the kind of place that they write: `@` is the place, `$int` and the like an expression of that kind,
# `$_int` a place.
WRITES = {
    "int": ["@ += 1", "@ += 2", "@ = (@ * 3 - $int) % 97", "@ = -@", "@ = $int % 50", "@ -= $small", "@ = @ // 2"],
    "big": ["@ += 2**40", "@ = @ * 3 + $small", "@ ^= 2**35 + 5", "@ = @ // 3", "@ = -@", "@ = (@ << 2) | 1"],
    "float": ["@ = 0.5 * @ + $rate", "@ = $rate - @ * 0.75", "@ = abs(@) * 0.5 + 0.125", "@ /= 2", "@ = $float * 0.5",
              "@ = @ * 0.5 + 0.125 * ($int % 5)"],
    "bool": ["@ = not @", "@ = $bool", "@ = $bool and @"],
    "str": ["@ = 'warm' if $bool else 'cold'", "@ = @[-6:] + 'x'", "@ = '%d' % ($int % 3)"],
    "maybe": ["@ = ct if @ is None else @ * 0.5 + ct", "@ = $array if $bool else None", "@ = None"],
    "array": ["@ = @ * 0.5 + ct", "@ = 0.5 * @ + 0.25 * $array", "@ = ct", "@ = @.at[0].set($rate)", "@ = $array",
              "@ *= 0.5", "@ = jnp.where(ct > 0, @, ct)", "@ -= 0.125 * $array"],
    "scalar": ["@ = 0.9 * @ + 0.1 * jnp.sum(ct)", "@ = jnp.max($array)", "@ = jnp.tanh(@ + $rate)"],
    "numpy": ["@ *= np.float32(0.5)", "@ -= 0.5 * $_numpy", "@ -= 1", "@ = @ * 0.5 + 0.25 * $_numpy", "@ /= 2"],
    "npscalar": ["@ = @ * np.float32(0.5)", "@ = np.float32($rate)"],
    "list": ["@.append($int % 20)", "@[-1:] = [$int % 20, 1]", "@[0] = $int % 20", "@[-1] += 1", "@.insert(0, $small)",
             "@.reverse()", "@.sort()", "@ = @[-2:] + [$small]", "if len(@) > 1: @.pop()", "if len(@) > 2: del @[0]",
             "@.extend([$small, 2])", "@ += [$small]", "@ = [v + 1 for v in @][-3:]", "@, $list = $list, @"],
    "log": ["@.append(ct)", "@.append(jnp.sum(ct) * 0.5)", "@.append($array)", "if len(@) > 2: @.pop(0)", "@ = @[-2:]",
            "@.extend([ct, ct * 2])"],
    "dict": ["@['n'] += 1", "@['a%d' % ($int % 3)] = $int % 9", "@['k'] = @.get('k', 2) + 1", "@.pop('k', None)",
             "if 'a1' in @: del @['a1']", "@.setdefault('z', $small)", "@.update(n=$int % 9)",
             "for key in list(@): @[key] += 1"],
    "arrays": ["@['new'] = ct", "@['m'] = @.pop('new', ct)", "@.update(m=$array)"],
    "set": ["@.add($int % 5)", "@.discard(2)", "@ |= {$small}", "@ = {v for v in @ if v > 1}"],
    "deque": ["@.append($rate)", "@.appendleft(@[0] * 0.5)", "@.rotate(1)", "if len(@) > 1: @.popleft()",
              "@[0] = 0.5 * @[0] + 0.25"],
    "pair": ["@ = (@[0] + 1, ct)", "@ = ((@[0] * 3) % 11, @[1] * 0.5 + ct)"],
    "child": ["@ = Child($int % 9, ct)", "@.n, @.m = @.n + 1, @.m + ct", "@.extra = $small"],
}  # fmt: skip

EXPRESSIONS = {
    "small": ["1", "2", "3", "5"],
    "rate": ["0.25", "1.5", "-0.5", "RATE"],
    "int": ["$small", "$_int", "$_int", "$_int", "($int + $small)", "($int * 2 - $int)", "len($_list)", "K",
            "($_big % 13)", "int($bool)", "abs($int)", "min($int, $_int)", "len($_set)", "$_pair[0]", "len($_log)",
            "TOTALS['n']", "$_list[0]", "$_dict.get('k', 2)", "($int // 3)", "sum($_list)", "(-$_int)", "~$_int"],
    "float": ["$rate", "$_float", "$_float", "$_float", "($float * 0.5 + $rate)", "(0.25 * ($int % 7))",
              "$_deque[-1]", "TOTALS['x']", "min($float, 2.0)", "max($_float, $rate)", "($_float / 4)"],
    "bool": ["$_bool", "not $_bool", "$int % 2 == 0", "$int > $small", "$_int < $int", "$_float > $rate",
             "2 in $_set", "'k' in $_dict", "$_maybe is None", "$_str == 'warm'", "len($_list) > 2",
             "($bool and $bool)", "($bool or $bool)", "$_big > 2**39", "1 < $_int < 9", "bool($_log)",
             "isinstance($_float, float)", "$_list == [1, 2]", "any(v > 3 for v in $_list)"],
    "array": ["ct", "ct", "$_array", "$_array", "(ct * $float)", "(ct + $_array)", "jnp.sin($array)", "($_numpy * ct)",
              "(ct * $_npscalar)", "(ct * $_scalar)", "$_pair[1]", "($_array - $int % 7)", "jnp.full(3, $float)"],
    "list": ["$_list"],
}  # fmt: skip
RETURNS = ["ct", "ct", "None", "", "ct * $float", "ct + 0.5 * $_array", "ct * (0.5 + 0.1 * ($int % 7))",
           "jnp.tanh(ct) * $float", "ct.clip(-2.0, 2.0)", "$float * ct + $int % 3", "ct * $_scalar",
           "jnp.where(ct > 0, ct, ct * $float)"]  # fmt: skip
ASKS = ("bool(", "not ", " if ", "min(", "max(", "for ", "len(", "int($", "sum(", "in @")

# What happens between calls, by kind.
CHANGES = {
    "int": ["@ = 6", "@ = -1", "@ += 3"],
    "big": ["@ = 2**52 + 1", "@ = 3"],
    "float": ["@ = 1.75", "@ = -0.5"],
    "bool": ["@ = not @"],
    "str": ["@ = 'warm'", "@ = 'cold'"],
    "maybe": ["@ = None", "@ = jnp.full(3, 0.5)"],
    "array": ["@ = jnp.array([1.0, 0.25, -0.5])"],
    "scalar": ["@ = jnp.float32(0.75)"],
    "numpy": ["@ = np.array([2.0, 0.5, 0.25], np.float32)", "@[1] = 3.0"],
    "npscalar": ["@ = np.float32(0.75)"],
    "list": ["@ = [8, 1]", "@.append(4)", "@[0] = 9", "@[:] = [3]"],
    "log": ["@.clear()", "@ = []"],
    "dict": ["@['k'] = 5", "@['z'] = 8", "@ = {'n': 2}"],
    "set": ["@.add(2)", "@ = {1}"],
    "deque": ["@.append(1.25)", "@ = collections.deque([0.25], maxlen=2)"],
    "pair": ["@ = (4, jnp.zeros(3))"],
    "child": ["@ = Child(2, jnp.ones(3))"],
}  # fmt: skip


Places = dict[str, list[str]]
HOLE = re.compile(r"\$(_?)([a-z]+)")


@dataclasses.dataclass
class Program:
    source: str
    changes: list[list[str]]  # statements per step, run in the module before it
    mode: str

    def __repr__(self) -> str:
        return f"\n# {self.mode}\n{self.source}\n# changes: {self.changes}"


class Generator:
    """Makes one program.

    Args:
        number: gives an int from one to another, both included.
    """

    def __init__(self, number: Callable[[int, int], int], mode: str, marks: bool):
        self.number, self.mode, self.marks = number, mode, marks
        self.objects: dict[str, str] = {}  # global name -> class
        self.fields: dict[str, list[str]] = {}  # class -> fields
        # Few kinds of state in most programs: where there are many, something in each step costs a trace, and a guard
        # that is missing does not show.
        kinds = PLAIN if mode == "branches" else tuple(WRITES)
        self.kinds = {"int", *(kinds if self.chance(3) else self.some(kinds, 1, 2))}

    def one(self, choices: Any) -> Any:
        choices = list(choices)
        return choices[self.number(0, len(choices) - 1)]

    def some(self, choices: Any, least: int, most: int) -> list[Any]:
        rest = list(choices)
        return [rest.pop(self.number(0, len(rest) - 1)) for _ in range(self.number(least, min(most, len(rest))))]

    def chance(self, in_ten: int) -> bool:
        return self.number(0, 9) >= 10 - in_ten

    # Objects.

    def class_source(self, cls: str, methods: list[str]) -> list[str]:
        fields = self.fields[cls]
        values = {f: self.one(FIELDS[f][0]) for f in fields}
        styles = ["plain", "slots", "dataclass", "property", "class attribute"]
        style = self.one(styles[:4] if self.mode == "branches" else styles)  # which gets an entry when it is written
        body = methods and ["", *methods]
        init = ["    def __init__(self):", *(f"        self.{f} = {v}" for f, v in values.items())]
        if style == "slots":
            return [f"class {cls}:", f"    __slots__ = ({', '.join(map(repr, fields))},)", "", *init, *body]
        if style == "dataclass":
            made = [f"    {f}: object = dataclasses.field(default_factory=lambda: {v})" for f, v in values.items()]
            return ["@dataclasses.dataclass(eq=False)", f"class {cls}:", *made, *body]
        if style == "property":
            own = ["    @property", "    def n(self):", "        return self._n", "", "    @n.setter"]
            own += ["    def n(self, value):", f"        self._n = {self.one(['value', 'value', 'value + 1'])}"]
            return [f"class {cls}:", *init, "", *own, *body]
        if style == "class attribute":
            own = [*(line for line in init if " self.n " not in line), "        pass"]
            return [f"class {cls}:", f"    n = {values['n']}", "", *own, *body]
        return [f"class {cls}:", *init, *body]

    def places(self, owners: dict[str, str], extra: Places | None = None) -> Places:
        """Kind -> places, of objects by name: name -> class."""
        found = {kind: list(places) for kind, places in (extra or {}).items()}
        found["owner"] = list(owners)
        for name, cls in owners.items():
            for field in self.fields[cls]:
                for kind, forms in FIELDS[field][1].items():
                    found.setdefault(kind, []).extend(form.replace("@", f"{name}.{field}") for form in forms)
        return found

    # Hooks.

    def fits(self, text: str, places: Places) -> bool:
        """Whether there are all the places that a text names, and the mode allows it."""
        wanted = [kind for own, kind in HOLE.findall(text) if own or kind == "list"]
        if self.mode != "plain" and "$_big" in text:
            return False
        if self.mode == "branches" and (any(ask in text for ask in ASKS) or "$bool" in text):
            return False
        return all(places.get(kind) for kind in wanted)

    def fill(self, text: str, places: Places, deep: int = 3) -> str:
        """Puts an expression where a text has `$kind`, and a place where it has `$_kind`."""

        def made(hole: re.Match[str]) -> str:
            own, kind = hole.groups()
            if own or kind == "list":
                return self.one(places[kind])
            forms = [form for form in EXPRESSIONS[kind] if self.fits(form, places)]
            flat = [form for form in forms if all(own for own, _ in HOLE.findall(form))]
            return self.fill(self.one(forms if deep or not flat else flat), places, max(deep - 1, 0))

        return HOLE.sub(made, text)

    def statement(self, places: Places) -> str:
        kind = self.one(kind for kind in WRITES if places.get(kind) and kind in self.kinds)
        text = self.one([form for form in WRITES[kind] if self.fits(form, places)])
        if "$list" in text:
            other = self.one(places["list"])
            text = text.replace("$list", other)
        return self.fill(text.replace("@", self.one(places[kind])), places)

    def block(self, places: Places, deep: int) -> list[str]:
        lines: list[str] = []
        places = {kind: list(found) for kind, found in places.items()}  # locals of this block are its own
        for _ in range(self.number(1, 4 if deep else 2)):
            branching = deep and self.mode != "branches" and self.chance(3)
            lines += self.compound(places, deep) if branching else self.simple(places)
        return lines

    def simple(self, places: Places) -> list[str]:
        choice = self.number(0, 11)
        if choice == 0:
            name = f"v{len(places['int'])}"
            line = f"{name} = {self.fill('$int', places)}"
            places["int"].append(name)
            return [line]
        if choice == 1:
            forms = ["ct = ct * $float", "ct = ct + 0.25 * $array", "ct = 0.5 * $array"]
            return [self.fill(self.one(forms), places)]
        if choice == 2:
            return [f"ct = ct * (0.5 + 0.25 * {self.one(['bump', 'HELPERS[0]'])}({self.one(places['owner'])}))"]
        if choice == 3:
            forms = ["TOTALS['n'] += $small", "TOTALS['x'] = 0.5 * TOTALS['x'] + $rate"]
            return [self.fill(self.one(forms), places)]
        return [self.statement(places)]

    def compound(self, places: Places, deep: int) -> list[str]:
        kind = self.one(["if", "if", "else", "for", "each", "return", "try"])
        asked = self.fill("$bool", places)
        inner = indent(self.block(places, deep - 1))
        if kind == "else":
            return [f"if {asked}:", *inner, "else:", *indent(self.block(places, deep - 1))]
        if kind == "for":
            return [f"for _i in range({self.fill('$int', places)} % 3):", *inner]
        if kind == "each" and places.get("list"):
            skip = ["    if _v % 2:", "        continue"]
            return [f"for _v in {self.one(places['list'])}[:3]:", *inner, *skip, *indent(self.simple(places))]
        if kind == "try" and places.get("dict"):
            return ["try:", f"    {self.one(places['dict'])}['z'] += 1", "except KeyError:", *inner]
        if kind == "return":
            return [f"if {asked}:", *inner, f"    {self.returned(places)}"]
        return [f"if {asked}:", *inner]

    def returned(self, places: Places) -> str:
        form = self.one([form for form in RETURNS if self.fits(form, places)])
        return f"return {self.fill(form, places)}".rstrip()

    def body(self, index: int, places: Places) -> list[str]:
        lines = [f"MARKS.append(({index}, np.asarray(ct)))"] if self.marks and self.chance(5) else []
        return indent([*lines, *self.block(places, 2), self.returned(places)])

    def hook(self, i: int, methods: dict[str, list[str]]) -> tuple[list[str], str]:
        """(source at the top of the module, expression that is the hook)."""
        names = list(self.objects)
        style = self.one(["global", "closure", "partial", "keyword", "default", "method", "method", "callable"])
        owner, other = self.one(names), self.one(names)
        if style in ("method", "callable"):
            cls = self.objects[owner]
            name = f"hook{i}" if style == "method" or "def __call__" in str(methods[cls]) else "__call__"
            body = self.body(i, self.places({"self": cls, other: self.objects[other]}))
            methods[cls] += indent(["", f"def {name}(self, ct):", *body])
            return [], owner if name == "__call__" else f"{owner}.{name}"
        if style == "global":
            places = self.places({owner: self.objects[owner], other: self.objects[other]}, {"int": ["COUNT"]})
            return [f"def hook{i}(ct):", "    global COUNT", *self.body(i, places)], f"hook{i}"
        mine = {"o": self.objects[owner], "p": self.objects[other]}
        if style == "partial":
            return [f"def hook{i}(o, p, ct):", *self.body(i, self.places(mine))], (
                f"functools.partial(hook{i}, {owner}, {other})"
            )
        if style == "keyword":
            places = self.places(mine, {"list": ["c"]})
            return [f"def hook{i}(ct, c, *, o, p={other}):", *self.body(i, places)], (
                f"functools.partial(hook{i}, c=[4, 1], o={owner})"
            )
        if style == "default":
            places = self.places(mine, {"list": ["c"], "dict": ["d"]})
            head = f"def hook{i}(ct, o={owner}, c=[1, 2], *, p={other}, d={{'n': 1}}):"
            return [head, *self.body(i, places)], f"hook{i}"
        places = self.places(mine, {"int": ["k"], "float": ["rate"], "array": ["m"], "bool": ["on"]})
        inner = ["def hook(ct):", "    nonlocal k, rate, m, on", *self.body(i, places)]
        start = ["k, rate, m, on = 2, 0.5, jnp.zeros(3), False"]
        return [f"def make{i}(o, p):", *indent([*start, "", *inner, "", "return hook"])], f"make{i}({owner}, {other})"

    # The function with the hooks.

    def program(self, n: int) -> list[str]:
        lines, values = ["v0 = x * SCALE"], ["v0"]
        for i in range(1, self.number(1, 3) + 1):
            v = self.one(values)
            kinds = [
                f"point(#, jnp.sin({v}) * 1.5)",
                f"point(#, point(#, {v} * 0.75) + 0.5)",
                f"flow.checkpoint(lambda v: jnp.sin(point(#, jnp.cos(v)) * 2))({v})",
                f"flow.jit(lambda v: point(#, jnp.sin(point(#, v)) * 2))({v})",
                f"flow.scan(lambda c, s: (point(#, jnp.sin(c) * s), None), {v}, XS, reverse={self.chance(5)})[0]",
                f"flow.fori(0, 3, lambda i, c: jnp.cos(point(#, c * 1.25)), {v})",
                f"flow.scan(flow.checkpoint(lambda c, s: (point(#, jnp.sin(c)) * s, c.sum())), {v}, XS[:2])[0]",
                f"flow.cond(up, lambda v: point(#, jnp.sin(v)), lambda v: v * point(#, point(#, v)), {v})",
                f"flow.scan(lambda c, s: (flow.cond(s > 1, lambda c: point(#, c * s), jnp.sin, c), None), {v}, XS)[0]",
                f"descend(flow, lambda w: flow.cond(w.sum() > 0.31, lambda w: point(#, w * 2), jnp.sin, w), {v})",
                f"flow.scan(lambda c, _: (point(#, jnp.cos(c)), None), {v}, None, length=66)[0]",
            ]
            kinds = kinds[: {"plain": 4, "loops": 7, "branches": 9, "anywhere": 11}[self.mode]]
            values.append(f"v{i}")
            lines.append(f"v{i} = {self.one(kinds)}")
        used = itertools.count()  # each hook once before any is used again: what is there to no use costs traces
        text = re.sub("#", lambda _: str(i if (i := next(used)) < n else self.number(0, n - 1)), "\n".join(lines))
        total = " + ".join(f"{0.5 + 0.25 * i} * {v}" for i, v in enumerate(values))
        return ["def program(flow, point, x, up):", *indent([*text.splitlines(), f"return (({total}) ** 2).sum()"])]

    # Between the steps.

    def change(self, n: int) -> str:
        places = self.places(self.objects)
        choice = self.number(0, 9)
        if choice == 0:
            return self.one(["K = 5", "RATE = 0.75", "TOTALS['n'] = 8", "SCALE = 1.25", "TOTALS = {'n': 2, 'x': 1.5}"])
        if choice == 1:
            return self.one(["bump = leap", "HELPERS[:] = [leap]", "HELPERS[0] = bump"])
        if choice == 2:
            return f"HOOKS[{self.number(0, n - 1)}] = HOOKS[{self.number(0, n - 1)}]"
        if choice == 3:
            name = self.one(self.objects)
            return f"{name} = {self.objects[name]}()"
        if choice == 4 and self.mode == "plain":
            return f"{self.one(places['int'])} = 1.5"
        kind = self.one([kind for kind in CHANGES if places.get(kind)])
        return self.one(CHANGES[kind]).replace("@", self.one(places[kind]))

    def make(self) -> Program:
        for name, cls in zip("ABD"[: self.number(1, 3)], ("C0", "C1", "C2"), strict=False):
            written = [field for field, (_, kinds) in FIELDS.items() if not self.kinds.isdisjoint(kinds)]
            fields = self.some(written, 1, 5) + self.some(FIELDS, 0, 3)
            self.fields[cls] = list(dict.fromkeys(["n", *fields]))
            self.objects[name] = cls
        made = dict(self.objects)
        if self.chance(3):
            self.objects["E"] = "C0"  # an alias
        methods: dict[str, list[str]] = {cls: [] for cls in self.fields}
        n = self.number(1, 4)
        hooks = [self.hook(i, methods) for i in range(n)]
        lines = [HEAD]
        for name, cls in made.items():
            lines += [*self.class_source(cls, methods[cls]), "", "", f"{name} = {cls}()", ""]
        lines += ["E = A", ""] if "E" in self.objects else []
        for source, _ in hooks:
            lines += [*source, ""] if source else []
        program = self.program(n)
        n = min(n, "".join(program).count("point("))
        lines += [f"HOOKS = [{', '.join(expression for _, expression in hooks[:n])}]", "", *program, ""]
        most = self.one([0, 2])
        steps = range(self.number(2, 4))
        changes = [[self.change(n) for _ in range(self.number(0, most))] for _ in steps]
        return Program("\n".join(lines), changes, self.mode)


def indent(lines: list[str]) -> list[str]:
    return ["    " + line if line else line for line in lines]


def programs(mode: str, *, marks: bool = False) -> st.SearchStrategy[Program]:
    """Programs of a mode; with `marks`, some hooks note in `MARKS` that they ran, and what they saw.

    Half of them are made from a seed: they are as unlike each other as can be. Those that Hypothesis draws, it makes
    smaller when they fail, but it begins with many that are small and much alike.
    """

    @st.composite
    def drawn(draw: Any) -> Program:
        return Generator(lambda least, most: draw(st.integers(least, most)), mode, marks).make()

    def seeded(seed: int) -> Program:
        return Generator(random.Random(seed).randint, mode, marks).make()

    return drawn() | st.integers(0, 2**32).map(seeded)
