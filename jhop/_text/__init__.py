"""Printed graphs: PyTorch's text, JAX code, and HTML."""

from __future__ import annotations

from jhop._graph import PRINTERS, GraphModule
from jhop._text.fx_text import fx_text
from jhop._text.html import html
from jhop._text.jax_text import jax_text
from jhop._text.torch_text import BackwardPrinter


def torch_text(gm: GraphModule) -> str:
    """PyTorch's text: of compiled autograd for a captured backward pass, of `make_fx` for anything else."""
    return fx_text(gm) if gm.backward is None else BackwardPrinter(gm).text()


PRINTERS.update(torch=torch_text, jax=jax_text, html=html)
