"""The codecs that all experiments start from, against JPEG and WebP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.lic.engine import Results
from benchmarks.lic.estimator import Question, answer
from benchmarks.lic.jobs import Job, ScoreCodec, ScoreFormat
from benchmarks.lic.regime import Regime, bd_rates, describe, point, table
from examples.lic.anchors import FORMATS


@dataclass(frozen=True)
class Ladder:
    """See the module.

    Args:
        regime: The ladder.
        qualities: Of the formats.
    """

    regime: Regime
    qualities: Sequence[int] = (3, 5, 8, 12, 18, 25, 35, 50, 70, 85)

    def jobs(self, results: Results) -> Iterator[list[Job]]:
        yield [job for curve in self.curves().values() for job in curve]

    def curves(self) -> dict[str, list[Job]]:
        """The jobs of each curve."""
        curves: dict[str, list[Job]] = {"codec": [*map(ScoreCodec, self.regime.ladder.values())]}
        for form in FORMATS:
            curves[form] = [ScoreFormat(form, quality) for quality in self.qualities]
        return curves

    def summarize(self, results: Results) -> dict[str, Any]:
        curves = {name: [results[job] for job in jobs] for name, jobs in self.curves().items()}
        images = {name: [run["images"] for run in runs] for name, runs in curves.items()}
        questions = [
            Question(f"the codecs against {form.upper()}", "each photograph a value",
                     partial(bd_rates, images["codec"], images[form]))
            for form in FORMATS
        ]  # fmt: skip
        landed = [point(run) for run in curves["codec"]]
        rows = [
            (f"{lmbda:g}", *describe([score]))
            for lmbda, score in zip(self.regime.ladder, landed, strict=True)
        ]
        return {
            "title": "The codecs at the start",
            "about": (
                "BD-rate of the codecs that come with the examples, over the eight photographs: "
                "their estimated rates against the files of Pillow's JPEG (4:2:0, optimised) and "
                "WebP."
            ),
            "measure": "BD-rate",
            "comparisons": answer(questions),
            "tables": [table("The ladder", ("λ", "bpp", "PSNR / dB"), rows)],
            "curves": {name: [point(run) for run in runs] for name, runs in curves.items()},
        }
