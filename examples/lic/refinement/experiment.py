"""The experiment: which latents are refined how, and for which λ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.lic import parts, store
from examples.lic.codec import MeanScaleHyperprior
from examples.lic.comparison import BALANCED, EQUAL
from examples.lic.evaluation import Score
from examples.lic.images import Photographs, RandomCrops
from examples.lic.refinement.refine import Latents, Refinement, quantize, refine, score
from examples.lic.refinement.rounding import (
    SGA_ANNEALING,
    SGA_PLUS_ANNEALING,
    THREE_CLASS,
    TWO_CLASS,
    Annealing,
    Gumbel,
    StraightThrough,
)
from examples.lic.training import Recipe, train

LOOKS = 10
"""How often the code is rounded and scored on the way."""


@dataclass(frozen=True)
class Plan:
    """All that the experiment depends on, besides the photographs.

    Args:
        lambdas: λ of the codecs, each trained from the one before; three at least make a curve.
        base: The one of them that is refined in many ways.
        others: λ for which that one is refined besides its own and those of the other codecs.
        balanced: λ at which rate and distortion are balanced instead of summed.
        maxima: τ_max to be tried, besides 1.
        training: For each codec.
        steps: Of a refinement.
        crop: Side of the middle of the held-out photographs that is refined.
        seed: Of weights, crops and noise.
    """

    lambdas: Sequence[float] = (0.0025, 0.0067, 0.018, 0.05)
    base: float = 0.0067
    others: Sequence[float] = (0.001,)
    balanced: Sequence[float] = (0.0067, 0.05)
    maxima: Sequence[float] = (0.2, 0.6)
    training: Recipe = field(default=Recipe(1000, lr=1e-3))
    steps: int = 300
    crop: int = 192
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One way to refine, by one codec, for one λ."""

    group: str
    name: str
    how: Refinement
    trained: float
    lmbda: float


def tasks(plan: Plan) -> Iterator[Task]:
    """Everything there is to refine; what two groups share is computed once."""

    def gumbel(name: str, **kwargs: Any) -> Refinement:
        annealing = SGA_PLUS_ANNEALING.within(plan.steps)
        return Refinement(Gumbel(TWO_CLASS[name], annealing), steps=plan.steps, **kwargs)

    best = gumbel("SSL")
    for lmbda in plan.lambdas:
        yield Task("curve", "none", replace(best, steps=0), lmbda, lmbda)
        plain = replace(best, relaxation=StraightThrough())
        yield Task("curve", "straight-through", plain, lmbda, lmbda)
        yield Task("curve", "SGA+", best, lmbda, lmbda)

    at_base = partial(Task, trained=plan.base, lmbda=plan.base)
    for name, how in _probabilities(plan.steps).items():
        yield at_base("probability", name, how)
    for name in TWO_CLASS:
        for maximum in (*plan.maxima, 1.0):
            annealing = replace(SGA_PLUS_ANNEALING.within(plan.steps), maximum=maximum)
            how = replace(best, relaxation=Gumbel(TWO_CLASS[name], annealing))
            yield at_base(f"τ_max {maximum:g}", name, how)

    for lmbda in sorted({*plan.lambdas, *plan.others}):
        yield Task("one codec", "SGA+", best, plan.base, lmbda)
    for name, weighting in BALANCED.items():
        for lmbda in plan.balanced:
            yield Task("balanced", name, replace(best, weighting=weighting), plan.base, lmbda)


def _probabilities(steps: int) -> dict[str, Refinement]:
    """The probabilities, with the published course of temperature in `steps` and cut off there."""

    def sga_plus(name: str, annealing: Annealing) -> Refinement:
        return Refinement(Gumbel(TWO_CLASS[name], annealing), steps=steps)

    within = SGA_PLUS_ANNEALING.within(steps)
    sga = Refinement(Gumbel(TWO_CLASS["atanh"], SGA_ANNEALING.within(steps)), steps, centered=False)
    methods = {"SGA: atanh, rounding y": sga}
    methods |= {name: sga_plus(name, within) for name in TWO_CLASS}
    methods["SSL, rounding y"] = replace(methods["SSL"], centered=False)
    methods |= {f"{name}, cut off": sga_plus(name, SGA_PLUS_ANNEALING) for name in TWO_CLASS}
    methods |= {
        f"{name}, three integers": Refinement(Gumbel(rounding, within), steps)
        for name, rounding in THREE_CLASS.items()
    }
    return methods


