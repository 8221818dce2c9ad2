"""Portions of a graph, such that K gradients of what lies in one of them fit into little memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

from torch.autograd.graph import Node

from moo_balance.engine.autograd import Edge, has_hook_at
from moo_balance.engine.base import Problem
from moo_balance.engine.cuts import SMALL, sparing
from moo_balance.engine.linear import LinearWeightGradient, find_linear_layers
from moo_balance.engine.survey import Survey

Choice = Callable[[Survey], Sequence[int]]
"""How to choose where to cut."""


@dataclass
class Portion:
    """Nodes between two cuts.

    Args:
        nodes: What is passed within.
        columns: Other parameters that are reached from here, and in ``last`` those of them that no
            later portion reaches.
        leaving: Edges on which gradients leave for later portions.
        entered: Linear layers whose weights' gradients stay factored, and whose cotangents are
            what enters here.
        layers: Such layers whose cotangents are found here.
    """

    nodes: set[Node]
    columns: list[int]
    last: set[int]
    leaving: list[Edge]
    entered: list[LinearWeightGradient]
    layers: list[LinearWeightGradient]

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
        memory: How much a portion may keep, in multiples of their number, if it can do with that.
    """
    size = sum(problem.params[column].numel() for column in columns)
    allowed = max(memory * size, SMALL)
    if len(problem.losses) * size <= allowed:
        return [_whole(problem, nodes, columns)]
    return parted(Survey(problem, nodes, columns), partial(sparing, allowed=allowed))


def _whole(problem: Problem, nodes: Collection[Node], columns: Collection[int]) -> Portion:
    layers = [layer for layer in find_linear_layers(problem, nodes) if layer.param_index in columns]
    others = set(columns) - {layer.param_index for layer in layers}
    return Portion(set(nodes), sorted(others), others, [], [], layers)


def parted(survey: Survey, choose: Choice) -> list[Portion]:
    """Portions between cuts that are chosen; but none where somebody's hook would see a part."""
    hooked = cache(has_hook_at)
    while True:
        cuts = choose(survey)
        met = {cut: [*filter(hooked, survey.around(cut))] for cut in cuts}
        if not any(met.values()):
            return _described(survey, cuts)
        for cut, edges in met.items():
            if edges:
                survey.close(cut, edges)


def _described(survey: Survey, cuts: Sequence[int]) -> list[Portion]:
    """What is reached from each part, and what leaves it."""
    bounds = list(pairwise([0, *cuts, len(survey.order)]))
    found, later, below = list[Portion](), set[int](), set[Node]()
    for start, end in reversed(bounds):
        inner = survey.order[start:end]
        edges = dict.fromkeys(edge for node in inner for edge in survey.edges[node])
        part = set(inner)
        if start == 0:
            part |= survey.roots & survey.leaves.keys()  # a loss that is a parameter itself
        reached = survey.leaves.keys() & {*part, *(node for node, _ in edges)}
        columns = {survey.leaves[node] for node in reached}
        own = [layer for node, layer in survey.layers.items() if node in part]
        found.append(
            Portion(
                nodes=part,
                columns=sorted(columns),
                last=columns - later,
                leaving=[edge for edge in edges if edge[0] in below],
                entered=[layer for layer in own if layer.edge not in edges],
                layers=[layer for layer in own if layer.edge in edges],
            )
        )
        later |= columns
        below |= part
    return found[::-1]
