"""Adam on K numbers, one for each loss, any of which may be absent."""

from __future__ import annotations

import torch
from torch import Tensor

from moo_balance.weighting._arguments import constant_state
from moo_balance.weighting.base import State

# The defaults of torch.optim.Adam.
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8

_MOMENTS = ("exp_avg", "exp_avg_weight", "exp_avg_sq", "exp_avg_sq_weight")


def init_adam(count: int, device: torch.device) -> State:
    """The state before the first update: four entries [K], all zero."""
    return {key: constant_state(0.0, count, device) for key in _MOMENTS}


def adam(
    values: Tensor, gradient: Tensor, present: Tensor, state: State, lr: float
) -> tuple[Tensor, State]:
    """One update of `values` [K], and the state that follows.

    Adam divides its running averages by 1 - beta^t, where t counts the updates. Here each loss has
    its own count, since losses may be absent: the divisor is the running average of `present` [K].
    Nothing changes for a loss that is not present.
    """
    seen = present.to(gradient.dtype)
    one: Tensor | float = 1.0 - _BETA1
    two: Tensor | float = 1.0 - _BETA2
    all_present = present.is_cpu and bool(present.all())  # the usual case, in fewer operations
    if not all_present:
        one, two = seen * one, seen * two
    moments = {
        "exp_avg": state["exp_avg"].lerp(gradient, one),
        "exp_avg_weight": state["exp_avg_weight"].lerp(seen, one),
        "exp_avg_sq": state["exp_avg_sq"].lerp(gradient.square(), two),
        "exp_avg_sq_weight": state["exp_avg_sq_weight"].lerp(seen, two),
    }
    # The divisor of a loss that was never present is 0. The clamp, at the divisor after one update,
    # avoids 0/0.
    mean = moments["exp_avg"] / moments["exp_avg_weight"].clamp(min=1.0 - _BETA1)
    square = moments["exp_avg_sq"] / moments["exp_avg_sq_weight"].clamp(min=1.0 - _BETA2)
    mean = mean if all_present else mean.mul_(seen)
    return values.addcdiv(mean, square.sqrt_().add_(_EPS), value=-lr), moments
