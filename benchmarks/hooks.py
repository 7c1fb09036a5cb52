"""What hooks cost, as ratios taken in one run: `python benchmarks/hooks.py [--quick] [--only a,c] [--json FILE]`.

Method. The contestants of one table are timed in rounds, A B C, B C A, ..., a batch of calls each, so that drift of the
machine hits all of them alike. A contestant's time is the smallest of the medians of five stretches of its rounds (one
quiet stretch is enough); `ratio` is ours over the peer's by that number. The bracket is the middle half of the ratios
within rounds: where it is wide the machine was busy, and the ratio says little.

Targets are bounds for the ratio. Those of (a) are exact claims (a hook costs nothing once it is compiled); the others
keep a regression from passing unseen.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import jhop

Samples = dict[str, list[float]]
STRETCHES = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: times in `unit`, or counts."""

    what: str
    ours: float
    peer: float
    unit: str
    target: tuple[float, float]
    middle: tuple[float, float] | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    @property
    def met(self) -> bool:
        return self.target[0] <= self.ratio <= self.target[1]


# -- timing ------------------------------------------------------------------------------------------------------------


def interleaved(contestants: dict[str, Callable[[], Any]], *, rounds: int, calls: int) -> Samples:
    """Seconds per call, one sample per contestant and round. A contestant returns what has to be waited for."""
    for run in contestants.values():
        for _ in range(3):
            jax.block_until_ready(run())
    gc.collect()
    names = list(contestants)
    samples: Samples = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            run = contestants[name]
            before = time.perf_counter()
            for _ in range(calls):
                out = run()
            jax.block_until_ready(out)
            samples[name].append((time.perf_counter() - before) / calls)
    return samples


def quiet_median(samples: list[float]) -> float:
    """The smallest of the medians of consecutive stretches."""
    size = max(1, len(samples) // STRETCHES)
    return min(statistics.median(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size))


def row(
    what: str, samples: Samples, ours: str, peer: str, target: tuple[float, float], *, unit: str = "us", ops: int = 1
) -> Row:
    """Compares two contestants. `ops`: how many operations one call stands for."""
    scale = {"us": 1e6, "ms": 1e3}[unit] / ops
    ratios = sorted(a / b for a, b in zip(samples[ours], samples[peer], strict=True))
    middle = (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])
    return Row(what, quiet_median(samples[ours]) * scale, quiet_median(samples[peer]) * scale, unit, target, middle)


# -- the training step of (a) and (b) ----------------------------------------------------------------------------------

LAYERS, WIDTH, BATCH = 4, 256, 128


def clip_by_norm(ct: jax.Array) -> jax.Array:
    return ct * jnp.minimum(1.0, 0.01 / (jnp.sqrt(jnp.sum(ct * ct)) + 1e-6))


def halve(ct: jax.Array) -> jax.Array:
    return ct * 0.5


def by_hand(x: jax.Array, rule: Callable[..., Any]) -> jax.Array:
    """What `jhop.hook` replaces."""
    point = jax.custom_vjp(lambda x: x)
    point.defvjp(lambda x: (x, None), lambda _, ct: (rule(ct),))
    return point(x)


def no_hook(x: jax.Array, rule: Callable[..., Any]) -> jax.Array:
    return x


def make_step(hook: Callable[..., Any], compiler: Callable[..., Any]) -> Callable[..., Any]:
    """One step of gradient descent: a clip on each parameter, a scale on each activation."""

    def step(layers: Any, x: jax.Array) -> Any:
        def loss(layers: Any) -> jax.Array:
            h = x
            for weight, bias in layers:
                h = hook(jnp.tanh(h @ hook(weight, clip_by_norm) + hook(bias, clip_by_norm)), halve)
            return jnp.mean(h * h)

        return jax.tree.map(lambda p, g: p - 0.1 * g, layers, jax.grad(loss)(layers))

    return compiler(step)


def step_inputs() -> tuple[Any, jax.Array]:
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    layers = [(jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, jnp.zeros(WIDTH)) for key in keys[1:]]
    return layers, jax.random.normal(keys[0], (BATCH, WIDTH))


STEPS = {
    "custom_vjp": (by_hand, jax.jit),
    "custom_vjp again": (by_hand, jax.jit),
    "jhop.hook, jax.jit": (jhop.hook, jax.jit),
    "jhop.hook, jhop.jit": (jhop.hook, jhop.jit),
    "no hooks": (no_hook, jax.jit),
}


# -- a: steps that are compiled ----------------------------------------------------------------------------------------


def compiled_step(quick: bool) -> list[Row]:
    """(a) A compiled step with hooks against the same step with hand-written custom_vjp."""
    inputs = step_inputs()
    steps = {name: make_step(*how) for name, how in STEPS.items()}
    check_alike({name: step(*inputs) for name, step in steps.items()})
    del steps["no hooks"]
    runs = {name: lambda step=step: step(*inputs) for name, step in steps.items()}
    samples = interleaved(runs, rounds=20 if quick else 300, calls=5)
    same = (0.95, 1.05)
    return [
        row("compiled step, custom_vjp / itself (noise)", samples, "custom_vjp again", "custom_vjp", same, unit="ms"),
        *(
            row(f"compiled step, {name} / custom_vjp", samples, name, "custom_vjp", same, unit="ms")
            for name in ("jhop.hook, jax.jit", "jhop.hook, jhop.jit")
        ),
        *compiled_size(inputs),
    ]


