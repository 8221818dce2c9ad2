"""Rate-distortion curves by the sizes of real files: as a table, and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from examples.lic.bd import CurveError, Delta, compare, t_interval
from examples.lic.evaluation import Measurement, Score

COLUMNS = "{:<26}{:>8}{:>9}{:>11}{:>10}{:>10}"
IMAGE_COLUMNS = "  {:<24}{:>12}{:>13}{:>9}"


class Similarity(NamedTuple):
    """A point of the plane of rate and MS-SSIM."""

    bpp: float
    ms_ssim: float


@dataclass(frozen=True)
class Point:
    """A codec or format at one setting, and the results on each image; means are over the images.

    Attributes:
        codec: The file of the codec, or the name of the format.
        curve: The name of the curve that the point is on.
        setting: λ of the codec, or the quality of the format.
        images: The results by the names of the images.
    """

    codec: str
    curve: str
    setting: float
    images: dict[str, Measurement]

    def mean(self, name: str) -> float:
        """Of ``"bpp"`` or ``"psnr"``; or of ``"estimated_bpp"``, which formats do not have."""
        return fmean(getattr(m, name) for m in self.images.values())

    def score(self, image: str | None = None) -> Score:
        """Of one image, or the mean, by true size."""
        if image is None:
            return Score(self.mean("bpp"), self.mean("psnr"))
        return Score(self.images[image].bpp, self.images[image].psnr)

    def similarity(self) -> Similarity | None:
        """Mean rate and MS-SSIM of those images that are large enough for it, if there are any."""
        pairs = [(m.bpp, m.ms_ssim) for m in self.images.values() if m.ms_ssim is not None]
        return Similarity(*map(fmean, zip(*pairs, strict=True))) if pairs else None


def table(curves: Mapping[str, Sequence[Point]]) -> str:
    """One row for each point: means over the images."""
    head = COLUMNS.format("curve", "λ or q", "bpp", "estimated", "PSNR/dB", "MS-SSIM")
    lines = [head]
    for name, curve in curves.items():
        lines.append("─" * len(head))
        for point in curve:
            estimated, last = "–", "–"
            if all(m.estimated_bpp is not None for m in point.images.values()):
                estimated = f"{point.mean('estimated_bpp'):.4f}"
            if similarity := point.similarity():
                last = f"{similarity.ms_ssim:.4f}"
            row = (f"{point.setting:.4g}", f"{point.mean('bpp'):.4f}", estimated)
            lines.append(COLUMNS.format(name, *row, f"{point.mean('psnr'):.2f}", last))
    return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """One curve against another.

    Attributes:
        test: The name of the curve.
        anchor: The name of the other one.
        images: By image; None where its curves cannot be compared.
        summary: A sentence with the mean over the images, or why there is none.
    """

    test: str
    anchor: str
    images: dict[str, Delta | None]
    summary: str

    def __str__(self) -> str:
        lines = [self.summary]
        if any(self.images.values()):
            lines.append(IMAGE_COLUMNS.format("", "BD-rate/%", "BD-PSNR/dB", "overlap"))
            for name, delta in self.images.items():
                row = ["–"] * 3
                if delta is not None:
                    row = [f"{delta.rate:+.2f}", f"{delta.psnr:+.3f}", f"{delta.psnr_overlap:.0%}"]
                lines.append(IMAGE_COLUMNS.format(name, *row))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """In types that JSON has."""
        images = {name: delta and delta._asdict() for name, delta in self.images.items()}
        return asdict(self) | {"images": images}


def compare_curves(curves: Mapping[str, Sequence[Point]], test: str, anchor: str) -> Comparison:
    """BD-rate and BD-PSNR image by image with an interval, or of the mean curves, or why not.

    The curve of a mean over images is not a mean over curves: where the two overlap in part, it
    can contradict all of them. So it is told only where not all images can be compared.
    """

    def delta(image: str | None) -> Delta:
        return compare(*([p.score(image) for p in curves[name]] for name in (test, anchor)))

    deltas: dict[str, Delta | None] = {}
    reasons: list[CurveError] = []
    for name in curves[test][0].images:
        try:
            deltas[name] = delta(name)
        except CurveError as reason:
            deltas[name] = None
            reasons.append(reason)
    if not reasons:
        text = _summarize([d for d in deltas.values() if d is not None])
    else:
        try:
            mean = delta(None)
            text = (
                f"not image by image. {reasons[0]} The mean curves, without an interval: BD-rate "
                f"{mean.rate:+.2f} %, BD-PSNR {mean.psnr:+.3f} dB, over {mean.psnr_overlap:.0%} of "
                "the shorter PSNR range."
            )
        except CurveError as error:
            text = f"no BD-rate. {error}"
    return Comparison(test, anchor, deltas, f"{test} against {anchor}: {text}")


def _summarize(deltas: Sequence[Delta]) -> str:
    rate, low, high = t_interval([d.rate for d in deltas])
    interval = f"95 % interval [{low:+.2f}, {high:+.2f}]"
    if len(deltas) == 1:
        interval = "no interval, as there is one image"
    return (
        f"image by image BD-rate {rate:+.2f} %, {interval}; "
        f"BD-PSNR {fmean(d.psnr for d in deltas):+.3f} dB; "
        f"over at least {min(d.psnr_overlap for d in deltas):.0%} of the shorter PSNR range."
    )


def write_json(path: Path, content: Any) -> None:
    """Write results as JSON, which has no infinity and no NaN: they become null."""
    text = json.dumps(_without_infinity(content), indent=1, allow_nan=False)
    path.write_text(text, encoding="utf-8")


def _without_infinity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
