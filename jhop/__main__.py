"""The command line: `python -m jhop demo` and `python -m jhop graph MODULE:FUNCTION TYPE ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import jhop
from jhop import _cli, _demo

_EXAMPLES = """\
examples:
  python -m jhop demo
  python -m jhop demo --steps 100 --hidden 32 --seed 1
  python -m jhop graph net:loss 'f32[64,10]' 'f32[32,64]' 'i32[32]'
  python -m jhop graph examples/net.py:loss 'f32[8]' --inlined --dialect torch
"""
_GRAPH_EXAMPLES = """\
A TYPE is a dtype as JAX prints it (f16 bf16 f32 f64 i8 i32 i64 u8 u32 bool c64 ...) with the sizes in brackets, which
many shells want quoted: 'f32[4,8]'. A scalar is f32 or f32[]. No array is allocated and nothing is computed.

examples:
  python -m jhop graph net:loss 'f32[64,10]' 'f32[32,64]' 'i32[32]'
  python -m jhop graph net:loss f32 --forward
  python -m jhop graph examples/net.py:loss 'f32[8]' --inlined --dialect torch
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; those of this process by default.

    Returns:
        The exit status: 0, or 1 if what the demo proves does not hold, or 2 if the command cannot be carried out,
        after a message on stderr.

    Raises:
        SystemExit: for --help and --version, and when argparse refuses the arguments (status 2).
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes positional arguments in one run only; further types may come after an option
        if options.command != "graph" or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.types += rest
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        if options.command == "demo":
            return _demo.run(steps=options.steps, seed=options.seed, hidden=options.hidden, dialect=options.dialect)
        text = _cli.graph_text(
            options.function, options.types,
            forward=options.forward, inlined=options.inlined, dialect=options.dialect,
        )  # fmt: skip
    except jhop.JhopError as error:
        print(f"jhop {options.command}: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m jhop", description="Backward hooks for JAX that are traced.", epilog=_EXAMPLES,
        formatter_class=form, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"jhop {jhop.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="train a small network with hooks that clip and count", allow_abbrev=False,
        description="Trains a small network on handwritten digits, each layer's gradient clipped and counted by a "
        "hook, in one compiled step; then shows the graphs and checks the counters.",
    )  # fmt: skip
    demo.add_argument("--steps", type=_positive, default=300, metavar="N", help="training steps (default: 300)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of weights and batches (default: 0)")
    demo.add_argument("--hidden", type=_positive, default=64, metavar="N", help="width of layers (default: 64)")

    graph = commands.add_parser(
        "graph", help="print the backward graph of a function", description="Prints the backward graph of a function.",
        epilog=_GRAPH_EXAMPLES, formatter_class=form, allow_abbrev=False,
    )  # fmt: skip
    graph.add_argument("function", metavar="MODULE:FUNCTION", help="such as net:loss, or examples/net.py:loss")
    graph.add_argument("types", metavar="TYPE", nargs="*", help="of each argument of the function, such as f32[4,8]")
    graph.add_argument("--inlined", action="store_true", help="with hooks inlined and their state lifted")
    graph.add_argument("--forward", action="store_true", help="the function itself instead of its backward pass")
    for command in (demo, graph):
        command.add_argument(
            "--dialect", choices=("jax", "torch"), default="jax",
            help="Python over jax, or the text of PyTorch's compiled autograd (default: jax)",
        )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    number = _natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("expected a number of at least 1, got 0")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
