"""Segments of a graph, such that K gradients of what lies in one of them fit into little memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from math import inf, prod
from typing import NamedTuple

from torch.autograd.graph import Node

from moo_balance.engine.autograd import (
    Edge,
    count_reaching_losses,
    edge_of,
    edges_of,
    gradient_shape,
    has_hook_at,
    recorded_order,
    unpack_hook,
)
from moo_balance.engine.base import Problem
from moo_balance.engine.linear import LinearWeightGradient, find_linear_layers

NEGLIGIBLE = 2**20  # elements, 4 MiB of them in float32: to save less is not worth a cut


class Segment(NamedTuple):
    """Nodes between two cuts, and what is differentiated there."""

    nodes: set[Node]
    param_indices: list[int]  # of the parameters that the nodes use, without factored weights
    layers: list[LinearWeightGradient]  # whose output gradients are completed by the nodes
    leaving: list[Edge]  # where gradients go on in later segments


def partition(problem: Problem, nodes: Collection[Node], per_param: float) -> list[Segment]:
    """Segments that keep about `per_param` elements for each of a parameter; none if not cut."""
    size = sum(param.numel() for param in problem.params)
    budget = max(per_param * size, NEGLIGIBLE)
    if len(problem.losses) * size <= budget:
        return []
    costs = GraphCosts(problem, nodes)
    return build_segments(costs, choose_cuts(costs, budget))


def choose_cuts(costs: GraphCosts, budget: float) -> list[int]:
    """Where to cut: walk down until a segment keeps more than the budget, and go back a little."""
    cuts, start, place, kept = list[int](), 0, 0, 0
    candidates: dict[int, int] = {}  # by cut, the elements that are kept above it
    while True:
        if kept > budget and candidates:
            cut = _narrowest_cut(costs, candidates, budget)
            candidates = {}
            if cut is not None:
                cuts.append(cut)
                start, place, kept = cut, cut, 0
        if place == len(costs.order):
            return cuts
        kept += costs.kept(place, start)
        place += 1
        if kept and costs.cut_size[place] < costs.remaining[place]:
            candidates[place] = kept


def _narrowest_cut(costs: GraphCosts, candidates: Mapping[int, int], budget: float) -> int | None:
    """The candidate without hooks that the fewest elements cross.

    It should come after half of what the segment could keep: else segments become too many. Where
    wide activations cross all candidates, the budget is what these take, and as much more.
    """
    needs = {cut: kept + costs.cut_size[cut] for cut, kept in candidates.items()}
    least = min(needs.values())
    limit = budget if least <= budget else least + budget
    allowed = [cut for cut, need in needs.items() if need <= limit]
    half = candidates[allowed[-1]] / 2
    allowed.sort(key=lambda cut: (candidates[cut] < half, costs.cut_size[cut], -cut))
    return next((cut for cut in allowed if not costs.has_hook_at(cut)), None)


def build_segments(costs: GraphCosts, cuts: Sequence[int]) -> list[Segment]:
    """The segments between some cuts; none without cuts."""
    bounds = pairwise([0, *cuts, len(costs.order)]) if cuts else ()
    segments = [Segment(set(costs.order[start:end]), [], [], []) for start, end in bounds]
    for edge, (_, last, _) in costs.spans.items() if cuts else ():
        segment, node = segments[bisect_right(cuts, last)], edge[0]
        if node in costs.leaves:
            segment.nodes.add(node)
            segment.param_indices.append(costs.leaves[node])
        elif node not in segment.nodes:
            segment.leaving.append(edge)
        if node in costs.layers:
            segment.layers.append(costs.layers[node])
    return segments


class GraphCosts:
    """The nodes between losses and parameters, and the elements of K gradients there.

    Cut ``c`` lies before the node at place ``c``. It is open if every node below the cut has all of
    its gradients from above, or none. Otherwise autograd would run nodes below the cut with a part
    of their gradients, or without any::

        place 0   loss          cut 1   open     the gradient of a crosses
              1   a ---.        cut 2   closed   that of d would cross in two parts, one of which
              2   b    |        cut 3   closed     place 3 has yet to compute
              3   c    |        cut 4   open     that of d crosses
              4   d <--'

    So there is no cut between two uses of a parameter, where its K gradients are kept anyway. Nor
    is there one within an activation checkpoint, which would be computed again on both sides.
    """

    def __init__(self, problem: Problem, nodes: Collection[Node]) -> None:
        edges = {node: edges_of(node) for node in nodes}
        reaching = count_reaching_losses(problem.losses, nodes, edges.__getitem__)
        layers = find_linear_layers(problem, nodes, reaching)
        factored = {layer.param_index for layer in layers}
        self.layers = {layer.node: layer for layer in layers}
        self.leaves = {edge_of(p)[0]: k for k, p in enumerate(problem.params) if k not in factored}
        leading, order = {*self.leaves, *self.layers}, recorded_order(nodes)
        for node in reversed(order):
            if any(after in leading for after, _ in edges[node]):
                leading.add(node)
        self.order = [node for node in order if edges[node]]
        place = {node: k for k, node in enumerate(self.order)}
        # For each edge: the first and last place that add to its gradient, and the place that takes
        # it; for a parameter the last one. A loss may be a parameter itself.
        roots = [edge for edge in map(edge_of, problem.losses) if edge[0] in self.leaves]
        self.spans: dict[Edge, tuple[int, int, int]] = dict.fromkeys(roots, (0, 0, 0))
        is_divisible = True
        for k, node in enumerate(self.order):
            for edge in edges[node]:
                end = place.get(edge[0], k)
                is_divisible &= k <= end  # not if nodes were recorded in several threads
                if edge[0] in leading:
                    first, *_ = self.spans.get(edge, (k,))
                    self.spans[edge] = first, k, end
        self._count_elements(reaching, is_divisible)
        self._has_hook_at = cache(has_hook_at)

    def kept(self, place: int, start: int) -> int:
        """Elements that a segment which begins at cut `start` keeps for the node at `place`."""
        # For a layer none, if its output gradient is already complete when it enters the segment.
        return sum(elements for last, elements in self._retained[place] if start <= last)

    def has_hook_at(self, cut: int) -> bool:
        """Whether a hook would see a gradient that crosses twice. Each edge is probed once."""
        crossing = (edge for edge, (_, last, end) in self.spans.items() if last < cut <= end)
        return any(map(self._has_hook_at, crossing))

    def _ranges(self) -> Iterable[tuple[int, int]]:
        """First and last places between which there is no cut.

        They are those that add to the gradients of one node, whose backward function takes the
        gradients of all its outputs at once; and those of one activation checkpoint.
        """
        ranges: dict[Node | int, tuple[int, int]] = {}
        for (node, _), (first, last, _) in self.spans.items():
            before = ranges.get(node, (first, last))
            ranges[node] = min(first, before[0]), max(last, before[1])
        for k, node in enumerate(self.order):
            if (hook := unpack_hook(node)) is not None:
                ranges[hook] = ranges.get(hook, (k,))[0], k
        return ranges.values()

    def _count_elements(self, reaching: Mapping[Node, int], is_divisible: bool) -> None:
        count = len(self.order)
        self._retained: list[list[tuple[int, int]]] = [[] for _ in range(count + 1)]
        # Changes at each cut: of the elements that cross, and of how many ranges it would divide.
        size, parts = [0] * (count + 2), [0] * (count + 2)
        for first, last in self._ranges():
            parts[first + 1] += 1
            parts[last + 1] -= 1
        for edge, (_, last, end) in self.spans.items():
            shape = gradient_shape(edge)
            elements = prod(shape or ()) * reaching[edge[0]]
            if edge[0] in self.leaves or edge[0] in self.layers:
                self._retained[end].append((last, elements))
            size[last + 1] += elements
            size[end + 1] -= elements
            is_divisible &= shape is not None
        # Elements that cross each cut, infinite if it is closed; and what is kept after it if there
        # are no more cuts.
        crossing = zip(accumulate(size), accumulate(parts), strict=True)
        self.cut_size = [inf if p or not is_divisible else elements for elements, p in crossing]
        kept = [self.kept(k, start=0) for k in range(count)]
        self.remaining = list(accumulate(reversed(kept), initial=0))[::-1]
