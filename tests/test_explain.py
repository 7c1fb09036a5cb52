"""`jhop.explain`: what it says, and that asking changes nothing."""

import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jhop
from jhop import _history, _jit, _state

X = jnp.array([0.5, -1.0, 2.0], jnp.float32)


class Meter:
    def __init__(self):
        self.steps = 0
        self.norm = jnp.float32(0)
        self.mode = "clip"
        self.log = []

    def clip(self, ct):
        self.steps += 1
        if self.steps % 3 == 0:
            self.log.append(self.norm)
        self.norm = 0.5 * self.norm + 0.5 * jnp.linalg.norm(ct)
        return ct * 0.5 if self.mode == "clip" else ct * 2.0


class Kept:
    """An object with attributes."""


def Box(**fields):
    box = Kept()
    vars(box).update(fields)
    return box


scale = 2.0


def gradient(hook):
    """The gradient of a function with one hook, as another function object each time."""

    def loss(x):
        return (jhop.hook(x, hook) ** 2).sum()

    return jax.grad(loss)


def reasons(report):
    return [trace.reason for trace in report.traces]


# The text


METER = """\
`scaled`, by jhop.jit: 2 graphs, 2 traces

Graph 1: `scaled` for x: float32[3], y: float32[]
  {equations} equations
  traced because: first call
  does not fit now, because:
    `(L['hooks'][0].__self__.steps + 1) % 3 == 0` was False and is True
  hooks:
    L['hooks'][0] is `Meter.clip` (test_explain.py:{clip})
  lifted Python state:
    L['hooks'][0].__self__.steps: int, read and written
    L['hooks'][0].__self__.norm: float32[], read and written
  guarded for the hooks:
    `(L['hooks'][0].__self__.steps + 1) % 3 == 0` was False
    L['hooks'][0].__self__.mode is 'clip'
    same types: L['hooks'][0].__self__.log (list)
    same objects: G['Meter'].__init__, G['Meter'].clip
    same code: function `Meter.clip`, function `Meter.__init__`
    and 7 that hardly ever change, such as modules and classes; `guards` has all
  guarded for the function itself:
    G['scale'] is 2.0
    same objects: scaled.__wrapped__.__closure__[0].cell_contents, G['Meter'].__init__, G['Meter'].clip
    same code: function `scaled`, function `Meter.__init__`, function `Meter.clip`
    and 6 that hardly ever change, such as modules and classes; `guards` has all

Graph 2: `scaled` for x: float32[3], y: float32[]
  {equations} equations
  traced because: `(L['hooks'][0].__self__.steps + 1) % 3 == 0` was False and is True
  hooks:
    L['hooks'][0] is `Meter.clip` (test_explain.py:{clip})
  lifted Python state:
    L['hooks'][0].__self__.steps: int, read and written
    L['hooks'][0].__self__.norm: float32[], read and written
    L['hooks'][0].__self__.log: list, written
  guarded for the hooks:
    `(L['hooks'][0].__self__.steps + 1) % 3 == 0` was True
    L['hooks'][0].__self__.mode is 'clip'
    same objects: G['Meter'].__init__, G['Meter'].clip
    same code: function `Meter.clip`, function `Meter.__init__`
    and 7 that hardly ever change, such as modules and classes; `guards` has all
  guarded for the function itself: as for graph 1

Traces
  1. `scaled` for x: float32[3], y: float32[]: first call
  2. `scaled` for x: float32[3], y: float32[]: `(L['hooks'][0].__self__.steps + 1) % 3 == 0` was False and is True"""


def test_text_of_a_hook_that_counts_and_asks():
    meter = Meter()

    def scaled(x, y):
        return (jhop.hook(x, meter.clip) ** 2).sum() * scale + y

    step = jhop.jit(jax.grad(scaled))
    for _ in range(3):
        step(X, jnp.float32(1))
    meter.steps = 2
    report = jhop.explain(step)
    equations = report.graphs[0].equations
    assert str(report) == METER.format(clip=Meter.clip.__code__.co_firstlineno, equations=equations)
    assert equations == report.graphs[1].equations > 10


def test_text_where_there_is_nothing():
    step = jhop.jit(gradient(lambda ct: ct * 3))
    never = (
        "`loss`, by jhop.jit: 0 graphs, 0 traces\n"
        "Nothing is compiled: it was not called yet, or only inside what JAX was transforming, where it is a part of"
        " the graph\n  around it."
    )
    assert str(jhop.explain(step)) == never
    step.clear_cache()
    jax.jit(step)(X)
    assert str(jhop.explain(step)) == never


