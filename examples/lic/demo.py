"""Codecs that are trained, fine-tuned with balanced losses: what that gains, by real files.

From each codec of a ladder the same further steps are taken six times: with the plain sum, with the
two solutions of Balanced R-D, and with fixed weights, those that the solutions arrived at and lower
ones. Every file is written, read back and decoded. JPEG and WebP are the anchors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from examples.lic import images, options, plots
from examples.lic.anchors import FORMATS
from examples.lic.bd import gap_above
from examples.lic.checkpoint import load_codec
from examples.lic.coding import PRETRAINED, CodecFile, list_codecs
from examples.lic.curves import Point, compare_curves
from examples.lic.evaluate import Pictures, measure_codecs, measure_formats, take_part
from examples.lic.log import Progress, Recorder
from examples.lic.losses import EQUAL, SOLUTIONS, fixed
from examples.lic.runs import Run, train
from examples.lic.streams import Sources
from examples.lic.training import Recipe
from moo_balance.weighting import Weighting

START, STANDARD = "start", "standard"

RUNS = "runs"
"""Subfolder of the output, with a folder for each method. What is there is made anew."""

RIVALS = {
    "fixed as Solution 1": ("Solution 1", 1.0),
    "fixed as Solution 2": ("Solution 2", 1.0),
    "fixed, lower rate": ("Solution 1", 0.5),
}
"""Fixed weights: those that a balanced run arrived at, with this part of its distortion weight."""

EXPLANATION = (
    "Rows of one λ share the codec that they start from, crops and noise. Balancing takes that "
    "codec to another rate, about where a plain sum with λ' goes. The last three columns are PSNR "
    "above fixed weights, JPEG and WebP at the same rate (– where their rates do not reach). What "
    "is above fixed weights changes with the seed."
)

COLUMNS = "{:<8}{:<20}{:>7}{:>9}{:>10}{:>16}{:>9}{:>8}{:>8}{:>8}"
QUICK = {"steps": 3, "output": Path("runs/lic/quick/demo")}


class Rung(NamedTuple):
    """A codec to start from: its file, architecture, and λ."""

    path: Path
    arch: str
    lmbda: float


@dataclass(frozen=True)
class Result:
    """A codec by the files of the held-out images, and the metrics of its training if any."""

    point: Point
    record: Recorder | None

    @property
    def effective_lambda(self) -> float:
        """The λ' of a plain sum whose gradient has the direction that the run's arrived at."""
        mean = self.record.late_mean("coefficient")
        return self.point.setting * mean["distortion"] / mean["rate"]

    def fixed_weights(self, part: float) -> Weighting:
        """The coefficients that the run arrived at, with `part` of the distortion's; sum 1."""
        return fixed(1 / (1 + part * self.effective_lambda / self.point.setting))


@dataclass(frozen=True)
class Comparison:
    """Carries out all runs; their checkpoints are in the output, a subfolder for each method."""

    sources: Sources
    pictures: Pictures
    chosen: argparse.Namespace

    def start(self, rung: Rung) -> Result:
        """The codec as it is."""
        return Result(self._measure(START, rung.path), None)

    def fine_tune(self, rung: Rung) -> dict[str, Result]:
        """The results by method. Same start, crops and noise: only the weighting differs."""
        weightings = {STANDARD: EQUAL, **SOLUTIONS}
        results = {name: self._train(name, rung, w) for name, w in weightings.items()}
        for name, (solution, part) in RIVALS.items():
            results[name] = self._train(name, rung, results[solution].fixed_weights(part))
        return results

    def _train(self, name: str, rung: Rung, weighting: Weighting) -> Result:
        method = name.replace(",", "").replace(" ", "-").lower()
        path = self.chosen.output / RUNS / method / f"lambda-{rung.lmbda!r}.pt"
        path.unlink(missing_ok=True)  # of an earlier demonstration
        recipe = Recipe(self.chosen.steps, self.chosen.lr, clip="unit", ema=0.95)
        data = (self.chosen.crop, self.chosen.batch, self.chosen.seed, rung.path)
        run, record = Run(rung.arch, (rung.lmbda,), weighting, recipe, *data), Recorder()
        observers = [record, Progress(f"λ {rung.lmbda:g}, {name}")]
        train(run, self.sources, path, observers=observers)
        return Result(self._measure(name, path), record)

    def _measure(self, name: str, path: Path) -> Point:
        model, about = load_codec(path)
        codec, files = CodecFile(path, model, tuple(about["lambdas"])), self.chosen.output / "files"
        (point,) = measure_codecs([codec], {path: name}, self.pictures, files)
        return point


def gap(results: Mapping[str, Result], method: str) -> float | None:
    """PSNR of `method` above fixed weights from the same codec, at the same rate, in dB."""
    line = [results[name].point.score() for name in (STANDARD, *RIVALS)]
    return gap_above(results[method].point.score(), line)


