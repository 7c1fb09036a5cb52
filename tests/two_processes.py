"""One hook with a `psum` over the devices of two processes; run `python tests/two_processes.py`.

Two processes are started on this machine, which find each other through `jax.distributed` on a free port of the
loopback interface. Each has two CPU devices, and all four are one mesh. What each gets must be what one process with
four devices gets. It prints one line of JSON and exits with 0 where the results agree.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROCESSES, DEVICES = 2, 4
TIMEOUT_S = 60  # for everything; a run takes a few seconds
HERE = Path(__file__).resolve()


def gradients() -> dict[str, list[float]]:
    """The gradient of one program, hooks compiled in three ways; in every process the whole of it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jhop

    mesh = jax.make_mesh((DEVICES,), ("a",), axis_types=(AxisType.Auto,))
    whole = np.arange(2 * DEVICES, dtype=np.float32) / 7 - 0.5
    sharding = NamedSharding(mesh, P("a"))
    x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    def body(x):
        y = jhop.hook(jnp.sin(x), lambda ct: ct + jax.lax.psum(ct * ct, "a"))
        return (y**2).sum()[None]

    fn = jax.shard_map(body, mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    grad = jax.grad(lambda x: fn(x).sum())
    everywhere = jax.jit(lambda value: value, out_shardings=NamedSharding(mesh, P()))
    found = {
        "jax.jit": jax.jit(grad)(x),
        "jhop.jit": jhop.jit(grad, fullgraph=True)(x),
        "inline": jax.jit(jhop.inline(jhop.make_fx(grad)(x)))(x),
    }
    return {way: np.asarray(everywhere(value)).tolist() for way, value in found.items()}


def work(rank: int, count: int, port: int) -> None:
    """What one process does; its last line is its result."""
    import jax

    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=count, process_id=rank, initialization_timeout=TIMEOUT_S // 2
        )
    found = {"processes": jax.process_count(), "devices": jax.device_count(), "gradients": gradients()}
    print(json.dumps(found), flush=True)
    if count > 1:
        jax.distributed.shutdown()


def start(rank: int, count: int, port: int, out: Path) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "PYTEST_"))}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count} --xla_cpu_multi_thread_eigen=false"
    env["JAX_PLATFORMS"] = "cpu"
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # a proxy does not reach the loopback interface
        env.pop(name, None)
        env.pop(name.upper(), None)
    command = [sys.executable, str(HERE), "--work", str(rank), str(count), str(port)]
    # To files, as a full pipe would stop a process; in groups of their own, so that none is left over.
    with open(out.with_suffix(".out"), "w") as stdout, open(out.with_suffix(".err"), "w") as stderr:
        return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, start_new_session=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(processes: list[subprocess.Popen], timeout_s: float) -> None:
    """Until all have ended, or one has failed, or the time is over."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.05)


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended just now
            pass
    process.wait()


def run(timeout_s: float = TIMEOUT_S) -> tuple[list[dict], dict]:
    """(results of the two processes, result of one process with as many devices).

    Raises:
        RuntimeError: a process failed or did not end in time; its error output is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        plan = [(rank, PROCESSES) for rank in range(PROCESSES)] + [(0, 1)]
        outs = [Path(folder) / f"{count}-{rank}" for rank, count in plan]
        processes: list[subprocess.Popen] = []
        try:
            for (rank, count), out in zip(plan, outs, strict=True):
                processes.append(start(rank, count, port, out))
            wait(processes, timeout_s)
        finally:
            codes = [process.poll() for process in processes]
            for process in processes:
                stop(process)
        # One that failed by itself comes before those that waited for it.
        for code, out in sorted(zip(codes, outs, strict=True), key=lambda pair: pair[0] is None):
            if code != 0:
                how = f"did not end in {timeout_s} s" if code is None else f"exited with {code}"
                raise RuntimeError(f"process {out.name} {how}:\n{out.with_suffix('.err').read_text()[-3000:]}")
        found = [json.loads(out.with_suffix(".out").read_text().splitlines()[-1]) for out in outs]
    return found[:-1], found[-1]


def main() -> int:
    several, one = run()
    agree = all(found["gradients"] == several[0]["gradients"] for found in several)
    for way, values in one["gradients"].items():
        agree &= all(
            abs(a - b) <= 1e-5 * max(1.0, abs(a)) for a, b in zip(values, several[0]["gradients"][way], strict=True)
        )
    print(json.dumps({"agree": agree, "processes": several[0]["processes"], "gradients": several[0]["gradients"]}))
    return 0 if agree else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*(int(argument) for argument in sys.argv[2:5]))
    else:
        sys.exit(main())
