"""What the page shows of latent refinement: its tables, and how the loss falls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lic.figures import Drawing, grid, label_rd_axes, plot_curve
from benchmarks.lic.refinement import (
    BALANCED,
    CURVE,
    NONE,
    ONE_CODEC,
    PLAIN,
    PROBABILITY,
    SGA_PLUS,
)
from benchmarks.lic.scores import rate_distortion_loss
from benchmarks.lic.text import table, with_range, with_sign
from examples.lic.bd import CurveError, Delta, compare, gap_above
from examples.lic.evaluation import Score, mean_score

Record = Mapping[str, Any]

SMALL_GAP = 0.1
"""In dB: points this close to a curve are said to lie on it."""


def section(title: str, data: Mapping[str, Any]) -> str:
    """What was run, its tables, and what can be said."""
    records, base = data["records"], data["base"]
    names = list(records[0]["images"])
    return "\n\n".join(
        [
            f"Codecs of λ = {', '.join(f'{x:g}' for x in data['lambdas'])}, "
            f"{data['training steps']} steps each, refine the middle {data['side']} × "
            f"{data['side']} pixels of {len(names)} held-out photographs in {data['steps']} steps "
            "of Adam. Every code is rounded before it is scored. Brackets: the smallest and the "
            "largest value of a photograph; one seed.",
            "**Gain**, by curves through all λ:",
            _gain_table(records),
            f"**Which probability**, by the codec of λ = {base:g}: R + λD compared with the "
            "encoder's latents. The published temperatures are compressed into the steps; rows "
            "that are cut off keep the published rate of cooling, and end at a higher temperature.",
            _probability_table(records, base),
            "**Sensitivity to the highest temperature τ_max**, the same loss:",
            _maxima_table(records, base, [*data["maxima"], 1.0]),
            f"**Another λ than that of training**: SGA+ by the codec of λ = {base:g} only, and its "
            "PSNR above curves of one codec for each λ, at the same rate:",
            _rate_table(
                records,
                ONE_CODEC,
                {
                    "above no refinement": _curve(records, NONE),
                    "above SGA+ by each codec": _curve(records, SGA_PLUS),
                },
            ),
            f"**Balanced or plain**: SGA+ by the codec of λ = {base:g}, and its PSNR above the "
            "plain sums of the table before, at the same rate:",
            _rate_table(records, BALANCED, {"above plain": select(records, group=ONE_CODEC)}),
            _conclusion(records, base),
        ]
    )


def select(records: Iterable[Record], **fields: Any) -> list[Record]:
    """The records that have these values in these fields."""
    return [r for r in records if all(r[name] == value for name, value in fields.items())]


def scores(record: Record) -> dict[str, Score]:
    """The scores of a record by image."""
    return {name: Score(*image["score"]) for name, image in record["images"].items()}


def curves(records: Sequence[Record]) -> dict[str, list[Score]]:
    """Curves by image, of records that differ in λ."""
    each = [scores(record) for record in records]
    return {name: [points[name] for points in each] for name in each[0]}


def deltas(test: Sequence[Record], anchor: Sequence[Record]) -> list[Delta]:
    """BD-rate and BD-PSNR of each image.

    Raises:
        CurveError: The curves of an image cannot be compared.
    """
    anchors = curves(anchor)
    return [compare(points, anchors[name]) for name, points in curves(test).items()]


def relative_loss(record: Record, reference: Record) -> list[float]:
    """Change of R + λD compared with another code, in per cent and for each image."""
    before, lmbda = scores(reference), record["lambda"]
    return [
        100 * (rate_distortion_loss(point, lmbda) / rate_distortion_loss(before[name], lmbda) - 1)
        for name, point in scores(record).items()
    ]


def gaps(record: Record, anchor: Sequence[Record]) -> list[float]:
    """PSNR above a curve at the same rate, of the images whose rate the curve reaches."""
    anchors = curves(anchor)
    above = (gap_above(point, anchors[name]) for name, point in scores(record).items())
    return [gap for gap in above if gap is not None]


def _curve(records: Sequence[Record], name: str) -> list[Record]:
    return select(records, group=CURVE, name=name)


def _at_base(records: Sequence[Record], name: str, base: float) -> Record:
    return select(_curve(records, name), **{"lambda": base})[0]


def _gain_table(records: Sequence[Record]) -> str:
    none, plain, own = (_curve(records, name) for name in (NONE, PLAIN, SGA_PLUS))
    rows = [
        ("straight-through rounding", "no refinement", *_gain(plain, none)),
        ("SGA+, SSL", "no refinement", *_gain(own, none)),
        ("SGA+, SSL", "straight-through rounding", *_gain(own, plain)),
    ]
    return table(("refinement", "against", "BD-rate", "BD-PSNR"), rows)


def _gain(test: Sequence[Record], anchor: Sequence[Record]) -> tuple[str, str]:
    try:
        compared = deltas(test, anchor)
    except CurveError as error:
        return f"not comparable: {error}", ""
    rates, psnrs = [d.rate for d in compared], [d.psnr for d in compared]
    return with_range(rates, 1, "%"), with_range(psnrs, 2, "dB")


def _probability_table(records: Sequence[Record], base: float) -> str:
    none = _at_base(records, NONE, base)
    shown = [_at_base(records, PLAIN, base), *select(records, group=PROBABILITY)]
    rows = [(r["name"], with_range(relative_loss(r, none), 1, "%")) for r in shown]
    return table(("rounding", "R + λD"), rows)


def _maxima_table(records: Sequence[Record], base: float, maxima: Sequence[float]) -> str:
    none = _at_base(records, NONE, base)
    columns = [f"τ_max {maximum:g}" for maximum in sorted(maxima)]
    tried = [record for record in records if record["group"] in columns]
    rows = []
    for name, row in groupby(tried, lambda record: record["name"]):
        change = {r["group"]: fmean(relative_loss(r, none)) for r in row}
        rows.append((name, *(f"{with_sign(change[column], 1)} %" for column in columns)))
    return table(("probability", *columns), rows)


def _rate_table(
    records: Sequence[Record], group: str, anchors: Mapping[str, Sequence[Record]]
) -> str:
    """Rate and PSNR of the codes of a group, and their PSNR above other curves."""
    rows = []
    for record in select(records, group=group):
        bpp, psnr = mean_score(scores(record))
        above = (_above(record, anchor) for anchor in anchors.values())
        rows.append((record["name"], f"{record['lambda']:g}", f"{bpp:.3f}", f"{psnr:.2f}", *above))
    return table(("", "λ", "bpp", "PSNR / dB", *anchors), rows)


def _above(record: Record, anchor: Sequence[Record]) -> str:
    above = gaps(record, anchor)
    missing = len(record["images"]) - len(above)
    parts = [with_range(above, 2, "dB")] if above else []
    return ", ".join(parts + ([f"{missing} beyond its rates"] if missing else []))


def _conclusion(records: Sequence[Record], base: float) -> str:
    none, plain = _at_base(records, NONE, base), select(records, group=ONE_CODEC)
    change = {r["name"]: fmean(relative_loss(r, none)) for r in select(records, group=PROBABILITY)}
    best, worst = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    above = [gap for r in select(records, group=BALANCED) for gap in gaps(r, plain)]
    balanced = (
        f"Balanced refinement lies {with_range(above, 2, 'dB')} from the curve of plain sums: "
        "another λ does the same without a Gramian or a second evaluation."
        if above and max(map(abs, above)) < SMALL_GAP
        else "Balanced refinement leads to other rates than the plain sum of the same λ; only the "
        "column at the same rate compares them."
    )
    return (
        f"The smallest mean loss is that of {best} ({with_sign(change[best], 1)} %), the largest "
        f"that of {worst} ({with_sign(change[worst], 1)} %). {balanced}"
    )


STYLES = {
    (CURVE, NONE): ("0.45", "s-", "no refinement"),
    (CURVE, PLAIN): ("tab:orange", "^-", "straight-through"),
    (CURVE, SGA_PLUS): ("tab:blue", "o-", "SGA+, each by its codec"),
    (ONE_CODEC, SGA_PLUS): ("tab:blue", "x--", "SGA+, all by one codec"),
    (BALANCED, "Solution 1"): ("tab:red", "P", "balanced, Solution 1"),
    (BALANCED, "Solution 2"): ("tab:green", "D", "balanced, Solution 2"),
}


def figures(title: str, data: Mapping[str, Any]) -> Iterator[Drawing]:
    """The rate-distortion plane, and how the loss of the rounded code falls."""
    records, base = data["records"], data["base"]
    yield Drawing(
        "refinement-rate-distortion",
        "Means over the held-out photographs; lines join points that differ only in λ.",
        partial(_rate_distortion, records),
    )
    yield Drawing(
        "refinement-course",
        f"R + λD of the code if it were sent after so many steps, by the codec of λ = {base:g}.",
        partial(_course, records, base),
    )


def _rate_distortion(records: Sequence[Record]) -> Figure:
    figure, (ax,) = grid(1, 1, width=7, height=5)
    for (group, name), (colour, style, label) in STYLES.items():
        chosen = select(records, group=group, name=name)
        points = sorted(mean_score(scores(record)) for record in chosen)
        plot_curve(ax, points, style, color=colour, label=label, markersize=7)
    label_rd_axes(ax)
    ax.legend(frameon=False, loc="lower right")
    return figure


def _course(records: Sequence[Record], base: float) -> Figure:
    figure, (ax,) = grid(1, 1, width=7, height=5)
    shown = [_at_base(records, PLAIN, base), *select(records, group=PROBABILITY)]
    for record in shown:
        if not record["name"].endswith("integers"):
            style = ":" if record["name"].endswith("cut off") else "-"
            courses = [image["course"] for image in record["images"].values()]
            losses = [
                fmean(
                    rate_distortion_loss(Score(*course[step]), record["lambda"])
                    for course in courses
                )
                for step in courses[0]
            ]
            ax.plot([int(step) for step in courses[0]], losses, style, label=record["name"])
    ax.set_xlabel("step")
    ax.set_ylabel("R + λD of the rounded code")
    ax.legend(frameon=False, fontsize="small")
    return figure
