"""K gradients that pass a graph segment by segment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moo_balance.engine.autograd import Edge, edge_of, explain_donated_buffers, gradient_edge
from moo_balance.engine.base import Problem, Row
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
        averager, count = self.problem.averager, len(self.arrived)
        params = [self.problem.params[k] for k in segment.param_indices]
        rows: Iterable[Row] = self._differentiate(segment, params)
        if averager is not None and params:
            names = [f"{name}, segment {number}" for name in self.problem.names]
            rows = average_over_ranks(zip(names, rows, strict=True), averager, params)
        jacobian = Jacobian([list(row) for row in rows])
        if params:
            yield jacobian.gramian(dtype, self.problem.losses[0].device), tuple(range(count))
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
                gradients = _gradients(entering, inputs)
                leaving = gradients[len(params) : len(inputs) - len(segment.layers)]
                for edge, gradient in zip(segment.leaving, leaving, strict=True):
                    if gradient is not None:
                        arrived[edge] = gradient
                recorder.append_to_layers(gradients[len(params) + len(leaving) :])
                yield gradients[: len(params)]


def _gradients(entering: Mapping[Edge, Tensor], inputs: Sequence[Any]) -> Row:
    """The gradients of one loss, from where it has arrived."""
    if not entering or not inputs:
        return [None] * len(inputs)
    roots, outputs = [*map(gradient_edge, entering)], [*entering.values()]
    try:
        return torch.autograd.grad(roots, inputs, outputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        explain_donated_buffers(error)
        raise
