"""Values that must not enter the balance: not finite, or below their lower bound.

On the CPU they are found, and named in an error, at once. Reading them from an accelerator would
synchronize, so there the result stays on the device as a flag per loss: the flags mask the step,
and are reported when the host reads the metrics (``log_dict``). Losses that count as satisfied are
found on the way; ``_satisfied.py`` leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moo_balance._torch_internals import entries_of, find_nonfinite
from moo_balance.errors import BalanceValueError, NonFiniteError
from moo_balance.functional._checks import constant_vector
from moo_balance.weighting.base import State, Statistics, Weighting

_ONE = torch.ones((), device="cpu")

_ZERO = torch.finfo(torch.float32).tiny ** 2
"""The squared length, about 1e-76, up to which a gradient counts as zero, in any dtype.

Entries of float32 are subnormal there and have lost digits, and a coefficient in units of inverse
length would overflow.
"""


class Flags(NamedTuple):
    """What was found of each loss, as booleans [K] on the device; None where the host found none.

    Args:
        losses: Losses that are not finite or below their bound.
        gradients: Losses whose gradient is not finite.
        satisfied: Losses at their bound, or whose gradient counts as zero.
    """

    losses: Tensor | None = None
    gradients: Tensor | None = None
    satisfied: Tensor | None = None

    def union(self) -> Tensor | None:
        """The losses that are faulty for one reason or the other."""
        if self.losses is None or self.gradients is None:
            return self.gradients if self.losses is None else self.losses
        return self.losses | self.gradients

    def are_clear(self) -> Tensor | None:
        """Whether no loss is faulty, on the device; None where the host has checked."""
        flags = self.union()
        return None if flags is None else ~flags.any()


def unite(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The losses that one mask or the other marks."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def names_of(names: Sequence[str], marks: Tensor | None) -> tuple[str, ...]:
    """The losses that a mask marks; None marks none. Synchronizes."""
    if marks is None:
        return ()
    return tuple(name for name, mark in zip(names, marks.tolist(), strict=True) if mark)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether a value can be read without a synchronization."""
    return tensor.is_cpu


def flag_losses(
    statistics: Statistics, bounds: Sequence[float], weighting: Weighting, scaled: bool
) -> Flags:
    """Flags of the losses that are not finite or below their bound, and of those at their bound.

    Args:
        statistics: The losses.
        bounds: What each of them must not be below.
        weighting: The method that needs this.
        scaled: A loss scaler is in use, which handles what is not finite.

    Raises:
        NonFiniteError: On the CPU, unless `scaled`: a loss is not finite.
        BalanceValueError: On the CPU: a loss is below its bound.
    """
    losses = statistics.losses
    if not is_on_cpu(losses):
        lower = constant_vector(tuple(bounds), losses.dtype, losses.device)
        # Nothing is at a bound that no loss has, so that most methods need no second mask.
        equal = losses == lower if max(bounds) > -math.inf else None
        return Flags(~(losses.isfinite() & (losses >= lower)), satisfied=equal)
    overflowed, at_bound = False, list[str]()
    for name, value, bound in zip(statistics.names, losses.tolist(), bounds, strict=True):
        if not math.isfinite(value):
            overflowed = True
            if scaled:
                continue
            others = names_of(statistics.names, ~losses.isfinite())[1:]
            also = f" (and in {', '.join(f'`{other}`' for other in others)})" if others else ""
            raise NonFiniteError(
                f"Loss `{name}` should be finite. Found {value}{also}. Skip the batch, lower the "
                'learning rate, or pass nonfinite="skip" to skip such steps.'
            )
        if value <= bound:
            if value == bound:
                at_bound.append(name)
                continue
            raise BalanceValueError(
                f"Loss `{name}` should be at least {bound:g}, because {type(weighting).__name__} "
                f"{weighting.bound_reason}. Found {value:g}. If this batch has no such loss, leave "
                f"it out of the dict. Otherwise: {weighting.bound_advice}"
            )
    satisfied = None
    if at_bound:  # they are rare
        satisfied = torch.tensor([name in at_bound for name in statistics.names], device="cpu")
    return Flags(~losses.isfinite() if overflowed else None, satisfied=satisfied)


