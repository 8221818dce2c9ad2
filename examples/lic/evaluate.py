"""Rate-distortion curves of trained codecs, by the sizes of real files.

::

    python -m examples.lic.evaluate runs/lic/standard runs/lic/solution1 --anchor standard
    python -m examples.lic.evaluate runs/lic/standard --images kodak

Every image is encoded to a file, which is read back and decoded. The checkpoints of one folder make
one curve, which has the folder's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from examples.lic import curves, images, options
from examples.lic.bitstream import BitstreamError
from examples.lic.checkpoint import CheckpointError, load_codec
from examples.lic.compressai_codecs import ArchitectureError
from examples.lic.curves import Point
from examples.lic.measurement import MS_SSIM_SIDE, measure

FAULTS = (images.ImageError, CheckpointError, ArchitectureError, BitstreamError, OSError)

QUICK_SIDE = 192
"""Of the part of the first image that ``--quick`` codes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    chosen = _parse(arguments)
    torch.set_num_threads(chosen.threads)
    torch.backends.cudnn.deterministic = True  # or a decoder on a GPU need not agree with itself
    try:
        points = _evaluated(chosen)
        _report(points, chosen)
    except FAULTS as error:
        print(f"error: {options.sentence(error)}", file=sys.stderr)
        return 2
    return _exactness(points)


def _evaluated(chosen: argparse.Namespace) -> list[Point]:
    """Every checkpoint on every image; all checkpoints are read before the first is used."""
    paths = _checkpoints(chosen.checkpoints)
    names = _curve_names(paths)
    if chosen.anchor is not None and chosen.anchor not in names.values():
        raise CheckpointError(
            f"--anchor should be one of {', '.join(sorted(set(names.values())))}, the folders of "
            f"the checkpoints. Found {chosen.anchor}. Choose one of these."
        )
    codecs = {path: load_codec(path) for path in paths}
    for path, (_, content) in codecs.items():
        if content["taken"] < content["settings"]["steps"]:
            print(f"{path} is at step {content['taken']} of {content['settings']['steps']}.")
    pictures = _quick(_pictures(chosen.images)) if chosen.quick else _pictures(chosen.images)
    points = []
    for path, (model, content) in tqdm(codecs.items(), unit="checkpoint", disable=None):
        folder = chosen.output / "files" / names[path].strip("/").replace("/", "_") / path.stem
        found = measure(model.to(chosen.device), pictures, folder)
        points.append(Point(path, names[path], content["lmbda"], content["settings"], found))
    return points


def _checkpoints(arguments: Sequence[Path]) -> list[Path]:
    """Files as they are, and for each folder what is in it."""
    paths = []
    for argument in arguments:
        inside = sorted(argument.glob("*.pt")) if argument.is_dir() else [argument]
        if not inside:
            raise CheckpointError(
                f"{argument} holds no checkpoints (*.pt). Train some with "
                "`python -m examples.lic.train`, or name another folder."
            )
        paths += inside
    return list(dict.fromkeys(paths))


def _curve_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The name of each checkpoint's folder, or its whole path where two have the same name."""
    folders = {path: path.resolve().parent for path in paths}
    short = [folder.name for folder in set(folders.values())]
    return {
        path: folder.name if short.count(folder.name) == 1 else str(path.parent)
        for path, folder in folders.items()
    }


def _pictures(folder: Path | None) -> dict[str, Callable[[], Tensor]]:
    if folder is None:
        return {name: partial(_same, image) for name, image in images.bundled().held_out.items()}
    paths = images.list_images(folder)
    modes, faults = images.read_modes(paths)
    images.check(faults, len(paths))
    note = images.conversions(modes)
    if note is not None:
        print(note)
    return {str(path.relative_to(folder)): partial(images.read_pixels, path) for path in paths}


def _same(image: Tensor) -> Tensor:
    return image


def _quick(pictures: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    name, load = next(iter(pictures.items()))
    return {name: lambda: load()[:, :QUICK_SIDE, :QUICK_SIDE]}


def _report(points: Sequence[Point], chosen: argparse.Namespace) -> None:
    print(curves.table(points))
    small = sorted(n for n, m in points[0].measurements.items() if m.ms_ssim is None)
    if small:
        print(f"MS-SSIM needs sides of {MS_SSIM_SIDE} pixels; without it: {', '.join(small)}.")
    comparisons = [] if chosen.anchor is None else curves.comparisons(points, chosen.anchor)
    for comparison in comparisons:
        print(comparison.sentence())
    title = "bundled photographs" if chosen.images is None else chosen.images.name
    figure = chosen.output / "rate-distortion.png"
    curves.figure(points, title).savefig(figure)
    results = chosen.output / "results.json"
    content = curves.as_json(points, comparisons)
    results.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{figure}\n{results}")


def _exactness(points: Sequence[Point]) -> int:
    exact = [m.exact for point in points for m in point.measurements.values()]
    print(f"Decoded bit by bit as the codec reconstructs it: {sum(exact)} of {len(exact)}.")
    return 0 if all(exact) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(
        prog="python -m examples.lic.evaluate",
        description="Code images with trained codecs, and compare curves of rate and distortion.",
    )
    add = parser.add
    add("checkpoints", "files of examples.lic.train, or folders of them", type=Path, nargs="+",
        metavar="CHECKPOINT")  # fmt: skip
    add("--images", "code this folder, not the bundled held-out photographs", type=Path,
        metavar="DIR")  # fmt: skip
    add("--anchor", "folder of the curve that others are compared with", metavar="NAME")
    add("--output", "for files, figure and results", type=Path, metavar="DIR",
        default=Path("runs/lic/evaluation"))  # fmt: skip
    add("--device", "cpu, cuda, ...", type=options.device, metavar="NAME", default="cpu")
    parser.add_threads()
    parser.add_argument("--quick", action="store_true", help="a part of the first image alone")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
