"""Methods whose solver takes the preference itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moo_balance.weighting._arguments import check_common, check_names, normalize_preference
from moo_balance.weighting.base import GramianWeighting, State, Statistics


class PreferredWeighting(GramianWeighting):
    """A method whose weights are a function of the Gramian and the preference.

    A subclass gives the function, and ``preference`` and ``every`` as fields.
    """

    preference: Mapping[str, float] | None

    def __post_init__(self) -> None:
        check_common(self)

    @abstractmethod
    def _weigh(self, gramian: Tensor, preference: Tensor | None) -> Tensor:
        """The weights, shape [K]. A `preference` sums to 1; None stands for equal ones."""

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return super().init(names, device)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        preference = None
        if self.preference is not None:
            preference = normalize_preference(self.preference, statistics)
        return {"weights": self._weigh(gramian, preference)}
