"""What hooks are called, whose code a file holds, and which variable a traced value is stored to."""

import functools
import linecache
import os
import sysconfig
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jhop import _source
from jhop._source import RETURNED, Origin, describe_hook, hook_location, hook_name, is_user_file


def clip(ct):
    return ct


class Clipper:
    def step(self, ct):
        return ct

    @classmethod
    def build(cls, ct):
        return ct

    @staticmethod
    def plain(ct):
        return ct

    def __call__(self, ct):
        return ct


class Child(Clipper):
    pass


class Contrary:
    """Fails or lies whatever it is asked."""

    def __init__(self, answer):
        self.answer = answer

    def __getattr__(self, name):
        if self.answer is None:
            raise RuntimeError(name)
        return self.answer

    def __call__(self, ct):
        return ct


class Wraps(Contrary):
    def __getattr__(self, name):
        return self


def make_local():
    def inner(ct):
        return ct

    return inner


@functools.wraps(clip)
def decorated(ct):
    return clip(ct)


NAMES = [
    (clip, "clip"),
    (lambda ct: ct, "<lambda>"),
    (make_local(), "inner"),
    (functools.partial(clip), "partial(clip)"),
    (functools.partial(functools.partial(Clipper().step)), "partial(Clipper.step)"),  # partials of partials are merged
    (functools.partial(Clipper()), "partial(Clipper)"),
    (Clipper().step, "Clipper.step"),
    (Child().step, "Child.step"),
    (Clipper.step, "Clipper.step"),
    (Child.build, "Child.build"),
    (Clipper.plain, "Clipper.plain"),
    (Clipper(), "Clipper"),
    (Clipper, "Clipper"),
    (Contrary(None), "Contrary"),
    (Contrary(3), "Contrary"),
    (Wraps(0), "Wraps"),
    (decorated, "clip"),
    (jax.jit(clip), "clip"),
    (print, "print"),
    ([].append, "list.append"),
    (np.add, "add"),
]


@pytest.mark.parametrize(("fn", "name"), NAMES, ids=[f"{i}-{name}" for i, (_, name) in enumerate(NAMES)])
def test_hook_name(fn, name):
    assert hook_name(fn) == name
    assert name in describe_hook(fn)


@pytest.mark.parametrize(
    "fn",
    [clip, functools.partial(clip, 1), decorated, jax.jit(clip), functools.partial(jax.jit(functools.partial(clip)))],
    ids=["function", "partial", "wraps", "jit", "nested"],
)
def test_hook_location_is_that_of_the_code(fn):
    assert hook_location(fn) == (__file__, clip.__code__.co_firstlineno)


def test_hook_location_of_objects_and_builtins():
    assert hook_location(Clipper()) == (__file__, Clipper.__call__.__code__.co_firstlineno)
    assert hook_location(Child().step) == (__file__, Clipper.step.__code__.co_firstlineno)
    assert hook_location(print) is None
    assert hook_location(Wraps(0)) is None  # wraps itself for ever


def test_describe_hook():
    assert describe_hook(clip) == f"hook `clip` (test_source.py:{clip.__code__.co_firstlineno})"
    assert describe_hook(print) == "hook `print`"


STDLIB = sysconfig.get_paths()["stdlib"]


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        (__file__, True),
        ("train.py", True),
        ("/home/me/train.py", True),
        ("<string>", True),
        ("<stdin>", True),
        ("<ipython-input-3-abcdef>", True),
        ("/tmp/ipykernel_123/456.py", True),
        (os.path.join(sysconfig.get_paths()["purelib"], "optax", "clip.py"), True),
        (os.path.join(STDLIB, "site-packages", "optax", "clip.py"), True),
        (jax.__file__, False),
        (jnp.__file__, False),
        (np.__file__, False),
        (np.random.__file__, False),
        (functools.__file__, False),
        (linecache.__file__, False),
        (os.path.join(STDLIB, "json", "decoder.py"), False),
        ("<frozen importlib._bootstrap>", False),
        ("<frozen posixpath>", False),
        ("<@beartype(train.clip) at 0x7f0>", False),
        (_source.__file__, False),
        (os.path.join(os.path.dirname(_source.__file__), "_text", "html.py"), False),
    ],
)
def test_is_user_file(filename, expected):
    assert is_user_file(filename) is expected


# Names of values. Each case: the body of `hook(g)`, and the name that each of its equations gets, in order. What `hook`
# returns goes to JAX, so it has none.

