"""What a problem is: a model, its losses on the next batch, and a score that is not one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


class Training(NamedTuple):
    """One training from its initial weights on.

    Args:
        params: What is trained.
        draw: Returns the next batch. A game is played here, and a discriminator takes its step.
        losses: The losses of a batch, scalars by name. Drawing random numbers is allowed.
        validate: The score on validation data, by which runs are selected. Lower is better.
        test: The score on test data, which is reported. Lower is better.
    """

    params: Sequence[nn.Parameter]
    draw: Callable[[], Any]
    losses: Callable[[Any], dict[str, Tensor]]
    validate: Callable[[], float]
    test: Callable[[], float]


@dataclass(frozen=True)
class Problem:
    """A problem with several losses.

    Args:
        title: A line for people: what is trained.
        score: What the score is, with its unit; lower is better.
        start: Makes a training. Its initial weights, batches and, where it has any, its training
            data follow from the seed; the test data do not.
        loss_names: The losses, in the order of `losses`.
        primary: The loss that methods with a reference take as it.
        steps: Steps of Adam, with a cosine schedule down to 0.
        rates: Learning rates to choose from, for static weights and for each method alike.
        trivial: A run whose test score is not below this one has failed.
        expected_to_lose: Whether balancing was expected to lose here, before anything was run.
        preference: The point of the front that is asked for, for methods with that argument.
        targets: Upper bounds that must hold, for methods with that argument.
    """

    title: str
    score: str
    start: Callable[[int], Training]
    loss_names: tuple[str, ...]
    primary: str
    steps: int
    rates: tuple[float, float, float]
    trivial: float
    expected_to_lose: bool = False
    preference: Mapping[str, float] | None = None
    targets: Mapping[str, float] = field(default_factory=dict)


EQUATIONS = ("burgers", "helmholtz", "inverse", "wave")
"""The problems in which a network solves a differential equation."""
