"""FAMO: equal relative improvement for one backward pass per step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.weighting._adam import adam, init_adam
from moo_balance.weighting._arguments import (
    TAKES_LOG,
    FloatOrByName,
    advise,
    apply_floor,
    check_choice,
    check_common,
    check_flag,
    check_names,
    check_range,
    constant_state,
    init_floor,
    log_coefficients,
    lower_limits,
    raise_by_floor,
    relative_preference,
    shifted_losses,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput


class LogitWeighting(Weighting):
    """What :class:`FAMO` and its variants share: the rule itself.

    A subclass gives the arguments, as fields; those that it leaves out are fixed.
    """

    lr: float
    decay: float
    shift: FloatOrByName
    bounds: FloatOrByName = 0.0
    logit_optimizer: Literal["adam", "sgd"]
    floor: float = 0.0
    preference: Mapping[str, float] | None
    lagged: bool

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "decay", 0.0)
        check_range(self, "bounds", named=True)
        check_range(self, "shift", named=True)
        check_range(self, "floor", 0.0)
        check_choice(self, "logit_optimizer", ("adam", "sgd"))
        check_flag(self, "lagged")

    @property
    def observes_step(self) -> bool:
        return not self.lagged

    bound_reason = TAKES_LOG
    leaves_out_satisfied = True

    @property
    def bound_advice(self) -> str:
        return advise(self, "lower `bounds` or a larger `shift`")

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return lower_limits(self.bounds, self.shift, names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("bounds", self.bounds, names)
        check_names("shift", self.shift, names)
        check_names("preference", self.preference, names, complete=True)
        count = len(names)
        moments = init_adam(count, device) if self.logit_optimizer == "adam" else {}
        return {
            "logits": constant_state(0.0, count, device),
            **moments,
            **init_floor(self.floor, count, device),
            "log_distances": constant_state(math.nan, count, device),
        }

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        distances = shifted_losses(self.bounds, self.shift, statistics)
        distances, state = apply_floor(self.floor, distances, state)
        if statistics.step % self.every == 0:
            log_distances = distances.log().to(state["logits"].dtype)
            if self.lagged:
                state = self._update(log_distances, statistics, state)
            state = {**state, "log_distances": log_distances}
        logits = state["logits"]
        if statistics.satisfied is not None:
            logits = logits.masked_fill(statistics.satisfied, -math.inf)
        if self.preference is not None:
            logits = logits + relative_preference(self.preference, statistics).log()
        weights = torch.softmax(logits, 0)
        return WeightingOutput(weights, log_coefficients(weights, distances), state)

    def observe(self, statistics: Statistics, state: State) -> State:
        distances = shifted_losses(self.bounds, self.shift, statistics)
        log_distances = raise_by_floor(self.floor, distances, state).log()
        return self._update(log_distances.to(state["logits"].dtype), statistics, state)

    def _update(self, log_distances: Tensor, statistics: Statistics, state: State) -> State:
        """One descent step on the logits of the losses that were present before and have moved.

        A loss that is exactly what it was cannot be improved, such as a constant: compared with
        others it would be the slowest for ever, and get all the weight.
        """
        logits, delta = state["logits"], state["log_distances"] - log_distances
        moved = delta.abs() > 0.0  # nor NaN, as for a loss that was not present before
        if statistics.satisfied is not None:
            moved = moved & ~statistics.satisfied
        preference, dual = None, logits
        if self.preference is not None:
            preference = relative_preference(self.preference, statistics)
            dual = logits + 2.0 * preference.log()
        weights = torch.softmax(dual.masked_fill(~moved, -math.inf), 0)
        weights = weights.nan_to_num_(0.0)  # the softmax over no loss at all
        delta = delta.nan_to_num_(0.0)
        if preference is not None:
            delta = delta / preference
        delta.sub_(weights.dot(delta)).mul_(weights)
        gradient = delta.add_(logits, alpha=self.decay)
        if self.logit_optimizer == "sgd":
            return {**state, "logits": logits.sub(gradient.mul_(moved), alpha=self.lr)}
        logits, moments = adam(logits, gradient, moved, state, self.lr)
        return {**state, "logits": logits, **moments}


@dataclass(frozen=True)
class FAMO(LogitWeighting):
    r"""Fast Adaptive Multitask Optimization: losses that improve slowly get more weight.

    With :math:`D_i = L_i - b_i + s_i` and logits :math:`\xi` (zero at the start), each step is

    .. math::
        z &= \operatorname{softmax}(\xi), \qquad
        d = c \sum_i \frac{z_i}{D_i}\, g_i, \qquad
        c = \Big(\sum_i \frac{z_i}{D_i}\Big)^{-1} \\
        \delta_i &= \log D_i - \log D_i^{+}, \qquad
        q_i = z_i \Big(\delta_i - \sum_j z_j \delta_j\Big), \qquad
        \xi \leftarrow \xi - \beta\,(q + \gamma \xi)

    (with a `preference` :math:`p`, scaled to mean 1:
    :math:`z = \operatorname{softmax}(\xi + 2 \log p)`, :math:`\delta_i / p_i` in place of
    :math:`\delta_i`, and :math:`d` with :math:`z_i / p_i`)

    where :math:`D^{+}` is evaluated on the same batch after the step. A loss that fell faster than
    the average thereby loses weight. It approaches, with one backward pass per step, the direction
    in which all losses improve at the same relative rate, or at rates in proportion to the
    preference.

    The losses after the step come from one of three:

    * ``optimizer.step(closure)`` evaluates the closure again, with the same random numbers;
    * ``optimizer.observe(losses)`` after ``optimizer.step()``, in a loop that evaluates again;
    * ``lagged=True`` takes the next batch's losses instead: no extra forward pass, more noise.
      It is what the official code does in its deterministic toy problem.

    A loss that did not move at all in a step, such as a constant, has no part in the comparison:
    its logit stays.

    Coefficients: sum to 1. A loss may rise.

    Args:
        lr: :math:`\beta > 0`. Default 0.025 (paper and code).
        decay: :math:`\gamma \ge 0`. Default 1e-3 (the paper's Algorithm 2, and the official run
            scripts for NYUv2, QM9 and CelebA; the classes in the code default to 1e-2 and 1e-5).
            With Adam it is added to the gradient before the moments, as Adam's `weight_decay`
            does, so it grows in effect as :math:`q` shrinks: in the long run any positive value
            ends where ``SumLog(floor=0)`` ends.
        bounds: :math:`b_i`, a strict lower bound of each loss, a number or one per name. Default 0.
        shift: :math:`s_i`, likewise. Default 0. The official code's :math:`\epsilon` is
            ``shift=1e-8``, which counts once a loss falls to about 1e-5. Without it a loss at its
            bound is satisfied, and left out.
        logit_optimizer: How :math:`\xi` descends: ``"adam"`` (default, official code) or ``"sgd"``
            (paper). Not a detail: the paper drops a factor :math:`1/\alpha` (the model's learning
            rate), so that plain descent with 0.025 hardly moves.
        floor: :math:`\rho \ge 0`, to add :math:`\rho \max D_i` to each :math:`D_i`; see
            :class:`SumLog`. Default 0, as published.
        preference: :math:`p_i > 0` by name. With logits that stay at zero the weights are
            :math:`p`, as those of :class:`SumLog`. Default None: equal.
        every: Update the logits only every n-th step. Default 1 (paper).
        lagged: Compare with the next batch's losses. Default False (paper).

    Raises:
        BalanceValueError: A hyper-parameter is out of range; from ``backward``, when a loss is
            below :math:`b_i - s_i`.

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
    bounds: FloatOrByName = 0.0
    shift: FloatOrByName = 0.0
    logit_optimizer: Literal["adam", "sgd"] = "adam"
    floor: float = field(default=0.0, kw_only=True)
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1
    lagged: bool = False
