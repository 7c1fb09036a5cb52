"""A traced hook may not act outside the trace, and the operators it applies are recorded."""

import atexit
import builtins
import collections
import contextlib
import contextvars
import copy
import cProfile
import ctypes
import datetime
import functools
import importlib
import io
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import pprint
import random
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop
from jhop import _effects, _profiling, _source
from jhop._effects import watch
from jhop._errors import Unsupported, advising
from jhop._source import describe_hook
from jhop._watched import OperatorRecord

monitoring = getattr(sys, "monitoring", None)
ones = jnp.ones(3)


def traced(hook, *args, **options):
    """Traces `hook` under a watch; returns what the watch saw."""
    with watch(hook, **options) as seen:
        jax.make_jaxpr(lambda *args: hook(*args))(*(args or (ones,)))  # JAX keeps the traces of a function it has seen
    return seen


# Each case: the label, and the call. Every one would leave a mark in `effects` if it were made.

scratch = tempfile.gettempdir()
target = os.path.join(scratch, f"jhop-test-effects-{os.getpid()}")
rng, state, dice = np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
database = sqlite3.connect(":memory:", check_same_thread=False)
buffer, console = io.StringIO(), io.TextIOWrapper(io.BytesIO())
log = logging.getLogger("test_effects")
log.addHandler(logging.StreamHandler(buffer))
printer = functools.partial(print, "partial")
jitted_print = jax.jit(print)
cached_time = functools.lru_cache(time.time)
library = ctypes.CDLL(None)


class Unlucky(random.Random):
    pass


class Printing:
    write = staticmethod(print)

    def __init__(self):
        self.callback = functools.partial(print)

    def __call__(self, ct):
        print(ct)

    @property
    def value(self):
        return print("property")

    def __add__(self, other):
        return print("operator")


printing, unlucky = Printing(), Unlucky(1)


def says(ct):
    print("helper", ct)


def passes_on(fn, *args, **options):
    fn(*args, **options)


