"""`python -m jhop demo`: a network trained with hooks that clip gradients and count, in one compiled step."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jhop

_LEARNING_RATE = 0.5
_MAX_NORM = 0.5
_BATCH = 128
_TEST_SHARE = 5  # one image in so many is for the test

Layers = list[tuple[jax.Array, jax.Array]]


@dataclasses.dataclass
class LayerStats:
    """What the hook on one layer's weights keeps: a plain Python object, which the hook changes.

    `steps` does not depend on the gradient, so it is and stays a Python int. The others do, so they are arrays.
    """

    max_norm: float = _MAX_NORM
    steps: int = 0
    clipped: Any = dataclasses.field(default_factory=lambda: jnp.float32(0))
    mean_norm: Any = dataclasses.field(default_factory=lambda: jnp.float32(0))

    def clip(self, ct: jax.Array) -> jax.Array:
        """The hook: clips the gradient by its norm, and counts."""
        norm = jnp.linalg.norm(ct)
        self.steps += 1
        self.clipped += jnp.where(norm > self.max_norm, jnp.float32(1), jnp.float32(0))
        self.mean_norm += (norm - self.mean_norm) / self.steps
        return ct * jnp.minimum(1.0, self.max_norm / norm)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Handwritten digits, 8 by 8 pixels in 0 to 1, as `f32[n, 64]` and `i32[n]`."""

    images: Any
    labels: Any
    test_images: Any
    test_labels: Any

    def batches(self, steps: int, rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
        for _ in range(steps):
            rows = rng.choice(len(self.images), _BATCH, replace=False)
            yield self.images[rows], self.labels[rows]


def run(*, steps: int = 300, seed: int = 0, hidden: int = 64, dialect: str = "jax") -> int:
    """Trains, prints what happened, and checks what the hooks counted.

    Args:
        steps: how many training steps.
        seed: of weights, of batches, and of which images are for the test.
        hidden: width of the two hidden layers.
        dialect: of the printed graph, as for `GraphModule.print_readable`.

    Returns:
        The exit status: 0, or 1 if a counter is wrong or the step was compiled more than once.

    Raises:
        JhopError: scikit-learn, which brings the digits, is not installed.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    digits = load(rng)
    layers = make_layers([64, hidden, hidden, 10], rng)
    stats = [LayerStats() for _ in layers]
    loss = make_loss(stats)
    step = make_step(loss)

    print(f"{len(digits.images)} images to train on, {len(digits.test_images)} to test; a hook on each layer's weights")
    for number, (images, labels) in enumerate(digits.batches(steps, rng), 1):
        value, layers = step(layers, images, labels)
        if number == 1 or number == steps or number % max(steps // 6, 1) == 0:
            right = accuracy(layers, images, labels)
            print(f"step {number:4d}   loss {float(value):.4f}   accuracy on the batch {right:.3f}")
    test = accuracy(layers, digits.test_images, digits.test_labels)
    print(f"accuracy on the test images: {test:.3f}")

    def loss_of_batch(layers: Layers) -> Any:
        return loss(layers, images, labels)

    print_graphs(jhop.backward_graph(loss_of_batch)(layers), dialect)
    faults = print_stats(layers, stats, steps, versions_of(step))
    print(f"{time.perf_counter() - started:.1f} seconds")
    for fault in faults:
        print(f"jhop demo: FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


# -- the network -------------------------------------------------------------------------------------------------------


def load(rng: np.random.Generator) -> Digits:
    """scikit-learn's digits, shuffled."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise jhop.JhopError(
            f"the handwritten digits come with scikit-learn, which cannot be imported ({error}). "
            'To install it: pip install "jhop[demo]"'
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    cut = len(images) // _TEST_SHARE
    return Digits(images[cut:], labels[cut:], images[:cut], labels[:cut])


def make_layers(sizes: list[int], rng: np.random.Generator) -> Layers:
    """Weights and biases, one pair per layer."""
    return [
        (jnp.asarray(rng.normal(0, n_in**-0.5, (n_in, n_out)), jnp.float32), jnp.zeros(n_out, jnp.float32))
        for n_in, n_out in zip(sizes, sizes[1:], strict=False)
    ]


def logits_of(layers: Layers, images: Any) -> Any:
    """The network."""
    *inner, (weights, bias) = layers
    hidden = images
    for inner_weights, inner_bias in inner:
        hidden = jnp.tanh(hidden @ inner_weights + inner_bias)
    return hidden @ weights + bias


def make_loss(stats: list[LayerStats]) -> Any:
    """The mean cross entropy, as a function whose weights have hooks."""

    def loss(layers: Layers, images: Any, labels: Any) -> Any:
        hooked = [(jhop.hook(weights, layer.clip), bias) for layer, (weights, bias) in zip(stats, layers, strict=True)]
        logits = logits_of(hooked, images)
        targets = jax.nn.one_hot(labels, 10)
        log_probabilities = jax.nn.log_softmax(logits)
        return -(log_probabilities * targets).sum(axis=1).mean()

    return loss


def make_step(loss: Any) -> Any:
    """One step of gradient descent as one compiled function, hooks included."""

    def step(layers: Layers, images: Any, labels: Any) -> tuple[Any, Layers]:
        value, grads = jax.value_and_grad(loss)(layers, images, labels)
        return value, jax.tree.map(lambda leaf, grad: leaf - _LEARNING_RATE * grad, layers, grads)

    return jhop.jit(step, fullgraph=True)


def accuracy(layers: Layers, images: Any, labels: Any) -> float:
    return float((logits_of(layers, images).argmax(axis=1) == labels).mean())


# -- what is shown and checked -----------------------------------------------------------------------------------------


def print_graphs(gm: jhop.GraphModule, dialect: str) -> None:
    """The backward graph with hooks opaque, and how the one that runs differs."""
    inlined = jhop.inline(gm)
    print("\nThe backward graph as captured. No hook has run: each is one call of `trace_wrapped`.\n")
    print(gm.print_readable(False, dialect=dialect).strip())
    hooks = sum(eqn.primitive.name == "trace_wrapped" for eqn in gm.jaxpr.eqns)
    state = [given for given in inlined.inputs if given.role == "state"]
    print(f"\nInlined, its {len(gm.jaxpr.eqns)} equations become {len(inlined.jaxpr.eqns)}: the {hooks} calls of hooks")
    print("give way to what the hooks compute. State that they read is an input, state that they write an output:")
    written = {write.container.path_of(write.key) for write in inlined.lifted.writes}
    for given in state:
        kind = "Python " + given.number.__name__ if given.number else "array"
        print(f"  {given.source:44} {kind:12} {'read and written' if given.source in written else 'read'}")


def print_stats(layers: Layers, stats: list[LayerStats], steps: int, versions: int) -> list[str]:
    """A row for each layer, and the sum of the counters; returns what is wrong with them."""
    counts = [layer.steps for layer in stats]
    faults = faults_of(steps, counts, versions)
    if not faults:
        print(f"\n{'layer':7}{'weights':>10}{'steps':>8}{'clipped':>9}{'mean norm':>11}")
        for number, (layer, (weights, _)) in enumerate(zip(stats, layers, strict=True)):
            shape = "x".join(map(str, weights.shape))
            clipped, norm = int(layer.clipped), float(layer.mean_norm)
            print(f"{number:<7}{shape:>10}{layer.steps:>8}{clipped:>9}{norm:>11.4f}")
    total = f"{' + '.join(map(str, counts))} = {sum(counts)}"
    print(f"\n{steps} steps x {len(stats)} layers = {steps * len(stats)}; the hooks counted {total}")
    print(f"compiled versions of the step: {versions}")
    return faults


def versions_of(step: Any) -> int:
    """How many versions of a `jhop.jit` function were traced and compiled."""
    return step.versions()


def faults_of(steps: int, counts: list[Any], versions: int) -> list[str]:
    """What does not come out. A hook that ran only while it was traced would have counted 1."""
    faults = []
    if any(type(count) is not int or count != steps for count in counts):
        faults.append(f"each hook must have counted {steps} steps, as a Python int, but they counted {counts!r}.")
    if versions != 1:
        faults.append(f"the step must have been compiled once, but there are {versions} versions of it.")
    return faults