PROGRAMS = {
    "plain": ("t = g * 2; return t", ["t"]),
    "chained targets": ("a = b = g * 2; return a + b", ["a", None]),
    "attribute target first": ("o.x = b = g * 2; return b", ["b"]),
    "attribute": ("o.x = g * 2; return o.x", [None]),
    "item": ("d = {}; d['k'] = g * 2; return d['k']", [None]),
    "two": ("a, b = g * 2, g * 3; return a", ["a", "b"]),
    "three": ("a, b, c = g * 2, g * 3, -g; return a", ["a", "b", "c"]),
    "four": ("a, b, c, d = g * 2, g * 3, -g, jnp.sin(g); return d", ["a", "b", "c", "d"]),
    "swap with old": ("a = g; b = g; a, b = b * 2, a * 3; return a", ["a", "b"]),
    "list targets": ("[a, b] = [g * 2, g * 3]; return a", ["a", "b"]),
    "tuple kept": ("p = (g * 2, g * 3); return p[0]", [None, None]),
    "augmented": ("t = g; t += g; t *= 2.0; return t", ["t", "t"]),
    "annotated": ("t: object = g * 2; return t", ["t"]),
    "walrus": ("return (t := g * 2) + 1.0", ["t", None]),
    "walrus in condition": ("z = (t := g * 2) if (u := -g) is not None else g; return z", ["u", "t"]),
    "operands": ("t = g * 2 + 3.0; return t", [None, "t"]),
    "call argument": ("t = jnp.sin(g * 2); return t", [None, "t"]),
    "call": ("t = jnp.sin(g); return t", ["t"]),
    "call with keywords": ("t = jnp.sum(g, axis=0); return t", ["t"]),
    "call with stars": ("t = jnp.add(*[g, g]); return t", ["t"]),
    "method": ("t = g.sum(); return t", ["t"]),
    "method of operand": ("t = (g * 2).sum(); return t", [None, "t"]),
    "property": ("m = g.reshape(1, 3); t = m.T; return t", ["m", "t"]),
    "unary": ("t = -g; u = abs(t); return u", ["t", "u"]),
    "unary plus": ("t = +(g * 2); return t", [None]),
    "compare": ("t = g > 0; return t", ["t"]),
    "item of tracer": ("t = g[1:]; return t", ["t"]),
    "item of tracer squeezed": ("t = g[0]; return t", ["t", "t"]),
    "matmul": ("t = g @ g; return t", ["t"]),
    "in-place matmul": ("t = g; t @= g; return t", ["t"]),
    "overwritten": ("t = g * 2; t = t * 3; return t", ["t", "t"]),
    "conditional": ("t = g * 2 if flag else g * 3; return t", ["t"]),
    "conditional, other branch": ("t = g * 2 if not flag else g * 3; return t", ["t"]),
    "tuple over conditional": ("a, b = g * 2, (g * 3 if flag else g); return a", ["a", "b"]),
    "tuple over comprehension": ("a, b = g * 2, [i for i in (1, 2)]; return a", ["a"]),
    "tuple over lambda": ("y = 1; a, b, c = g * 2, lambda z=1: y + z, f'{y!r:>3}{y}'; return a", ["a"]),
    "tuple over containers": ("a, b, c, d = g * 2, {1: y, 'k': y}, {*ys}, [*ys, y]; return a", ["a"]),
    "tuple over calls": ("a, b = g * 2, max(*ys, key=abs, **{}) + ys[0] + ys[:1][0] + o.m(y); return a", ["a"]),
    "tuple over logic": ("a, b = g * 2, not y and (y < 2) is True and y in ys; return a", ["a"]),
    "starred": ("a, *b = g * 2, g * 3, -g; return a", [None, None, None]),
    "comprehension": ("t = [g * i for i in (2, 3)]; return t[0]", [None, None]),
    "loop body": ("for i in (2, 3):\n    t = g * i\nreturn t", ["t", "t"]),
    "while": ("i = 0\nwhile i < 2:\n    t = g * 2; i += 1\nreturn t", ["t", "t"]),
    "with": ("with o:\n    t = g * 2\nreturn t", ["t"]),
    "return in with": ("with o:\n    return g * 2", [None]),
    "return in loop": ("for i in (2, 3):\n    return g * i", [None]),
    "return in try": ("try:\n    return g * 2\nfinally:\n    o.x = 1", [None]),
    "return tuple": ("return (g * 2, g * 3)[0]", [None, None]),
    "global": ("global kept; kept = g * 2; return kept", ["kept"]),
    "cell": ("t = g * 2; return (lambda: t)()", ["t"]),
    "nonlocal": ("t = g\ndef inner():\n    nonlocal t\n    t = g * 2\ninner()\nreturn t", ["t"]),
    "class body": ("class Box:\n    t = g * 2\nreturn Box.t", ["t"]),
    "statement": ("g * 2; return g", [None]),
    "sum": ("t = sum([g, g]); return t", ["t", "t"]),
    "sum of many names": ("a=1;b=2;c=3;d=4;e=5;f=6;h=7;i=8;j=9;k=10;l=11;m=12;n=13;p=14;q=15;r=16;s=17;u=18\n"
                          "x1, x2 = g * 2, g * 3; return x1 + x2", ["x1", "x2", None]),
    "helper": ("t = helper(g); return t", ["inside", "t"]),
    "helper of helper": ("t = twice(g); return t", ["inside", None, None, "inside", "t"]),
    "helper returned": ("return helper(g)", ["inside", None]),
    "helper used up": ("t = helper(g) * 2; return t", ["inside", None, "t"]),
    "lambda": ("t = (lambda z: z * 2)(g); return t", ["t"]),
    "method helper": ("t = o.m(g); return t", ["t"]),
    "operator of the user's class": ("t = o * g; return t", ["t"]),
    "through the standard library": ("t = wrapped(g); return t", ["t"]),
    "generator": ("t = next(gen(g)); return t", [None]),
    "returned to JAX": ("t = jax.vmap(lambda r: r * 2)(g); return t", [None]),
    "inside a call of JAX": ("t = jax.vmap(stored)(g); return t", ["inner_name"]),
    "long": ("\n".join(f"v{i} = {i}" for i in range(300)) + "\nx1, x2 = g * 2, g * 3\nreturn x1", ["x1", "x2"]),
}  # fmt: skip
PRELUDE = """
import contextlib, jax, jax.numpy as jnp

@contextlib.contextmanager
def block():
    yield

class Obj:
    def m(self, z): return z * 2
    def __mul__(self, z): return z * 2
    def __enter__(self): return self
    def __exit__(self, *exc): return None

class Deco(contextlib.ContextDecorator):
    def __enter__(self): return self
    def __exit__(self, *exc): return None

@Deco()
def wrapped(z): return z * 2

def helper(z):
    inside = z * 2
    return inside + 1.0

def twice(z): return helper(helper(z) * 3)
def gen(z): yield z * 2
def stored(z):
    inner_name = z * 2
    return inner_name

o, y, ys, flag = Obj(), 1, (1, 2), True
"""


