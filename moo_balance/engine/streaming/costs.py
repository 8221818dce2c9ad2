"""What K gradients keep at each node of a graph, and what crosses a cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from math import inf

from torch.autograd.graph import Node

from moo_balance.engine.base import Problem
from moo_balance.engine.factored import factorable
from moo_balance.engine.graph import (
    Edge,
    edges_of,
    gradient_size,
    in_recorded_order,
    leaf_of,
    meets_hooks,
    reach,
)


class GraphCosts:
    """The nodes between losses and compared parameters, and the elements of K gradients there.

    Cut ``c`` lies before the node at place ``c``. It is open if every gradient that crosses it is
    complete. Otherwise autograd would run nodes below the cut with no gradient to pass on::

        place 0   loss          cut 1   open     the gradient of a crosses
              1   a ---.        cut 2   closed   that of d would cross in two parts, one of which
              2   b    |        cut 3   closed     place 3 has yet to compute
              3   c    |        cut 4   open     that of d crosses
              4   d <--'

    So there is no cut between two uses of a parameter, where its K gradients are kept anyway.

    Attributes:
        leaves: Positions of parameters, by the node at which a gradient is accumulated.
        layers: Linear layers whose weight gradients stay factored, by node.
        order: The nodes from the losses down, without ``leaves``.
        completed: For each edge, the last place that adds to its gradient.
        deferred: For layers, by place: elements of the gradients at the output, and the first cut
            that these cross. A segment that begins there or later need not keep them.
        crossing: For each open cut, the edges whose gradients cross it.
        cut_size: For each cut, elements of these gradients; infinite if it is closed.
        remaining: For each cut, elements that are kept after it if there are no more cuts.
    """

    def __init__(
        self, problem: Problem, nodes: Collection[Node], compared: Collection[int]
    ) -> None:
        edges = {node: edges_of(node) for node in nodes}
        reaching = reach(problem.losses, nodes, edges.__getitem__)
        layers = factorable(problem, nodes, reaching)
        self.layers = {layer.node: layer for layer in layers if layer.column in compared}
        factored = {layer.column for layer in self.layers.values()}
        index = {id(problem.params[k]): k for k in compared if k not in factored}
        found = {node: index.get(id(leaf_of(node))) for node in nodes}
        self.leaves = {node: k for node, k in found.items() if k is not None}
        self.order = _leading_nodes(edges, {*self.leaves, *self.layers})
        self._hooked: dict[Edge, bool] = {}
        self._count(problem, edges, reaching)

    def kept(self, place: int, start: int) -> int:
        """Elements that a segment which begins at cut `start` keeps for the node at `place`."""
        elements, crossed = self.deferred.get(place, (0, 0))
        return self.retained[place] + (elements if start < crossed else 0)

    def meets_hooks(self, cut: int) -> bool:
        """Whether a hook would see twice a gradient that crosses. Each edge is probed once."""
        for edge in self.crossing[cut]:
            if edge not in self._hooked:
                self._hooked[edge] = meets_hooks(edge)
        return any(self._hooked[edge] for edge in self.crossing[cut])

    def _count(
        self, problem: Problem, edges: Mapping[Node, Sequence[Edge]], reaching: Mapping[Node, int]
    ) -> None:
        count, place = len(self.order), {node: k for k, node in enumerate(self.order)}
        users: dict[Edge, list[int]] = {}
        for k, node in enumerate(self.order):
            for edge in edges[node]:
                if edge[0] in place or edge[0] in self.leaves:
                    users.setdefault(edge, []).append(k)
        self.completed = {edge: places[-1] for edge, places in users.items()}
        self.retained, self.deferred = [0] * count, dict[int, tuple[int, int]]()
        sizes, spans = dict[Edge, int](), dict[Edge, range]()
        # +1 where a run of closed cuts begins, -1 after it: the running sum is above 0 within. All
        # are closed if a loss is a parameter itself, as no segment would receive its gradient.
        runs = [int(any(loss.grad_fn is None for loss in problem.losses)), *[0] * (count + 1)]
        for edge, (first, *_, last) in ((edge, [p[0], *p]) for edge, p in users.items()):
            node, end = edge[0], place.get(edge[0], last)
            if end < last:  # recorded in several threads: the order does not hold
                first, last = 0, count
            runs[first + 1] += 1
            runs[last + 1] -= 1
            if node in self.leaves:
                param = problem.params[self.leaves[node]]
                self.retained[last] += param.numel() * reaching[node]
            else:
                sizes[edge] = gradient_size(edge) * reaching[node]
                spans[edge] = range(last + 1, end + 1)
            if node in self.layers:
                self.deferred[end] = sizes[edge], last + 1
        is_open = [not depth for depth in accumulate(runs)]
        self.crossing: list[list[Edge]] = [[] for _ in range(count + 1)]
        for edge, span in spans.items():
            for cut in filter(is_open.__getitem__, span):
                self.crossing[cut].append(edge)
        self.cut_size = [
            sum(map(sizes.__getitem__, crossing)) if is_open[cut] else inf
            for cut, crossing in enumerate(self.crossing)
        ]
        kept = [self.kept(k, start=-1) for k in range(count)]
        self.remaining = list(accumulate(reversed(kept), initial=0))[::-1]


def _leading_nodes(edges: Mapping[Node, Sequence[Edge]], ends: Collection[Node]) -> list[Node]:
    """The nodes that lead to one of the ends, or are one, from the losses down; no leaves."""
    leading, order = set(ends), in_recorded_order(edges)
    for node in reversed(order):
        if any(after in leading for after, _ in edges[node]):
            leading.add(node)
    return [node for node in order if node in leading and edges[node]]