@dataclass(frozen=True)
class Experiment:
    """Carries out a plan; what is done is kept in `folder` and not done again.

    `say` hears what begins.
    """

    photographs: Photographs
    plan: Plan
    folder: Path
    say: Callable[[str], object] = lambda text: None

    def __call__(self) -> list[dict[str, Any]]:
        """One JSON-able record a task."""
        ladder = dict(zip(self.plan.lambdas, self._ladder(), strict=True))
        return [self._record(task, ladder[task.trained]) for task in tasks(self.plan)]

    def _ladder(self) -> Iterator[MeanScaleHyperprior]:
        """The codecs, each trained from the one before it."""
        torch.manual_seed(self.plan.seed)
        model = MeanScaleHyperprior()
        for index, lmbda in enumerate(self.plan.lambdas):
            path = self.folder / store.file_name(self._key(self.plan.lambdas[: index + 1]), ".pt")
            if not path.exists():
                self.say(f"train the codec of λ = {lmbda:g}")
                self._train(model, lmbda, self.plan.seed + index)
                store.atomically(path, partial(_save, model))
            following = MeanScaleHyperprior().eval()
            following.load_state_dict(torch.load(path, weights_only=True))
            model.load_state_dict(following.state_dict())
            yield following

    def _train(self, model: MeanScaleHyperprior, lmbda: float, seed: int) -> None:
        crops = RandomCrops(self.photographs.train, crop=parts.CROP, batch=2, seed=seed)
        train(model, crops, EQUAL, self.plan.training, lmbda=lmbda, seed=seed)

    def _key(self, lambdas: Sequence[float]) -> dict[str, Any]:
        return {
            "what": "refinement's codec",
            "lambdas": list(lambdas),
            "training": asdict(self.plan.training),
            "seed": self.plan.seed,
            "images": parts.fingerprints(self.photographs.train),
        }

    def _record(self, task: Task, model: MeanScaleHyperprior) -> dict[str, Any]:
        rungs = self.plan.lambdas[: self.plan.lambdas.index(task.trained) + 1]
        key = {
            "what": "refined latents",
            "how": repr(task.how),
            "lambda": task.lmbda,
            "crop": self.plan.crop,
            "images": parts.fingerprints(self.photographs.held_out),
            "codec": self._key(rungs),
        }
        result = store.cached(self.folder, key, partial(self._refine_all, task, model))
        about = {"group": task.group, "name": task.name}
        return {**about, "trained": task.trained, "lambda": task.lmbda, **result}

    def _refine_all(self, task: Task, model: MeanScaleHyperprior) -> dict[str, Any]:
        self.say(f"refine: {task.group}, {task.name}, λ = {task.lmbda:g}")
        return {
            "images": {
                name: refined(model, parts.middle(image, self.plan.crop), task, self.plan.seed)
                for name, image in self.photographs.held_out.items()
            }
        }


def refined(model: MeanScaleHyperprior, image: Tensor, task: Task, seed: int) -> dict[str, Any]:
    """Score of the refined code, and of what it would have been on the way."""
    course: dict[str, Score] = {}
    every = max(1, task.how.steps // LOOKS)

    @torch.no_grad()
    def look(step: int, latents: Latents) -> None:
        if step % every == 0:
            sent = quantize(model, latents, centered=task.how.centered)
            course[str(step)] = score(model, sent, image)

    start = time.process_time()
    sent = refine(model, image, task.how, lmbda=task.lmbda, seed=seed, on_step=look)
    return {
        "score": score(model, sent, image),
        "course": course,
        "cpu_seconds": time.process_time() - start,
    }


def _save(model: MeanScaleHyperprior, path: Path) -> None:
    with path.open("wb") as file:  # by itself torch.save refuses names that begin with a dot
        torch.save(model.state_dict(), file)


def loss(point: Mapping[str, Any] | Score, lmbda: float) -> float:
    """R + λ · 255² · MSE of a score, of a code as it is sent."""
    bpp, psnr = point
    return bpp + lmbda * 255**2 * 10 ** (-psnr / 10)
