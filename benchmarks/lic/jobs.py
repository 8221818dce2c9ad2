"""What is done with runs: train and keep, train and score, refine latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.lic.engine import Engine, Job, Result
from benchmarks.lic.scores import crop_center
from examples.lic import checkpoint
from examples.lic.evaluation import Score, evaluate
from examples.lic.log import Recorder
from examples.lic.refinement import Latents, Refinement, quantize, refine, score
from examples.lic.runs import Run, train
from examples.lic.variable_rate import VariableRateCodec, step_for
from moo_balance import FixedWeights, History

SUM = FixedWeights({"rate": 1.0, "distortion": 1.0})
"""The plain sum R + λD."""

SERIES_POINTS = 100
"""How many points of a run's losses and weights are kept, each the mean of some steps."""

REFINEMENT_POINTS = 10
"""How often a refined code is rounded and scored on the way."""


@dataclass(frozen=True)
class Keep:
    """Train a run and keep its checkpoint, for other jobs to start from."""

    run: Run

    def __str__(self) -> str:
        return f"checkpoint {describe(self.run)}"

    @property
    def needs(self) -> list[Job]:
        return [Keep(self.run.start)] if self.run.start else []

    def __call__(self, engine: Engine) -> Result:
        recorder = Recorder()
        path = engine.checkpoint(self.run.file_name())
        train(self.run, list(engine.photographs.train.values()), path, observers=[recorder])
        return {"seconds": sum(recorder.seconds)}


@dataclass(frozen=True)
class Train:
    """Train a run and score it; its checkpoint is not kept.

    Args:
        run: The run.
        weights_of: Hold the mean coefficients of this one constant, in place of the run's
            weighting.
        between: Further λ at which a variable-rate codec is scored.
        scored_on: Which photographs are scored.
    """

    run: Run
    weights_of: Train | None = None
    between: tuple[float, ...] = ()
    scored_on: Literal["held_out", "train"] = "held_out"

    def __str__(self) -> str:
        return f"{'hold weights of' if self.weights_of else 'train'} {describe(self.run)}"

    @property
    def needs(self) -> list[Job]:
        start: list[Job] = [Keep(self.run.start)] if self.run.start else []
        return [*start, self.weights_of] if self.weights_of else start

    def __call__(self, engine: Engine) -> Result:
        run, recorder = self._resolve(engine), Recorder()
        path = engine.checkpoint(f"{run.file_name()}.scored")
        path.unlink(missing_ok=True)  # a stopped run would be resumed, and its course incomplete
        train(run, list(engine.photographs.train.values()), path, observers=[recorder])
        codec, _ = checkpoint.load_codec(path)
        path.unlink()
        images = getattr(engine.photographs, self.scored_on)
        return {**self._score(codec, images), **self._course(recorder)}

    def _resolve(self, engine: Engine) -> Run:
        if self.weights_of is None:
            return self.run
        weights = engine.result(self.weights_of)["mean_coefficients"]
        return replace(self.run, weighting=FixedWeights(weights))

    def _score(self, codec: nn.Module, images: Mapping[str, Tensor]) -> Result:
        if not isinstance(codec, VariableRateCodec):
            return {"lambda": self.run.lambdas[-1], "scores": evaluate(codec, images)}
        points = score_levels(codec, self.run.lambdas, self.between, images)
        return {"points": points, "hyper_steps": hyper_steps(codec, self.run.lambdas)}

    def _course(self, recorder: Recorder) -> Result:
        course = {
            "steps": self.run.recipe.steps,
            "milliseconds": recorder.milliseconds,
            "seconds": sum(recorder.seconds),
        }
        if self.run.one_level:  # levels that take turns have no weight in most steps
            return course
        course["series"] = thin_out(recorder.history)
        course["mean_coefficients"] = recorder.late_mean("coefficient")
        course["mean_weights"] = recorder.late_mean("weight")
        return course


@dataclass(frozen=True)
class Untrained:
    """Score the codec of a run at other steps of its quantizer, without training for them."""

    run: Run
    lambdas: tuple[float, ...]
    between: tuple[float, ...]

    def __str__(self) -> str:
        return f"score {describe(self.run)} at {len(self.lambdas)} λ"

    @property
    def needs(self) -> list[Job]:
        return [Keep(self.run)]

    def __call__(self, engine: Engine) -> Result:
        base, _ = checkpoint.load_codec(engine.checkpoint(self.run.file_name()))
        codec = VariableRateCodec(base, self.run.lambdas[-1], offsets=False, hyper_step=False)
        held_out = engine.photographs.held_out
        return {"points": score_levels(codec, self.lambdas, self.between, held_out)}


@dataclass(frozen=True)
class Refine:
    """Refine the latents of every held-out photograph.

    Args:
        run: The run whose codec is used.
        how: Relaxation, steps, weighting.
        lmbda: λ of the refinement.
        side: Of the middle of the photographs that is refined.
    """

    run: Run
    how: Refinement
    lmbda: float
    side: int

    def __str__(self) -> str:
        return f"refine, λ {self.lmbda:g}, {self.how.steps} steps, {self.how.relaxation!r:.40}"

    @property
    def needs(self) -> list[Job]:
        return [Keep(self.run)]

    def __call__(self, engine: Engine) -> Result:
        codec, _ = checkpoint.load_codec(engine.checkpoint(self.run.file_name()))
        images = engine.photographs.held_out.items()
        return {"images": {name: self._refine(codec, image) for name, image in images}}

    def _refine(self, codec: nn.Module, image: Tensor) -> dict[str, Any]:
        image = crop_center(image, self.side)
        course: dict[str, Score] = {}
        every = max(1, self.how.steps // REFINEMENT_POINTS)

        @torch.no_grad()
        def on_step(step: int, latents: Latents) -> None:
            if step % every == 0:
                sent = quantize(codec, latents, centered=self.how.centered)
                course[str(step)] = score(codec, sent, image)

        sent = refine(codec, image, self.how, lmbda=self.lmbda, seed=self.run.seed, on_step=on_step)
        return {"score": score(codec, sent, image), "course": course}


def score_levels(
    codec: VariableRateCodec,
    trained: Sequence[float],
    between: Sequence[float],
    images: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Scores of a variable-rate codec at trained λ and at those in between."""
    levels = [(lmbda, True) for lmbda in trained] + [(lmbda, False) for lmbda in between]
    return [
        {"lambda": lmbda, "trained": is_trained, "images": evaluate(codec.at(lmbda), images)}
        for lmbda, is_trained in sorted(levels)
    ]


def hyper_steps(codec: VariableRateCodec, lambdas: Sequence[float]) -> list[float]:
    """The step of the hyper-latent at each λ."""
    highest = codec.highest.item()
    return [codec.z_step(step_for(lmbda, highest)).item() for lmbda in lambdas]


def describe(run: Run) -> str:
    """What a run is about, in a few words."""
    lambdas = ", ".join(f"{lmbda:g}" for lmbda in run.lambdas)
    name = type(run.weighting).__name__
    return f"{run.arch}, λ {lambdas}, seed {run.seed}, {run.recipe.steps} steps, {name}"


def thin_out(history: History) -> dict[str, list[float]]:
    """Losses, weights and coefficients as means over up to :data:`SERIES_POINTS` equal parts."""
    keys = [key for key in history.keys() if "/" in key]  # noqa: SIM118
    return {key: means(history.series(key)[1], SERIES_POINTS) for key in keys}


def means(values: Sequence[float], parts: int) -> list[float]:
    """Means over up to `parts` equal parts of a series."""
    parts = min(parts, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(edges)]
