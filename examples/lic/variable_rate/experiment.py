"""The experiment: from one checkpoint a model for each λ, and one model for all of them."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from examples.lic import store
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.comparison import EQUAL
from examples.lic.evaluation import evaluate
from examples.lic.images import Photographs, RandomCrops
from examples.lic.training import Recipe, Trace, train
from examples.lic.variable_rate.model import (
    HyperStep,
    ReconstructionOffset,
    VariableRateCodec,
    no_offset,
    step_for,
    unit_step,
)
from examples.lic.variable_rate.training import every_level, name_of, post_train, random_level
from moo_balance import MGDA, Balance, FixedWeights, Sum
from moo_balance.weighting import Weighting

SINGLE = "single-rate models"
LONG = "single-rate models, whole budget each"
BEFORE = "before post-training"
PARTS_OF_A_RUN = 10


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


@dataclass(frozen=True)
class Experiment:
    """The runs of one seed: same checkpoint, same crops, finished ones kept in `folder`."""

    photographs: Photographs
    plan: Plan
    seed: int
    folder: Path
    on_step: Callable[[Balance], object] = lambda balance: None

    def __call__(self) -> dict[str, dict[str, Any]]:
        """Every run by its name, as JSON."""
        runs = {
            BEFORE: self._cached(BEFORE, self._before),
            SINGLE: self._single(SINGLE, 1),
            LONG: self._single(LONG, len(self.plan.lambdas)),
        }
        for name, design in {**INCREMENTS, **RIVALS}.items():
            runs[name] = self._variable(name, design)
        for name, balanced in STATIC.items():
            weights = [fmean(parts) for parts in runs[balanced]["weights"]]
            names = [name_of(lmbda) for lmbda in self.plan.lambdas]
            static = FixedWeights(dict(zip(names, weights, strict=True)))
            runs[name] = self._variable(name, replace(INCREMENTS[PLAIN], weighting=static))
        return runs

    @cached_property
    def checkpoint(self) -> MeanScaleHyperprior:
        """The first stage: a codec for the highest λ."""
        torch.manual_seed(self.seed)
        model = MeanScaleHyperprior(self.plan.channels, self.plan.latent_channels)
        train(
            model, self._crops(0), EQUAL, self.plan.start, lmbda=self.plan.highest,
            seed=self._stream(0), on_step=self.on_step,
        )  # fmt: skip
        return model

    def _before(self) -> dict[str, Any]:
        begin = time.perf_counter()
        codec = Design().build(self.checkpoint, self.plan.highest)
        seconds = time.perf_counter() - begin
        points = self._points(codec, self.plan.lambdas, self.plan.between)
        return {"points": points, "seconds": seconds}

    def _single(self, name: str, times: int) -> dict[str, Any]:
        """A model for each λ, trained `times` as many steps as a variable-rate one.

        It codes with the gain of its λ from the start: without it, it would spend its few steps
        on shrinking the latent of the highest.
        """
        runs = [
            self._cached(
                f"{name} {lmbda:g}",
                lambda lmbda=lmbda: self._post_train(Design(), [lmbda], [], times),
            )
            for lmbda in self.plan.lambdas
        ]
        return {
            "points": [point for run in runs for point in run["points"]],
            "ms_per_step": fmean(run["ms_per_step"] for run in runs),
            "seconds": sum(run["seconds"] for run in runs),
        }

    def _variable(self, name: str, design: Design) -> dict[str, Any]:
        """One model for all λ, scored in between too."""
        lambdas, between = self.plan.lambdas, self.plan.between
        times = len(lambdas) if design.one_level else 1
        return self._cached(
            name, lambda: self._post_train(design, lambdas, between, times), repr(design)
        )

    def _post_train(
        self, design: Design, lambdas: Sequence[float], between: Sequence[float], times: int
    ) -> dict[str, Any]:
        torch.manual_seed(self.seed)  # the small networks start alike
        codec = design.build(self.checkpoint, self.plan.highest)
        begin = time.perf_counter()
        trace = post_train(
            codec, self._crops(1), lambdas, design.weighting,
            replace(self.plan.post, steps=times * self.plan.post.steps), seed=self._stream(1),
            choose=random_level if design.one_level else every_level, on_step=self.on_step,
        )  # fmt: skip
        return {
            "points": self._points(codec, lambdas, between),
            "ms_per_step": trace.milliseconds,
            "seconds": time.perf_counter() - begin,
            "weights": weights_in_parts(trace, lambdas),
            "hyper_steps": [
                codec.hyper_step(step_for(lmbda, self.plan.highest)).item() for lmbda in lambdas
            ],
        }

    def _points(
        self, codec: VariableRateCodec, trained: Sequence[float], between: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Scores at trained λ and between them, on every held-out photograph."""
        levels = [(lmbda, True) for lmbda in trained] + [(lmbda, False) for lmbda in between]
        return [
            {
                "lambda": lmbda,
                "trained": is_trained,
                "images": evaluate(codec.at(lmbda), self.photographs.held_out),
            }
            for lmbda, is_trained in sorted(levels)
        ]

    def _cached(
        self, name: str, compute: Callable[[], dict[str, Any]], design: str = ""
    ) -> dict[str, Any]:
        key = {
            "run": name,
            "seed": self.seed,
            "design": design,
            "plan": asdict(self.plan),
            "photographs": [
                fingerprint(images)
                for images in (self.photographs.train, self.photographs.held_out)
            ],
        }
        return store.cached(self.folder, key, compute)

    def _crops(self, stage: int) -> RandomCrops:
        plan = self.plan
        return RandomCrops(
            self.photographs.train, crop=plan.crop, batch=plan.batch, seed=self._stream(stage)
        )

    def _stream(self, stage: int) -> int:
        return 1000 * self.seed + stage


def weights_in_parts(trace: Trace, lambdas: Sequence[float]) -> list[list[float]]:
    """Each level's coefficient as a mean over tenths of the run; nothing if levels took turns."""
    steps = len(trace.history)
    edges = [steps * part // PARTS_OF_A_RUN for part in range(PARTS_OF_A_RUN + 1)]
    levels = [trace.history.series(f"coefficient/{name_of(lmbda)}")[1] for lmbda in lambdas]
    if any(len(values) < steps for values in levels):
        return []
    return [[fmean(values[a:b]) for a, b in pairwise(edges) if a < b] for values in levels]


def fingerprint(images: Mapping[str, Tensor]) -> int:
    """A number that changes with the names or the pixels of a set of images."""
    value = 0
    for name, image in images.items():
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(image.contiguous().numpy(), value)
    return value
