"""K rows that are kept until they are combined."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from moo_balance.engine.base import (
    Linearization,
    Problem,
    Window,
    weighted_backward,
    weighted_sum,
)
from moo_balance.engine.delivery import delivered
from moo_balance.engine.differentiation import is_hooked, local_rows
from moo_balance.engine.factored import Factored
from moo_balance.engine.jacobian import Jacobian
from moo_balance.engine.products import added
from moo_balance.engine.rows import Row, add_rows, add_to_grads
from moo_balance.engine.sharded import is_sharded, sharded_inner_products


class KeptRows(Linearization):
    """One batch: rows only if somebody asks for their Gramian."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.dtype = dtype
        self.jacobian: Jacobian | None = None
        self.layers: list[Factored] = []

    def gramian(self) -> Tensor:
        problem, rows = self.problem, self.take()
        columns, device = measured_columns(problem), problem.losses[0].device
        if is_sharded(problem.params):
            gramian = sharded_inner_products(rows, columns, self.dtype, device)
            self.jacobian = Jacobian(rows, ())
        else:
            self.jacobian = Jacobian(rows, columns)
            gramian = self.jacobian.gramian(self.dtype, device)
        return unscaled(with_layers(gramian, self.layers, columns, self.dtype), problem)

    def take(self) -> list[list[Tensor | None]]:
        """The rows; averaged if there are ranks to average over."""
        return averaged(zip(self.problem.names, self.differentiate(), strict=True), self.problem)

    def differentiate(self) -> Iterable[Row]:
        """This rank's own rows, one after the other."""
        return local_rows(self.problem, self.layers)

    def accumulate(self, coefficients: Tensor) -> None:
        if self.jacobian is None:
            weighted_backward(self.problem, coefficients)
        else:
            add_to_grads(self.total(self.jacobian, coefficients), self.problem.params)

    def total(self, jacobian: Jacobian, coefficients: Tensor) -> Row:
        """The weighted gradient; uses the rows up."""
        total = jacobian.combination(coefficients)
        for layer in self.layers:
            total[layer.column] = layer.combination(coefficients)
        return total

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if self.jacobian is None or is_hooked(problem.params):
            return weighted_sum(problem, coefficients)
        free = coefficients if problem.scale is None else coefficients / problem.scale
        gradients = self.total(self.jacobian, free)
        value = weighted_sum(problem, coefficients).detach()
        return delivered(value, gradients, problem.params)


class RowWindow(Window):
    """Several micro-batches: K rows that grow."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows: dict[str, Row] = {}

    def add(self, problem: Problem) -> None:
        self.rows = self.joined(problem)

    def close(self, problem: Problem) -> Linearization:
        return _ClosedWindow(self, problem)

    def joined(self, problem: Problem) -> dict[str, Row]:
        """The rows so far and those of one more micro-batch; this rank's own."""
        rows = dict(self.rows)
        for name, row in zip(problem.names, local_rows(problem), strict=True):
            rows[name] = add_rows(rows[name], row) if name in rows else row
        return rows


class _ClosedWindow(KeptRows):
    """A window and its last micro-batch."""

    def __init__(self, window: RowWindow, problem: Problem) -> None:
        super().__init__(problem, window.dtype)
        self.window = window

    def take(self) -> list[list[Tensor | None]]:
        return averaged(self.window.joined(self.problem).items(), self.problem)

    def accumulate(self, coefficients: Tensor) -> None:
        if self.jacobian is None:
            self.jacobian = Jacobian(self.take(), ())
        super().accumulate(coefficients)


def averaged(named: Iterable[tuple[str, Row]], problem: Problem) -> list[list[Tensor | None]]:
    """Rows averaged over the ranks, each on its way while the next is computed."""
    parallel, params = problem.parallel, problem.params
    if parallel is None or is_sharded(params):
        return [list(row) for _, row in named]
    pending = [parallel.start(name, row, params) for name, row in named]
    return [list(row) for row in parallel.finish(pending, params)]


def with_layers(
    gramian: Tensor, layers: Sequence[Factored], columns: Collection[int], dtype: torch.dtype
) -> Tensor:
    """Inner products, and those of factored gradients at `columns`."""
    for layer in layers:
        if layer.reached and layer.column in columns:
            gramian = added(gramian, layer.products(dtype), layer.reached)
    return gramian


def measured_columns(problem: Problem) -> Collection[int]:
    """Positions of the parameters over which inner products are taken."""
    if problem.measured is None:
        return range(len(problem.params))
    return {k for k, param in enumerate(problem.params) if id(param) in problem.measured}


def unscaled(gramian: Tensor, problem: Problem) -> Tensor:
    """Without the loss scale: a power of two, which enters both sides of every product."""
    return gramian if problem.scale is None else gramian / problem.scale.to(gramian) ** 2
