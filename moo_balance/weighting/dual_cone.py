"""UPGrad and DualProj: projections onto the cone of directions along which no loss rises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.functional import project_dual_cone
from moo_balance.weighting._reduction import Reduction, ReductionWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class UPGrad(ReductionWeighting):
    r"""Unconflicting Projection of Gradients: project each gradient, then average.

    .. math::
        d = \sum_i p_i\, \pi(g_i), \qquad
        \pi(g) = \arg\min_{d} \lVert d - g \rVert^2
        \;\text{ subject to }\; g_j^\top d \ge 0 \text{ for all } j

    Without conflict :math:`d` is the plain mean. Scaling a loss down scales down its part of the
    direction, but none of the conditions.

    The K projections are solved together and exactly
    (:func:`~moo_balance.functional.project_dual_cone`), on directions: a gradient of 1e-12 next to
    one of 1e12 counts as much. (TorchJD divides the Gramian by its trace, adds 1e-4 to the diagonal
    and returns zeros below 1e-4: there, small gradients may be overruled.)

    Coefficients: sum to at least 1 (``"mean"``) or K (``"sum"``); none is negative.

    No loss rises, to first order.

    Args:
        reduction: ``"mean"``, :math:`\sum_i p_i = 1` (default, paper and TorchJD), or ``"sum"``,
            :math:`\sum_i p_i = K`, as long as the plain sum where there is no conflict.
        preference: Positive numbers by name, proportional to :math:`p`. Default None, equal. It is
            TorchJD's `pref_vector` divided by its sum.
        every: Solve each n-th step only, and keep the coefficients in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.
        ConvergenceError: The solver missed its tolerance (never seen; it would say by how much).

    Source: Quinton and Rey, *Jacobian Descent for Multi-Objective Optimization* (2024), arXiv
    2406.16232.

    Example:
        >>> import torch
        >>> from moo_balance import UPGrad
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
        >>> UPGrad().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.0000, 0.7500])
    """

    reduction: Reduction = "mean"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        projected = project_dual_cone(gramian, torch.diag(_shares(self, statistics)))
        return {"weights": projected.sum(0).to(statistics.losses.dtype)}


@dataclass(frozen=True)
class DualProj(ReductionWeighting):
    r"""Project the mean of the gradients onto the cone of directions along which no loss rises.

    .. math::
        d = \arg\min_{d} \Big\lVert d - \sum_i p_i g_i \Big\rVert^2
        \;\text{ subject to }\; g_j^\top d \ge 0 \text{ for all } j

    Without conflict :math:`d` is the plain mean. It is the least change of the mean that hurts no
    loss; where one gradient is much longer than the rest, the mean and hence :math:`d` are little
    but that one, which is what :class:`UPGrad` avoids. Solved exactly, on directions, as there.

    Coefficients: sum to at least 1 (``"mean"``) or K (``"sum"``); none is negative.

    No loss rises, to first order.

    Args:
        reduction: ``"mean"``, :math:`\sum_i p_i = 1` (default, TorchJD), or ``"sum"``,
            :math:`\sum_i p_i = K`.
        preference: Positive numbers by name, proportional to :math:`p`. Default None, equal. It is
            TorchJD's `pref_vector` divided by its sum.
        every: Solve each n-th step only, and keep the coefficients in between. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name each
            loss.
        ConvergenceError: The solver missed its tolerance (never seen; it would say by how much).

    Source: The projection of gradient episodic memory (Lopez-Paz and Ranzato, *Gradient Episodic
    Memory for Continual Learning*, NeurIPS 2017, arXiv 1706.08840), applied to the mean as in
    Quinton and Rey (2024), arXiv 2406.16232, who named it.

    Example:
        >>> import torch
        >>> from moo_balance import DualProj
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[1.0, -2.0], [-2.0, 8.0]])
        >>> DualProj().weights(Statistics(("a", "b"), torch.ones(2), gramian), {}).coefficients
        tensor([1.0000, 0.5000])
    """

    reduction: Reduction = "mean"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        projected = project_dual_cone(gramian, _shares(self, statistics))
        return {"weights": projected.to(statistics.losses.dtype)}


def _shares(weighting: ReductionWeighting, statistics: Statistics) -> Tensor:
    """Weights of the gradients in their plain combination, shape [K]."""
    shares = weighting.shares(statistics.names)
    return torch.tensor(shares, dtype=torch.float64, device="cpu")
