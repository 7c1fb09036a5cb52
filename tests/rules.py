"""What the tests of PyTorch's rules (test_rules_*.py) share: ways to run a program, and hooks that note what they see.

A rule's test runs its program as it is, with `jhop.compile` around the function that registers hooks, and with the
backward pass captured by compiled autograd. A hook that would have to leave the compiled graph is an error there, so
what a test sees was traced, and written back.
"""

from contextlib import nullcontext

import pytest
import tape_modes
from tape_modes import leaf, scalar, times

import jhop

__all__ = ["MODES", "Mode", "each_mode", "leaf", "mark", "note", "only_eager_and_captured", "scalar", "times", "values"]


class Mode(tape_modes.Mode):
    """As there, with options for the compiler.

    Attributes:
        compiled: the backward graphs that were compiled, since `fresh`, hooks inlined.
    """

    def __init__(self, name):
        super().__init__(name)
        self.compiled = []

    def fresh(self):
        self.graphs.clear()
        self.compiled.clear()
        return self

    def compile(self, fn, **options):
        return jhop.compile(fn, **({"backend": self.backend} | options)) if self.name == "compiled" else fn

    def backend(self, gm, example_inputs):
        if gm.made_by == "inline":
            self.compiled.append(gm)
        return jhop.backends.xla(gm, example_inputs)

    def __call__(self, gm):
        self.graphs.append(gm)
        return jhop.compile(gm, backend=self.backend, fullgraph=True)

    def captured(self, compiler_fn=None):
        return jhop.compiled_autograd.enable(compiler_fn or self) if self.name == "captured" else nullcontext()


MODES = [Mode(name) for name in ("eager", "compiled", "captured")]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
only_eager_and_captured = pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=lambda mode: mode.name)


def note(seen, fn=None):
    """A hook that keeps the gradient that it gets in `seen` and returns what `fn` makes of it."""

    def hook(grad):
        seen.append(grad)
        return None if fn is None else fn(grad)

    return hook


def mark(seen, label, fn=None):
    """A hook that keeps `label` in `seen`, to tell the order, and returns what `fn` makes of the gradient."""

    def hook(grad):
        seen.append(label)
        return None if fn is None else fn(grad)

    return hook


def values(seen):
    """What was noted, as Python numbers and lists of them; None stays None."""
    return [None if grad is None else grad.tolist() for grad in seen]
