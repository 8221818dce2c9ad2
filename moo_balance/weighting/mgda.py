"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional import gradient_scales
from moo_balance.functional._checks import widest
from moo_balance.functional.min_norm import convex_weights
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    advise,
    check_choice,
    check_common,
    check_names,
    left_of_two,
    log_coefficients,
    relative_preference,
    renormalize,
)
from moo_balance.weighting._shares import start_from_shares
from moo_balance.weighting.base import GramianWeighting, State, Statistics


@dataclass(frozen=True)
class MGDA(GramianWeighting):
    r"""Multiple-Gradient Descent: descend along the min-norm point of the gradients' convex hull.

    .. math::
        w = \arg\min_{w \in \Delta} \Big\| \sum_i w_i \frac{g_i}{n_i} \Big\|^2, \qquad
        d = \sum_i w_i g_i

    Without normalisation :math:`d` decreases every loss, or is zero at a Pareto-stationary point.
    The solution is exact for any K (:func:`~moo_balance.functional.min_norm_weights`), where the
    usual codes stop an iteration early.

    `normalize` chooses :math:`n_i`: None 1, ``"l2"`` :math:`\|g_i\|`, ``"loss"`` :math:`L_i`,
    ``"loss+"`` :math:`L_i \|g_i\|`. The weights are then applied to the raw gradients, as Sener and
    Koltun do (LibMTL applies them to the normalised ones, another direction). ``"log"`` takes
    :math:`\nabla \log L_i` on both sides, :math:`d = c \sum_i w_i g_i / L_i` with
    :math:`c = 1/\sum_i (w_i / L_i)`: the direction of equal relative improvement.

    With a `preference` :math:`p` the gradients are divided by it, :math:`n_i p_i` in place of
    :math:`n_i`, and the weights reported and applied are :math:`w_i / p_i`, which sum to 1 again.
    Without normalisation :math:`g_i \cdot d \ge c\,p_i \|d\|^2`, with equality for each loss that
    has a weight: losses improve in proportion to their preference, under ``"log"`` relative to
    their value.

    Coefficients: sum to 1. No loss rises without normalisation or with ``"log"``; with the other
    three, whose weights are not applied to the gradients that they were solved for, one may.

    Args:
        normalize: One of the above. Default None (Désidéri 2012).
        preference: :math:`p_i > 0` by name, scaled to sum 1. Default None: equal.
        every: Solve each n-th step only, and keep :math:`w` in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range; from ``backward``, when a loss is
            negative and the normalisation divides by it.
        ConvergenceError: The solver missed its tolerance (never seen; it would say by how much).

    Source: Désidéri, *Multiple-gradient descent algorithm* (2012); Sener & Koltun, *Multi-Task
    Learning as Multi-Objective Optimization* (NeurIPS 2018), arXiv 1810.04650.

    Example:
        >>> import torch
        >>> from moo_balance import MGDA
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> MGDA().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).weights
        tensor([0.7500, 0.2500])
    """

    leaves_out_satisfied = True

    normalize: Literal["l2", "loss", "loss+", "log"] | None = None
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_choice(self, "normalize", (None, "l2", "loss", "loss+", "log"))

    @property
    def bound_reason(self) -> str:
        return TAKES_LOG if self.normalize == "log" else "divides by it"

    @property
    def bound_advice(self) -> str:
        return advise(self, '`normalize="l2"` or None, which divide by no loss')

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        if self.normalize in (None, "l2"):
            return super().lower_bounds(names)
        return [0.0] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return start_from_shares(super().init(names, device), [1.0 / len(names)] * len(names))

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        scales = None
        if self.normalize is not None:
            scales = gradient_scales(widest(statistics.losses), gramian, self.normalize)
        return {
            "weights": solve_preferred(convex_weights, gramian, scales, self.preference, statistics)
        }

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        if self.normalize == "log":
            return log_coefficients(state["weights"], statistics.losses)
        return state["weights"]

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": renormalize(state["weights"], statistics.satisfied)}


def solve_preferred(
    solve: Callable[[Tensor, Tensor | None, bool], Tensor],
    gramian: Tensor,
    scales: Tensor | None,
    preference: Mapping[str, float] | None,
    statistics: Statistics,
) -> Tensor:
    r"""Weights of gradients that are divided by preferences, then divided by these, of sum 1.

    Args:
        solve: The weights of gradients divided by scales; whether zero gradients share them.
        gramian: Inner products, shape [K, K].
        scales: What the gradients are divided by, too, shape [K]; None for ones.
        preference: By name; None for equal ones, with which the weights are those of `solve`.
        statistics: Of the step.
    """
    relative, left_out = None, statistics.satisfied
    if preference is not None:
        relative = relative_preference(preference, statistics)
        scales = relative if scales is None else scales * relative
    weights = solve(gramian, scales, left_out is None)
    if left_out is not None:
        weights = left_of_two(weights, left_out)
    if relative is None:
        return weights
    weights = weights / relative
    return weights / weights.sum()
