"""The closed form for two gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moo_balance.functional._checks import on_host, precision, widest
from moo_balance.functional._host import finite_rows

Number = TypeVar("Number", float, Tensor)


def weights_of_two(gramian: Tensor, *, convex: bool) -> Tensor:
    """Weights of the shortest vector on the line through two gradients; ``convex``: between them.

    On the CPU the arithmetic is that of Python's floats: after a backward pass it takes half the
    time of tensors or less. Elsewhere it is the same on 0-d tensors, and no value is looked at, so
    that the host need not wait. Refuses, on the CPU, what is not finite.
    """
    result = torch.promote_types(gramian.dtype, torch.float32)
    if on_host(gramian):
        return gramian.new_tensor(_in_numbers(gramian, convex), dtype=result)
    entries = (widest(gramian.detach()).flatten() / 4).unbind()
    one, other, total, equal = _shares(entries, precision(gramian))
    shares = (torch.stack((one, other)) / total).masked_fill(equal, 0.5)
    return (shares.clamp(0.0, 1.0) if convex else shares).to(result)


def _in_numbers(gramian: Tensor, convex: bool) -> list[float]:
    # A quarter of each entry, here and there, so that no sum overflows.
    entries = [entry / 4 for row in finite_rows(gramian) for entry in row]
    one, other, total, equal = _shares(entries, precision(gramian))
    weights = [0.5, 0.5] if equal else [one / total, other / total]
    return [min(max(weight, 0.0), 1.0) for weight in weights] if convex else weights


def _shares(entries: Iterable[Number], precision: float) -> tuple[Number, Number, Number, Any]:
    r"""Unnormalised weights :math:`|g_2|^2 - g_1^\top g_2` and :math:`|g_1|^2 - g_1^\top g_2`.

    With their sum, and whether the gradients are equal as far as inner products of relative
    ``precision`` tell.
    """
    first, cross, mirrored, second = entries
    # Each share is its own difference: one minus the other would lose a share far below the other.
    one, other = second - cross, first - mirrored
    total = one + other
    return one, other, total, total <= 4 * precision * (first + second)