def decorated(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        print("before")
        return fn(*args)

    return wrapper


@decorated
def plain(ct):
    return ct


@contextlib.contextmanager
def timed():
    yield time.perf_counter()


def drawn():
    yield random.random()


def open_file():
    with open(target, "w") as file:
        file.write("x")


BANNED = [
    ("print", lambda: print("x")),
    ("print", lambda: print(*["x"])),
    ("print", lambda: print(*values)),
    ("print", lambda: print(*values, **{})),
    ("print", lambda: print("x", *values)),
    ("print", lambda: passes_on(print, "x")),
    ("print", lambda: printing.callback(*values)),
    ("print", lambda: list(map(print, *[values]))),
    ("print", lambda: print("x", file=buffer)),
    ("print", lambda: builtins.print("x")),
    ("input", lambda: input()),
    ("open", lambda: open(target, "w")),
    ("open", open_file),
    ("open", lambda: io.open(target, "w")),  # noqa: UP020
    ("open", lambda: pathlib.Path(target).write_text("x")),
    ("breakpoint", lambda: breakpoint()),
    ("io.TextIOWrapper.write", lambda: console.write("x")),
    ("io.TextIOWrapper.flush", lambda: console.flush()),
    ("io.StringIO.write", lambda: buffer.write("x")),
    ("io.FileIO", lambda: io.FileIO(target, "w")),
    ("logging.info", lambda: logging.info("x")),
    ("logging.Logger.warning", lambda: log.warning("x")),
    ("logging.Logger.error", lambda: logging.getLogger("test_effects").error("x")),
    ("warnings.warn", lambda: warnings.warn("x", stacklevel=1)),
    ("time.time", lambda: time.time()),
    ("time.perf_counter", lambda: time.perf_counter()),
    ("time.sleep", lambda: time.sleep(30)),
    ("time.perf_counter", lambda: timed().__enter__()),
    ("datetime.datetime.now", lambda: datetime.datetime.now()),
    ("datetime.datetime.now", lambda: datetime.datetime.now(datetime.UTC)),
    ("datetime.date.today", lambda: datetime.date.today()),
    ("random.random", lambda: random.random()),
    ("random.choice", lambda: random.choice([1, 2])),
    ("random.seed", lambda: random.seed(3)),
    ("random.random", lambda: dice.random()),
    ("random.gauss", lambda: dice.gauss()),
    ("random.random", lambda: unlucky.random()),
    ("random.Random", lambda: random.Random(3)),
    ("random.random", lambda: next(drawn())),
    ("numpy.random.rand", lambda: np.random.rand()),
    ("numpy.random.seed", lambda: np.random.seed(0)),
    ("numpy.random.default_rng", lambda: np.random.default_rng(0)),
    ("numpy.random.normal", lambda: rng.normal()),
    ("numpy.random.standard_normal", lambda: rng.standard_normal(3).sum()),
    ("numpy.random.rand", lambda: state.rand()),
    ("numpy.random.shuffle", lambda: np.random.shuffle([1, 2])),
    ("numpy.save", lambda: np.save(target, np.ones(3))),
    ("numpy.ndarray.tofile", lambda: np.ones(3).tofile(target)),
    ("secrets.token_hex", lambda: secrets.token_hex()),
    ("uuid.uuid4", lambda: uuid.uuid4()),
    ("uuid.uuid1", lambda: uuid.uuid1()),
    ("os.environ", lambda: os.environ["PATH"]),
    ("os.environ", lambda: os.environ.get("PATH")),
    ("os.environ", lambda: "PATH" in os.environ),
    ("os.environ", lambda: dict(os.environ)),
    ("os.environ", lambda: os.environ.__setitem__("JHOP_TEST_EFFECTS", "x")),
    ("os.environ", lambda: os.environ.update(JHOP_TEST_EFFECTS="x")),
    ("os.getenv", lambda: os.getenv("PATH")),
    ("os.getpid", lambda: os.getpid()),
    ("os.getcwd", lambda: os.path.abspath("x")),
    ("os.stat", lambda: os.path.exists("/")),
    ("os.mkdir", lambda: os.mkdir(target)),
    ("os.makedirs", lambda: os.makedirs(target)),
    ("os.urandom", lambda: os.urandom(3)),
    ("os.system", lambda: os.system(f"touch {target}")),
    ("socket.socket", lambda: socket.socket()),
    ("subprocess.run", lambda: subprocess.run(["touch", target])),
    ("subprocess.Popen", lambda: subprocess.Popen(["touch", target])),
    ("threading.Thread", lambda: threading.Thread(target=says)),
    ("threading.Timer", lambda: threading.Timer(1, says)),
    ("sqlite3.connect", lambda: sqlite3.connect(target)),
    ("sqlite3.Connection.execute", lambda: database.execute("create table t (x)")),
    ("urllib.request.urlopen", lambda: urllib.request.urlopen("http://127.0.0.1:9")),
    ("tempfile.mkdtemp", lambda: tempfile.mkdtemp()),
    # Ways there
    ("print", lambda: says(1)),
    ("print", lambda: plain(1)),
    ("print", lambda: printing(1)),
    ("print", lambda: printing.value),
    ("print", lambda: printing + 1),
    ("print", lambda: printing.write("x")),
    ("print", lambda: printing.callback("x")),
    ("print", lambda: printer("x")),
    ("print", lambda: functools.partial(print)()),
    ("print", lambda: functools.partial(print, "x")("y")),
    ("print", lambda: list(map(print, [1]))),
    ("print", lambda: [*map(functools.partial(print), [1])]),
    ("print", lambda: sorted([1, 2], key=print)),
    ("print", lambda: max([1, 2], key=print)),
    ("print", lambda: sorted([1, 2], key=lambda x: print(x))),
    ("print", lambda: list(map(lambda x: print(x), [1]))),
    ("print", lambda: functools.reduce(print, [1, 2])),
    ("print", lambda: list(itertools.starmap(print, [(1,)]))),
    ("print", lambda: jax.vmap(says)(ones)),
    ("print", lambda: jax.lax.scan(lambda c, x: (c, says(x)), 0.0, ones)),
    ("print", lambda: jax.tree.map(says, [1])),
    ("print", lambda: [print(x) for x in range(1)]),
    ("print", lambda: {print(x) for x in range(1)}),
    ("print", lambda: [2, 1].sort(key=print)),
    ("print", lambda: operator.call(print, "x")),
    ("print", lambda: re.sub("x", print, "x")),
    ("print", lambda: re.compile("x").sub(print, "x")),
    ("print", lambda: contextvars.copy_context().run(print, "x")),
    ("print", lambda: weakref.finalize(Printing(), print, "x")),
    ("print", lambda: jax.tree.map(print, [1])),
    ("print", lambda: jax.tree.map(functools.partial(print, "x"), [1])),
    ("print", lambda: jax.vmap(print)(ones)),
    ("print", lambda: jax.jit(print)(ones)),
    ("print", lambda: jitted_print(ones)),
    ("print", lambda: jax.lax.map(print, ones)),
    ("print", lambda: np.vectorize(print, otypes=[object])(np.ones(2))),
    ("print", lambda: np.apply_along_axis(print, 0, np.ones(2))),
    ("print", lambda: np.frompyfunc(print, 1, 1)(np.ones(2))),
    ("print", lambda: jax.grad(lambda x: jhop.hook(x, print) * 2.0)(1.0)),
    ("print", lambda: jhop.trace_wrapped(ones, fn=print)),
    ("sys.stdout.write", lambda: sys.stdout.write("x")),
    ("sys.stdout.write", lambda: pprint.pprint({"a": 1})),
    ("sys.displayhook", lambda: sys.displayhook("x")),
    ("atexit.register", lambda: atexit.register(says, 1)),
    ("signal.getsignal", lambda: signal.getsignal(signal.SIGINT)),
    ("numpy.info", lambda: np.info("sin")),
    ("time.time", lambda: cached_time()),
    ("time.time", lambda: list(map(lambda f: f(), [time.time]))),
    ("os.getpid", lambda: getattr(os, "getpid")()),  # noqa: B009
    ("print", lambda: collections.defaultdict(print)["k"]),
    ("print", lambda: collections.defaultdict(functools.partial(print, "x"), {})["k"]),
    ("numpy.seterr", lambda: np.seterr(all="raise")),
    ("numpy.seterr", lambda: np.seterr(**{"all": "raise"})),
    ("numpy.geterr", lambda: np.geterr()),
    ("numpy.set_printoptions", lambda: np.set_printoptions(precision=2)),
    ("ctypes.putenv", lambda: library.putenv(b"JHOP_TEST_EFFECTS=x")),
    ("ctypes.putenv", lambda: list(map(library.putenv, [b"JHOP_TEST_EFFECTS=x"]))),
    ("ctypes.putenv", lambda: passes_on(library["putenv"], b"JHOP_TEST_EFFECTS=x")),
    ("ctypes.dlopen", lambda: ctypes.CDLL(None)),
]
if monitoring is not None:  # what Python 3.11 cannot see: nothing that these name is banned
    BANNED += [
        ("sys.stdout.write", lambda: operator.methodcaller("write", "x")(sys.stdout)),
        ("sys.stdout.write", lambda: writes(sys.stdout)),
        ("sys.stdout.write", lambda: writes(*[sys.stdout])),
        ("random.random", lambda: operator.methodcaller("random")(dice)),
        ("numpy.random.normal", lambda: operator.methodcaller("normal")(rng)),
        ("print", lambda: hidden["callback"]("x")),
        ("print", lambda: list(map(hidden["callback"], [1]))),
    ]
writes = operator.methodcaller("write", "x")
hidden, values = {"callback": functools.partial(print)}, ["x"]


def effects():
    drawn = dice.getstate(), random.getstate(), repr(state.get_state()), rng.bit_generator.state
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return *drawn, buffer.getvalue(), np.geterr(), np.get_printoptions()["precision"], getenv(b"JHOP_TEST_EFFECTS")


@pytest.fixture
def no_effect(capsys):
    """Fails if any of the effects of `BANNED` took place."""
    before = effects()
    yield
    assert effects() == before
    assert capsys.readouterr() == ("", "")
    assert not os.path.exists(target) and "JHOP_TEST_EFFECTS" not in os.environ
    assert not database.execute("select * from sqlite_master").fetchall()
    assert cached_time.cache_info().misses == 0


IDS = [f"{i}-{label}" for i, (label, _) in enumerate(BANNED)]


@pytest.mark.parametrize(("label", "call"), BANNED, ids=IDS)
def test_banned(label, call, no_effect):
    def hook(ct):
        call()
        return ct * 2

    with pytest.raises(Unsupported) as caught:
        traced(hook)
    assert f"`{label}`" in str(caught.value)
    assert describe_hook(hook) in str(caught.value)


@pytest.mark.parametrize(("label", "call"), BANNED, ids=IDS)
def test_banned_and_swallowed(label, call, no_effect):
    def hook(ct):
        try:
            call()
        except Exception:
            return ct
        return ct * 2

    with pytest.raises(Unsupported, match="cannot trace"):
        traced(hook)


def with_warning_filter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")


def with_lock():
    with threading.Lock(), threading.RLock():
        return threading.current_thread(), threading.get_ident()


def formats():
    return f"{1.5:>8.3f} {'x'!r} {[1]}", " ".join(["x"]), str(2), repr({}), pprint.pformat({"a": [1] * 100})


def containers():
    d, xs, s = {"a": 1}, [3, 1], {1}
    d.update(b=2), xs.append(4), xs.sort(key=lambda x: -x), s.add(3), d.setdefault("c", []).extend(xs)
    return sorted(xs, key=abs), max(xs), list(map(str, xs)), list(filter(None, xs)), d.copy(), xs.pop(), len(d)


def untaken(flag=False):
    if flag:
        print("no"), list(map(print, [])), np.random.rand()


def quiet():
    with np.errstate(divide="ignore"), np.printoptions(precision=2):
        return np.float32(1) / np.float32(0), np.get_printoptions()


shout = operator.methodcaller("upper")


class Awkward:
    __module__ = 3

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __call__(self):
        return 1

    def __iter__(self):
        return iter((1, 2))


class NotCallable:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __iter__(self):
        return iter((1, 2))


ALLOWED = [
    lambda: (Awkward()(), max(Awkward()), sorted(NotCallable()), list(map(Awkward, ()))),
    lambda: math.sqrt(2.0) + math.sin(1) + abs(-1) + round(1.5) + sum([1, 2]),
    lambda: functools.reduce(lambda a, b: a * b, [1, 2, 3]),
    lambda: functools.partial(math.pow, 2)(3),
    lambda: functools.lru_cache(math.sqrt)(2.0),
    lambda: jax.debug.print("{}", ones),
    lambda: jax.debug.callback(print, 1),
    lambda: jax.debug.callback(functools.partial(print, "x"), 1),
    lambda: jax.debug.callback(jax.tree_util.Partial(print), 1),
    lambda: jnp.sin(jax.pure_callback(rng.normal, jax.ShapeDtypeStruct((), jnp.float32))),
    lambda: (re.sub("x", "y", "x"), operator.call(len, [1]), jax.tree.map(abs, [1]), np.vectorize(len)(["x"])),
    lambda: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), jnp.float32(1)),
    lambda: jax.random.normal(jax.random.key(0), (3,)),
    lambda: jax.random.split(jax.random.key(0)),
    lambda: jnp.einsum("i,i->", ones, ones),
    lambda: jax.lax.scan(lambda c, x: (c + x, x), 0.0, ones),
    lambda: jax.jit(lambda x: jnp.where(x > 0, x, 0.0))(ones),
    lambda: jax.lax.psum(1, ()),
    lambda: isinstance(1, int) and issubclass(int, object) and hasattr(1, "x") and callable(print),
    formats,
    containers,
    untaken,
    lambda: np.linalg.norm(np.arange(3.0)) + np.clip(np.ones(3), 0, 1).sum() + np.float32(3),
    lambda: np.array([1, 2]).reshape(2, 1).T.tolist(),
    lambda: np.where(np.ones(3) > 0, 1, 2),
    lambda: logging.getLogger("x"),
    lambda: logging.INFO,
    lambda: (print, time, random, np.random, open),
    lambda: {"p": print, "t": time.time},
    with_lock,
    with_warning_filter,
    lambda: threading.local(),
    lambda: os.fspath(pathlib.Path("x") / "y") + os.path.join("a", "b") + os.path.basename("a/b"),
    lambda: os.path.normpath("a/../b") + os.path.splitext("a.b")[0],
    lambda: json.loads(json.dumps({"a": [1, None]})),
    lambda: urllib.parse.urlparse("http://x/y"),
    lambda: uuid.uuid5(uuid.NAMESPACE_DNS, "x"),
    lambda: uuid.UUID(int=3),
    lambda: datetime.timedelta(days=1) + datetime.datetime(2020, 1, 1),
    lambda: secrets.compare_digest("a", "b"),
    lambda: io.StringIO("text").getvalue(),
    lambda: __import__("colorsys"),
    lambda: iter(range(3)),
    lambda: [x for x in (y for y in range(3))],
    lambda: (collections.defaultdict(list)["k"], collections.defaultdict(lambda: 3)["k"]),
    lambda: (operator.methodcaller("upper")("x"), operator.methodcaller("getvalue")(buffer), list(map(shout, "ab"))),
    lambda: (operator.methodcaller("nothing"), operator.methodcaller("__len__")([1])),
    lambda: (ctypes.c_int(3).value, ctypes.sizeof(ctypes.c_double)),
    quiet,
]