def table(
    results: Mapping[float, Mapping[str, Result]], anchors: Mapping[str, Sequence[Point]]
) -> str:
    """One row for each codec."""
    names = ("λ", "method", "bpp", "PSNR/dB", "ms/step", "last w_R : w_D", "λ'", "fixed", *anchors)
    lines = [COLUMNS.format(*names)]
    for lmbda, methods in results.items():
        lines.append("─" * len(lines[0]))
        for name, result in methods.items():
            score, record = result.point.score(), result.record
            training = ("", "", "")
            if record is not None:
                last = record.last("weight")
                training = (
                    f"{record.milliseconds:.1f}",
                    f"{last['rate']:.2f} : {last['distortion']:.2f}",
                    f"{result.effective_lambda:.2g}",
                )
            above = [gap_above(score, [p.score() for p in curve]) for curve in anchors.values()]
            gaps = ["–" if value is None else f"{value:+.2f}" for value in above]
            own = gap(methods, name) if name in SOLUTIONS else None
            fixed_gap = ("–" if name in SOLUTIONS else "") if own is None else f"{own:+.2f}"
            row = (f"{lmbda:g}", name, f"{score.bpp:.3f}", f"{score.psnr:.2f}", *training)
            lines.append(COLUMNS.format(*row, fixed_gap, *gaps).rstrip().replace("-", "−"))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code, 1 if a decoded image is not the codec's own."""
    chosen = _parse(arguments)
    rungs = _choose(chosen)
    if any((chosen.output / RUNS).resolve() in rung.path.resolve().parents for rung in rungs):
        raise options.OptionError(
            f"--from should not be in {chosen.output / RUNS}, whose files are made anew. Found "
            f"{chosen.start}. Choose another --output."
        )
    photographs = images.bundled()
    if chosen.images is not None:
        photographs = images.from_folders(chosen.images, chosen.eval_images, crop=chosen.crop)
    chosen.output.mkdir(parents=True, exist_ok=True)
    pictures = {name: image.clone for name, image in photographs.held_out.items()}
    pictures = take_part(pictures) if chosen.quick else pictures
    print("Starts from the codecs of λ", *(f"{r.lmbda:g}" for r in rungs), "in", chosen.start)
    for role, named in (("Fine-tunes on", photographs.train), ("Held out:", pictures)):
        print(role, ", ".join(named) if len(named) < 6 else f"{len(named)} images")
    compare = Comparison(list(photographs.train.values()), pictures, chosen)
    starts = {rung.lmbda: compare.start(rung) for rung in rungs}
    anchors: dict[str, list[Point]] = {name: [] for name in FORMATS}
    for point in measure_formats(FORMATS, pictures, chosen.output / "files"):
        anchors[point.curve].append(point)
    curves = {"the codecs": [result.point for result in starts.values()], **anchors}
    print(*(compare_curves(curves, "the codecs", name) for name in anchors), sep="\n", flush=True)
    results = {r.lmbda: {START: starts[r.lmbda], **compare.fine_tune(r)} for r in rungs}
    print(f"\n{table(results, anchors)}\n\n{fill(EXPLANATION, 88)}\n")
    _write(results, anchors, chosen.output)
    exact = [m.exact for methods in results.values() for result in methods.values()
             for m in result.point.images.values()]  # fmt: skip
    print(f"Decoded bit by bit as the codec reconstructs it: {sum(exact)} of {len(exact)}.")
    return 0 if all(exact) else 1


def _write(
    results: Mapping[float, Mapping[str, Result]],
    anchors: Mapping[str, Sequence[Point]],
    folder: Path,
) -> None:
    scores = {
        lmbda: {name: result.point.score() for name, result in methods.items()}
        for lmbda, methods in results.items()
    }
    markers = {START: "x", STANDARD: "s", **dict(zip(SOLUTIONS, "o^", strict=True))}
    dashed = {name: [p.score() for p in points] for name, points in anchors.items()}
    paths = [folder / name for name in ("rate-distortion.png", "results.json")]
    line = (STANDARD, *RIVALS)
    plots.starts_figure(scores, markers=markers, line=line, dashed=dashed).savefig(paths[0])
    content = {
        "codecs": {x: {name: s._asdict() for name, s in row.items()} for x, row in scores.items()},
        "anchors": {name: [s._asdict() for s in curve] for name, curve in dashed.items()},
    }
    paths[1].write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(*paths, sep="\n")


def _choose(chosen: argparse.Namespace) -> list[Rung]:
    """The codecs to start from, in the order of their λ."""
    rungs = {}
    for path in list_codecs([chosen.start]):
        about = load_codec(path)[1]
        if len(about["lambdas"]) == 1:  # a variable-rate codec has other losses
            rungs[about["lambdas"][0]] = Rung(path, about["arch"], about["lambdas"][0])
    there = sorted(rungs)
    wanted = sorted(set(chosen.lambdas or there[: 1 if chosen.quick else None]))
    if not wanted or not rungs.keys() >= set(wanted):
        raise options.OptionError(
            f"--lambdas should be of those of the codecs in {chosen.start}, each of one rate: "
            f"{' '.join(f'{lmbda:g}' for lmbda in there)}. Found "
            f"{' '.join(f'{lmbda:g}' for lmbda in wanted)}. Choose among these, or another --from."
        )
    return [rungs[lmbda] for lmbda in wanted]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("", "Fine-tune codecs, standard and balanced, and compare them.")
    add, whole, real = parser.add, options.number(int), options.number(float)
    add("--from", "folder of the codecs to start from (those that come with the example)", Path,
        dest="start")  # fmt: skip
    add("--lambdas", "start from the codecs of these only", real, nargs="+")
    add("--images", "train on this folder, not on bundled images", Path)
    add("--eval-images", "held out; if not given, the last fifth of --images by name", Path)
    add("--output", "for checkpoints, files, figure and results", Path, Path("runs/lic/demo"))
    add("--steps", "further steps of each method", whole, 100)
    add("--lr", "Adam's learning rate", real, 2e-4)
    add("--batch", "crops in a step", whole, 1)
    add("--crop", "side of the crops, a multiple of 64", options.crop_side, 256)
    add("--seed", "of crops and noise", int, 0)
    chosen = parser.parse(arguments, QUICK)
    if chosen.eval_images is not None and chosen.images is None:
        parser.error("--eval-images needs --images")
    chosen.start = chosen.start or PRETRAINED
    return chosen
