"""The training loop, one and the same for every way of weighting rate against distortion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from examples.lic.codec import MeanScaleHyperprior
from moo_balance import Balance, BalancedOptimizer, History
from moo_balance.weighting import Weighting

NAMES = ("rate", "distortion")

SETTLED = 0.7
"""The fraction of a run after which the learning rate falls, and weights are taken for settled."""


@dataclass(frozen=True)
class Recipe:
    """How many steps, and Adam's learning rate: it falls twice to 0.3 of itself near the end.

    `clip` bounds the norm of the gradient; by default it is brought to 1 instead.
    """

    steps: int
    lr: float
    clip: float | None = None

    @property
    def milestones(self) -> list[int]:
        return [int(SETTLED * self.steps), int(0.9 * self.steps)]


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


def rate_distortion(model: MeanScaleHyperprior, images: Tensor, lmbda: float) -> dict[str, Tensor]:
    """The two losses to be balanced: bits per pixel, and λ · 255² · MSE."""
    output = model(images)
    mse = nn.functional.mse_loss(output.images, images)
    return {"rate": output.bpp(), "distortion": lmbda * 255**2 * mse}


def train(
    model: MeanScaleHyperprior,
    crops: Iterator[Tensor],
    weighting: Weighting,
    recipe: Recipe,
    *,
    lmbda: float,
    seed: int,
    on_step: Callable[[Balance], object] = lambda balance: None,
) -> Trace:
    """Train `model` in place.

    Args:
        model: The codec.
        crops: Batches of images, one of which each step takes.
        weighting: Any weighting of ``moo_balance``.
        recipe: Steps and learning rate.
        lmbda: λ, the price of distortion: larger means more bits and a better picture.
        seed: For the quantisation noise: runs with equal seeds and crops meet equal noise.
        on_step: Called after each step with its losses and weights.
    """
    torch.manual_seed(seed)
    model.train()
    trace = Trace()
    optimizer = BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=recipe.lr), weighting)
    scheduler = MultiStepLR(optimizer, recipe.milestones, gamma=0.3)

    for _ in range(recipe.steps):
        images = next(crops)
        start = time.perf_counter()
        optimizer.zero_grad()
        # A closure, so that a method that watches the step can evaluate the losses after it.
        optimizer.backward(partial(rate_distortion, model, images, lmbda))
        if recipe.clip is None:
            normalize_gradient(model.parameters())
        else:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        trace.seconds.append(time.perf_counter() - start)
        scheduler.step()
        trace.history.append(optimizer.balance)
        on_step(optimizer.balance)
    return trace


def normalize_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Bring the gradient over all parameters to norm 1.

    This stands where training loops clip. Clipping handicaps one side of a comparison: Adam does
    not care about the scale of gradients, but a bound does, and the scale is what a weighting
    changes. At norm 1 nobody has an advantage, and outliers are tamed all the same.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    torch._foreach_div_(gradients, norm)