@pytest.mark.parametrize("call", ALLOWED, ids=range(len(ALLOWED)))
def test_allowed(call):
    def hook(ct):
        call()
        return ct * 2

    traced(hook)
    traced(hook)  # a second watch finds the same


def test_import_in_a_hook_is_allowed():
    def hook(ct):
        import this_module_prints_when_imported  # noqa: F401

        return ct

    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "this_module_prints_when_imported.py").write_text("import time\nstart = time.time()\n")
        sys.path.insert(0, folder)
        try:
            traced(hook)
        finally:
            sys.path.remove(folder)
            sys.modules.pop("this_module_prints_when_imported", None)


@pytest.mark.parametrize("call", [lambda: print(*values), lambda: passes_on(print, values), lambda: print(values)])
def test_refusing_a_call_does_not_release_its_arguments(call):
    before = sys.getrefcount(values)
    for _ in range(5):
        with contextlib.suppress(Unsupported), watch(call):
            call()
    assert sys.getrefcount(values) == before  # without `gc.collect`: the error is in no cycle either


@pytest.mark.skipif(monitoring is None, reason="Python 3.11 does not see the call at all")
def test_a_starred_call_that_nothing_names_is_an_error_after_it(capsys):
    before = sys.getrefcount(values)
    with pytest.raises(Unsupported, match="`print`"):
        traced(lambda ct: hidden["callback"](*values))
    assert capsys.readouterr().out == "x\n"
    assert sys.getrefcount(values) == before


