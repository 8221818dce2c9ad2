"""Random weights: the baseline that an elaborate method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moo_balance.weighting._arguments import check_whole
from moo_balance.weighting._random import step_generator
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class RandomWeights(Weighting):
    r"""New random weights in each step.

    .. math:: d = \sum_i w_i g_i, \qquad w = \operatorname{softmax}(z), \quad z_i \sim N(0, 1)

    The draw depends on `seed` and the number of the step only: it disturbs no other random
    stream, is the same on all ranks, and a resumed run draws what the first would have drawn.

    Coefficients: sum to 1. A loss may rise.

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

    uses_losses = False

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "seed", 0)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        # Drawn on the host: copying K numbers to a device does not synchronize.
        generator = step_generator(self.seed, statistics.step)
        normal = torch.randn(
            len(statistics.names), generator=generator, dtype=torch.float64, device="cpu"
        )
        weights = torch.softmax(normal, 0).to(statistics.losses)
        return WeightingOutput(weights, weights, state)
