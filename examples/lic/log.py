"""What a training run reports: TensorBoard, held-out images, progress, and its whole course."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from examples.lic.evaluation import Score, evaluate, mean_score
from examples.lic.training import FALLS, Observer, Trainer
from examples.lic.variable_rate import VariableRateCodec
from moo_balance import History
from moo_balance.integrations.tensorboard import add_metrics


class Log(Observer):
    """Writes every n-th step to TensorBoard.

    Args:
        folder: For the event files.
        every: Steps between entries: the step's metrics and the learning rate.
        held_out: uint8 images ``[3, H, W]`` that are scored (at the highest λ of a variable-rate
            codec) as ``held out/bpp``, estimated, and ``held out/psnr`` in dB.
        validate_every: Steps between two validations; there is one at the end, too.
    """

    def __init__(
        self, folder: Path, *, every: int, held_out: Mapping[str, Tensor], validate_every: int
    ) -> None:
        self._folder, self._every = folder, every
        self._held_out, self._validate_every = held_out, validate_every

    def begin(self, trainer: Trainer) -> None:
        # The steps of a killed run after its last checkpoint are taken, and entered, again.
        self._writer = SummaryWriter(self._folder, purge_step=trainer.taken + 1)

    def after(self, trainer: Trainer) -> None:
        figures: dict[str, float] = {}
        if trainer.taken % self._every == 0:
            add_metrics(self._writer, trainer.optimizer, trainer.taken, prefix="")
            figures["lr"] = trainer.optimizer.param_groups[0]["lr"]
        if self._held_out and (trainer.complete or trainer.taken % self._validate_every == 0):
            score = _validate(trainer.model, self._held_out)
            figures |= {"held out/bpp": score.bpp, "held out/psnr": score.psnr}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, trainer.taken)

    def end(self, trainer: Trainer) -> None:
        self._writer.close()


def _validate(model: nn.Module, images: Mapping[str, Tensor]) -> Score:
    codec = model.at(model.highest.item()) if isinstance(model, VariableRateCodec) else model
    return mean_score(evaluate(codec, images))


class Progress(Observer):
    """A bar with the losses on a terminal; elsewhere a line of it every `seconds`."""

    def __init__(self, title: str, *, seconds: float = 30.0) -> None:
        self._title, self._seconds = title, seconds

    def begin(self, trainer: Trainer) -> None:
        self._bar = tqdm(
            total=trainer.recipe.steps, initial=trainer.taken, desc=self._title, miniters=1,
            mininterval=1.0 if sys.stderr.isatty() else self._seconds,
        )  # fmt: skip

    def after(self, trainer: Trainer) -> None:
        if self._bar.update():  # it was drawn
            losses = trainer.optimizer.metrics.losses.items()
            text = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses)
            self._bar.set_postfix_str(text, refresh=False)

    def end(self, trainer: Trainer) -> None:
        self._bar.close()


class Recorder(Observer):
    """Keeps the metrics and the time of every step."""

    def __init__(self) -> None:
        self.history = History()
        self.seconds: list[float] = []
        """From step to step."""

    def begin(self, trainer: Trainer) -> None:
        self._last = time.perf_counter()

    def after(self, trainer: Trainer) -> None:
        self.history.append(trainer.optimizer.metrics)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    @property
    def milliseconds(self) -> float:
        """Median time of a step."""
        return 1e3 * median(self.seconds)

    def last(self, kind: str) -> dict[str, float]:
        """The last ``"loss"``, ``"weight"`` or ``"coefficient"`` of each loss, by its name."""
        return {name: values[-1] for name, values in self._series(kind).items()}

    def late_mean(self, kind: str) -> dict[str, float]:
        """The same as a mean over the steps after the learning rate has first fallen."""
        first = int(FALLS[0] * len(self.history))
        return {name: fmean(values[first:]) for name, values in self._series(kind).items()}

    def _series(self, kind: str) -> dict[str, list[float]]:
        prefix = f"{kind}/"
        keys = [key for key in self.history.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {key.removeprefix(prefix): self.history.series(key)[1] for key in keys}
