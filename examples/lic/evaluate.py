"""Rate-distortion curves of trained codecs, by the sizes of real files.

Every image is encoded to a file, which is read back and decoded. The codecs of one folder make one
curve, which has the folder's name; a variable-rate codec has a point for each of its λ. JPEG and
WebP are curves, too, where they are asked for.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import torch
from torch import Tensor

from examples.lic import images, options, plots
from examples.lic.anchors import FORMATS, QUALITIES, measure_format
from examples.lic.checkpoint import CheckpointError
from examples.lic.coding import CodecFile, file_coder, list_codecs, load_codecs
from examples.lic.curves import Comparison, Point, compare_curves, table, write_json
from examples.lic.encode import check_folder
from examples.lic.evaluation import MS_SSIM_SIDE, measure
from examples.lic.progress import Meter

Pictures: TypeAlias = Mapping[str, Callable[[], Tensor]]
"""Functions that load each image, uint8 ``[3, H, W]``, by its name."""

QUICK = {"output": Path("runs/lic/quick/evaluation")}
QUICK_SIDE = 192
"""Of the part of the first image that ``--quick`` codes, in pixels."""


def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code, 1 if a decoded image is not the codec's own."""
    chosen = _parse(arguments)
    check_folder(chosen.output)
    torch.backends.cudnn.deterministic = True  # or a decoder on a GPU need not agree with itself
    paths = {path: _curve(path.parent) for path in list_codecs(chosen.checkpoints)}
    anchors = _check_anchors(chosen.anchor or [], set(paths.values()))
    codecs = load_codecs(paths, chosen.device)
    pictures = _pictures(chosen.images, quick=chosen.quick)
    formats = [anchor for anchor in anchors if anchor not in paths.values()]
    count = sum(len(codec.lambdas) for codec in codecs) + len(formats) * len(QUALITIES)
    meter = Meter("Evaluation", count * len(pictures), "image")
    files = chosen.output / "files"
    # The formats first: they refuse images that are too large for them.
    last = list(measure_formats(formats, pictures, files, on_image=meter.update))
    points = [*measure_codecs(codecs, paths, pictures, files, on_image=meter.update), *last]
    meter.close()
    curves: dict[str, list[Point]] = {point.curve: [] for point in points}
    for point in sorted(points, key=Point.score):
        curves[point.curve].append(point)
    tests = [name for name in curves if name not in formats]
    comparisons = [
        compare_curves(curves, test, anchor)
        for anchor in anchors
        for test in tests
        if test != anchor
    ]
    # All files before the first line: a reader such as `head` may have enough of it.
    written = _write(chosen.output, points, curves, comparisons, formats)
    print(table(curves))
    if small := _too_small(points):
        print(f"MS-SSIM, and the rate in its figure, without {', '.join(small)}: it needs sides of "
              f"{MS_SSIM_SIDE} pixels.")  # fmt: skip
    print(*comparisons, *written, sep="\n")
    exact = [m.exact for point in points for m in point.images.values() if m.exact is not None]
    print(f"Decoded bit by bit as the codec reconstructs it: {sum(exact)} of {len(exact)}.")
    return 0 if all(exact) else 1


def _write(
    folder: Path,
    points: Sequence[Point],
    curves: Mapping[str, Sequence[Point]],
    comparisons: Sequence[Comparison],
    formats: Sequence[str],
) -> list[Path]:
    """Write figure and results; returns their paths."""
    scores = {name: [p.score() for p in curve] for name, curve in curves.items()}
    similar = {name: [p.similarity() for p in curve] for name, curve in curves.items()}
    count, small = len(points[0].images), len(_too_small(points))
    figure = plots.curves_figure(
        {"PSNR (dB)": (f"{count} images", scores),
         "MS-SSIM": (f"{count - small} images", {} if small == count else similar)},
        dashed=formats,
    )  # fmt: skip
    written = [folder / name for name in ("rate-distortion.png", "results.json")]
    figure.savefig(written[0])
    content = {"points": [asdict(p) for p in points],
               "comparisons": [c.as_dict() for c in comparisons]}  # fmt: skip
    write_json(written[1], content)
    return written


def _too_small(points: Sequence[Point]) -> list[str]:
    """The images that have no MS-SSIM."""
    return [name for name, m in points[0].images.items() if m.ms_ssim is None]


def _curve(folder: Path) -> str:
    """The name of the curve of a folder's codecs: printable, where its own name is not Unicode."""
    return os.fsencode(folder).decode(errors="backslashreplace")


def _check_anchors(anchors: Sequence[str], folders: Set[str]) -> list[str]:
    for anchor in anchors:
        if anchor not in FORMATS and anchor not in folders:
            raise CheckpointError(
                f"--anchor should be {', '.join(FORMATS)}, or one of {', '.join(sorted(folders))}, "
                f"the folders of the checkpoints. Found {anchor}. Choose one of these."
            )
    return list(dict.fromkeys(anchors))


def measure_codecs(
    codecs: Sequence[CodecFile],
    curves: Mapping[Path, str],
    pictures: Pictures,
    folder: Path,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[Point]:
    """Every codec at each of its λ on every image.

    Args:
        codecs: To measure.
        curves: The curve of each, by its path.
        pictures: The images.
        folder: For the files.
        on_image: Called after each image.
    """
    for codec in codecs:
        curve = curves[codec.path]
        for lmbda in codec.lambdas:
            # Quoted and by repr, so that no two codecs share a folder.
            place = folder / quote(curve, safe="") / f"{codec.path.name}-{lmbda!r}"
            model, measured = codec.at(lmbda), {}
            coder = file_coder(model)
            for name, load in pictures.items():
                measured[name] = measure(model, coder, load, place / f"{name}.bin")
                on_image()
            yield Point(str(codec.path), curve, lmbda, measured)


def measure_formats(
    formats: Iterable[str],
    pictures: Pictures,
    folder: Path,
    *,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[Point]:
    """Every format with each quality on every image; for the rest see :func:`measure_codecs`."""
    for kind in formats:
        for quality in QUALITIES:
            measured = {}
            for name, load in pictures.items():
                file = folder / kind / f"{quality}" / name
                measured[name] = measure_format(kind, quality, load, file)
                on_image()
            yield Point(kind, kind, quality, measured)


def _pictures(folder: Path | None, *, quick: bool) -> Pictures:
    if folder is None:
        pictures = {name: image.clone for name, image in images.bundled().held_out.items()}
    else:
        photos = images.read_all(images.list_images(folder), memory=int(1e9 * options.MEMORY))
        pictures = {str(p.path.relative_to(folder)): p.read for p in photos}
    return take_part(pictures) if quick else pictures


def take_part(pictures: Pictures) -> Pictures:
    """What ``--quick`` codes: a part of the first image."""
    name, load = next(iter(pictures.items()))
    return {name: lambda: load()[:, :QUICK_SIDE, :QUICK_SIDE]}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("evaluate", "Code images with trained codecs, and compare curves.")
    add = parser.add
    add("checkpoints", "or codec files, or folders of them", Path, nargs="+", metavar="CHECKPOINT")
    add("--images", "code this folder, not the bundled held-out photographs", Path)
    add("--anchor", f"curves to compare with: {', '.join(FORMATS)}, or a folder's",
        lambda text: _curve(Path(text)), nargs="+")  # fmt: skip
    add("--output", "for files, figure and results", Path, Path("runs/lic/evaluation"))
    add("--device", "cpu, cuda, ...", options.device, "cpu")
    return parser.parse(arguments, QUICK)
