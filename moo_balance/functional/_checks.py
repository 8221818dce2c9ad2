"""Checks and conversions shared by the pure functions."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NoReturn

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError


def at_least_float32(tensor: Tensor) -> Tensor:
    """Promote half precision (and integers) to float32; wider types stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def result_dtype(gramian: Tensor) -> torch.dtype:
    """The dtype of what is computed from a Gramian: its own, or float32 if that is wider."""
    return torch.promote_types(gramian.dtype, torch.float32)


@lru_cache(maxsize=1024)
def constant_vector(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of constants, not to be written to.

    It is cached, because copying it to a GPU synchronizes.
    """
    with torch.inference_mode(False):  # it may be used outside of inference mode, too
        return torch.tensor(values, dtype=dtype, device=device)


@cache
def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it; Apple's "mps" has not."""
    return torch.float32 if device.type == "mps" else torch.float64


def widest(tensor: Tensor) -> Tensor:
    """Promote to the widest dtype of the device."""
    return tensor.to(widest_dtype(tensor.device))


def relative_scales(scales: Tensor) -> Tensor:
    """What gradients are multiplied by in place of a division by scales, up to a common factor.

    The factors are at most 1, so that nothing overflows; a scale of zero has the factor 0. On the
    CPU, Python's floats take a third of the time of tensors.
    """
    if scales.is_cpu:
        values = scales.tolist()
        if not all(value >= 0.0 for value in values):
            raise BalanceValueError(
                f"Parameter `scales` should not be negative. Found {values}. "
                "Divide gradients by losses only where these are positive."
            )
        least = min((value for value in values if value), default=0.0)
        factors = [least / value if value else 0.0 for value in values]
        return torch.tensor(factors, dtype=torch.float64, device="cpu")
    scales = widest(scales.detach())
    least = scales.masked_fill(scales == 0, math.inf).amin()
    return torch.where(scales == 0, 0.0, least / scales)


def check_scales(gramian: Tensor, scales: Tensor) -> None:
    """Refuse scales that do not match a Gramian."""
    if scales.shape != gramian.shape[:1]:
        raise BalanceValueError(
            f"Parameter `scales` should have shape ({gramian.shape[0]},), as a row of `gramian`. "
            f"Found shape {tuple(scales.shape)}."
        )


def precision(tensor: Tensor) -> float:
    """Relative rounding unit of the entries of ``tensor``, which a later cast does not improve."""
    dtype = tensor.dtype if tensor.dtype.is_floating_point else torch.float32
    return torch.finfo(dtype).eps


def check_gramian(gramian: Tensor) -> None:
    """Refuse a Gramian that is not square, or not finite.

    The latter only on the CPU: reading a value from another device synchronizes.
    """
    check_square(gramian)
    # The sum of finite entries may overflow, so only a finite sum is an answer.
    if (
        gramian.is_cpu
        and not math.isfinite(gramian.sum().item())
        and not bool(gramian.isfinite().all())
    ):
        refuse_nonfinite(gramian.tolist())


def check_square(gramian: Tensor) -> None:
    """Refuse a tensor without the shape of a Gramian."""
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or gramian.shape[0] == 0:
        raise BalanceValueError(
            "Parameter `gramian` should be a square matrix [K, K] with K >= 1. "
            f"Found shape {tuple(gramian.shape)}. Pass the inner products of K gradients."
        )


def refuse_nonfinite(entries: list[list[float]]) -> NoReturn:
    """Refuse a Gramian with these entries, not all of which are finite."""
    raise BalanceValueError(
        f"Parameter `gramian` should be finite. Found {entries}. "
        "Check for a loss that diverged, or compute the Gramian in float64 if it overflowed."
    )


def check_positive(name: str, value: float) -> None:
    """Refuse a hyper-parameter that should be a positive, finite number."""
    if not 0.0 < value < math.inf:
        raise BalanceValueError(
            f"Parameter `{name}` should be positive and finite. Found {value!r}."
        )
