"""Results of runs that were never trained: all land on one curve, but for gains that are known."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from benchmarks.lic.jobs import PARTS, Refine, ScoreCodec, ScoreFormat, Train
from examples.lic.losses import level_name
from examples.lic.runs import Run
from moo_balance import AnalyticQP, BalancedTrajectory, FixedWeights, Sequential

SHARES = {BalancedTrajectory: 0.2, AnalyticQP: 0.3}
"""λ′ / λ of the solutions."""


def psnr_at(log_rate: float) -> float:
    """A curve that bends."""
    return 33.0 + 2.5 * log_rate - 0.3 * log_rate**2


@dataclass
class World:
    """``world[job]`` is the result of a job.

    Args:
        gains: In per cent of the rate, negative for fewer bits, by what :func:`label` says.
        noise: Standard deviation of the log-rate at equal PSNR, in per cent.
    """

    gains: dict[str, float] = field(default_factory=dict)
    noise: float = 0.1

    def __getitem__(self, job) -> dict:
        if isinstance(job, ScoreFormat):
            return {"images": _images(math.log(job.quality / 50), 20.0)}
        if isinstance(job, ScoreCodec):
            return {"images": _images(_rate(float(job.codec.name)))}
        if isinstance(job, Refine):
            gain = self.gains.get(repr(job.how.relaxation), 0.0) if job.how.steps else 0.0
            return {"images": _images(_rate(job.lmbda), gain)}
        return self._train(job)

    def _train(self, job: Train) -> dict:
        run, draw = job.run, random.Random(repr(job))
        share = effective_share(run.weighting)
        shared = random.Random(run.seed).gauss(0, 5.0)  # of a seed, whatever its arm
        gain = sum(self.gains.get(name, 0.0) for name in labels(job)) + draw.gauss(0, self.noise)
        result = {
            "step": 1.0,
            "seconds": 1.0,
            "coefficients": [1.0, share],
            "weights": [0.7, 0.3],
            "course": [[1.0, share]] * PARTS,
            "crops": [math.exp(_rate(run.lambdas[0])), 30],
        }
        if getattr(run.weighting, "targets", None):
            result["crops"][0] = 1.01 * run.weighting.targets["rate"]
        if ":" in run.arch:
            levels = {level_name(x): _images(_rate(x), gain + shared) for x in run.lambdas}
            return {**result, "levels": levels}
        return {**result, "images": _images(_rate(share * run.lambdas[0]), gain, shared)}


def labels(job: Train) -> set[str]:
    """What a run is known by: methods, optimizer, architecture, of the start too."""
    runs = [job.run, *([job.run.start] if isinstance(job.run.start, Run) else [])]
    names = {type(run.weighting).__name__ for run in runs}
    kinds = {job.run.arch.partition(":")[0], "one level" if job.run.one_level else ""}
    return names | kinds | {"cautious"} if job.observers or job.start_observers else names | kinds


def effective_share(weighting) -> float:
    if isinstance(weighting, Sequential):
        return effective_share(weighting.weightings[-1])
    if isinstance(weighting, FixedWeights) and "rate" in weighting.values:
        return weighting.values["distortion"] / weighting.values["rate"]
    return SHARES.get(type(weighting), 1.0)


def _rate(lmbda: float) -> float:
    return math.log(lmbda / 0.02) / 2


def _images(log_rate: float, gain: float = 0.0, shared: float = 0.0) -> dict:
    """Two photographs, one of them harder: `gain` is at equal PSNR, `shared` moves both axes."""
    observed = log_rate + (gain + shared) / 100
    psnr = psnr_at(log_rate) + 2.5 * shared / 100
    return {"a": [math.exp(observed - 0.2), psnr + 1], "b": [math.exp(observed + 0.2), psnr - 1]}
