"""One λ of a ladder: where it starts, what it saves, and how it goes on after it was stopped."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.lic import architectures, checkpoint
from examples.lic.checkpoint import CheckpointError
from examples.lic.images import ImageError
from examples.lic.log import Log
from examples.lic.parallel import World
from examples.lic.session import Observer, Recipe, Session
from examples.lic.streams import Crops, CropStream
from moo_balance.weighting import Weighting


def file_name(lmbda: float) -> str:
    """What the checkpoint of a λ is called."""
    return f"lambda-{lmbda:g}.pt"


@dataclass(frozen=True)
class Rung:
    """A training run and its checkpoint.

    Args:
        path: Of the checkpoint, from which the run goes on if it is there.
        arch: Name of the codec.
        lmbda: The price of distortion.
        weighting: Of the two losses.
        recipe: Steps, learning rate, and so on.
        crops: What is trained on.
        start: Checkpoint whose weights the run starts from; fresh ones without it.
        batch: Crops in a step of one process.
        workers: Processes that read ahead.
        seed: Of fresh weights and of noise.
        save_every: Steps between checkpoints.
        log_every: Steps between entries of the log.
    """

    path: Path
    arch: str
    lmbda: float
    weighting: Weighting
    recipe: Recipe
    crops: Crops
    start: Path | None = None
    batch: int = 2
    workers: int = 0
    seed: int = 0
    save_every: int = 500
    log_every: int = 50

    def train(self, world: World) -> None:
        """Start, go on, or find that all is done.

        Raises:
            CheckpointError: A checkpoint does not fit, or the last one could not be saved.
            ImageError: An image cannot be read. A single process has saved what it trained so
                far.
        """
        run = Run(self, world)
        run.resume()
        if run.session.taken == self.recipe.steps:
            world.say(f"{self.path} is complete: {self.recipe.steps} steps.")
            return
        with ExitStack() as stack:
            observers: list[Observer] = [_Saver(run)]
            if world.first:
                folder = self.path.parent / "logs" / self.path.stem
                log = Log(folder, every=self.log_every, first=run.session.taken + 1)
                observers += [stack.enter_context(closing(log)), _Progress(stack, run)]
            try:
                run.session.run(run.stream, observers)
            except ImageError:
                if world.size == 1:  # several would have to agree on the step
                    run.save()
                raise
        run.save()
        world.say(f"{self.path}: {self.recipe.steps} steps.")

    def settings(self, world: World) -> dict[str, Any]:
        """What a run depends on, and a resumed one has to share."""
        return {
            "architecture": self.arch,
            "λ": self.lmbda,
            "weighting": repr(self.weighting),
            **asdict(self.recipe),
            "crop": self.crops.side,
            "batch": self.batch,
            "seed": self.seed,
            "processes": world.size,
        }


class Run:
    """A rung under way in one process: the session, its crops, and how both are saved."""

    def __init__(self, rung: Rung, world: World) -> None:
        self.rung, self.world = rung, world
        torch.manual_seed(rung.seed)
        model = architectures.build(rung.arch)
        if rung.start is not None and not rung.path.exists():
            checkpoint.load_weights(model, rung.start, rung.arch)
        self.session = Session(
            model.to(world.device), rung.weighting, rung.recipe, lmbda=rung.lmbda, seed=rung.seed
        )
        self.stream = CropStream(
            rung.crops, batch=rung.batch, workers=rung.workers, rank=world.rank, world=world.size
        )

    def save(self) -> None:
        """Save what all processes need to go on from here; each has to call this."""
        state = self.session.state_dict()
        random = self.world.gather(state.pop("random"))
        if self.world.first:
            content = {
                "arch": self.rung.arch,
                "lmbda": self.rung.lmbda,
                "settings": self.rung.settings(self.world),
                "images": self.rung.crops.identity,
                "crops": self.stream.state_dict(),
                "random": random,
                **state,
            }
            checkpoint.save(self.rung.path, content)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            CheckpointError: It was made with other options.
        """
        path = self.rung.path
        if not path.exists():
            return
        content = checkpoint.load(path)
        _check_settings(path, content["settings"], self.rung.settings(self.world))
        random = content["random"][self.world.rank]
        self.session.load_state_dict({**content, "random": random})
        self.stream.load_state_dict(content["crops"])
        if self.session.taken < self.rung.recipe.steps:
            self.world.say(f"{path}: goes on from step {self.session.taken}.")
        if content["images"] != self.rung.crops.identity:
            self.world.say(f"{path}: the images are not those that it was trained on so far.")


def _check_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in now if saved.get(key) != now[key]]
    if differing:
        was, found = ({key: s.get(key) for key in differing} for s in (saved, now))
        raise CheckpointError(
            f"{path} can go on with the options it was started with alone, {_listed(was)}. Found "
            f"{_listed(found)}. Give those, or choose another --output."
        )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


class _Saver(Observer):
    """Saves now and then. A full disk does not end a run that may find room the next time."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def after(self, session: Session) -> None:
        rung = self._run.rung
        if session.taken % rung.save_every or session.taken == session.recipe.steps:
            return
        try:
            self._run.save()
        except CheckpointError as error:
            print(f"warning: {error} Training goes on; the next attempt is "
                  f"{rung.save_every} steps away.", file=sys.stderr)  # fmt: skip


class _Progress(Observer):
    """A bar on a terminal, and nothing in a file."""

    def __init__(self, stack: ExitStack, run: Run) -> None:
        bar = tqdm(
            total=run.rung.recipe.steps, initial=run.session.taken, unit="step", disable=None,
            mininterval=0.5, desc=f"λ {run.rung.lmbda:g}",
        )  # fmt: skip
        self._bar = stack.enter_context(bar)

    def after(self, session: Session) -> None:
        self._bar.update()
