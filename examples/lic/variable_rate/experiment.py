"""The experiment: from one checkpoint a model for each λ, and one model for all of them."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from examples.lic.training import Trace, train
from examples.lic.variable_rate.design import (
    BEFORE,
    INCREMENTS,
    LONG,
    PLAIN,
    RIVALS,
    SINGLE,
    STATIC,
    Design,
    Plan,
)
from examples.lic.variable_rate.model import VariableRateCodec, step_for
from examples.lic.variable_rate.training import every_level, name_of, post_train, random_level
from moo_balance import FixedWeights, StepMetrics

PARTS_OF_A_RUN = 10
"""How often the weights of a run are written down, each time as a mean."""


@dataclass(frozen=True)
class Experiment:
    """The runs of one seed: same checkpoint, same crops, finished ones kept in `folder`."""

    photographs: Photographs
    plan: Plan
    seed: int
    folder: Path
    on_step: Callable[[StepMetrics], object] = lambda balance: None

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
