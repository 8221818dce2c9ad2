"""One training run as a value, and the place that carries it out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from examples.lic.codec import MeanScaleHyperprior
from examples.lic.evaluation import Score, evaluate
from examples.lic.images import Photographs, RandomCrops
from examples.lic.store import atomically, cached, file_name
from examples.lic.training import Recipe, Trace, train
from moo_balance.weighting import FixedWeights, Weighting

SUM = FixedWeights({"rate": 1.0, "distortion": 1.0})
"""The standard loss, R + λD."""

POINTS = 100
"""How many points of a run's losses and weights are kept, each the mean of a stretch of steps."""


@dataclass(frozen=True)
class Run:
    """All that a training run depends on, besides the photographs.

    Runs with equal seeds meet the same crops and the same noise; without `start` they also begin
    with the same weights. For `clip` see :class:`Recipe`.
    """

    weighting: Weighting
    lmbda: float
    steps: int
    lr: float
    clip: float | None = None
    batch: int = 2
    crop: int = 128
    widths: tuple[int, int] = (24, 32)
    seed: int = 0
    start: Run | None = None
    scored_on: Literal["held_out", "train"] = "held_out"

    def key(self) -> dict[str, Any]:
        """The run as JSON, by which its result is found again."""
        start = self.start and self.start.key()
        fields = {**asdict(replace(self, start=None)), "start": start}
        return {**fields, "weighting": repr(self.weighting), "widths": list(self.widths)}


@dataclass(frozen=True)
class Result:
    """What is kept of a run."""

    scores: dict[str, Score]
    settled: dict[str, float]
    """Coefficients of both losses once the run had settled; see :meth:`Trace.settled`."""
    seconds: float
    """Time spent in steps."""
    series: dict[str, list[float]]
    """Losses, weights and coefficients, thinned."""

    @property
    def mean(self) -> Score:
        return Score(*(fmean(axis) for axis in zip(*self.scores.values(), strict=True)))


@dataclass(frozen=True)
class Laboratory:
    """Carries out runs; what is in `folder` is not done again."""

    photographs: Photographs
    folder: Path

    def __call__(self, run: Run) -> Result:
        stored = cached(self.folder, run.key(), lambda: self._carry_out(run))
        scores = {name: Score(*score) for name, score in stored["scores"].items()}
        return Result(**{**stored, "scores": scores})

    def _carry_out(self, run: Run) -> dict[str, Any]:
        model, trace = self._train(run)
        scores = evaluate(model, getattr(self.photographs, run.scored_on))
        line = f"{run.weighting!r:.60} λ {run.lmbda:g}, seed {run.seed}, {run.steps} steps"
        print(f"{line}: {trace.milliseconds:.0f} ms/step", flush=True)
        return {
            "scores": scores,
            "settled": trace.settled("coefficient"),
            "seconds": sum(trace.seconds),
            "series": thinned(trace),
        }

    def _train(self, run: Run) -> tuple[MeanScaleHyperprior, Trace]:
        torch.manual_seed(run.seed)
        model = MeanScaleHyperprior(*run.widths)
        if run.start is not None:
            model.load_state_dict(self._checkpoint(run.start))
        crops = RandomCrops(
            self.photographs.train, crop=run.crop, batch=run.batch, seed=self._stream(run)
        )
        trace = train(
            model,
            crops,
            run.weighting,
            Recipe(run.steps, run.lr, clip=run.clip),
            lmbda=run.lmbda,
            seed=self._stream(run),
        )
        return model, trace

    def _checkpoint(self, run: Run) -> Mapping[str, torch.Tensor]:
        path = self.folder / file_name(run.key(), ".pt")
        if not path.exists():
            weights = self._train(run)[0].state_dict()
            atomically(path, partial(torch.save, weights))
        return torch.load(path, weights_only=True)

    @staticmethod
    def _stream(run: Run) -> int:
        # A run that goes on from a checkpoint is not to see the checkpoint's crops again.
        return 2 * run.seed + (run.start is not None)


def thinned(trace: Trace) -> dict[str, list[float]]:
    """Means over up to :data:`POINTS` equal stretches of the run."""
    history = trace.history
    return {key: _means(history.series(key)[1]) for key in history.keys() if "/" in key}  # noqa: SIM118


def _means(values: Sequence[float]) -> list[float]:
    count = min(POINTS, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [fmean(values[a:b]) for a, b in pairwise(edges)]
