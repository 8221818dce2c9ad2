"""K gradients that pass a graph segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moo_balance.engine.base import Problem
from moo_balance.engine.differentiation import by_grad
from moo_balance.engine.factored import Arrivals
from moo_balance.engine.graph import Edge, edge_of, gradient_edge
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.kept_rows import averaged
from moo_balance.engine.rows import Row
from moo_balance.engine.streaming.partition import Segment

Gradients = dict[Edge, list[Tensor | None]]
"""By the edge at which they have arrived: one gradient for each loss, None if it is not reached."""


class BackwardSweep:
    """The gradients of K losses, where they have arrived.

    A sweep takes them down segment by segment::

        loss_1 ... loss_K       arrived = {edge of each loss: its own gradient}
        --------------------
        segment 0: the heads    K calls of autograd.grad, from the arrived gradients
           |                      to the parameters: K rows --> [K, K], then freed
           v                      to the leaving edges: K gradients
        --------------------    arrived = {edge of the features: K gradients}
        segment 1: layers       the same; what had arrived of a loss is freed with its call
           |
           v
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.arrived: Gradients = {}
        for k, (loss, gradient) in enumerate(zip(problem.losses, problem.seeds(), strict=True)):
            self._arrive(edge_of(loss), k, gradient)

    def pass_segment(
        self, segment: Segment, number: int, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Inner products of the gradients that are completed here, each with its losses."""
        rows = self._rows(segment, number)
        if segment.param_indices:
            device = self.problem.losses[0].device
            yield Jacobian(rows).gramian(dtype, device), tuple(range(len(rows)))
        for layer in segment.layers:
            if layer.reached:
                yield layer.products(dtype), layer.reached
            layer.cotangents = []

    def _rows(self, segment: Segment, number: int) -> list[list[Tensor | None]]:
        """The K rows of the segment's parameters, averaged if there are ranks to average over."""
        problem = self.problem
        here = [edge for edge in self.arrived if edge[0] in segment.nodes]
        entering = {edge: self.arrived.pop(edge) for edge in here}
        params = [problem.params[k] for k in segment.param_indices]
        names = (f"{name}, segment {number}" for name in problem.names)
        with Arrivals(segment.layers) as recorder:
            rows = (
                self._row(segment, entering, k, params, recorder)
                for k in range(len(problem.losses))
            )
            parallel = problem.parallel if params else None
            problem = problem._replace(params=params, parallel=parallel)
            return averaged(zip(names, rows, strict=True), problem)

    def _row(
        self,
        segment: Segment,
        entering: Gradients,
        k: int,
        params: Sequence[Tensor],
        recorder: Arrivals,
    ) -> Row:
        """Differentiate loss k; what had arrived of it is freed when this returns."""
        edges = [*segment.leaving, *(layer.edge for layer in segment.layers)]
        inputs = [*params, *map(gradient_edge, edges)]
        arrived = {edge: g for edge, each in entering.items() if (g := each[k]) is not None}
        for each in entering.values():
            each[k] = None
        found: Row = [None] * len(inputs)
        if arrived and inputs:
            roots = [gradient_edge(edge) for edge in arrived]
            found = by_grad(roots, list(arrived.values()), inputs, retain_graph=True)
        rest = iter(found)
        row = [next(rest) for _ in params]
        for edge in segment.leaving:
            self._arrive(edge, k, next(rest))
        recorder.hand_out(rest)
        return row

    def _arrive(self, edge: Edge, k: int, gradient: Tensor | None) -> None:
        # Once for each loss at most: it is complete, and no loss leads back to its own edge.
        if gradient is not None:
            self.arrived.setdefault(edge, [None] * len(self.problem.losses))[k] = gradient
