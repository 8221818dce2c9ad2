"""MoDo: projected gradient steps on the weights, with products of independent batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moo_balance.functional._projected_descent import projected_descent
from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    normalize_preference,
)
from moo_balance.weighting._shares import initial_weights, present_weights
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class MoDo(Weighting):
    r"""Multi-objective gradient descent with double sampling: one small step of MGDA's weights.

    .. math::
        d = \sum_i \lambda_{t,i}\, g_i, \qquad
        \lambda_{t+1} = \operatorname{proj}_\Delta\big(\lambda_t
            - \gamma\,(\hat M \lambda_t + \rho\,(\lambda_t - p))\big)

    where :math:`\hat M` is an unbiased estimate of the inner products of the *expected* gradients.
    It is the mean over all pairs of different batches of a step: the micro-batches of a window
    (``accumulate()``), the ranks of a data-parallel run, or both. The published method multiplies
    two batches, which this is for two. The Gramian of one batch would make the weights shun losses
    with noisy gradients, so a step with one batch is refused.

    The direction has the weights from before the step. The paper takes those from after it, on a
    third batch that they do not depend on; those from before depend on none of this step's batches
    either, so that all of these can serve. (Its official code has two batches and takes the new
    weights on their sum, LibMTL takes them on a third.)

    :math:`\lambda` → the state, from :math:`p` on; :math:`\gamma` → `lr`; :math:`\rho` → `rho`;
    :math:`p` → `preference`. On gradients that stay the same, small steps end at the min-norm
    weights of :class:`MGDA`, regularised by :math:`\tfrac{\rho}{2} \|\lambda - p\|^2`. The step
    :math:`\gamma \hat M` has a unit: where gradients are long, `lr` should be small.

    A loss may rise, even to first order: the weights lag.

    Coefficients: sum to 1.

    Args:
        lr: :math:`\gamma`, step of the weights, above 0. Default 0.1 (official configuration;
            LibMTL has 1e-3).
        rho: :math:`\rho \ge 0`, pull towards `preference`. Default 0.1 (official configuration and
            LibMTL; 0 in parts of the analysis).
        preference: Where the weights start from and are pulled to, positive numbers by name. With
            None, equal weights, this is the published method, whose term :math:`\rho\lambda` has
            the same projection.
        every: Move the weights each n-th step only. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name the
            losses.
        BalanceError: From ``backward``, where a step has one batch.

    Source: Chen, Fernando, Ying & Chen, *Three-Way Trade-Off in Multi-Objective Learning:
    Optimization, Generalization and Conflict-Avoidance* (NeurIPS 2023), arXiv 2305.20057,
    Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, MoDo
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.0), MoDo(rho=0.0))
        >>> for _ in range(500):
        ...     optimizer.zero_grad()
        ...     with optimizer.accumulate():
        ...         _ = optimizer.backward({"a": w[0] / 2, "b": w[1] * 3**0.5 / 2})
        ...     _ = optimizer.backward({"a": w[0] / 2, "b": w[1] * 3**0.5 / 2})
        ...     optimizer.step()
        >>> {name: round(float(weight), 3) for name, weight in optimizer.metrics.weights.items()}
        {'a': 0.75, 'b': 0.25}
    """

    uses_gramian = True
    uses_independent_batches = True
    leaves_out_satisfied = True

    lr: float = 0.1
    rho: float = 0.1
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "rho", 0.0)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return {"weights": initial_weights(self.preference, names, device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        weights, mass = present_weights(state["weights"], statistics.satisfied)
        following, gramian = weights, statistics.gramian
        if gramian is not None:
            preference = normalize_preference(self.preference, statistics).to(weights)
            following = projected_descent(
                gramian.to(weights),
                -self.rho * preference,
                weights,
                self.lr,
                ridge=self.rho,
                left_out=statistics.satisfied,
            )
        used = weights.to(statistics.losses)
        return WeightingOutput(used, used, {"weights": following * mass})
