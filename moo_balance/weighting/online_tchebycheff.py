"""Online Tchebycheff: weights that ascend on the losses, by mirror or projected ascent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moo_balance.functional import project_simplex
from moo_balance.weighting._arguments import (
    check_choice,
    check_common,
    check_names,
    check_range,
    constant_state,
    normalize_preference,
    renormalize,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class OnlineTchebycheff(Weighting):
    r"""Tchebycheff as a game of weights, which ascend, against the model, which descends.

    .. math::
        d &= \sum_i \lambda_i p_i\, g_i \\
        \lambda &\leftarrow \frac{\lambda \odot e^{\eta\, p \odot L}}{\|\cdot\|_1}
        \ \text{(mirror)} \qquad
        \lambda \leftarrow \Pi_\Delta(\lambda + \eta\, p \odot L)\ \text{(projected)}

    from uniform :math:`\lambda`. The step uses the weights from before its batch, as the regret
    bound requires.

    Coefficients: :math:`\lambda_i p_i`; with equal preferences they sum to :math:`1/K`. A loss
    may rise.

    Args:
        lr: :math:`\eta > 0`. Default 0.1, inside the paper's grid 1e-3 … 1.
        update: ``"mirror"`` (exponentiated gradient, default) or ``"projected"``.
        preference: :math:`p_i > 0` by name, scaled to sum 1. Default None: equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Liu et al., *Online mirror descent for Tchebycheff scalarization* (arXiv 2410.21764).
    The paper returns an averaged model; average your weights with
    ``torch.optim.swa_utils.AveragedModel`` if you want that.

    Example:
        >>> import torch
        >>> from moo_balance import OnlineTchebycheff
        >>> from moo_balance.weighting import Statistics
        >>> rule = OnlineTchebycheff()
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> statistics = Statistics(("a", "b"), torch.tensor([0.5, 2.0], dtype=torch.float64))
        >>> state = rule.weights(statistics, state).state
        >>> rule.weights(statistics, state).weights
        tensor([0.4813, 0.5187], dtype=torch.float64)
    """

    uses_losses = False

    lr: float = 0.1
    update: Literal["mirror", "projected"] = "mirror"
    preference: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "lr", 0.0, open=True)
        check_choice(self, "update", ("mirror", "projected"))

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        key = "logits" if self.update == "mirror" else "weights"
        start = 0.0 if self.update == "mirror" else 1.0 / len(names)
        return {key: constant_state(start, len(names), device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        preference = normalize_preference(self.preference, statistics)
        gain = self.lr * preference * statistics.losses
        if self.update == "mirror":
            weights = torch.softmax(state["logits"], 0)
            logits = state["logits"] + gain
            # The present losses share what they hold; the mass of absent ones is kept for them.
            grown = logits.logsumexp(0) - state["logits"].logsumexp(0)
            state = {"logits": logits - grown}
        else:
            mass = state["weights"].sum()
            weights = renormalize(state["weights"])
            state = {"weights": mass * project_simplex(weights + gain)}
        return WeightingOutput(weights, weights * preference, state)
