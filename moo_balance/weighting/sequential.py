"""Sequential: one method after another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from moo_balance.errors import BalanceValueError
from moo_balance.weighting._wrapping import as_inner, check_weighting, inner_state
from moo_balance.weighting.base import Needs, State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class Sequential(Weighting):
    r"""Phases: one method after another, as ``torch.optim.lr_scheduler.SequentialLR``.

    The first method is used in steps :math:`0 \dots m_1 - 1`, the second in :math:`m_1 \dots
    m_2 - 1`, and so on. Each sees only its own phase: it counts the steps from there, begins with
    its initial state, needs what it needs on its own and costs what it costs on its own. Only
    steps that are taken count; a skipped one does not.

    Coefficients, and whether a loss may rise: as the method of the phase. Methods differ in what
    their coefficients sum to, hence in the length of the step; :class:`Rescaled` removes that.

    Args:
        weightings: The methods, at least one.
        milestones: :math:`m_1 < m_2 < \dots`, the step at which each method but the first begins.

    Raises:
        BalanceValueError: An entry is no method, or `milestones` are not as many increasing
            positive whole numbers as there are changes.

    Example:
        >>> from moo_balance import AnalyticQP, Sequential, Sum
        >>> phases = Sequential([AnalyticQP(), Sum()], milestones=[5000])
        >>> phases.needs(4999).gramian, phases.needs(5000).gramian
        (True, False)
    """

    weightings: Sequence[Weighting]
    milestones: Sequence[int]

    def __post_init__(self) -> None:
        for argument in ("weightings", "milestones"):
            value = getattr(self, argument)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise self._refusal(argument, "be a list", value)
            object.__setattr__(self, argument, tuple(value))
        if not self.weightings:
            raise self._refusal("weightings", "name at least one method", [])
        for weighting in self.weightings:
            check_weighting(self, "weightings", weighting)
        steps = (0, *self.milestones)
        increasing = all(
            isinstance(after, int) and before < after for before, after in pairwise(steps)
        )
        if not increasing or len(steps) != len(self.weightings):
            text = f"be {len(self.weightings) - 1} increasing positive whole numbers"
            raise self._refusal("milestones", text, list(self.milestones))

    def _refusal(self, argument: str, text: str, value: object) -> BalanceValueError:
        return BalanceValueError(
            f"Parameter `{argument}` of Sequential should {text}. Found {value!r}. "
            "Write it as Sequential([AnalyticQP(), Sum()], milestones=[5000])."
        )

    def _phase(self, step: int) -> tuple[int, int]:
        """The position of the method of a step, and the step at which it began."""
        position = bisect_right(self.milestones, step)
        return position, (0, *self.milestones)[position]

    @property
    def uses_gramian(self) -> bool:
        return any(weighting.uses_gramian for weighting in self.weightings)

    @property
    def uses_losses(self) -> bool:
        return any(weighting.uses_losses for weighting in self.weightings)

    @property
    def observes_step(self) -> bool:
        return any(weighting.observes_step for weighting in self.weightings)

    @property
    def uses_independent_batches(self) -> bool:
        return any(weighting.uses_independent_batches for weighting in self.weightings)

    def needs(self, step: int) -> Needs:
        position, start = self._phase(step)
        return self.weightings[position].needs(step - start)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        state: State = {}
        for position, weighting in enumerate(self.weightings):
            state.update(as_inner(weighting.init(names, device), f"{position}/"))
        return state

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        position, start = self._phase(statistics.step)
        prefix = f"{position}/"
        weights, coefficients, inner = self.weightings[position].weights(
            statistics._replace(step=statistics.step - start), inner_state(state, prefix)
        )
        return WeightingOutput(weights, coefficients, {**state, **as_inner(inner, prefix)})

    def observe(self, statistics: Statistics, state: State) -> State:
        position, start = self._phase(statistics.step - 1)  # of the step that was taken
        prefix = f"{position}/"
        inner = self.weightings[position].observe(
            statistics._replace(step=statistics.step - start), inner_state(state, prefix)
        )
        return {**state, **as_inner(inner, prefix)}
