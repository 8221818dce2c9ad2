"""Train a codec with any weighting, at one λ after the other; stopped, it goes on exactly.

Each λ leaves a checkpoint in the output folder, where ``python -m examples.lic evaluate`` finds it;
a variable-rate codec leaves one for all. The same command again goes on from the last checkpoint,
or does nothing when all is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from examples.lic import architectures, checkpoint, options, runs
from examples.lic.coding import SUFFIXES
from examples.lic.images import bundled, list_images, read_image
from examples.lic.log import Log, Progress
from examples.lic.losses import WEIGHTINGS, bounded_rate, fixed
from examples.lic.runs import Run
from examples.lic.streams import find_sources
from examples.lic.training import Recipe
from moo_balance.weighting import Weighting

QUICK = {"lambdas": [0.0035, 0.013], "steps": 6, "crop": 64, "batch": 1, "log_every": 3,
         "save_every": 4}  # fmt: skip

HYPER_PARAMETERS = {"lr_weights": "lr", "decay": "decay", "shift": "shift", "momentum": "beta",
                    "projection": "projection", "every": "every"}  # fmt: skip
"""Options, and the fields of the weightings that they set."""

ANY_LAMBDA = 0.013
"""λ of a training with a bound on the rate, which does not depend on it."""

PROJECTIONS = ("softmax", "simplex", "exact")


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    chosen = _parse(arguments)
    plan = _plan(chosen)
    runs.check(plan)  # what is wrong is found now, and not after days of training
    sources, note = find_sources(
        chosen.images, crop=chosen.crop, shrink=sorted(set(chosen.shrink)),
        skip=chosen.skip_unusable, threads=max(1, chosen.workers),
        memory=int(1e9 * chosen.memory),
    )  # fmt: skip
    print(note, flush=True)
    if chosen.val is None:
        held_out = bundled().held_out
    else:
        held_out = {str(path): read_image(path) for path in list_images(chosen.val)}
    for run, path in plan:
        log = Log(path.parent / "logs" / path.stem, every=chosen.log_every, images=held_out,
                  validate_every=chosen.val_every, crop=chosen.crop)  # fmt: skip
        try:
            runs.train(
                run, sources, path, device=chosen.device, workers=chosen.workers,
                save_every=chosen.save_every, nonfinite=chosen.nonfinite,
                observers=[log, Progress(path.stem)],
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"Stopped. {_describe_saved(path)}", file=sys.stderr)
            return 130
        print(f"{path} is complete: {run.recipe.steps} steps.", flush=True)
    return 0


def _describe_saved(path: Path) -> str:
    if not path.exists():
        return f"Nothing is saved in {path}."
    taken = checkpoint.load(path)["taken"]
    return f"{path} has step {taken}, from which the same command goes on."


def _plan(chosen: argparse.Namespace) -> list[tuple[Run, Path]]:
    """The runs and their checkpoints, from the lowest λ up, each starting from the one before."""
    if chosen.amp and chosen.arch.startswith(architectures.PREFIX):
        raise options.OptionError(
            "--amp should be given with a codec of this example, as CompressAI's compute their "
            f"likelihoods in bfloat16 then. Found {chosen.arch}. Leave --amp out."
        )
    recipe = Recipe(chosen.steps, chosen.lr, chosen.clip, chosen.ema, amp=chosen.amp)
    plan: list[tuple[Run, Path]] = []
    for name, levels, weighting in _codecs(chosen):
        start = plan[-1][1] if plan else chosen.start
        if chosen.start is not None and chosen.start.is_dir():
            names = [chosen.start / f"lambda-{levels[-1]!r}{suffix}" for suffix in SUFFIXES]
            start = next(filter(Path.exists, names), names[0])
        data = (chosen.crop, chosen.batch, chosen.seed)
        run = Run(chosen.arch, levels, weighting, recipe, *data, start)
        plan.append((run, chosen.output / f"{name}.pt"))
    return plan


def _codecs(chosen: argparse.Namespace) -> Iterator[tuple[str, tuple[float, ...], Weighting]]:
    """Name, λ and weighting of each codec; names have repr, not :g, so that no two are alike."""
    given = {option: getattr(chosen, option) for option in HYPER_PARAMETERS}
    given = {option: value for option, value in given.items() if value is not None}
    variable = architectures.base_of(chosen.arch) != chosen.arch
    if chosen.target_bpp is not None:
        if variable or (chosen.start is not None and chosen.start.is_dir()):
            raise options.OptionError(
                "--target-bpp should be given with a codec of one rate, and with a file as --from. "
                f"Found {chosen.arch} and {chosen.start}. Leave --target-bpp out, or change these."
            )
        for target in sorted(set(chosen.target_bpp)):
            yield f"bpp-{target!r}", (ANY_LAMBDA,), adjust(bounded_rate(target), given)
        return
    if variable and chosen.weighting == "fixed":
        raise options.OptionError(
            "--weighting fixed should be given with a codec of one rate, whose losses are rate and "
            f"distortion. Found {chosen.arch}. Choose another --weighting."
        )
    weighting = WEIGHTINGS[chosen.weighting]
    if chosen.rate_weight is not None:
        weighting = fixed(chosen.rate_weight)
    weighting, lambdas = adjust(weighting, given), tuple(sorted(set(chosen.lambdas)))
    if variable:
        yield "variable-rate", lambdas, weighting
        return
    for lmbda in lambdas:
        yield f"lambda-{lmbda!r}", (lmbda,), weighting


def adjust(weighting: Weighting, values: dict[str, Any]) -> Weighting:
    """A weighting with other hyper-parameters, by their options; those of one it wraps, too."""
    own = {field.name for field in fields(weighting)}
    inner = getattr(weighting, "weighting", None)
    mine = {HYPER_PARAMETERS[k]: v for k, v in values.items() if HYPER_PARAMETERS[k] in own}
    rest = {k: v for k, v in values.items() if HYPER_PARAMETERS[k] not in own}
    if inner is not None:
        mine["weighting"] = adjust(inner, rest)
    elif rest:
        flag = next(iter(rest)).replace("_", "-")
        raise options.OptionError(
            f"--{flag} should be given with a weighting that has it. Found "
            f"{type(weighting).__name__}. Leave it out, or choose another --weighting."
        )
    return replace(weighting, **mine)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = options.Parser("train", "Train an image codec with any weighting of its losses.")
    add, whole, real = parser.add, options.number(int), options.number(float)
    memory = options.number(float, least=0, below=1e6)
    share, positive = options.number(float, below=1), options.number(float, least=0)
    add("--lambdas", "one λ or several, trained from the lowest", real, options.LAMBDAS, nargs="+")
    add("--arch", f"{architectures.NAMES}, or {architectures.PREFIX}MODEL", default="small")
    add("--from", "checkpoint to start from; a folder has one for each λ", Path, dest="start")
    add("--output", "for checkpoints and logs (runs/lic/ and the weighting)", Path)
    add("--steps", "for each λ", whole, 1500)
    add("--lr", "Adam's learning rate", options.number(float, below=1e6), 1e-3)
    add("--clip", "bound on the gradient's norm, or inf; unit scales it to 1",
        options.gradient_bound, 1.0)  # fmt: skip
    add("--ema", "decay of averaged weights, which are then the ones evaluated", share)
    parser.add_argument("--amp", action="store_true", help="transforms in bfloat16")
    add("--nonfinite", "raise or skip: what to do with steps that are not finite", default="raise",
        choices=("raise", "skip"))  # fmt: skip
    add("--seed", "of weights, crops and noise", options.seed, 0)
    add("--device", "cpu, cuda, ...", options.device, "cpu")
    add("--save-every", "steps between checkpoints", whole, 500)
    add("--log-every", "steps between entries of the log", whole, 50)

    add = parser.group("weighting of the losses")
    add("--weighting", f"one of {', '.join(WEIGHTINGS)}", default="standard", choices=WEIGHTINGS)
    add("--target-bpp", "bounds on the rate of training crops, in place of λ and weighting", real,
        nargs="+")  # fmt: skip
    add("--rate-weight", "of --weighting fixed; the distortion has the rest of 1", share)
    add("--lr-weights", "step of the logits, β of Solution 1", real)
    add("--decay", "of the logits, γ of Solution 1", positive)
    add("--shift", "added to the losses before the logarithm", positive)
    add("--projection", f"of Solution 2: {', '.join(PROJECTIONS)}", choices=PROJECTIONS)
    add("--momentum", "of averaged weights", options.number(float, least=0, below=1))
    add("--every", "new weights each n-th step only", whole)

    add = parser.group("images")
    add("--images", "train on this folder, not on bundled images", Path)
    add("--shrink", "divide their sides by it, which removes traces of JPEG; several: in each size",
        options.number(int, below=10**6), [1], nargs="+")  # fmt: skip
    parser.add_argument("--skip-unusable", action="store_true",
                        help="leave out images that are too small or broken")  # fmt: skip
    add("--batch", "crops in a step", whole, 2)
    add("--crop", "side of the crops, a multiple of 64", options.crop_side, 256)
    add("--workers", "processes that read images ahead", options.number(int, least=0), 0)
    add("--memory", "GB of decoded images to keep", memory, options.MEMORY)
    add("--val", "validate on this folder, not on the bundled images that are held out", Path)
    add("--val-every", "steps between validations", whole, 500)
    chosen = parser.parse(arguments, QUICK)
    if chosen.rate_weight is not None and chosen.weighting != "fixed":
        parser.error("--rate-weight needs --weighting fixed")
    if chosen.images is None and chosen.shrink != [1]:
        parser.error("--shrink needs --images")
    given = {argument.partition("=")[0] for argument in arguments}
    for flag in {"--lambdas", "--weighting"} & given if chosen.target_bpp is not None else ():
        parser.error(f"--target-bpp has a λ and a weighting of its own: leave {flag} out")
    if chosen.output is None:
        folder = chosen.weighting if chosen.target_bpp is None else "target"
        chosen.output = Path("runs/lic", *["quick"] * chosen.quick, folder)
    if any("\ud800" <= letter <= "\udfff" for letter in str(chosen.output)):
        name = ascii(str(chosen.output))
        parser.error(f"--output should be UTF-8, which TensorBoard needs: found {name}")
    return chosen
