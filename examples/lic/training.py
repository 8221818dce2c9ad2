"""The training loop, one and the same for every way of weighting rate against distortion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import fmean, median

from torch import Tensor, nn

from examples.lic.schedules import SETTLED
from examples.lic.session import Observer, Recipe, Session, normalize_gradient, rate_distortion
from moo_balance import History, StepMetrics
from moo_balance.weighting import Weighting

__all__ = ["NAMES", "SETTLED", "Recipe", "Trace", "normalize_gradient", "rate_distortion", "train"]

NAMES = ("rate", "distortion")


@dataclass(frozen=True)
class Trace:
    """What a training run looked like."""

    history: History = field(default_factory=History)
    seconds: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """Median time of a step."""
        return 1e3 * median(self.seconds)

    def last(self, kind: str) -> dict[str, float]:
        """The last ``"loss"``, ``"weight"`` or ``"coefficient"`` of each objective."""
        return {name: self.history.series(f"{kind}/{name}")[1][-1] for name in NAMES}

    def settled(self, kind: str) -> dict[str, float]:
        """The same as a mean over the steps after the learning rate has first fallen.

        Where a run ends is decided here; the mean over all steps says little about a method that
        spends half of them on the way to its weights.
        """
        first = int(SETTLED * len(self.history))
        return {name: fmean(self.history.series(f"{kind}/{name}")[1][first:]) for name in NAMES}


class _Recorder(Observer):
    """Keeps a trace of all steps."""

    def __init__(self, on_step: Callable[[StepMetrics], object]) -> None:
        self.trace = Trace()
        self._on_step = on_step
        self._start = 0.0

    def before(self, session: Session, images: Tensor) -> None:
        self._start = time.perf_counter()

    def after(self, session: Session) -> None:
        self.trace.seconds.append(time.perf_counter() - self._start)
        self.trace.history.append(session.optimizer.metrics)
        self._on_step(session.optimizer.metrics)


def train(
    model: nn.Module,
    crops: Iterator[Tensor],
    weighting: Weighting,
    recipe: Recipe,
    *,
    lmbda: float,
    seed: int,
    on_step: Callable[[StepMetrics], object] = lambda balance: None,
) -> Trace:
    """Train `model` in place.

    Args:
        model: The codec, on the device to train on.
        crops: Batches of images, one of which each step takes.
        weighting: Any weighting of ``moo_balance``.
        recipe: Steps, learning rate, and what is done to gradients.
        lmbda: λ, the price of distortion: larger means more bits and a better picture.
        seed: For the quantisation noise: runs with equal seeds and crops meet equal noise.
        on_step: Called after each step with its losses and weights.
    """
    recorder = _Recorder(on_step)
    Session(model, weighting, recipe, lmbda=lmbda, seed=seed).run(crops, [recorder])
    return recorder.trace
