"""Evaluated checkpoints as curves: table, figure, Bjøntegaard deltas, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.lic.bd import CurveError, Delta, Interval, bootstrap, compare
from examples.lic.evaluation import Score
from examples.lic.measurement import Means, Measurement, means

_COLUMNS = "{:<22}{:>8}{:>9}{:>11}{:>10}{:>10}"


@dataclass(frozen=True)
class Point:
    """A checkpoint, and what it did to each image."""

    path: Path
    curve: str
    lmbda: float
    settings: Mapping[str, Any]
    measurements: Mapping[str, Measurement]

    @property
    def means(self) -> Means:
        return means(self.measurements)


def by_curve(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each curve, by rate."""
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.means.bpp):
        curves.setdefault(point.curve, []).append(point)
    return {name: curves[name] for name in dict.fromkeys(point.curve for point in points)}


def table(points: Sequence[Point]) -> str:
    """One row for each checkpoint: means over the images."""
    head = _COLUMNS.format("curve", "λ", "bpp", "estimated", "PSNR/dB", "MS-SSIM")
    lines = [head]
    for name, curve in by_curve(points).items():
        lines.append("─" * len(head))
        lines += [_row(name, point.lmbda, point.means) for point in curve]
    return "\n".join(lines)


def _row(name: str, lmbda: float, mean: Means) -> str:
    similarity = "–" if mean.ms_ssim is None else f"{mean.ms_ssim:.4f}"
    figures = (f"{mean.bpp:.4f}", f"{mean.estimated_bpp:.4f}", f"{mean.psnr:.2f}", similarity)
    return _COLUMNS.format(name, f"{lmbda:g}", *figures)


@dataclass(frozen=True)
class Comparison:
    """A curve against the anchor, or why they cannot be compared."""

    curve: str
    anchor: str
    delta: Delta | None = None
    """Of the curves of means over images."""
    interval: Interval | None = None
    """Of the BD-rate, over images: their mean and a 95 % bootstrap interval."""
    refusal: str = ""

    def sentence(self) -> str:
        """What there is to say, in one line."""
        if self.delta is None:
            return f"{self.curve} against {self.anchor}: no BD-rate. {self.refusal}"
        text = (
            f"{self.curve} against {self.anchor}: BD-rate {self.delta.rate:+.2f} %, BD-PSNR "
            f"{self.delta.psnr:+.3f} dB, over {self.delta.psnr_overlap:.0%} of the PSNR range"
        )
        if self.interval is None:
            return f"{text}; not for each image. {self.refusal}"
        low, high = self.interval.low, self.interval.high
        return f"{text}; image by image {self.interval.mean:+.2f} % [{low:+.2f}, {high:+.2f}]."


def comparisons(points: Sequence[Point], anchor: str) -> list[Comparison]:
    """Each other curve against the one called `anchor`, by true sizes."""
    curves = by_curve(points)
    others = {name: curve for name, curve in curves.items() if name != anchor}
    return [_compare(name, curve, anchor, curves[anchor]) for name, curve in others.items()]


def _compare(name: str, curve: list[Point], anchor: str, against: list[Point]) -> Comparison:
    try:
        delta = compare(_mean_scores(curve), _mean_scores(against))
    except CurveError as error:
        return Comparison(name, anchor, refusal=str(error))
    try:
        rates = {
            image: compare(_scores(curve, image), _scores(against, image)).rate
            for image in curve[0].measurements
        }
    except CurveError as error:
        return Comparison(name, anchor, delta, refusal=str(error))
    return Comparison(name, anchor, delta, bootstrap({0: rates}))


def _mean_scores(curve: Sequence[Point]) -> list[Score]:
    return [Score(point.means.bpp, point.means.psnr) for point in curve]


def _scores(curve: Sequence[Point], image: str) -> list[Score]:
    return [point.measurements[image].score for point in curve]


def figure(points: Sequence[Point], title: str) -> Figure:
    """PSNR and MS-SSIM over the true rate; one line a curve."""
    drawn = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = drawn.subplots(1, 2, sharex=True)
    for name, curve in by_curve(points).items():
        rows = [point.means for point in curve]
        left.plot([row.bpp for row in rows], [row.psnr for row in rows], "o-", label=name)
        similar = [(row.bpp, row.ms_ssim) for row in rows if row.ms_ssim is not None]
        if similar:
            right.plot(*zip(*similar, strict=True), "o-", label=name)
    for ax, label in ((left, "PSNR (dB)"), (right, "MS-SSIM")):
        ax.set_xlabel("rate of the files (bits per pixel)")
        ax.set_ylabel(label)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    drawn.suptitle(f"Mean of {len(points[0].measurements)} images: {title}", fontsize="medium")
    return drawn


def as_json(points: Sequence[Point], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Everything that was measured, image by image."""
    return {
        "checkpoints": [
            {
                "path": str(point.path),
                "curve": point.curve,
                "lambda": point.lmbda,
                "settings": point.settings,
                "mean": asdict(point.means),
                "images": {
                    name: {**asdict(m), "bpp": m.bpp, "estimated_bpp": m.estimated_bpp}
                    for name, m in point.measurements.items()
                },
            }
            for point in points
        ],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
