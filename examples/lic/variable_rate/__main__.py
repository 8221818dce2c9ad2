"""One codec for every rate, against a codec for each.

::

    python -m examples.lic.variable_rate                       # bundled photographs, minutes
    python -m examples.lic.variable_rate --images my-photos    # a folder of your own
    python -m examples.lic.variable_rate --quick               # seconds, to see that it works
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from examples.lic import images, store
from examples.lic.images import Photographs
from examples.lic.options import Parser, positive
from examples.lic.training import Recipe
from examples.lic.variable_rate import study
from examples.lic.variable_rate.comparing import Results
from examples.lic.variable_rate.design import Plan
from moo_balance import StepMetrics


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit code."""
    options = _parse(arguments)
    plan = study.SHORT if options.quick else _plan(options)
    torch.set_num_threads(options.threads)
    try:
        photographs = _photographs(options, plan.crop)
        results = _run(plan, options, photographs)
        paths = _write(results, options.output)
    except (images.ImageError, store.StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in photographs.notes:
        print(note)
    print(f"\n{study.section(results)}\n")
    print(*paths, sep="\n")
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    plan = Plan(sorted(options.lambdas))
    return replace(
        plan,
        start=Recipe(options.start_steps, plan.start.lr),
        post=Recipe(options.steps, plan.post.lr),
    )


def _photographs(options: argparse.Namespace, crop: int) -> Photographs:
    if options.images is None:
        return images.bundled()
    return images.from_folders(options.images, options.eval_images, crop=crop)


def _run(plan: Plan, options: argparse.Namespace, photographs: Photographs) -> Results:
    seeds = range(options.seed, options.seed + options.seeds)
    with tqdm(total=len(seeds) * plan.steps, unit="step", mininterval=0.5) as bar:

        def on_step(balance: StepMetrics) -> None:
            bar.update()

        return study.run_plan(plan, seeds, photographs, options.output / "runs", on_step)


def _write(results: Results, folder: Path) -> list[Path]:
    paths = [folder / "results.json"]
    paths[0].write_text(json.dumps(results, indent=1), encoding="utf-8")
    for stem, figure in study.figures(results).items():
        paths.append(folder / f"{stem}.png")
        figure.savefig(paths[-1])
    return paths


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m examples.lic.variable_rate",
        description="Train one image codec for several rates at once, and one for each of them.",
    )
    add = parser.add
    parser.add_images()
    add("--output", "for figures and results; finished runs found there are not run again",
        type=Path, metavar="DIR", default=Path("runs/lic-variable-rate"))  # fmt: skip
    add("--lambdas", "levels, three or more", type=positive(float), nargs="+", metavar="λ",
        default=list(Plan().lambdas))  # fmt: skip
    add("--start-steps", "at the highest λ alone", type=positive(int), metavar="N",
        default=Plan().start.steps)  # fmt: skip
    add("--steps", "on all levels", type=positive(int), metavar="N", default=Plan().post.steps)
    add("--seed", "the first", type=int, metavar="N", default=0)
    add("--seeds", "how many", type=positive(int), metavar="N", default=2)
    parser.add_threads()
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    options = parser.parse_args(arguments)
    if len(set(options.lambdas)) < max(3, len(options.lambdas)):
        parser.error("--lambdas should be three or more different ones, for a curve")
    if options.quick:
        options.seeds = 1
    return options


if __name__ == "__main__":
    sys.exit(main())
