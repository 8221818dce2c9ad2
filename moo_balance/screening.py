"""Values that must not reach the balance: not finite, or below a bound.

On the host they are looked at and named at once. On an accelerator looking would make the host
wait, so there the answer stays on the device as a flag, and masks the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError, NonFiniteError
from moo_balance.weighting.base import Statistics


def on_host(tensor: Tensor) -> bool:
    """Is reading this tensor free of synchronisation?"""
    return tensor.is_cpu


def faulty_losses(statistics: Statistics, bounds: Sequence[float], method: str) -> Tensor | None:
    """Which losses [K] are not finite or not above their bound, as flags on the device.

    On the host there is nothing to carry on: None, or an error.
    """
    losses = statistics.losses
    if not on_host(losses):
        return ~(losses.isfinite() & (losses > losses.new_tensor(bounds)))
    for name, value, bound in zip(statistics.names, losses.tolist(), bounds, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"Loss `{name}` should be finite. Found {value}. Skip the batch, lower the "
                'learning rate, or pass nonfinite="skip" to skip such steps.'
            )
        if not value > bound:
            raise BalanceValueError(
                f"Loss `{name}` should be above {bound:g}, because {method} works with its "
                f"distance from there. Found {value:g}. Give {method} a lower bound or a shift if "
                "it has one, or a loss that stays above."
            )
    return None


def faulty_gradients(statistics: Statistics, scaled: bool) -> Tensor | None:
    """Which gradients [K] are not finite; under a loss scaler never an error, it handles them."""
    gramian = statistics.gramian
    assert gramian is not None
    # One number tells the usual case. It may also be not finite because the sum overflowed.
    if on_host(gramian) and math.isfinite(gramian.trace().item()):
        return None
    finite = gramian.diagonal().isfinite()
    if not on_host(gramian):
        return ~finite
    if bool(finite.all()):
        return None
    if scaled:
        return ~finite
    name = statistics.names[int((~finite).nonzero()[0])]
    raise NonFiniteError(
        f"The gradient of loss `{name}` should be finite. Found NaN or infinity in it. Look for a "
        "square root or a division at zero, train under a GradScaler if this is float16, or pass "
        'nonfinite="skip" to skip such steps.'
    )


def are_finite(gradients: Iterable[Tensor]) -> bool:
    """Are all entries finite, as far as the host can tell?"""
    values = [
        gradient._values() if gradient.is_sparse else gradient
        for gradient in gradients
        if on_host(gradient)
    ]
    if not values:
        return True
    found = torch.zeros(())
    try:
        # The check of GradScaler, which multiplies by one as it goes: one call for all of them.
        torch._amp_foreach_non_finite_check_and_unscale_(values, found, torch.ones(()))
    except RuntimeError:  # it knows neither complex numbers nor memory that overlaps
        return all(bool(value.isfinite().all()) for value in values)
    return not found


def sanitized(statistics: Statistics, bounds: Sequence[float], valid: Tensor) -> Statistics:
    """Harmless figures in place of faulty ones, so that a masked step can run through the maths."""
    safe = [bound + 1.0 if math.isfinite(bound) else 1.0 for bound in bounds]
    losses = torch.where(valid, statistics.losses, statistics.losses.new_tensor(safe))
    gramian = statistics.gramian
    if gramian is not None:
        identity = torch.eye(len(safe), dtype=gramian.dtype, device=gramian.device)
        gramian = torch.where(valid, gramian, identity)
    return statistics._replace(losses=losses, gramian=gramian)
