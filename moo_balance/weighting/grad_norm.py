"""GradNorm: weights learned such that losses train at similar rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.weighting._adam import adam, init_adam
from moo_balance.weighting._arguments import (
    advise,
    check_choice,
    check_common,
    check_names,
    check_range,
    constant_state,
    normalize_preference,
)
from moo_balance.weighting.base import GramianWeighting, State, Statistics


@dataclass(frozen=True)
class GradNorm(GramianWeighting):
    r"""Learns weights whose gradients are the longer, the slower their losses train.

    With :math:`n_i` the norm of :math:`g_i`, :math:`\bar\ell` the mean of :math:`w_j n_j`, shares
    :math:`p_i` that sum to 1, and the rate :math:`r_i` at which a loss trains in comparison with
    the others,

    .. math::
        F(w) &= \sum_i \Big| w_i n_i - \bar\ell\,K p_i\,r_i^{\alpha} \Big|, \qquad
        r_i = \frac{L_i / L_i^{(0)}}{\tfrac1K \sum_j L_j / L_j^{(0)}} \\
        w &\leftarrow w - \eta\,\nabla_w F, \qquad
        w \leftarrow K \max(w, 0) \big/ \textstyle\sum_j \max(w_j, 0), \qquad
        d = \sum_i w_i g_i

    from :math:`w = 1`. The targets :math:`\bar\ell\,K p_i r_i^\alpha` count as constants, and a
    step uses the weights from before its update (paper). :math:`L_i^{(0)}` is the first value of
    each loss.

    With ``alpha=0`` it settles at weighted gradients of equal length, where
    :class:`GradientNorms` is at once. Weights move by about `lr` a step and stay between 0 and K:
    where norms differ by more than a factor of :math:`1/\eta`, they oscillate around 0 in place of
    settling, and :class:`GradientNorms` is the better choice.

    Norms are those of all parameters, or of ``shared_params=``; the paper takes the last shared
    layer.

    Coefficients: sum to K. A loss may rise to first order.

    Args:
        alpha: :math:`\alpha \ge 0`. Default 1.5 (paper for NYUv2, LibMTL; the paper's toy problem
            has 0.12, other codes 0 to 2).
        lr: :math:`\eta > 0`. Default 0.025 (paper).
        weight_optimizer: How the weights descend: ``"adam"`` (default, as most codes) or
            ``"sgd"``, with :math:`F` in units of :math:`\bar\ell`, so that no unit matters.
        preference: :math:`p_i > 0` by name, scaled to sum 1. Default None: equal (paper).
        every: Update the weights each n-th step only. Default 1 (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is negative and `alpha` is not 0.

    Source: Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
    Multitask Networks* (ICML 2018), arXiv 1711.02257, Algorithm 1. LibMTL takes K times a softmax
    of learned logits in place of the division by the sum.

    Example:
        >>> import torch
        >>> from moo_balance import GradNorm
        >>> from moo_balance.weighting import Statistics
        >>> rule = GradNorm(lr=0.1)
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> statistics = Statistics(("a", "b"), torch.ones(2), torch.diag(torch.tensor([1.0, 9.0])))
        >>> for _ in range(2):
        ...     _, coefficients, state = rule.weights(statistics, state)
        >>> coefficients
        tensor([1.1000, 0.9000])
    """

    alpha: float = 1.5
    lr: float = 0.025
    weight_optimizer: Literal["adam", "sgd"] = "adam"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "alpha", 0.0)
        check_range(self, "lr", 0.0, open=True)
        check_choice(self, "weight_optimizer", ("adam", "sgd"))

    bound_reason = "divides by its first value"
    leaves_out_satisfied = True

    @property
    def bound_advice(self) -> str:
        return advise(self, "`alpha=0`, which looks at gradients only")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0 if self.alpha else -math.inf] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        count = len(names)
        moments = init_adam(count, device) if self.weight_optimizer == "adam" else {}
        return {
            "learned": constant_state(1.0, count, device),
            "first_losses": constant_state(math.nan, count, device),
            "first_norms": constant_state(math.nan, count, device),
            **moments,
        }

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        learned, dtype = state["learned"], state["learned"].dtype
        norms = gramian.diagonal().to(dtype).clamp(min=0.0).sqrt()
        moves = norms > 0  # a loss with a zero gradient takes no part
        part = moves.to(dtype)
        count = part.sum().clamp(min=1.0)
        state = {**state, **self._note_first(statistics, norms, moves, state)}

        mass = learned * part
        used = _sum_to(count, mass, part)
        lengths = used * norms
        targets = lengths.sum() / count * self._relative_targets(statistics, state, part, count)
        gradient = (lengths - targets).sign() * norms
        if self.weight_optimizer == "adam":
            # Adam is indifferent to the unit of each gradient, but for its epsilon.
            gradient = (gradient / state["first_norms"]).nan_to_num_(0.0)
            new, moments = adam(used, gradient, moves, state, self.lr)
            state.update(moments)
        else:
            new = used - (self.lr * gradient / lengths.sum() * count).nan_to_num_(0.0)
        # The present losses share what they hold; the rest is kept for absent ones.
        new = _sum_to(mass.sum(), new.clamp(min=0.0) * part, part)
        state["learned"] = torch.where(moves, new, learned)
        return {**state, "weights": used.to(statistics.losses.dtype)}

    def keep(self, statistics: Statistics, state: State) -> State:
        learned, satisfied = state["learned"], statistics.satisfied
        part = torch.ones_like(learned)
        if satisfied is not None:
            part = part.masked_fill(satisfied, 0.0)
        weights = _sum_to(part.sum(), learned * part, part)
        return {"weights": weights.to(statistics.losses.dtype)}

    def _note_first(
        self, statistics: Statistics, norms: Tensor, moves: Tensor, state: State
    ) -> State:
        """The first value of each loss, and the first norm of each gradient."""
        losses, norm = state["first_losses"], state["first_norms"]
        return {
            "first_losses": torch.where(losses.isnan(), statistics.losses.to(losses.dtype), losses),
            "first_norms": torch.where(norm.isnan() & moves, norms, norm),
        }

    def _relative_targets(
        self, statistics: Statistics, state: State, part: Tensor, count: Tensor
    ) -> Tensor:
        r""":math:`K p_i r_i^\alpha`, with means over the losses that take part."""
        targets = part
        if self.preference is not None:
            shares = normalize_preference(self.preference, statistics)
            targets = _sum_to(count, shares.to(part.dtype) * part, part)
        if self.alpha:
            ratios = statistics.losses / state["first_losses"] * part
            targets = targets * (ratios * (count / ratios.sum())).pow(self.alpha)
        return targets


def _sum_to(total: Tensor, values: Tensor, part: Tensor) -> Tensor:
    """Nonnegative values scaled to a sum; equal ones, where `part` is 1, in place of zeros."""
    return (values * (total / values.sum())).nan_to_num_(1.0) * part
