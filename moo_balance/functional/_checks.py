"""Checks and conversions shared by the pure functions."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promote half precision (and integers) to float32; wider types stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Apple's "mps" has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def widest(tensor: Tensor) -> Tensor:
    """Promote to the widest dtype of the device."""
    return tensor.to(widest_dtype(tensor.device))


def precision(tensor: Tensor) -> float:
    """Relative rounding unit of the entries of ``tensor``, which a later cast does not improve."""
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    return torch.finfo(dtype).eps


def on_host(tensor: Tensor) -> bool:
    """Is looking at a value free? Elsewhere than on the CPU the host would have to wait for it."""
    return tensor.device.type == "cpu"


def check_gramian(gramian: Tensor) -> None:
    """Refuse a Gramian that is not square, or (on the CPU, where looking is free) not finite."""
    check_square(gramian)
    if on_host(gramian):
        check_finite(gramian)


def check_square(gramian: Tensor) -> None:
    """Refuse what has not the shape of a Gramian."""
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise BalanceValueError(
            "Parameter `gramian` should be a square matrix [K, K] with K >= 1. "
            f"Found shape {tuple(gramian.shape)}. Pass the inner products of K gradients."
        )


def check_finite(gramian: Tensor) -> None:
    """Refuse a Gramian with an entry that is not finite; looks at its values."""
    # One number tells the usual case. The sum of finite entries may overflow, so it tells no more.
    if not math.isfinite(gramian.sum().item()) and not bool(gramian.isfinite().all()):
        refuse_entries(gramian.tolist())


def refuse_entries(entries: list[list[float]]) -> NoReturn:
    """Say which entries of a Gramian are not finite."""
    raise BalanceValueError(
        f"Parameter `gramian` should be finite. Found {entries}. "
        "Look for a loss that diverged, or compute the Gramian in float64 if it overflowed."
    )


def check_positive(name: str, value: float) -> None:
    """Refuse a hyper-parameter that should be a positive, finite number."""
    if not 0.0 < value < float("inf"):
        raise BalanceValueError(
            f"Parameter `{name}` should be positive and finite. Found {value!r}."
        )
