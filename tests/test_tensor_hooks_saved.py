"""How arrays are kept for the backward: `jhop.autograd.saved_tensors_hooks`."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import MODES, Mode, each_mode, leaf, scalar

import jhop
import jhop.numpy as hnp
from jhop.autograd import saved_tensors_hooks

EAGER, CAPTURED = Mode("eager"), Mode("captured")
both = pytest.mark.parametrize("mode", [EAGER, CAPTURED], ids=lambda mode: mode.name)


class Log:
    """Packs arrays by number, and notes each call."""

    def __init__(self, factor=1.0):
        self.calls = []
        self.store = []
        self._factor = factor

    def pack(self, array):
        assert isinstance(array, jax.Array)
        self.calls.append("pack")
        self.store.append(np.array(array))  # a copy: on CPU, `asarray` would hold the array
        return f"file {len(self.store) - 1}"

    def unpack(self, name):
        self.calls.append("unpack")
        return jnp.asarray(self.store[int(name.split()[1])] * np.float32(self._factor))

    def hooks(self):
        return saved_tensors_hooks(self.pack, self.unpack)


@both
def test_each_argument_is_packed_when_recorded_and_unpacked_in_the_backward(mode):
    log = Log()
    x = scalar(3.0)
    with log.hooks():
        y = x * x
        assert log.calls == ["pack", "pack"]
    mode.backward(y * 5.0)
    assert (log.calls, float(x.grad)) == (["pack", "pack", "unpack", "unpack"], 30.0)


@each_mode
def test_the_backward_computes_with_what_unpack_returns(mode):
    log = Log(factor=10.0)
    x, w = leaf(1.0, 2.0), leaf(3.0, 5.0)
    with log.hooks():
        y = mode.compile(lambda x, w: x * w)(x, w)
    mode.backward(y.sum())
    assert (x.grad.tolist(), w.grad.tolist()) == ([30.0, 50.0], [10.0, 20.0])


@each_mode
def test_unpack_runs_once_in_each_backward(mode):
    log = Log()
    x = scalar(3.0)
    with log.hooks():
        y = mode.compile(lambda x: hnp.sin(x) * x)(x)
    n = log.calls.count("pack")
    compiled = "compiled" in mode.name
    assert n >= 1 and (compiled or n == 3)
    before = len(log.calls)
    for count in (1, 2):
        mode.backward(y, retain_graph=True)
        runs = log.calls[before:]
        assert set(runs) == {"unpack"}
        per_pass = len(runs) // count
        assert len(runs) == count * per_pass and (compiled or per_pass == 3)
    np.testing.assert_allclose(float(x.grad), 2 * (np.cos(3.0) * 3.0 + np.sin(3.0)), rtol=1e-5)


def test_a_freed_graph_is_told_before_anything_is_unpacked():
    log = Log()
    x = scalar(3.0)
    with log.hooks():
        y = x * x
        z = y * y
    y.backward()
    log.calls.clear()
    with pytest.raises(jhop.JhopError, match="its saved arrays were freed"):
        z.backward()
    assert log.calls == []


def test_nodes_that_do_not_run_are_not_unpacked():
    log = Log()
    x, w = scalar(3.0), scalar(2.0)
    with log.hooks():
        side = w * w
        y = x * 5.0 + side
    log.calls.clear()
    (found,) = jhop.autograd.grad(y, x)
    assert float(found) == 5.0
    assert log.calls == ["unpack"] * 3  # of `x * 5.0`, and both of the sum


def test_finding_out_what_an_output_depends_on_unpacks_nothing():
    log = Log()
    x = scalar(3.0)
    with log.hooks():
        _, b = jhop.lift(lambda x: (x * 2.0, x * x))(x)
    b.backward()
    assert (log.calls, float(x.grad)) == (["pack", "unpack"], 6.0)


@both
def test_the_innermost_block_counts(mode):
    outer, inner = Log(factor=100.0), Log(factor=10.0)
    x = scalar(3.0)
    with outer.hooks():
        a = x * x
        with inner.hooks():
            b = x * x
        c = x * x
    d = x * x
    assert (outer.calls, inner.calls) == (["pack"] * 4, ["pack"] * 2)
    mode.backward(a + b + c + d)
    assert float(x.grad) == 600.0 + 60.0 + 600.0 + 6.0


def test_the_block_ends_also_with_an_error():
    log = Log()
    with pytest.raises(ZeroDivisionError), log.hooks():
        raise ZeroDivisionError
    _ = scalar(3.0) * scalar(4.0)
    assert log.calls == []


def test_nothing_is_packed_without_a_graph():
    log = Log()
    with log.hooks():
        _ = jhop.tensor(3.0) * 4.0
        with jhop.autograd.no_grad():
            _ = scalar(3.0) * 4.0
    assert log.calls == []


def test_other_threads_keep_arrays_as_they_are():
    log = Log()
    made = []
    with log.hooks():
        thread = threading.Thread(target=lambda: made.append(scalar(3.0) * 4.0))
        thread.start()
        thread.join()
    assert made and log.calls == []


@each_mode
def test_cast(mode):
    x = leaf(1.0, 3.0, 5.0)
    with saved_tensors_hooks(lambda a: a.astype(jnp.bfloat16), lambda a: a.astype(jnp.float32)):
        y = mode.compile(lambda x: (x * x).sum())(x + 0.0009765625)  # what bfloat16 does not hold
    mode.backward(y)
    assert x.grad.tolist() == [2.0, 6.0, 10.0]


@each_mode
def test_offload(mode):
    def to_host(array):
        return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))

    def to_device(array):
        return jax.device_put(array, array.sharding.with_memory_kind("device"))

    kinds = []
    x = leaf(1.0, 3.0)
    with saved_tensors_hooks(lambda a: kinds.append(to_host(a).sharding.memory_kind) or to_host(a), to_device):
        y = mode.compile(lambda x: hnp.sin(x) * x)(x)
    mode.backward(y.sum())
    np.testing.assert_allclose(x.grad, np.cos(x.value) * x.value + np.sin(x.value), rtol=1e-5)
    assert set(kinds) == {"pinned_host"}


@pytest.mark.parametrize("mode", MODES[:2], ids=lambda mode: mode.name)
def test_what_is_packed_is_let_go(mode):
    log = Log()
    x = leaf(1.0, 2.0)
    y = x * 2.0
    gone = weakref.ref(y.value)
    with log.hooks():
        z = mode.compile(lambda y: y * y)(y)
    del y
    gc.collect()
    assert gone() is None
    z.sum().backward()
    assert x.grad.tolist() == [8.0, 16.0]


@each_mode
def test_recorded_passes(mode):
    log = Log(factor=2.0)
    x = scalar(3.0)
    with log.hooks():
        y = mode.compile(lambda x: x * x * x)(x)
    (first,) = mode.grad(y, x, create_graph=True)
    (second,) = mode.grad(first, x)
    plain = scalar(6.0)  # to the eye of the backward, x is 6
    (expected,) = jhop.autograd.grad(plain * plain * plain, plain, create_graph=True)
    if "compiled" in mode.name:
        assert float(first) == float(expected)
        assert float(second) == 6.0 * 6.0
    else:  # x * x is kept as well, as 18
        assert float(first) == 18.0 + 2 * (6.0 * 6.0)
    assert log.calls.count("pack") >= 1


@both
def test_numbers_are_kept_as_they_are(mode):
    log = Log()
    x = scalar(3.0)
    with log.hooks():
        y = x * 2.5
    assert log.calls == ["pack"]
    mode.backward(y)
    assert float(x.grad) == 2.5


def test_unpack_may_return_a_tensor_or_a_numpy_array():
    for make in (jhop.tensor, np.asarray):
        x = scalar(3.0)
        with saved_tensors_hooks(lambda a: a, lambda a, make=make: make(a)):
            y = x * x
        y.backward()
        assert float(x.grad) == 6.0


def test_pack_may_use_tensors():
    kept = []
    x = scalar(3.0)

    def pack(array):
        kept.append(x * 2.0)  # recorded, and not packed
        return array

    with saved_tensors_hooks(pack, lambda a: a):
        y = x * x
    y.backward()
    assert (len(kept), float(x.grad)) == (2, 6.0)


def test_captures_are_used_again():
    CAPTURED.graphs.clear()
    for value in (2.0, 3.0):
        log = Log(factor=5.0)
        x = scalar(value)
        with log.hooks():
            y = x * x
        CAPTURED.backward(y)
        assert float(x.grad) == value * 10.0
    assert len(CAPTURED.graphs) == 1


# Errors.


@both
@pytest.mark.parametrize(
    ("unpack", "message"),
    [
        (lambda a: None, r"an array of shape \(2,\) and dtype float32, as was packed, but returned NoneType"),
        (lambda a: a[:1], r"returned shape \(1,\)"),
        (lambda a: a.astype(jnp.bfloat16), "dtype bfloat16"),
        (lambda a: 3.0, "returned float"),
    ],
)
def test_unpack_must_give_back_what_was_packed(mode, unpack, message):
    x = leaf(1.0, 2.0)
    with saved_tensors_hooks(lambda a: a, unpack):
        y = (x * x).sum()
    with pytest.raises(jhop.HookError, match=message):
        mode.backward(y)
    assert x.grad is None


@pytest.mark.parametrize(("pack", "unpack", "name"), [(3, print, "pack"), (print, None, "unpack")])
def test_hooks_must_be_callable(pack, unpack, name):
    with pytest.raises(jhop.HookError, match=f"expected {name} as a function"), saved_tensors_hooks(pack, unpack):
        pass


def test_an_error_in_pack_comes_out():
    x = scalar(3.0)
    with pytest.raises(ZeroDivisionError), saved_tensors_hooks(lambda a: 1 / 0, lambda a: a):
        x * x


def test_not_inside_a_compiled_function():
    @jhop.compile
    def fn(x):
        with saved_tensors_hooks(lambda a: a, lambda a: a):
            return x * x

    with pytest.raises(jhop.JhopError, match="Call the function inside the block"):
        fn(scalar(3.0))


# Live, against PyTorch.


@both
def test_against_torch(mode):
    torch = pytest.importorskip("torch")

    def run(make, hooks, backward, number):
        calls = []

        def pack(value):
            calls.append("pack")
            return value * 3.0

        def unpack(value):
            calls.append("unpack")
            return value / 2.0

        x, w = make([1.5, -2.0]), make([0.5, 4.0])
        with hooks(pack, unpack):
            y = x * w
            z = y * y
        for _ in range(2):
            backward(z.sum())
        return calls, [[number(v) for v in t.grad] for t in (x, w)]

    theirs = run(
        lambda v: torch.tensor(v, requires_grad=True), torch.autograd.graph.saved_tensors_hooks,
        lambda t: t.backward(retain_graph=True), float,
    )  # fmt: skip
    ours = run(lambda v: leaf(*v), saved_tensors_hooks, lambda t: mode.backward(t, retain_graph=True), float)
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], rtol=2e-4)
