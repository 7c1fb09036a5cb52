"""What hooks cost, as ratios taken in one run: `python benchmarks/hooks.py [--quick] [--only a,c] [--json FILE]`.

  a  compiled steps          c  eager operations     e  a hook by itself       g  text of optimized programs
  b  the first call          d  dispatch             f  trace and lower        h  growth with the number of hooks
  i  Python state in hooks, and hooks on the host          j  the tape under compiled autograd

Method. The contestants of one table are timed in rounds, A B C, B C A, ..., a batch of calls each, so that drift of the
machine hits all of them alike. A contestant's time is the smallest of the medians of five stretches of its rounds (one
quiet stretch is enough); `ratio` is ours over the peer's by that number. The bracket is the middle half of the ratios
within rounds: where it is wide the machine was busy, and the ratio says little. A peer that is a time ("/ 5 us") is a
bound, which a busy machine may miss. What one thread does alone (tracing, lowering, inlining) is timed by that thread's
clock. Part h takes the quickest of a few runs per size and states the slope of log time over log size.

Parts c and j compare with PyTorch where it is installed, on one thread; give XLA one, too, with
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" and `taskset -c N`. In part j the warm-up
has seen the structures of the tape, but for the rows that say "first sight", whose hook is another at each pass.

Targets are bounds for the ratio. Those of (a) and (g) are exact claims (a hook costs nothing once it is compiled); the
others keep a regression from passing unseen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from _compiled import compiled_step, first_call, programs
from _dispatch import dispatch
from _eager import eager_chain, hook_alone
from _growth import growth
from _stateful import stateful
from _tape import tape
from _timing import table
from _tracing import trace_and_lower

import jhop

BENCHMARKS = {
    "a": compiled_step, "b": first_call, "c": eager_chain, "d": dispatch, "e": hook_alone, "f": trace_and_lower,
    "g": programs, "h": growth, "i": stateful, "j": tape,
}  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jax": jax.__version__, "jhop": jhop.__version__}
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return {**found, "devices": ", ".join(d.device_kind for d in jax.devices()), "cpus": str(os.cpu_count())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller graphs: noisier")
    parser.add_argument("--only", default=",".join(BENCHMARKS), metavar="a,c", help="which parts to run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    parts = args.only.split(",")
    unknown = set(parts) - set(BENCHMARKS)
    if unknown:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    print("; ".join(f"{name} {value}" for name, value in versions().items()), flush=True)
    rows = []
    for part in parts:
        found = BENCHMARKS[part](args.quick)
        print(f"\n{BENCHMARKS[part].__doc__}\n{table(found)}", flush=True)
        rows += found
    if args.json:
        records = [{**dataclasses.asdict(item), "ratio": item.ratio, "met": item.met} for item in rows]
        report = {"versions": versions(), "quick": args.quick, "rows": records}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
