"""Random programs with hooks, differentiated up to three times: the same numbers and calls as in PyTorch.

The operations are those whose derivative PyTorch computes from their inputs. Where it takes the result (tanh, exp), a
second derivative passes the result's hooks there; in jhop, it always goes to the inputs.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tape_modes import MODES

import jhop
import jhop.numpy as hnp

torch = pytest.importorskip("torch")

HOOKS = {
    "scale": lambda other: lambda g: g * 1.5,
    "square": lambda other: lambda g: g * g + 0.5,
    "clip": lambda other: lambda g: g.clip(-0.7, 0.9),
    "keep": lambda other: lambda g: None,
    "value": lambda other: lambda g: g * other,
}
STEPS = {
    "add": lambda ns, a, b: a + b,
    "sub": lambda ns, a, b: a - b * 0.5,
    "mul": lambda ns, a, b: a * b,
    "sin": lambda ns, a, b: ns.sin(a),
    "cos": lambda ns, a, b: ns.cos(a) * b,
    "square": lambda ns, a, b: a * a * 0.5,
    "mean": lambda ns, a, b: a * b.mean(),
    "first": lambda ns, a, b: a[0] * b,
}


class Program:
    """A random function of two values of shape (3,), with hooks at random places, made before or after later steps."""

    def __init__(self, seed):
        rng = random.Random(seed)
        self.steps = []
        for i in range(rng.randint(3, 7)):
            known = i + 2
            self.steps.append((rng.choice(list(STEPS)), rng.randrange(known), rng.randrange(known)))
        n = len(self.steps) + 2
        places = [rng.randrange(n) for _ in range(rng.randint(1, 4))]
        self.hooks = [(at, rng.choice(list(HOOKS)), rng.randrange(n), rng.random() < 0.5) for at in places]
        self.values = [[rng.uniform(-1.5, 1.5) for _ in range(3)] for _ in range(2)]
        self.grads = rng.choice([[0], [1], [0, 1]])

    def forward(self, ns, leaves, note):
        values = list(leaves)
        self._hook(values, early=True, note=note)
        for step, a, b in self.steps:
            values.append(STEPS[step](ns, values[a], values[b]))
            self._hook(values, early=True, note=note, last=len(values) - 1)
        self._hook(values, early=False, note=note)
        return sum(values[2:], values[1] * values[0])

    def _hook(self, values, early, note, last=None):
        for number, (at, kind, other, soon) in enumerate(self.hooks):
            if soon != early or (early and (at != last if last is not None else at > 1)):
                continue
            hook = HOOKS[kind](values[min(other, at)])

            def noted(g, hook=hook, number=number):
                note(number)
                return hook(g)

            if values[at].requires_grad:
                values[at].register_hook(noted)


def derivatives(program, leaves, forward, grad, total):
    """Gradients of three orders by the chosen leaves."""
    out = total(forward(*leaves))
    by = [leaves[i] for i in program.grads]
    found = []
    for order in range(3):
        if not out.requires_grad:
            break
        grads = grad(out, by, create_graph=order < 2, allow_unused=True)
        found.append([None if g is None else np.asarray(getattr(g, "value", g)).tolist() for g in map(plain, grads)])
        moving = [g for g in grads if g is not None and getattr(g, "requires_grad", False)]
        if not moving:
            break
        out = total(sum(moving[1:], moving[0]) * 0.5)
    return found


def plain(g):
    return g.detach().numpy() if isinstance(g, torch.Tensor) else g


def in_torch(program):
    calls = []
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in program.values]
    found = derivatives(
        program, leaves, lambda *given: program.forward(torch, given, calls.append), torch.autograd.grad, torch.sum
    )
    return found, calls


def in_jhop(program, mode):
    calls = []
    leaves = [jhop.tensor(jnp.array(v), requires_grad=True) for v in program.values]
    note = calls.append if mode.name == "eager" else lambda number: None
    forward = mode.compile(lambda *given: program.forward(hnp, given, note))
    return derivatives(program, leaves, forward, mode.grad, lambda value: value.sum()), calls


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("seed", range(12))
def test_random_program(seed, mode):
    program = Program(seed)
    (expected, calls), (found, mine) = in_torch(program), in_jhop(program, mode)
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert [g is None for g in got] == [w is None for w in want]
        for g, w in zip(got, want, strict=True):
            if w is not None:
                np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-9)
    if mode.name == "eager":
        assert sorted(mine) == sorted(calls)


@pytest.mark.parametrize("ask", ["leaf", "intermediate", "both leaves"])
@pytest.mark.parametrize("returned", [True, False], ids=["grad", "backward"])
def test_what_runs_and_what_is_stored(ask, returned):
    def run(leaf, grad, value):
        log = []
        x, w = leaf(2.0), leaf(3.0)
        y = x * w
        z = y * y
        for name, tensor in (("x", x), ("w", w), ("y", y), ("z", z)):
            tensor.register_hook(lambda g, name=name: log.append((name, value(g))))
        y.grad_fn.register_prehook(lambda outs: log.append("pre"))
        y.grad_fn.register_hook(lambda ins, outs: log.append(("post", [None if g is None else value(g) for g in ins])))
        y.retain_grad()
        by = {"leaf": [x], "intermediate": [y], "both leaves": [x, w]}[ask]
        found = [value(g) for g in grad(z, by)] if returned else z.backward(inputs=by)
        return log, found, [None if t.grad is None else value(t.grad) for t in (x, w, y)]

    theirs = run(lambda v: torch.tensor(v, requires_grad=True), torch.autograd.grad, float)
    ours = run(lambda v: jhop.tensor(v, requires_grad=True), jhop.autograd.grad, float)
    assert ours == theirs
