"""Random hooks over random state: compiled, gradients, every object and the order of effects are those of Python."""

import collections
import functools
import itertools
import linecache
import types
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_hooks import HEAD, Program, programs
from test_state_control_flow import JAX, PYTHON

import jhop
from jhop._guards import Guards

X = jnp.array([0.5, -1.0, 0.75], jnp.float32)
counter = itertools.count()

# All that may be refused of what random programs do.
REFUSALS = ["counts there to more than the device's ints hold", "in place (`+=` and the like)"]

# What programs may raise: a local variable may not be there.
ERRORS = (jhop.JhopError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, NameError)

# Two worlds run one source. The reference has no jhop in it: a `custom_vjp` calls each hook with real values, and
# Python's own loops and branches stand for JAX's.


def reference(value, hook):
    def backward(_, ct):
        out = hook(ct)
        return (ct if out is None else jax.lax.convert_element_type(out, ct.dtype),)  # no weak type goes on

    @jax.custom_vjp
    def same(value):
        return value

    same.defvjp(lambda value: (value, None), backward)
    return same(value)


def python_while(goes_on, body, init):
    while goes_on(init):
        init = body(init)
    return init


def python_fori(lower, upper, body, init):
    return functools.reduce(lambda carry, i: body(i, carry), range(lower, upper), init)


REFERENCE = types.SimpleNamespace(**vars(PYTHON), fori=python_fori, while_loop=python_while)
COMPILED = types.SimpleNamespace(**vars(JAX), fori=jax.lax.fori_loop, while_loop=jax.lax.while_loop)


# A part of the module: the function reaches by names what it uses, and not all objects, which it would be guarded for.
LOSS = """

def point(i, value):
    return PUT(value, HOOKS[i])


def loss(x, up):
    return program(FLOW, point, x, up)
"""


class World:
    """One run of a program's source: `gradient(x, up)` and all that its names reach."""

    def __init__(self, source, compiled, **options):
        self.scope = {"__name__": "random_program", "MARKS": []}
        self.scope["PUT"], self.scope["FLOW"] = (jhop.hook, COMPILED) if compiled else (reference, REFERENCE)
        name, source = f"/random/program_{next(counter)}.py", source + LOSS
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), self.scope)
        gradient = jax.grad(self.scope["loss"])
        self.gradient = jhop.jit(gradient, **options) if compiled else gradient

    def step(self, i):
        """The gradient, or the class of the exception."""
        try:
            return np.asarray(self.gradient(X * (1 - 0.25 * i), jnp.bool_(i % 3 != 1)))
        except ERRORS as error:
            return error

    def change(self, statement):
        """What happens between calls; False if it fails."""
        try:
            exec(statement, self.scope)
        except (LookupError, TypeError, AttributeError):
            return False
        return True

    def state(self):
        names = self.scope.keys() - {"__builtins__", "PUT", "FLOW"}
        return Snapshot().of({name: self.scope[name] for name in sorted(names)})


class Snapshot:
    """What values are, types and all, and which of them are one object."""

    def __init__(self):
        self.seen = {}

    def of(self, value):
        kind = type(value).__name__
        assert kind != "Scalar", "a symbol was left behind"
        assert not isinstance(value, jax.core.Tracer), "a tracer was left behind"
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            own = "jax" if isinstance(value, jax.Array) else kind
            return (own, str(value.dtype), getattr(value, "weak_type", False), np.array(value))
        if isinstance(value, (bool, int, float, str, type(None))):
            return (kind, repr(value))
        if isinstance(value, (types.ModuleType, types.BuiltinFunctionType, type(jax.jit))) and kind != "function":
            return kind
        if id(value) in self.seen:
            return ("the same as", self.seen[id(value)])
        self.seen[id(value)] = len(self.seen)
        return (kind, *map(self.of, self.parts(value)))

    def parts(self, value):
        if isinstance(value, dict):
            return [part for pair in value.items() for part in pair]
        if isinstance(value, set):
            return sorted(value)
        if isinstance(value, collections.deque):
            return [value.maxlen, *value]
        if isinstance(value, (list, tuple)):
            return value
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, types.MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return [value.__qualname__, *cells, value.__defaults__, value.__kwdefaults__, vars(value)]
        if isinstance(value, type):
            return [value.__qualname__, *(v for k, v in vars(value).items() if k == "n" and type(v) is not property)]
        slots = [name for name in getattr(value, "__slots__", ()) if hasattr(value, name)]
        return [*slots, *(getattr(value, name) for name in slots), getattr(value, "__dict__", None)]


