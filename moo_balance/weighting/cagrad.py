"""CAGrad: the mean gradient, bent so that the loss that improves least improves more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional._checks import check_square, precision, result_dtype
from moo_balance.functional._pair import Pair, read_pair
from moo_balance.weighting._arguments import check_choice, check_range
from moo_balance.weighting._reduction import Reduction, ReductionWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class CAGrad(ReductionWeighting):
    r"""Conflict-Averse Gradient Descent: the best worst improvement, near the mean gradient.

    With the mean gradient :math:`g_0`,

    .. math::
        d = \arg\max_d \min_i \; g_i \cdot d \quad \text{s.t.} \quad
        \lVert d - g_0 \rVert \le c\,\lVert g_0 \rVert

    which is :math:`g_0 + c\,\lVert g_0 \rVert\, g_w / \lVert g_w \rVert` for

    .. math::
        g_w = \sum_i w_i g_i, \qquad
        w = \arg\min_{w \in \Delta}\; g_w \cdot g_0 + c\,\lVert g_0 \rVert \lVert g_w \rVert

    :math:`c = 0` gives the mean, and a large :math:`c` the direction of :class:`MGDA`. The solution
    is exact for any K, by a few steps of Newton's method; the official code stops SLSQP at its
    tolerance, which is absolute, so that small gradients leave it where it starts.

    Where a convex combination of the gradients vanishes and the ball holds several directions
    without a conflict, the formula divides zero by zero. The one nearest to :math:`g_0` is taken
    then, which is zero at a Pareto-stationary point with :math:`c \ge 1`.

    Coefficients: sum to at least 1 without `rescale` (K for ``"sum"``).

    A loss may rise for :math:`c < 1`: the worst improvement is the best one within the ball, but it
    may be negative. For :math:`c \ge 1` the ball contains zero, and no loss rises.

    Args:
        c: :math:`c \ge 0`. Default 0.4 (paper, for NYUv2 and Cityscapes; LibMTL and the toy problem
            of the code have 0.5).
        rescale: Divide :math:`d` by ``"1+c"`` (the code of the toy problem) or by ``"1+c^2"`` (the
            code for NYUv2 and Cityscapes, and its copies), or not. Default None (paper, TorchJD).
        reduction: :math:`g_0` is the mean (``"mean"``), or all is multiplied by K (``"sum"``, as in
            the codes of Nash-MTL and FAMO). Default ``"mean"`` (paper).
        preference: Shares of the gradients in :math:`g_0`, by name. Default None, equal.
        every: Solve each n-th step only, and keep the coefficients in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses; from
            ``backward``, when the Gramian is not positive semidefinite (K > 2).
        ConvergenceError: The solver missed its tolerance (never seen; it would say by how much).

    Source: Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning* (NeurIPS 2021),
    arXiv 2110.14048, Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import CAGrad
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> CAGrad(c=0.5).weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.0590, 0.5000])
    """

    c: float = 0.4
    rescale: Literal["1+c", "1+c^2"] | None = None
    reduction: Reduction = "mean"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "c", 0.0)
        check_choice(self, "rescale", (None, "1+c", "1+c^2"))

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        check_square(gramian)
        shares = self.shares(statistics.names)
        count, dtype = len(shares), result_dtype(gramian)
        whole = sum(shares)
        shares, factor = [share / whole for share in shares], whole * self._factor
        if count == 1:
            return {"weights": gramian.new_tensor([factor * (1.0 + self.c)], dtype=dtype)}
        if count == 2:
            pair = read_pair(gramian)
            if pair.first > 0.0 < pair.second and abs(pair.cosine) < _PARALLEL:
                added = _add_for_two(pair, shares, self.c)
                weights = [factor * (s + a) for s, a in zip(shares, added, strict=True)]
                return {"weights": gramian.new_tensor(weights, dtype=dtype)}
        from moo_balance.functional._conflict_averse import add_conflict_averse  # loads NumPy
        from moo_balance.functional._directions import directions

        found = add_conflict_averse(directions(gramian), shares, self.c, precision(gramian))
        return {"weights": torch.from_numpy(factor * (found + shares)).to(gramian.device, dtype)}

    @property
    def _factor(self) -> float:
        return 1.0 / {None: 1.0, "1+c": 1.0 + self.c, "1+c^2": 1.0 + self.c**2}[self.rescale]


_PARALLEL = 1 - 1e-4
"""A cosine beyond this asks for the general solver."""


def _add_for_two(pair: Pair, shares: Sequence[float], c: float) -> list[float]:
    """What is added to two gradients of different directions, neither of them zero.

    Either a single one is added, or both improve alike.
    """
    one, other, cosine = pair
    scale, shortest = max(one * shares[0], other * shares[1]), min(one, other)
    sizes = one * shares[0] / scale, other * shares[1] / scale
    along = sizes[0] + cosine * sizes[1], cosine * sizes[0] + sizes[1]
    square = max(sizes[0] * along[0] + sizes[1] * along[1], 0.0)
    radius = c * math.sqrt(square)
    inverse = shortest / one, shortest / other
    if along[1] + cosine * radius >= (along[0] + radius) / inverse[0] * inverse[1]:
        return [scale * (radius / one), 0.0]
    if along[0] + cosine * radius >= (along[1] + radius) / inverse[1] * inverse[0]:
        return [0.0, scale * (radius / other)]
    remainder = (1.0 - cosine) * (1.0 + cosine)
    first = (inverse[0] - cosine * inverse[1]) / remainder
    second = (inverse[1] - cosine * inverse[0]) / remainder
    curvature = inverse[0] * first + inverse[1] * second
    half = inverse[0] * sizes[0] + inverse[1] * sizes[1]
    level = (half + math.sqrt(max(half**2 - curvature * (square - radius**2), 0.0))) / curvature
    return [
        scale * (max(level * first - sizes[0], 0.0) / one),
        scale * (max(level * second - sizes[1], 0.0) / other),
    ]
