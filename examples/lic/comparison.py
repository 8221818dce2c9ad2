"""The experiment: a ladder of λ, and from each rung the same further steps by each method."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from examples.lic.codec import MeanScaleHyperprior
from examples.lic.evaluation import Score, evaluate, mean_score
from examples.lic.images import Photographs, RandomCrops
from examples.lic.training import Recipe, Trace, train
from moo_balance import AnalyticQP, BalancedTrajectory, FixedWeights, StepMetrics
from moo_balance.weighting import Weighting

STANDARD = "standard"
# R + λD as weights that sum to 1, like the coefficients of the balanced methods.
EQUAL = FixedWeights({"rate": 0.5, "distortion": 0.5})
BALANCED: dict[str, Weighting] = {
    "Solution 1": BalancedTrajectory(),
    "Solution 2": AnalyticQP(),
}
# What balanced runs are set against: the same checkpoint with fixed weights, those which a balanced
# run settled on; and once more with a part of that distortion weight, for rates below.
RIVALS = {
    "fixed as Solution 1": ("Solution 1", 1.0),
    "fixed as Solution 2": ("Solution 2", 1.0),
    "fixed, lower rate": ("Solution 1", 0.5),
}


@dataclass(frozen=True)
class Plan:
    """All that a comparison depends on, besides the photographs."""

    lambdas: Sequence[float]
    ladder: Recipe
    finetuning: Recipe
    crop: int = 128
    batch: int = 2
    channels: int = 24
    latent_channels: int = 32
    seed: int = 0

    @property
    def total_steps(self) -> int:
        per_rung = 1 + len(BALANCED) + len(RIVALS)
        return len(self.lambdas) * (self.ladder.steps + per_rung * self.finetuning.steps)


@dataclass(frozen=True)
class Run:
    """One model after training: its scores on the held-out images, and how it got there."""

    scores: dict[str, Score]
    trace: Trace

    @property
    def mean(self) -> Score:
        return mean_score(self.scores)


@dataclass(frozen=True)
class Rung:
    """A checkpoint of the ladder, and the runs that started from it, by method."""

    lmbda: float
    start: Run
    runs: dict[str, Run]

    def gap(self, method: str) -> float | None:
        """PSNR of `method` above fixed weights from the same checkpoint, at the same rate, in dB.

        The fixed weights' curve is linear in log-rate between its points. None outside of their
        rates, where there is nothing to compare with.
        """
        curve = [self.runs[name].mean for name in (STANDARD, *RIVALS)]
        return gap_above(self.runs[method].mean, curve)


def gap_above(point: Score, curve: Sequence[Score]) -> float | None:
    """PSNR of `point` above a curve, linear in log-rate; None outside of the curve's rates."""
    ordered = sorted(curve)
    for left, right in pairwise(ordered):
        if left.bpp <= point.bpp <= right.bpp and left.bpp < right.bpp:
            along = math.log(point.bpp / left.bpp) / math.log(right.bpp / left.bpp)
            return point.psnr - (left.psnr + along * (right.psnr - left.psnr))
    return None


def fixed_as(trace: Trace, part: float) -> FixedWeights:
    """The weights that a run settled on, with `part` of the distortion's; they sum to 1."""
    settled = trace.settled("coefficient")
    rate, distortion = settled["rate"], part * settled["distortion"]
    total = rate + distortion
    return FixedWeights({"rate": rate / total, "distortion": distortion / total})


@dataclass(frozen=True)
class Comparison:
    """Carries out a plan on photographs.

    `on_step` hears of each step: which λ, which method, and its losses and weights.
    """

    photographs: Photographs
    plan: Plan
    on_step: Callable[[float, str, StepMetrics], object] = lambda lmbda, label, balance: None

    def __call__(self) -> list[Rung]:
        """Climb the ladder."""
        torch.manual_seed(self.plan.seed)
        ladder = MeanScaleHyperprior(self.plan.channels, self.plan.latent_channels)
        return [self._rung(ladder, index) for index in range(len(self.plan.lambdas))]

    def _rung(self, ladder: MeanScaleHyperprior, index: int) -> Rung:
        lmbda = self.plan.lambdas[index]
        seed = 1000 * self.plan.seed + 2 * index
        start = self._run(ladder, "ladder", EQUAL, self.plan.ladder, lmbda, seed)

        def finetune(label: str, weighting: Weighting) -> Run:
            # Same start, same crops, same noise: all that differs is the weighting.
            model = copy.deepcopy(ladder)
            return self._run(model, label, weighting, self.plan.finetuning, lmbda, seed + 1)

        runs = {STANDARD: finetune(STANDARD, EQUAL)}
        for name, weighting in BALANCED.items():
            runs[name] = finetune(name, weighting)
        for rival, (name, part) in RIVALS.items():
            runs[rival] = finetune(rival, fixed_as(runs[name].trace, part))
        return Rung(lmbda, start, runs)

    def _run(
        self,
        model: MeanScaleHyperprior,
        label: str,
        weighting: Weighting,
        recipe: Recipe,
        lmbda: float,
        seed: int,
    ) -> Run:
        crops = RandomCrops(
            self.photographs.train, crop=self.plan.crop, batch=self.plan.batch, seed=seed
        )
        trace = train(
            model,
            crops,
            weighting,
            recipe,
            lmbda=lmbda,
            seed=seed,
            on_step=partial(self.on_step, lmbda, label),
        )
        return Run(evaluate(model, self.photographs.held_out), trace)