def agree(got, expected, where=""):
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5, err_msg=where)
    elif isinstance(expected, tuple) and expected[0] == "dict" == got[0]:
        assert got[1::2] == expected[1::2], f"{where}: keys {got[1::2]} instead of {expected[1::2]}"
        for key, ours, theirs in zip(expected[1::2], got[2::2], expected[2::2], strict=True):
            agree(ours, theirs, f"{where}, {key[-1]}")
    elif isinstance(expected, tuple) and len(got) == len(expected):
        for ours, theirs in zip(got, expected, strict=True):
            agree(ours, theirs, where)
    else:
        assert got == expected, f"{where}: {got} instead of {expected}"


def check(program, **options):
    """Compiled, a program does what it does in Python, in each of several steps with changes between them."""
    theirs, ours = World(program.source, False), World(program.source, True, **options)
    agree(ours.state(), theirs.state(), "before")
    for i, changes in enumerate([[], *program.changes]):
        for change in changes:
            assert ours.change(change) == theirs.change(change)
        before = ours.state()
        expected, got = theirs.step(i), ours.step(i)
        if isinstance(expected, Exception) or isinstance(got, Exception):
            # Eager hooks leave what they wrote before they failed; compiled ones nothing.
            assert isinstance(got, Exception), f"step {i}: no exception, but {expected!r} in Python"
            agree(ours.state(), before, f"step {i}, refused")
            refused = isinstance(got, jhop.Unsupported) and any(reason in str(got) for reason in REFUSALS)
            assert isinstance(expected, Exception) or refused, f"step {i}: {type(got).__name__}: {got}"
            return
        agree(got, expected, f"step {i}, gradient")
        agree(ours.state(), theirs.state(), f"step {i}")


def share(of):
    """A part of the profile's examples: these take a while."""
    return hypothesis.settings(max_examples=max(1, hypothesis.settings().max_examples // of))


# Programs in which a number decides on a branch, and no other guard notices that it changes: what few random ones do.
ASKING = """
class Box:
    def __init__(self):
        self.n = 0
        self.x = 0.25
        self.calls = 0

    def hook(self, ct):
        self.calls += 1
        QUESTION
            ct = ct * 0.5
        return ct * 1.5


A = Box()
HOOKS = [A.hook]


def program(flow, point, x, up):
    v0 = x * SCALE
    v1 = WHERE
    return ((v0 + v1) ** 2).sum()
"""
QUESTIONS = {
    "counted": ("if self.calls % 4 == 0:", [[], []]),  # nothing but the hook itself changes the number
    "int": ("if self.n > 2:", [["A.n = 3"], ["A.n = 2"]]),
    "parity": ("if self.n % 2:", [["A.n = 7"], ["A.n = 8"]]),
    "float": ("if self.x * 2.0 < 1.0:", [["A.x = 0.75"], ["A.x = 0.25"]]),
    "two numbers": ("if self.n == self.calls:", [["A.n = A.calls + 1"], ["A.n = 0"]]),
    "length of a loop": ("for _ in range(self.n):", [["A.n = 2"], ["A.n = 1"]]),
    "global": ("if COUNT > 1 or K == 4:", [["COUNT = 2"], ["COUNT = 0; K = 4"]]),
}
PLACES = {"plain": "point(0, jnp.sin(v0) * 1.5)", "loops": "flow.scan(lambda c, s: (point(0, c * s), None), v0, XS)[0]"}
ASKED = [*(("plain", question) for question in QUESTIONS), ("loops", "counted"), ("loops", "length of a loop")]


def asking(question, mode):
    text, changes = QUESTIONS[question]
    source = HEAD + ASKING.replace("QUESTION", text).replace("WHERE", PLACES[mode])
    return Program(source, [*changes, [], []], mode)


def with_examples(mode):
    """Runs a test of programs of a mode on those, too."""

    def decorate(test):
        for where, question in ASKED:
            test = hypothesis.example(asking(question, mode))(test) if where == mode else test
        return test

    return decorate


@pytest.mark.parametrize(("mode", "question"), ASKED)
def test_examples_fail_without_guards_on_numbers(mode, question, monkeypatch):
    answered = Guards.__init__

    def without_answers(self, walk, answers, **options):
        answered(self, walk, [], **options)

    monkeypatch.setattr(Guards, "__init__", without_answers)
    with pytest.raises(AssertionError, match="gradient"):
        check(asking(question, mode), fullgraph=True)


@pytest.mark.parametrize("mode", ["plain", "loops", "branches"])
def test_traced(mode):
    @share(1)
    @with_examples(mode)
    @hypothesis.given(programs(mode))
    def run(program):
        check(program, fullgraph=True)

    run()


@pytest.mark.parametrize("mode", ["plain", "loops", "branches", "anywhere"])
def test_some_on_the_host(mode):
    @share(3)
    @hypothesis.given(programs(mode, marks=mode != "anywhere"))
    def run(program):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            check(program)

    run()
