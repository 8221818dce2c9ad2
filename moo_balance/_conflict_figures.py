"""Norms and cosines of expected gradients, with intervals, from inner products of batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moo_balance._batch_gradients import Products

_ROUNDING = 1e-12
"""What float64 leaves of a difference of equal squared norms, compared with these."""


@dataclass(frozen=True)
class LossFigures:
    """The gradient of one loss over some parameters.

    Attributes:
        norm: Norm of the expected gradient, in units of the loss per unit of the parameters: the
            root of an unbiased estimate of its square; 0 where that is negative.
        batch_norm: Mean over the batches of the norm of a batch's gradient, in the same units. It
            contains the noise.
        share: ``norm`` divided by the sum over the losses, from 0 to 1.
        signal_to_noise: Squared norm of the expected gradient, divided by the trace of the noise
            covariance of one batch; both are estimated without bias. No unit. It may be negative
            where the noise dominates; infinite without noise, NaN for a zero gradient.
        above_noise: Whether the interval of the squared norm is above 0. False for a zero gradient,
            and with fewer than 3 batches.
    """

    norm: float
    batch_norm: float
    share: float
    signal_to_noise: float
    above_noise: bool


@dataclass(frozen=True)
class PairFigures:
    """The angle between the gradients of two losses over some parameters. No units.

    Attributes:
        cosine: Cosine of the expected gradients, in [-1, 1]; NaN where a squared norm is estimated
            as 0 or less.
        low: Lower end of the interval; -1 where the expected gradient of one of the two is not
            above the noise.
        high: Upper end of the interval; 1 in the same case.
        conflict: Whether the cosine is significantly below 0: also the interval that is widened for
            the number n of pairs, at the level 1 - (1 - level) / n, is below 0.
        batch_cosine: Mean over the batches of the cosine of the two gradients of a batch; NaN where
            a gradient is zero in all batches. Noise of its own for each loss pulls it towards 0,
            noise that the two share towards the cosine of that noise.
    """

    cosine: float
    low: float
    high: float
    conflict: bool
    batch_cosine: float


@dataclass(frozen=True)
class Figures:
    """Losses, and pairs of losses, over some parameters.

    Attributes:
        losses: The gradient of each loss, by name.
        pairs: Each pair of losses, by both names.
    """

    losses: Mapping[str, LossFigures]
    pairs: Mapping[tuple[str, str], PairFigures]

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists and numbers; None in place of NaN and infinity."""
        return {
            "losses": {name: as_json(vars(each)) for name, each in self.losses.items()},
            "pairs": [
                {"losses": list(pair), **as_json(vars(each))} for pair, each in self.pairs.items()
            ],
        }