def test_console_that_is_a_buffer(no_effect):
    """`print` is not all that writes there."""
    with contextlib.redirect_stdout(io.StringIO()) as console:
        for call in (lambda: pprint.pprint([1]), lambda: sys.stdout.write("x")):
            with pytest.raises(Unsupported, match=r"`sys\.stdout\.write`"):
                traced(lambda ct, call=call: call())
        traced(lambda ct: ct * len(io.StringIO().getvalue() + pprint.pformat([1])))
    assert console.getvalue() == ""


class Tables:
    """Tables whose missing entries C code asks for, past all that could be seen."""

    def __init__(self, factory):
        self.table = collections.defaultdict(factory, there=3)

    def missing(self, ct):
        self.table["k"]
        return ct * 2

    def present(self, ct):
        return ct * self.table["there"]


def gradient_of(hook):
    return jax.grad(lambda x: (jhop.hook(x, hook) * x).sum())


@pytest.mark.parametrize("compiled", [jhop.jit, jax.jit])
@pytest.mark.parametrize("factory", [print, functools.partial(print, "x"), time.time])
def test_factory_of_a_defaultdict(factory, compiled, capsys):
    tables, options = Tables(factory), {"fullgraph": True} if compiled is jhop.jit else {}
    with pytest.raises(Unsupported) as caught:
        compiled(gradient_of(tables.missing), **options)(ones)
    line = Tables.missing.__code__.co_firstlineno + 1
    assert "in hook `Tables.missing`" in str(caught.value)
    assert f'line {line}, in Tables.missing\n    self.table["k"]' in str(caught.value)
    assert tables.table.default_factory is factory
    assert [*tables.table] == ["there"]
    step = compiled(gradient_of(tables.present), **options)  # it is not called
    np.testing.assert_allclose(step(ones), 4 * ones)
    assert tables.table.default_factory is factory
    assert capsys.readouterr() == ("", "")


