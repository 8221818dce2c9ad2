"""Checks of hyper-parameters, and arguments as tensors, for the methods of this folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from moo_balance._hints import name_nearest
from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import constant_vector
from moo_balance.weighting.base import State, Statistics, Weighting, state_dtype

FloatOrByName: TypeAlias = float | Mapping[str, float]
"""A number for all losses, or one for each by name."""


# ---------------------------------------------------------------------- arguments as tensors


def constant_state(value: float, count: int, device: torch.device) -> Tensor:
    """A state tensor [K] with the same number for each loss."""
    return torch.full((count,), value, dtype=state_dtype(device), device=device)


def constants_like(values: Sequence[float], losses: Tensor) -> Tensor:
    """Constants [K] in dtype and on the device of the losses, not to be written to."""
    return constant_vector(tuple(values), losses.dtype, losses.device)


def values_by_name(value: FloatOrByName, names: Sequence[str]) -> list[float]:
    """One number per name, from a number for all or from a mapping; 0 for names it lacks."""
    if isinstance(value, Mapping):
        return [float(value.get(name, 0.0)) for name in names]
    return [float(value)] * len(names)


def broadcastable(value: FloatOrByName, statistics: Statistics) -> Tensor | float:
    """A number for all losses as it is, a mapping as a vector [K] with 0 for names it lacks."""
    if isinstance(value, Mapping):
        return constants_like(values_by_name(value, statistics.names), statistics.losses)
    return float(value)


def shifted_losses(bounds: FloatOrByName, shift: FloatOrByName, statistics: Statistics) -> Tensor:
    r"""The distances :math:`D_i = L_i - b_i + s_i` that log methods work with, shape [K]."""
    return statistics.losses - (
        broadcastable(bounds, statistics) - broadcastable(shift, statistics)
    )


_FLOOR = "floor"
"""The entry of a state that :func:`raise_by_floor` needs: reference distances, NaN before there
is one."""


def init_floor(floor: float, count: int, device: torch.device) -> State:
    """The part of a state that :func:`raise_by_floor` needs, before the first step."""
    return {_FLOOR: constant_state(math.nan, count, device)} if floor else {}


def apply_floor(floor: float, distances: Tensor, state: State) -> tuple[Tensor, State]:
    """Distances of a step raised by the largest so far, and the state that has these."""
    state = _update_floor(distances, state)
    return raise_by_floor(floor, distances, state), state


def _update_floor(distances: Tensor, state: State) -> State:
    """That part of the state, with the largest distance that each loss has had so far."""
    if _FLOOR not in state:
        return state
    return {**state, _FLOOR: torch.fmax(state[_FLOOR], distances.to(state[_FLOOR].dtype))}


def raise_by_floor(floor: float, distances: Tensor, state: State) -> Tensor:
    """Distances plus `floor` times their reference distances; as they are before there is one."""
    if _FLOOR not in state:
        return distances
    return distances + floor * state[_FLOOR].nan_to_num(0.0).to(distances.dtype)


def lower_limits(bounds: FloatOrByName, shift: FloatOrByName, names: Sequence[str]) -> list[float]:
    """What each loss must stay above for :func:`shifted_losses` to be positive."""
    pairs = zip(values_by_name(bounds, names), values_by_name(shift, names), strict=True)
    return [bound - shift for bound, shift in pairs]


def normalize_preference(preference: Mapping[str, float] | None, statistics: Statistics) -> Tensor:
    """Preferences of the present losses, summing to 1; equal ones for None.

    Those of losses that are to be left out (``statistics.satisfied``) are 0.
    """
    if preference is None and statistics.satisfied is None:
        return torch.full_like(statistics.losses, 1.0 / len(statistics.names))
    values = [1.0] * len(statistics.names)
    if preference is not None:
        values = values_by_name(preference, statistics.names)
    total = sum(values)
    preferences = constants_like([value / total for value in values], statistics.losses)
    if statistics.satisfied is None:
        return preferences
    preferences = preferences.masked_fill(statistics.satisfied, 0.0)
    return preferences / preferences.sum()


def relative_preference(preference: Mapping[str, float], statistics: Statistics) -> Tensor:
    """Preferences of the present losses over their mean."""
    shares = normalize_preference(preference, statistics)
    if statistics.satisfied is None:
        return shares * len(shares)
    # Those that are left out are divided by, too, and must be no zeros.
    count = len(shares) - statistics.satisfied.sum()
    return (shares * count).masked_fill(statistics.satisfied, 1.0)


def left_of_two(weights: Tensor, satisfied: Tensor) -> Tensor:
    """Weights of losses, two at most of which may still share them although one is satisfied."""
    if len(weights) > 2:
        return weights
    others = (~satisfied).to(weights.dtype)
    return torch.where(satisfied.any(), others / others.sum(), weights)


def renormalize(weights: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Weights that sum to 1 again where a loss is absent; equal ones where all others were 0.

    Args:
        weights: Of the present losses, shape [K].
        left_out: Which of these are to be left out, too (``statistics.satisfied``).
    """
    if left_out is not None:
        weights = weights.masked_fill(left_out, 0.0)
        mass, count = weights.sum(), len(weights) - left_out.sum()
        return torch.where(mass > 0, weights / mass, 1.0 / count).masked_fill(left_out, 0.0)
    mass = weights.sum()
    return torch.where(mass > 0, weights / mass, 1.0 / len(weights))


