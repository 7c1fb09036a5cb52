"""jhop does with small hook programs what PyTorch did with them: texts of graphs, gradients, state, refusals.

`corpus/programs.json` holds the programs and PyTorch's answers; `corpus/extract.py` made it.
"""

import contextlib
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

CORPUS = json.loads((Path(__file__).parent / "corpus" / "programs.json").read_text())
PROGRAMS = {program["name"]: program for program in CORPUS["programs"]}
RAISING = [name for name, program in PROGRAMS.items() if "raises" in program]
ANSWERED = [name for name in PROGRAMS if name not in RAISING]

DTYPES = {name: getattr(jnp, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}
RTOL = {name: float(jnp.finfo(name).eps) for name in ("float16", "bfloat16", "float64")} | {"float32": 2e-6}


def on_cpu(text):
    """A printed graph as it is on a CPU, where the expected ones were made."""
    return text.replace("device(type='cuda', index=0)", "device(type='cpu')")


def load(program, folder):
    """The program as a module, from a file: source lines are part of what is tested."""
    path = folder / f"{program['name']}.py"
    path.write_text(program["program_source"])
    module = types.ModuleType("program")
    module.__file__ = str(path)
    module.__dict__.update(ops=jhop.numpy, trace_wrapped=jhop.trace_wrapped, tensor=jnp.array)
    exec(compile(program["program_source"], str(path), "exec"), module.__dict__)
    return module


def leaf(given):
    """A leaf Tensor as the corpus describes it."""
    dtype = DTYPES[given["dtype"]]
    data = np.array(given["values"]).reshape(given["shape"])
    made = jhop.tensor(data, dtype=dtype, requires_grad=given["requires_grad"])
    if given["pre_grad"] is not None:
        before = given["pre_grad"]
        before = before["values"] if isinstance(before, dict) else before
        made.grad = jnp.array(np.array(before).reshape(given["shape"]), dtype)
    return made


def incoming(program, out):
    if program["grad_out"] is None:
        return None
    if program["grad_out"] == "auto":
        return jnp.full(out.shape, 2.0, out.dtype)
    return jnp.array(np.array(program["grad_out"]).reshape(out.shape), out.dtype)


class Run:
    """One run of a program on one backend, with what it left behind."""

    def __init__(self, program, backend, folder):
        self._program = program
        self.graphs = []
        self.module = load(program, folder)
        self.inputs = {given["name"]: leaf(given) for given in program["inputs"]}
        self.grads_before, self.state_before = self.grads(), self.state()
        self._backend = backend

    def state(self):
        return {expr: eval(expr, self.module.__dict__) for expr in self._program["state_after_exprs"]}

    def grads(self):
        return {name: tensor.grad for name, tensor in self.inputs.items()}

    def _compiler(self, gm):
        def inner(inner_gm, example_inputs):
            self.graphs.append(jhop.testing.normalize_gm(on_cpu(inner_gm.print_readable(False))))
            return jhop.backends.xla(inner_gm, example_inputs)

        return jhop.compile(gm, backend=inner, fullgraph=True, dynamic=True)

    def go(self):
        program, module = self._program, self.module
        for name, hook in program["hooks_outside"]:
            if name != "<out>":
                self.inputs[name].register_hook(getattr(module, hook))
        for name, hook in program["post_acc_hooks_outside"]:
            self.inputs[name].register_post_accumulate_grad_hook(getattr(module, hook))
        fn = module.fn
        if program["mode"] == "compiled_fwd":
            fn = jhop.compile(fn, backend=self._backend, dynamic=program["dynamic"])
        for _ in range(1 + bool(program["second_call"])):
            around = program["enable_around_forward"]
            with jhop.compiled_autograd.enable(self._compiler) if around else contextlib.nullcontext():
                out = self.out = fn(*self.inputs.values())
            for name, hook in program["hooks_outside"]:
                if name == "<out>":
                    out.register_hook(getattr(module, hook))
            gradient = incoming(program, out)
            for _ in range(program["backward_times"]):
                with jhop.compiled_autograd.enable(self._compiler):
                    out.backward(gradient, retain_graph=program["retain_graph"])


@contextlib.contextmanager
def x64_if_needed(program):
    wanted = any(given["dtype"] == "float64" for given in program["inputs"]) or "float64" in program["program_source"]
    with jax.enable_x64(wanted):
        yield


def run_all(name, folder):
    """The runs of a program on each of its backends in turn; ids of compiled graphs are counted over all of them."""
    program = PROGRAMS[name]
    runs = {}
    exact = jax.default_matmul_precision("highest")  # a GPU would multiply with fewer bits
    with jhop.testing.fresh_aot_ids(), x64_if_needed(program), exact:
        for backend in program["backends"]:
            jhop.reset()
            runs[backend] = Run(program, backend, folder)
            runs[backend].go()
    return program, runs


def plain(value):
    """As recorded values are written: arrays as {"array": [dtype, shape, values]}."""
    if isinstance(value, (jax.Array, np.ndarray)):
        value = np.asarray(value)
        return {"array": [str(value.dtype), list(value.shape), value.astype(np.float64).ravel().tolist()]}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def near(value):
    """Recorded values, with numbers of arrays compared to within their dtype's precision.

    Of the array's largest number, that is: where large ones cancel (1 - tanh(x)**2, a sum of products) the last bits of
    those are what is left.
    """
    if isinstance(value, dict) and set(value) == {"array"}:
        dtype, shape, numbers = value["array"]
        numbers = np.ravel(numbers).tolist()
        if dtype in RTOL:
            numbers = pytest.approx(numbers, rel=0, abs=RTOL[dtype] * max(map(abs, numbers), default=0))
        return {"array": [dtype, shape, numbers]}
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    return [near(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def answered(request, tmp_path_factory):
    return run_all(request.param, tmp_path_factory.mktemp("corpus"))


def each(key):
    """The programs for which something is recorded under `key`."""
    names = [name for name in ANSWERED if any(CORPUS["results"][i] if key != "text" else True
                                              for i in PROGRAMS[name][key].values())]  # fmt: skip
    return pytest.mark.parametrize("answered", names, indirect=True)


@each("text")
def test_text(answered):
    program, runs = answered
    texts = {backend: runs[backend].graphs[0] for backend in program["text"]}
    assert texts == {backend: CORPUS["texts"][index] for backend, index in program["text"].items()}


@each("out")
def test_outputs(answered):
    program, runs = answered
    outs = {backend: plain(runs[backend].out.value) for backend in program["out"]}
    assert outs == {backend: near(CORPUS["results"][index]) for backend, index in program["out"].items()}


@each("grads")
def test_gradients(answered):
    program, runs = answered
    grads = {backend: plain(runs[backend].grads()) for backend in program["grads"]}
    assert grads == {backend: near(CORPUS["results"][index]) for backend, index in program["grads"].items()}


@each("state")
def test_state(answered):
    program, runs = answered
    state = {backend: plain(runs[backend].state()) for backend in program["state"]}
    assert state == {backend: near(CORPUS["results"][index]) for backend, index in program["state"].items()}


@pytest.fixture(scope="module")
def refused(request, tmp_path_factory):
    """(program, its run, the error)."""
    name, backend = request.param
    program = PROGRAMS[name]
    jhop.reset()
    with x64_if_needed(program):
        run = Run(program, backend, tmp_path_factory.mktemp("corpus"))
        with pytest.raises(jhop.JhopError) as caught:
            run.go()
    return program, run, caught.value


each_refused = pytest.mark.parametrize(
    "refused", [(name, b) for name in RAISING for b in PROGRAMS[name]["backends"]], ids="-".join, indirect=True
)


@each_refused
def test_refusal_has_its_class(refused):
    program, _, error = refused
    assert type(error) is getattr(jhop, program["raises"]["class"])


@each_refused
def test_refusal_names_the_call(refused):
    program, _, error = refused
    assert program["raises"].get("names", "hook") in str(error)


@each_refused
def test_refusal_leaves_gradients_and_state(refused):
    _, run, _ = refused
    assert (run.grads(), run.state()) == (run.grads_before, run.state_before)