def test_factory_of_a_defaultdict_runs_on_the_host_each_time():
    tables, times = Tables(time.time), []

    def hook(ct):
        times.append(tables.table[len(times)])
        return ct * 2

    step = jhop.jit(gradient_of(hook))
    with pytest.warns(UserWarning, match=r"`time\.time`"):
        step(ones)
    step(ones)
    assert [type(time) for time in times] == [float, float]
    assert len(tables.table) == 3


# The message


def test_message():
    def hook(ct):
        total = ct * 2
        says(total)
        return total

    with pytest.raises(Unsupported) as caught:
        traced(hook)
    line = says.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        f"cannot trace a call to `print` in hook `hook` (test_effects.py:{hook.__code__.co_firstlineno})\n"
        f'  File "{__file__}", line {line}, in says\n'
        '    print("helper", ct)\n'
        "The backward is traced once and replayed, so `print` would run once, at trace time, and never again.\n"
        'Instead, use `jax.debug.print("{}", x)`, which prints each time the backward runs; or pass '
        "`fullgraph=False`, which runs this hook on the host each time."
    )


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: time.time(), "take the time outside"),
        (lambda: random.random(), r"`jax\.random` with a key"),
        (lambda: np.random.rand(), r"`jax\.random` with a key"),
        (lambda: log.info("x"), r"`jax\.debug\.callback`"),
        (lambda: breakpoint(), r"`jax\.debug\.breakpoint\(\)`"),
        (lambda: os.getpid(), "call it outside the hook"),
        (lambda: socket.socket(), "Instead, pass `fullgraph=False`"),
    ],
)
def test_remedies(call, remedy):
    with pytest.raises(Unsupported, match=remedy):
        traced(lambda ct: call())


def test_given_remedy_replaces_the_last_resort():
    with pytest.raises(Unsupported, match="; or compile with `jhop.jit`."), advising("compile with `jhop.jit`"):
        traced(says)


