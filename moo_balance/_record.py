"""All that a BalancedOptimizer remembers between calls, except about process groups.

It calls no other part but for warnings, and the mark of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moo_balance._capture import CaptureWatch
from moo_balance._nonfinite import FaultCounts
from moo_balance._warnings import warn
from moo_balance.errors import BalanceError, NonFiniteError
from moo_balance.monitor import StepMetrics
from moo_balance.weighting._entries import replace_entries, select_entries
from moo_balance.weighting.base import State, Weighting

if TYPE_CHECKING:
    from moo_balance._accumulation import Accumulation
    from moo_balance._grad_scaler import Scaling
    from moo_balance._reevaluation import Reevaluation
    from moo_balance._rows import RowState, SeparateRows


_SKIPS_TO_WARN_OF = 10
_STEPS_OF_OTHERS_TO_WARN_OF = 3
"""Optimizers that perturb the parameters between two passes, as SAM does, have one in a row."""


@dataclass(eq=False, repr=False)
class Staged:
    """The result of ``backward``; applied by the next ``step``, or discarded.

    Args:
        names: All declared losses.
        present: Those of this batch.
        state: State of the method after the step, for all declared losses.
        coefficients: What multiplies the gradients, shape [K] for the losses of this batch.
        metrics: What ``optimizer.metrics`` will show; of a step that must be skipped, its losses.
        valid: Whether the values were finite, on the device; None where the host has checked.
        observes: Whether the method needs the losses after the step.
        method: The method in use, one of several in a run with phases.
        satisfied: Which of the declared losses count as satisfied after it; None for none.
        skip: The host found a value that is not finite: the step must not be taken.
        combined: Made by ``combined_loss``, whose backward pass the caller runs.
        differentiated: Whether that backward pass has run.
        reevaluations: How to evaluate the batch again after the step.
        scaling: The loss scaler that the gradients were scaled with.
        rows: What is kept of rows after the step; None if that stays as it is.
        separate: The gradients for a step of each loss by itself; None for one step together.
        watched: A trained parameter, and its version counter; None for ``combined_loss``.
    """

    names: tuple[str, ...]
    present: tuple[str, ...]
    state: State
    coefficients: Tensor
    metrics: StepMetrics = field(default_factory=StepMetrics)
    valid: Tensor | None = None
    observes: bool = False
    method: Weighting | None = None
    satisfied: Tensor | None = None
    skip: bool = False
    combined: bool = False
    differentiated: bool = False
    reevaluations: Sequence[Reevaluation] = ()
    scaling: Scaling | None = None
    rows: RowState | None = None
    separate: SeparateRows | None = None
    watched: tuple[Tensor, int] | None = None

    def is_invalid(self) -> bool:
        """Whether a non-finite value was masked on the device. Synchronizes."""
        return self.valid is not None and not bool(self.valid)

    def mark_differentiated(self, _: Tensor) -> None:
        """Take note of the backward pass of a combined loss, as a hook of it."""
        self.differentiated = True

    def explain_skip(self) -> str:
        """Why the step must be skipped, for a message. Synchronizes."""
        for name, loss in self.metrics.losses.items():
            if not bool(loss.isfinite()):
                return f"loss `{name}` was {float(loss):g}"
        bound = "" if self.valid is None else ", or a loss below its bound"
        return f"a gradient was not finite{bound}"


@dataclass(eq=False, repr=False)
class Record:
    """Committed state, counters, the staged step and the open window.

    Args:
        names: The declared losses; None before the first step.
        state: State of the method; None before the first step.
        satisfied: Which of the declared losses counted as satisfied in the last step that had them;
            None for none.
        rows: What the method keeps of rows, by parameter and loss.
        rows_method: The method that has kept them; another phase of a run has another one.
        steps: Steps taken.
        skipped: Steps that were skipped for a value that is not finite.
        skipped_in_a_row: How many of them since the last step that was taken.
        awaiting: The losses for which ``observe`` is due before the next ``backward``.
        loaded_at: ``steps`` of the balance that was loaded last, if one was.
        metrics: Of the last ``backward``.
        staged: The result of the last ``backward``, until ``step``.
        window: The open window of micro-batches.
        accumulating: Whether ``backward`` is called within ``accumulate()``.
        moved: Whether ``first_step`` of an optimizer with two has moved the parameters.
        steps_of_others: How often in a row parameters have changed after ``backward``, and no
            ``step`` has followed.
        faults: Values masked on a device, for the next report.
        capture: Whether one loss holds all the weight, of which there is one warning in a run.
    """

    names: tuple[str, ...] | None = None
    state: State | None = None
    satisfied: Tensor | None = None
    rows: RowState = field(default_factory=dict)
    rows_method: Weighting | None = None
    steps: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    awaiting: tuple[str, ...] | None = None
    loaded_at: int | None = None
    metrics: StepMetrics = field(default_factory=StepMetrics)
    staged: Staged | None = None
    window: Accumulation | None = None
    accumulating: bool = False
    moved: bool = False
    steps_of_others: int = 0
    faults: FaultCounts = field(default_factory=FaultCounts)
    capture: CaptureWatch = field(default_factory=CaptureWatch)

    def __getstate__(self) -> dict[str, Any]:
        # Gradients are not copied with a parameter, so a copy cannot use what depends on them.
        # A copy that is made within `accumulate()` is not what leaves it.
        return {**self.__dict__, "staged": None, "window": None, "accumulating": False}

    @property
    def in_window(self) -> bool:
        """Whether the batch is one micro-batch of several."""
        return self.accumulating or self.window is not None

    def stage(self, staged: Staged) -> None:
        """Keep the result of ``backward`` for the next step, which closes the window."""
        if self.window is not None:
            self.drop_window()
        if self.staged is not None:
            self._count_steps_of_others(self.staged)
        self.staged = staged
        self.metrics = staged.metrics

    def drop_window(self) -> None:
        """Give the open window up, if there is one, and leave no mark of it in ``.grad``."""
        if self.window is not None:
            self.window.remove_mark()
            self.window = None

    def rows_of(self, method: Weighting | None) -> RowState:
        """What this method has kept of rows."""
        return self.rows if method is self.rows_method else {}

    def commit(self, staged: Staged) -> None:
        """Apply a staged step once the wrapped optimizer has taken it."""
        if staged.observes:
            self.awaiting = staged.present
        self.names, self.state, self.staged = staged.names, staged.state, None
        self.satisfied = staged.satisfied
        if staged.rows is not None or staged.method is not self.rows_method:
            self.rows, self.rows_method = staged.rows or {}, staged.method
        self.moved = False
        self.steps += 1
        self.skipped_in_a_row = self.steps_of_others = 0

    def skip(self, staged: Staged, most: int | None) -> None:
        """Discard a staged step that must not be taken.

        Args:
            staged: The step.
            most: How many may follow one another; None for any number.

        Raises:
            NonFiniteError: More than that have.
        """
        self.staged = None
        self.skipped += 1
        self.skipped_in_a_row += 1
        if most is not None and self.skipped_in_a_row > most:
            raise NonFiniteError(self._describe_skips(staged, f", more than `max_skips={most}`"))
        if self.skipped_in_a_row == _SKIPS_TO_WARN_OF:
            warn(self._describe_skips(staged))

    def _describe_skips(self, staged: Staged, limit: str = "") -> str:
        return (
            f"{self.skipped_in_a_row} steps in a row were skipped{limit}, the last because "
            f"{staged.explain_skip()}. If a parameter has become NaN, no further step can repair "
            "it: resume from a checkpoint, perhaps with a lower learning rate."
        )

    def discard_gradients(self) -> None:
        """Gradients were cleared, and with them what was staged on them."""
        self.drop_window()
        staged = self.staged
        # Trainers clear gradients between `combined_loss` and its backward pass, too.
        if staged is not None and (staged.differentiated or not staged.combined):
            self._count_steps_of_others(staged)
            self.staged = None

    def _count_steps_of_others(self, staged: Staged) -> None:
        """Warn if again and again parameters change after a ``backward`` without a ``step``."""
        if staged.watched is None or staged.watched[0]._version == staged.watched[1]:
            return
        self.steps_of_others += 1
        if self.steps_of_others == _STEPS_OF_OTHERS_TO_WARN_OF:
            warn(
                "`backward` should be followed by `step` of the BalancedOptimizer. Found "
                "parameters that have changed without it: the method has not advanced. Call `step` "
                "of the BalancedOptimizer, not of the optimizer inside it."
            )

    def drop_step(self) -> None:
        """Another state of the wrapped optimizer was loaded: drop the step in progress.

        What is committed stays, and so does what a loaded balance still waits for:
        ``torch.distributed.checkpoint`` loads the wrapped optimizer and the balance in any order.
        """
        self.drop_window()
        self.staged = None
        self.moved = False
        self.skipped_in_a_row = 0
        self.metrics, self.faults = StepMetrics(), FaultCounts()
        if self.steps != self.loaded_at:
            self.awaiting = None

    # ------------------------------------------------------------ order of the calls

    def check_same_scale(self, scaling: Scaling | None) -> None:
        """Refuse to add gradients of one loss scale to those of another."""
        earlier = self.window or self.staged
        if earlier is None or (isinstance(earlier, Staged) and earlier.combined):
            return
        if scaling != earlier.scaling:
            raise BalanceError(
                "Gradients that are added up should be of one scale. Found a `backward` with "
                "another `grad_scaler` than the one before. Give the same one to each `backward` "
                "of a step, and call `zero_grad` between steps."
            )

    def warn_of_separate_losses(self, present: Iterable[str]) -> None:
        """Warn of a ``backward`` on top of another one with other losses.

        Each is balanced by itself, so the gradient of their sum would not be a balanced one.
        """
        staged = self.staged
        if staged is None or self.in_window or staged.combined:
            return
        names = list(present)
        if set(names) != set(staged.present):
            warn(
                f"Losses that are to be balanced with each other should come in one `backward`. "
                f"Found {names} after {list(staged.present)} without a step in between: gradients "
                "of the two calls are added up. Pass all losses at once, call `backward` for parts "
                "of them within `accumulate()`, or call `optimizer.zero_grad()` between steps."
            )

    def check_observed(self, method: str, lagged: str | None) -> None:
        """Refuse a ``backward`` where ``observe`` is due.

        Args:
            method: The method that needs it.
            lagged: The same without that need; None if it has no such form.
        """
        if self.awaiting is None:
            return
        third = f"Or choose {lagged}, which takes the next batch's losses." if lagged else ""
        raise BalanceError(
            f"{method} needs the losses of the same batch after the step. Found another backward "
            "instead. Give a closure to `backward` or `step`, or call `observe(losses)` after "
            f"`step`. {third}".rstrip()
        )

    def check_stepped(self) -> None:
        """Refuse ``observe`` between a ``backward`` and its step.

        Where GradScaler has skipped a step, its ``backward`` is still staged; whether a combined
        loss was scaled is not known.
        """
        staged = self.staged
        if staged is not None and staged.scaling is None and not staged.combined:
            raise BalanceError(
                "`observe` should follow `step`. Found no step that was taken since the last "
                "`backward`. Call `step` first."
            )

    def check_no_window(self) -> None:
        """Refuse ``combined_loss`` and ``weighted_losses`` within a window."""
        if self.in_window:
            raise BalanceError(
                "`combined_loss` and `weighted_losses` balance each batch by itself. Found a "
                "window of micro-batches. Use `backward` within `accumulate`, or the two outside "
                "of it."
            )

    def check_window_closed(self) -> None:
        """Refuse a step that would leave accumulated micro-batches unused."""
        if self.window is not None:
            raise BalanceError(
                "`step` should follow the `backward` that closes a window of micro-batches. Found "
                "it open. Call the last `backward` outside of `accumulate()`, or `zero_grad` to "
                "drop the window."
            )

    def check_nothing_staged(self) -> None:
        """Refuse a closure of ``step`` on top of gradients that are balanced already."""
        if self.staged is not None or self.window is not None:
            raise BalanceError(
                "A closure given to `step` should only compute the losses. Found gradients that "
                "`backward` or `combined_loss` has made already. Give the closure to `backward` "
                "and call `step()` without it, or leave `backward` to `step`."
            )

    def check_scaled(self) -> None:
        """Refuse ``GradScaler.step`` on gradients that were never scaled."""
        staged = self.staged
        if staged is not None and staged.scaling is None and not staged.combined:
            raise BalanceError(
                "A step by `scaler.step` should follow `backward(losses, grad_scaler=scaler)`. "
                "Found gradients that carry no scale, which the scaler would divide by it. Give "
                "the scaler to `backward`."
            )


# ------------------------------------------------------------ absent losses


def loss_positions(
    names: Sequence[str], present: Sequence[str], device: torch.device
) -> Tensor | None:
    """Positions of the present losses among the declared ones; None for all of them in order."""
    if tuple(names) == tuple(present):
        return None
    return torch.tensor([names.index(name) for name in present], device=device)


def select_losses(state: State, positions: Tensor | None) -> State:
    """The part of a state that belongs to some losses; all of it for None."""
    return state if positions is None else select_entries(state, positions)


def merge_losses(state: State, part: State, positions: Tensor | None) -> State:
    """A state in which the entries of some losses are replaced by those of `part`.

    Every entry keeps the dtype that it has in `state`.
    """
    if positions is not None:
        return replace_entries(state, part, positions)
    return {k: v.to(state[k].dtype) if k in state else v for k, v in part.items()}
