"""What the parts of this example share: a command line that runs a study, shows it, keeps it."""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.lic import images, options, store

CROP = 128
"""Side of the training crops, and so the least side of a photograph to train on."""


class Study(Protocol):
    """A module that makes evidence; see ``refinement/study.py`` for one."""

    def run(
        self,
        scale: Literal["short", "full"],
        folder: Path,
        *,
        photographs: images.Photographs | None,
        seed: int,
        say: Callable[[str], object],
    ) -> dict[str, Any]: ...

    def section(self, results: dict[str, Any]) -> str: ...

    def figures(self, results: dict[str, Any]) -> dict[str, Figure]: ...


def middle(image: Tensor, side: int) -> Tensor:
    """The middle square of ``[C, H, W]``, or as much of it as there is."""
    height, width = image.shape[-2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return image[:, top : top + side, left : left + side]


def fingerprints(pictures: Mapping[str, Tensor]) -> dict[str, int]:
    """Tell images of one name apart, so that a changed folder is not answered from the store."""
    return {name: zlib.crc32(image.numpy().tobytes()) for name, image in pictures.items()}


def signed(value: float, form: str) -> str:
    """A number with its sign, as text has it."""
    return f"{value:+{form}}".replace("-", "−")


def main(study: Study, name: str, about: str, arguments: Sequence[str] | None = None) -> int:
    """Run `study` as ``python -m examples.lic.<name>``; returns the exit code."""
    chosen = _parse(name, about, arguments)
    torch.set_num_threads(chosen.threads)
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        results = study.run(
            "short" if chosen.quick else "full",
            chosen.output / "finished",
            photographs=_photographs(chosen, say),
            seed=chosen.seed,
            say=say,
        )
        text = study.section(results)
        print(text)
        for path in _write(study, results, text, chosen.output):
            print(path)
    except (images.ImageError, store.StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _photographs(
    chosen: argparse.Namespace, say: Callable[[str], None]
) -> images.Photographs | None:
    if chosen.images is None:
        return None
    photographs = images.from_folders(chosen.images, chosen.eval_images, crop=CROP)
    for note in photographs.notes:
        say(note)
    return photographs


def _write(study: Study, results: dict[str, Any], text: str, folder: Path) -> list[Path]:
    figures = {folder / f"{stem}.png": figure for stem, figure in study.figures(results).items()}
    for path, figure in figures.items():
        figure.savefig(path)
    written = {"results.json": json.dumps(results, indent=1), "section.md": text + "\n"}
    for file, content in written.items():
        (folder / file).write_text(content, encoding="utf-8")
    return [*figures, *(folder / file for file in written)]


def _parse(name: str, about: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(
        prog=f"python -m examples.lic.{name}",
        description=f"{about} A run that was stopped goes on where it was.",
    )
    parser.add_images()
    parser.add("--output", "for figures and results", type=Path, metavar="DIR",
               default=Path("runs/lic") / name)  # fmt: skip
    parser.add("--seed", "of weights, crops and noise", type=int, metavar="N", default=0)
    parser.add_threads()
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    return parser.parse_args(arguments)
