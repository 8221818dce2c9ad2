"""Segments of a graph, such that K gradients of what lies in one of them fit into little memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch.autograd.graph import Node

from moo_balance.engine.autograd import Edge
from moo_balance.engine.base import Problem
from moo_balance.engine.linear import LinearWeightGradient
from moo_balance.engine.streaming.costs import GraphCosts

SLACK = 2**20
"""Elements, 4 MiB of them in float32: to save less than that is not worth a cut."""


class Segment(NamedTuple):
    """Nodes between two cuts, and what is differentiated there.

    Args:
        nodes: The nodes.
        param_indices: Positions of the parameters that they use, factored weights left out.
        layers: Linear layers with factored weights whose output gradients are completed here.
        leaving: Edges from where gradients go on in later segments.
    """

    nodes: set[Node]
    param_indices: list[int]
    layers: list[LinearWeightGradient]
    leaving: list[Edge]


def partition(
    problem: Problem, nodes: Collection[Node], elements_per_param: float
) -> list[Segment]:
    """Segments from the losses down which keep about so many elements; none for a whole graph."""
    size = sum(param.numel() for param in problem.params)
    budget = max(elements_per_param * size, SLACK)
    if len(problem.losses) * size <= budget:
        return []
    costs = GraphCosts(problem, nodes)
    return build_segments(costs, choose_cuts(costs, budget))


def choose_cuts(costs: GraphCosts, budget: float, slack: float = SLACK) -> list[int]:
    """Where to cut: one segment after the other takes what fits into the budget.

    Walk down until the segment keeps more than the budget. Then go back to the narrowest cut, at
    most to half of what the segment could have: so no node is walked past many times. If the
    budget is too small for every cut, as when a wide activation crosses each of them, it is what
    the best cut needs, and some slack.
    """
    cuts, start, place = list[int](), 0, 0
    kept, limit, candidates = 0, budget, list[tuple[int, int]]()
    while place < len(costs.order):
        kept += costs.kept(place, start)
        if kept > limit and candidates:
            fitting = [(k, cut) for k, cut in candidates if k + costs.cut_size[cut] <= limit]
            half = fitting[-1][0] / 2
            fitting.sort(key=lambda pair: (pair[0] < half, costs.cut_size[pair[1]], -pair[1]))
            found = next((cut for _, cut in fitting if not costs.has_hook_at(cut)), None)
            limit, candidates = budget, []
            if found is not None:
                cuts.append(found)
                start, place, kept = found, found, 0
                continue
        place += 1
        if kept and costs.cut_size[place] < costs.remaining[place]:
            needed = kept + costs.cut_size[place] + slack
            limit = max(budget, min(limit, needed) if candidates else needed)
            candidates.append((kept, place))
    return cuts


def build_segments(costs: GraphCosts, cuts: Sequence[int]) -> list[Segment]:
    """The segments between some cuts; none without cuts."""
    bounds = pairwise([0, *cuts, len(costs.order)]) if cuts else ()
    segments = [Segment(set(costs.order[start:end]), [], [], []) for start, end in bounds]
    for edge, (_, last, _) in costs.spans.items() if cuts else ():
        segment, node = segments[bisect_right(cuts, last)], edge[0]
        if node in costs.leaves:
            segment.param_indices.append(costs.leaves[node])
        elif node not in segment.nodes:
            segment.leaving.append(edge)
        if node in costs.layers:
            segment.layers.append(costs.layers[node])
    return segments
