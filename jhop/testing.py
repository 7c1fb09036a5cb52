"""Helpers for tests of printed graphs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from jhop import backends

__all__ = ("fresh_aot_ids", "normalize_gm")


def normalize_gm(text: str) -> str:
    """A printed graph without what differs from run to run: comments, trailing blanks, runs of empty lines.

    Example:
        >>> normalize_gm("a = 1  \\n# File: x.py:3\\n\\n\\nb = 2\\n")
        'a = 1\\n\\nb = 2\\n'

    The counterpart in PyTorch is `torch._dynamo.testing.normalize_gm`.
    """
    lines = [line.rstrip() for line in text.split("\n") if not line.lstrip().startswith("#")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


@contextlib.contextmanager
def fresh_aot_ids() -> Iterator[None]:
    """Inside the block, numbers of ahead-of-time compiles, which are part of printed names, start at 0.

    The block's end puts back what they were, so that tests of printed graphs do not depend on their order.

    Example:
        >>> import jhop
        >>> x = jhop.tensor([1.0, 2.0], requires_grad=True)
        >>> with jhop.testing.fresh_aot_ids():
        ...     y = jhop.compile(lambda x: x * 3.0, backend="aot_eager")(x)
    """
    before = backends.aot_ids(0)
    try:
        yield
    finally:
        backends.aot_ids(before)
