"""The timing kit: contestants in turn, quiet medians, rows with targets, growth exponents, and the table."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import jhop

Samples = dict[str, list[float]]
STRETCHES = 5
_DIGITS = {"instr": 0, "exp": 3}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: times in `unit`, counts (`instr`) or growth exponents (`exp`)."""

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


def clear_caches() -> None:
    """Every cache of JAX's and jhop's, and what only they kept alive."""
    jax.clear_caches()
    jhop.reset()
    gc.collect()


def in_turn(names: list[str], rounds: int) -> list[str]:
    """A B C, B C A, ...: who runs when."""
    return [name for i in range(rounds) for name in names[i % len(names) :] + names[: i % len(names)]]


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    calls: int = 1,
    warm_up: int = 3,
    prepare: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds per call, one sample per contestant and round.

    Args:
        contestants: each returns what has to be waited for; anything without arrays is not waited for.
        prepare: runs before every sample, outside the time.
        clock: `time.thread_time` for what this thread does alone, such as tracing: a busy machine spoils it less.
    """
    for run in contestants.values():
        for _ in range(warm_up):
            jax.block_until_ready(run())
    gc.collect()
    samples: Samples = {name: [] for name in contestants}
    for name in in_turn(list(contestants), rounds):
        run = contestants[name]
        if prepare is not None:
            prepare()
        before = clock()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        samples[name].append((clock() - before) / calls)
    return samples


def quiet_median(samples: list[float]) -> float:
    """The smallest of the medians of consecutive stretches."""
    size = max(1, len(samples) // STRETCHES)
    return min(statistics.median(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size))


def middle_half(samples: Samples, ours: str, peer: str) -> tuple[float, float]:
    """The middle half of the ratios within rounds."""
    ratios = sorted(a / b for a, b in zip(samples[ours], samples[peer], strict=True))
    return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


def row(
    what: str, samples: Samples, ours: str, peer: str, target: tuple[float, float], *, unit: str = "us", ops: int = 1
) -> Row:
    """Compares two contestants. `ops`: how many operations one call stands for."""
    scale = {"us": 1e6, "ms": 1e3}[unit] / ops
    times = quiet_median(samples[ours]) * scale, quiet_median(samples[peer]) * scale
    return Row(what, *times, unit, target, middle_half(samples, ours, peer))


def bounded(what: str, samples: Samples, ours: str, seconds: float, *, ops: int = 1) -> Row:
    """Compares a contestant with a bound in seconds per operation."""
    text = f"{seconds * 1e6:g} us"
    limit = {ours: samples[ours], text: [seconds * ops] * len(samples[ours])}
    return row(f"{what} / {text}", limit, ours, text, (0.0, 1.0), ops=ops)


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log time over log size by least squares: 1 is linear, 2 is quadratic."""
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in times]).slope


def target_text(target: tuple[float, float]) -> str:
    low, high = target
    if low == high:
        return f"= {low:g}"
    if high == math.inf:
        return "-"
    return f"<= {high:g}" if low == 0.0 else f"{(low + high) / 2:.2f} +- {(high - low) / 2:.2f}"


def table(rows: list[Row]) -> str:
    width = max([60, *(len(item.what) for item in rows)])
    lines = [f"{'what':{width}} {'ours':>14} {'peer':>14} {'ratio':>7} {'[middle half]':>16}  target"]
    for item in rows:
        digits = _DIGITS.get(item.unit, 2)
        times = [f"{value:.{digits}f} {item.unit:<5}" for value in (item.ours, item.peer)]
        middle = f"[{item.middle[0]:.2f}, {item.middle[1]:.2f}]" if item.middle else item.note
        end = target_text(item.target) + ("" if item.met else "  MISSED")
        lines.append(f"{item.what:{width}} {times[0]:>14} {times[1]:>14} {item.ratio:7.2f} {middle:>16}  {end}")
    return "\n".join(lines)
