r"""Train a codec with any weighting, up a ladder of λ; stopped at any moment, it goes on exactly.

::

    python -m examples.lic.train --weighting solution1                    # bundled photographs
    python -m examples.lic.train --images coco/train2017 --arch full --crop 256 --batch 32 \
        --steps 550000 --lr 1e-4 --schedule plateau --workers 8 --device cuda
    torchrun --nproc-per-node 4 -m examples.lic.train --images coco/train2017 ...

Each λ leaves a checkpoint in the output folder, where ``python -m examples.lic.evaluate`` finds it.
The same command again goes on from the last checkpoint, or does nothing when all is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from examples.lic import images, ladder, options, parallel
from examples.lic.architectures import OWN
from examples.lic.checkpoint import CheckpointError
from examples.lic.compressai_codecs import PREFIX, ArchitectureError
from examples.lic.ladder import Rung
from examples.lic.schedules import Milestones, Plateau
from examples.lic.session import Recipe
from examples.lic.streams import Crops, bundled_crops, folder_crops
from examples.lic.weightings import WEIGHTINGS, fixed
from moo_balance import BalanceError
from moo_balance.weighting import Weighting

QUICK = {"lambdas": [0.0035, 0.013], "steps": 6, "first_steps": 6, "crop": 64, "batch": 1,
         "log_every": 3, "save_every": 4}  # fmt: skip

SHARED = ("batch", "workers", "seed", "save_every", "log_every")
"""Options that a rung takes as they are."""

FAULTS = (images.ImageError, CheckpointError, ArchitectureError, BalanceError, OSError)
"""What ends a run with a sentence: everything else is a fault of this program."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    chosen = _parse(arguments)
    torch.set_num_threads(chosen.threads)
    with closing(parallel.join(chosen.device)) as world:
        try:
            crops, notes = _crops(chosen)
            world.say(*notes)
            for rung in _plan(chosen, crops):
                rung.train(world)
        except FAULTS as error:
            print(f"error: {options.sentence(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            world.say("Stopped. The same command goes on from the last checkpoint.")
            return 130
    return 0


def _crops(chosen: argparse.Namespace) -> tuple[Crops, list[str]]:
    if chosen.images is None:
        return bundled_crops(crop=chosen.crop, seed=chosen.seed)
    return folder_crops(
        chosen.images, crop=chosen.crop, seed=chosen.seed, skip=chosen.skip_unusable
    )


def _plan(chosen: argparse.Namespace, crops: Crops) -> list[Rung]:
    """The rungs from the lowest λ upwards, each of which starts where the one before ended."""
    rungs: list[Rung] = []
    for lmbda in sorted(set(chosen.lambdas)):
        path = chosen.output / ladder.file_name(lmbda)
        start, steps = chosen.start, chosen.first_steps or chosen.steps
        if rungs:
            start, steps = rungs[-1].path, chosen.steps
        if chosen.start is not None and chosen.start.is_dir():
            start = chosen.start / path.name
        rung = Rung(path, chosen.arch, lmbda, _weighting(chosen), _recipe(chosen, steps), crops)
        shared = {name: getattr(chosen, name) for name in SHARED}
        rungs.append(replace(rung, start=start, **shared))
    return rungs


def _weighting(chosen: argparse.Namespace) -> Weighting:
    return WEIGHTINGS[chosen.weighting] if chosen.rate_weight is None else fixed(chosen.rate_weight)


def _recipe(chosen: argparse.Namespace, steps: int) -> Recipe:
    schedules = {"milestones": Milestones(), "plateau": Plateau(chosen.epoch, chosen.patience)}
    return Recipe(steps, chosen.lr, schedules[chosen.schedule], chosen.clip, chosen.ema)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = options.Parser(
        prog="python -m examples.lic.train",
        description="Train an image codec with any weighting of rate against distortion.",
    )
    add = parser.add
    whole, real = options.positive(int), options.positive(float)
    add("--weighting", f"of rate against distortion: {', '.join(WEIGHTINGS)}", choices=WEIGHTINGS,
        metavar="NAME", default="standard")  # fmt: skip
    add("--rate-weight", "of --weighting fixed; the distortion has the rest of 1", metavar="W",
        type=options.between_0_and_1)  # fmt: skip
    add("--lambdas", "one λ, or a ladder climbed from the lowest", type=real, nargs="+",
        metavar="λ", default=[0.0035, 0.013, 0.05])  # fmt: skip
    add("--lmbda", "the same, for one λ", type=real, nargs=1, metavar="λ", dest="lambdas")
    add("--arch", f"{', '.join(OWN)}, or {PREFIX}MODEL", metavar="NAME", default="small")
    add("--from", "checkpoint to start from; a folder has one for each λ", type=Path, dest="start",
        metavar="PATH")  # fmt: skip
    add("--output", "for checkpoints and logs (runs/lic/ and the weighting)", type=Path,
        metavar="DIR")  # fmt: skip
    add("--images", "train on this folder, not on bundled images", type=Path, metavar="DIR")
    add("--steps", "on each rung", type=whole, metavar="N", default=1500)
    add("--first-steps", "on the lowest rung, if not as many", type=whole, metavar="N")
    add("--lr", "Adam's learning rate", type=real, metavar="X", default=1e-3)
    add("--schedule", "how it falls", choices=("milestones", "plateau"), default="milestones")
    add("--epoch", "steps between two looks at a plateau", type=whole, metavar="N", default=500)
    add("--patience", "looks without gain before it falls", type=whole, metavar="N", default=10)
    add("--clip", "bound on the gradient's norm, inf for none; if not given, the norm is made 1",
        type=float, metavar="X")  # fmt: skip
    add("--ema", "decay of averaged weights, such as 0.999, which are then the ones evaluated",
        type=options.between_0_and_1, metavar="X")  # fmt: skip
    add("--batch", "crops in a step of one process", type=whole, metavar="N", default=2)
    add("--crop", "side of the crops, a multiple of 64", type=options.crop_side, metavar="N",
        default=128)  # fmt: skip
    add("--workers", "processes that read images ahead", type=int, metavar="N", default=0)
    add("--save-every", "steps between checkpoints", type=whole, metavar="N", default=500)
    add("--log-every", "steps between entries of the log", type=whole, metavar="N", default=50)
    add("--seed", "of weights, crops and noise", type=int, metavar="N", default=0)
    add("--device", "cpu, cuda, ...", type=options.device, metavar="NAME", default="cpu")
    parser.add_threads()
    parser.add_argument(
        "--skip-unusable",
        action="store_true",
        help="leave out images that are too small or broken, and say how many",
    )
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    chosen = parser.parse_args(arguments)
    if chosen.rate_weight is not None and chosen.weighting != "fixed":
        parser.error("--rate-weight needs --weighting fixed")
    if chosen.clip is not None and not chosen.clip > 0:
        parser.error(f"argument --clip: should be positive, found {chosen.clip:g}")
    if chosen.workers < 0:
        parser.error(f"argument --workers: should not be negative, found {chosen.workers}")
    if chosen.output is None:
        chosen.output = Path("runs/lic") / chosen.weighting
    if chosen.quick:
        vars(chosen).update(QUICK)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
