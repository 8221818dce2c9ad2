"""Where to cut a graph so that K gradients of what lies between two cuts fit into little memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

from torch.autograd.graph import Node

from moo_balance.engine.base import Problem
from moo_balance.engine.factored import Factored, factorable
from moo_balance.engine.graph import Edge, edge_of, edges_of, reach

Leaves = Mapping[Node, int]
"""Where gradients of parameters are accumulated, and which parameters these are."""


@dataclass
class Portion:
    """Nodes between two cuts.

    Args:
        nodes: What is passed within.
        columns: Parameters that are reached from here, and in ``last`` those of them that no later
            portion reaches.
        leaving: Edges on which gradients leave for later portions.
        layers: Linear layers whose weights' gradients stay factored.
    """

    nodes: set[Node]
    columns: list[int]
    last: list[int]
    leaving: list[Edge]
    layers: list[Factored]

    @property
    def is_led_back_to(self) -> bool:
        """May what is asked for here be reached by a way through a later portion, too?"""
        return len(self.leaving) > 1 or len(self.last) < len(self.columns)


def portions(
    problem: Problem, nodes: Collection[Node], columns: Collection[int], memory: float
) -> list[Portion]:
    """Portions from the losses down.

    Args:
        problem: The losses, and their parameters.
        nodes: All that the losses reach.
        columns: The parameters that count.
        memory: How many numbers a portion shall keep at most, if its layers allow it.
    """
    layers = [layer for layer in factorable(problem, nodes) if layer.column in columns]
    factored = {layer.column for layer in layers}
    wanted = {id(problem.params[column]): column for column in columns if column not in factored}
    variables = {node: id(getattr(node, "variable", None)) for node in nodes}
    leaves = {node: wanted[found] for node, found in variables.items() if found in wanted}
    order = _from_the_losses_down(nodes, leaves.keys() | {layer.node for layer in layers})
    cuts: Sequence[int] = ()
    if _is_ordered(order):
        cuts = _cuts(_sizes(problem, nodes, order, leaves, layers), _widths(order), memory)
    parts = [set(order[start:end]) for start, end in pairwise([0, *cuts, len(order)])]
    # A loss that is a parameter itself is a leaf.
    parts[0] |= {node for node, _ in map(edge_of, problem.losses) if node in leaves}
    return _described(parts, leaves, layers)


def _from_the_losses_down(nodes: Collection[Node], ends: Set[Node]) -> list[Node]:
    """The nodes that lead to one of the ends.

    Autograd numbers them as they are recorded, so that each comes before those it was computed
    from, unless a model computes in several threads.
    """
    inner = [node for node in nodes if getattr(node, "variable", None) is None]
    inner.sort(key=lambda node: node._sequence_nr())
    leading = set(ends)
    for node in inner:
        if any(after in leading for after, _ in edges_of(node)):
            leading.add(node)
    return [node for node in reversed(inner) if node in leading]


def _is_ordered(order: Sequence[Node]) -> bool:
    place = {node: k for k, node in enumerate(order)}
    return all(
        place.get(after, len(order)) > k
        for k, node in enumerate(order)
        for after, _ in edges_of(node)
    )


def _sizes(
    problem: Problem,
    nodes: Collection[Node],
    order: Sequence[Node],
    leaves: Leaves,
    layers: Sequence[Factored],
) -> list[int]:
    """How many numbers have to be kept for each node, for all losses that reach it."""
    cotangents = {layer.node: _width(layer.node, 0) for layer in layers}
    reaching = reach(problem.losses, nodes)
    return [
        reaching[node]
        * (
            cotangents.get(node, 0)
            + sum(
                problem.params[leaves[after]].numel()
                for after, _ in edges_of(node)
                if after in leaves
            )
        )
        for node in order
    ]


def _widths(order: Sequence[Node]) -> list[int]:
    """How many numbers cross a cut behind each node, for one loss."""
    place = {node: k for k, node in enumerate(order)}
    widths = [0] * (len(order) + 1)
    seen: set[Edge] = set()
    for k, node in enumerate(order):
        for edge in edges_of(node):
            if edge[0] in place and edge not in seen:
                seen.add(edge)  # it crosses from here on, down to its node
                width = _width(*edge)
                widths[k] += width
                widths[place[edge[0]]] -= width
    return list(accumulate(widths))


def _width(node: Node, output: int) -> int:
    return prod(node._input_metadata[output].shape)


def _cuts(sizes: Sequence[int], widths: Sequence[int], memory: float) -> list[int]:
    """How many nodes come before each cut: where it is narrowest within the memory allowed."""
    cuts, start, kept = list[int](), 0, 0.0
    for k, size in enumerate(sizes):
        if kept and kept + size > memory:
            first = next(j for j in range(start, k) if sizes[j])
            narrowest = min(range(first, k), key=lambda j: (widths[j], -j))
            start = narrowest + 1
            cuts.append(start)
            kept = sum(sizes[start:k])
        kept += size
    return cuts


def _described(
    parts: Sequence[set[Node]], leaves: Leaves, layers: Sequence[Factored]
) -> list[Portion]:
    """What is reached from each part, and what leaves it."""
    found, later, below = list[Portion](), set[int](), set[Node]()
    for part in reversed(parts):
        edges = dict.fromkeys(edge for node in part for edge in edges_of(node))
        columns = {leaves[node] for node, _ in edges if node in leaves}
        columns |= {leaves[node] for node in part if node in leaves}
        own = [layer for layer in layers if layer.node in part]
        columns |= {layer.column for layer in own}
        found.append(
            Portion(
                nodes=part,
                columns=sorted(columns),
                last=sorted(columns - later),
                leaving=[edge for edge in edges if edge[0] in below],
                layers=own,
            )
        )
        later |= columns
        below |= part
    return found[::-1]