@pytest.mark.parametrize("forget", [_jit.Jitted.clear_cache, _jit.Jitted.reset, lambda step: jhop.reset()])
def test_what_was_forgotten_is_said_to_be(forget):
    step = jhop.jit(gradient(lambda ct: ct * 3))
    step(X)
    step(X[:2])
    forget(step)
    report = jhop.explain(step)
    assert report.graphs == report.traces == ()
    assert "it was reset, and not called since" in str(report)
    step(X)
    assert reasons(jhop.explain(step)) == ["the first call since it was reset"]


def test_no_hooks_and_no_arguments():
    step = jhop.jit(lambda: jnp.sin(scale))
    step()
    (graph,) = jhop.explain(step).graphs
    assert (graph.hooks, graph.state, graph.guards, graph.arguments, graph.broken) == ((), (), (), (), None)
    assert "`<lambda>` for no arguments\n  1 equation\n" in str(graph)
    assert "hooks" not in str(graph).replace("guarded for", "")


def test_equations_of_loops_count_once():
    step = jhop.jit(lambda x: lax.scan(lambda c, _: (jnp.sin(jnp.cos(c)), None), x, None, length=3)[0])
    step(X)
    assert jhop.explain(step).graphs[0].equations == 3


def test_long_parts_are_cut_in_the_text_alone():
    def loss(xs):
        return sum((jhop.hook(x, lambda ct: ct * 3) ** 2).sum() for x in xs)

    step = jhop.jit(jax.grad(loss))
    step([X] * 40)
    report = jhop.explain(step)
    (graph,) = report.graphs
    assert len(graph.hooks) == len(graph.arguments) == 40
    assert "    L['hooks'][22] is" in str(report) and "L['hooks'][23]" not in str(report)
    assert "    ... and 17 more" in str(report)
    assert len(report.traces[0].arguments) == 9 and report.traces[0].arguments[-1] == "and 32 more"
    assert max(map(len, str(report).splitlines())) <= 120


def test_html_is_the_text():
    step = jhop.jit(gradient(lambda ct: ct * 3))
    step(X)
    html = jhop.explain(step)._repr_html_()
    assert html.startswith("<pre>") and "&lt;lambda&gt;" in html and "<lambda>" not in html


# State


STATE = {
    "counter": (lambda b: setattr(b, "v", b.v + 1), 5, "int", True, True),
    "float": (lambda b: setattr(b, "v", b.v * 0.5), 5.0, "float", True, True),
    "array": (lambda b: setattr(b, "v", b.v + 1), jnp.ones(2), "float32[2]", True, True),
    "numpy": (lambda b: setattr(b, "v", b.v + 1), np.ones((2, 3), np.int32), "numpy int32[2,3]", True, True),
    "overwritten": (lambda b: setattr(b, "v", jnp.zeros(4)), jnp.ones(3), "float32[4]", False, True),
    "list": (lambda b: b.v.append(7), [], "list", False, True),
    "deleted": (lambda b: delattr(b, "v"), 5, "nothing", False, True),
}


@pytest.mark.parametrize("name", STATE)
def test_state(name):
    change, value, kind, read, written = STATE[name]
    box = Box(v=value)

    def hook(ct):
        change(box)
        return ct * 3

    step = jhop.jit(gradient(hook))
    step(X)
    (state,) = jhop.explain(step).graphs[0].state
    assert (state.type, state.read, state.written) == (kind, read, written)
    assert state.path.endswith(".cell_contents.v") and state.path.startswith("L['hooks'][0]")


def test_state_that_is_only_read():
    box = Box(rate=0.5, unused=3)
    step = jhop.jit(gradient(lambda ct: ct * box.rate))
    step(X)
    (state,) = jhop.explain(step).graphs[0].state
    assert str(state) == "L['hooks'][0].__closure__[0].cell_contents.rate: float, read"


def in_a_scan(x, hook):
    return lax.scan(lambda c, _: (jnp.sin(jhop.hook(c, hook)), None), x, None, length=3)[0]


def in_a_branch(x, hook):
    return lax.cond(x.sum() > 0, lambda x: jhop.hook(x, hook) * 2, lambda x: x, x)


