"""Codecs that are trained, fine-tuned with balanced losses: what that gains, by real files.

From each codec of a ladder the same further steps are taken six times: with the plain sum, with the
two solutions of Balanced R-D, and with fixed weights, those that the solutions arrived at and lower
ones. Every file is written, read back and decoded. JPEG and WebP are the anchors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from examples.lic import images, options, plots
from examples.lic.anchors import FORMATS
from examples.lic.bd import gap_above
from examples.lic.coding import PRETRAINED, CodecFile, load_codecs
from examples.lic.curves import Point, compare_curves, write_json
from examples.lic.encode import check_folder
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

    def start(self, codec: CodecFile) -> Result:
        """The codec as it is."""
        return Result(self._measure(START, codec), None)

    def fine_tune(self, codec: CodecFile) -> dict[str, Result]:
        """The results by method. Same start, crops and noise: only the weighting differs."""
        weightings = {STANDARD: EQUAL, **SOLUTIONS}
        results = {name: self._train(name, codec, w) for name, w in weightings.items()}
        for name, (solution, part) in RIVALS.items():
            results[name] = self._train(name, codec, results[solution].fixed_weights(part))
        return results

    def _train(self, name: str, codec: CodecFile, weighting: Weighting) -> Result:
        method = name.replace(",", "").replace(" ", "-").lower()
        (lmbda,) = codec.lambdas
        path = self.chosen.output / RUNS / method / f"lambda-{lmbda!r}.pt"
        path.unlink(missing_ok=True)  # of an earlier demonstration
        recipe = Recipe(self.chosen.steps, self.chosen.lr, clip="unit", ema=0.95)
        data = (self.chosen.crop, self.chosen.batch, self.chosen.seed, codec.path)
        run, record = Run(codec.arch, codec.lambdas, weighting, recipe, *data), Recorder()
        observers = [record, Progress(f"λ {lmbda:.4g}, {name}")]
        train(run, self.sources, path, observers=observers)
        (trained,) = load_codecs([path])
        return Result(self._measure(name, trained), record)

    def _measure(self, name: str, codec: CodecFile) -> Point:
        files = self.chosen.output / "files"
        (point,) = measure_codecs([codec], {codec.path: name}, self.pictures, files)
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
            row = (f"{lmbda:.4g}", name, f"{score.bpp:.3f}", f"{score.psnr:.2f}", *training)
            lines.append(COLUMNS.format(*row, fixed_gap, *gaps).rstrip().replace("-", "−"))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code, 1 if a decoded image is not the codec's own."""
    chosen = _parse(arguments)
    check_folder(chosen.output)
    codecs = _choose(chosen)
    made = (chosen.output / RUNS).resolve()
    if any(made in codec.path.resolve().parents for codec in codecs.values()):
        raise options.OptionError(
            f"--from should not be in {chosen.output / RUNS}, whose files are made anew. Found "
            f"{chosen.start}. Choose another --output."
        )
    if chosen.images is None:
        photographs = images.bundled(min_side=chosen.crop)
    else:
        photographs = images.from_folders(chosen.images, chosen.eval_images, crop=chosen.crop)
    chosen.output.mkdir(parents=True, exist_ok=True)
    pictures = {name: image.clone for name, image in photographs.held_out.items()}
    pictures = take_part(pictures) if chosen.quick else pictures
    print("Starts from the codecs of λ", *(f"{x:.4g}" for x in codecs), "in", chosen.start)
    for role, named in (("Fine-tunes on", photographs.train), ("Held out:", pictures)):
        print(role, ", ".join(named) if len(named) < 6 else f"{len(named)} images")
    compare = Comparison(list(photographs.train.values()), pictures, chosen)
    starts = {lmbda: compare.start(codec) for lmbda, codec in codecs.items()}
    anchors: dict[str, list[Point]] = {name: [] for name in FORMATS}
    for point in measure_formats(FORMATS, pictures, chosen.output / "files"):
        anchors[point.curve].append(point)
    curves = {"the codecs": [result.point for result in starts.values()], **anchors}
    print(*(compare_curves(curves, "the codecs", name) for name in anchors), sep="\n", flush=True)
    results = {x: {START: starts[x], **compare.fine_tune(codecs[x])} for x in codecs}
    written = _write(results, anchors, chosen.output)
    print(f"\n{table(results, anchors)}\n\n{fill(EXPLANATION, 88)}\n")
    print(*written, sep="\n")
    exact = [m.exact for methods in results.values() for result in methods.values()
             for m in result.point.images.values()]  # fmt: skip
    print(f"Decoded bit by bit as the codec reconstructs it: {sum(exact)} of {len(exact)}.")
    return 0 if all(exact) else 1


def _write(
    results: Mapping[float, Mapping[str, Result]],
    anchors: Mapping[str, Sequence[Point]],
    folder: Path,
) -> list[Path]:
    """Write figure and results; returns their paths."""
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
    write_json(paths[1], content)
    return paths


def _choose(chosen: argparse.Namespace) -> dict[float, CodecFile]:
    """The codecs to start from by their λ, in its order."""
    # A variable-rate codec has other losses.
    codecs = {c.lambdas[0]: c for c in load_codecs([chosen.start]) if not c.variable}
    if not codecs:
        raise options.OptionError(
            f"--from should have a codec of one rate. Found none in {chosen.start}. Name another "
            "folder, or train one with `python -m examples.lic train`."
        )
    there = sorted(codecs)
    wanted = sorted(set(chosen.lambdas or there[: 1 if chosen.quick else None]))
    if not codecs.keys() >= set(wanted):
        raise options.OptionError(
            f"--lambdas should be of those of the codecs in {chosen.start}, each of one rate: "
            f"{' '.join(f'{lmbda:.4g}' for lmbda in there)}. Found "
            f"{' '.join(f'{lmbda:g}' for lmbda in wanted)}. Choose among these, or another --from."
        )
    return {lmbda: codecs[lmbda] for lmbda in wanted}


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
    add("--seed", "of crops and noise", options.seed, 0)
    chosen = parser.parse(arguments, QUICK)
    if chosen.eval_images is not None and chosen.images is None:
        parser.error("--eval-images needs --images")
    chosen.start = chosen.start or PRETRAINED
    return chosen
