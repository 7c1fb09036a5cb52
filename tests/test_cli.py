"""The command line: the demo proves its counters, `graph` prints graphs, and every fault is one line and status 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jhop
from jhop import _cli, _demo
from jhop.__main__ import main

ROOT = Path(__file__).parents[1]

NET = """
import jax
import jax.numpy as jnp
import jhop

limit = 3


class Meter:
    def __init__(self):
        self.count = 0

    def double(self, ct):
        self.count += 1
        return ct * 2.0


meter = Meter()


def loss(w, x):
    w = jhop.hook(w, meter.double)
    hidden = jnp.sin(x @ w)
    return (hidden * hidden).sum()


def scaled(x, *, by=2.0):
    return x * by


def count(x):
    return x.astype(int)


def total(n):
    return jnp.float32(0.5) * n.sum().astype("float32")


def broken(x):
    return x @ jnp.ones(
        (7, 7))


def endless(x):
    return jax.lax.while_loop(lambda y: y < 1.0, lambda y: y * 2.0, x)


class Model:
    @staticmethod
    def forward(x):
        return jnp.tanh(x)
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A folder with a user's modules, which is the current one."""
    (tmp_path / "usernet.py").write_text(NET)
    (tmp_path / "fails.py").write_text("limit = 1\nlimit / 0\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "typo.py").write_text("def loss(x)\n    return x\n")
    (tmp_path / "needs.py").write_text("import nowhere_at_all\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "helper.py").write_text("def half(x):\n    return x * 0.5\n")
    (tmp_path / "deep" / "random.py").write_text("from helper import half\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def run(capsys, *argv):
    """(status, stdout, stderr) of a command."""
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


# -- graph -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["usernet", "usernet.py", "./usernet.py", "./usernet"])
def test_graph_prints_backward_with_opaque_hooks(net, capsys, where):
    status, out, err = run(capsys, "graph", f"{where}:loss", "f32[4,3]", "f32[2,4]", "--dialect", "torch")
    assert (status, err) == (0, "")
    assert 'def forward(self, ct: "f32[]", w: "f32[4, 3]", x: "f32[2, 4]"' in out
    assert out.count("trace_wrapped_higher_order_op_self_invoke") == 1
    assert "state" not in out


def test_graph_runs_no_hook(net, capsys):
    run(capsys, "graph", "usernet:loss", "f32[4,3]", "f32[2,4]", "--inlined", "--dialect", "torch")
    module = sys.modules["usernet"]
    assert (module.meter.count, type(module.meter.count)) == (0, int)


def test_graph_inlined_names_state_by_path(net, capsys):
    args = ("graph", "usernet:loss", "f32[4,3]", "f32[2,4]", "--dialect", "torch")
    status, out, _ = run(capsys, *args, "--inlined")
    assert status == 0
    assert "self_invoke" not in out
    assert "# state in:  L['hooks'][0].__self__.count\n" in out
    assert "# state out: L['hooks'][0].__self__.count\n" in out


def test_graph_inlined_is_the_code_of_the_inlined_graph(net, capsys):
    status, out, _ = run(capsys, "graph", "usernet:loss", "f32[4,3]", "f32[2,4]", "--inlined")
    usernet = sys.modules["usernet"]
    gm = jhop.inline(jhop.backward_graph(usernet.loss)(jax.numpy.ones((4, 3)), jax.numpy.ones((2, 4))))
    assert (status, out.strip()) == (0, gm.code.strip())
    assert "L['hooks'][0].__self__.count" in out


def test_graph_forward(net, capsys):
    status, out, _ = run(capsys, "graph", "usernet:count", "f32[3]", "--forward", "--dialect", "torch")
    assert status == 0
    assert out.startswith("class count(")
    assert re.search(r'"i32\[3\]" = .*_to_copy', out)


def test_graph_in_the_jax_dialect_is_the_code_of_the_graph(net, capsys):
    status, out, _ = run(capsys, "graph", "usernet:scaled", "f32[3]")
    usernet = sys.modules["usernet"]
    assert status == 0
    assert out.strip() == jhop.backward_graph(usernet.scaled)(jax.numpy.ones(3)).code.strip()


def test_graph_takes_options_anywhere(net, capsys):
    last = run(capsys, "graph", "usernet:loss", "f32[4,3]", "f32[2,4]", "--dialect", "torch")
    middle = run(capsys, "graph", "usernet:loss", "f32[4,3]", "--dialect", "torch", "f32[2,4]")
    first = run(capsys, "graph", "--dialect", "torch", "usernet:loss", "f32[4,3]", "f32[2,4]")
    assert last == middle == first


def test_graph_of_a_file_imports_its_neighbours_and_shadows_nothing(net, capsys):
    import random

    before = list(sys.path)
    status, out, _ = run(capsys, "graph", "deep/random.py:half", "f32", "--dialect", "torch")
    assert status == 0
    assert "0.5" in out
    assert sys.modules["random"] is random
    assert sys.path == before


def test_graph_of_a_dotted_name(net, capsys):
    assert run(capsys, "graph", "usernet:Model.forward", "bf16[2]", "--dialect", "torch")[0] == 0


def test_graph_of_a_huge_type_allocates_nothing(net, capsys):
    status, out, _ = run(capsys, "graph", "usernet:scaled", "f32[1000000,1000000]", "--dialect", "torch")
    assert status == 0
    assert "f32[1000000, 1000000]" in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32", "float32[]"),
        ("f32[]", "float32[]"),
        ("f32[4,8]", "float32[4,8]"),
        ("f32[4, 8,]", "float32[4,8]"),
        ("bf16[0]", "bfloat16[0]"),
        ("f16[1]", "float16[1]"),
        ("i32[3]", "int32[3]"),
        ("u8", "uint8[]"),
        ("bool[2]", "bool[2]"),
        ("c64[2]", "complex64[2]"),
        ("float32[2]", "float32[2]"),
    ],
)
def test_types(text, expected):
    assert jax.typeof(_cli._example(text)).str_short() == expected


@pytest.mark.parametrize("text", ["f64[3]", "i64", "u64[1]", "c128"])
def test_64_bit_types_need_x64(text):
    with pytest.raises(jhop.JhopError, match=rf"^type `{re.escape(text)}`: .*JAX_ENABLE_X64=1"):
        _cli._example(text)
    with jax.enable_x64(True):
        assert _cli._example(text).dtype.itemsize >= 8


FAULTS = {
    "no colon": (["usernet"], r"`usernet`: expected MODULE:FUNCTION"),
    "no function": (["usernet:"], r"`usernet:`: expected MODULE:FUNCTION"),
    "no module": ([":loss"], r"`:loss`: expected MODULE:FUNCTION"),
    "module not found": (["nowhere:loss"], r"module `nowhere`: not found .*current folder"),
    "submodule not found": (["nowhere.net:loss"], r"module `nowhere\.net`: not found"),
    "file not found": (["deep/net.py:loss"], r"module `deep/net\.py`: there is no such file\."),
    "no Python file": (["./deep:loss"], r"module `\./deep`: there is no such file\."),
    "module fails": (["fails:loss"], r"module `fails`: importing it raised ZeroDivisionError: .* \(fails\.py:2\)"),
    "file fails": (["fails.py:loss"], r"module `fails\.py`: importing it raised ZeroDivisionError: .*\(fails\.py:2\)"),
    "module exits": (["exits:loss"], r"module `exits`: importing it raised SystemExit: 3 \(exits\.py:1\)"),
    "syntax": (["typo:loss"], r"module `typo`: importing it raised SyntaxError: .* \(typo\.py:1\)"),
    "import in module": (["needs:loss"], r"module `needs`: importing it raised ModuleNotFoundError: .*nowhere_at_all"),
    "name misspelt": (["usernet:lose", "f32"], r"function `lose`: .*`usernet`.* Did you mean `loss`\?"),
    "name unknown": (["usernet:qqqqq", "f32"], r"function `qqqqq`: module `usernet` has none of this name\."),
    "not callable": (["usernet:limit"], r"function `limit`: in module `usernet` this is of type int\."),
    "type form": (["usernet:loss", "f32[3", "f32"], r"type `f32\[3`: expected .* such as f32\[4,8\]"),
    "type name": (["usernet:loss", "f32", "fp32[3]"], r"type `fp32\[3\]`: `fp32` is no dtype; .* Did you mean f32\?"),
    "type function": (["usernet:loss", "sin"], r"type `sin`: `sin` is no dtype"),
    "negative size": (["usernet:loss", "f32[4,-1]"], r"type `f32\[4,-1\]`: expected a dtype and sizes"),
    "size": (["usernet:loss", "f32[99999999999999999999]"], r"type `f32\[9+\]`: the sizes are too large"),
    "x64": (["usernet:loss", "f64[3]"], r"type `f64\[3\]`: .*JAX_ENABLE_X64=1"),
    "too few": (["usernet:loss", "f32[4,3]"], r"`usernet:loss`: its arguments are \(w, x\), but got f32\[4,3\]: .*'x'"),
    "none": (["usernet:loss"], r"`usernet:loss`: its arguments are \(w, x\), but got no types: .*'w'"),
    "too many": (["usernet:total", "f32", "f32"], r"`usernet:total`: .* but got f32 f32: too many"),
    "result": (["usernet:count", "f32[3]"], r"`usernet:count`: it returns int32\[3\], .*--forward"),
    "arguments": (["usernet:total", "i32[3]"], r"`usernet:total`: only floating .* got i32\[3\]\."),
    "no derivative": (["usernet:endless", "f32"], r"`usernet:endless`: while its graph .* ValueError: Reverse-mode"),
    "raises": (
        ["usernet:broken", "f32[3]"],
        r"`usernet:broken`: for f32\[3\] it raised TypeError: .*\(usernet\.py:\d+\)",
    ),
}


@pytest.mark.parametrize(("argv", "message"), FAULTS.values(), ids=FAULTS)
def test_graph_fault_is_one_line(net, capsys, argv, message):
    status, out, err = run(capsys, "graph", *argv)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert re.match(rf"jhop graph: {message}", err), err


def test_graph_fault_keeps_the_original_error(net):
    with pytest.raises(jhop.JhopError) as caught:
        _cli.graph_text("fails:loss", [])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# -- demo --------------------------------------------------------------------------------------------------------------


def test_demo_learns_and_counts(capsys):
    pytest.importorskip("sklearn")
    status, out, err = run(capsys, "demo", "--dialect", "torch")
    assert (status, err) == (0, "")
    assert float(re.search(r"accuracy on the test images: (\S+)", out)[1]) > 0.95
    assert out.count("= torch__dynamo__trace_wrapped_higher_order_op_self_invoke(") == 3
    assert out.count(".steps ") == out.count("Python int   read and written") == 3
    assert re.search(r"^0 +64x64 +300 +\d+ +0\.\d+$", out, re.MULTILINE)
    assert "300 steps x 3 layers = 900; the hooks counted 300 + 300 + 300 = 900\n" in out
    assert "compiled versions of the step: 1\n" in out


def test_demo_depends_on_the_seed_alone(capsys):
    pytest.importorskip("sklearn")
    args = ("demo", "--steps", "3", "--hidden", "8", "--dialect", "torch", "--seed")
    timeless = [re.sub(r"\S+ seconds", "", run(capsys, *args, seed)[1]) for seed in ("1", "1", "2")]
    assert timeless[0] == timeless[1] != timeless[2]


def test_demo_fails_where_a_counter_is_wrong(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(_demo, "make_step", lambda loss: jax.jit(lambda layers, *_: (0.0, layers)))
    monkeypatch.setattr(_demo, "versions_of", lambda step: 1)
    status, out, err = run(capsys, "demo", "--steps", "2", "--dialect", "torch")
    assert status == 1
    assert "2 steps x 3 layers = 6; the hooks counted 0 + 0 + 0 = 0\n" in out
    assert re.fullmatch(r"jhop demo: FAILED: each hook must have counted 2 steps, .* \[0, 0, 0\]\.\n", err)


@pytest.mark.parametrize(
    ("counts", "versions", "message"),
    [
        ([3, 3], 1, None),
        ([3, 1], 1, r"counted 3 steps, as a Python int, but they counted \[3, 1\]"),
        ([3, 3.0], 1, r"as a Python int, but they counted \[3, 3\.0\]"),
        ([3, 3], 2, r"compiled once, but there are 2 versions"),
    ],
)
def test_demo_faults(counts, versions, message):
    faults = _demo.faults_of(3, counts, versions)
    assert len(faults) == (message is not None)
    assert message is None or re.search(message, faults[0])


def test_demo_without_sklearn_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, out, err = run(capsys, "demo")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(r'jhop demo: .*scikit-learn.*pip install "jhop\[demo\]"\n', err)


# -- the program -------------------------------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"jhop {jhop.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["graph", "--help"]])
def test_help_has_examples(capsys, argv):
    with pytest.raises(SystemExit, match="0"):
        main(argv)
    assert "  python -m jhop graph net:loss 'f32[64,10]' 'f32[32,64]' 'i32[32]'\n" in capsys.readouterr().out


def test_no_command_prints_help(capsys):
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    assert err.startswith("usage: python -m jhop ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--steps", "0"], r"--steps: expected a number of at least 1, got 0"),
        (["demo", "--hidden", "-3"], r"--hidden: expected a whole number, got '-3'"),
        (["demo", "--seed", "x"], r"--seed: expected a whole number, got 'x'"),
        (["demo", "f32"], r"unrecognized arguments: f32"),
        (["graph"], r"required: MODULE:FUNCTION"),
        (["graph", "usernet:loss", "--inline", "f32"], r"unrecognized arguments: --inline"),
        (["graph", "usernet:loss", "f32", "--dialect", "onnx"], r"--dialect: invalid choice: 'onnx'"),
        (["show"], r"invalid choice: 'show'"),
    ],
)
def test_argparse_refuses(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert re.search(message, capsys.readouterr().err)


def python_m_jhop(*argv, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "jhop", *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )


def test_program_demo(tmp_path):
    pytest.importorskip("sklearn")
    done = python_m_jhop("demo", "--steps", "30", "--dialect", "torch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "30 steps x 3 layers = 90; the hooks counted 30 + 30 + 30 = 90\n" in done.stdout


def test_program_graph(net, tmp_path):
    done = python_m_jhop("graph", "usernet:loss", "f32[4,3]", "f32[2,4]", "--dialect", "torch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "self_invoke" in done.stdout
    done = python_m_jhop("graph", "usernet:lose", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