@pytest.mark.parametrize("wrap", [in_a_scan, in_a_branch])
def test_state_of_hooks_in_control_flow(wrap):
    box = Box(n=0, last=jnp.zeros(3), rate=0.5)

    def hook(ct):
        box.n += 1
        box.last = ct
        return ct * box.rate

    step = jhop.jit(jax.grad(lambda x: wrap(x, hook).sum()))
    step(X)
    (graph,) = jhop.explain(step).graphs
    found = {state.path.rpartition(".")[2]: (state.type, state.written) for state in graph.state}
    assert found == {"n": ("int", True), "last": ("float32[3]", True), "rate": ("float", False)}
    assert box.n == {in_a_scan: 3, in_a_branch: 1}[wrap]
    assert [hook.name for hook in graph.hooks] == ["hook"] and graph.broken is None


# Guards


def guards_of(step, kind):
    (graph,) = jhop.explain(step).graphs
    return {guard.what.rpartition(".")[2]: guard.then for guard in graph.guards if guard.kind == kind}


def test_guards_of_hooks():
    box = Box(flag=True, name="a", pair=(1, 2), number=np.float32(2), helper=abs, other=3, table={"k": 1})

    def hook(ct):
        try:
            return box.missing
        except AttributeError:
            pass
        if box.flag and box.name == "a" and box.other > 2:
            ct = ct * box.pair[1] * box.number
        return ct + len(box.table) + box.helper(-2)

    step = jhop.jit(gradient(hook))
    step(X)
    values = guards_of(step, "value")
    assert values == {"flag": "True", "name": "'a'", "pair": "(1, 2)", "number": "np.float32(2.0)"}
    assert guards_of(step, "object")["helper"] == "function `abs`"
    assert guards_of(step, "type")["other"] == "int"
    assert guards_of(step, "answer") == {"other > 2`": "True"}
    assert guards_of(step, "entries") == {"table": "1 entry"}
    assert "function `hook`" in guards_of(step, "code")
    assert "'missing'" in guards_of(step, "absent")["cell_contents"]


def test_guards_of_the_function():
    hooks = [lambda ct: ct * 3]
    box = Box(width=4.0, table=jnp.ones(3))

    def loss(x):
        for hook in hooks:
            x = jhop.hook(x, hook)
        return (x * box.width * box.table).sum()

    step = jhop.jit(jax.grad(loss))
    step(X)
    (graph,) = jhop.explain(step).graphs
    found = {str(guard).partition("cell_contents")[2] for guard in graph.function_guards}
    assert {".width is 4.0", ".table is float32[3]", " has 1 entry"} <= found
    assert not any("width" in guard.what for guard in graph.guards)


# Why


def twice(step, change, *args, **kwargs):
    """The reasons of a call, and of one after a change."""
    step(X)
    change()
    step(*(args or (X,)), **kwargs)
    return reasons(jhop.explain(step))


def last(path):
    return f"`L['hooks'][0].__closure__[0].cell_contents.{path}`"


WHY = {
    "flag": ("flag", True, False, f"{last('v')} changed from True to False"),
    "type": ("number", 3, 2.5, f"{last('v')} changed from 3 to 2.5"),
    "shape": ("array", jnp.ones(3), jnp.ones(1), f"{last('v')} changed from float32[3] to float32[1]"),
    "helper": ("call", abs, sum, f"{last('v')} changed from function `abs` to function `sum`"),
    "object": ("object", Box(w=2.0), Box(w=2.0), f"{last('v')} is another object than before (a Kept)"),
    "entries": ("dict", {"a": 1}, {"a": 1, "b": 2}, f"{last('v')} has other entries than before"),
    "zero": ("zero", 5, 0, f"`10 // {last('v')[1:-1]} > 1` was True and raises ZeroDivisionError"),
}


def use(box, what, ct):
    if what == "flag":
        return ct * 2.0 if box.v else ct * 3.0
    if what == "zero":
        try:
            return ct * 2.0 if 10 // box.v > 1 else ct
        except ZeroDivisionError:
            return ct * 3.0
    if what == "call":
        return ct * box.v([2]) if box.v is sum else ct * box.v(-3)
    return ct * (box.v.w if what == "object" else len(box.v) if what == "dict" else box.v)


