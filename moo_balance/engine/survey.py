"""What it takes to pass a graph in portions: what is kept at each node, and what crosses a cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from math import inf, prod

from torch.autograd.graph import Node

from moo_balance.engine.autograd import (
    Edge,
    count_reaching_losses,
    edge_of,
    edges_of,
    gradient_shape,
    leaf_of,
    recorded_order,
)
from moo_balance.engine.base import Problem
from moo_balance.engine.linear import LinearWeightGradient, find_linear_layers


class Survey:
    """The nodes that lead to a parameter, from the losses down, and what has to be kept for each.

    The cut at j comes before the j-th node. All numbers are counted for all losses together.

    Args:
        problem: The losses, and their parameters.
        nodes: All that the losses reach.
        columns: The parameters that count.

    Attributes:
        roots: Where gradients of the losses arrive.
        edges: Where each node hands gradients on.
        layers: Linear layers whose weights' gradients stay factored, by their nodes.
        leaves: The other parameters, by the nodes where their gradients are accumulated.
        order: The nodes that lead to one of these.
        rows: Numbers in the parameters' gradients that are found at each node.
        late: For layers, by their place in the order: numbers in their cotangents, and the first
            cut at which these are complete, so that they are on their way and need not be kept.
        spans: For each edge, the first and the last cut at which something is on its way there.
        crossing: Numbers on their way across each cut; infinite where no cut may be made.
    """

    def __init__(self, problem: Problem, nodes: Collection[Node], columns: Collection[int]) -> None:
        self.roots = {edge_of(loss)[0] for loss in problem.losses}
        self.edges = {node: edges_of(node) for node in nodes}
        reaching = count_reaching_losses(problem.losses, nodes, self.edges.__getitem__)
        layers = find_linear_layers(problem, nodes, reaching)
        self.layers = {layer.node: layer for layer in layers if layer.param_index in columns}
        self.leaves = _leaves(problem, self.edges, columns, self.layers.values())
        self.order = _from_the_losses_down(self.edges, {*self.leaves, *self.layers})
        self.rows = [0] * len(self.order)
        self.late: dict[int, tuple[int, int]] = {}
        self.spans: dict[Edge, tuple[int, int]] = {}
        sizes = {node: problem.params[column].numel() for node, column in self.leaves.items()}
        self._take_numbers(sizes, reaching)
        self.crossing = self._crossing(sizes, reaching)

    @property
    def ends(self) -> list[int]:
        """The places at which something is kept."""
        return [place for place, rows in enumerate(self.rows) if rows or place in self.late]

    def kept(self, place: int, start: int) -> int:
        """Numbers that a portion which begins at `start` keeps for the node at `place`."""
        numbers, complete = self.late.get(place, (0, 0))
        return self.rows[place] + (numbers if start < complete else 0)

    def around(self, cut: int) -> list[Edge]:
        """Edges at which a portion that ends at a cut hands on less than the whole gradient.

        Beside those that cross the cut these are what lies between one of them and another: where
        nothing is handed on, for the sake of what is asked for below.
        """
        crossing = [last for first, last in self.spans.values() if first <= cut <= last]
        end = max(crossing, default=0)
        return [
            edge
            for edge, (first, last) in self.spans.items()
            if cut <= last <= end and (first <= cut or edge[0] not in self.leaves)
        ]

    def close(self, cut: int, edges: Iterable[Edge]) -> None:
        """Make no such cut again, and none across these edges."""
        self.crossing[cut] = inf
        for edge in edges:
            first, last = self.spans[edge]
            self.crossing[first : last + 1] = [inf] * (last + 1 - first)

    def _take_numbers(self, sizes: Mapping[Node, int], reaching: Mapping[Node, int]) -> None:
        place = {node: k for k, node in enumerate(self.order)}
        complete = dict.fromkeys(self.layers, 0)
        for k, node in enumerate(self.order):
            for edge in self.edges[node]:
                after = edge[0]
                if after in sizes:
                    self.rows[k] += sizes[after] * reaching[node]
                elif after not in place:
                    continue
                elif after in complete:
                    complete[after] = k + 1
                first, _ = self.spans.get(edge, (k + 1, k))
                self.spans[edge] = first, place.get(after, k)
        for node, cut in complete.items():
            self.late[place[node]] = _width(node, 0) * reaching[node], cut

    def _crossing(self, sizes: Mapping[Node, int], reaching: Mapping[Node, int]) -> list[float]:
        """Gradients at edges; and of parameters, to which another portion will add."""
        changes = [0.0] * (len(self.order) + 1)
        for edge, (first, last) in self.spans.items():
            if first <= last:
                numbers = (sizes.get(edge[0]) or _width(*edge)) * reaching[edge[0]]
                changes[first] += numbers
                changes[last + 1] -= numbers
            elif edge[0] not in sizes:  # it comes before what leads to it: there is no order
                return [0.0, *[inf] * (len(self.order) - 1), 0.0]
        return list(accumulate(changes))


def _leaves(
    problem: Problem,
    edges: Mapping[Node, Sequence[Edge]],
    columns: Collection[int],
    layers: Collection[LinearWeightGradient],
) -> dict[Node, int]:
    factored = {layer.param_index for layer in layers}
    wanted = {id(problem.params[column]): column for column in columns if column not in factored}
    ends = [node for node, after in edges.items() if not after]
    variables = {node: id(leaf_of(node)) for node in ends}
    return {node: wanted[found] for node, found in variables.items() if found in wanted}


def _from_the_losses_down(edges: Mapping[Node, Sequence[Edge]], ends: set[Node]) -> list[Node]:
    """The nodes that lead to one of the ends, and all if they cannot be told from their numbers.

    Autograd numbers them as they are recorded, so that each comes before those it was computed
    from, unless a model computes in several threads.
    """
    inner = recorded_order([node for node, after in edges.items() if after])[::-1]
    leading, others = set(ends), list[Node]()
    for node in inner:
        if any(after in leading for after, _ in edges[node]):
            leading.add(node)
        else:
            others.append(node)
    if any(after in leading for node in others for after, _ in edges[node]):
        leading.update(others)
    return [node for node in reversed(inner) if node in leading]


def _width(node: Node, output: int) -> int:
    shape = gradient_shape((node, output))
    return 2**62 if shape is None else prod(shape)
