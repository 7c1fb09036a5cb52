"""What runs when a backward pass has ended: `jhop.autograd.queue_callback`."""

import threading

import pytest
from tape_modes import leaf, scalar

import jhop
from jhop.autograd import queue_callback


@pytest.fixture
def seen():
    return []


def queueing(fn):
    return lambda *args: queue_callback(fn)


def run_graph_as_it_is():
    return jhop.compiled_autograd.enable(lambda gm: gm)


def run_compiled():
    return jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm))


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_runs_once_after_the_whole_pass(seen, captured):
    x, w = scalar(2.0), scalar(3.0)
    y = x * w
    y.register_hook(lambda g: queue_callback(lambda: seen.append(("end", float(x.grad), float(w.grad)))))
    x.register_hook(lambda g: seen.append("hook"))
    w.register_hook(lambda g: seen.append("hook"))
    if captured:
        with run_graph_as_it_is():
            (y * 5.0).backward()
    else:
        (y * 5.0).backward()
    assert seen == ["hook", "hook", ("end", 15.0, 10.0)]


def test_kinds_of_hooks_and_order(seen):
    x = scalar(2.0)
    y = x * 3.0
    y.grad_fn.register_prehook(queueing(lambda: seen.append("pre")))
    y.grad_fn.register_hook(queueing(lambda: seen.append("post")))
    x.register_post_accumulate_grad_hook(queueing(lambda: seen.append("acc")))
    jhop.autograd.register_multi_grad_hook([x], queueing(lambda: seen.append("multi")))
    y.backward()
    assert seen == ["pre", "post", "multi", "acc"]


def test_a_callback_may_queue_another(seen):
    x = scalar(2.0)

    def first():
        seen.append(1)
        queue_callback(lambda: seen.append(3))

    x.register_hook(lambda g: (queue_callback(first), queue_callback(lambda: seen.append(2)), None)[-1])
    (x * 3.0).backward()
    assert seen == [1, 2, 3]


def test_runs_for_grad_and_recorded_passes(seen):
    x = scalar(2.0)
    x.register_hook(queueing(lambda: seen.append(1)))
    jhop.autograd.grad(x * 3.0, x)
    jhop.autograd.grad(x * x, x, create_graph=True)
    assert seen == [1, 1]


def test_a_pass_inside_a_hook_has_its_own(seen):
    x, w = scalar(2.0), scalar(3.0)
    w.register_hook(queueing(lambda: seen.append("inner")))

    def inner(g):
        queue_callback(lambda: seen.append("outer"))
        with jhop.autograd.enable_grad():
            (w * 5.0).backward()
        seen.append("hook")

    x.register_hook(inner)
    (x * 7.0).backward()
    assert seen == ["inner", "hook", "outer"]


def test_none_runs_where_the_pass_raises(seen):
    x = scalar(2.0)
    x.register_hook(queueing(lambda: seen.append("end")))
    x.register_hook(lambda g: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            (x * 3.0).backward()
    assert (seen, x.grad) == ([], None)
    with pytest.raises(jhop.HookError, match="found none"):  # the pass is over
        queue_callback(print)


def test_an_error_in_a_callback_comes_out_and_gradients_stay(seen):
    x = scalar(2.0)
    x.register_hook(queueing(lambda: 1 / 0))
    x.register_hook(queueing(lambda: seen.append("later")))
    with pytest.raises(ZeroDivisionError):
        (x * 3.0).backward()
    assert (seen, float(x.grad)) == ([], 3.0)


def test_on_the_host_under_compiled_autograd(seen):
    x = leaf(2.0, 3.0)

    def hook(g):
        queue_callback(lambda: seen.append(x.grad.tolist()))
        return g * 10.0

    x.register_hook(hook)
    with run_compiled(), pytest.warns(UserWarning, match="runs on the host at each run"):
        for _ in range(3):
            (x * 3.0).sum().backward()
    assert seen == [[30.0] * 2, [60.0] * 2, [90.0] * 2]


def test_refused_where_the_whole_graph_is_compiled(seen):
    x = leaf(2.0, 3.0)
    x.register_hook(queueing(lambda: seen.append("end")))
    with (
        jhop.compiled_autograd.enable(lambda gm: jhop.compile(gm, fullgraph=True)),
        pytest.raises(jhop.Unsupported, match="queue_callback is called by a hook that is being traced"),
    ):
        (x * 3.0).sum().backward()
    assert (seen, x.grad) == ([], None)


def test_refused_outside_of_a_pass_and_in_other_threads(seen):
    with pytest.raises(jhop.HookError, match="expected a backward pass to be under way in this thread, found none"):
        queue_callback(print)

    def other():
        try:
            queue_callback(print)
        except jhop.HookError as error:
            seen.append(str(error))

    def hook(g):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    x = scalar(2.0)
    x.register_hook(hook)
    (x * 3.0).backward()
    assert len(seen) == 1


def test_it_must_be_a_function():
    with pytest.raises(jhop.HookError, match="expected a function, got int"):
        queue_callback(3)


# Live, against PyTorch.


def test_against_torch():
    torch = pytest.importorskip("torch")

    def run(make, queue):
        calls = []
        x, w = make(2.0), make(3.0)
        y = x * w

        def noting(label):
            def hook(grad):
                calls.append(label)
                queue(lambda: calls.append(f"end of {label}"))

            return hook

        for label, tensor in (("y", y), ("w", w), ("x", x)):
            tensor.register_hook(noting(label))
        (y * 5.0).backward()
        return calls

    theirs = run(
        lambda v: torch.tensor(v, requires_grad=True), torch.autograd.Variable._execution_engine.queue_callback
    )
    assert run(scalar, queue_callback) == theirs
