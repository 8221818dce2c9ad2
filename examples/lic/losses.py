"""What training minimises: losses at one λ or several, and their weightings by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from examples.lic.variable_rate import VariableRateCodec, step_for
from moo_balance import (
    FAMO,
    MGDA,
    AnalyticQP,
    BalancedTrajectory,
    FixedWeights,
    Lagrangian,
    MovingAverage,
    OnlineTchebycheff,
    RandomWeights,
    SmoothTchebycheff,
    Sum,
    SumLog,
    Tchebycheff,
)
from moo_balance.weighting import Weighting

NOISY_SHARE = 0.5
"""The first part of a variable-rate training, in which the decoder sees noise (the second stage of
three in the paper); after it, rounded symbols and their offsets (the third)."""


class RateDistortion(nn.Module):
    """Bits per pixel, and λ · 255² · MSE.

    A bound needs the rate that files have, and noisy symbols cost more than rounded ones. With
    `rounded`, the rate has the value of rounded symbols and the gradient of noisy ones.
    """

    names = ("rate", "distortion")

    def __init__(self, model: nn.Module, lmbda: float, *, rounded: bool = False) -> None:
        super().__init__()
        self.model, self.lmbda, self._rounded = model, lmbda, rounded

    def begin_step(self, step: int, steps: int) -> None:
        """Prepare for step number `step`, from 0, of `steps`: all are alike."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The losses, 0-d, of images ``[B, 3, H, W]`` in [0, 1]."""
        output = self.model(images)
        mse, rate = mse_loss(output.images, images), output.bpp()
        if self._rounded:
            rate = rate + (self._rounded_rate(images) - rate).detach()
        return {"rate": rate, "distortion": self.lmbda * 255**2 * mse}

    @torch.no_grad()
    def _rounded_rate(self, images: Tensor) -> Tensor:
        self.model.eval()
        rate = self.model(images).bpp()
        self.model.train()
        return rate


def level_name(lmbda: float) -> str:
    """The name of a λ's loss."""
    return f"λ={lmbda!r}"


class Levels(nn.Module):
    """R + λ · 255² · MSE of a variable-rate codec at several λ; the images are analysed once.

    With `one_level` each step takes one λ, drawn at random by `seed`, instead of all.
    """

    def __init__(
        self, model: VariableRateCodec, lambdas: Sequence[float], *, one_level: bool, seed: int
    ) -> None:
        super().__init__()
        self.model = model
        self.names = [level_name(lmbda) for lmbda in lambdas]
        self._lambdas, self._one_level, self._seed = lambdas, one_level, seed
        self.begin_step(0, 1)

    def begin_step(self, step: int, steps: int) -> None:
        self._noisy = step < NOISY_SHARE * steps
        draw = random.Random(f"{self._seed}/{step}")
        self._levels = [draw.choice(self._lambdas)] if self._one_level else self._lambdas

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        y, z = self.model.base.analyze(images)
        losses = {}
        for lmbda in self._levels:
            step = step_for(lmbda, self.model.highest.item())
            output = self.model.code(y, z, step, noisy_decoder=self._noisy)
            distortion = lmbda * 255**2 * mse_loss(output.images, images)
            losses[level_name(lmbda)] = output.bpp() + distortion
        return losses


Objective: TypeAlias = RateDistortion | Levels
"""A codec with its losses."""


def fixed(rate: float) -> FixedWeights:
    """Fixed weights that sum to 1: `rate`, in (0, 1), for the rate, the rest for the distortion."""
    return FixedWeights({"rate": rate, "distortion": 1.0 - rate})


def bounded_rate(bpp: float) -> Lagrangian:
    """The distortion, minimized where the rate is at most `bpp`: a multiplier in place of a λ.

    The rate is that of training crops, their symbols rounded. No λ matters: violations are
    relative. Learning rate and damping of the multiplier suit runs of a thousand steps.
    """
    return Lagrangian({"rate": bpp}, objective="distortion", lr=0.03, damping=4.0)


EQUAL = fixed(0.5)
"""R + λD as weights that sum to 1, like the coefficients of the two solutions."""

SOLUTIONS: dict[str, Weighting] = {
    "Solution 1": BalancedTrajectory(),
    "Solution 2": AnalyticQP(),
}
"""The two methods of Balanced R-D (arXiv 2502.20161), with the paper's shift of 1."""

WEIGHTINGS: dict[str, Weighting] = {
    "standard": Sum(),
    "fixed": EQUAL,
    "solution1": BalancedTrajectory(),
    "solution1-lagged": BalancedTrajectory(lagged=True),
    "solution2": AnalyticQP(),
    "solution2-smoothed": MovingAverage(AnalyticQP()),
    "sum-log": SumLog(shift=1.0),
    "random": RandomWeights(),
    "mgda": MGDA(),
    "mgda-l2": MGDA(normalize="l2"),
    "mgda-loss+": MGDA(normalize="loss+"),
    "tchebycheff": Tchebycheff(),
    "smooth-tchebycheff": SmoothTchebycheff(),
    "online-tchebycheff": OnlineTchebycheff(),
    # As published, without a shift in the logarithm: λ drops out of their directions, and nothing
    # keeps log R from falling for ever.
    "famo": FAMO(),
    "log-mgda": MGDA(normalize="log"),
}
"""Of the two losses, or of the losses of several λ (then not those named after one of the two)."""