def check_alike(results: dict[str, Any]) -> None:
    """A benchmark of hooks that do not run would be fast: every contestant must give what `custom_vjp` gives."""
    expected = jax.tree.leaves(results["custom_vjp"])
    for name, result in results.items():
        same = all(map(jnp.allclose, jax.tree.leaves(result), expected))
        if same is (name == "no hooks"):
            raise AssertionError(f"{name}: the new parameters {'are' if same else 'are not'} those of custom_vjp")


def compiled_size(inputs: Any) -> list[Row]:
    """(a) How many instructions XLA's optimized program has."""
    flat = jax.tree.leaves(inputs)
    inlined = jhop.inline(make_step(jhop.hook, jhop.jit).graph(*inputs))
    hand = instructions(make_step(by_hand, jax.jit).lower(*inputs))
    programs = {
        "jhop.hook, jax.jit": instructions(make_step(jhop.hook, jax.jit).lower(*inputs)),
        "jhop.hook, jhop.jit": instructions(jax.jit(inlined).lower(*flat)),
    }
    return [
        Row(
            f"optimized HLO, {name} / custom_vjp", len(ours), len(hand), "instr", (1.0, 1.0),
            note="text identical" if ours == hand else "text differs",
        )
        for name, ours in programs.items()
    ]  # fmt: skip


def instructions(lowered: Any) -> list[str]:
    """The instructions of an optimized program, without metadata, every name replaced by its number."""
    numbers: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"%{len(numbers)}")

    lines = []
    for line in lowered.compile().as_text().splitlines():
        if " = " in line and line.startswith(" "):
            line = re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', "", line)
            lines.append(re.sub(r"%[\w.\-]+", number, line.strip()))
    return lines


# -- b: the first call -------------------------------------------------------------------------------------------------


def first_call(quick: bool) -> list[Row]:
    """(b) Capture and compilation: new function objects each time, every cache cleared."""
    inputs = step_inputs()
    names = [name for name in STEPS if name != "custom_vjp again"]
    samples: Samples = {name: [] for name in names}
    for i in range(3 if quick else 15):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            jax.clear_caches()
            jhop.reset()
            gc.collect()
            before = time.perf_counter()
            jax.block_until_ready(make_step(*STEPS[name])(*inputs))
            samples[name].append(time.perf_counter() - before)
    ours = "jhop.hook, jhop.jit"
    return [
        row(f"first call, {ours} / no hooks", samples, ours, "no hooks", (0.0, 2.0), unit="ms"),
        row(f"first call, {ours} / custom_vjp", samples, ours, "custom_vjp", (0.0, 1.5), unit="ms"),
        row("first call, jhop.hook, jax.jit / custom_vjp", samples, "jhop.hook, jax.jit", "custom_vjp", (0.0, 1.5),
            unit="ms"),
    ]  # fmt: skip


# -- c: operation by operation -----------------------------------------------------------------------------------------

OPS = 50


