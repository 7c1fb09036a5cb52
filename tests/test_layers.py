"""The layer rule: a module of jhop imports only modules that stand before it in `LAYERS`, and stays short."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jhop"

# A package's own name stands for its `__init__.py`; "__init__" is that of jhop itself.
LAYERS = (
    "_compat",
    "_errors",
    "_stores",
    "_source",
    "_logs",
    "_static",
    "_asked",
    "_banned",
    "_mentions",
    "_reads",
    "_watched",
    "_profiling",
    "_effects",
    "_expr",
    "_scalar",
    "_replay",
    "_late",
    "_names",
    "_container",
    "_slotcode",
    "_wording",
    "_classes",
    "_library",
    "_leaves",
    "_walk",
    "_undo",
    "_stored",
    "_records",
    "_append",
    "_template",
    "_state",
    "_writeback",
    "_copier",
    "_close",
    "_hook_options",
    "_contract",
    "_trace_wrapped",
    "_check",
    "_blame",
    "_hook",
    "_point",
    "_boundary",
    "_interp",
    "_hook_fn",
    "_splice",
    "_rebuild",
    "_graph",
    "_cut",
    "_program",
    "_capture",
    "_guards",
    "_ran",
    "_lookups",
    "_strict",
    "_lifted",
    "_describe",
    "_slots",
    "_loops",
    "_thread",
    "_repeats",
    "_inplace",
    "_inline",
    "_discharge",
    "backends",
    "_history",
    "_report",
    "_explain",
    "_text._namespace",
    "_text._symbols",
    "_text._statements",
    "_text._words",
    "_text._steps",
    "_text._analysis",
    "_text._aten",
    "_text.fx_text",
    "_text.torch_text",
    "_text._jax_source",
    "_text._jax_ops",
    "_text._jax_rows",
    "_text._jax_higher",
    "_text._jax_writer",
    "_text.jax_text",
    "_text.html",
    "_text",
    "_sizes",
    "_compile",
    "_backward_graph",
    "_options",
    "_step",
    "_aot",
    "_jit",
    "_guarding",
    "_nan_guard",
    "_entries",
    "_questions",
    "_functionalize",
    "_kept",
    "_gradients",
    "_node",
    "_gates",
    "_plan",
    "_engine",
    "_batched",
    "_values",
    "_edges",
    "_tensor",
    "_numbers",
    "_op",
    "_lift",
    "_indexing",
    "_record",
    "numpy",
    "autograd",
    "_inside",
    "_retained",
    "_joint",
    "_bound",
    "_unfold",
    "_reach",
    "_compiled",
    "_attempt",
    "_forward",
    "_anomaly",
    "_schedule",
    "_standins",
    "_capture_pass",
    "_tape",
    "_resized",
    "_misses",
    "compiled_autograd",
    "testing",
    "_reset",
    "__init__",
    "_cli",
    "_demo",
    "__main__",
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
SLOW_IMPORTS = ("sklearn", "matplotlib", "torch", "IPython")

FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())


def module_of(path: Path) -> str:
    """The name in `LAYERS` of a file of jhop."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def full_name(module: str) -> str:
    """The dotted name that Python knows `module` by."""
    return "jhop" if module == "__init__" else f"jhop.{module}"


KNOWN = {full_name(layer) for layer in LAYERS}


