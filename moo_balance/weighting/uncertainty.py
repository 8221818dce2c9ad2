"""Uncertainty weighting: a learned variance for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.weighting._arguments import FloatOrByName, check_names, constants_like
from moo_balance.weighting._learned_scales import LearnedScaleWeighting
from moo_balance.weighting.base import State, Statistics


@dataclass(frozen=True)
class UncertaintyWeighting(LearnedScaleWeighting):
    r"""Uncertainty weighting: each loss has a variance, which is learned.

    With :math:`D_i = L_i - b_i` and log-variances :math:`s_i`, which start at `initial`,

    .. math::
        d = \sum_i f_i\, e^{-s_i} g_i, \qquad
        s \leftarrow \operatorname{Adam}\Big(s,\ \frac12 - f_i\, e^{-s_i} D_i\Big)

    which descends on :math:`\sum_i f_i e^{-s_i} D_i + s_i / 2` over the parameters and :math:`s`
    together. :math:`f_i` is 1/2 for a regression loss and 1 for a classification loss. The gradient
    in :math:`s` is in closed form. The step uses :math:`s` from before its batch, so gradient
    accumulation needs no gradient per loss.

    At a stationary :math:`s_i = \log (2 f_i D_i)` each coefficient is :math:`1 / (2 D_i)`, and a
    regression loss contributes :math:`\frac12 (1 + \log D_i)`: this is half of
    ``SumLog(renormalize=False, floor=0)``, with a lag. ``SumLog(floor=0)`` has the same direction
    without one.

    Coefficients: not normalised; :math:`f_i K p_i e^{-s_i}`, 1/2 at the start by default. A loss
    may rise.

    Args:
        lr: Learning rate of Adam on :math:`s`. Default 0.025 (the codes of Nash-MTL and FAMO; the
            paper and LibMTL train :math:`s` with the model, at its learning rate). Adam without
            weight decay: whatever the wrapped optimizer decays, :math:`s` is not pulled to 0.
        initial: :math:`s_i` before the first step. Default 0 (paper, Nash-MTL, FAMO, TorchJD;
            LibMTL has -0.5). ``"first"`` is :math:`\log (2 f_i D_i)` of the first loss, so that no
            unit matters: from 0 a loss of 1e6 needs hundreds of steps, in which the others do not
            count.
        classification: Names of the losses with :math:`f_i = 1`, such as a cross-entropy. Default
            none. The stationary coefficient is the same.
        bounds: :math:`b_i`, a strict lower bound of each loss, a number or one per name. Default 0.
            A loss below its bound, such as a negative log-likelihood of a density, would send
            :math:`s` to minus infinity; it is refused.
        preference: :math:`p_i > 0` by name, scaled to sum 1: the loss counts :math:`K p_i` times.
            Default None: once.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is below :math:`b_i`.

    Source: Kendall, Gal, Cipolla, *Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics* (CVPR 2018), arXiv 1705.07115.

    Example:
        >>> import torch
        >>> from moo_balance import UncertaintyWeighting
        >>> from moo_balance.weighting import Statistics
        >>> rule = UncertaintyWeighting(lr=0.1)
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> statistics = Statistics(("a", "b"), torch.tensor([0.5, 2.0]))
        >>> for _ in range(500):
        ...     _, coefficients, state = rule.weights(statistics, state)
        >>> coefficients.round(decimals=2)
        tensor([1.0000, 0.2500])
    """

    lr: float = 0.025
    initial: float | Literal["first"] = 0.0
    classification: Sequence[str] = ()
    bounds: FloatOrByName = 0.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    _pull = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.classification
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(isinstance(name, str) for name in names):
            raise BalanceValueError(
                "Parameter `classification` of UncertaintyWeighting should be a sequence of names "
                f"of losses. Found {names!r}."
            )
        object.__setattr__(self, "classification", tuple(names))

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("classification", dict.fromkeys(self.classification, 1.0), names)
        return super().init(names, device)

    def _factors(self, statistics: Statistics) -> Tensor:
        names = statistics.names
        return constants_like(
            [1.0 if name in self.classification else 0.5 for name in names], statistics.losses
        )

    def _first_scale(self) -> float:
        return -float(self.initial)
