"""TrimmedMean: the mean of each coordinate without its extremes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.weighting._arguments import check_whole
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting


@dataclass(frozen=True)
class TrimmedMean(RowWeighting):
    r"""In each coordinate, the mean of the gradients without the largest and smallest ones.

    .. math:: d = \frac{1}{k - 2n} \sum_{j = n + 1}^{k - n} g_{(j)}

    with those :math:`k` gradients of a coordinate that are not zero, in increasing order. A robust
    rule of distributed learning: where :math:`k > 2n`, no :math:`n` losses, whatever their
    gradients are, pull a coordinate beyond the range of the others. A zero does not count, as most
    are of losses that do not reach the parameter: that of a head has the gradient of its loss. Of
    fewer than :math:`2n + 1` gradients as many are left out as leave one or two: the median, which
    for two is their mean.

    Coefficients: K ones (they sum to K), which multiply gradients before they are sorted. The
    direction is a mean: with ``trim=0``, the sum of the losses' gradients divided by the number of
    those that are not zero.

    A loss may rise.

    Args:
        trim: :math:`n \ge 0`, how many to leave out at each end. Default 1. 0 is the mean.

    Raises:
        BalanceValueError: `trim` is not a whole number ≥ 0.

    Source: Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*
    (ICML 2018), arXiv 1803.01498, Definition 2. In TorchJD zeros count.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, TrimmedMean
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), TrimmedMean())
        >>> losses = {"a": w.sum(), "b": 2 * w[0] + 3 * w[1], "c": 90 * w[0] - 90 * w[1]}
        >>> _ = optimizer.backward(losses)
        >>> w.grad
        tensor([2., 1.])
    """

    combines = "coordinates"
    leaves_out_satisfied = True

    trim: int = 1

    def __post_init__(self) -> None:
        check_whole(self, "trim", 0)

    def combine(self, gradients: Sequence[Tensor], draw: Callable[[], Tensor]) -> Tensor:
        there = [(gradient != 0).to(torch.int32) for gradient in gradients]
        count = torch.stack(there).sum(0)
        left_out = ((count - 1) // 2).clamp(min=0, max=self.trim)
        ordered = _sort([gradient.where(gradient != 0, torch.inf) for gradient in gradients])
        total = torch.zeros_like(gradients[0])
        for rank, gradient in enumerate(ordered):
            remains = (rank >= left_out) & (rank < count - left_out)
            total += gradient.where(remains, 0.0)
        return total / (count - 2 * left_out).clamp(min=1)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        return {"weights": torch.ones_like(statistics.losses)}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]


_FEW = 8
"""Up to so many tensors, comparing them in pairs takes less time than sorting a stack of them."""


def _sort(tensors: list[Tensor]) -> Sequence[Tensor]:
    """The tensors in increasing order, coordinate by coordinate."""
    count = len(tensors)
    if count > _FEW:
        return torch.stack(tensors).sort(0).values.unbind()
    for turn in range(count):  # neighbours change places, those at even positions first
        for k in range(turn % 2, count - 1, 2):
            left, right = tensors[k], tensors[k + 1]
            tensors[k], tensors[k + 1] = torch.minimum(left, right), torch.maximum(left, right)
    return tensors
