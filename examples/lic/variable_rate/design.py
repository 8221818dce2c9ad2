"""What is compared: the increments of the paper, their rivals, and the plan all of them share."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from examples.lic.codec import MeanScaleHyperprior
from examples.lic.training import Recipe
from examples.lic.variable_rate.model import (
    HyperStep,
    ReconstructionOffset,
    VariableRateCodec,
    no_offset,
    unit_step,
)
from moo_balance import MGDA, Sum
from moo_balance.weighting import Weighting

SINGLE = "single-rate models"
LONG = "single-rate models, whole budget each"
BEFORE = "before post-training"


@dataclass(frozen=True)
class Design:
    """What a variable-rate codec consists of, and how its levels are put together."""

    offsets: bool = False
    hyper_step: bool = False
    weighting: Weighting = field(default_factory=Sum)
    one_level: bool = False
    """A random level in each step, and as many more steps."""

    def build(self, base: MeanScaleHyperprior, highest: float) -> VariableRateCodec:
        """A codec that starts from a copy of `base`."""
        return VariableRateCodec(
            copy.deepcopy(base),
            highest,
            offset=ReconstructionOffset() if self.offsets else no_offset,
            hyper_step=HyperStep() if self.hyper_step else unit_step,
        )


INCREMENTS = {
    "gains alone": Design(),
    "+ offsets": Design(offsets=True),
    "+ step of z": Design(offsets=True, hyper_step=True),
    "+ MGDA": Design(offsets=True, hyper_step=True, weighting=MGDA()),
}
"""The paper's, each with all that is above it."""

PLAIN = "+ step of z"
"""What the last increment, and the rivals, change."""

RIVALS = {
    "MGDA, unit gradients": Design(True, True, MGDA(normalize="l2")),
    "a random level a step": Design(True, True, one_level=True),
}

STATIC = {"fixed as MGDA": "+ MGDA", "fixed as MGDA, unit": "MGDA, unit gradients"}
"""Fixed weights, by the run whose mean weights they are: what of a method is not adaptivity."""


@dataclass(frozen=True)
class Plan:
    """All that a run depends on, besides the photographs and its seed."""

    lambdas: Sequence[float] = (0.0035, 0.0085, 0.0205, 0.05)
    start: Recipe = field(default_factory=lambda: Recipe(1500, lr=1e-3))
    post: Recipe = field(default_factory=lambda: Recipe(300, lr=5e-4))
    crop: int = 128
    batch: int = 2
    channels: int = 24
    latent_channels: int = 32

    @property
    def highest(self) -> float:
        return max(self.lambdas)

    @property
    def between(self) -> list[float]:
        """The λ half-way between neighbours, which no model is trained at."""
        return [math.sqrt(low * high) for low, high in pairwise(sorted(self.lambdas))]

    @property
    def steps(self) -> int:
        """Of all runs of one seed."""
        runs = [*INCREMENTS.values(), *RIVALS.values()]
        levels = len(self.lambdas)
        post = (
            levels
            + levels**2
            + len(STATIC)
            + sum(levels if design.one_level else 1 for design in runs)
        )
        return self.start.steps + post * self.post.steps
