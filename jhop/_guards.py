"""Guards: whether a graph that was traced for one state of the world may be used for the present one.

A traced graph takes for granted every fixed value that its hooks can reach, the types of the lifted ones, and the
answers that lifted numbers gave to Python control flow. `Guards.broken()` finds the first that no longer holds and says
so in words.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jhop._container import MISSING
from jhop._scalar import Expr, leaves, to_code
from jhop._walk import Fixed, Walk

_BY_VALUE = (str, bytes, complex, bool, int, float, np.dtype)


class Guards:
    """What a traced graph depends on.

    Args:
        walk: what the hooks could reach when they were traced.
        answers: host expressions over `walk.leaves`, with the truth value that each had.
        frozen: numbers and arrays are part of the graph, not inputs: they too must stay what they are.
    """

    def __init__(self, walk: Walk, answers: list[tuple[Expr, bool]], *, frozen: bool = False):
        self._codes = walk.codes
        self._keys = [
            (container, frozenset(key for key, _ in container.items()))
            for container in walk.containers
        ]
        self._fixed = [*walk.fixed, *(Fixed(leaf.container, leaf.key, leaf.value) for leaf in walk.leaves if frozen)]
        self._leaves = [(leaf, _kind(leaf.value)) for leaf in walk.leaves if not frozen]
        self._answers = []
        for expr, answer in dict.fromkeys(answers):
            used = sorted(leaves(expr))
            text = to_code(expr, lambda i: walk.leaves[i].path)
            code = to_code(expr, lambda i: f"v{i}")
            check = eval(f"lambda {', '.join(f'v{i}' for i in used)}: {code}", {"__builtins__": {"abs": abs}})
            self._answers.append((check, [walk.leaves[i] for i in used], answer, text))

    def broken(self) -> str | None:
        """The first thing that changed, in words, or None."""
        for fn, code in self._codes:
            if fn.__code__ is not code:
                return f"the code of `{fn.__qualname__}` was replaced"
        for container, key, value in self._fixed:
            now = container.get(key)
            if now is not value and not (isinstance(value, _BY_VALUE) and type(now) is type(value) and now == value):
                return f"`{container.path_of(key)}` changed from {_short(value)} to {_short(now)}"
        for container, keys in self._keys:
            if frozenset(key for key, _ in container.items()) != keys:
                return f"`{container.path}` has other entries than before"
        for leaf, kind in self._leaves:
            now = leaf.container.get(leaf.key)
            if _kind(now) != kind:
                return f"`{leaf.path}` changed from {_short(leaf.value)} to {_short(now)}"
        for check, used, answer, text in self._answers:
            if bool(check(*(leaf.container.get(leaf.key) for leaf in used))) is not answer:
                return f"`{text}` was {answer} and is {not answer}"
        return None


def _kind(value: Any) -> Any:
    """What of a lifted value is fixed: a number's type, an array's type, shape and dtype."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return (jax.Array if isinstance(value, jax.Array) else np.ndarray, value.shape, value.dtype)
    return type(value)


def _short(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
