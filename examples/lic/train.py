r"""Train a codec with any weighting, at one λ after the other; stopped, it goes on exactly.

::

    python -m examples.lic train --weighting solution1                    # bundled photographs
    python -m examples.lic train --images coco/train2017 --arch full --crop 256 --batch 16 \
        --steps 550000 --lr 1e-4 --workers 8 --device cuda
    python -m examples.lic train --arch variable-rate:small --weighting mgda \
        --lambdas 0.0035 0.013 0.05 --from runs/lic/standard/lambda-0.05.pt

Each λ leaves a checkpoint in the output folder, where ``python -m examples.lic evaluate`` finds it;
a variable-rate codec leaves one for all. The same command again goes on from the last checkpoint,
or does nothing when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.lic import architectures, checkpoint, options, runs
from examples.lic.compressai_adapter import PREFIX
from examples.lic.images import list_images, read_image
from examples.lic.log import Log, Progress
from examples.lic.losses import WEIGHTINGS, fixed
from examples.lic.runs import Run
from examples.lic.streams import find_sources
from examples.lic.training import Recipe

QUICK = {"lambdas": [0.0035, 0.013], "steps": 6, "crop": 64, "batch": 1, "log_every": 3,
         "save_every": 4}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    chosen = _parse(arguments)
    plan = _plan(chosen)
    paths = [path for _, path in plan]
    for run, _ in plan:  # what is missing is found now, and not after days of training
        model = architectures.build(run.arch)
        if run.start is not None and run.start not in paths:
            checkpoint.load_start(model, run.start, run.arch)
    sources, notes = find_sources(chosen.images, crop=chosen.crop, skip=chosen.skip_unusable)
    print(*notes, sep="\n")
    held_out = {}
    if chosen.eval_images is not None:
        held_out = {str(path): read_image(path) for path in list_images(chosen.eval_images)}
    for run, path in plan:
        log = Log(path.parent / "logs" / path.stem, every=chosen.log_every, held_out=held_out,
                  validate_every=chosen.save_every)  # fmt: skip
        try:
            runs.train(
                run, sources, path, device=chosen.device, workers=chosen.workers,
                save_every=chosen.save_every, observers=[log, Progress(path.stem)],
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"Stopped; {path} is saved, and the same command goes on from there.")
            return 130
        print(f"{path} is complete: {run.recipe.steps} steps.", flush=True)
    return 0


def _plan(chosen: argparse.Namespace) -> list[tuple[Run, Path]]:
    """The runs and their checkpoints, from the lowest λ up, each starting from the one before."""
    weighting = WEIGHTINGS[chosen.weighting]
    if chosen.rate_weight is not None:
        weighting = fixed(chosen.rate_weight)
    lambdas = sorted(set(chosen.lambdas))
    variable = architectures.base_of(chosen.arch) != chosen.arch
    plan: list[tuple[Run, Path]] = []
    for levels in [lambdas] if variable else [[lmbda] for lmbda in lambdas]:
        # repr, not :g, so that no two λ share a name.
        path = chosen.output / ("variable-rate.pt" if variable else f"lambda-{levels[0]!r}.pt")
        start = plan[-1][1] if plan else chosen.start
        if chosen.start is not None and chosen.start.is_dir():
            start = chosen.start / f"lambda-{levels[-1]!r}.pt"
        recipe = Recipe(chosen.steps, chosen.lr, chosen.clip, chosen.ema)
        run = Run(chosen.arch, tuple(levels), weighting, recipe, chosen.crop, chosen.batch,
                  chosen.seed, start, chosen.one_level)  # fmt: skip
        plan.append((run, path))
    return plan


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("train", "Train an image codec with any weighting of its losses.")
    add = parser.add
    whole, real = options.positive(int), options.positive(float)
    add("--weighting", f"of the losses: {', '.join(WEIGHTINGS)}", choices=WEIGHTINGS,
        metavar="NAME", default="standard")  # fmt: skip
    add("--rate-weight", "of --weighting fixed; the distortion has the rest of 1", metavar="W",
        type=options.between_0_and_1)  # fmt: skip
    add("--lambdas", "one λ or several, trained from the lowest", type=real, nargs="+",
        metavar="λ", default=[0.0035, 0.013, 0.05])  # fmt: skip
    add("--arch", f"{architectures.NAMES}, or {PREFIX}MODEL", metavar="NAME", default="small")
    add("--from", "checkpoint to start from; a folder has one for each λ", type=Path, dest="start",
        metavar="PATH")  # fmt: skip
    add("--output", "for checkpoints and logs (runs/lic/ and the weighting)", type=Path,
        metavar="DIR")  # fmt: skip
    add("--images", "train on this folder, not on bundled images", type=Path, metavar="DIR")
    add("--eval-images", "score these whenever a checkpoint is saved", type=Path, metavar="DIR")
    add("--steps", "for each λ", type=whole, metavar="N", default=1500)
    add("--lr", "Adam's learning rate", type=real, metavar="X", default=1e-3)
    add("--clip", "bound on the gradient's norm; inf for none; unit scales the norm to 1",
        type=options.gradient_bound, metavar="X", default=1.0)  # fmt: skip
    add("--ema", "decay of averaged weights, such as 0.999, which are then the ones evaluated",
        type=options.between_0_and_1, metavar="X")  # fmt: skip
    add("--batch", "crops in a step", type=whole, metavar="N", default=2)
    add("--crop", "side of the crops, a multiple of 64", type=options.crop_side, metavar="N",
        default=128)  # fmt: skip
    add("--workers", "processes that read images ahead", type=int, metavar="N", default=0)
    add("--save-every", "steps between checkpoints", type=whole, metavar="N", default=500)
    add("--log-every", "steps between entries of the log", type=whole, metavar="N", default=50)
    add("--seed", "of weights, crops and noise", type=int, metavar="N", default=0)
    add("--device", "cpu, cuda, ...", type=options.device, metavar="NAME", default="cpu")
    parser.add_argument("--one-level", action="store_true",
                        help="a random λ in each step of a variable-rate codec")  # fmt: skip
    parser.add_argument("--skip-unusable", action="store_true",
                        help="leave out images that are too small or broken")  # fmt: skip
    chosen = parser.parse(arguments, QUICK)
    if chosen.rate_weight is not None and chosen.weighting != "fixed":
        parser.error("--rate-weight needs --weighting fixed")
    if chosen.workers < 0:
        parser.error(f"argument --workers: should not be negative, found {chosen.workers}")
    if chosen.output is None:
        chosen.output = Path("runs/lic", *["quick"] * chosen.quick, chosen.weighting)
    return chosen
