"""K gradients that pass a graph segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moo_balance.engine.autograd import edge_of, gradient_edge
from moo_balance.engine.base import Problem, Row, gradients
from moo_balance.engine.distributed import average_over_ranks
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.linear import OutputGradientRecorder
from moo_balance.engine.streaming.partition import Segment


class BackwardSweep:
    """The gradients of K losses, at the edges where they have arrived.

    A sweep takes them down segment by segment::

        loss_1 ... loss_K       arrived[k] = {edge of loss_k: its own gradient}
        --------------------
        segment 0: the heads    K calls of autograd.grad, from the arrived gradients
           |                      to the parameters: K rows --> [K, K], then freed
           v                      to the leaving edges
        --------------------    arrived[k] = {edge of the features: gradient of loss_k}
        segment 1: layers       the same; what had arrived of a loss is freed with its call
           |
           v
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        losses = zip(problem.losses, problem.grad_outputs(), strict=True)
        self.arrived = [{edge_of(loss): gradient} for loss, gradient in losses]

    def pass_segment(
        self, segment: Segment, number: int, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Inner products of the gradients that are completed here, each with its losses."""
        problem, averager = self.problem, self.problem.averager
        params = [problem.params[k] for k in segment.param_indices]
        local = self._differentiate(segment, params)
        if averager is None or not params:
            rows = [list(row) for row in local]
        else:
            names = (f"{name}, segment {number}" for name in problem.names)
            rows = average_over_ranks(zip(names, local, strict=True), averager, params)
        yield Jacobian(rows).gramian(dtype, problem.losses[0].device), tuple(range(len(rows)))
        for layer in segment.layers:
            if layer.losses:
                yield layer.products(dtype), layer.losses
            layer.output_gradients = []

    def _differentiate(self, segment: Segment, params: Sequence[Tensor]) -> Iterator[Row]:
        """The K rows of the parameters, one after the other."""
        edges = [*segment.leaving, *(layer.edge for layer in segment.layers)]
        inputs = [*params, *map(gradient_edge, edges)]
        with OutputGradientRecorder(segment.layers) as recorder:
            for arrived in self.arrived:
                here = [edge for edge in arrived if edge[0] in segment.nodes]
                entering = {edge: arrived.pop(edge) for edge in here}
                row: Row = [None] * len(inputs)
                if entering:
                    roots = [*map(gradient_edge, entering)]
                    row = gradients(roots, [*entering.values()], inputs, retain_graph=True)
                after_params = iter(row[len(params) :])
                for edge in segment.leaving:
                    if (gradient := next(after_params)) is not None:
                        arrived[edge] = gradient
                recorder.append_to_layers(after_params)
                yield row[: len(params)]