@pytest.mark.parametrize("name", WHY)
def test_why_hooks_are_traced_again(name):
    what, before, after, reason = WHY[name]
    box = Box(v=before)

    def change():
        if what == "dict":
            box.v.update(after)
        else:
            box.v = after

    step = jhop.jit(gradient(lambda ct: use(box, what, ct)))
    assert twice(step, change)[1:] == [reason]
    assert [graph.trace.reason for graph in jhop.explain(step).graphs] == ["first call", reason]
    assert [graph.broken is None for graph in jhop.explain(step).graphs] == [False, True]


def test_why_a_function_is_traced_again():
    hooks, box = [lambda ct: ct * 3], Box(width=4.0)

    def loss(x, y=1.0):
        for hook in hooks:
            x = jhop.hook(x, hook)
        return (x * box.width).sum() * y

    step = jhop.jit(jax.grad(loss))
    assert twice(step, lambda: setattr(box, "width", 5.0))[1].endswith(".width` changed from 4.0 to 5.0")
    hooks.append(lambda ct: ct + 1)
    step(X)
    step(X[:2])
    step(X[:2])
    step(X.astype(jnp.bfloat16))
    step(X, 2.0)
    with jax.numpy_dtype_promotion("standard"):
        step(X, 2.0)
    entries, shape, dtype, tree, context = reasons(jhop.explain(step))[2:]
    assert entries.endswith("` has other entries than before")
    assert shape == "other types of arguments: `x` was float32[3] and is float32[2]"
    assert dtype == "other types of arguments: `x` was float32[2] and is bfloat16[3]"
    assert tree == "arguments of another structure"
    assert context == "JAX is set up in another way (x64, precision, mesh ...)"


def test_weak_types_and_static_arguments():
    step = jhop.jit(lambda x, k: jax.grad(lambda x: jhop.hook(x, lambda ct: ct * 3) * k)(x), static_argnames="k")
    step(jnp.float32(1), k=2)
    step(1.0, k=2)
    step(1.0, k=3)
    _, weak, static = jhop.explain(step).traces
    assert weak.reason == "other types of arguments: `arg0` is weakly typed or sharded in another way"
    assert static.reason == "another static argument: k was 2 and is 3"
    assert static.arguments == ("arg0: float32[]", "k = 3") == jhop.explain(step).graphs[2].arguments


def test_number_that_outgrows_the_device():
    box = Box(n=2**31 - 2)

    def hook(ct):
        box.n += 1
        return ct * box.n

    step = jhop.jit(gradient(hook))
    for _ in range(3):
        step(X)
    assert box.n == 2**31 + 1
    assert reasons(jhop.explain(step)) == ["first call", "a number of the state has another type, or outgrew 32 bits"]


def test_only_so_many_traces_are_kept(monkeypatch):
    monkeypatch.setattr(_history, "MAX_TRACES", 3)
    step = jhop.jit(gradient(lambda ct: ct * 3))
    for size in range(1, 6):
        step(jnp.ones(size))
    report = jhop.explain(step)
    assert [trace.number for trace in report.traces] == [3, 4, 5]
    assert [graph.trace.number for graph in report.graphs] == [1, 2, 3, 4, 5]
    assert report.forgotten == 2 and "Traces\n  2 older traces not kept\n  3. `loss`" in str(report)


def test_long_reasons_are_cut(monkeypatch):
    monkeypatch.setattr(_history, "MAX_REASON", 20)
    box = Box(flag=True)
    step = jhop.jit(gradient(lambda ct: ct * 3 if box.flag else ct * 2))
    assert twice(step, lambda: setattr(box, "flag", False)) == ["first call", "`L['hooks'][0].__..."]


# What else can be explained


def test_host():
    def shout(ct):
        print("hello")

    step = jhop.jit(gradient(shout))
    with pytest.warns(UserWarning, match="runs on the host"):
        step(X)
    (graph,) = jhop.explain(step).graphs
    assert "cannot trace a call to `print` in hook `shout`" in graph.on_host
    assert (graph.state, graph.guards, [hook.name for hook in graph.hooks]) == ((), (), ["shout"])
    assert "equations, cut at hooks that run on the host\n" in str(graph)
    assert "  on the host because:\n    cannot trace a call to `print`" in str(graph)


def test_refused_hooks_leave_no_trace():
    step = jhop.jit(gradient(lambda ct: print("hello")), fullgraph=True)
    for _ in range(2):
        with pytest.raises(jhop.Unsupported):
            step(X)
    assert jhop.explain(step).traces == jhop.explain(step).graphs == ()


