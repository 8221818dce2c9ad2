"""Latent refinement as evidence: what it gains, and what matters for the gain.

``run`` computes, ``section`` and ``figures`` show; whatever they say comes from the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from matplotlib.figure import Figure

from examples.lic import bd, images
from examples.lic.comparison import gap_above
from examples.lic.evaluation import Score
from examples.lic.refinement.experiment import Experiment, Plan, loss
from examples.lic.training import Recipe

PLANS = {
    "short": Plan(
        lambdas=(0.0025, 0.0067, 0.018),
        balanced=(0.0067,),
        maxima=(0.2,),
        training=Recipe(12, lr=1e-3),
        steps=4,
        crop=64,
    ),
    "full": Plan(),
}

Results = dict[str, Any]
Record = Mapping[str, Any]


def run(
    scale: Literal["short", "full"],
    folder: Path,
    *,
    photographs: images.Photographs | None = None,
    seed: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> Results:
    """Refine everything that the plan of that scale asks for.

    Args:
        scale: ``"short"`` only shows that it works; ``"full"`` takes minutes.
        folder: What is done is kept here and not done again.
        photographs: Others than the bundled ones.
        seed: Of weights, crops and noise.
        say: Hears what begins.
    """
    plan = replace(PLANS[scale], seed=seed)
    records = Experiment(photographs or images.bundled(), plan, folder, say)()
    return {"plan": asdict(plan), "records": records}


def section(results: Results) -> str:
    """What was run and what it showed, in Markdown."""
    plan, records = results["plan"], results["records"]
    names = list(records[0]["images"])
    return "\n\n".join(
        [
            f"Codecs of λ = {_listed(plan['lambdas'])}, {plan['training']['steps']} steps each, "
            f"refine the middle {plan['crop']} × {plan['crop']} pixels of {len(names)} held-out "
            f"photographs in {plan['steps']} steps of Adam. Every code is rounded before it is "
            "scored. Ranges in brackets go from the least to the largest photograph; one seed.",
            "**Gain**, by curves through all λ:",
            _gain_table(records, plan),
            f"**Which probability**, by the codec of λ = {plan['base']:g}: R + λD against the "
            "encoder's latents, with the published temperatures compressed into the steps (the "
            "rows cut off keep the published rate of cooling, and end at a higher temperature):",
            _probability_table(records, plan),
            "**Sensitivity to the highest temperature τ_max**, the same loss:",
            _maxima_table(records, plan),
            f"**Balanced or plain**: by the codec of λ = {plan['base']:g}, PSNR above the plain "
            "sum refined by that same codec for other λ, at the same rate:",
            _balanced_table(records),
            _conclusion(records, plan),
        ]
    )


def figures(results: Results) -> dict[str, Figure]:
    """The rate-distortion plane, and how the loss of the rounded code falls."""
    # Only here, so that numbers can be had without drawing them.
    from examples.lic.refinement import plots

    return {
        "refinement-rate-distortion": plots.rate_distortion_figure(results),
        "refinement-course": plots.course_figure(results),
    }


def select(records: Iterable[Record], **fields: Any) -> list[Record]:
    """The records that have these values in these fields."""
    return [r for r in records if all(r[name] == value for name, value in fields.items())]


def scores(record: Record) -> dict[str, Score]:
    """The scores of a record by image."""
    return {name: Score(*image["score"]) for name, image in record["images"].items()}


def curve(records: Sequence[Record]) -> dict[str, list[Score]]:
    """Curves by image, of records that differ in λ."""
    each = [scores(record) for record in records]
    return {name: [points[name] for points in each] for name in each[0]}


def deltas(test: Sequence[Record], anchor: Sequence[Record]) -> dict[str, bd.Delta]:
    """BD-rate and BD-PSNR by image.

    Raises:
        bd.CurveError: When an image's curves cannot be compared.
    """
    anchors = curve(anchor)
    return {name: bd.compare(points, anchors[name]) for name, points in curve(test).items()}


def relative_loss(record: Record, none: Record) -> dict[str, float]:
    """Change of R + λD by refinement, in per cent and by image."""
    before = scores(none)
    return {
        name: 100 * (loss(point, record["lambda"]) / loss(before[name], record["lambda"]) - 1)
        for name, point in scores(record).items()
    }


def _gain_table(records: Sequence[Record], plan: Mapping[str, Any]) -> str:
    none, plain, own = (
        select(records, group="curve", name=name) for name in ("none", "straight-through", "SGA+")
    )
    one = select(records, group="one codec")
    by_one = f"SGA+, all by the codec of λ = {plan['base']:g}"
    rows = [
        ("straight-through rounding", "no refinement", plain, none),
        ("SGA+, SSL", "no refinement", own, none),
        ("SGA+, SSL", "straight-through rounding", own, plain),
        (by_one, "no refinement, each λ by its own codec", one, none),
        (by_one, "SGA+, each λ by its own codec", one, own),
    ]
    lines = ["| refinement | against | BD-rate | BD-PSNR |", "| --- | --- | --- | --- |"]
    for name, against, test, anchor in rows:
        try:
            found = deltas(test, anchor).values()
        except bd.CurveError as error:
            lines.append(f"| {name} | {against} | not comparable: {error} | |")
            continue
        rate, psnr = [d.rate for d in found], [d.psnr for d in found]
        cells = [name, against, _spread(rate, ".1f", " %"), _spread(psnr, ".2f", " dB")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _probability_table(records: Sequence[Record], plan: Mapping[str, Any]) -> str:
    (none,) = select(records, group="curve", name="none", **{"lambda": plan["base"]})
    (plain,) = select(records, group="curve", name="straight-through", **{"lambda": plan["base"]})
    lines = ["| rounding | R + λD |", "| --- | --- |"]
    for record in [plain, *select(records, group="probability")]:
        change = list(relative_loss(record, none).values())
        lines.append(f"| {record['name']} | {_spread(change, '.1f', ' %')} |")
    return "\n".join(lines)


def _maxima_table(records: Sequence[Record], plan: Mapping[str, Any]) -> str:
    (none,) = select(records, group="curve", name="none", **{"lambda": plan["base"]})
    rows = groupby((r for r in records if r["group"].startswith("τ_max")), lambda r: r["name"])
    columns = sorted([*plan["maxima"], 1.0])
    lines = [
        f"| probability | {' | '.join(f'τ_max {m:g}' for m in columns)} |",
        "| --- " * (1 + len(columns)) + "|",
    ]
    for name, row in rows:
        changes = {r["group"]: fmean(relative_loss(r, none).values()) for r in row}
        cells = [f"{_signed(changes[f'τ_max {m:g}'], '.1f')} %" for m in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def balanced_gaps(records: Sequence[Record]) -> list[tuple[Record, dict[str, float | None]]]:
    """PSNR of each balanced record above the plain sums of the same codec, by image."""
    plain = curve(select(records, group="one codec"))
    return [
        (record, {name: gap_above(point, plain[name]) for name, point in scores(record).items()})
        for record in select(records, group="balanced")
    ]


def _balanced_table(records: Sequence[Record]) -> str:
    lines = ["| weighting | λ | bpp | PSNR / dB | above plain |", "| --- | --- | --- | --- | --- |"]
    for record, gaps in balanced_gaps(records):
        bpp, psnr = (fmean(axis) for axis in zip(*scores(record).values(), strict=True))
        known = [gap for gap in gaps.values() if gap is not None]
        above = _spread(known, ".2f", " dB") if known else "rates do not overlap"
        lines.append(
            f"| {record['name']} | {record['lambda']:g} | {bpp:.3f} | {psnr:.2f} | {above} |"
        )
    return "\n".join(lines)


def _conclusion(records: Sequence[Record], plan: Mapping[str, Any]) -> str:
    (none,) = select(records, group="curve", name="none", **{"lambda": plan["base"]})
    change = {
        record["name"]: fmean(relative_loss(record, none).values())
        for record in select(records, group="probability")
    }
    best, worst = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    gaps = [g for _, row in balanced_gaps(records) for g in row.values() if g is not None]
    balanced = (
        f"Balanced refinement lies {_spread(gaps, '.2f', ' dB')} from the curve of plain sums: λ "
        "of the plain sum does the same without a Gramian or a second evaluation."
        if gaps and max(map(abs, gaps)) < 0.1
        else "Balanced refinement leads to other rates than the plain sum with the same λ; only "
        "the column at the same rate compares them."
    )
    return (
        f"The least mean loss has {best} ({_signed(change[best], '.1f')} %), the largest {worst} "
        f"({_signed(change[worst], '.1f')} %). {balanced}"
    )


def _spread(values: Sequence[float], form: str, unit: str) -> str:
    low, high = (_signed(end, form) for end in (min(values), max(values)))
    return f"{_signed(fmean(values), form)}{unit} [{low}, {high}]"


def _signed(value: float, form: str) -> str:
    return f"{value:+{form}}".replace("-", "−")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
