"""What a training run reports: TensorBoard, validation, progress, and its whole course."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from examples.lic.losses import RateDistortion
from examples.lic.progress import SECONDS, Meter
from examples.lic.training import FALLS, Observer, Trainer
from examples.lic.validation import validate
from moo_balance import History
from moo_balance.integrations.tensorboard import add_metrics


class Log(Observer):
    """Writes every n-th step to TensorBoard, and validates now and then.

    Args:
        folder: For the event files.
        every: Steps between entries: the step's metrics and the learning rate.
        images: uint8 images ``[3, H, W]`` to validate on; the mean scores are entered as
            ``validation/bpp``, estimated, and ``validation/psnr`` in dB, and printed.
        validate_every: Steps between two validations; there is one at the end, too.
        crop: Side of the crops in training, see :mod:`examples.lic.validation`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        images: Mapping[str, Tensor],
        validate_every: int,
        crop: int,
    ) -> None:
        self._folder, self._every, self._crop = folder, every, crop
        self._images, self._validate_every = images, validate_every

    def begin(self, trainer: Trainer) -> None:
        # The steps of a killed run after its last checkpoint are taken, and entered, again.
        self._writer = SummaryWriter(self._folder, purge_step=trainer.taken + 1)

    def after(self, trainer: Trainer) -> None:
        figures: dict[str, float] = {}
        if trainer.taken % self._every == 0:
            add_metrics(self._writer, trainer.optimizer, trainer.taken, prefix="")
            figures["lr"] = trainer.optimizer.param_groups[0]["lr"]
        if self._images and (trainer.complete or trainer.taken % self._validate_every == 0):
            result = validate(trainer.trained, self._images, self._crop)
            text = f"{self._folder.name}: validation after step {trainer.taken}, {result}"
            print(text, file=sys.stderr, flush=True)
            figures |= {f"validation/{k}": v for k, v in result.score._asdict().items()}
        for name, value in figures.items():
            self._writer.add_scalar(name, value, trainer.taken)

    def end(self, trainer: Trainer) -> None:
        self._writer.close()


class Progress(Observer):
    """Loss, rate and PSNR of the batch: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, *, seconds: float = SECONDS) -> None:
        self._title, self._seconds = title, seconds

    def begin(self, trainer: Trainer) -> None:
        steps = trainer.recipe.steps
        count = trainer.taken
        self._meter = Meter(self._title, steps, "step", count=count, seconds=self._seconds)

    def after(self, trainer: Trainer) -> None:
        self._meter.update(lambda: describe_losses(trainer))

    def end(self, trainer: Trainer) -> None:
        self._meter.close()


def describe_losses(trainer: Trainer) -> str:
    """The losses of the last batch in the units that they are known by, and skipped steps."""
    figures = trainer.optimizer.log_dict(prefix="")
    losses = {k.removeprefix("loss/"): v for k, v in figures.items() if k.startswith("loss/")}
    if isinstance(trainer.objective, RateDistortion):
        rate, distortion = losses["rate"], losses["distortion"]
        mse = max(distortion / trainer.objective.lmbda, 1e-9)
        psnr = 10 * math.log10(255**2 / mse) if math.isfinite(mse) else math.nan
        text = f"loss {rate + distortion:.3g}, {rate:.3f} bpp, {psnr:.2f} dB"
    else:
        text = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
    return f"{text}, {figures['skipped']:.0f} steps skipped" if figures["skipped"] else text


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
