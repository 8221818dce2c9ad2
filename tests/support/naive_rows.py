"""What a BalancedOptimizer tells a method of single coordinates, the slow obvious way."""

from __future__ import annotations

import torch
from torch import Tensor

from moo_balance.weighting import Statistics, Weighting
from moo_balance.weighting.rows import RowStatistics, RowWeighting


class NaiveRows:
    """Statistics of dense Jacobians [K, P], and what a method keeps of their rows.

    For a method that does not look at single coordinates, everything stays as it is.

    Attributes:
        kept: By loss, what is kept of its gradients so far, as one vector.
    """

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.method: RowWeighting | None = None
        self.kept: dict[str, Tensor] = {}

    def tell(self, statistics: Statistics, rows: Tensor) -> Statistics:
        """The statistics of a step with those of its rows, which are tracked."""
        method = self.method = self.weighting.needs(statistics.step).rows
        if method is None or statistics.gramian is None:
            return statistics
        told = RowStatistics()
        if method.uses_magnitudes:
            told = RowStatistics(rows.abs().amax(1), rows.abs().mean(1))
        if method.keeps:
            kept = self._track(statistics, rows)
            told = told._replace(gramian=kept @ kept.T)
            if method.uses_total:
                totals = [method.summand(k, g).sum() for k, g in zip(kept, rows, strict=True)]
                told = told._replace(total=torch.stack(totals))
        return statistics._replace(rows=told)

    def _track(self, statistics: Statistics, rows: Tensor) -> Tensor:
        assert self.method is not None
        factors = self.method.row_factors(statistics)
        scaled = rows if factors is None else rows * factors[:, None]
        for name, row in zip(statistics.names, scaled, strict=True):
            self.kept[name] = self.method.track(self.kept.get(name, torch.zeros_like(row)), row)
        return torch.stack([self.kept[name] for name in statistics.names])

    def combine(self, coefficients: Tensor, names: tuple[str, ...], rows: Tensor) -> Tensor | None:
        """What the coefficients make of the rows; None for a combination by coordinate."""
        if self.method is None or self.method.combines == "gradients":
            return coefficients @ rows
        if self.method.combines == "kept":
            return coefficients @ torch.stack([self.kept[name] for name in names])
        return None
