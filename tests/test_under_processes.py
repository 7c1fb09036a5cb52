"""A hook with a collective over two processes gives what it gives in one."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import two_processes


@pytest.fixture(scope="module")
def results():
    return two_processes.run()


def by_hand():
    x = np.arange(8, dtype=np.float32) / 7 - 0.5
    ct = 2 * np.sin(x)
    total = (ct * ct).reshape(4, 2).sum(0)
    return (ct + np.tile(total, 4)) * np.cos(x)


@pytest.mark.parametrize("way", ["jax.jit", "jhop.jit", "inline"])
def test_two_processes_are_one(way, results):
    several, one = results
    assert [found["processes"] for found in (*several, one)] == [2, 2, 1]
    assert [found["devices"] for found in (*several, one)] == [4, 4, 4]
    assert several[0]["gradients"][way] == several[1]["gradients"][way]
    for found in (*several, one):
        np.testing.assert_allclose(found["gradients"][way], by_hand(), rtol=1e-5)


@pytest.mark.parametrize(
    ("program", "timeout_s", "message"),
    [
        ("raise SystemExit('no second process')", 60, "process 2-1 exited with 1"),
        ("import time; time.sleep(100)", 1, "process 2-. did not end in 1 s"),
    ],
    ids=["failed", "late"],
)
def test_failure_is_reported_and_no_process_is_left(program, timeout_s, message, monkeypatch):
    started = []
    start = two_processes.start

    def without_a_second(rank, count, port, out):
        process = start(rank, count, port, out)
        if rank:  # the first waits for it in vain
            two_processes.stop(process)
            command = [sys.executable, "-c", program]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        started.append(process)
        return process

    monkeypatch.setattr(two_processes, "start", without_a_second)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        two_processes.run(timeout_s)
    assert time.monotonic() - begin < 20
    assert len(started) == 3
    for process in started:
        assert process.returncode is not None
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
