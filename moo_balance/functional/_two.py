"""The closed form for two gradients."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from moo_balance.functional._checks import refuse_nonfinite, relative_scales, widest

Number = TypeVar("Number", float, Tensor)


def weights_of_two(gramian: Tensor, scales: Tensor | None = None, *, convex: bool) -> Tensor:
    """Weights of the shortest vector on the line through two gradients; ``convex``: between them.

    With ``scales``, of the gradients divided by them.

    On the CPU this is arithmetic on Python's floats, in half the time of tensors or less, and
    refuses what is not finite. Elsewhere it is the same on 0-d tensors, and no value is read,
    which would synchronize.
    """
    dtype = torch.promote_types(gramian.dtype, torch.float32)
    # Inner products are as precise as they were computed; a cast does not improve them.
    precision = torch.finfo(gramian.dtype if gramian.is_floating_point() else dtype).eps
    if scales is not None:
        factors = relative_scales(scales)
        gramian = widest(gramian.detach()) * factors.unsqueeze(1) * factors
    if gramian.is_cpu:
        return gramian.new_tensor(_on_host(gramian, precision, convex), dtype=dtype)
    return _on_device(gramian, precision, convex).to(dtype)


def _on_host(gramian: Tensor, precision: float, convex: bool) -> list[float]:
    (first, cross), (mirrored, second) = rows = gramian.tolist()
    # A quarter of each entry, here and on the device, so that no sum overflows.
    first, cross, mirrored, second = first / 4, cross / 4, mirrored / 4, second / 4
    if not math.isfinite(first + cross + mirrored + second):
        refuse_nonfinite(rows)
    one, other, total, equal = _shares(first, cross, mirrored, second, precision)
    if equal:
        return [0.5, 0.5]
    one, other = one / total, other / total
    return [min(max(one, 0.0), 1.0), min(max(other, 0.0), 1.0)] if convex else [one, other]


def _on_device(gramian: Tensor, precision: float, convex: bool) -> Tensor:
    first, cross, mirrored, second = (widest(gramian.detach()).flatten() / 4).unbind()
    one, other, total, equal = _shares(first, cross, mirrored, second, precision)
    weights = (torch.stack((one, other)) / total).masked_fill(equal, 0.5)
    return weights.clamp(0.0, 1.0) if convex else weights


def _shares(
    first: Number, cross: Number, mirrored: Number, second: Number, precision: float
) -> tuple[Number, Number, Number, Any]:
    r"""Unnormalised weights :math:`|g_2|^2 - g_1^\top g_2` and :math:`|g_1|^2 - g_1^\top g_2`.

    With their sum, and whether the gradients are equal as far as inner products of relative
    ``precision`` tell.
    """
    # Each share is its own difference: one minus the other would lose a share far below the other.
    one, other = second - cross, first - mirrored
    total = one + other
    return one, other, total, total <= 4 * precision * (first + second)