def chain(x: Any, tanh: Callable[..., Any], on_value: Callable[..., Any] | None = None) -> Any:
    """50 operations, tanh and multiply in turn; `on_value` hooks 25 of them."""
    for _ in range(OPS // 2):
        x = tanh(x) * 0.99
        if on_value is not None:
            x = on_value(x)
    return x


def registered(x: Any) -> Any:
    x.register_hook(halve)
    return x


def tensor_chain() -> dict[str, Callable[[], Any]]:
    """The chain on jhop's tape."""
    x = jhop.tensor(jnp.ones((8, 8)), requires_grad=True)
    seed = jnp.ones((8, 8))

    def both(on_value: Any = None) -> Any:
        x.grad = None
        chain(x, jhop.numpy.tanh, on_value).backward(seed)
        return x.grad

    return {
        "jhop forward": lambda: chain(x, jhop.numpy.tanh).value,
        "jhop both": both,
        "jhop both, hooks": lambda: both(registered),
    }


def jnp_chain() -> dict[str, Callable[[], Any]]:
    """The chain on JAX's arrays, operation by operation."""
    x, seed = jnp.ones((8, 8)), jnp.ones((8, 8))

    def both(on_value: Any = None) -> Any:
        _, pull = jax.vjp(lambda x: chain(x, jnp.tanh, on_value), x)
        return pull(seed)

    return {
        "jnp forward": lambda: chain(x, jnp.tanh),
        "jnp both": both,
        "jnp both, hooks": lambda: both(lambda x: by_hand(x, halve)),
    }


def torch_chain() -> dict[str, Callable[[], Any]]:
    """The chain in PyTorch on one thread, where it is installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    torch.set_num_threads(1)
    x = torch.ones((8, 8), requires_grad=True)
    seed = torch.ones((8, 8))

    def both(on_value: Any = None) -> None:
        x.grad = None
        chain(x, torch.tanh, on_value).backward(seed)

    def forward() -> None:
        chain(x, torch.tanh)

    return {"torch forward": forward, "torch both": both, "torch both, hooks": lambda: both(registered)}


def eager_chain(quick: bool) -> list[Row]:
    """(c) 50 operations on 8x8 values without compilation, per operation."""
    runs = {**tensor_chain(), **jnp_chain(), **torch_chain()}
    samples = interleaved(runs, rounds=10 if quick else 100, calls=2)
    words = {"forward": "forward", "both": "forward + backward", "both, hooks": "forward + backward, 25 hooks"}
    # JAX's own eager derivative traces anew each time; the tape must beat it.
    targets = {"jnp": {"forward": 3.0, "both": 0.5, "both, hooks": 0.5}, "torch": dict.fromkeys(words, 4.0)}
    return [
        row(f"eager op, {text}, jhop.tensor / {peer}", samples, f"jhop {part}", f"{peer} {part}",
            (0.0, targets[peer][part]), ops=OPS)
        for part, text in words.items()
        for peer in targets
        if f"{peer} {part}" in samples
    ]  # fmt: skip


# -- d: dispatch -------------------------------------------------------------------------------------------------------


class Counter:
    """A hook with a Python int."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, ct: jax.Array) -> None:
        self.n += 1


def gradient(hook: Callable[..., Any], fn: Any) -> Callable[..., Any]:
    return jax.grad(lambda x: jnp.sum(hook(x, fn) ** 2))


def dispatch(quick: bool) -> list[Row]:
    """(d) Calling a small compiled gradient, with and without a hook that counts."""
    x = jnp.ones(8)
    counter, called = Counter(), Counter()

    def call_back(ct: jax.Array) -> jax.Array:
        io_callback(lambda: called(ct), None)
        return ct

    steps = {
        "jax.jit": jax.jit(gradient(no_hook, None)),
        "pure": jhop.jit(gradient(jhop.hook, halve)),
        "counter": jhop.jit(gradient(jhop.hook, counter)),
        "io_callback": jax.jit(gradient(by_hand, call_back)),
    }
    calls, rounds = 100, 10 if quick else 60

    def many(step: Callable[..., Any]) -> Any:
        for _ in range(calls):
            out = step(x)
        if step is steps["io_callback"]:
            jax.effects_barrier()
        return out

    samples = interleaved({name: lambda step=step: many(step) for name, step in steps.items()}, rounds=rounds, calls=1)
    expected = calls * (rounds + 3)
    if (counter.n, called.n) != (expected, expected):
        raise AssertionError(f"{expected} calls, but jhop.jit counted {counter.n} and io_callback {called.n}")
    return [
        row("dispatch, jhop.jit, pure hook / jax.jit", samples, "pure", "jax.jit", (0.0, 3.0), ops=calls),
        row("dispatch, jhop.jit, hook counts / jax.jit", samples, "counter", "jax.jit", (0.0, 4.0), ops=calls),
        row("dispatch, jhop.jit, hook counts / io_callback", samples, "counter", "io_callback", (0.0, 0.5), ops=calls),
    ]


# -- report ------------------------------------------------------------------------------------------------------------

BENCHMARKS = {"a": compiled_step, "b": first_call, "c": eager_chain, "d": dispatch}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jax": jax.__version__, "jhop": jhop.__version__}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return {**found, "devices": ", ".join(d.device_kind for d in jax.devices()), "cpus": str(os.cpu_count())}


def target_text(target: tuple[float, float]) -> str:
    low, high = target
    if low == high:
        return f"= {low:g}"
    return f"<= {high:g}" if low == 0.0 else f"{(low + high) / 2:.2f} +- {(high - low) / 2:.2f}"


def table(rows: list[Row]) -> str:
    lines = [f"{'what':60} {'ours':>14} {'peer':>14} {'ratio':>7} {'[middle half]':>16}  target"]
    for item in rows:
        digits = 0 if item.unit == "instr" else 2
        times = [f"{value:.{digits}f} {item.unit:<5}" for value in (item.ours, item.peer)]
        middle = f"[{item.middle[0]:.2f}, {item.middle[1]:.2f}]" if item.middle else item.note
        end = target_text(item.target) + ("" if item.met else "  MISSED")
        lines.append(f"{item.what:60} {times[0]:>14} {times[1]:>14} {item.ratio:7.2f} {middle:>16}  {end}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under half a minute, noisier")
    parser.add_argument("--only", default="a,b,c,d", metavar="a,c", help="which parts to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(BENCHMARKS)
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    rows = [item for part in args.only.split(",") for item in BENCHMARKS[part](args.quick)]
    print("; ".join(f"{name} {value}" for name, value in versions().items()))
    print(table(rows))
    if args.json:
        records = [{**dataclasses.asdict(item), "ratio": item.ratio, "met": item.met} for item in rows]
        report = {"versions": versions(), "quick": args.quick, "rows": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