draw = rng.normal


def test_function_of_cython_is_named_by_the_call(no_effect):
    with pytest.raises(Unsupported, match=r"cannot trace a call to `numpy\.random\.normal` in hook `hook`"):

        def hook(ct):
            return ct * draw()

        jhop.jit(jax.grad(lambda x: jhop.hook(x, hook) * 3.0), fullgraph=True)(2.0)


@pytest.mark.parametrize(
    ("label", "hook"),
    [("print", print), ("print", printer), ("logging.Logger.info", log.info), ("time.sleep", time.sleep)],
)
def test_hook_that_is_itself_banned(label, hook, capsys):
    with pytest.raises(Unsupported, match=f"cannot trace a call to `{label}` in "):
        jhop.jit(jax.grad(lambda x: jhop.hook(x, hook) * 3.0), fullgraph=True)(2.0)
    assert capsys.readouterr().out == ""


def test_hook_that_is_print_itself_runs_on_the_host_each_time(capsys):
    fn = jhop.jit(jax.grad(lambda x: jhop.hook(x, print) * 3.0))
    with pytest.warns(UserWarning, match="print"):
        assert [float(fn(x)) for x in (2.0, 4.0)] == [3.0, 3.0]
    jax.effects_barrier()
    assert capsys.readouterr().out.count("3.0") == 2


