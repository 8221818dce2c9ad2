"""IMTL-L: a learned scale for each loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.weighting._arguments import FloatOrByName
from moo_balance.weighting._learned_scales import LearnedScaleWeighting
from moo_balance.weighting.base import Statistics


@dataclass(frozen=True)
class IMTLL(LearnedScaleWeighting):
    r"""IMTL-L, impartial learning of losses: each loss has a scale, which is learned.

    With :math:`D_i = L_i - b_i` and log-scales :math:`s_i`, which start at `initial`,

    .. math::
        d = \sum_i e^{s_i} g_i, \qquad
        s \leftarrow \operatorname{Adam}\big(s,\ e^{s_i} D_i - 1\big)

    which descends on :math:`\sum_i e^{s_i} D_i - s_i` over the parameters and :math:`s` together.
    The step uses :math:`s` from before its batch, so gradient accumulation needs no gradient per
    loss.

    At a stationary :math:`s_i = -\log D_i` every scaled loss is 1, and each coefficient is
    :math:`1 / D_i`: this is ``SumLog(renormalize=False, floor=0)`` with a lag. It is also twice
    :class:`UncertaintyWeighting` for regression losses, whose :math:`s` has the other sign.

    Coefficients: not normalised; :math:`K p_i e^{s_i}`, 1 at the start by default. A loss may rise.

    Args:
        lr: Learning rate of Adam on :math:`s`. Default 0.025, as for :class:`UncertaintyWeighting`
            (paper and LibMTL train :math:`s` with the model, at its learning rate). There is no
            weight decay on :math:`s`.
        initial: :math:`s_i` before the first step. Default 0 (paper, LibMTL, TorchJD). ``"first"``
            is :math:`-\log D_i` of the first loss, so that no unit matters.
        bounds: :math:`b_i`, a strict lower bound of each loss, a number or one per name. Default 0.
            For a loss below it :math:`s` would grow without end; it is refused.
        preference: :math:`p_i > 0` by name, scaled to sum 1: the loss counts :math:`K p_i` times.
            Default None: once.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is below :math:`b_i`.

    Source: Liu et al., *Towards Impartial Multi-task Learning* (ICLR 2021), the balance of losses;
    that of gradients is another method, ``IMTLG``.

    Example:
        >>> import torch
        >>> from moo_balance import IMTLL
        >>> from moo_balance.weighting import Statistics
        >>> rule = IMTLL(initial="first")
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> rule.weights(Statistics(("a", "b"), torch.tensor([0.5, 2.0])), state).coefficients
        tensor([2.0000, 0.5000])
    """

    lr: float = 0.025
    initial: float | Literal["first"] = 0.0
    bounds: FloatOrByName = 0.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    _pull = 1.0

    def _factors(self, statistics: Statistics) -> Tensor:
        return torch.ones_like(statistics.losses)

    def _first_scale(self) -> float:
        return float(self.initial)
