"""Parts a, b and g: programs that are compiled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
from _models import MODELS, by_hand, check_alike, mlp, mlp_inputs, no_hook
from _timing import Row, clear_caches, interleaved, row

import jhop

STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "custom_vjp": (by_hand, jax.jit),
    "custom_vjp again": (by_hand, jax.jit),
    "jhop.hook, jax.jit": (jhop.hook, jax.jit),
    "jhop.hook, jhop.jit": (jhop.hook, jhop.jit),
    "no hooks": (no_hook, jax.jit),
}


def make_step(hook: Callable[..., Any], compiler: Callable[..., Any]) -> Callable[..., Any]:
    return compiler(mlp(hook))


def compiled_step(quick: bool) -> list[Row]:
    """(a) A compiled step with hooks against the same step with hand-written custom_vjp."""
    inputs = mlp_inputs()
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
    ]


def first_call(quick: bool) -> list[Row]:
    """(b) Capture and compilation: new function objects each time, every cache cleared."""
    inputs, ours = mlp_inputs(), "jhop.hook, jhop.jit"

    def call_twice(how: Any) -> Any:
        step = make_step(*how)
        step(*inputs)
        return step(*inputs)

    runs = {name: lambda how=how: make_step(*how)(*inputs) for name, how in STEPS.items() if name != "custom_vjp again"}
    runs |= {f"{name}, twice": lambda name=name: call_twice(STEPS[name]) for name in ("custom_vjp", ours)}
    samples = interleaved(runs, rounds=3 if quick else 15, warm_up=0, prepare=clear_caches)
    return [
        row(f"first call, {ours} / no hooks", samples, ours, "no hooks", (0.0, 2.0), unit="ms"),
        row(f"first call, {ours} / custom_vjp", samples, ours, "custom_vjp", (0.0, 1.5), unit="ms"),
        row("first call, jhop.hook, jax.jit / custom_vjp", samples, "jhop.hook, jax.jit", "custom_vjp", (0.0, 1.5),
            unit="ms"),
        row(f"first two calls, {ours} / custom_vjp", samples, f"{ours}, twice", "custom_vjp, twice", (0.0, 1.5),
            unit="ms"),
    ]  # fmt: skip


# -- g: the text of compiled programs ----------------------------------------------------------------------------------


def programs(quick: bool) -> list[Row]:
    """(g) XLA's optimized programs, instruction for instruction."""
    rows = []
    for what, (make, make_inputs) in MODELS.items():
        inputs = make_inputs()
        lowered = {
            "custom_vjp": jax.jit(make(by_hand)).lower(*inputs),
            "no hooks": jax.jit(make(no_hook)).lower(*inputs),
            "jhop.hook, jax.jit": jax.jit(make(jhop.hook)).lower(*inputs),
            "jhop.hook, jhop.jit": jhop.jit(make(jhop.hook)).lower(*inputs),
            "jhop.hook, jhop.inline": lower_inlined(make(jhop.hook), inputs),
        }
        flat = jax.tree.leaves(inputs)
        compiled = {name: program.compile() for name, program in lowered.items()}
        outs = {name: program(*(flat if name.endswith("inline") else inputs)) for name, program in compiled.items()}
        check_alike(outs)
        texts = {name: instructions(program.as_text()) for name, program in compiled.items()}
        hand = texts.pop("custom_vjp")
        del texts["no hooks"]
        rows += [
            Row(
                f"optimized HLO, {what}, {name} / custom_vjp", len(ours), len(hand), "instr", (1.0, 1.0),
                note="text identical" if ours == hand else f"{count_differing(ours, hand)} differ",
            )
            for name, ours in texts.items()
        ]  # fmt: skip
    return rows


def lower_inlined(fn: Callable[..., Any], inputs: Any) -> Any:
    """The graph that `jhop.inline` makes, as a function of flat inputs."""
    return jax.jit(jhop.inline(jhop.jit(fn).graph(*inputs))).lower(*jax.tree.leaves(inputs))


def instructions(text: str) -> list[str]:
    """The instructions of an optimized program, without metadata, every name replaced by its number."""
    numbers: dict[str, str] = {}

    def number(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f"%{len(numbers)}")

    lines = []
    for line in text.splitlines():
        if " = " in line and line.startswith(" "):
            line = re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', "", line)
            lines.append(re.sub(r"%[\w.\-]+", number, line.strip()))
    return lines


def count_differing(ours: list[str], hand: list[str]) -> int:
    """How many instructions one program has that the other has not, in its place."""
    blocks = difflib.SequenceMatcher(None, ours, hand, autojunk=False).get_matching_blocks()
    return max(len(ours), len(hand)) - sum(block.size for block in blocks)
