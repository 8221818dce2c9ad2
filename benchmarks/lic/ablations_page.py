"""What the page shows of the ablations: every variation in a row, and the curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.lic.ablations import (
    CLIPPED_1,
    CLIPPED_2,
    SCRATCH_1,
    SCRATCH_2,
    SOLUTION_1,
    SOLUTION_2,
    SUMS,
    VARIATIONS,
)
from benchmarks.lic.figures import Drawing, grid, label_rd_axes, plot_curve
from benchmarks.lic.text import table, with_values
from examples.lic.bd import CurveError, compare, gap_above
from examples.lic.evaluation import Score, mean_score

Records = Sequence[Mapping[str, Any]]

COLLAPSED = Score(bpp=0.03, psnr=15.0)
"""Below either of them, a picture shows almost nothing. The rate is not enough: latents that are
cheap under the noise of training can cost more once they are rounded."""

PANELS = {
    "γ of Solution 1": (SUMS, SOLUTION_1, *(t for t in VARIATIONS if t.startswith("γ"))),
    "Solution 1": (SUMS, *(t for t in VARIATIONS if t.startswith(SOLUTION_1) and t != SCRATCH_1)),
    "Solution 2": (SUMS, *(t for t in VARIATIONS if t.startswith(SOLUTION_2) and t != SCRATCH_2)),
    "swapped": (SOLUTION_1, SOLUTION_2, SCRATCH_1, SCRATCH_2),
}
STYLES = {SUMS: "s-", SOLUTION_1: "o-", SOLUTION_2: "o-", CLIPPED_1: "x-", CLIPPED_2: "x-"}


def section(title: str, data: Mapping[str, Any]) -> str:
    """What was run, every variation in a row, and what can be said."""
    (lmbda, start), records = data["start"], data["records"]
    head = (
        "variation", "bpp", "PSNR / dB", "w_R", "collapsed", "against", "BD-rate", "dB above sums",
    )  # fmt: skip
    return "\n\n".join(
        [
            f"From one checkpoint per seed (a plain sum, λ = {lmbda:g}, {start} steps), "
            f"{data['steps']} further steps with each variation and each of its λ; from scratch "
            f"{data['steps from scratch']} steps. Seeds: {', '.join(map(str, data['seeds']))}. "
            "Runs of one seed share checkpoint, crops and noise. BD-rate of the mean over the "
            "held-out photographs; in brackets each seed.",
            table(head, (_row(records, name) for name in VARIATIONS)),
            f"Collapsed: a run that ends below {COLLAPSED.bpp:g} bpp or {COLLAPSED.psnr:g} dB. "
            "w_R is the weight of the gradient of log rate after the learning rate first fell. The "
            "last column is the PSNR above plain sums at the rate of each point, a mean over λ; in "
            "brackets each seed. Gradients have norm 1, where c cannot matter; only the clipped "
            "rows show what it does.",
            _conclusion(records),
        ]
    )


def _row(records: Records, title: str) -> tuple[str, ...]:
    variation = VARIATIONS[title]
    mine = [record for record in records if record["title"] == title]
    rates, psnrs = zip(*map(mean, mine), strict=True)
    weights = [record["weight"] for record in mine]
    compared = title != SUMS and not variation.from_scratch
    return (
        title,
        f"{min(rates):.3f} … {max(rates):.3f}",
        f"{min(psnrs):.1f} … {max(psnrs):.1f}",
        f"{min(weights):.2f} … {max(weights):.2f}" if title != SUMS else "",
        f"{collapses(mine)} of {len(mine)}" if collapses(mine) else "",
        variation.against or "",
        _rates(bd_rates(records, title, variation.against)) if variation.against else "",
        _gaps(gaps(records, title)) if compared else "",
    )


def mean(record: Mapping[str, Any]) -> Score:
    """Mean over the held-out photographs."""
    return mean_score(record["scores"])


def collapses(records: Records) -> int:
    """Number of runs whose pictures show almost nothing."""
    points = [mean(record) for record in records]
    return sum(p.bpp < COLLAPSED.bpp or p.psnr < COLLAPSED.psnr for p in points)


def curve(records: Records, title: str, seed: int) -> list[Score]:
    """One variation's points for one seed."""
    return [mean(r) for r in records if r["title"] == title and r["seed"] == seed]


def seeds_of(records: Records) -> list[int]:
    """The seeds of which there are records."""
    return sorted({record["seed"] for record in records})


def bd_rates(records: Records, title: str, against: str) -> list[float | None]:
    """BD-rate in per cent, by seed; None if the curves cannot be compared."""
    rates: list[float | None] = []
    for seed in seeds_of(records):
        try:
            pair = curve(records, title, seed), curve(records, against, seed)
            rates.append(compare(*pair).rate)
        except CurveError:
            rates.append(None)
    return rates


def _rates(by_seed: Sequence[float | None]) -> str:
    rates = [rate for rate in by_seed if rate is not None]
    missing = len(by_seed) - len(rates)
    shown = [with_values(rates, 1, "%")] if rates else []
    note = [f"no curve to compare in {missing} of {len(by_seed)} seeds"] if missing else []
    return "; ".join(shown + note)


def gaps(records: Records, title: str) -> list[list[float]]:
    """For each seed, the PSNR of each point above the plain sums at the same rate, in dB.

    Unlike a BD-rate it needs no curve; points outside the sums' rates are left out.
    """
    rows = []
    for seed in seeds_of(records):
        sums = curve(records, SUMS, seed)
        above = (gap_above(point, sums) for point in curve(records, title, seed))
        rows.append([gap for gap in above if gap is not None])
    return rows


def _gaps(rows: Sequence[Sequence[float]]) -> str:
    return with_values([fmean(row) for row in rows], 2) if all(rows) else "other rates"


def _conclusion(records: Records) -> str:
    fallen = [t for t in VARIATIONS if collapses([r for r in records if r["title"] == t])]
    rows = {t: bd_rates(records, t, v.against) for t, v in VARIATIONS.items() if v.against}
    comparable = {title: row for title, row in rows.items() if None not in row}
    one_sided = [t for t, row in comparable.items() if len({rate > 0 for rate in row}) == 1]
    chance = 2.0 ** (1 - len(seeds_of(records)))
    collapsed = f"Collapsed at some λ: {', '.join(fallen)}." if fallen else "No run collapsed."
    return (
        f"{collapsed} Of {len(comparable)} variations whose curves can be compared, "
        f"{len(one_sided)} lie on one side of their counterpart in every seed, where chance would "
        f"put {chance:.0%} of them{': ' if one_sided else ''}{', '.join(one_sided)}."
    )


def figures(title: str, data: Mapping[str, Any]) -> Iterator[Drawing]:
    """A panel for each question, one line for each variation and seed."""
    yield Drawing(
        "ablations", "Curves of all variations, one line for each seed.", partial(_figure, data)
    )


def _figure(data: Mapping[str, Any]) -> Figure:
    figure, axes = grid(2, 2, width=5.5, height=4.5)
    for ax, (panel, titles) in zip(axes, PANELS.items(), strict=True):
        for index, title in enumerate(titles):
            for seed in data["seeds"]:
                label = title if seed == data["seeds"][0] else None
                points, style = (
                    sorted(curve(data["records"], title, seed)),
                    STYLES.get(title, ".--"),
                )
                plot_curve(ax, points, style, color=f"C{index}", label=label, linewidth=1)
        ax.set_title(panel)
        ax.legend(frameon=False, fontsize="small", loc="best")
        label_rd_axes(ax)
    return figure
