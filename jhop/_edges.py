"""Where backward passes start and end: Tensors, and edges of the graph, which stand for what Tensors were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jhop._append import class_name
from jhop._errors import JhopError
from jhop._node import Edge, Node
from jhop._plan import Request
from jhop._values import Values, array_of, check_like


class GradientEdge(NamedTuple):
    """A place in the graph: the `output_nr`-th output of a node. Made by `jhop.edge`.

    The counterpart in PyTorch is `torch.autograd.graph.GradientEdge`.
    """

    node: Node
    output_nr: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the value there."""
        return self.node.avals[self.output_nr].shape

    @property
    def dtype(self) -> Any:
        """That of the value there."""
        return self.node.avals[self.output_nr].dtype


def edge(tensor: Any) -> GradientEdge:
    """The place of a Tensor in the graph, for `jhop.autograd.grad` and `backward` in place of the Tensor.

    It keeps the graph behind it alive and not the Tensor, and stays what it is when the variable is bound to a new
    Tensor (`y += 1.0`). Hooks on the Tensor run as they do for the Tensor itself. A pass may end at an edge and another
    one start there: the backward in two parts.

    Args:
        tensor: a Tensor of any shape that requires grad. That of a leaf stands for its gradient.

    Returns:
        The edge: a pair (node, output_nr), with the `shape` and `dtype` of the Tensor.

    Raises:
        JhopError: it is no Tensor, does not require grad, or belongs to a function that `jhop.compile` traces.

    Example:
        >>> import jhop
        >>> x = jhop.tensor(3.0, requires_grad=True)
        >>> y = x * x
        >>> middle = jhop.edge(y)
        >>> y *= 5.0
        >>> (grad,) = jhop.autograd.grad(y, middle)
        >>> jhop.autograd.backward(middle, grad)
        >>> float(grad), float(x.grad)
        (5.0, 30.0)

    The counterpart in PyTorch is `torch.autograd.graph.get_gradient_edge`, by which name `jhop.autograd` has it, too.
    """
    if not isinstance(tensor, Values):
        raise JhopError(f"jhop.edge: expected a Tensor, got {class_name(tensor)}. Make one with jhop.tensor.")
    return GradientEdge(*edge_of(tensor, "jhop.edge"))


def edge_of(given: Any, where: str) -> Edge:
    """Where the cotangent of a Tensor or edge goes.

    Raises:
        JhopError: it requires no grad, belongs to a function that is traced, or is no edge of its node.
    """
    if not isinstance(given, GradientEdge):
        given._outside(where)
        edge: Edge = given._edge(where)
        return edge
    node, output_nr = given
    if not isinstance(node, Node) or type(output_nr) is not int or not 0 <= output_nr < len(node.avals):
        n = f" of {len(node.avals)} outputs" if isinstance(node, Node) else ""
        raise JhopError(
            f"{where}: expected a GradientEdge of a node and one of its outputs, got {node!r}{n} and {output_nr!r}. "
            "Make one with jhop.edge(tensor)."
        )
    return Edge(node, output_nr)


def given_tensors(given: Any, where: str, *, edges: bool = False) -> list[Any]:
    """One Tensor or a sequence of them as a list; `edges` may be among them where these are allowed.

    Raises:
        JhopError: it is something else, or empty.
    """
    kinds = (Values, GradientEdge) if edges else Values
    found = [given] if isinstance(given, kinds) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, kinds) for item in found):
        raise JhopError(f"{where}: expected Tensors (one, or a list of them), got {given!r}.")
    if not found:
        raise JhopError(f"{where}: expected at least one Tensor, got none.")
    return list(found)


def seeds_of(roots: Any, gradients: Any, where: str, create_graph: bool) -> list[tuple[Edge, Any]]:
    """Where a pass starts, with which cotangents."""
    given = given_tensors(roots, where, edges=True)
    single = isinstance(roots, (Values, GradientEdge)) and not isinstance(gradients, (list, tuple))
    cts = [gradients] if single else gradients
    cts = [None] * len(given) if cts is None else cts
    if not isinstance(cts, (list, tuple)) or len(cts) != len(given):
        raise JhopError(
            f"{where}: expected one gradient (or None) for each Tensor, got "
            f"{len(given)} and {len(cts) if isinstance(cts, (list, tuple)) else cts!r}."
        )
    return [(edge_of(root, where), seed_of(root, ct, create_graph)) for root, ct in zip(given, cts, strict=True)]


def seed_of(root: Any, gradient: Any, create_graph: bool = False) -> Any:
    """The cotangent to start with: an array, or with `create_graph` a Tensor if one was given."""
    if gradient is None:
        if any(size != 1 for size in root.shape):
            raise JhopError(
                f"backward: a gradient can be left out only for a scalar, this Tensor has shape {root.shape}. "
                "Pass backward(gradient) with an array of this shape, or reduce first, e.g. with .sum()."
            )
        return jnp.ones(root.shape, root.dtype)
    array = array_of(gradient, "backward: expected the gradient as an array or a Tensor")
    check_like(array, root, "backward(gradient)")
    if create_graph and isinstance(gradient, Values):
        return gradient
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def request_for(seeds: Any, retain_graph: bool | None, create_graph: bool, inputs: Any) -> Request:
    """A backward pass that accumulates into `.grad`, with the arguments of `Tensor.backward`."""
    edges = None
    if inputs is not None:
        given: Sequence[Any] = given_tensors(inputs, "backward(inputs)", edges=True)
        edges = tuple(edge_of(item, f"backward: inputs[{i}]") for i, item in enumerate(given))
        for item in given:
            if not isinstance(item, GradientEdge):
                item.retain_grad()  # of those that are no leaves
    keep = create_graph if retain_graph is None else retain_graph
    return Request(seeds=seeds, keep_graph=keep, create_graph=create_graph, inputs=edges)
