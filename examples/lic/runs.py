"""A training run as a value, and what carries it out into a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from examples.lic import architectures, checkpoint
from examples.lic.bitstream import fingerprint
from examples.lic.checkpoint import CheckpointError
from examples.lic.images import ImageError
from examples.lic.losses import Levels, Objective, RateDistortion
from examples.lic.streams import Crops, CropStream, Sources
from examples.lic.training import Observer, Recipe, Trainer, stop_on_signals
from examples.lic.variable_rate import VariableRateCodec
from moo_balance import Lagrangian, NonFiniteError
from moo_balance.weighting import Weighting


class TrainingError(Exception):
    """A run that cannot go on; the message says at which step, why, and what to do."""


@dataclass(frozen=True)
class Run:
    """All that a training run depends on, besides its images.

    Runs with equal seeds see equal crops and noise, and without `start` they begin with equal
    weights. A run with a `start` sees other crops than its start did.

    Args:
        arch: Name of the codec, see ``architectures.py``.
        lambdas: λ, positive, in rising order: one for a fixed-rate codec, whose losses are rate
            and distortion; any number for a variable-rate one, with R + λD for each.
        weighting: Of these losses.
        recipe: Steps, learning rate, and so on.
        crop: Side of the crops in pixels, a multiple of the codec's stride.
        batch: Crops in a step.
        seed: Of fresh weights, crops and noise.
        start: Checkpoint whose trained weights it starts from; or a run, which is trained first.
        one_level: A random λ in each step of a variable-rate codec, instead of all.
    """

    arch: str
    lambdas: tuple[float, ...]
    weighting: Weighting
    recipe: Recipe
    crop: int = 256
    batch: int = 2
    seed: int = 0
    start: Run | Path | None = None
    one_level: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The run in types that JSON has, a start that is a run inside it."""
        start = (
            self.start.as_dict() if isinstance(self.start, Run) else self.start and str(self.start)
        )
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {"weighting": repr(self.weighting), "start": start, **asdict(self.recipe)}
        del content["recipe"]
        return json.loads(json.dumps(content))  # tuples become lists, as in a saved run

    def file_name(self) -> str:
        """A name for its checkpoint, which differs between any two runs."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()
        words = "-".join([self.arch, *(f"{lmbda:g}" for lmbda in self.lambdas)])
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:48]}-{digest[:12]}.pt"

    @property
    def stream(self) -> int:
        """Seed of crops and noise."""
        depth, start = 0, self.start
        while start is not None:
            depth, start = depth + 1, start.start if isinstance(start, Run) else None
        return 1000 * self.seed + depth

    def objective(self, model: nn.Module) -> Objective:
        """The codec with its losses."""
        if isinstance(model, VariableRateCodec):
            return Levels(model, self.lambdas, one_level=self.one_level, seed=self.stream)
        (lmbda,) = self.lambdas
        return RateDistortion(model, lmbda, rounded=isinstance(self.weighting, Lagrangian))


def check(plan: Sequence[tuple[Run, Path]]) -> None:
    """Find what would stop one of these runs later: to be called before the first is trained.

    Args:
        plan: Runs and their checkpoints, in order. A run may start from the checkpoint of one
            before it, whose weights are not known yet.

    Raises:
        ArchitectureError: A codec cannot be built.
        BalanceError: A weighting does not fit the losses of its run.
        CheckpointError: A start is missing or of another codec, or a checkpoint is there already
            and belongs to a run with other settings, or with another start than it would have now.
    """
    complete: dict[Path, bool] = {}
    for run, path in plan:
        known = isinstance(run.start, Path) and complete.get(run.start, True)
        # A start that is still to be trained stays a path in the settings: none is saved as one.
        model, settings = _build(run, run.start if known else None, resuming=False)
        Trainer(run.objective(model), run.weighting, run.recipe, seed=run.stream)
        taken = 0
        if path.exists():
            content = checkpoint.load(path)
            _check_settings(path, content["run"], settings)
            taken = content["taken"]
        complete[path] = taken >= run.recipe.steps


def train(
    run: Run,
    sources: Sources,
    path: Path,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    save_every: int = 500,
    nonfinite: Literal["raise", "skip"] = "raise",
    observers: Sequence[Observer] = (),
) -> None:
    """Carry out `run` into the checkpoint at `path`, or what of it is not done yet.

    A stopped run goes on to the same bits as one that never stopped (on a GPU as far as its
    kernels repeat themselves). SIGINT and SIGTERM end it after the step under way, saved; a second
    one ends it at once.

    Args:
        run: What to train.
        sources: The images to train on.
        path: Of the checkpoint. A start that is a run has its own in the same folder, called
            :meth:`Run.file_name`.
        device: To train on.
        workers: Processes that read images ahead.
        save_every: Steps between checkpoints.
        nonfinite: ``"skip"`` leaves out steps whose losses or gradients are not finite. It is no
            part of the run, so one that such a step has ended can go on with it.
        observers: Of this run, and not of its start.

    Raises:
        CheckpointError: A checkpoint does not fit, or cannot be saved.
        ImageError: An image cannot be read. The state before is saved.
        TrainingError: A loss or a gradient is not finite, or the weights are not, which are not
            saved.
        KeyboardInterrupt: After a signal.
    """
    start = run.start
    if isinstance(start, Run):
        start = path.parent / start.file_name()
        if not path.exists():
            options = {"device": device, "workers": workers, "save_every": save_every}
            train(run.start, sources, start, nonfinite=nonfinite, **options)
    resuming = path.exists()
    model, settings = _build(run, start, resuming=resuming)
    objective = run.objective(model.to(device))
    trainer = Trainer(objective, run.weighting, run.recipe, seed=run.stream, nonfinite=nonfinite)
    crops = Crops(sources, crop=run.crop, seed=run.stream)
    stream = CropStream(crops, batch=run.batch, workers=workers)

    lambdas = run.lambdas

    def save() -> None:
        _check_weights(trainer, path)
        about = {"run": settings, "images": crops.identity, "crops": stream.state_dict()}
        if isinstance(run.weighting, Lagrangian):
            about["lambdas"] = list(_bounded_lambdas(run, trainer) or lambdas)
        checkpoint.save(path, {**about, **trainer.state_dict()})

    if resuming:
        content = checkpoint.load(path)
        _check_settings(path, content["run"], settings)
        _restore(path, content, trainer, stream)
        lambdas = content.get("lambdas", lambdas)
        if content.get("images") != crops.identity:
            _report_other_images(path, complete=trainer.complete)
        if trainer.complete:
            return
        print(f"{path}: goes on from step {trainer.taken}.")
    try:
        with stop_on_signals(trainer):
            try:
                trainer.run(stream, [_Saver(save, save_every), *observers])
            except ImageError:
                save()
                raise
            save()
    except NonFiniteError as error:
        raise _nonfinite_error(trainer.taken, path, nonfinite) from error
    if trainer.stop:
        raise KeyboardInterrupt


def _restore(path: Path, content: dict[str, Any], trainer: Trainer, stream: CropStream) -> None:
    try:
        trainer.load_state_dict(content)
        stream.load_state_dict(content["crops"])
    except Exception as error:  # parts that are missing or damaged lead to errors of any kind
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} should hold the whole state of a run. Found a part that cannot be loaded "
            f"({reason}). Choose another --output, or remove it."
        ) from error


def _bounded_lambdas(run: Run, trainer: Trainer) -> tuple[float, ...] | None:
    """The λ that the multiplier of a bound on the rate amounted to in the last step.

    That of the run where the bound was not active; None if the step was skipped, or there is none.
    """
    figures = trainer.optimizer.metrics.as_floats()
    rate, distortion = (figures.get(f"coefficient/{name}") for name in RateDistortion.names)
    if rate == 0:
        return run.lambdas
    if not rate or not distortion or not math.isfinite(distortion / rate):
        return None
    return (float(f"{run.lambdas[0] * distortion / rate:.4g}"),)


def _check_weights(trainer: Trainer, path: Path) -> None:
    parameters = [*trainer.model.parameters(), *trainer.trained.parameters()]
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise TrainingError(
            f"The weights after step {trainer.taken} for {path} should be finite. Found NaN or "
            "infinity, which is not saved. Train anew with a lower learning rate. "
            f"{_describe_saved(path)}"
        )


def _describe_saved(path: Path) -> str:
    return f"{path} is there from an earlier step." if path.exists() else "Nothing is saved."


def _nonfinite_error(taken: int, path: Path, nonfinite: str) -> TrainingError:
    if nonfinite == "skip":
        advice = "Too many steps in a row are not: train anew with a lower learning rate."
    else:
        advice = "--nonfinite skip leaves such steps out; a lower learning rate may avoid them."
    return TrainingError(
        f"The losses and gradients of step {taken + 1} for {path} should be finite. Found NaN or "
        f"infinity. {advice} {_describe_saved(path)}"
    )


def _build(run: Run, start: Path | None, *, resuming: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The codec that a run begins with, and the settings that its checkpoint keeps."""
    torch.manual_seed(run.seed)
    model, settings = architectures.build(run.arch, highest=run.lambdas[-1]), run.as_dict()
    if start is None:
        return model, settings
    if isinstance(run.start, Path):
        checkpoint.load_start(model, start, run.arch)
        # The weights and not the name: a file may be moved, and must not be another.
        settings["start"] = f"{fingerprint(model):08x}"
    elif not resuming:
        checkpoint.load_start(model, start, run.arch)
    return model, settings


def _check_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if differing := [key for key, value in now.items() if saved.get(key) != value]:
        was, given = (", ".join(f"{k} {s.get(k)}" for k in differing) for s in (saved, now))
        raise CheckpointError(
            f"{path} should go on with the options it was started with: {was}. Found {given}. "
            "Give those, or choose another --output."
        )


def _report_other_images(path: Path, *, complete: bool) -> None:
    if not complete:  # such as without one that has broken: not worth the training so far
        print(f"{path}: the images are not those that it was trained on so far.")
        return
    raise CheckpointError(
        f"{path} should have been trained on the images given. Found that it is complete, on "
        "others. Give those, or choose another --output."
    )


@dataclass(frozen=True)
class _Saver(Observer):
    """Saves now and then."""

    save: Callable[[], None]
    every: int

    def after(self, trainer: Trainer) -> None:
        if trainer.taken % self.every == 0 and not trainer.complete:
            self.save()
