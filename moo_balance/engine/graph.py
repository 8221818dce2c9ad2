"""A look at the graph that autograd recorded, before it is differentiated."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

Edge: TypeAlias = tuple[Node, int]
"""An output of a node, where a gradient arrives."""


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor arrives."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    return get_gradient_edge(tensor).node, 0


def gradient_edge(edge: Edge) -> GradientEdge:
    """The form in which ``autograd.grad`` takes it."""
    return GradientEdge(*edge)


def nodes_above(losses: Iterable[Tensor], cut: Iterable[Tensor] = ()) -> set[Node]:
    """Every node that the losses reach, without going through the tensors of the cut."""
    closed = {edge_of(tensor) for tensor in cut}
    stack: list[Any] = [edge[0] for edge in map(edge_of, losses) if edge not in closed]
    seen = {None, *stack}
    while stack:
        for edge in stack.pop().next_functions:
            node = edge[0]
            if node not in seen and not (closed and edge in closed):
                seen.add(node)
                stack.append(node)
    seen.remove(None)
    return seen


@contextmanager
def closed(edges: Iterable[Edge]) -> Iterator[None]:
    """Let no gradient through these edges, whatever leads on from there.

    What is asked for at the edges is found all the same; what lies behind is reached by other ways
    alone.
    """
    handles = [node.register_prehook(_stop(output)) for node, output in edges]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop(output: int) -> Any:
    def hook(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(None if k == output else g for k, g in enumerate(gradients))

    return hook


def checkpoints_reentrantly(nodes: Iterable[Node]) -> bool:
    """Is there a reentrant checkpoint among these?

    ``autograd.grad`` does not see the parameters inside: it raises, or, where the checkpoint lies
    on no other parameter's path, silently passes over them.
    """
    # Where nobody has imported them, there can be none; and the module is slow to import.
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        return False
    reentrant = module.CheckpointFunction._backward_cls
    return any(issubclass(kind, reentrant) for kind in set(map(type, nodes)))


def edges_of(node: Node) -> list[Edge]:
    """Where a node hands gradients on."""
    return [(after, output) for after, output in node.next_functions if after is not None]


def reach(
    losses: Sequence[Tensor],
    nodes: Collection[Node],
    after: Callable[[Node], Sequence[Edge]] = edges_of,
) -> dict[Node, int]:
    """By how many losses each node is reached.

    Args:
        losses: The losses.
        nodes: All that they reach.
        after: Where a node hands gradients on, if somebody knows that already.
    """
    masks = dict.fromkeys(nodes, 0)
    for k, loss in enumerate(losses):
        masks[edge_of(loss)[0]] |= 1 << k
    for node in in_recorded_order(nodes):
        for below, _ in after(node):
            masks[below] |= masks[node]
    return {node: mask.bit_count() for node, mask in masks.items()}


def leaves_among(nodes: Iterable[Node], params: Sequence[Tensor]) -> list[int]:
    """Positions of the parameters whose gradients are accumulated at one of these nodes."""
    position = {id(param): column for column, param in enumerate(params)}
    leaves = (
        id(node.variable)  # type: ignore[attr-defined]
        for node in nodes
        if type(node).__name__ == "AccumulateGrad"
    )
    return sorted(position[leaf] for leaf in leaves if leaf in position)


def meets_hooks(edge: Edge) -> bool:
    """Are there hooks that would see, more than once, a gradient that stops here on its way?

    Those of modules are nodes. Those of tensors autograd does not show; so a gradient of zeros is
    sent here, and no further: does it come back as it was, and has nobody computed with it?
    """
    here, (node, output) = gradient_edge(edge), edge
    if type(node).__name__ == "BackwardHookFunctionBackward":
        return True
    form = node._input_metadata[output]
    probe = torch.zeros((), dtype=form.dtype, device=form.device).expand(form.shape)
    try:
        with _Untouched():  # type: ignore[no-untyped-call]
            (found,) = torch.autograd.grad([here], [here], [probe], retain_graph=True)
    except _TouchedError:
        return True
    return found is not probe


class _TouchedError(Exception):
    pass


class _Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Nobody may compute anything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _TouchedError


def in_recorded_order(nodes: Iterable[Node]) -> list[Node]:
    """The nodes, those recorded last first: each before the nodes that it passes gradients to."""
    return sorted(nodes, key=lambda node: -node._sequence_nr())


def leaf_of(node: Node) -> Any:
    """The tensor whose ``.grad`` is accumulated at this node, or None."""
    return getattr(node, "variable", None)


def gradient_size(edge: Edge) -> int:
    """Number of elements of the gradient that arrives at an edge."""
    node, output = edge
    return math.prod(node._input_metadata[output].shape)
