"""What the ablations found, in Markdown; every number comes from their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from examples.lic import bd
from examples.lic.ablations.variations import SUMS, VARIATIONS
from examples.lic.comparison import gap_above
from examples.lic.evaluation import Score
from examples.lic.parts import signed

COLLAPSED = Score(bpp=0.03, psnr=15.0)
"""A codec below either shows next to nothing. The rate alone would not tell: rounded, latents that
cost nothing under the noise of training can cost more than before."""


def section(results: Mapping[str, Any]) -> str:
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
            f"Collapsed: a run that ends below {COLLAPSED.bpp:g} bpp or {COLLAPSED.psnr:g} dB. "
            "w_R is the weight on the gradient of log rate after the learning rate has first "
            "fallen. The last column is a mean over λ, at the rate of each point, and each seed's. "
            "Gradients are brought to norm 1, where c cannot matter; only the clipped rows can "
            "show what it does.",
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
    """How many of the runs show next to nothing."""
    points = [mean(record) for record in records]
    return sum(p.bpp < COLLAPSED.bpp or p.psnr < COLLAPSED.psnr for p in points)


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
    without = len(found) - len(rates)
    missing = f"no curve to compare in {without} of {len(found)} seeds" if without else ""
    return "; ".join(filter(None, [_listed(rates, ".1f", " %") if rates else "", missing]))


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
    each = ", ".join(signed(value, form) for value in values)
    return f"{signed(fmean(values), form)}{unit} ({each})"


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
    seeds = len({record["seed"] for record in records})
    return (
        f"{fallen} Of {alike} variations whose curves can be compared, {len(apart)} lie on one "
        f"side of their counterpart in every seed, where chance would put {2 ** (1 - seeds):.0%} "
        f"of them{': ' if apart else ''}{', '.join(apart)}."
    )
