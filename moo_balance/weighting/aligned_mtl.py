"""Aligned-MTL: gradients made orthogonal and equally long, as little changed as possible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional._checks import check_square, precision, result_dtype
from moo_balance.functional._pair import Pair, read_pair
from moo_balance.weighting._arguments import check_choice
from moo_balance.weighting._reduction import Reduction, ReductionWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class AlignedMTL(ReductionWeighting):
    r"""Independent component alignment: all principal components of the gradients equally long.

    With the eigenvalues :math:`s_r` and eigenvectors :math:`V` of the Gramian :math:`G`,

    .. math::
        B = \sqrt{\hat s}\; V \operatorname{diag}(s)^{-1/2}\, V^\top, \qquad
        \hat g_i = \sum_j B_{ij}\, g_j, \qquad
        d = \sum_i \hat g_i

    The aligned gradients :math:`\hat g_i` are orthogonal and have the squared length
    :math:`\hat s`, which `scale` chooses: ``"min"`` the smallest eigenvalue, ``"median"`` the
    median (the lower one of two), ``"rmse"`` the mean, as it is called in the official code.

    Where gradients depend on one another, only eigenvalues that are above their rounding count:
    above :math:`4 K \varepsilon` times the largest, with :math:`\varepsilon` that of the Gramian's
    dtype (in the code :math:`K \varepsilon`, which rounding can exceed). In float32 a gradient that
    is about a thousand times shorter than another one is not told from zero.

    Coefficients: have no fixed sum, and may be negative.

    A loss may rise: the direction opposes none of the *aligned* gradients.

    Args:
        scale: :math:`\hat s`, one of the above. Default ``"min"`` (paper; LibMTL and TorchJD).
        reduction: Add the aligned gradients (``"sum"``) or average them (``"mean"``). Default
            ``"sum"`` (official code and LibMTL; TorchJD averages).
        preference: Shares of the aligned gradients in the sum, by name, the "task weights" of the
            paper. Default None, equal.
        every: Solve each n-th step only, and keep the coefficients in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses.

    Source: Senushkin et al., *Independent Component Alignment for Multi-Task Learning* (CVPR 2023),
    arXiv 2305.19000, Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import AlignedMTL
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> AlignedMTL().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.0000, 0.5000])
    """

    scale: Literal["min", "median", "rmse"] = "min"
    reduction: Reduction = "sum"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scale", ("min", "median", "rmse"))

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        check_square(gramian)
        shares = self.shares(statistics.names)
        dtype, rounding = result_dtype(gramian), precision(gramian)
        if len(shares) == 1:
            return {"weights": gramian.new_tensor(shares, dtype=dtype)}
        if len(shares) == 2:
            pair = read_pair(gramian)
            weights = _align_two(pair, shares, self.scale == "rmse", rounding)
            return {"weights": gramian.new_tensor(weights, dtype=dtype)}
        from moo_balance.functional._alignment import align  # loads NumPy
        from moo_balance.functional._directions import directions

        aligned = align(directions(gramian), self.scale, rounding).dot(shares)
        return {"weights": torch.from_numpy(aligned).to(gramian.device, dtype)}


def _align_two(pair: Pair, shares: Sequence[float], mean: bool, precision: float) -> list[float]:
    """The closed form: B is a multiple of the inverse square root of a matrix [2, 2].

    That of A is (adj A + √det A) / √det A / (√s_1 + √s_2).
    """
    longest = max(pair.first, pair.second)
    if longest == 0.0:
        return list(shares)
    one, other, cosine = pair.first / longest, pair.second / longest, pair.cosine
    first, second, cross = one * one, other * other, one * other * cosine
    gap = math.hypot(first - second, 2 * cross)
    large = (first + second + gap) / 2
    determinant = first * second * (1.0 - cosine) * (1.0 + cosine)
    small = determinant / large
    if small <= 8 * precision * large:  # B projects on the only component
        ((a, b), (_, d)), factor = ((first - small, cross), (cross, second - small)), 1 / gap
    else:
        root = math.sqrt(determinant)
        ((a, b), (_, d)) = ((second + root, -cross), (-cross, first + root))
        factor = math.sqrt((first + second) / 2) / root if mean else 1 / math.sqrt(large)
        factor /= math.sqrt(large) + math.sqrt(small)
    return [factor * (a * shares[0] + b * shares[1]), factor * (b * shares[0] + d * shares[1])]