def as_json(values: Mapping[str, float]) -> dict[str, float | None]:
    """None in place of NaN and infinity, which JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def estimate_figures(names: Sequence[str], products: Products, level: float) -> Figures:
    """All figures over the parameters that the products were taken over.

    Args:
        names: The K losses.
        products: Inner products of B >= 2 batches, in units of their own.
        level: What intervals cover.
    """
    squares, left_out = estimate_squares(products)
    dof, units = len(products.within) - 1, products.units
    quantile = t_quantile(dof, level)
    diagonal = squares.diagonal()
    errors = jackknife_errors(left_out.diagonal(dim1=-2, dim2=-1))
    above = (diagonal > quantile * errors) & (diagonal > 0)
    norms = diagonal.clamp(min=0.0).sqrt() * units
    total = norms.sum().clamp(min=torch.finfo(norms.dtype).tiny)
    batch_norms = products.within.diagonal(dim1=-2, dim2=-1).sqrt()
    columns = (norms, batch_norms.mean(0) * units, norms / total, signal_to_noise(products), above)
    losses = {
        name: LossFigures(*row)
        for name, *row in zip(names, *(column.tolist() for column in columns), strict=True)
    }
    values, low, high = cosine_intervals(squares, left_out, above, quantile)
    indices = list(combinations(range(len(names)), 2))
    # A loss without a gradient in any batch has no pairs to be in conflict.
    compared = math.comb(int((batch_norms > 0).any(0).sum()), 2)
    corrected = t_quantile(dof, 1.0 - (1.0 - level) / max(compared, 1))
    conflicts = cosine_intervals(squares, left_out, above, corrected)[2] < 0
    batch_cosines = mean_cosines(products.within, batch_norms)
    pairs = {
        (names[j], names[k]): PairFigures(
            cosine=float(values[j, k]),
            low=float(low[j, k]),
            high=float(high[j, k]),
            conflict=bool(conflicts[j, k]),
            batch_cosine=float(batch_cosines[j, k]),
        )
        for j, k in indices
    }
    return Figures(losses, pairs)


def estimate_squares(products: Products) -> tuple[Tensor, Tensor]:
    r"""Unbiased inner products of expected gradients, and the same without each single batch.

    .. math:: U = \frac{S S^\top - \sum_b G_b G_b^\top}{B (B - 1)}

    with the gradients :math:`G_b` of batch b, shape [K, P], and their sum S: the mean over all
    pairs of different batches.

    Returns:
        U, shape [K, K]; and shape [B, K, K], infinite with fewer than 3 batches.
    """
    with_sums, within = products.with_sums, products.within
    count = len(within)
    different = with_sums.sum(0) - within.sum(0)
    # Rounding of equal batches does not make a zero gradient of a short one, or a negative square.
    scale = within.sum(0).diagonal().sqrt()
    different = different.masked_fill(different.abs() <= _ROUNDING * scale.outer(scale), 0.0)
    squares = different / (count * (count - 1))
    if count < 3:
        return squares, torch.full_like(within, math.inf)
    # Pairs in which the batch occurs, first or second, and not with itself.
    with_batch = with_sums + with_sums.mT - 2 * within
    return squares, (different - with_batch) / ((count - 1) * (count - 2))


def signal_to_noise(products: Products) -> Tensor:
    """Squared norms of expected gradients over the traces of the noise covariances, shape [K]."""
    count = len(products.within)
    within = products.within.sum(0).diagonal()
    squared_sums = products.with_sums.sum(0).diagonal()
    traces = (within - squared_sums / count) / (count - 1)
    traces = traces.masked_fill(traces <= _ROUNDING * within / count, 0.0)
    return estimate_squares(products)[0].diagonal() / traces


def jackknife_errors(left_out: Tensor) -> Tensor:
    r"""Standard errors from estimates without each single batch, shape [B, ...].

    .. math:: \sqrt{\frac{B - 1}{B} \sum_b (x_b - \bar x)^2}

    Infinite where an estimate is not finite.
    """
    count = len(left_out)
    errors = ((left_out - left_out.mean(0)).square().sum(0) * (count - 1) / count).sqrt()
    return errors.nan_to_num(nan=math.inf, posinf=math.inf)


def cosine_intervals(
    squares: Tensor, left_out: Tensor, above: Tensor, quantile: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of expected gradients, lower and upper ends of their intervals, shape [K, K].

    Args:
        squares: Inner products, shape [K, K].
        left_out: The same without each single batch, shape [B, K, K].
        above: Which of the K gradients are above the noise.
        quantile: Standard errors between a cosine and either end.
    """
    values = _cosines(squares)
    margin = quantile * jackknife_errors(_cosines(left_out))
    known = above & above[:, None] & values.isfinite()
    low = torch.where(known, values - margin, -1.0).clamp(-1.0, 1.0)
    high = torch.where(known, values + margin, 1.0).clamp(-1.0, 1.0)
    return values.clamp(-1.0, 1.0), low, high


def _cosines(squares: Tensor) -> Tensor:
    """Not cut off at 1, so that their spread shows; NaN where a squared norm is not positive."""
    diagonal = squares.diagonal(dim1=-2, dim2=-1)
    norms = torch.where(diagonal > 0, diagonal, math.nan).sqrt()
    return squares / norms.unsqueeze(-1) / norms.unsqueeze(-2)


def mean_cosines(within: Tensor, norms: Tensor) -> Tensor:
    """Means of the cosines within single batches, shape [K, K], where both gradients are there."""
    cosines = within / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    return cosines.nanmean(0).clamp(-1.0, 1.0)


def t_quantile(dof: int, level: float) -> float:
    """The quantile of Student's t between whose negative and itself lies the mass `level`."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    return float(stdtrit(dof, (1.0 + level) / 2))
