"""What all experiments share: the codecs that they start from, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from benchmarks.lic.estimator import EstimateError, Point, to_point
from benchmarks.lic.jobs import Result
from examples.lic.bd import compare
from examples.lic.checkpoint import CheckpointError, load_codec
from examples.lic.evaluation import Score
from examples.lic.runs import Run
from examples.lic.training import Recipe
from moo_balance.weighting import Weighting

PRETRAINED = Path(__file__).parents[2] / "examples" / "lic" / "pretrained"

Images: TypeAlias = Mapping[str, Sequence[float]]
"""Bits per pixel and PSNR of each photograph."""

AVERAGING = 0.99
"""Decay of the averaged weights that are scored."""


@dataclass(frozen=True)
class Regime:
    """How all runs are trained.

    Args:
        ladder: Files of codecs by their λ, in rising order.
        arch: Their architecture.
        crop: Side of the crops.
        batch: Crops in a step.
        amp: See :class:`examples.lic.training.Recipe`.
    """

    ladder: Mapping[float, Path]
    arch: str = "small"
    crop: int = 256
    batch: int = 2
    amp: bool = True

    def nearest(self, lmbda: float) -> Path:
        """The codec of the ladder whose λ is nearest, by its logarithm."""
        return self.ladder[min(self.ladder, key=lambda rung: abs(math.log(rung / lmbda)))]

    def run(
        self, lambdas: float | Sequence[float], weighting: Weighting, steps: int, lr: float,
        *, ema: float | None = AVERAGING, **more: Any,
    ) -> Run:  # fmt: skip
        """A run, its gradient clipped at 1 as in the papers; for the rest see :class:`Run`."""
        lambdas = (lambdas,) if isinstance(lambdas, float) else tuple(lambdas)
        recipe, data = Recipe(steps, lr, ema=ema, amp=self.amp), (self.crop, self.batch)
        return Run(more.pop("arch", self.arch), lambdas, weighting, recipe, *data, **more)


def shipped_ladder() -> dict[float, Path]:
    """The codecs that come with the examples, by their λ.

    Raises:
        CheckpointError: There are fewer than three.
    """
    ladder = {load_codec(path)[1]["lambdas"][-1]: path for path in PRETRAINED.glob("*.safetensors")}
    if len(ladder) < 3:
        raise CheckpointError(
            f"{PRETRAINED} should hold at least three codec files. Found {len(ladder)}. Restore "
            "them from the repository, or train them as its README says."
        )
    return dict(sorted(ladder.items()))


def point(result: Result) -> Point:
    """Where a run landed."""
    if "error" in result:
        raise EstimateError(f"A run broke off: {result['error']}")
    return to_point(result["images"])


def ratio(result: Result) -> float:
    """How much a run weighted distortion in the end, relative to rate, on average."""
    rate, distortion = result["coefficients"]
    return distortion / rate


LANDING = ("bpp", "PSNR / dB")
"""The columns of :func:`describe`."""


def describe(points: Sequence[Point]) -> tuple[str, str]:
    """Geometric mean of the rates and mean of the PSNR, as text."""
    rates, psnrs = zip(*points, strict=True)
    return f"{math.exp(fmean(rates)):.3f}", f"{fmean(psnrs):.2f}"


def bd_rate(test: Sequence[Images], anchor: Sequence[Images]) -> float:
    """BD-rate in per cent of the curves through the points of several codecs."""
    curves = [[to_point(images) for images in curve] for curve in (test, anchor)]
    scores = ([Score(math.exp(p.log_rate), p.psnr) for p in curve] for curve in curves)
    return compare(*scores).rate


def bd_rates(test: Sequence[Images], anchor: Sequence[Images]) -> list[float]:
    """BD-rate for each photograph."""
    names = test[0]
    return [
        bd_rate([{name: i[name]} for i in test], [{name: i[name]} for i in anchor])
        for name in names
    ]


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """A table of the page."""
    return {"caption": caption, "head": list(head), "rows": [[str(c) for c in r] for r in rows]}


def significant(value: float, digits: int = 3) -> float:
    """A number rounded to so many digits."""
    return float(f"{value:.{digits}g}")
