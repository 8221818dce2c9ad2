"""A small learned image codec, trained the standard way and with balanced losses.

::

    python -m examples.lic                       # bundled photographs, about five minutes
    python -m examples.lic --images my-photos    # a folder of your own
    python -m examples.lic --quick               # seconds, to see that everything works
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill

import torch
from tqdm import tqdm

from examples.lic import images, plots, report
from examples.lic.comparison import Comparison, Plan, Rung
from examples.lic.options import Parser, crop_side, positive
from examples.lic.training import Recipe
from moo_balance import StepMetrics

QUICK = {"lambdas": [0.013], "steps": 10, "finetune_steps": 5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    options = _parse(arguments)
    try:
        photographs = _photographs(options)
        options.output.mkdir(parents=True, exist_ok=True)
    except (images.ImageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    plan = Plan(
        lambdas=sorted(options.lambdas),
        ladder=Recipe(options.steps, lr=1e-3),
        finetuning=Recipe(options.finetune_steps, lr=5e-4),
        crop=options.crop,
        batch=options.batch,
        seed=options.seed,
    )
    print(f"Trains on {_listed(photographs.train)}; held out: {_listed(photographs.held_out)}.")
    for note in photographs.notes:
        print(note)
    with tqdm(total=plan.total_steps, unit="step", mininterval=0.5, smoothing=0.05) as bar:
        rungs = Comparison(photographs, plan, _shown_on(bar))()
    print(f"\n{report.table(rungs)}\n\n{fill(report.SENTENCE, 88)}\n")
    for path in _write(rungs, plan, options.output):
        print(path)
    return 0


def _shown_on(bar: tqdm) -> Callable[[float, str, StepMetrics], None]:
    def on_step(lmbda: float, label: str, balance: StepMetrics) -> None:
        bar.set_description(f"λ {lmbda:g}, {label}", refresh=False)
        if bar.n % 20 == 0:
            bar.set_postfix_str(f"{balance.losses['rate']:.2f} bpp", refresh=False)
        bar.update()

    return on_step


def _photographs(options: argparse.Namespace) -> images.Photographs:
    if options.images is None:
        return images.bundled()
    return images.from_folders(options.images, options.eval_images, crop=options.crop)


def _listed(pictures: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(pictures) if len(pictures) <= 5 else f"{len(pictures)} images"


def _write(rungs: Sequence[Rung], plan: Plan, folder: Path) -> Iterator[Path]:
    figures = {
        "rate-distortion.png": plots.rate_distortion_figure(rungs),
        "weights.png": plots.weights_figure(rungs),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name)
        yield folder / name
    path = folder / "results.json"
    path.write_text(json.dumps(report.as_json(rungs, plan), indent=1), encoding="utf-8")
    yield path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m examples.lic",
        description="Train a small image codec, standard and balanced, and compare.",
    )
    add = parser.add
    parser.add_images()
    add("--output", "for figures and results", type=Path, metavar="DIR", default=Path("runs/lic"))
    add("--lambdas", "rungs of the ladder", type=positive(float), nargs="+", metavar="λ",
        default=[0.0035, 0.013, 0.05])  # fmt: skip
    add("--steps", "standard steps on each rung", type=positive(int), metavar="N", default=1500)
    add("--finetune-steps", "further steps of each method", type=positive(int), metavar="N",
        default=400)  # fmt: skip
    add("--batch", "crops in a step", type=positive(int), metavar="N", default=2)
    add("--crop", "side of the crops, a multiple of 64", type=crop_side, metavar="N", default=128)
    add("--seed", "of weights, crops and noise", type=int, metavar="N", default=0)
    parser.add_threads()
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options