def test_stages_ahead_of_time():
    meter = Meter()
    step = jhop.jit(gradient(meter.clip))
    lowered = step.lower(X)
    (graph,) = jhop.explain(step).graphs
    assert jhop.explain(lowered).graphs == (graph,) == step.trace(X).explain().graphs
    assert reasons(lowered.explain()) == ["first call"] and graph.broken is None
    assert [state.path for state in graph.state] == ["L['hooks'][0].__self__.steps", "L['hooks'][0].__self__.norm"]
    compiled = lowered.compile()
    meter.mode = "double"
    (graph,) = jhop.explain(compiled).graphs
    assert graph.broken == "`L['hooks'][0].__self__.mode` changed from 'clip' to 'double'"


def test_methods_and_partials():
    class Model:
        @jhop.jit
        def loss(self, x):
            return jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * 3) ** 2).sum())(x)

    model = jax.tree_util.register_static(Model)()
    model.loss(X)
    report = jhop.explain(Model.loss)
    assert len(report.graphs) == 1
    assert report == jhop.explain(model.loss) == model.loss.explain() == jhop.explain(functools.partial(model.loss, X))


def test_function_of_tensors():
    box = Box(n=0)

    def count(ct):
        box.n += 1
        return ct * 3

    @jhop.compile
    def mul(x, k):
        y = x * k
        y.register_hook(count)
        return y

    assert "not called yet" in str(jhop.explain(mul))
    x = jhop.tensor([0.5, 0.25], requires_grad=True)
    mul(x, 2).backward(jnp.ones(2))
    mul(x, 3)
    mul(x, 3)
    mul(jhop.tensor([0.5], requires_grad=True), 3)
    forward, backward, static, other = jhop.explain(mul).graphs
    assert (forward.trace.graph, forward.hooks, forward.state) == ("mul", (), ())
    assert forward.arguments == ("arg0: float32[2]", "argument1 = 2")
    assert any(guard.kind == "code" and "mul" in guard.what for guard in forward.function_guards)
    assert (backward.trace.graph, backward.trace.reason) == ("mul_backward", "first backward pass")
    assert [(hook.path, hook.name) for hook in backward.hooks] == [("L['hooks'][0]", "count")]
    assert [(state.type, state.read, state.written) for state in backward.state] == [("int", True, True)]
    assert static.trace.reason == "another static argument: argument1 was 2 and is 3"
    words = "argument0 was a Tensor that requires grad, float32[2] and is a Tensor that requires grad, float32[1]"
    assert other.trace.reason == f"other types of arguments: {words}"
    assert jhop.explain(mul).made_by == "jhop.compile"
    mul.reset()
    assert "it was reset" in str(jhop.explain(mul))


def test_eager_functions():
    fn = jhop.compile(lambda x: x * 2, backend="eager")
    fn(jhop.tensor(1.0))
    assert str(jhop.explain(fn)).endswith('\nbackend="eager" compiles nothing.')


def test_compiled_backward():
    box, made = Box(n=0, flag=True), []

    def count(ct):
        box.n += 1
        return ct * 3 if box.flag else ct

    def compiler_fn(gm):
        made.append(jhop.compile(gm, fullgraph=True))
        return made[-1]

    x = jhop.tensor([1.0, 2.0], requires_grad=True)
    x.register_hook(count)
    with jhop.compiled_autograd.enable(compiler_fn):
        (x * 2.0).backward(jnp.ones(2))
        box.flag, x.grad = False, None
        (x * 2.0).backward(jnp.ones(2))
    graph = made[0]
    report = jhop.explain(graph)
    assert report.name == "CompiledAutograd0" and graph.explain() == report
    first, second = report.graphs
    assert first.hooks[0].path == "L['hooks'][0]" and first.hooks[0].name == "count"
    assert second.trace.reason.endswith(".flag` changed from True to False")