def equations(fn, *args):
    return jax.make_jaxpr(fn)(*args).eqns


def compile_program(body, filename="program.py"):
    source = PRELUDE + "def hook(g):\n" + textwrap.indent(body, "    ")
    namespace = {"__name__": "program"}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["hook"], source


@pytest.mark.parametrize("case", PROGRAMS)
def test_names_of_values(case):
    body, expected = PROGRAMS[case]
    hook, _ = compile_program(body)
    assert [_source.eqn_name(eqn) for eqn in equations(hook, jnp.ones(3))] == expected


@pytest.mark.parametrize("body", ["return g * 2", "return (lambda z: z * 2)(g)", "with o:\n    return g * 2"])
def test_returned(body):
    hook, _ = compile_program(body)
    (eqn,) = equations(hook, jnp.ones(3))
    assert _source.stored_name(*_source.user_frames(eqn)[0]) is RETURNED
    assert _source.eqn_name(eqn) is None


def test_every_equation_of_a_call_has_the_name_of_its_result():
    hook, _ = compile_program("t = jnp.clip(g, min=0.0, max=1.0).sum() / jnp.linalg.norm(g); return t")
    assert set(map(_source.eqn_name, equations(hook, jnp.ones(3)))) == {None, "t"}


def test_rows_of_a_tracer():
    hook, _ = compile_program("for row in g:\n    t = row * 2.0\nreturn t")
    names = [_source.eqn_name(eqn) for eqn in equations(hook, jnp.ones((2, 3)))]
    assert names.count("t") == 2 and set(names) <= {"t", "row", None}


def test_an_offset_in_an_inline_cache_belongs_to_its_instruction():
    hook, _ = compile_program("t = g * 2; return t")
    (eqn,) = equations(hook, jnp.ones(3))
    code, lasti = _source.user_frames(eqn)[0]
    assert _source.stored_name(code, lasti) == _source.stored_name(code, lasti + 2) == "t"


@pytest.mark.parametrize("lasti", [-1, 0, 1, 10_000])
def test_stored_name_of_an_offset_that_makes_no_value(lasti):
    assert _source.stored_name(clip.__code__, lasti) is None


def test_origin():
    hook, source = compile_program("t = helper(g)\nu = (t *\n     3)\nreturn u", filename="origin_program.py")
    lines = source.splitlines()
    linecache.cache["origin_program.py"] = (len(source), None, source.splitlines(True), "origin_program.py")
    try:
        eqns = equations(hook, jnp.ones(3))
        origins = [_source.origin_of(*_source.user_frames(eqn)[0]) for eqn in eqns]
        line = lines.index("    inside = z * 2") + 1
        assert origins[0] == Origin("origin_program.py", line, "helper", "inside = z * 2")
        assert [origin.text for origin in origins] == ["inside = z * 2", "return inside + 1.0", "u = (t *"]
        assert [code.co_name for code, _ in _source.user_frames(eqns[0])][:2] == ["helper", "hook"]
    finally:
        del linecache.cache["origin_program.py"]
    assert _source.origin_of(compile_program("return g")[0].__code__, 0).text == ""


def test_frames_of_jit_on_a_second_trace_are_the_second_call():
    hook, _ = compile_program("a = jnp.where(g > 0, g, 0.0); b = jnp.where(g > 1, g, 0.0); return a + b")
    names = [_source.eqn_name(eqn) for eqn in equations(hook, jnp.ones(3))]
    assert "a" in names and "b" in names
    assert names == [_source.eqn_name(eqn) for eqn in equations(hook, jnp.ones(3))]


def test_an_equation_without_traceback_has_no_frames():
    class Bare:
        class source_info:
            traceback = None

    assert _source.raw_frames(Bare) == [] and _source.eqn_name(Bare) is None