def test_first_error_counts_and_other_exceptions_keep_their_way():
    def hook(ct):
        with contextlib.suppress(Exception):
            print("x")
        time.time()

    with pytest.raises(Unsupported, match="`print`" if monitoring else "`(print|time.time)`"):
        traced(hook)

    def translates(ct):
        try:
            print("x")
        except Exception as error:
            raise ValueError("mine") from error

    with pytest.raises(Unsupported, match="`print`"):
        traced(translates)

    def fails(ct):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        traced(fails)

    def interrupted(ct):
        with contextlib.suppress(Exception):
            print("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced(interrupted)


# Nesting, threads, and other tools


def test_nothing_is_refused_outside(capsys):
    with pytest.raises(Unsupported):
        traced(says)
    says(1)
    with watch(says):
        pass
    jax.make_jaxpr(says)(ones)
    assert capsys.readouterr().out.count("helper") == 2


def test_watch_within_an_import(tmp_path, monkeypatch):
    """The program that watches may itself run because something imports it."""
    program = "import time\ndef hook(ct): time.time()\nrun(hook)\n"
    (tmp_path / "imports_and_watches.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtins, "run", traced, raising=False)
    with pytest.raises(Unsupported, match="time.time"):
        __import__("imports_and_watches")


def test_nested_watches():
    def inner(ct):
        print("x")
        return ct

    def outer(ct):
        first = ct * 2
        with contextlib.suppress(Unsupported), watch(inner):
            inner(ct)
        return first * 3

    seen = traced(outer)  # the inner error was handled: it is no error of the outer hook
    assert [record.name for record in seen.operators] == ["mul", "mul"]

    def outer_prints(ct):
        with watch(plain_mul) as inner_seen:
            plain_mul(ct)
        assert [record.name for record in inner_seen.operators] == ["mul"]
        with contextlib.suppress(Unsupported), watch(inner):
            inner(ct)
        print("y")

    with pytest.raises(Unsupported, match="hook `outer_prints`"):
        traced(outer_prints)


def test_watch_goes_on_after_one_within_it():
    def outer(ct):
        with watch(plain_mul):
            plain_mul(ct)
        list(map(print, [1]))

    with pytest.raises(Unsupported, match="hook `outer`"):
        traced(outer)


def plain_mul(ct):
    return ct * 5


def test_a_watch_can_be_entered_within_itself():
    def hook(ct, depth=3):
        return ct if depth == 0 else run(depth - 1, ct) * 2

    def run(depth, ct):
        with watch(hook):
            return hook(ct, depth)

    traced(hook)


def test_generator_started_before_the_watch():
    def draws():
        while True:
            yield 1
            yield random.random()

    draw = draws()
    next(draw)
    with pytest.raises(Unsupported, match="random.random"):
        traced(lambda ct: ct * next(draw))


def test_other_threads_are_not_watched():
    inside, outside, results = threading.Event(), threading.Event(), []

    def worker():
        inside.wait(30)
        results.append((time.time() > 0, len(os.environ["PATH"]) > 0, (ones * 2).shape))
        outside.set()

    thread = threading.Thread(target=worker)
    thread.start()
    with watch(plain_mul) as seen:
        inside.set()
        plain_mul(ones)
        while not outside.is_set():
            pass
    thread.join()
    assert results == [(True, True, (3,))]
    assert seen.operators == []


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """A stand-in for a package through which both JAX and users reach files."""
    folder = tmp_path / "etils"
    folder.mkdir()
    (folder / "__init__.py").write_text("import os\n\n\ndef exists(path):\n    return os.stat(path) is not None\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "etils"]:
        monkeypatch.delitem(sys.modules, name)
    caches = _source._known_folders, _source.file_kind
    for cache in caches:
        cache.cache_clear()
    yield importlib.import_module("etils")
    sys.modules.pop("etils")
    for cache in caches:
        cache.cache_clear()


def test_package_that_jax_reads_files_through(helper):
    space = {}
    exec(compile("def called(f, *xs):\n    return f(*xs)\n", f"{jax.__path__[0]}/cache.py", "exec"), space)
    called, path = space["called"], os.path.dirname(__file__)
    traced(lambda ct: ct * float(called(helper.exists, path)))
    with pytest.raises(Unsupported, match="`os.stat`"):
        traced(lambda ct: ct * helper.exists(path))
    with pytest.raises(Unsupported, match="`os.stat`"):
        traced(lambda ct: ct * called(lambda: helper.exists(path)))


def test_each_thread_has_its_own_watch():
    barrier, outcomes = threading.Barrier(4), {}

    def worker(index):
        hook = says if index % 2 else plain_mul
        try:
            for _ in range(20):
                barrier.wait(30)
                try:
                    seen = traced(hook)
                    outcomes.setdefault(index, []).append([record.name for record in seen.operators])
                except Unsupported:
                    outcomes.setdefault(index, []).append("refused")
        except Exception as error:
            outcomes[index] = error
            barrier.abort()

    threads = [threading.Thread(target=worker, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {index: ["refused" if index % 2 else ["mul"]] * 20 for index in range(4)}


def test_profile_function_goes_on():
    events = []

    def profile(frame, event, arg):
        if frame.f_code is plain_mul.__code__:
            events.append(event)

    sys.setprofile(profile)
    try:
        plain_mul(ones)
        traced(plain_mul)
        assert sys.getprofile() is profile
        plain_mul(ones)
        with contextlib.suppress(Unsupported):
            traced(says)
        assert sys.getprofile() is profile
        plain_mul(ones)
    finally:
        sys.setprofile(None)
    assert events.count("call") == events.count("return") == 4


def test_trace_function_goes_on():
    events = []

    def trace(frame, event, arg):
        events.append(event)
        return trace if frame.f_code is plain_mul.__code__ else None

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        traced(plain_mul)
        with contextlib.suppress(Unsupported):
            traced(says)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(old)
    assert {"call", "line", "return"} <= set(events)


def test_no_trace_function_is_left():
    old = sys.gettrace()
    traced(lambda ct: ct if True else np.random.rand())
    with contextlib.suppress(Unsupported):
        traced(lambda ct: np.random.rand())
    assert sys.gettrace() is old


@pytest.mark.parametrize("hook", [plain_mul, says])
def test_cprofile_goes_on(hook):
    profiler = cProfile.Profile()
    profiler.enable()
    plain_mul(ones)
    with contextlib.suppress(Unsupported):
        traced(hook)
    plain_mul(ones)
    profiler.disable()
    counts = {entry.code.co_name: entry.callcount for entry in profiler.getstats() if hasattr(entry.code, "co_name")}
    assert counts["plain_mul"] >= 2


@pytest.mark.skipif(monitoring is None, reason="Python has no sys.monitoring")
def test_tools_of_sys_monitoring_are_left_alone():
    calls = []
    monitoring.use_tool_id(4, "another")
    try:
        monitoring.register_callback(4, monitoring.events.CALL, lambda code, at, fn, arg: calls.append(fn))
        monitoring.set_local_events(4, plain_mul.__code__, monitoring.events.CALL)
        with pytest.raises(Unsupported):
            traced(says)
        assert monitoring.get_tool(4) == "another"
        assert monitoring.get_local_events(4, plain_mul.__code__) == monitoring.events.CALL
        assert [monitoring.get_tool(tool) for tool in (3, 5)] == [None, None]
    finally:
        monitoring.register_callback(4, monitoring.events.CALL, None)
        monitoring.set_local_events(4, plain_mul.__code__, 0)
        monitoring.free_tool_id(4)
    assert calls == []


@pytest.mark.skipif(monitoring is None, reason="Python has no sys.monitoring")
def test_tool_is_given_back_with_its_events():
    tools = [monitoring.get_tool(tool) for tool in range(6)]
    with pytest.raises(Unsupported):
        traced(says)
    assert [monitoring.get_tool(tool) for tool in range(6)] == tools
    monitoring.use_tool_id(4, "probe")
    try:
        assert monitoring.get_events(4) == 0
        assert monitoring.get_local_events(4, says.__code__) == 0
        assert monitoring.register_callback(4, monitoring.events.CALL, None) is None
    finally:
        monitoring.free_tool_id(4)


@pytest.mark.skipif(monitoring is None, reason="Python has no sys.monitoring")
def test_no_free_tool_is_an_error():
    free = [tool for tool in range(6) if monitoring.get_tool(tool) is None]
    for tool in free:
        monitoring.use_tool_id(tool, "full")
    try:
        with pytest.raises(Unsupported, match="every tool"):
            traced(plain_mul)
    finally:
        for tool in free:
            monitoring.free_tool_id(tool)
    traced(plain_mul)


def test_every_watch_finds_what_the_first_found():
    for _ in range(5):
        for _ in range(3):
            traced(plain_mul)
        with pytest.raises(Unsupported):
            traced(says)


# Operators


@pytest.mark.parametrize(
    ("hook", "name", "rest"),
    [
        (lambda g: g * 3, "mul", (3,)),
        (lambda g: g * 3.0, "mul", (3.0,)),
        (lambda g: 2 * g, "rmul", (2,)),
        (lambda g: g**2, "pow", (2,)),
        (lambda g: 2**g, "rpow", (2,)),
        (lambda g: -g, "neg", ()),
        (lambda g: abs(g), "abs", ()),
        (lambda g: g / 4, "truediv", (4,)),
        (lambda g: g - 5, "sub", (5,)),
        (lambda g: g > 0, "gt", (0,)),
        (lambda g: g[0], "getitem", (0,)),
        (lambda g: g[1:], "getitem", (slice(1, None),)),
    ],
)
def test_operator(hook, name, rest):
    (record,) = traced(hook).operators
    assert isinstance(record, OperatorRecord)
    assert record.name == name
    assert record.operands[1:] == rest and [type(x) for x in record.operands[1:]] == [type(x) for x in rest]
    assert isinstance(record.operands[0], jax.core.Tracer) and isinstance(record.result, jax.core.Tracer)
    assert record.code is hook.__code__


def test_operators_in_order_with_their_places():
    def helper(g, n):
        return g / n

    def hook(g):
        t = g * 3
        u = helper(t, 7)
        return u @ t

    operators = traced(hook).operators
    assert [record.name for record in operators] == ["mul", "truediv", "matmul"]
    assert [record.code for record in operators] == [hook.__code__, helper.__code__, hook.__code__]
    assert operators[1].operands[0] is operators[0].result
    assert operators[2].operands == (operators[1].result, operators[0].result)
    lines = [record.code.co_firstlineno + 1 for record in operators]
    positions = [list(record.code.co_positions())[record.lasti // 2][0] for record in operators]
    assert positions == [lines[0], lines[1], lines[2] + 2]


def test_operators_that_jax_applies_are_not_recorded():
    assert traced(lambda g: jnp.linalg.norm(g) + jnp.var(g).astype("float32")).operators[0].name == "add"
    assert traced(lambda g: jax.nn.gelu(g)).operators == []
    assert [record.name for record in traced(lambda g: jax.vmap(plain_mul)(g)).operators] == ["mul"]
    assert [record.name for record in traced(lambda g: sum([g, g])).operators] == ["radd", "add"]


def test_operators_that_do_not_apply_are_not_recorded():
    class Right:
        def __rmul__(self, other):
            return other * 4

    seen = traced(lambda g: g * Right())
    assert [record.operands[1] for record in seen.operators] == [4]
    with pytest.raises(TypeError):
        traced(lambda g: g * "text")


def test_operators_on_arrays_are_not_recorded():
    with watch(plain_mul) as seen:
        plain_mul(ones)
    assert seen.operators == []


def test_operators_are_missing_where_jax_differs(monkeypatch):
    for module in (_effects, _profiling):
        monkeypatch.setattr(module, "OPERATOR_CODE", None)
    assert traced(plain_mul).operators == []


@pytest.mark.parametrize(
    "hook",
    [
        lambda ct: ct * ct[0, ct[0].argmax()],
        lambda ct: ct * ct[[0, ct[0].argmax()],].sum(),
        lambda ct: copy.deepcopy(ct) * 3.0,
    ],
)
def test_operators_keep_no_tracers_in_containers(hook):
    x = jnp.arange(6.0).reshape(2, 3)
    got = jhop.jit(jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum()), fullgraph=True)(x)
    np.testing.assert_allclose(got, hook(2 * x))
