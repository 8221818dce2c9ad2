"""SDMGrad: MGDA pulled towards a preferred direction, with products of independent batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.functional._projected_descent import projected_descent
from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    check_whole,
    normalize_preference,
)
from moo_balance.weighting._shares import initial_weights, present_weights
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class SDMGrad(Weighting):
    r"""Stochastic direction-oriented descent: between MGDA and a fixed combination of gradients.

    .. math::
        d = \frac{1}{1 + c} \sum_i (w_i + c\,p_i)\, g_i, \qquad
        w \approx \arg\min_{w \in \Delta} \tfrac12\, (w + c\,p)^\top \hat M\, (w + c\,p)

    by `iterations` projected steps :math:`v \leftarrow \mu v + \hat M (w + c\,p) / s^2`,
    :math:`w \leftarrow \operatorname{proj}_\Delta(w - \eta\,v)` from the last :math:`w` and
    :math:`v = 0`, with :math:`s` the mean length of the gradients. :math:`\hat M` is an unbiased
    estimate of the inner products of the *expected* gradients: the mean over all pairs of different
    batches of a step, which are the micro-batches of a window (``accumulate()``), the ranks of a
    data-parallel run, or both. A step with one batch is refused. (The official code keeps the
    gradients of its three batches in a list that holds one buffer three times, so that each product
    is that of the last batch with itself: there the sampling of two batches has no effect.)

    The direction has the :math:`w` from before the step, which depends on none of this step's
    batches; the published method takes the new one on a third batch.

    :math:`c` → `pull`, the paper's :math:`\lambda`; :math:`p` → `preference`; :math:`\eta` → `lr`;
    :math:`\mu` → `momentum`. With `pull` 0 it approaches :class:`MGDA`; with a large one it is
    ``FixedWeights(preference)``, divided by the sum of the preferences.

    A loss may rise, even to first order: the weights lag, and :math:`p` has a share in them.

    Coefficients: sum to 1.

    Args:
        pull: :math:`c \ge 0`, pull towards `preference`. Default 0.3 (the official runs and LibMTL;
            the official class has 0.6).
        lr: :math:`\eta`, step of the inner iterations, above 0. Default 10 (official; LibMTL 5).
            As :math:`\hat M` is divided by :math:`s^2`, it has no unit.
        momentum: :math:`\mu \in [0, 1)` of the inner iterations. Default 0.5 (official and LibMTL,
            whose optimizer also keeps its velocity from step to step).
        iterations: Inner iterations per step, a whole number of at least 1. Default 20 (official).
        preference: :math:`p`, positive numbers by name, divided by their sum. None, the published
            mean of the gradients, is equal ones.
        every: Move the weights each n-th step only. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or `preference` does not name the
            losses.
        BalanceError: From ``backward``, where a step has one batch.

    Source: Xiao, Ban & Ji, *Direction-oriented Multi-objective Learning: Simple and Provable
    Stochastic Algorithms* (NeurIPS 2023), arXiv 2305.18409, Algorithm 1; :math:`s` as in Section
    6.1 and the official code, without its constants.

    Example:
        >>> import torch
        >>> from moo_balance import SDMGrad
        >>> from moo_balance.weighting import Statistics
        >>> weighting = SDMGrad(pull=0.0, lr=0.5)
        >>> state = weighting.init(("a", "b"), torch.device("cpu"))
        >>> products = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> for _ in range(4):
        ...     statistics = Statistics(("a", "b"), torch.ones(2), products)
        ...     weights, coefficients, state = weighting.weights(statistics, state)
        >>> weights
        tensor([0.7500, 0.2500])
    """

    uses_gramian = True
    uses_independent_batches = True
    leaves_out_satisfied = True

    pull: float = 0.3
    lr: float = 10.0
    momentum: float = 0.5
    iterations: int = 20
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "pull", 0.0)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "momentum", 0.0, below=1.0)
        check_whole(self, "iterations", 1)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return {"weights": initial_weights(self.preference, names, device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        weights, mass = present_weights(state["weights"], statistics.satisfied)
        preference = normalize_preference(self.preference, statistics).to(weights)
        coefficients = (weights + self.pull * preference) / (1.0 + self.pull)
        following, gramian = weights, statistics.gramian
        if gramian is not None:
            products, left_out = gramian.to(weights), statistics.satisfied
            following = projected_descent(
                products,
                self.pull * (products @ preference),
                weights,
                _divide_by_square(self.lr, products, left_out),
                momentum=self.momentum,
                iterations=self.iterations,
                left_out=left_out,
            )
        used, coefficients = weights.to(statistics.losses), coefficients.to(statistics.losses)
        return WeightingOutput(used, coefficients, {"weights": following * mass})


def _divide_by_square(lr: float, products: Tensor, left_out: Tensor | None) -> float | Tensor:
    """Divide by the square of the mean length; 0 where no estimated length is above 0.

    In two divisions: the square may leave the range of the dtype where the quotient does not.
    """
    if products.is_cpu and left_out is None:
        squares = products.diagonal().tolist()
        mean = sum(math.sqrt(max(square, 0.0)) for square in squares) / len(squares)
        return lr / mean / mean if mean > 0.0 else 0.0
    lengths = products.diagonal().clamp(min=0.0).sqrt()
    count = len(lengths) if left_out is None else (~left_out).sum()
    length = lengths.sum() / count
    return torch.where(length > 0, lr / length / length, 0.0)
