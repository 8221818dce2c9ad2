"""What the recipes on Lightning share: a callback that records, and step times by the Trainer."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback

from examples.recipes import common
from moo_balance import BalancedOptimizer, History

# Arguments of a Trainer that prints and writes nothing.
QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


class Recorder(Callback):
    """The losses and coefficients of a run, and how long its steps took."""

    def __init__(self) -> None:
        self.history, self.times = History(), []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        self.times.append(time.perf_counter() - self.start)
        if isinstance(trainer.optimizers[0], BalancedOptimizer):
            self.history.append(trainer.optimizers[0].metrics)


def silence() -> None:
    """No messages on devices, data loaders, and deprecations within Lightning."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def step_times_of_runs(runs: Mapping[str, Callable[[], Recorder]], rounds: int) -> dict[str, float]:
    """Median step time of each run, divided by that of the first; short runs take turns.

    The first three steps of each run are left out.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name] += run().times[3:]
    return common.relative_medians(times, next(iter(runs)))
