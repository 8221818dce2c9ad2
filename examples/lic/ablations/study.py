"""The ablations as evidence: each changed method's curve against the unchanged one's.

``run`` computes, ``section`` and ``figures`` show; whatever they say comes from the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure

from examples.lic import images, parts, store
from examples.lic.ablations import plots
from examples.lic.ablations.report import section
from examples.lic.ablations.variations import VARIATIONS, Variation
from examples.lic.study.laboratory import SUM, Laboratory, Run
from examples.lic.training import SETTLED

__all__ = ["figures", "run", "section"]

Results = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All that the ablations depend on, besides the photographs.

    Args:
        seeds: Each with a checkpoint, crops and noise of its own.
        start: λ and steps of the checkpoint, a plain sum.
        steps: Of each run that goes on from there.
        scratch: Steps of each run that does not.
        widths: Of the codec.
        crop: Side of the training crops.
        look: Side of the middle of the held-out photographs on which codecs are scored; None for
            all of them.
    """

    seeds: Sequence[int] = (0, 1)
    start: tuple[float, int] = (0.013, 1500)
    steps: int = 200
    scratch: int = 500
    widths: tuple[int, int] = (24, 32)
    crop: int = parts.CROP
    look: int | None = None


PLANS = {
    "short": Plan((0,), (0.013, 5), steps=3, scratch=3, widths=(8, 8), crop=64, look=64),
    "full": Plan(),
}


def run(
    scale: Literal["short", "full"],
    folder: Path,
    *,
    photographs: images.Photographs | None = None,
    seed: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> Results:
    """Train every variation for each of its λ.

    Args:
        scale: ``"short"`` only shows that it works; ``"full"`` takes minutes.
        folder: What is done is kept here and not done again.
        photographs: Others than the bundled ones.
        seed: Added to the plan's seeds.
        say: Hears what begins.
    """
    plan = PLANS[scale]
    plan = replace(plan, seeds=[seed + s for s in plan.seeds])
    laboratory = _laboratory(photographs or images.bundled(), plan, folder)
    records = []
    for s in plan.seeds:
        for title, variation in VARIATIONS.items():
            say(f"seed {s}: {title}")
            for planned in runs(variation, plan, s):
                records.append({"title": title, "seed": s, **_record(laboratory, planned)})
    return {"plan": asdict(plan), "records": records}


def runs(variation: Variation, plan: Plan, seed: int) -> Iterator[Run]:
    """The training runs of one variation and seed, by λ."""
    common = {"widths": plan.widths, "crop": plan.crop, "seed": seed}
    lmbda, steps = plan.start
    start = Run(SUM, lmbda, steps, lr=1e-3, **common)
    for lmbda in variation.lambdas:
        run = Run(variation.weighting, lmbda, plan.scratch, lr=1e-3, clip=variation.clip, **common)
        yield run if variation.scratch else replace(run, start=start, steps=plan.steps, lr=5e-4)


def _laboratory(photographs: images.Photographs, plan: Plan, folder: Path) -> Laboratory:
    """Where the runs take place, apart from those on other photographs."""
    if plan.look is not None:
        pictures = photographs.held_out.items()
        middles = {name: parts.middle(image, plan.look) for name, image in pictures}
        photographs = replace(photographs, held_out=middles)
    every = {**photographs.train, **photographs.held_out}
    key = {"what": "ablations", "photographs": parts.fingerprints(every)}
    return Laboratory(photographs, folder / store.file_name(key, suffix=""))


def _record(laboratory: Laboratory, run: Run) -> dict[str, Any]:
    result = laboratory(run)
    weights = result.series["weight/rate"]
    return {
        "lambda": run.lmbda,
        "scores": {name: list(score) for name, score in result.scores.items()},
        "weight": fmean(weights[int(SETTLED * len(weights)) :]),
    }


def figures(results: Results) -> dict[str, Figure]:
    """Curves, in panels."""
    return {"ablations": plots.curves_figure(results)}
