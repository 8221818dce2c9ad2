"""K gradients on their way down a graph, portion by portion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moo_balance.engine.autograd import Edge, block_gradients, edge_of, gradient_edge
from moo_balance.engine.base import Problem, Row, gradients
from moo_balance.engine.distributed import average_over_ranks
from moo_balance.engine.jacobian import Jacobian, add
from moo_balance.engine.linear import LinearWeightGradient, OutputGradientRecorder
from moo_balance.engine.portions import Portion

Rows = list[list[Tensor | None]]
Products = tuple[Tensor, tuple[int, ...]]
"""Inner products, and the losses whose gradients are multiplied."""


class Descent:
    """K gradients on their way down, at the edges that they have reached."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.count = len(problem.losses)
        self.arrived: dict[Edge, list[Tensor | None]] = {}
        self.unfinished: dict[int, list[Tensor | None]] = {}
        for k, (loss, seed) in enumerate(zip(problem.losses, problem.grad_outputs(), strict=True)):
            self._arrive(edge_of(loss), k, seed)

    def through(self, portion: Portion, number: int, dtype: torch.dtype) -> Iterator[Products]:
        """Pass a portion, and give the inner products of the gradients that are found there.

        First those of layers whose cotangents are what enters: these are let go on the way.
        """
        for layer in portion.entered:
            layer.output_gradients = list(self.arrived.get(layer.edge, ()))
        yield from _used_up(portion.entered, dtype)
        rows = self._joined(self._rows(portion, number), portion)
        last = {place for place, column in enumerate(portion.columns) if column in portion.last}
        if last:
            products = Jacobian(rows, last).gramian(dtype, self.problem.losses[0].device)
            yield products, tuple(range(self.count))
        yield from _used_up(portion.layers, dtype)

    def _rows(self, portion: Portion, number: int) -> Rows:
        """K rows of the portion's parameters."""
        params = [self.problem.params[column] for column in portion.columns]
        averager = self.problem.averager if params else None
        here = [edge for edge in self.arrived if edge[0] in portion.nodes]
        entering = {edge: self.arrived.pop(edge) for edge in here}
        names = (f"{name}, portion {number}" for name in self.problem.names)
        open_to_later = portion.leaving if portion.is_led_back_to else ()
        with block_gradients(open_to_later), OutputGradientRecorder(portion.layers) as arrivals:
            rows = (self._row(portion, entering, k, params, arrivals) for k in range(self.count))
            if averager is None:
                return [list(row) for row in rows]
            return average_over_ranks(zip(names, rows, strict=True), averager, params)

    def _row(
        self,
        portion: Portion,
        entering: Mapping[Edge, list[Tensor | None]],
        k: int,
        params: Sequence[Tensor],
        arrivals: OutputGradientRecorder,
    ) -> Row:
        """One loss; what it enters with is let go afterwards."""
        edges = (*portion.leaving, *(layer.edge for layer in portion.layers))
        found = iter(_differentiated(entering, k, [*params, *map(gradient_edge, edges)]))
        row = [next(found) for _ in params]
        for edge, cotangent in zip(portion.leaving, found, strict=False):
            self._arrive(edge, k, cotangent)
        arrivals.append_to_layers(found)
        return row

    def _arrive(self, edge: Edge, k: int, cotangent: Tensor | None) -> None:
        each = self.arrived.setdefault(edge, [None] * self.count)
        each[k] = add(each[k], cotangent)

    def _joined(self, rows: Rows, portion: Portion) -> Rows:
        """With what earlier portions gave; and what later ones will add to is put aside."""
        for place, column in enumerate(portion.columns):
            if column in self.unfinished:
                for row, before in zip(rows, self.unfinished.pop(column), strict=True):
                    row[place] = add(before, row[place])
            if column not in portion.last:
                self.unfinished[column] = [row[place] for row in rows]
        return rows


def _differentiated(
    entering: Mapping[Edge, list[Tensor | None]], k: int, inputs: Sequence[Any]
) -> Row:
    reached = {edge: each[k] for edge, each in entering.items() if each[k] is not None}
    if not reached:
        return [None] * len(inputs)
    for each in entering.values():
        each[k] = None
    roots = [gradient_edge(edge) for edge in reached]
    seeds = [cotangent for cotangent in reached.values() if cotangent is not None]
    return gradients(roots, seeds, inputs, retain_graph=True)


def _used_up(layers: Iterable[LinearWeightGradient], dtype: torch.dtype) -> Iterator[Products]:
    """Products of factored gradients, which are let go."""
    for layer in layers:
        if layer.losses:
            yield layer.products(dtype), layer.losses
        layer.output_gradients = []