def test_graph_with_other_sizes():
    gm = jhop.make_fx(lambda x, y: (jhop.trace_wrapped(x, fn=lambda ct: ct * 3.0), y * 2.0))(X, X)
    graph = jhop.compile(gm, dynamic=True)
    for a, b in [(X, X), (X[:2], X[:2]), (X, X[:2])]:
        graph(a, b)
    first, second = jhop.explain(graph).traces
    sizes = [[argument.partition("[")[2] for argument in trace.arguments] for trace in (first, second)]
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] != sizes[1][1]
    assert second.reason == "`y_1.shape[0]` was equal to `x_1.shape[0]`, which is 3, and is 2"


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (gradient, r"jhop\.explain: `gradient` was not compiled by jhop\. Wrap it with jhop\.jit .* call that"),
        (jax.jit(jnp.sin), r"was not compiled by jhop\. Wrap it with jhop\.jit"),
        (Box(explain=3), r"expected a function that jhop\.jit or jhop\.compile returned, got Kept"),
        (None, r"got NoneType"),
    ],
)
def test_what_cannot_be_explained(fn, message):
    with pytest.raises(jhop.JhopError, match=message):
        jhop.explain(fn)


# Asking changes nothing


def test_explaining_runs_and_changes_nothing():
    calls = []

    class Loud:
        def __repr__(self):
            calls.append("repr")
            return "Loud()"

        __str__ = __repr__

    box = Box(loud=Loud(), n=0, last=jnp.zeros(3))

    def hook(ct):
        calls.append("hook")
        if box.loud is not None and box.n % 2 == 0:
            box.last = ct
        box.n += 1
        return ct * 3

    def loss(x):
        calls.append("function")
        return (jhop.hook(x, hook) ** 2).sum()

    step = jhop.jit(jax.grad(loss))
    step(X)
    before, state = list(calls), dict(vars(box))
    first = jhop.explain(step)
    assert jhop.explain(step) == first and str(first)
    assert calls == before
    assert all(vars(box)[name] is value for name, value in state.items())
    box.loud = Loud()
    step(X)
    assert "repr" not in calls
    assert reasons(jhop.explain(step))[1].endswith("another object than before (a Loud)")


def test_reports_and_records_are_text_all_through():
    meter = Meter()
    step = jhop.jit(gradient(meter.clip))
    for _ in range(3):
        step(X)
    work, seen = [jhop.explain(step), *step._history.traces()], {}
    while work:
        item = work.pop()
        if id(item) not in seen and not isinstance(item, type):
            seen[id(item)] = item
            work += gc.get_referents(item)
    kinds = {type(item).__name__ for item in seen.values()}
    assert kinds <= set("Report GraphReport Hook State Guard Trace tuple dict str int bool NoneType".split())
    assert {"Hook", "State", "Guard", "Trace"} <= kinds


@pytest.mark.leaks
def test_explaining_leaves_no_tracer():
    box = Box(n=0, last=jnp.zeros(3))

    def hook(ct):
        box.n += 1
        box.last = ct
        return ct * 3 if box.n < 2 else ct * 2

    step = jhop.jit(gradient(hook))
    for count in (1, 2):
        np.testing.assert_allclose(step(X), X * 2 * (4 - count))
        assert len(jhop.explain(step).graphs) == count == box.n


def test_explaining_waits_for_a_trace_in_another_thread():
    """While another thread traces, symbols stand in the objects; it holds this lock."""
    step = jhop.jit(gradient(lambda ct: ct * 3))
    step(X)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(jhop.explain(step)))
    with _state.LOCK:
        thread.start()
        thread.join(0.2)
        assert not reports
    thread.join(20)
    assert len(reports) == 1


def test_a_hook_may_ask():
    box, found = Box(n=1), []

    def hook(ct):
        if box.n % 2:
            found.append(jhop.explain(step))
        box.n += 1
        return ct * box.n

    step = jhop.jit(gradient(hook))
    for n in range(2, 6):
        np.testing.assert_allclose(step(X), 2 * X * n)
    assert box.n == 5 and len(jhop.explain(step).graphs) == 2


def test_weak_references():
    owner = Box(n=2)
    reference = weakref.ref(owner)

    def hook(ct):
        kept = reference()
        return ct * (7 if kept is None else kept.n)

    step = jhop.jit(gradient(hook))
    step(X)
    assert guards_of(step, "reference") == {"what a weak reference is to (a Kept)": "there"}
    del owner
    gc.collect()
    np.testing.assert_allclose(step(X), X * 14)
    first, second = jhop.explain(step).graphs
    assert first.broken == second.trace.reason == "what a weak reference refers to is gone, or of another class"
    assert [state.type for state in first.state] == ["nothing"]
    assert [guard.then for guard in second.guards if guard.kind == "reference"] == ["gone"]
