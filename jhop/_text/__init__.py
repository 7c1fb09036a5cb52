"""Printed graphs: PyTorch's text, JAX code, and HTML."""

from __future__ import annotations

from typing import Any

from jhop._errors import JhopError


def render(gm: Any, dialect: str) -> str:
    """The text of a graph in one dialect: "torch" or "jax"."""
    if dialect == "torch":
        if gm.backward is None:
            from jhop._text.fx_text import fx_text

            return fx_text(gm)
        from jhop._text.torch_text import BackwardPrinter

        return BackwardPrinter(gm).text()
    if dialect == "jax":
        from jhop._text.jax_text import jax_text

        return jax_text(gm)
    raise JhopError(f"print_readable: unknown dialect {dialect!r}. Expected 'torch' or 'jax'.")


def to_html(gm: Any) -> str:
    """The graph as a piece of HTML."""
    from jhop._text.html import html

    return html(gm)
