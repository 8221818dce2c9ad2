"""The two solutions of Balanced Rate-Distortion Optimization, for any number of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional import project_simplex
from moo_balance.functional.analytic_qp import affine_weights
from moo_balance.functional.min_norm import convex_weights
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    advise,
    apply_floor,
    check_choice,
    check_common,
    check_flag,
    check_names,
    check_range,
    init_floor,
    log_coefficients,
    lower_limits,
    normalize_preference,
    raise_by_floor,
    renormalize,
)
from moo_balance.weighting._shares import start_from_shares
from moo_balance.weighting.base import GramianWeighting, State, Statistics
from moo_balance.weighting.famo import LogitWeighting
from moo_balance.weighting.mgda import solve_preferred


@dataclass(frozen=True)
class BalancedTrajectory(LogitWeighting):
    r"""Solution 1 of Balanced R-D: :class:`FAMO` on :math:`\log(1 + L_i)`, to train from scratch.

    The update is FAMO's with :math:`D_i = L_i + 1` and no lower bounds. The defaults are the
    paper's constants with the descent and the shift of what appears to be the authors' code.
    As published:

    * paper, Algorithm 1: ``BalancedTrajectory(logit_optimizer="sgd")`` (it prints :math:`L_i` where
      its footnote says :math:`1 + L_i`);
    * code: ``BalancedTrajectory(decay=3e-3)``, the default of its command line.

    Keep the shift for a codec. :math:`\log R` of a rate is unbounded below, and without the shift
    training was seen to collapse to zero bits; the log also removes every constant factor, so that
    :math:`\lambda` in :math:`\lambda D` acts only through :math:`\lambda D + 1`.

    Coefficients: sum to 1. A loss may rise.

    Args:
        lr: :math:`\beta > 0`. Default 0.025 (paper, Section 4.1).
        decay: :math:`\gamma \ge 0`. Default 1e-3 (paper, Section 4.1, chosen from a grid 0 … 0.015;
            0 did not converge there).
        shift: Added to each loss before the logarithm. Default 1 (paper's footnote, and code).
        logit_optimizer: ``"adam"`` (default, code) or ``"sgd"`` (paper); see :class:`FAMO`.
        preference: See :class:`FAMO`. Default None (paper): equal.
        every: Update the logits only every n-th step. Default 1 (paper).
        lagged: Use the next batch's losses instead of an evaluation. Default False (paper).

    Raises:
        BalanceValueError: As :class:`FAMO`.

    Source: Zhang, Duan, Huang, Zhu, *Balanced Rate-Distortion Optimization in Learned Image
    Compression* (CVPR 2025), arXiv 2502.20161, Section 3.2.

    Example:
        >>> from moo_balance import BalancedTrajectory
        >>> BalancedTrajectory(decay=3e-3).shift
        1.0
    """

    lr: float = 0.025
    decay: float = 1e-3
    shift: float = 1.0
    logit_optimizer: Literal["adam", "sgd"] = "adam"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1
    lagged: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "shift", 0.0)

    @property
    def bound_advice(self) -> str:
        return advise(self, "a larger `shift`")


@dataclass(frozen=True)
class AnalyticQP(GramianWeighting):
    r"""Solution 2 of Balanced R-D: weights in closed form, for fine-tuning.

    With :math:`D_i = L_i + s`, log gradients :math:`a_i = g_i / D_i` and
    :math:`Q_{ij} = a_i \cdot a_j`,

    .. math::
        v = \frac{Q^{-1} \mathbf 1}{\mathbf 1^\top Q^{-1} \mathbf 1}, \qquad
        w = \Pi(v), \qquad
        d = c \sum_i w_i a_i, \qquad
        c = \Big(\sum_i \frac{w_i}{D_i}\Big)^{-1}

    :math:`v` is the shortest affine combination of the log gradients; it may leave the simplex,
    and :math:`\Pi` brings it back:

    * ``"softmax"`` (paper): not a projection. For two losses and :math:`v \in [0, 1]` it keeps both
      weights in [0.27, 0.73], and that is what protects a codec: the shortest combination gives
      the distortion nothing, and training collapses.
    * ``"simplex"``: the nearest point of the simplex, which the paper leaves to future work.
    * ``"exact"``: the quadratic programme with its constraint, hence the min-norm point of the log
      gradients (:class:`MGDA` with ``normalize="log"`` and a shift).

    Parallel, equal and zero gradients all have finite weights, in which the order of the losses
    does not matter; see :func:`~moo_balance.functional.analytic_qp_weights`.

    With a `preference` :math:`p`, :math:`Q` is that of :math:`a_i / p_i`, and
    :math:`v_i / p_i`, scaled to sum 1, is what is projected: the losses improve at relative rates
    in proportion to :math:`p`, as far as the projection leaves that so. The softmax is then
    :math:`w_i \propto p_i e^{v_i - p_i}`, which leaves :math:`v = p` where it is, as the published
    one leaves its centre.

    Coefficients: sum to 1 with `renormalize`; :math:`w_i / D_i` without. With ``"exact"`` no loss
    rises. With ``"simplex"`` none of two does, but one of several may. With ``"softmax"`` any may,
    about as often as under the plain sum: where two of three random gradients in ten dimensions,
    whose lengths differ by a factor of ten or so, conflict, the direction opposes one of them in
    about 60 % of the cases, that of ``"simplex"`` in 20 %, that of the sum in 65 %.

    Args:
        projection: :math:`\Pi`, one of the above. Default ``"softmax"`` (paper, Eq. 13).
        shift: :math:`s \ge 0`. Default 1 (paper's footnote).
        renormalize: Multiply by :math:`c`. Default True (paper).
        floor: :math:`\rho \ge 0`, to add :math:`\rho \max D_i` to each :math:`D_i`; see
            :class:`SumLog`. Default 0, as published.
        preference: :math:`p_i > 0` by name, scaled to sum 1. Default None (paper): equal.
        every: Solve each n-th step only, and keep :math:`w` in between. Default 1 (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range; from ``backward``, when a loss is
            below :math:`-s`.

    Source: arXiv 2502.20161, Section 3.3, Algorithm 2.

    Example:
        >>> import torch
        >>> from moo_balance import AnalyticQP
        >>> from moo_balance.weighting import Statistics
        >>> gramian = torch.tensor([[2.0, 4.0], [4.0, 10.0]])  # g1 = (1, 1), g2 = (3, 1)
        >>> statistics = Statistics(("a", "b"), torch.ones(2), gramian)
        >>> AnalyticQP(shift=0.0).weights(statistics, {}).weights
        tensor([0.8808, 0.1192])
        >>> AnalyticQP(shift=0.0, projection="exact").weights(statistics, {}).weights
        tensor([1., 0.])
    """

    leaves_out_satisfied = True

    projection: Literal["softmax", "simplex", "exact"] = "softmax"
    shift: float = 1.0
    renormalize: bool = True
    floor: float = field(default=0.0, kw_only=True)
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_choice(self, "projection", ("softmax", "simplex", "exact"))
        check_range(self, "shift", 0.0)
        check_range(self, "floor", 0.0)
        check_flag(self, "renormalize")

    bound_reason = TAKES_LOG

    @property
    def bound_advice(self) -> str:
        return advise(self, "a larger `shift`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_limits(0.0, self.shift, names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        shares = [1.0 / len(names)] * len(names)
        state = start_from_shares(super().init(names, device), shares)
        return {**state, **init_floor(self.floor, len(names), device)}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        distances = statistics.losses + self.shift
        scales, state = apply_floor(self.floor, distances, state)
        solve = convex_weights if self.projection == "exact" else affine_weights
        weights = solve_preferred(solve, gramian, scales, self.preference, statistics)
        return {**state, "weights": self._project(weights, statistics)}

    def _project(self, affine: Tensor, statistics: Statistics) -> Tensor:
        """Bring affine weights to the simplex, without the losses that are left out."""
        if self.projection == "exact":
            return affine
        if statistics.satisfied is not None:
            affine = affine.masked_fill(statistics.satisfied, -math.inf)
        if self.projection == "simplex":
            return project_simplex(affine)
        if self.preference is not None:
            # The softmax leaves the preference where it is, as it does the centre without one.
            preference = normalize_preference(self.preference, statistics)
            affine = affine + (preference.log() - preference)
        return torch.softmax(affine, 0)

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        distances = raise_by_floor(self.floor, statistics.losses + self.shift, state)
        return log_coefficients(state["weights"], distances, self.renormalize)

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": renormalize(state["weights"], statistics.satisfied)}
