"""Rate-distortion curves of trained codecs, by the sizes of real files.

Every image is encoded to a file, which is read back and decoded. The checkpoints of one folder make
one curve, which has the folder's name; a variable-rate codec has a point for each of its λ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.lic import images, options, plots
from examples.lic.architectures import coder_for
from examples.lic.bd import CurveError, Delta, compare, t_interval
from examples.lic.checkpoint import CheckpointError, load_codec
from examples.lic.evaluation import MS_SSIM_SIDE, Measurement, Score, measure
from examples.lic.variable_rate import VariableRateCodec

QUICK = {"output": Path("runs/lic/quick/evaluation")}
QUICK_SIDE = 192
"""Of the part of the first image that ``--quick`` codes, in pixels."""

COLUMNS = "{:<26}{:>8}{:>9}{:>11}{:>10}{:>10}"


@dataclass(frozen=True)
class Point:
    """One codec at one λ, and the results on each image; its means are over the images."""

    checkpoint: str
    curve: str
    lmbda: float
    images: dict[str, Measurement]

    def mean(self, name: str) -> float | None:
        """Of ``"bpp"``, ``"estimated_bpp"``, ``"psnr"``, ``"ms_ssim"``; None if one has none."""
        values = [getattr(m, name) for m in self.images.values()]
        return None if None in values else fmean(values)

    def score(self, image: str | None = None) -> Score:
        """Of one image, or the mean, by true size."""
        if image is None:
            return Score(self.mean("bpp"), self.mean("psnr"))
        return Score(self.images[image].bpp, self.images[image].psnr)


def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code, 1 if a decoded image is not the codec's own."""
    chosen = _parse(arguments)
    torch.backends.cudnn.deterministic = True  # or a decoder on a GPU need not agree with itself
    points = list(_evaluate(chosen))
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=Point.score):
        curves.setdefault(point.curve, []).append(point)
    print(table(curves))
    small = [name for name, m in points[0].images.items() if m.ms_ssim is None]
    if small:
        print(f"No MS-SSIM: it needs sides of {MS_SSIM_SIDE} pixels, unlike {', '.join(small)}.")
    others = [name for name in curves if chosen.anchor not in (None, name)]
    sentences = [compare_curves(curves, name, chosen.anchor) for name in others]
    print("".join(f"{sentence}\n" for sentence in sentences), end="")
    axes = ("bpp", "psnr", "ms_ssim")
    drawn = {name: [tuple(map(p.mean, axes)) for p in curve] for name, curve in curves.items()}
    paths = [chosen.output / name for name in ("rate-distortion.png", "results.json")]
    plots.curves_figure(drawn, f"Mean of {len(points[0].images)} images").savefig(paths[0])
    content = {"points": [asdict(point) for point in points], "comparisons": sentences}
    paths[1].write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    print(*paths, sep="\n")
    exact = [m.exact for point in points for m in point.images.values()]
    print(f"Decoded bit by bit as the codec reconstructs it: {sum(exact)} of {len(exact)}.")
    return 0 if all(exact) else 1


def table(curves: Mapping[str, Sequence[Point]]) -> str:
    """One row for each point: means over the images."""
    head = COLUMNS.format("curve", "λ", "bpp", "estimated", "PSNR/dB", "MS-SSIM")
    lines = [head]
    for name, curve in curves.items():
        lines.append("─" * len(head))
        for point in curve:
            names = ("bpp", "estimated_bpp", "psnr", "ms_ssim")
            bpp, estimated, psnr, similarity = map(point.mean, names)
            last = "–" if similarity is None else f"{similarity:.4f}"
            row = (name, f"{point.lmbda:g}", f"{bpp:.4f}", f"{estimated:.4f}", f"{psnr:.2f}", last)
            lines.append(COLUMNS.format(*row))
    return "\n".join(lines)


def compare_curves(curves: Mapping[str, Sequence[Point]], test: str, anchor: str) -> str:
    """BD-rate and BD-PSNR of the mean curves and of each image's, or why there are none."""

    def delta(image: str | None) -> Delta:
        return compare(*([p.score(image) for p in curves[name]] for name in (test, anchor)))

    try:
        mean = delta(None)
        text = (
            f"{test} against {anchor}: BD-rate {mean.rate:+.2f} %, BD-PSNR {mean.psnr:+.3f} dB, "
            f"over {mean.psnr_overlap:.0%} of the PSNR range"
        )
    except CurveError as error:
        return f"{test} against {anchor}: no BD-rate. {error}"
    try:
        mean, low, high = t_interval([delta(image).rate for image in curves[test][0].images])
    except CurveError as error:
        return f"{text}; not for each image. {error}"
    return f"{text}; image by image {mean:+.2f} %, 95 % interval [{low:+.2f}, {high:+.2f}]."


def _evaluate(chosen: argparse.Namespace) -> Iterator[Point]:
    """Every codec on every image; all checkpoints are read before the first is used."""
    paths: dict[Path, str] = {}
    for argument in chosen.checkpoints:
        inside = sorted(argument.glob("*.pt")) if argument.is_dir() else [argument]
        if not inside:
            raise CheckpointError(
                f"{argument} holds no checkpoints (*.pt). Train some with "
                "`python -m examples.lic train`, or name another folder."
            )
        paths |= {path: str(path.parent) for path in inside}
    if chosen.anchor is not None and chosen.anchor not in paths.values():
        raise CheckpointError(
            f"--anchor should be one of {', '.join(sorted(set(paths.values())))}, the folders of "
            f"the checkpoints. Found {chosen.anchor}. Choose one of these."
        )
    codecs: list[tuple[Path, float, nn.Module]] = []
    for path in paths:
        model, content = load_codec(path)
        if content["taken"] < content["run"]["steps"]:
            print(f"{path} is at step {content['taken']} of {content['run']['steps']}.")
        for lmbda in content["run"]["lambdas"]:
            codec = model.at(lmbda) if isinstance(model, VariableRateCodec) else model
            codecs.append((path, lmbda, codec))
    pictures = _pictures(chosen.images, quick=chosen.quick)
    for path, lmbda, codec in tqdm(codecs, unit="codec", disable=None):
        coder = coder_for(codec.to(chosen.device))
        folder = chosen.output / "files" / paths[path].strip("/").replace("/", "_")
        measured = {
            name: measure(codec, coder, load, folder / f"lambda-{lmbda!r}" / f"{name}.bin")
            for name, load in pictures.items()
        }
        yield Point(str(path), paths[path], lmbda, measured)


def _pictures(folder: Path | None, *, quick: bool) -> dict[str, Callable[[], Tensor]]:
    """Functions that load each image, by its name."""
    if folder is None:
        pictures = {name: image.clone for name, image in images.bundled().held_out.items()}
    else:
        paths = images.check_headers(images.list_images(folder))
        pictures = {str(p.relative_to(folder)): partial(images.read_image, p) for p in paths}
    if quick:
        name, load = next(iter(pictures.items()))
        pictures = {name: lambda: load()[:, :QUICK_SIDE, :QUICK_SIDE]}
    return pictures


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("evaluate", "Code images with trained codecs, and compare curves.")
    add = parser.add
    add("checkpoints", "of the train command, or folders", Path, nargs="+", metavar="CHECKPOINT")
    add("--images", "code this folder, not the bundled held-out photographs", Path)
    add("--anchor", "folder of the curve that others are compared with", lambda x: str(Path(x)))
    add("--output", "for files, figure and results", Path, Path("runs/lic/evaluation"))
    add("--device", "cpu, cuda, ...", options.device, "cpu")
    return parser.parse(arguments, QUICK)
