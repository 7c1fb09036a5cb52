"""Compiled autograd with no function of the user's: a structure runs node by node until it is seen again."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

_compiles = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compiles.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(autouse=True)
def fresh():
    jhop.reset()
    yield
    jhop.reset()


def leaf(*values):
    return jhop.tensor(list(values), requires_grad=True)


def compiles_in(run):
    """How many programs XLA compiles in a call."""
    before = len(_compiles)
    run()
    return len(_compiles) - before


class Counting:
    """A hook with state."""

    def __init__(self, factor):
        self.factor = factor
        self.calls = 0

    def __call__(self, grad):
        self.calls += 1
        return grad * self.factor


def program(x, *hooks):
    y = jhop.numpy.sin(x) * 3.0
    for hook in hooks:
        y.register_hook(hook)
    return (y * y).sum()


def slope(x, factor=1.0):
    return 18 * factor * np.sin(x) * np.cos(x)


def passes(x, *hooks, times=4):
    """How many programs each of a few passes compiles; each checks its gradient."""
    found = []
    factor = np.prod([getattr(hook, "factor", 1.0) for hook in hooks])
    for _ in range(times):
        x.grad = None
        y = program(x, *hooks)
        found.append(compiles_in(y.backward))
        np.testing.assert_allclose(x.grad, slope(np.asarray(x.value), factor), rtol=1e-5)
    return found


def test_first_sight_compiles_nothing_and_the_second_one_program():
    x, hook = leaf(0.5, 2.0), Counting(0.25)
    program(x, hook).backward()  # XLA's kernels of the operations
    program(x, hook).backward()
    expected = x.grad / 2
    with jhop.compiled_autograd.enable():
        first, second, *later = passes(x, hook)
    assert first == 0
    assert second >= 1
    assert later == [0, 0]
    np.testing.assert_allclose(x.grad, expected, rtol=1e-6)
    np.testing.assert_allclose(x.grad, slope(np.float32([0.5, 2.0]), 0.25), rtol=1e-6)
    assert hook.calls == 6


def test_a_function_of_the_users_is_shown_every_structure_at_first_sight():
    x, graphs = leaf(0.5, 2.0), []

    def compiler_fn(gm):
        graphs.append(gm)
        return jhop.compile(gm)

    with jhop.compiled_autograd.enable(compiler_fn):
        passes(x, times=1)
        assert len(graphs) == 1
        passes(x, times=3)
    assert len(graphs) == 1


def test_other_shapes_hooks_and_operations_are_first_sights_of_their_own():
    x, hook = leaf(0.5, 2.0), Counting(2.0)
    for other in (leaf(1.0, 2.0, 3.0), leaf(0.5, 2.0)):
        program(other, hook).backward()
        (jhop.numpy.cos(other) * 2.0).sum().backward()
    with jhop.compiled_autograd.enable():
        assert passes(x, times=3)[2] == 0
        assert passes(leaf(1.0, 2.0, 3.0), times=1) == [0]
        assert passes(x, hook, times=1) == [0]
        assert compiles_in((jhop.numpy.cos(x) * 2.0).sum().backward) == 0


def test_hooks_that_are_new_at_each_pass_never_compile_and_are_not_kept():
    x, kept = leaf(0.5, 2.0), []
    program(x, lambda grad: grad * 2.0).backward()
    with jhop.compiled_autograd.enable():
        for i in range(1, 30):
            x.grad, big = None, np.full(1000, float(i), np.float32)
            hook = functools.partial(lambda grad, big: grad * float(big[0]), big=big)
            y = program(x, hook)
            kept.append(weakref.ref(hook))
            del hook
            assert compiles_in(y.backward) == 0, i
            np.testing.assert_allclose(x.grad, slope(np.float32([0.5, 2.0]), i), rtol=1e-5)
            del y
    gc.collect()
    assert [ref() for ref in kept] == [None] * 29


@pytest.mark.parametrize("compiler_fn", [None, lambda gm: jhop.compile(gm, fullgraph=True)], ids=["none", "own"])
def test_a_leaf_that_takes_the_place_of_another_is_told_from_it(compiler_fn):
    def double(tensor):
        tensor.grad = tensor.grad * 2.0

    ids = set()
    for value in range(1, 9):
        x = leaf(float(value), 1.0)
        x.register_post_accumulate_grad_hook(double)
        ids.add(id(x))
        for _ in range(3):
            x.grad = None
            with jhop.compiled_autograd.enable(compiler_fn):
                (x * x).sum().backward()
            assert x.grad.tolist() == [4.0 * value, 4.0]
        del x  # the next one may have its id
    assert len(ids) < 8


@pytest.mark.filterwarnings("ignore:hook `shout`")
def test_a_hook_that_cannot_be_traced_runs_at_each_pass(capsys):
    x = leaf(0.5, 2.0)

    def shout(grad):
        print("gradient of", grad.shape)
        return grad * 2.0

    with jhop.compiled_autograd.enable():
        for _ in range(3):
            x.grad = None
            program(x, shout).backward()
            np.testing.assert_allclose(x.grad, slope(np.float32([0.5, 2.0]), 2.0), rtol=1e-6)
    assert capsys.readouterr().out.splitlines() == ["gradient of (2,)"] * 3


@pytest.mark.parametrize("where", ["jhop._tape.Tape.capture", "jhop._compile.inline"])
def test_what_cannot_be_captured_goes_on_node_by_node_and_a_warning_says_so(monkeypatch, where):
    x, hook, tries = leaf(0.5, 2.0), Counting(2.0), []

    def fails(*args, **kwargs):
        tries.append(where)
        raise NotImplementedError("not this one")

    monkeypatch.setattr(where, fails)
    with jhop.compiled_autograd.enable():
        passes(x, hook, times=1)
        with pytest.warns(UserWarning, match="node by node.*: not this one"):
            passes(x, hook, times=1)
        passes(x, hook, times=3)  # without another warning, and without another try
    np.testing.assert_allclose(x.grad, slope(np.float32([0.5, 2.0]), 2.0), rtol=1e-6)
    assert hook.calls == 5
    assert tries == [where]


def test_a_warning_that_is_an_error_is_raised_and_nothing_is_written(capsys):
    x = leaf(0.5, 2.0)

    def shout(grad):
        print("gradient")

    with jhop.compiled_autograd.enable():
        passes(x, shout, times=1)
        x.grad = None
        with pytest.raises(UserWarning, match="`shout`.*runs on the host"):
            program(x, shout).backward()
    assert x.grad is None
    assert capsys.readouterr().out == "gradient\n"


@pytest.mark.filterwarnings("ignore:hook `failing`")  # from the trace in which it fails, it runs on the host
@pytest.mark.parametrize("sight", [1, 2, 3])
def test_an_error_of_a_hook_is_that_of_the_hook_at_every_sight(sight):
    x, count = leaf(0.5, 2.0), Counting(2.0)

    def failing(grad):
        if settings["fail"]:
            raise KeyError("mine")
        return grad

    settings = {"fail": False}
    with jhop.compiled_autograd.enable():
        for i in range(1, sight + 1):
            x.grad, settings["fail"] = None, i == sight
            y = program(x, count, failing)
            if i < sight:
                y.backward()
            else:
                with pytest.raises(KeyError, match="mine"):
                    y.backward()
    assert x.grad is None


def test_saved_values_are_unpacked_once_at_every_sight():
    x, unpacked = leaf(0.5, 2.0), []

    def unpack(packed):
        unpacked.append(packed)
        return packed

    counts = []
    with jhop.compiled_autograd.enable():
        for _ in range(3):
            with jhop.autograd.saved_tensors_hooks(lambda array: array, unpack):
                y = program(x)
            unpacked.clear()
            y.backward()
            counts.append(len(unpacked))
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_a_freed_graph_says_so_at_every_sight():
    x = leaf(0.5, 2.0)
    with jhop.compiled_autograd.enable():
        for _ in range(3):
            y = program(x)
            y.backward()
            with pytest.raises(jhop.JhopError, match="already run"):
                y.backward()


def test_gradients_that_are_asked_for_are_those_of_every_sight():
    x, hook = leaf(0.5, 2.0), Counting(0.5)
    with jhop.compiled_autograd.enable():
        for _ in range(3):
            y = jhop.numpy.sin(x) * 3.0
            y.register_hook(hook)
            grads = jhop.autograd.grad((y * y).sum(), [x, y])
            np.testing.assert_allclose(grads[0], slope(np.float32([0.5, 2.0]), 0.5), rtol=1e-6)
            np.testing.assert_allclose(grads[1], 3 * np.sin([0.5, 2.0]), rtol=1e-6)
    assert x.grad is None
    assert hook.calls == 3


def test_retained_gradients_and_accumulation_at_every_sight():
    x = leaf(0.5, 2.0)
    with jhop.compiled_autograd.enable():
        for i in range(1, 7):  # the first with no gradient there is a structure of its own
            y = jhop.numpy.sin(x) * 3.0
            y.retain_grad()
            (y * y).sum().backward()
            np.testing.assert_allclose(y.grad, 6 * np.sin([0.5, 2.0]), rtol=1e-6)
            np.testing.assert_allclose(x.grad, i * slope(np.float32([0.5, 2.0])), rtol=1e-5)


def test_weakly_typed_values_are_told_from_others():
    def run(scale):
        y = jnp.bfloat16(2.0) * jnp.ones(3, jnp.bfloat16)
        x = jhop.tensor(y, requires_grad=True)
        (x * scale).sum().backward()
        return x.grad.dtype, x.grad.tolist()

    with jhop.compiled_autograd.enable():
        found = [run(3.0) for _ in range(3)] + [run(jnp.bfloat16(3.0)) for _ in range(3)]
    assert found == [(jnp.bfloat16, [3.0] * 3)] * 6


def test_reset_forgets_what_was_seen():
    x = leaf(0.5, 2.0)
    passes(x, times=1)
    with jhop.compiled_autograd.enable():
        assert passes(x, times=1) == [0]
        jhop.compiled_autograd.reset()
        assert passes(x, times=1) == [0]
        assert passes(x, times=1)[0] >= 1
