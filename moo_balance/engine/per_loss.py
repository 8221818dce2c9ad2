"""The reference engine: one ``autograd.grad`` per loss, unreachable parameters skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.engine.base import Engine, Linearization, Problem, weighted_backward, weighted_sum
from moo_balance.engine.rows import Row, combine, inner_products


@dataclass(frozen=True)
class PerLoss(Engine):
    """Differentiate each loss once and keep the K gradients until they are combined.

    Time: K backward passes, each through the part of the graph its loss reaches. Memory: the
    gradients themselves, at most K·P numbers; a parameter that a loss does not reach takes none.

    Gradients are written to the wrapped optimizer's parameters. A method that needs no Gramian
    costs one ordinary backward pass.

    Args:
        dtype: Precision of the Gramian, ``torch.float32`` (default) or ``torch.float64``; a
            gradient of higher precision keeps its own.
    """

    dtype: torch.dtype = torch.float32

    def linearize(self, problem: Problem) -> Linearization:
        return _Rows(problem, self.dtype)


class _Rows(Linearization):
    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        self.problem = problem
        self.dtype = dtype
        self.rows: Sequence[Row] | None = None

    def gramian(self) -> Tensor:
        problem = self.problem
        self.rows = rows = differentiate(problem)
        columns = [
            column
            for column, param in enumerate(problem.params)
            if problem.measured is None or id(param) in problem.measured
        ]
        gramian = inner_products(rows, columns, self.dtype)
        # The scale is a power of two, and enters both sides of every product.
        return gramian if problem.scale is None else gramian / problem.scale.to(gramian) ** 2

    def accumulate(self, coefficients: Tensor) -> None:
        if self.rows is None:
            weighted_backward(self.problem, coefficients)
        else:
            combine(self.rows, coefficients, self.problem.params)

    def combined(self, coefficients: Tensor) -> Tensor:
        return weighted_sum(self.problem, coefficients)


def differentiate(problem: Problem) -> Sequence[Row]:
    """The K rows. The graph is freed with the last loss unless it shall be kept."""
    last = len(problem.losses) - 1
    return [
        torch.autograd.grad(
            loss,
            problem.params,
            grad_outputs=seed,
            retain_graph=problem.retain_graph or k < last,
            allow_unused=True,
        )
        for k, (loss, seed) in enumerate(zip(problem.losses, problem.seeds(), strict=True))
    ]
