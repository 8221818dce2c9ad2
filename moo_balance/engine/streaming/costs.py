"""What K gradients keep at each node of a graph, and what crosses a cut."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from itertools import accumulate
from math import inf, prod

from torch.autograd.graph import Node

from moo_balance.engine.autograd import (
    count_reaching_losses,
    edge_of,
    edges_of,
    gradient_shape,
    has_hook_at,
    recorded_order,
)
from moo_balance.engine.base import Problem
from moo_balance.engine.linear import find_linear_layers


class GraphCosts:
    """The nodes between losses and parameters, and the elements of K gradients there.

    Cut ``c`` lies before the node at place ``c``. It is open if every gradient that crosses it is
    complete. Otherwise autograd would run nodes below the cut with no gradient to pass on::

        place 0   loss          cut 1   open     the gradient of a crosses
              1   a ---.        cut 2   closed   that of d would cross in two parts, one of which
              2   b    |        cut 3   closed     place 3 has yet to compute
              3   c    |        cut 4   open     that of d crosses
              4   d <--'

    So there is no cut between two uses of a parameter, where its K gradients are kept anyway.

    Attributes:
        order: The nodes from the losses down; those that receive gradients of parameters, which
            are in ``leaves``, left out.
        spans: For each edge, the first and last place that add to its gradient, and the place that
            receives it: for a parameter, the last one.
        cut_size: For each cut, elements of the gradients that cross; infinite if it is closed.
        remaining: For each cut, elements that are kept after it if there are no more cuts.
    """

    def __init__(self, problem: Problem, nodes: Collection[Node]) -> None:
        edges = {node: edges_of(node) for node in nodes}
        reaching = count_reaching_losses(problem.losses, nodes, edges.__getitem__)
        layers = find_linear_layers(problem, nodes, reaching)
        self.layers = {layer.node: layer for layer in layers}
        factored = {layer.param_index for layer in layers}
        params = [(k, param) for k, param in enumerate(problem.params) if k not in factored]
        self.leaves = {edge_of(param)[0]: k for k, param in params}
        leading, order = {*self.leaves, *self.layers}, recorded_order(nodes)
        for node in reversed(order):
            if any(after in leading for after, _ in edges[node]):
                leading.add(node)
        self.order = [node for node in order if node in leading and node not in self.leaves]
        place = {node: k for k, node in enumerate(self.order)}
        self.spans: dict[tuple[Node, int], tuple[int, int, int]] = {}
        for k, node in enumerate(self.order):
            for edge in edges[node]:
                if edge[0] in leading:
                    first, *_ = self.spans.get(edge, (k,))
                    self.spans[edge] = first, k, place.get(edge[0], k)
        self._has_hook_at = cache(has_hook_at)
        self._count_elements(reaching)
        # No segment would receive the gradient of a loss that is a parameter itself.
        if any(loss.grad_fn is None for loss in problem.losses):
            self.cut_size = [inf for _ in self.cut_size]

    def kept(self, place: int, start: int) -> int:
        """Elements that a segment which begins at cut `start` keeps for the node at `place`.

        For a layer nothing is kept if its output gradient is complete when it enters the segment.
        """
        return sum(elements for last, elements in self._retained[place] if start <= last)

    def has_hook_at(self, cut: int) -> bool:
        """Whether a hook would see a gradient that crosses twice. Each edge is probed once."""
        crossing = (edge for edge, (_, last, end) in self.spans.items() if last < cut <= end)
        return any(map(self._has_hook_at, crossing))

    def _count_elements(self, reaching: Mapping[Node, int]) -> None:
        count, is_ordered = len(self.order), True
        self._retained: list[list[tuple[int, int]]] = [[] for _ in self.order]
        # How elements that cross, and gradients that would cross in parts, change at each cut.
        size, parts = [0] * (count + 2), [0] * (count + 2)
        for edge, (first, last, end) in self.spans.items():
            shape = gradient_shape(edge)
            elements = prod(shape or ()) * reaching[edge[0]]
            if edge[0] in self.leaves or edge[0] in self.layers:
                self._retained[end].append((last, elements))
            size[last + 1] += elements
            size[end + 1] -= elements
            parts[first + 1] += 1
            parts[last + 1] -= 1
            # What was recorded in several threads is in no order.
            is_ordered &= last <= end and shape is not None
        crossing = zip(accumulate(size), accumulate(parts), strict=True)
        self.cut_size = [inf if part or not is_ordered else whole for whole, part in crossing]
        kept = [self.kept(k, start=0) for k in range(count)]
        self.remaining = list(accumulate(reversed(kept), initial=0))[::-1]