def imports_of(module: str, source: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    """The line and the module of each import in `source`, the text of `module`, inside functions as well.

    Of `from a import b` the module is `a.b` where that is a layer or in JAX's internals, else `a`.
    """
    package = full_name(module) if is_package else full_name(module).rpartition(".")[0] or "jhop"
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((node.lineno, name if name in KNOWN or name == "jax._src" else base))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def layer_faults(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Says of each import of jhop in `source` that the layer rule forbids where it is and why."""
    allowed = {full_name(layer) for layer in LAYERS[: LAYERS.index(module)]}
    faults = []
    for line, name in imports_of(module, source, is_package=is_package):
        if name.partition(".")[0] == "jhop" and name not in allowed:
            why = "stands no earlier in LAYERS" if name in KNOWN else "is not in LAYERS"
            faults.append(f"{full_name(module)}, line {line}: imports {name}, which {why}")
    return faults


def internals_faults(module: str, source: str) -> list[str]:
    """Says where `source` reaches into `jax._src`."""
    lines = [line for line, name in imports_of(module, source) if f"{name}.".startswith("jax._src.")]
    lines += [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and n.attr == "_src"]
    return [f"{full_name(module)}, line {line}: uses jax._src, which only jhop._compat may" for line in lines]


def length_faults(module: str, source: str) -> list[str]:
    """Says which functions of `source` are too long, and whether the whole is."""
    faults = []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        faults.append(f"{full_name(module)} has {lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                faults.append(f"{full_name(module)}: `{node.name}` has {lines} lines, more than {MAX_FUNCTION_LINES}")
    return faults


def test_every_file_has_a_layer():
    assert FILES
    assert {module_of(path) for path in FILES} <= set(LAYERS)


@each_file
def test_imports_point_one_way(path):
    module = module_of(path)
    if module not in LAYERS:
        pytest.skip("test_every_file_has_a_layer reports it")
    assert not layer_faults(module, path.read_text("utf-8"), is_package=path.name == "__init__.py")


@each_file
def test_only_compat_touches_jax_internals(path):
    if module_of(path) != "_compat":
        assert not internals_faults(module_of(path), path.read_text("utf-8"))


@each_file
def test_files_and_functions_stay_short(path):
    assert not length_faults(module_of(path), path.read_text("utf-8"))


def test_import_leaves_optional_packages_alone():
    program = f"import sys, jhop; print([name for name in {SLOW_IMPORTS} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# The rules themselves can fail.


@pytest.mark.parametrize(
    "source",
    [
        "from jhop import _jit",
        "from jhop._jit import jit",
        "import jhop._jit as j",
        "from . import _jit",
        "from ._jit import jit",
        "def f():\n    from ._text import html",
        "if TYPE_CHECKING:\n    from ._graph import GraphModule",
        "import importlib\nimportlib.import_module('jhop._jit')",
        "import jhop",
        "from jhop import reset",
        "from . import _hook",
        "from . import _nowhere",
        "from ._nowhere import x",
    ],
)
def test_layer_rule_refuses(source):
    assert len(layer_faults("_hook", source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_hook", "import jax\nfrom numpy import ndarray\nfrom . import _compat, _errors\nfrom ._state import walk"),
        ("_hook", "from jhop._trace_wrapped import trace_wrapped"),
        ("_text.html", "from . import torch_text\nfrom .._graph import GraphModule\nfrom jhop._text import jax_text"),
        ("_compile", "from ._text import html\nimport jhop._text.html"),
        ("__init__", "from ._hook import hook as hook\nfrom . import testing as testing"),
    ],
)
def test_layer_rule_accepts(module, source):
    assert not layer_faults(module, source, is_package=module == "__init__")


def test_layer_rule_resolves_dots_from_a_package():
    assert not layer_faults("_text", "from .html import page\nfrom . import html", is_package=True)
    assert layer_faults("_text", "from .. import _jit", is_package=True)
    assert layer_faults("_text.torch_text", "from .._compile import CompiledGraph")


@pytest.mark.parametrize(
    "source",
    ["import jax._src.core", "from jax._src import core", "from jax import _src", "import jax\njax._src.core.Jaxpr"],
)
def test_internals_rule_refuses(source):
    assert len(internals_faults("_hook", source)) == 1


def test_length_rule_refuses():
    assert not length_faults("_hook", "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1))
    assert len(length_faults("_hook", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES)) == 1
    assert len(length_faults("_hook", "pass\n" * (MAX_FILE_LINES + 1))) == 1


@pytest.mark.parametrize("name", ["autograd", "backends", "compiled_autograd", "testing"])
def test_public_modules_say_what_is_public(name):
    module = importlib.import_module(f"jhop.{name}")
    assert list(module.__all__) == sorted(module.__all__, key=lambda name: (name[0].islower(), name))
    for public in module.__all__:
        assert public == "Backend" or getattr(module, public).__doc__, public  # a type alias has none
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    hidden = {"aot_ids", "checked", "find", "run_backend", "take_aot_id", "transform_of", "xla_program"}  # for jhop
    assert {key for key in own if not key.startswith("_")} - hidden <= set(module.__all__)
