"""What a weighting is: frozen hyper-parameters, and a state that is passed as a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError

State: TypeAlias = dict[str, Tensor]
"""What a weighting remembers. A tensor with a first dimension of K holds one entry per loss; a
0-d tensor belongs to all of them. ``BalancedOptimizer`` relies on that to slice, save and move
every state without knowing whose it is."""

PerLoss: TypeAlias = float | Mapping[str, float]
"""A number for all losses, or one for each by name."""


class Statistics(NamedTuple):
    """What a weighting may look at in one step.

    Args:
        names: The K losses that are present, in the order of the tensors below.
        losses: Their values, shape [K], detached, unscaled.
        gramian: Inner products of their gradients, shape [K, K]; None for a weighting that does
            not ask for it, or in a step in between two refreshes (``every``).
        step: How many steps have been committed so far.
    """

    names: tuple[str, ...]
    losses: Tensor
    gramian: Tensor | None = None
    step: int = 0


class WeightingOutput(NamedTuple):
    """The answer of a weighting.

    ``weights`` [K] are the method's own (on the simplex unless its docstring says otherwise),
    ``coefficients`` [K] multiply the raw gradients, ``state`` is what to remember once the step
    has been taken.
    """

    weights: Tensor
    coefficients: Tensor
    state: State


class Weighting(ABC):
    """Turns losses, and a Gramian where it asks for one, into K coefficients.

    Subclasses are frozen dataclasses, one per published method. They never call ``backward`` and
    never see a parameter. Write a new one by giving the two class variables and the methods below;
    ``BalancedOptimizer`` then checkpoints, resumes, slices and distributes it like any other.
    """

    uses_gramian: ClassVar[bool] = False
    """Does :meth:`weights` need inner products of gradients?"""

    uses_losses: ClassVar[bool] = True
    """Do the coefficients of a step depend on the losses of the same step? Where they do not,
    gradient accumulation needs no gradient per loss."""

    every: int = 1
    """Gather the costly evidence (the Gramian, the losses after the step) each n-th step only."""

    @property
    def observes_step(self) -> bool:
        """Does the method need the losses on the same batch after the step?"""
        return False

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        """What each loss must stay above; minus infinity where any finite value will do."""
        return [-float("inf")] * len(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        """The state before the first step. Raises where a named argument does not fit `names`."""
        return {}

    @abstractmethod
    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        """Weights and coefficients for this step, and the state that follows it."""

    def observe(self, statistics: Statistics, state: State) -> State:
        """The state after the losses were seen again, on the same batch, behind the step."""
        return state


class GramianWeighting(Weighting):
    """Scale, solve, renormalise: the three moves of every method that looks at gradients.

    A subclass gives :meth:`solve` and :meth:`coefficients`. Here is what they share: between two
    refreshes (``every``) the last solution is kept and only the coefficients follow the losses.
    """

    uses_gramian: ClassVar[bool] = True

    @abstractmethod
    def solve(self, statistics: Statistics, gramian: Tensor) -> Tensor:
        """Weights [K] on the scaled gradients."""

    @abstractmethod
    def coefficients(self, statistics: Statistics, weights: Tensor) -> Tensor:
        """What multiplies the raw gradients, given the weights of the scaled ones."""

    def init(self, names: Sequence[str], device: torch.device) -> State:
        if self.every == 1:
            return {}
        return {"weights": uniform(len(names), device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        if statistics.gramian is not None:
            weights = self.solve(statistics, statistics.gramian)
        else:
            weights = _renormalized(state["weights"])
        kept = {"weights": weights.to(state["weights"])} if self.every > 1 else {}
        return WeightingOutput(weights, self.coefficients(statistics, weights), kept)


def _renormalized(weights: Tensor) -> Tensor:
    """Sum 1 again where a loss is absent; equal shares where those present had none."""
    mass = weights.sum()
    return torch.where(mass > 0, weights / mass, 1.0 / len(weights))


def state_dtype(device: torch.device) -> torch.dtype:
    """Double precision wherever the device has it: K numbers cost nothing."""
    return torch.float32 if device.type == "mps" else torch.float64


def filled(value: float, count: int, device: torch.device) -> Tensor:
    """A state tensor with the same number for each loss."""
    return torch.full((count,), value, dtype=state_dtype(device), device=device)


def uniform(count: int, device: torch.device) -> Tensor:
    """The centre of the simplex."""
    return filled(1.0 / count, count, device)


def named_values(value: PerLoss, names: Sequence[str], default: float = 0.0) -> list[float]:
    """One number per name, from a number for all or from a mapping."""
    if isinstance(value, Mapping):
        return [float(value.get(name, default)) for name in names]
    return [float(value)] * len(names)


def beside(value: PerLoss, statistics: Statistics, default: float = 0.0) -> Tensor | float:
    """What broadcasts against the losses: a number for all as it is, a mapping as a vector [K]."""
    if isinstance(value, Mapping):
        return statistics.losses.new_tensor(named_values(value, statistics.names, default))
    return float(value)


def gaps_above(bounds: PerLoss, shift: PerLoss, statistics: Statistics) -> Tensor:
    r"""The distances :math:`D_i = L_i - b_i + s_i` that log methods work with, shape [K]."""
    return statistics.losses - (beside(bounds, statistics) - beside(shift, statistics))


def lower_ends(bounds: PerLoss, shift: PerLoss, names: Sequence[str]) -> list[float]:
    """What each loss must stay above for :func:`gaps_above` to be positive."""
    pairs = zip(named_values(bounds, names), named_values(shift, names), strict=True)
    return [bound - shift for bound, shift in pairs]


def normalized_preference(preference: Mapping[str, float] | None, statistics: Statistics) -> Tensor:
    """Preferences of the present losses, summing to 1; equal ones for None."""
    if preference is None:
        return torch.full_like(statistics.losses, 1.0 / len(statistics.names))
    values = named_values(preference, statistics.names)
    total = sum(values)
    return statistics.losses.new_tensor([value / total for value in values])


def log_coefficients(weights: Tensor, gaps: Tensor, renormalize: bool = True) -> Tensor:
    r"""Turn weights of the gradients of :math:`\log D_i` into coefficients of the raw gradients.

    :math:`\nabla \log D_i = g_i / D_i`, hence :math:`c\,w_i / D_i` with
    :math:`c = 1 / \sum_i (w_i / D_i)`, which makes them sum to 1 (FAMO, Algorithm 2), or
    :math:`c = 1` without `renormalize`.
    """
    coefficients = weights / gaps
    return coefficients / coefficients.sum() if renormalize else coefficients


def check_names(argument: str, value: object, names: Sequence[str], complete: bool = False) -> None:
    """Refuse a mapping that speaks of losses nobody declared, or misses one it must have."""
    if not isinstance(value, Mapping):
        return
    unknown = [name for name in value if name not in names]
    missing = [name for name in names if name not in value] if complete else []
    if unknown or missing:
        fault = f"`{unknown[0]}`, which is no loss" if unknown else f"nothing for `{missing[0]}`"
        raise BalanceValueError(
            f"Parameter `{argument}` should speak of the losses {_listed(names)}. Found {fault}. "
            "Give each loss by the name it has in `backward`."
        )


def check_range(
    weighting: Weighting, argument: str, low: float, high: float = float("inf"), open: bool = False
) -> None:
    """Refuse a hyper-parameter, or an entry of a named one, outside [low, high] or (low, high)."""
    value = getattr(weighting, argument)
    entries = value.items() if isinstance(value, Mapping) else [("", value)]
    for name, number in entries:
        valid = (
            isinstance(number, (int, float)) and number == number and abs(number) != float("inf")
        )
        if not valid or not (low < number < high if open else low <= number <= high):
            span = f"{'(' if open else '['}{low:g}, {high:g}{')' if open else ']'}"
            where = f"`{argument}[{name!r}]`" if name else f"`{argument}`"
            raise BalanceValueError(
                f"Parameter {where} of {type(weighting).__name__} should be a finite number in "
                f"{span}. Found {number!r}."
            )


def check_choice(weighting: Weighting, argument: str, choices: Sequence[object]) -> None:
    """Refuse a hyper-parameter that is none of `choices`."""
    value = getattr(weighting, argument)
    if value not in choices:
        raise BalanceValueError(
            f"Parameter `{argument}` of {type(weighting).__name__} should be one of "
            f"{', '.join(map(repr, choices))}. Found {value!r}."
        )


def check_every(weighting: Weighting) -> None:
    """Refuse an ``every`` that counts nothing."""
    if not isinstance(weighting.every, int) or weighting.every < 1:
        raise BalanceValueError(
            f"Parameter `every` of {type(weighting).__name__} should be a whole number of steps, "
            f"at least 1. Found {weighting.every!r}."
        )


def freeze_mappings(weighting: Weighting) -> None:
    """Copy the mappings of a frozen dataclass, so that a caller's later edit cannot reach it."""
    for field in fields(weighting):  # type: ignore[arg-type]
        value = getattr(weighting, field.name)
        if isinstance(value, Mapping):
            object.__setattr__(weighting, field.name, dict(value))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
