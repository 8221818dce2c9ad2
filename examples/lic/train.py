"""Train a codec with any weighting, at one λ after the other; stopped, it goes on exactly.

Each λ leaves a checkpoint in the output folder, where ``python -m examples.lic evaluate`` finds it;
a variable-rate codec leaves one for all. The same command again goes on from the last checkpoint,
or does nothing when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.lic import architectures, checkpoint, options, runs
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
    sources, note = find_sources(chosen.images, crop=chosen.crop, skip=chosen.skip_unusable)
    print(note)
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
    recipe = Recipe(chosen.steps, chosen.lr, chosen.clip, chosen.ema)
    lambdas = sorted(set(chosen.lambdas))
    variable = architectures.base_of(chosen.arch) != chosen.arch
    plan: list[tuple[Run, Path]] = []
    for levels in [lambdas] if variable else [[lmbda] for lmbda in lambdas]:
        # repr, not :g, so that no two λ share a name.
        path = chosen.output / ("variable-rate.pt" if variable else f"lambda-{levels[0]!r}.pt")
        start = plan[-1][1] if plan else chosen.start
        if chosen.start is not None and chosen.start.is_dir():
            start = chosen.start / f"lambda-{levels[-1]!r}.pt"
        data = (chosen.crop, chosen.batch, chosen.seed)
        plan.append((Run(chosen.arch, tuple(levels), weighting, recipe, *data, start), path))
    return plan


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("train", "Train an image codec with any weighting of its losses.")
    add, whole, real = parser.add, options.number(int), options.number(float)
    share = options.number(float, below=1)
    add("--weighting", f"one of {', '.join(WEIGHTINGS)}", default="standard", choices=WEIGHTINGS)
    add("--rate-weight", "of --weighting fixed; the distortion has the rest of 1", share)
    add("--lambdas", "one λ or several, trained from the lowest", real, options.LAMBDAS, nargs="+")
    add("--arch", f"{architectures.NAMES}, or {architectures.PREFIX}MODEL", default="small")
    add("--from", "checkpoint to start from; a folder has one for each λ", Path, dest="start")
    add("--output", "for checkpoints and logs (runs/lic/ and the weighting)", Path)
    add("--images", "train on this folder, not on bundled images", Path)
    add("--eval-images", "score these whenever a checkpoint is saved", Path)
    add("--steps", "for each λ", whole, 1500)
    add("--lr", "Adam's learning rate", real, 1e-3)
    add("--clip", "bound on the gradient's norm, or inf; unit scales it to 1",
        options.gradient_bound, 1.0)  # fmt: skip
    add("--ema", "decay of averaged weights, which are then the ones evaluated", share)
    add("--batch", "crops in a step", whole, 2)
    add("--crop", "side of the crops, a multiple of 64", options.crop_side, 128)
    add("--workers", "processes that read images ahead", options.number(int, above=-1), 0)
    add("--save-every", "steps between checkpoints", whole, 500)
    add("--log-every", "steps between entries of the log", whole, 50)
    add("--seed", "of weights, crops and noise", int, 0)
    add("--device", "cpu, cuda, ...", options.device, "cpu")
    parser.add_argument("--skip-unusable", action="store_true",
                        help="leave out images that are too small or broken")  # fmt: skip
    chosen = parser.parse(arguments, QUICK)
    if chosen.rate_weight is not None and chosen.weighting != "fixed":
        parser.error("--rate-weight needs --weighting fixed")
    if chosen.output is None:
        chosen.output = Path("runs/lic", *["quick"] * chosen.quick, chosen.weighting)
    return chosen
