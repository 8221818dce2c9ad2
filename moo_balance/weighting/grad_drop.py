"""GradDrop: one sign for each coordinate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    check_whole,
    relative_preference,
)
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting


@dataclass(frozen=True)
class GradDrop(RowWeighting):
    r"""Gradient sign dropout: in each coordinate, only gradients of one sign, drawn at random.

    With the positive sign purity :math:`P` of a coordinate and a uniform :math:`U`, drawn for each
    coordinate,

    .. math::
        P = \frac12 \Big(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Big), \qquad
        d = \ell \sum_i g_i + (1 - \ell)
        \begin{cases} \sum_i \max(g_i, 0) & U < P \\ \sum_i \min(g_i, 0) & U \ge P \end{cases}

    Where all gradients have one sign :math:`d` is their sum; the more they conflict, the less
    likely the sign of their sum is the one that is kept. Of the parameters that a single loss
    reaches nothing is dropped.

    The draws depend on `seed`, the number of the step and the parameter only: they are the same on
    all ranks, however parameters are sharded, and a resumed run repeats them. Another kind of
    device draws other ones.

    Coefficients: K ones (they sum to K), which gradients are multiplied by beforehand.

    A loss may rise.

    Args:
        leak: :math:`\ell \in [0, 1]`, the share of the sum that passes; a number for all losses.
            Default 0 (paper and all codes). 1 is the plain sum.
        preference: What gradients are multiplied by beforehand, by name, in proportion; the factors
            sum to K. Default None, equal.
        seed: Seed of the draws, a whole number ≥ 0. Default 0.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses.

    Source: Chen et al., *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
    Dropout* (NeurIPS 2020), arXiv 2010.06808, Algorithm 1 on parameters (there, and in LibMTL, also
    on activations).

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, GradDrop
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), GradDrop())
        >>> _ = optimizer.backward({"a": w[0] + w[1], "b": 2 * w[0] - 3 * w[1]})
        >>> w.grad  # 3, and 1 or -3
        tensor([ 3., -3.])
    """

    combines = "coordinates"
    leaves_out_satisfied = True

    leak: float = 0.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    seed: int = 0

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "leak", 0.0, high=1.0)
        check_whole(self, "seed", 0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return super().init(names, device)

    def combine(self, gradients: Sequence[Tensor], draw: Callable[[], Tensor]) -> Tensor:
        if len(gradients) == 1:
            return gradients[0]
        positive, negative = gradients[0].clamp(min=0.0), gradients[0].clamp(max=0.0)
        for gradient in gradients[1:]:
            positive, negative = (
                positive + gradient.clamp(min=0.0),
                negative + gradient.clamp(max=0.0),
            )
        chosen = torch.where(draw() * (positive - negative) < positive, positive, negative)
        return chosen.lerp(positive + negative, self.leak) if self.leak else chosen

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        if self.preference is None:
            return {"weights": torch.ones_like(statistics.losses)}
        return {"weights": relative_preference(self.preference, statistics)}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]