def log_coefficients(weights: Tensor, distances: Tensor, renormalize: bool = True) -> Tensor:
    r"""Turn weights of the gradients of :math:`\log D_i` into coefficients of the raw gradients.

    :math:`\nabla \log D_i = g_i / D_i`, hence :math:`c\,w_i / D_i` with
    :math:`c = 1 / \sum_i (w_i / D_i)`, which makes them sum to 1 (FAMO, Algorithm 2), or
    :math:`c = 1` without `renormalize`.
    """
    coefficients = weights / distances
    if not renormalize:
        return coefficients
    total = coefficients.sum()
    # The host sees whether the inverse of a distance has overflowed.
    if total.is_cpu and _SAFE < total.item() < 1 / _SAFE:
        return coefficients / total
    # Relative to the least distance that counts, which may even be zero, as what float32 makes of a
    # small float64.
    least = torch.where(weights > 0, distances, math.inf).amin()
    coefficients = weights * torch.where(distances > least, least / distances, 1.0)
    return coefficients / coefficients.sum()


_SAFE = 1e-30  # neither this nor its inverse is near an end of float32's range


TAKES_LOG = "takes the logarithm of its distance to that bound"
"""The ``bound_reason`` of most methods that have one."""


def advise(weighting: Weighting, arguments: str) -> str:
    """The ``bound_advice`` of a method that some arguments of its own can help."""
    return f"Give {type(weighting).__name__} {arguments}, or a loss that stays above."


def copy_mappings(weighting: Weighting) -> None:
    """Copy the mappings of a frozen dataclass, so that a caller's later edit cannot reach it."""
    for field in fields(weighting):  # type: ignore[arg-type]
        value = getattr(weighting, field.name)
        if isinstance(value, Mapping):
            object.__setattr__(weighting, field.name, dict(value))


# ---------------------------------------------------------------------- checks


def check_common(weighting: Weighting) -> None:
    """Copy the mappings, and check the hyper-parameters that mean the same in every method.

    They are ``preference`` and ``every``, where a method has them.
    """
    copy_mappings(weighting)
    check_preference(weighting)
    check_whole(weighting, "every", 1)


