"""Threads that run hooks with Python state at once: each with its own, and with one in common."""

import sys
import threading
from types import SimpleNamespace as Box

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jhop

X = np.array([1.0, 2.0, 3.0], np.float32)


def gradient(hook):
    return jax.grad(lambda x: (jhop.hook(x, hook) ** 2).sum())


@pytest.fixture
def at_once():
    """Runs `work(i)` in `n` threads that take turns as often as can be; returns what they returned."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def run(work, n=8):
        found, start = [None] * n, threading.Barrier(n)

        def one(i):
            try:
                start.wait(60)
                found[i] = work(i)
            except Exception as error:
                found[i] = error

        threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    yield run
    sys.setswitchinterval(interval)


def test_state_of_their_own(at_once):
    def work(start):
        box = Box(n=start, sum=jnp.zeros(3))

        def hook(ct):
            box.n += 1
            box.sum = box.sum + ct
            return ct * (2.0 if box.n % 5 else 3.0)

        fn, wrong = jhop.jit(gradient(hook), fullgraph=True), []
        for i in range(20):
            factor = 2.0 if (start + i + 1) % 5 else 3.0
            if fn(X).tolist() != (2.0 * X * factor).tolist():
                wrong.append(i)
        return wrong, box.n - start, box.sum.tolist()

    assert at_once(work) == [([], 20, (40 * X).tolist())] * 8


def test_counter_in_common(at_once):
    """No step is lost, and none sees a number that another thread's trace has lifted."""
    shared = Box(n=0, k=2.0, log=[])

    def work(i):
        own = Box(n=0)

        def hook(ct):
            own.n += 1
            shared.n += 1
            shared.log.append(i)
            return ct * (shared.k if own.n % 7 else shared.k + own.n)

        fn, wrong = jhop.jit(gradient(hook), fullgraph=True), []
        for step in range(1, 21):
            want = 2.0 if step % 7 else 2.0 + step
            if fn(X).tolist() != (2 * X * want).tolist():
                wrong.append(step)
            if step % 10 == 0:
                fn.reset()  # and so traces while others run
        return wrong

    assert at_once(work) == [[]] * 8
    assert shared.n == 160 and sorted(shared.log) == sorted(list(range(8)) * 20)


def test_one_function_in_common(at_once):
    box = Box(n=0, seen=jnp.zeros(()))

    def hook(ct):
        box.n += 1
        box.seen = box.seen + ct.sum()
        return ct * 3.0

    fn = jhop.jit(gradient(hook), fullgraph=True)
    xs = [X + i for i in range(8)]
    found = at_once(lambda i: [fn(xs[i]).tolist() for _ in range(10)])
    assert found == [[(6 * x).tolist()] * 10 for x in xs]
    assert box.n == 80 and float(box.seen) == sum(20 * float(x.sum()) for x in xs)


def test_errors_of_some_leave_the_others_alone(at_once):
    shared = Box(n=0)

    def work(i):
        def hook(ct):
            shared.n += 1
            if i % 2:
                raise ValueError("no")
            return ct * 3.0

        fn, refused = jhop.jit(gradient(hook), fullgraph=True), 0
        for _ in range(5):
            try:
                assert fn(X).tolist() == (6 * X).tolist()
            except jhop.Unsupported:
                refused += 1
        return refused

    assert at_once(work) == [0, 5] * 4
    assert (type(shared.n), shared.n) == (int, 20)


def test_threads_that_look_on_while_another_traces(at_once):
    """While one thread traces, the others see numbers and not symbols."""
    config = Box(k=2.0)

    def work(i):
        if i == 0:
            return {type(config.k) for _ in range(200_000)}
        fn = jhop.jit(gradient(lambda ct: ct * config.k), fullgraph=True)
        for _ in range(10):
            fn(X)
            fn.reset()
        return {float}

    assert at_once(work) == [{float}] * 8
