"""Sum or mean: the convention of length of methods that combine K corrected gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch

from moo_balance.weighting._arguments import check_choice, check_common, check_names, values_by_name
from moo_balance.weighting._shares import start_from_shares
from moo_balance.weighting.base import (
    GramianWeighting,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
)

Reduction: TypeAlias = Literal["sum", "mean"]


def check_reduction(weighting: Weighting) -> None:
    """Refuse a ``reduction`` that is none."""
    check_choice(weighting, "reduction", ("sum", "mean"))


class ReductionWeighting(GramianWeighting):
    """A method on the sum, or the mean, of K gradients, each with its share.

    Shares sum to K, or to 1, over the losses that are present. So between two refreshes the weights
    are kept relative to the factor that all shares have in common, and a loss that has not been in
    a refresh yet gets its share.
    """

    reduction: Reduction
    preference: Mapping[str, float] | None

    def __post_init__(self) -> None:
        check_common(self)
        check_reduction(self)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return start_from_shares(super().init(names, device), self._values(names))

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        output = super().weights(statistics, state)
        if statistics.gramian is None or "weights" not in state:
            return output
        relative = output.state["weights"] / self._factor_of_shares(statistics.names)
        return output._replace(state={**output.state, "weights": relative})

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": state["weights"] * self._factor_of_shares(statistics.names)}

    def shares(self, names: Sequence[str]) -> list[float]:
        """What each of the gradients is multiplied by: 1 or 1/K, or in proportion to preferences.

        They sum to K ("sum") or to 1 ("mean").
        """
        factor = self._factor_of_shares(names)
        return [factor * value for value in self._values(names)]

    def _values(self, names: Sequence[str]) -> list[float]:
        return values_by_name(1.0 if self.preference is None else self.preference, names)

    def _factor_of_shares(self, names: Sequence[str]) -> float:
        whole = float(len(names)) if self.reduction == "sum" else 1.0
        return whole / sum(self._values(names))
