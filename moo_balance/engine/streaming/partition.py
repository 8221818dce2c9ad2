"""Segments of a graph, such that K gradients of what lies in one of them fit into little memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch.autograd.graph import Node

from moo_balance.engine.base import Problem
from moo_balance.engine.factored import Factored, factorable
from moo_balance.engine.graph import Edge
from moo_balance.engine.streaming.costs import GraphCosts

SLACK = 2**20
"""Elements, 4 MiB of them in float32: to save less than that is not worth a cut."""


@dataclass
class Segment:
    """Nodes between two cuts, and what is differentiated there.

    Args:
        nodes: The nodes.
        param_indices: Positions of the parameters that they use, factored weights left out.
        layers: Linear layers with factored weights whose output gradients are completed here.
        leaving: Edges from where gradients go on in later segments.
    """

    nodes: set[Node]
    param_indices: list[int] = field(default_factory=list)
    layers: list[Factored] = field(default_factory=list)
    leaving: list[Edge] = field(default_factory=list)


def partition(
    problem: Problem,
    nodes: Collection[Node],
    compared: Collection[int],
    elements_per_param: float,
) -> list[Segment]:
    """Segments from the losses down, each of which keeps about so many elements at most."""
    size = sum(problem.params[k].numel() for k in compared)
    budget = max(elements_per_param * size, SLACK)
    if len(problem.losses) * size <= budget:
        return [_whole_graph(nodes, compared, factorable(problem, nodes))]
    costs = GraphCosts(problem, nodes, compared)
    cuts = choose_cuts(costs, budget)
    if not cuts:
        return [_whole_graph(nodes, compared, costs.layers.values())]
    return build_segments(costs, cuts)


def choose_cuts(costs: GraphCosts, budget: float, slack: float = SLACK) -> list[int]:
    """Where to cut: one segment after the other takes what fits into the budget."""
    cuts, cut = list[int](), _next_cut(costs, 0, budget, slack)
    while cut is not None:
        cuts.append(cut)
        cut = _next_cut(costs, cut, budget, slack)
    return cuts


def _next_cut(costs: GraphCosts, start: int, budget: float, slack: float) -> int | None:
    """Where the segment that begins at `start` ends; None if it is the last one.

    Walk down until the segment keeps more than the budget, then go back to the narrowest cut: at
    most to half of what the segment could have, so that no node is walked past many times. If the
    budget is too small for every cut, as when a wide activation crosses each of them, it is what
    the best cut needs, and some slack.
    """
    kept, limit, candidates = 0, budget, list[tuple[int, int]]()
    for place in range(start, len(costs.order)):
        kept += costs.kept(place, start)
        if kept > limit and candidates:
            fitting = [(k, cut) for k, cut in candidates if k + costs.cut_size[cut] <= limit]
            half = fitting[-1][0] / 2
            fitting.sort(key=lambda pair: (pair[0] < half, costs.cut_size[pair[1]], -pair[1]))
            for _, cut in fitting:
                if not costs.meets_hooks(cut):
                    return cut
            limit, candidates = budget, []
        cut = place + 1
        if kept and costs.cut_size[cut] < costs.remaining[cut]:
            best = kept + costs.cut_size[cut] + slack
            limit = max(budget, min(limit, best) if candidates else best)
            candidates.append((kept, cut))
    return None


def build_segments(costs: GraphCosts, cuts: Sequence[int]) -> list[Segment]:
    """The segments between some cuts."""
    bounds = pairwise([0, *cuts, len(costs.order)])
    segments = [Segment(set(costs.order[start:end])) for start, end in bounds]
    for edge, place in costs.completed.items():
        segment, node = segments[bisect_right(cuts, place)], edge[0]
        if node in costs.leaves:
            segment.param_indices.append(costs.leaves[node])
        elif node not in segment.nodes:
            segment.leaving.append(edge)
        if node in costs.layers:
            segment.layers.append(costs.layers[node])
    return segments


def _whole_graph(
    nodes: Collection[Node], compared: Collection[int], layers: Iterable[Factored]
) -> Segment:
    layers = [layer for layer in layers if layer.column in compared]
    others = set(compared) - {layer.column for layer in layers}
    return Segment(set(nodes), sorted(others), layers)
