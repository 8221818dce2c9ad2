"""The ablations as evidence: each changed method's curve against the unchanged one's.

``run`` computes, ``section`` and ``figures`` show; whatever they say comes from the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure

from examples.lic import bd, images, parts, store
from examples.lic.ablations.variations import SUMS, VARIATIONS, Variation
from examples.lic.comparison import gap_above
from examples.lic.evaluation import Score
from examples.lic.study.laboratory import SUM, Laboratory, Run
from examples.lic.training import SETTLED

COLLAPSED = 0.03
"""Mean bits per pixel below which a codec sends next to nothing."""

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


def section(results: Results) -> str:
    """What was run and what it showed, in Markdown."""
    plan, records = results["plan"], results["records"]
    lmbda, start = plan["start"]
    return "\n\n".join(
        [
            f"From one checkpoint a seed (a plain sum, λ = {lmbda:g}, {start} steps), "
            f"{plan['steps']} further steps with each variation and each of its λ; from scratch "
            f"{plan['scratch']} steps. Seeds: {', '.join(map(str, plan['seeds']))}. Runs of one "
            "seed share checkpoint, crops and noise. BD-rate of the mean over the held-out "
            "photographs; in brackets each seed.",
            _table(records),
            f"Collapsed: a run that ends below {COLLAPSED:g} bpp. w_R is the weight on the "
            "gradient of log rate after the learning rate has first fallen. The last column is a "
            "mean over λ, at the rate of each point, and each seed's. Gradients are brought to "
            "norm 1, where c cannot matter; only the clipped rows can show what it does.",
            _conclusion(records),
        ]
    )


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| variation | bpp | PSNR / dB | w_R | collapsed | against | BD-rate | dB above sums |",
        "| --- " * 8 + "|",
    ]
    for title, variation in VARIATIONS.items():
        mine = [record for record in records if record["title"] == title]
        points = [mean(record) for record in mine]
        rate, psnr = ([f(axis) for f in (min, max)] for axis in zip(*points, strict=True))
        weights = [record["weight"] for record in mine]
        cells = [
            title,
            f"{rate[0]:.3f} … {rate[1]:.3f}",
            f"{psnr[0]:.1f} … {psnr[1]:.1f}",
            f"{min(weights):.2f} … {max(weights):.2f}" if title != SUMS else "",
            f"{collapses(mine)} of {len(mine)}" if collapses(mine) else "",
            variation.against or "",
            shown(compare(records, title, variation.against)) if variation.against else "",
            "" if title == SUMS or variation.scratch else _above(gaps(records, title)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(record: Mapping[str, Any]) -> Score:
    """Mean over the held-out photographs."""
    return Score(*(fmean(axis) for axis in zip(*record["scores"].values(), strict=True)))


def collapses(records: Sequence[Mapping[str, Any]]) -> int:
    """How many of the runs send next to nothing."""
    return sum(mean(record).bpp < COLLAPSED for record in records)


def curve(records: Sequence[Mapping[str, Any]], title: str, seed: int) -> list[Score]:
    """One variation's points for one seed."""
    return [mean(r) for r in records if r["title"] == title and r["seed"] == seed]


def compare(
    records: Sequence[Mapping[str, Any]], title: str, against: str
) -> dict[int, float | str]:
    """BD-rate by seed; where curves cannot be compared, the reason."""
    found: dict[int, float | str] = {}
    for seed in sorted({record["seed"] for record in records}):
        try:
            delta = bd.compare(curve(records, title, seed), curve(records, against, seed))
            found[seed] = delta.rate
        except bd.CurveError as error:
            found[seed] = str(error)
    return found


def shown(found: Mapping[int, float | str]) -> str:
    """A comparison as a table's cell."""
    rates = [rate for rate in found.values() if not isinstance(rate, str)]
    reasons = {reason for reason in found.values() if isinstance(reason, str)}
    if reasons:
        return f"no curve to compare in {len(found) - len(rates)} of {len(found)} seeds"
    return _listed(rates, ".1f", " %")


def gaps(records: Sequence[Mapping[str, Any]], title: str) -> dict[int, list[float]]:
    """PSNR of each point above the plain sums of its seed, at the same rate, in dB.

    Unlike a BD-rate it needs no curve; points outside of the sums' rates are left out.
    """
    seeds = sorted({record["seed"] for record in records})
    found = {
        seed: [gap_above(p, curve(records, SUMS, seed)) for p in curve(records, title, seed)]
        for seed in seeds
    }
    return {seed: [gap for gap in row if gap is not None] for seed, row in found.items()}


def _above(found: Mapping[int, Sequence[float]]) -> str:
    if not all(found.values()):
        return "other rates"
    return _listed([fmean(row) for row in found.values()], ".2f", "")


def _listed(values: Sequence[float], form: str, unit: str) -> str:
    each = ", ".join(_signed(value, form) for value in values)
    return f"{_signed(fmean(values), form)}{unit} ({each})"


def _conclusion(records: Sequence[Mapping[str, Any]]) -> str:
    titles = [t for t in VARIATIONS if collapses([r for r in records if r["title"] == t])]
    alike, apart = 0, []
    for title, variation in VARIATIONS.items():
        if variation.against is None:
            continue
        rates = list(compare(records, title, variation.against).values())
        if any(isinstance(rate, str) for rate in rates):
            continue
        alike += 1
        if all(rate < 0 for rate in rates) or all(rate > 0 for rate in rates):
            apart.append(title)
    fallen = f"Collapsed at some λ: {', '.join(titles)}." if titles else "No run collapsed."
    return (
        f"{fallen} Of {alike} variations whose curves can be compared, {len(apart)} lie on one "
        f"side of their counterpart in every seed{': ' if apart else ''}{', '.join(apart)}."
    )


def _signed(value: float, form: str) -> str:
    return f"{value:+{form}}".replace("-", "−")


def figures(results: Results) -> dict[str, Figure]:
    """Curves, in panels."""
    # Only here, so that numbers can be had without drawing them.
    from examples.lic.ablations import plots

    return {"ablations": plots.curves_figure(results)}
