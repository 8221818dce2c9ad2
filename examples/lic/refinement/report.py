"""What the refinement study found, in Markdown; every number comes from its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any, TypeAlias

from examples.lic import bd
from examples.lic.comparison import gap_above
from examples.lic.evaluation import Score, mean_score
from examples.lic.parts import signed
from examples.lic.refinement.experiment import loss

ALIKE = 0.1
"""In dB: points this close to a curve are said to lie on it."""

Record: TypeAlias = Mapping[str, Any]


def section(results: Mapping[str, Any]) -> str:
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
            _gain_table(records),
            f"**Which probability**, by the codec of λ = {plan['base']:g}: R + λD against the "
            "encoder's latents, with the published temperatures compressed into the steps (the "
            "rows cut off keep the published rate of cooling, and end at a higher temperature):",
            _probability_table(records, plan),
            "**Sensitivity to the highest temperature τ_max**, the same loss:",
            _maxima_table(records, plan),
            f"**Another λ than that of training**: SGA+ by the codec of λ = {plan['base']:g} "
            "alone, and its PSNR above curves of one codec for each λ, at the same rate:",
            _one_codec_table(records),
            f"**Balanced or plain**: SGA+ by the codec of λ = {plan['base']:g}, and its PSNR above "
            "the plain sums of the table before, at the same rate:",
            _balanced_table(records),
            _conclusion(records, plan),
        ]
    )


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


def _gain_table(records: Sequence[Record]) -> str:
    none, plain, own = (
        select(records, group="curve", name=name) for name in ("none", "straight-through", "SGA+")
    )
    rows = [
        ("straight-through rounding", "no refinement", plain, none),
        ("SGA+, SSL", "no refinement", own, none),
        ("SGA+, SSL", "straight-through rounding", own, plain),
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
        cells = [f"{signed(changes[f'τ_max {m:g}'], '.1f')} %" for m in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gaps(record: Record, anchor: Sequence[Record]) -> list[float]:
    """PSNR above a curve at the same rate, of the images whose rate the curve reaches."""
    curves = curve(anchor)
    found = (gap_above(point, curves[name]) for name, point in scores(record).items())
    return [gap for gap in found if gap is not None]


def _one_codec_table(records: Sequence[Record]) -> str:
    none, own = (select(records, group="curve", name=name) for name in ("none", "SGA+"))
    lines = [
        "| λ | bpp | PSNR / dB | above no refinement | above SGA+ by each codec |",
        "| --- " * 5 + "|",
    ]
    for record in select(records, group="one codec"):
        cells = [f"{record['lambda']:g}", *_point(record), _above(record, none)]
        lines.append(f"| {' | '.join(cells)} | {_above(record, own)} |")
    return "\n".join(lines)


def _balanced_table(records: Sequence[Record]) -> str:
    lines = ["| weighting | λ | bpp | PSNR / dB | above plain |", "| --- " * 5 + "|"]
    for record in select(records, group="balanced"):
        above = _above(record, select(records, group="one codec"))
        cells = [record["name"], f"{record['lambda']:g}", *_point(record), above]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _point(record: Record) -> tuple[str, str]:
    bpp, psnr = mean_score(scores(record))
    return f"{bpp:.3f}", f"{psnr:.2f}"


def _above(record: Record, anchor: Sequence[Record]) -> str:
    found = gaps(record, anchor)
    missing = len(record["images"]) - len(found)
    beyond = f"{missing} beyond its rates" if missing else ""
    return ", ".join(filter(None, [_spread(found, ".2f", " dB") if found else "", beyond]))


def _conclusion(records: Sequence[Record], plan: Mapping[str, Any]) -> str:
    (none,) = select(records, group="curve", name="none", **{"lambda": plan["base"]})
    change = {
        record["name"]: fmean(relative_loss(record, none).values())
        for record in select(records, group="probability")
    }
    best, worst = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    plain = select(records, group="one codec")
    above = [gap for r in select(records, group="balanced") for gap in gaps(r, plain)]
    balanced = (
        f"Balanced refinement lies {_spread(above, '.2f', ' dB')} from the curve of plain sums: "
        "another λ does the same without a Gramian or a second evaluation."
        if above and max(map(abs, above)) < ALIKE
        else "Balanced refinement leads to other rates than the plain sum with the same λ; only "
        "the column at the same rate compares them."
    )
    return (
        f"The least mean loss has {best} ({signed(change[best], '.1f')} %), the largest {worst} "
        f"({signed(change[worst], '.1f')} %). {balanced}"
    )


def _spread(values: Sequence[float], form: str, unit: str) -> str:
    low, high = (signed(end, form) for end in (min(values), max(values)))
    return f"{signed(fmean(values), form)}{unit} [{low}, {high}]"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