def check_names(argument: str, value: object, names: Sequence[str], complete: bool = False) -> None:
    """Refuse a mapping with names that are no losses, or one that is not `complete`."""
    if not isinstance(value, Mapping):
        return
    unknown = [name for name in value if name not in names]
    missing = [name for name in names if name not in value] if complete else []
    if unknown or missing:
        fault = f"nothing for `{missing[0]}`." if missing else ""
        if unknown:
            fault = f"`{unknown[0]}`, which is none.{name_nearest(unknown[0], names)}"
        listed = ", ".join(f"`{name}`" for name in names)
        raise BalanceValueError(
            f"Parameter `{argument}` should name the losses {listed}. Found {fault} "
            "Give each loss by the name it has in `backward`. If the first batch lacks some, "
            "declare all of them by `loss_names=[…]` of BalancedOptimizer."
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether a hyper-parameter is a number, which a flag is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_range(
    weighting: Weighting,
    argument: str,
    low: float = -math.inf,
    below: float = math.inf,
    open: bool = False,
    text: str = "",
    high: float = math.inf,
    named: bool = False,
) -> None:
    """Refuse a hyper-parameter outside [low, high], and not below `below`.

    Args:
        weighting: The method.
        argument: The hyper-parameter.
        low: The least number; with `open`, the number that it should be above.
        below: The number that it should be below.
        open: Exclude `low`.
        text: A text that stands for another choice, and is checked elsewhere.
        high: The largest number.
        named: Allow a mapping, each entry of which is checked.
    """
    value = getattr(weighting, argument)
    entries = value.items() if named and isinstance(value, Mapping) else [("", value)]
    for name, number in entries:
        valid = is_number(number) and math.isfinite(number) and number < below and number <= high
        if not valid or not (low < number if open else low <= number):
            where = f"`{argument}[{name!r}]`" if name else f"`{argument}`"
            raise BalanceValueError(
                f"Parameter {where} of {type(weighting).__name__} should be a finite number"
                f"{_describe_range(low, below, open, high)}{f', or {text!r}' if text else ''}. "
                f"Found {number!r}."
            )


def _describe_range(low: float, below: float, open: bool, high: float) -> str:
    limits = (
        (f"{'above' if open else 'at least'} {low:g}", low > -math.inf),
        (f"below {below:g}", below < math.inf),
        (f"at most {high:g}", high < math.inf),
    )
    listed = " and ".join(limit for limit, given in limits if given)
    return f", {listed}" if listed else ""


def check_mapping(weighting: Weighting, argument: str, **limits: Any) -> None:
    """Refuse what maps no names to numbers, or a number outside of :func:`check_range`."""
    value = getattr(weighting, argument)
    if not isinstance(value, Mapping):
        raise BalanceValueError(
            f"Parameter `{argument}` of {type(weighting).__name__} should map each loss's name to "
            f"a finite number. Found {value!r}. Write, for example, "
            f'`{argument}={{"rate": 1.0, "distortion": 2.0}}`.'
        )
    check_range(weighting, argument, named=True, **limits)


def check_preference(weighting: Weighting) -> None:
    """Refuse a ``preference`` with an entry that is not positive."""
    if getattr(weighting, "preference", None) is not None:
        check_mapping(weighting, "preference", low=0.0, open=True)


def check_choice(weighting: Weighting, argument: str, choices: Sequence[object]) -> None:
    """Refuse a hyper-parameter that is none of `choices`."""
    value = getattr(weighting, argument)
    if value not in choices:
        raise BalanceValueError(
            f"Parameter `{argument}` of {type(weighting).__name__} should be one of "
            f"{', '.join(map(repr, choices))}. Found {value!r}."
        )


def check_whole(weighting: Weighting, argument: str, least: int) -> None:
    """Refuse a hyper-parameter that is not a whole number of at least `least`."""
    value = getattr(weighting, argument)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BalanceValueError(
            f"Parameter `{argument}` of {type(weighting).__name__} should be a whole number, "
            f"at least {least}. Found {value!r}."
        )


def check_flag(weighting: Weighting, *arguments: str) -> None:
    """Refuse hyper-parameters that are neither True nor False."""
    for argument in arguments:
        value = getattr(weighting, argument)
        if not isinstance(value, bool):
            raise BalanceValueError(
                f"Parameter `{argument}` of {type(weighting).__name__} should be True or False. "
                f"Found {value!r}."
            )
