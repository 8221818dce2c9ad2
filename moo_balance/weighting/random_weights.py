"""Random weights: the baseline that a clever method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moo_balance.errors import BalanceValueError
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput

_GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class RandomWeights(Weighting):
    r"""New random weights in each step.

    .. math:: d = \sum_i w_i g_i, \qquad w = \operatorname{softmax}(z), \quad z_i \sim N(0, 1)

    The draw depends on `seed` and the number of the step alone: it disturbs no other random
    stream, is the same on all ranks, and a resumed run draws what the first would have drawn.

    Coefficients: sum to 1.

    Args:
        seed: Seed of the draws, a whole number ≥ 0. Default 0.

    Raises:
        BalanceValueError: `seed` is not a whole number ≥ 0.

    Source: Lin et al., *Reasonable Effectiveness of Random Weighting* (TMLR 2022), "RLW" with the
    normal distribution.

    Example:
        >>> import torch
        >>> from moo_balance import RandomWeights
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.tensor([0.5, 2.0]))
        >>> float(RandomWeights(seed=1).weights(statistics, {}).weights.sum())
        1.0
    """

    uses_losses: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise BalanceValueError(
                f"Parameter `seed` of RandomWeights should be a whole number, at least 0. "
                f"Found {self.seed!r}."
            )

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        # Drawn on the host: K numbers, no synchronisation, and the same on every kind of device.
        mixed = (self.seed + statistics.step * _GOLDEN_RATIO_64) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        normal = torch.randn(len(statistics.names), generator=generator, dtype=torch.float64)
        weights = torch.softmax(normal, 0).to(statistics.losses)
        return WeightingOutput(weights, weights, state)
