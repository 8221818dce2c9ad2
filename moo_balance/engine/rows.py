"""Whole rows, for methods that look at single coordinates of gradients.

gramian():         K rows, averaged over ranks, stay whole --> [K, K], as ever
part(k, p):        what this rank holds of the gradient of loss k at parameter p, unscaled
map(function):     function(k, p) of such parts --> K other rows, such as averages over steps
reduce(function):  function(k, p), summed over parameters and shards --> [K]
add_to_grad(c):    c_1 row_1 + ..., or of the other rows, or a function of c_1 row_1, ...,
                   parameter by parameter --> .grad
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from moo_balance.engine.base import (
    Linearization,
    Row,
    deliver,
    precomputed_gradient,
    weighted_sum,
)
from moo_balance.engine.distributed import (
    as_shard_of,
    is_sharded,
    local_part,
    sharded_as,
    sharded_gramian,
    sharding_of,
)
from moo_balance.engine.jacobian import Jacobian, as_scalars
from moo_balance.engine.linear import gramian_in_range
from moo_balance.errors import BalanceError
from moo_balance.functional._checks import at_least_float32, widest_dtype

if TYPE_CHECKING:
    from moo_balance.engine.per_loss import PerLossLinearization

Combination: TypeAlias = Callable[[Sequence[Tensor], int, Tensor], Tensor]
"""The gradient of a parameter from those of the losses that reach it; which parameter that is."""


class WholeRows(Linearization):
    """A linearization whose rows can be read once the Gramian has been requested.

    Attributes:
        rows: By loss, a gradient for each parameter; it may carry a loss scale.
        others: Rows without a scale that are combined in their place, if there are any.
        combination: What takes the place of a sum, if anything does.
    """

    def __init__(self, inner: PerLossLinearization) -> None:
        self.inner, self.problem = inner, inner.problem
        self.rows: list[list[Tensor | None]] = []
        self.others: Sequence[Row] | None = None
        self.combination: Combination | None = None

    def gramian(self) -> Tensor:
        params = self.problem.params
        for row in self.inner.take_rows():
            pairs = zip(row, params, strict=True)
            self.rows.append([None if g is None else sharded_as(p, _check(g)) for g, p in pairs])
        gramian = self.inner.correct(self.products(self.rows, self.problem.scale))
        self.projected = self.inner.projected
        return gramian

    def products(self, rows: Sequence[Row], scale: Tensor | None = None) -> Tensor:
        """Inner products of rows over the compared parameters; the rows stay as they are."""
        problem, dtype = self.problem, self.inner.dtype
        device = problem.losses[0].device
        compared = None if problem.compared is None else frozenset(problem.compared)
        if is_sharded(problem.params):
            return sharded_gramian(rows, compared, dtype, device, scale)
        jacobian = Jacobian([list(row) for row in rows], compared)
        return gramian_in_range(jacobian, (), compared, dtype, device, scale)

    # ------------------------------------------------------------ coordinates

    def part(self, loss: int, param_index: int) -> Tensor | None:
        """What this rank holds of a gradient, in float32 or better and without the loss scale."""
        gradient = self.rows[loss][param_index]
        if gradient is None:
            return None
        part, scale = at_least_float32(local_part(gradient)), self.problem.scale
        return part if scale is None else part / scale.to(part)

    def map(self, function: Callable[[int, int], Tensor | None]) -> list[list[Tensor | None]]:
        """Other rows, from what this rank holds of each: a function of loss and parameter."""
        params = self.problem.params
        return [
            [
                None if (part := function(k, p)) is None else as_shard_of(param, part)
                for p, param in enumerate(params)
            ]
            for k in range(len(self.rows))
        ]

    def reduce(
        self, function: Callable[[int, int], Tensor | None], largest: bool = False
    ) -> Tensor:
        """Sums [K] of scalars over the compared parameters and their shards, or the `largest`."""
        total = torch.zeros(len(self.rows), device=self.problem.losses[0].device)
        total = total.to(widest_dtype(total.device))
        for (mesh, dims), members in self._families().items():
            values = torch.stack(
                [
                    _fold([function(k, p) for p in members], total, largest)
                    for k in range(len(total))
                ]
            )
            for dim in dims:
                op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
                dist.all_reduce(values, op=op, group=mesh.get_group(dim))
            total = torch.maximum(total, values) if largest else total + values
        return total

    def count_elements(self) -> int:
        """How many elements the compared parameters have.

        Not those that a loss reaches: a compiled graph has zeros in place of missing gradients.
        """
        return sum(self.problem.params[p].numel() for p in self._positions())

    def _positions(self) -> Sequence[int]:
        compared = self.problem.compared
        return range(len(self.problem.params)) if compared is None else sorted(compared)

    def _families(self) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
        """The compared parameters, by how they are sharded."""
        families: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for p in self._positions():
            families.setdefault(sharding_of(self.problem.params[p]), []).append(p)
        return families

    # ------------------------------------------------------------ combination

    def add_to_grad(self, coefficients: Tensor) -> None:
        if not self.rows:  # a step between two refreshes
            self.inner.add_to_grad(coefficients)
            return
        scale = self.problem.scale
        if self.others is not None and scale is not None:
            coefficients = coefficients * scale.to(coefficients)
        deliver(self._combine(coefficients), self.problem)

    def combined(self, coefficients: Tensor) -> Tensor:
        problem = self.problem
        if not self.rows:
            return self.inner.combined(coefficients)
        value = weighted_sum(problem, coefficients).detach()
        if self.others is None and problem.scale is not None:
            coefficients = coefficients / problem.scale
        return precomputed_gradient(value, self._combine(coefficients), problem)

    def _combine(self, coefficients: Tensor) -> Row:
        """The gradient of all parameters; the rows are given up."""
        rows, self.rows = self.rows, []
        if self.combination is not None:
            return self._combine_coordinates(self.combination, rows, coefficients)
        if self.others is not None:
            rows, self.others = [list(row) for row in self.others], None
        total = Jacobian(rows, ()).combine(coefficients)
        pairs = zip(total, self.problem.params, strict=True)
        return [None if g is None else g.to(param.dtype) for g, param in pairs]

    def _combine_coordinates(
        self, combination: Combination, rows: list[list[Tensor | None]], coefficients: Tensor
    ) -> Row:
        factors = as_scalars(coefficients)
        total: list[Tensor | None] = []
        for p, param in enumerate(self.problem.params):
            parts = [
                at_least_float32(local_part(gradient)) * factor
                for row, factor in zip(rows, factors, strict=True)
                if (gradient := row[p]) is not None
            ]
            for row in rows:
                row[p] = None
            together = combination(parts, p, param).to(param.dtype) if parts else None
            total.append(None if together is None else as_shard_of(param, together))
        return total


def _check(gradient: Tensor) -> Tensor:
    """Refuse a gradient whose coordinates do not stand for themselves."""
    if gradient.is_sparse or gradient.is_complex():
        kind = "sparse" if gradient.is_sparse else "complex"
        raise BalanceError(
            "Gradients should be dense and real for a method that looks at their single "
            f"coordinates. Found a {kind} one of shape {tuple(gradient.shape)}. Use "
            "`sparse=False`, or a method that compares whole gradients."
        )
    return gradient


def _fold(scalars: Sequence[Tensor | None], like: Tensor, largest: bool) -> Tensor:
    """The sum of scalars, or the largest one; 0 of none."""
    there = [scalar.to(like.device, like.dtype) for scalar in scalars if scalar is not None]
    if not there:
        return like.new_zeros(())
    return torch.stack(there).amax() if largest else torch.stack(there).sum()
