"""`JHOP_LOGS=recompiles`: each new trace and capture is logged once, with what is traced, where it is, and why."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jhop

LOGGER = "jhop.recompiles"


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


@pytest.fixture
def logged(caplog):
    """The messages so far; a call of it forgets them."""
    caplog.set_level(logging.INFO, LOGGER)

    def take():
        found = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        caplog.clear()
        return found

    return take


def causes(message):
    return [line.strip(" -") for line in message.splitlines()[2:]]


def whole(gm):
    return jhop.compile(gm, fullgraph=True)


def backward(fn, x, *, hook=None, compiler_fn=whole, **options):
    y = fn(x)
    if hook is not None:
        y.register_hook(hook)
    with jhop.compiled_autograd.enable(compiler_fn):
        y.sum().backward(**options)


def double(x):
    return x * 2.0


def test_compiled_function_says_where_it_is_and_what_differs(logged):
    flags = [1.0]

    def scaled(x):
        return x * flags[0]

    line = scaled.__code__.co_firstlineno
    compiled = jhop.compile(scaled, dynamic=False)
    compiled(leaf(1.0, 2.0))
    assert logged() == []  # the first trace is none that comes again
    compiled(leaf(1.0, 2.0))
    assert logged() == []
    compiled(leaf(1.0))
    (message,) = logged()
    assert message.startswith(f"Recompiling `scaled` in {__file__}:{line}\n")
    assert causes(message) == [
        "other types of arguments: argument0 was a Tensor that requires grad, float32[2] and is a Tensor that requires "
        "grad, float32[1]"
    ]
    flags[0] = 3.0
    compiled(leaf(1.0))
    (message,) = logged()
    assert causes(message) == ["`scaled.__closure__[0].cell_contents[0]` changed from 1.0 to 3.0"]
    jhop.reset()
    compiled(leaf(1.0))
    assert logged() == []


def test_hook_in_a_compiled_function(logged):
    class Clip:
        def __init__(self):
            self.mode = "keep"

        def __call__(self, grad):
            return grad * 3.0 if self.mode == "keep" else grad * 5.0

    clip = Clip()

    def hooked(x):
        y = x * 2.0
        y.register_hook(clip)
        return y

    compiled = jhop.compile(hooked)
    for mode in ("keep", "keep", "drop"):
        clip.mode = mode
        x = leaf(1.0)
        compiled(x).sum().backward()
    (message,) = logged()
    assert message.startswith(f"Recompiling `hooked_backward` in {__file__}:{hooked.__code__.co_firstlineno}\n")
    assert "'keep'" in causes(message)[0] and "'drop'" in causes(message)[0] and x.grad.tolist() == [10.0]


def test_sizes_say_why_they_cannot_be_symbols(logged):
    def pairs(x):
        return x.reshape(-1, 2)

    compiled = jhop.compile(pairs, dynamic=True)
    for n in (4, 6):
        compiled(leaf(*[1.0] * n))
    (message,) = logged()
    assert causes(message)[1].startswith("sizes cannot be symbols: Cannot divide evenly the sizes of shapes")
    assert "`x.shape[0]`" in causes(message)[1]


def test_jit(logged):
    step = jhop.jit(jax.grad(lambda x: (jhop.hook(x, lambda ct: ct * 2.0) ** 2).sum()))
    step(jnp.ones(2))
    assert logged() == []
    step(jnp.ones(3))
    (message,) = logged()
    assert causes(message) == ["other types of arguments: `x` was float32[2] and is float32[3]"]


def test_graph(logged):
    def both(x, y):
        return jhop.trace_wrapped(x, fn=lambda ct: ct * 3.0), y * 2.0

    run = jhop.compile(jhop.make_fx(both)(jnp.ones(3), jnp.ones(3)), dynamic=True)
    run(jnp.ones(3), jnp.ones(3))
    run(jnp.ones(4), jnp.ones(4))
    assert logged() == []
    run(jnp.ones(4), jnp.ones(5))
    (message,) = logged()
    assert causes(message) == ["`y_1.shape[0]` was equal to `x_1.shape[0]`, which is 4, and is 5"]


def first(grad):
    return grad * 3.0


def second(grad):
    return grad * 5.0


PASSES = {
    "node": [dict(fn=lambda x: x * 2.0 + x), "and had 3: node 1 was MultiplyBackward and is AddBackward"],
    "function": [dict(fn=lambda x: 2.0 * x), "node 1 (MultiplyBackward) is that of another function"],
    "size": [dict(x=(1.0, 2.0, 3.0)), "input 1 was float32[2] and is float32[3]"],
    "hook": [dict(hook=second), "hook `first` (test_logs.py:"],
    "no hook": [dict(hook=None), "now no hook is"],
    "gradient": [dict(grad=True), ".grad of leaf 0 was None and is an array"],
    "compiler": [dict(compiler_fn=lambda gm: whole(gm)), "compiler_fn is another function object"],
}  # fmt: skip


@pytest.mark.parametrize("change", PASSES)
def test_backward_pass_says_what_differs(change, logged):
    given, words = PASSES[change]
    given = dict(given)
    backward(double, leaf(1.0, 2.0), hook=first)
    backward(double, leaf(3.0, 4.0), hook=first)
    assert logged() == []
    x = leaf(*given.pop("x", (1.0, 2.0)))
    if given.pop("grad", False):
        x.grad = jnp.ones(2)
    backward(**{"fn": double, "hook": first, "x": x} | given)
    (message,) = logged()
    assert message.startswith(f"Recompiling the backward pass in {__file__}:")
    assert any(words in cause for cause in causes(message)), message
    backward(**{"fn": double, "hook": first, "x": leaf(*x.tolist())} | given) if change != "gradient" else None
    assert logged() == []


def test_other_inputs(logged):
    x, y = leaf(1.0), leaf(2.0)
    for inputs in ([x], [y], [x]):
        with jhop.compiled_autograd.enable(whole):
            (x * y).sum().backward(inputs=inputs)
        x.grad = y.grad = None
    (message,) = logged()
    assert message.startswith("Recompiling the backward pass")


def test_pass_that_nobody_asked_to_see_is_logged_when_it_is_captured(logged):
    for fn in (double, double, lambda x: x + x):
        backward(fn, leaf(1.0, 2.0), compiler_fn=None)
    assert logged() == []
    backward(lambda x: x.sum() + x, leaf(1.0, 2.0), compiler_fn=None)
    backward(lambda x: x.sum() + x, leaf(1.0, 2.0), compiler_fn=None)
    assert len(logged()) == 1


def test_what_is_logged_in_a_block_is_settled_when_it_begins(caplog):
    logger = logging.getLogger(LOGGER)

    def passes(*fns):
        for fn in fns:
            x = leaf(1.0, 2.0)
            fn(x).sum().backward()

    with caplog.at_level(logging.WARNING, LOGGER), jhop.compiled_autograd.enable(whole):
        passes(double)
        logger.setLevel(logging.INFO)
        passes(lambda x: x + x)
        assert not caplog.records
    with caplog.at_level(logging.INFO, LOGGER), jhop.compiled_autograd.enable(whole):
        logger.setLevel(logging.WARNING)
        passes(lambda x: x.sum() + x)
    assert len(caplog.records) == 1


PROGRAM = """
import jhop
compiled = jhop.compile(lambda x: x * 2.0, dynamic=False)
for n in (2, 3):
    compiled(jhop.tensor([1.0] * n, requires_grad=True))
"""


@pytest.mark.parametrize("setting", ["recompiles", "", "nonsense"])
def test_environment(setting):
    env = {**os.environ, "JHOP_LOGS": setting, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    if setting == "nonsense":
        assert "JHOP_LOGS: unknown log 'nonsense'. Expected one of 'recompiles', 'inert'." in done.stderr
        return
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert ("[jhop.recompiles] Recompiling `<lambda>` in <string>:3" in lines) == (setting == "recompiles")
    assert sum("Recompiling" in line for line in lines) == (setting == "recompiles")
