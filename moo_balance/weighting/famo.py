"""FAMO: equal relative improvement at the price of one backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moo_balance.weighting.base import (
    PerLoss,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
    check_choice,
    check_every,
    check_names,
    check_range,
    filled,
    freeze_mappings,
    gaps_above,
    log_coefficients,
    lower_ends,
)

# torch.optim.Adam's defaults, which the official code leaves untouched.
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class FAMO(Weighting):
    r"""Fast Adaptive Multitask Optimization: losses that improve slowly get more weight.

    With :math:`D_i = L_i - b_i + s_i` and logits :math:`\xi` (zero at the start), each step is

    .. math::
        z &= \operatorname{softmax}(\xi), \qquad
        d = c \sum_i \frac{z_i}{D_i}\, g_i, \qquad
        c = \Big(\sum_i \frac{z_i}{D_i}\Big)^{-1} \\
        \delta_i &= \log D_i - \log D_i^{+}, \qquad
        q_i = z_i \Big(\delta_i - \sum_j z_j \delta_j\Big), \qquad
        \xi \leftarrow \xi - \beta\,(q + \gamma \xi)

    where :math:`D^{+}` is seen on the same batch after the step. A loss that fell faster than the
    average thereby loses weight. It approaches, at one backward pass a step, the direction in
    which all losses improve at the same relative rate.

    How the losses after the step are seen, one of three:

    * ``optimizer.step(closure)`` evaluates the closure again, with the same random numbers;
    * ``optimizer.observe(losses)`` after ``optimizer.step()``, in a loop that evaluates again;
    * ``lagged=True`` takes the next batch's losses instead: no extra forward pass, more noise.
      It is what the official code does in its deterministic toy problem.

    Coefficients: sum to 1.

    Args:
        lr: :math:`\beta > 0`. Default 0.025 (paper and code).
        decay: :math:`\gamma \ge 0`. Default 1e-3 (the paper's Algorithm 2, and the official run
            scripts for NYUv2, QM9 and CelebA; the classes in the code default to 1e-2 and 1e-5).
            With Adam it is added to the gradient before the moments, as Adam's `weight_decay`
            does, so it grows in effect as :math:`q` shrinks: in the long run any positive value
            ends where :class:`SumLog` ends.
        bounds: :math:`b_i`, a strict lower bound of each loss, a number or one per name. Default 0.
        shift: :math:`s_i`, likewise. Default 0. The code's 1e-8 is left out: a loss that is not
            above its bound is refused instead.
        logit_optimizer: How :math:`\xi` descends: ``"adam"`` (default, official code) or ``"sgd"`` (paper).
            Not a detail: the paper drops a factor :math:`1/\alpha` (the model's learning rate), so
            that plain descent with 0.025 hardly moves.
        every: Watch each n-th step only. Default 1 (paper).
        lagged: See above. Default False (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range; from ``backward``, when a loss is
            not above :math:`b_i - s_i`.

    Source: Liu et al., *FAMO: Fast Adaptive Multitask Optimization* (NeurIPS 2023),
    arXiv 2306.03792, Algorithm 2.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, FAMO
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), FAMO())
        >>> losses = optimizer.step(lambda: {"a": w[0] ** 2, "b": 4 * w[1] ** 2})
        >>> {name: round(float(c), 4) for name, c in optimizer.metrics.coefficients.items()}
        {'a': 0.9412, 'b': 0.0588}
    """

    lr: float = 0.025
    decay: float = 1e-3
    bounds: PerLoss = 0.0
    shift: PerLoss = 0.0
    logit_optimizer: Literal["adam", "sgd"] = "adam"
    every: int = 1
    lagged: bool = False

    def __post_init__(self) -> None:
        freeze_mappings(self)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "decay", 0.0)
        check_range(self, "bounds", -math.inf)
        check_range(self, "shift", -math.inf)
        check_choice(self, "logit_optimizer", ("adam", "sgd"))
        check_every(self)

    @property
    def observes_step(self) -> bool:
        return not self.lagged

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_ends(self.bounds, self.shift, names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("bounds", self.bounds, names)
        check_names("shift", self.shift, names)
        state = {"logits": filled(0.0, len(names), device)}
        if self.logit_optimizer == "adam":
            for key in ("exp_avg", "exp_avg_weight", "exp_avg_sq", "exp_avg_sq_weight"):
                state[key] = filled(0.0, len(names), device)
        return {**state, "log_gaps": filled(math.nan, len(names), device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        gaps = gaps_above(self.bounds, self.shift, statistics)
        if statistics.step % self.every == 0:
            log_gaps = gaps.log().to(state["logits"].dtype)
            if self.lagged:
                state = self._update(log_gaps, state)
            state = {**state, "log_gaps": log_gaps}
        weights = torch.softmax(state["logits"], 0)
        return WeightingOutput(weights, log_coefficients(weights, gaps), state)

    def observe(self, statistics: Statistics, state: State) -> State:
        return self._update(gaps_above(self.bounds, self.shift, statistics).log(), state)

    def _update(self, log_gaps: Tensor, state: State) -> State:
        """One descent step on the logits of those losses that have been seen before.

        All else about the others is still zero: without a gradient it stays so.
        """
        logits, before = state["logits"], state["log_gaps"]
        seen = before == before  # not NaN
        weights = torch.softmax(logits.masked_fill(~seen, -math.inf), 0)
        weights = weights.nan_to_num_(0.0)  # none seen yet: softmax of nothing
        delta = (before - log_gaps).nan_to_num_(0.0)
        delta.sub_(weights.dot(delta)).mul_(weights)
        gradient = delta.add_(logits, alpha=self.decay)
        if self.logit_optimizer == "sgd":
            return {**state, "logits": logits.sub(gradient, alpha=self.lr)}
        return {**state, **_adam(gradient, seen, state, self.lr)}


def _adam(gradient: Tensor, seen: Tensor, state: State, lr: float) -> State:
    """Adam on the logits.

    Its bias corrections 1 - beta^t are kept as running averages of ones, for each loss by itself
    since losses may be absent.
    """
    ones = seen.to(gradient.dtype)
    following = {
        "exp_avg": state["exp_avg"].lerp(gradient, 1.0 - _BETA1),
        "exp_avg_weight": state["exp_avg_weight"].lerp(ones, 1.0 - _BETA1),
        "exp_avg_sq": state["exp_avg_sq"].lerp(gradient.square(), 1.0 - _BETA2),
        "exp_avg_sq_weight": state["exp_avg_sq_weight"].lerp(ones, 1.0 - _BETA2),
    }
    # Where nothing was averaged yet the least weight that there can be takes the place of none.
    mean = following["exp_avg"] / following["exp_avg_weight"].clamp(min=1.0 - _BETA1)
    square = following["exp_avg_sq"] / following["exp_avg_sq_weight"].clamp(min=1.0 - _BETA2)
    logits = state["logits"].addcdiv(mean, square.sqrt_().add_(_EPS), value=-lr)
    return {"logits": logits, **following}