def flag_gradients(flags: Flags, names: Sequence[str], gramian: Tensor, scaled: bool) -> Flags:
    """Flags of the losses, and those of their gradients that are not finite, or count as zero.

    Args:
        flags: What :func:`flag_losses` has found.
        names: The K losses.
        gramian: Inner products of their gradients, shape [K, K].
        scaled: A loss scaler is in use. Gradients that overflow are left to it and raise no error.

    Raises:
        NonFiniteError: On the CPU, unless `scaled`.
    """
    squares = gramian.diagonal()
    if not is_on_cpu(gramian):
        satisfied = unite(flags.satisfied, squares.abs() <= _ZERO)
        return flags._replace(gradients=~squares.isfinite(), satisfied=satisfied)
    values = squares.tolist()
    # Estimates from independent batches may be negative. If the first is NaN, so is the minimum,
    # and each is looked at.
    if not min(map(abs, values)) > _ZERO:
        flags = flags._replace(satisfied=unite(flags.satisfied, squares.abs() <= _ZERO))
    # The sum of finite terms may overflow, so only a finite sum is an answer.
    if math.isfinite(sum(values)) or all(map(math.isfinite, values)):
        return flags
    if scaled:
        return flags._replace(gradients=~squares.isfinite())
    name = next(n for n, value in zip(names, values, strict=True) if not math.isfinite(value))
    raise NonFiniteError(
        f"The gradient of loss `{name}` should be finite. Found NaN or infinity in it. "
        "Look for a square root or a division at zero, train under a GradScaler if this is "
        'float16, or pass nonfinite="skip" to skip such steps.'
    )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries of dense CPU tensors are finite."""
    if not tensors:
        return True
    if find_nonfinite is not None:
        flag = torch.zeros((), device="cpu")
        try:
            find_nonfinite(list(tensors), flag, _ONE)
            return not flag
        except RuntimeError:
            pass
    # A sum that is finite has finite terms; only one that is not leads to a check of each entry.
    return all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in tensors)


def grads_are_finite(grads: Iterable[Tensor]) -> bool:
    """Whether all gradients on the CPU are finite."""
    on_cpu = [grad for grad in grads if is_on_cpu(grad)]
    return all_finite([entries_of(grad) if grad.is_sparse else grad for grad in on_cpu])


def nonfinite_grad_error(names: Sequence[str]) -> NonFiniteError:
    """The error for a gradient of the sum of these losses that is not finite."""
    return NonFiniteError(
        f"The gradient of {' or '.join(f'`{name}`' for name in names)} should be finite. Found "
        "NaN or infinity in `.grad`. Look for a square root or a division at zero, lower the "
        'learning rate, or pass nonfinite="skip" to skip such steps.'
    )


def replace_nonfinite(statistics: Statistics, bounds: Sequence[float], valid: Tensor) -> Statistics:
    """Statistics with harmless values where `valid` is False.

    A masked step still runs through the method, whose solvers refuse what is not finite.
    """
    losses, gramian = statistics.losses, statistics.gramian
    harmless = tuple([bound + 1.0 if math.isfinite(bound) else 1.0 for bound in bounds])
    losses = torch.where(valid, losses, constant_vector(harmless, losses.dtype, losses.device))
    if gramian is not None:
        identity = torch.eye(len(harmless), dtype=gramian.dtype, device=gramian.device)
        gramian = torch.where(valid, gramian, identity)
    return statistics._replace(losses=losses, gramian=gramian)


def select_state(valid: Tensor | None, following: State, before: State) -> State:
    """The following state where the step was valid, else the one before; decided on the device."""
    if valid is None:
        return following
    return {key: torch.where(valid, value, before[key]) for key, value in following.items()}


def mask_coefficients(valid: Tensor, coefficients: Tensor, scaled: bool) -> Tensor:
    """Coefficients of a step that was not valid: zeros, with which it is taken without effect.

    With a scaler they are NaN, which makes it skip the step.
    """
    nothing = torch.full_like(coefficients, math.nan if scaled else 0.0)
    return torch.where(valid, coefficients, nothing)


class FaultCounts:
    """How often each loss was flagged, counted on the device until the host reads it."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], Tensor] = {}

    def add(self, names: tuple[str, ...], flags: Tensor) -> None:
        """Count one step."""
        self._counts[names] = self._counts.get(names, 0) + flags

    def raise_if_any(self) -> None:
        """Report what was flagged since the last call, and clear the counts. Synchronizes.

        Raises:
            NonFiniteError: A loss was flagged.
        """
        faults = [
            (name, count)
            for names, counts in self._counts.items()
            for name, count in zip(names, counts.tolist(), strict=True)
            if count
        ]
        self._counts.clear()
        if faults:
            name, count = faults[0]
            raise NonFiniteError(
                f"Loss `{name}` or its gradient should be finite and above its bound. Found "
                f"{count} steps since the last report where it was not; the balance kept its "
                'state in them. Lower the learning rate, or pass nonfinite="skip".'
            )
