"""ReLoBRaLo: losses that fall slowly get more weight, with a random look back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    check_whole,
    constant_state,
    values_by_name,
)
from moo_balance.weighting._random import step_generator
from moo_balance.weighting._rates import share
from moo_balance.weighting._shares import count_others, present_weights
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


@dataclass(frozen=True)
class ReLoBRaLo(Weighting):
    r"""Relative Loss Balancing with Random Lookback: equal relative progress.

    With the losses of the step before and those of the first step,

    .. math::
        \hat\lambda_i &= K \operatorname{softmax}_i \frac{L(t)}{T\,L(t-1)}, \qquad
        \lambda^0_i = K \operatorname{softmax}_i \frac{L(t)}{T\,L(0)} \\
        \lambda(t) &= \beta \big( \rho\,\lambda(t-1) + (1 - \rho)\,\lambda^0 \big)
        + (1 - \beta)\,\hat\lambda, \qquad d = \sum_i \lambda_i(t)\, g_i

    where :math:`\rho` is 0 with the probability `lookback`, else 1, for all losses at once: now and
    then the average starts again from the progress since the first step. :math:`\lambda` starts at
    1. The draw depends on `seed` and the number of the step only, so it is the same on all ranks,
    and a resumed run repeats it. A loss has its own first step, and the step before is the last one
    that had it.

    No unit matters, as a rate is a quotient. :class:`SumLog` removes scales; ReLoBRaLo leaves them
    as they are and moves weight to the loss whose relative progress is the least. Without memory
    (``beta=0``, ``lookback=0``) it is :class:`SoftAdapt` with relative slopes.

    Coefficients: sum to K, and are 1 where all rates are equal. A loss may rise.

    Args:
        beta: :math:`\beta \in [0, 1)`, the paper's :math:`\alpha`. Default 0.999 (official code,
            its author's article, the copy in ConFIG; PhysicsNeMo and neuraloperator have 0.95).
        temperature: :math:`T > 0`. Default 0.1 (article, ConFIG; 1 in the official code,
            PhysicsNeMo and neuraloperator). Rates of single steps are close to 1, and with
            :math:`T = 1` the weights hardly move.
        lookback: Probability that :math:`\rho` is 0. Default 0.01 (article, PhysicsNeMo and
            neuraloperator; ConFIG 0.001; 0 in the official code, which switches off what the method
            is named after).
        preference: :math:`p_i > 0` by name, scaled to sum 1; multiplies :math:`\exp` in both
            softmax. With equal rates :math:`\lambda_i = K p_i`. Default None: equal.
        seed: Seed of the draws, a whole number ≥ 0. Default 0.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss; from ``backward``,
            when a loss is negative.

    Source: Bischof & Kraus, *Multi-Objective Loss Balancing for Physics-Informed Deep Learning*
    (2021), arXiv 2110.09813. The official code starts the average at the weights of the second
    step, in place of 1.

    Example:
        >>> import torch
        >>> from moo_balance import ReLoBRaLo
        >>> from moo_balance.weighting import Statistics
        >>> rule = ReLoBRaLo(beta=0.5, temperature=1.0, lookback=0.0)
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> for step, losses in enumerate([[4.0, 4.0], [2.0, 4.0]]):
        ...     statistics = Statistics(("a", "b"), torch.tensor(losses), step=step)
        ...     _, coefficients, state = rule.weights(statistics, state)
        >>> coefficients
        tensor([0.8775, 1.1225])
    """

    leaves_out_satisfied = True

    beta: float = 0.999
    temperature: float = 0.1
    lookback: float = 0.01
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    seed: int = 0

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "beta", 0.0, below=1.0)
        check_range(self, "temperature", 0.0, open=True)
        check_range(self, "lookback", 0.0, high=1.0)
        check_whole(self, "seed", 0)

    bound_reason = "divides by it in the next step"
    bound_advice = "Give a loss that stays positive."

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        shares = values_by_name(self.preference or 1.0, names)
        factor = len(names) / sum(shares)
        weights = torch.stack([constant_state(factor * value, 1, device)[0] for value in shares])
        unknown = constant_state(math.nan, len(names), device)
        return {"first": unknown, "last": unknown.clone(), "weights": weights}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        losses, count = statistics.losses.to(state["first"]), count_others(statistics)
        weights, mass = present_weights(state["weights"], statistics.satisfied)
        first = torch.where(state["first"].isnan(), losses, state["first"])
        last = torch.where(state["last"].isnan(), losses, state["last"])
        weights = weights * count
        if self._looks_back(statistics.step):
            weights = self._balance(losses / first, statistics)
        weights = weights.lerp(self._balance(losses / last, statistics), 1.0 - self.beta)
        # The present losses share what they hold; that of absent ones is kept for them.
        state = {"first": first, "last": losses, "weights": weights * (mass / count)}
        weights = weights.to(statistics.losses)
        return WeightingOutput(weights, weights, state)

    def _looks_back(self, step: int) -> bool:
        """Whether the average starts again in this step. Drawn on the host."""
        generator = step_generator(self.seed, step)
        draw = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
        return draw.item() < self.lookback

    def _balance(self, rates: Tensor, statistics: Statistics) -> Tensor:
        shares = share(rates / self.temperature, self.preference, statistics)
        return count_others(statistics) * shares
