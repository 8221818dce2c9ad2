"""A small learned image codec, trained the standard way and with balanced losses.

Standard models for three λ, each trained from the one before; then from each of their checkpoints
the same further steps six times over: with the standard sum, with the two solutions of Balanced
R-D, and with fixed weights, those that the solutions arrived at and lower ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from examples.lic import images, options, plots
from examples.lic.bd import gap_above
from examples.lic.checkpoint import load_codec
from examples.lic.evaluation import Score, evaluate, mean_score
from examples.lic.images import Photographs
from examples.lic.log import Progress, Recorder
from examples.lic.losses import EQUAL, SOLUTIONS, fixed
from examples.lic.runs import Run, train
from examples.lic.training import Recipe
from moo_balance.weighting import Weighting

STANDARD = "standard"

RIVALS = {
    "fixed as Solution 1": ("Solution 1", 1.0),
    "fixed as Solution 2": ("Solution 2", 1.0),
    "fixed, lower rate": ("Solution 1", 0.5),
}
"""Fixed weights: those that a balanced run arrived at, with this part of its distortion weight."""

EXPLANATION = (
    "Rows of one λ share checkpoint, crops and noise. Balancing takes that checkpoint to another "
    "rate, about where a plain sum with λ' goes. The last column is PSNR above fixed weights at "
    "the same rate (– where their rates do not reach); it changes with the seed."
)

COLUMNS = "{:<8}{:<20}{:>7}{:>9}{:>10}{:>16}{:>9}{:>9}"
QUICK = {"lambdas": [0.013], "steps": 10, "finetune_steps": 5,
         "output": Path("runs/lic/quick/demo")}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A trained model: mean score on the held-out images, and the metrics of its training."""

    score: Score
    record: Recorder
    lmbda: float

    @property
    def effective_lambda(self) -> float:
        """The λ' of a plain sum whose gradient has the direction that the run's arrived at."""
        mean = self.record.late_mean("coefficient")
        return self.lmbda * mean["distortion"] / mean["rate"]

    def fixed_weights(self, part: float) -> Weighting:
        """The coefficients that the run arrived at, with `part` of the distortion's; sum 1."""
        return fixed(1 / (1 + part * self.effective_lambda / self.lmbda))


@dataclass(frozen=True)
class Comparison:
    """Carries out all runs; their checkpoints are in `folder`, a subfolder for each method."""

    photographs: Photographs
    chosen: argparse.Namespace
    folder: Path

    def __call__(self) -> dict[float, dict[str, Result]]:
        """For each λ, the results by method; all others started from ``"checkpoint"``."""
        results, start = {}, None
        for lmbda in sorted(set(self.chosen.lambdas)):
            standard = Recipe(self.chosen.steps, lr=1e-3, clip="unit")
            further = Recipe(self.chosen.finetune_steps, lr=5e-4, clip="unit")
            point = {"checkpoint": self._run("checkpoint", lmbda, EQUAL, standard, start)}
            start = self._path("checkpoint", lmbda)
            # Same start, same crops, same noise: only the weighting differs.
            for name, weighting in {STANDARD: EQUAL, **SOLUTIONS}.items():
                point[name] = self._run(name, lmbda, weighting, further, start)
            for name, (solution, part) in RIVALS.items():
                weighting = point[solution].fixed_weights(part)
                point[name] = self._run(name, lmbda, weighting, further, start)
            results[lmbda] = point
        return results

    def _run(
        self, name: str, lmbda: float, weighting: Weighting, recipe: Recipe, start: Path | None
    ) -> Result:
        path, record = self._path(name, lmbda), Recorder()
        options = (self.chosen.crop, self.chosen.batch, self.chosen.seed, start)
        path.unlink(missing_ok=True)  # of an earlier demonstration
        train(
            Run("small", (lmbda,), weighting, recipe, *options),
            list(self.photographs.train.values()),
            path,
            observers=[record, Progress(f"λ {lmbda:g}, {name}")],
        )
        scores = evaluate(load_codec(path)[0], self.photographs.held_out)
        return Result(mean_score(scores), record, lmbda)

    def _path(self, name: str, lmbda: float) -> Path:
        method = name.replace(",", "").replace(" ", "-").lower()
        return self.folder / method / f"lambda-{lmbda!r}.pt"


def gap(point: Mapping[str, Result], method: str) -> float | None:
    """PSNR of `method` above fixed weights from the same checkpoint, at the same rate, in dB."""
    return gap_above(point[method].score, [point[name].score for name in (STANDARD, *RIVALS)])


def table(results: Mapping[float, Mapping[str, Result]]) -> str:
    """One row for each model."""
    names = ("λ", "method", "bpp", "PSNR/dB", "ms/step", "last w_R : w_D", "λ'", "gap/dB")
    lines = [COLUMNS.format(*names)]
    for lmbda, point in results.items():
        lines.append("─" * len(lines[0]))
        for name, result in point.items():
            above = gap(point, name) if name in SOLUTIONS else None
            last = result.record.last("weight")
            row = (
                f"{lmbda:g}", name, f"{result.score.bpp:.3f}", f"{result.score.psnr:.2f}",
                f"{result.record.milliseconds:.1f}",
                f"{last['rate']:.2f} : {last['distortion']:.2f}",
                f"{result.effective_lambda:.2g}",
                ("–" if name in SOLUTIONS else "") if above is None else f"{above:+.2f}",
            )  # fmt: skip
            lines.append(COLUMNS.format(*row).rstrip().replace("-", "−"))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code."""
    chosen = _parse(arguments)
    photographs = images.bundled()
    if chosen.images is not None:
        photographs = images.from_folders(chosen.images, chosen.eval_images, crop=chosen.crop)
    chosen.output.mkdir(parents=True, exist_ok=True)
    for role, pictures in (("Trains on", photographs.train), ("Held out:", photographs.held_out)):
        print(role, ", ".join(pictures) if len(pictures) < 6 else f"{len(pictures)} images")
    results = Comparison(photographs, chosen, chosen.output)()
    print(f"\n{table(results)}\n\n{fill(EXPLANATION, 88)}\n")
    scores = {x: {name: r.score for name, r in point.items()} for x, point in results.items()}
    markers = {"checkpoint": "x", STANDARD: "s", **dict(zip(SOLUTIONS, "o^", strict=True))}
    figure = plots.starts_figure(scores, markers=markers, line=(STANDARD, *RIVALS))
    paths = [chosen.output / name for name in ("rate-distortion.png", "results.json")]
    figure.savefig(paths[0])
    content = {x: {name: s._asdict() for name, s in point.items()} for x, point in scores.items()}
    paths[1].write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(*paths, sep="\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("", "Train a small image codec, standard and balanced, and compare.")
    add, whole, real = parser.add, options.number(int), options.number(float)
    add("--images", "train on this folder, not on bundled images", Path)
    add("--eval-images", "held out; if not given, the last fifth of --images by name", Path)
    add("--output", "for checkpoints, figure and results", Path, Path("runs/lic/demo"))
    add("--lambdas", "of the standard models", real, options.LAMBDAS, nargs="+")
    add("--steps", "of each standard model", whole, 1500)
    add("--finetune-steps", "further steps of each method", whole, 400)
    add("--batch", "crops in a step", whole, 2)
    add("--crop", "side of the crops, a multiple of 64", options.crop_side, 128)
    add("--seed", "of weights, crops and noise", int, 0)
    chosen = parser.parse(arguments, QUICK)
    if chosen.eval_images is not None and chosen.images is None:
        parser.error("--eval-images needs --images")
    return chosen
