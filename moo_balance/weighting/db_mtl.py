"""DB-MTL: averaged gradients of log losses, all as long as the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional._checks import widest
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    FloatOrByName,
    advise,
    check_common,
    check_flag,
    check_names,
    check_range,
    constant_state,
    lower_limits,
    relative_preference,
    shifted_losses,
)
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting, rows_of


@dataclass(frozen=True)
class DBMTL(RowWeighting):
    r"""Dual balancing: log losses against different scales, equal lengths against dominance.

    With :math:`D_i = L_i + s_i` and a running average :math:`e_i` (zero at the start),

    .. math::
        e_i \leftarrow \beta\,e_i + (1 - \beta)\,\frac{g_i}{D_i}, \qquad
        d = \max_j \lVert e_j \rVert \sum_i \frac{e_i}{\lVert e_i \rVert}

    Zero at the start makes the first steps shorter, the :math:`t`-th by :math:`1 - \beta^t`, and
    changes no direction, because the lengths are made equal afterwards: with Adam it is invisible,
    with SGD a short warm-up. ``debiased=True`` divides it out, for each loss by the number of its
    own steps.

    With :math:`\beta = 0` nothing is kept. Then
    :math:`d = \max_j (\lVert g_j \rVert / D_j) \sum_i g_i / \lVert g_i \rVert`.

    Coefficients: at least 1 for each loss with a gradient. They multiply the averages :math:`e_i`,
    or the gradients if :math:`\beta = 0`.

    A loss may rise. A loss whose average is zero gets nothing.

    Memory: the averages, as large as all gradients, and once more between ``backward`` and
    ``step``.

    Args:
        beta: :math:`\beta \in [0, 1)`, the weight of the past. Default 0.9 (paper and code, whose
            further argument ``beta_sigma`` lets it shrink with the step, and is 0 by default).
        shift: :math:`s_i`, a number or one per name. Default 0. The code's 1e-8 is left out: a loss
            at 0 counts as satisfied instead.
        debiased: Divide the averages by :math:`1 - \beta^t`. Default False (paper and code).
        preference: Lengths in proportion, by name, in place of equal ones; their mean is as above.
            Default None, equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses; from
            ``backward``, when a loss is below :math:`-s_i`.

    Source: Lin et al., *Dual-Balancing for Multi-Task Learning* (2023), arXiv 2308.12029,
    Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, DBMTL
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), DBMTL())
        >>> _ = optimizer.backward({"a": w[0] ** 2, "b": 100 * w[1] ** 4})
        >>> w.grad  # a tenth of the gradient of log b, in both
        tensor([0.4000, 0.4000])
    """

    beta: float = 0.9
    shift: FloatOrByName = 0.0
    debiased: bool = False
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "beta", 0.0, below=1.0)
        check_range(self, "shift", named=True)
        check_flag(self, "debiased")

    leaves_out_satisfied = True

    @property
    def keeps(self) -> str:
        return "average" if self.beta else ""

    @property
    def combines(self) -> Literal["gradients", "kept"]:
        return "kept" if self.beta else "gradients"

    bound_reason = TAKES_LOG

    @property
    def bound_advice(self) -> str:
        return advise(self, "a larger `shift`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_limits(0.0, self.shift, names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("shift", self.shift, names)
        if not (self.debiased and self.beta):
            return {}
        return {"counts": constant_state(0.0, len(names), device)}

    def row_factors(self, statistics: Statistics) -> Tensor:
        return 1.0 / shifted_losses(0.0, self.shift, statistics)

    def track(self, kept: Tensor, gradient: Tensor) -> Tensor:
        return kept.lerp(gradient, 1.0 - self.beta)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        averages = rows_of(statistics, self).gramian if self.beta else gramian
        assert averages is not None
        norms = widest(averages).diagonal().sqrt()
        lengths, kept = norms, dict(state)
        if not self.beta:
            lengths = norms * self.row_factors(statistics).to(norms)
        elif "counts" in state:
            kept["counts"] = state["counts"] + 1.0
            lengths = norms / (1.0 - self.beta ** kept["counts"])
        if statistics.satisfied is not None:
            lengths = lengths.masked_fill(statistics.satisfied, 0.0)
        weights = torch.where(norms > 0, lengths.amax() / norms, 0.0)
        if self.preference is not None:
            weights = weights * relative_preference(self.preference, statistics)
        return {**kept, "weights": weights}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"].to(statistics.losses)
