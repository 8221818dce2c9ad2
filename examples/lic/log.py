"""TensorBoard: losses, weights, coefficients, and what the steps did to the losses."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from examples.lic.diagnostics import Probe
from examples.lic.session import Observer, Session
from moo_balance.integrations.tensorboard import add_metrics


class Log(Observer):
    """Writes every n-th step down. A full disk ends the log, and not the training.

    Args:
        folder: For the event files.
        every: Steps between entries.
        first: The step to come. Entries from there on, of a run that was killed after its last
            checkpoint, are struck out: these steps are taken again.
    """

    def __init__(self, folder: Path, *, every: int, first: int) -> None:
        self._folder, self._probe = folder, Probe(every)
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=first)
        self._hook, threading.excepthook = threading.excepthook, self._quiet

    def before(self, session: Session, images: Tensor) -> None:
        self._probe.before(session, images)

    def after(self, session: Session) -> None:
        self._probe.after(session)
        if session.taken % self._probe.every == 0:
            self._write(partial(self._add, session))

    def close(self) -> None:
        """Write what is left."""
        self._write(SummaryWriter.close)
        threading.excepthook = self._hook

    def _add(self, session: Session, writer: SummaryWriter) -> None:
        add_metrics(writer, session.optimizer, session.taken, prefix="")
        figures = {**self._probe.figures, "lr": session.optimizer.param_groups[0]["lr"]}
        for name, value in figures.items():
            writer.add_scalar(f"step/{name}", value, session.taken)

    def _write(self, action: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            print(f"warning: The log in {self._folder} cannot be written ({error.strerror}). "
                  "Training goes on without it.", file=sys.stderr)  # fmt: skip
            self._writer = None

    def _quiet(self, fault: threading.ExceptHookArgs) -> None:
        """TensorBoard's own thread prints a traceback of what this one is told anyway."""
        if not isinstance(fault.exc_value, OSError):
            self._hook(fault)
