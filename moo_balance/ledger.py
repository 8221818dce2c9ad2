"""All that a BalancedOptimizer remembers, in one object that is changed in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.monitor import StepMetrics
from moo_balance.reevaluation import Replay
from moo_balance.screening import sanitized
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput

if TYPE_CHECKING:
    from moo_balance._distributed import Ranks
    from moo_balance.engine import Window

_FORMAT = 1


@dataclass(eq=False, repr=False)
class Staged:
    """What ``backward`` worked out and ``step`` will make true, or nobody will.

    ``state`` covers all declared losses; ``valid`` is a flag on the device, or None where the host
    has already looked; ``skip`` says that the step must not be taken.
    """

    names: tuple[str, ...]
    present: tuple[str, ...]
    state: State
    valid: Tensor | None = None
    skip: bool = False
    combined: bool = False
    replays: Sequence[Replay] = ()
    scaler: GradScaler | None = None

    def is_invalid(self) -> bool:
        """Was a fault masked on the device? To ask is to wait for it."""
        return self.valid is not None and not bool(self.valid)


@dataclass(eq=False, repr=False)
class Accumulation:
    """A window of micro-batches that has not been closed yet.

    ``gradients`` are the rows so far; None where the coefficients were known beforehand and the
    gradients went straight to ``.grad``.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    gradients: Window | None = None
    coefficients: Tensor | None = None
    scaler: GradScaler | None = None

    def with_losses(self, statistics: Statistics) -> Statistics:
        """Statistics of the window so far together with one more micro-batch."""
        if not self.losses:
            return statistics
        sums = dict(self.losses)
        for name, loss in zip(statistics.names, statistics.losses.unbind(), strict=True):
            sums[name] = sums[name] + loss if name in sums else loss
        return statistics._replace(names=tuple(sums), losses=torch.stack(list(sums.values())))

    def take(self, statistics: Statistics, replays: Sequence[Replay]) -> None:
        """One more micro-batch has been gathered."""
        self.losses = dict(zip(statistics.names, statistics.losses.unbind(), strict=True))
        self.replays.extend(replays)

    def settled(
        self, statistics: Statistics, coefficients: Tensor, wanted: Sequence[str]
    ) -> Tensor:
        """Coefficients of the `wanted` losses, once it is sure that those used before still hold.

        They depend on nothing but which losses there are, so only a new one can change them.
        """
        before, self.coefficients = self.coefficients, coefficients
        # Where no loss has joined there is nothing to compare: it would wait for the device, and
        # take the NaN of a step that a loss scaler is to skip for a change.
        if (
            before is not None
            and len(before) < len(coefficients)
            and not torch.equal(before, coefficients[: len(before)])
        ):
            raise BalanceError(
                "A window of micro-batches should have the same losses throughout for this "
                f"method. Found {list(statistics.names)} after {list(self.losses)}."
            )
        if tuple(wanted) == statistics.names:
            return coefficients
        return coefficients[[statistics.names.index(name) for name in wanted]]


@dataclass(eq=False, repr=False)
class Ledger:
    """Names, committed state, the staged step, and the last figures.

    Frameworks that stand in for an optimizer (Lightning) share its attributes but not later
    assignments to them; whoever holds this object sees everything.
    """

    weighting: Weighting
    names: tuple[str, ...] | None = None
    state: State | None = None
    steps: int = 0
    skipped: int = 0
    staged: Staged | None = None
    awaiting: tuple[str, ...] | None = None
    metrics: StepMetrics = field(default_factory=StepMetrics)
    faults: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    parallel: Ranks | None = None
    accumulating: bool = False
    accumulation: Accumulation | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Process groups cannot be copied; they are found again in the next step. Gradients are not
        # copied with a parameter, so a copy has no use for what was staged on them.
        return {**self.__dict__, "parallel": None, "staged": None, "accumulation": None}

    @property
    def due(self) -> bool:
        """Does this step gather the costly evidence?"""
        return self.steps % self.weighting.every == 0

    @property
    def in_window(self) -> bool:
        """Is this micro-batch one of several?"""
        return self.accumulating or self.accumulation is not None

    @property
    def watches(self) -> bool:
        """Does the method want to see the losses after this step?"""
        return self.weighting.observes_step and self.due

    def opening(
        self, present: Sequence[str], device: torch.device
    ) -> tuple[tuple[str, ...], State]:
        """Declared names and committed state; those a first step would start from, if none yet."""
        names = self.names or tuple(present)
        return names, self.weighting.init(names, device) if self.state is None else self.state

    def draft(
        self,
        statistics: Statistics,
        names: tuple[str, ...],
        state: State,
        faults: Tensor | None = None,
        overflow: Tensor | None = None,
    ) -> tuple[WeightingOutput, Staged]:
        """Ask the weighting; nothing of it is committed, nor even staged.

        `faults` and `overflow` [K] are flags on the device: where one is set the state stays as it
        is. Faults are reported when the host looks, overflows are not.
        """
        index = _positions(names, statistics.names, statistics.losses.device)
        self._note(statistics.names, faults)
        valid = _none_of(faults, overflow)
        harmless = self._sanitized(statistics, valid)
        weighted = self.weighting.weights(harmless, _take(state, index))
        following = _masked(valid, _put(state, weighted.state, index), state)
        return weighted, Staged(names, statistics.names, following, valid)

    def commit(self) -> None:
        """The step was taken: what was staged is now true."""
        staged = self.staged
        assert staged is not None
        if self.watches:
            self.awaiting = staged.present
        self.names, self.state, self.staged = staged.names, staged.state, None
        self.steps += 1

    def discard_gradients(self) -> None:
        """Gradients were cleared, and with them what was staged on them."""
        self.accumulation = None
        # Trainers clear gradients between `combined_loss` and `backward`, too.
        if self.staged is not None and not self.staged.combined:
            self.staged = None

    def drop(self) -> None:
        """The step will not be taken."""
        self.staged = None
        self.skipped += 1

    def observe(self, statistics: Statistics, faults: Tensor | None = None) -> None:
        """Show the weighting the losses after the committed step."""
        assert self.names is not None and self.state is not None
        index = _positions(self.names, statistics.names, statistics.losses.device)
        self._note(statistics.names, faults)
        valid = _none_of(faults)
        seen = self.weighting.observe(self._sanitized(statistics, valid), _take(self.state, index))
        self.state = _masked(valid, _put(self.state, seen, index), self.state)
        self.awaiting = None

    def _sanitized(self, statistics: Statistics, valid: Tensor | None) -> Statistics:
        if valid is None:
            return statistics
        return sanitized(statistics, self.weighting.lower_bounds(statistics.names), valid)

    def _note(self, names: tuple[str, ...], faults: Tensor | None) -> None:
        """Count faults on the device, for a report when the host looks."""
        if faults is not None:
            self.faults[names] = self.faults.get(names, 0) + faults

    def check_faults(self) -> None:
        """Report, and forget, what was masked on the device since the last look."""
        counts = [
            (name, count)
            for names, found in self.faults.items()
            for name, count in zip(names, found.tolist(), strict=True)
            if count
        ]
        self.faults.clear()
        if counts:
            name, count = counts[0]
            raise NonFiniteError(
                f"Loss `{name}` or its gradient should be finite and above its bound. Found "
                f"{count} steps since the last look where it was not; the balance kept its state "
                'in them. Lower the learning rate, or pass nonfinite="skip".'
            )

    def check_stepped(self) -> None:
        """Refuse to be shown losses when no step was taken."""
        if self.names is None or (self.staged is not None and self.staged.scaler is None):
            raise BalanceError(
                "`observe` should follow `step`. Found no step that was taken since the last "
                "`backward`. Call `step` first."
            )

    def check_closed(self) -> None:
        """Refuse a step that would leave gathered micro-batches behind."""
        if self.accumulation is not None:
            raise BalanceError(
                "`step` should follow the `backward` that closes a window of micro-batches. Found "
                "it open. Call the last `backward` outside of `accumulate()`, or `zero_grad` to "
                "drop the window."
            )

    def check_untouched(self) -> None:
        """Refuse a closure that is to be balanced on top of gradients that already are."""
        if self.staged is not None or self.accumulation is not None:
            raise BalanceError(
                "A closure given to `step` should only compute the losses. Found gradients that "
                "`backward` or `combined_loss` has made already. Give the closure to `backward` and "
                "call `step()` without it, or leave `backward` to `step`."
            )

    def check_observed(self) -> None:
        """Refuse to go on when a method that watches the step was shown nothing."""
        if self.awaiting is not None:
            method = type(self.weighting).__name__
            raise BalanceError(
                f"{method} has to see the losses of the same batch after the step. Found another "
                "backward instead. One of three: give a closure to `backward` or `step`, call "
                f"`observe(losses)` after `step`, or choose {method}(lagged=True), which takes the "
                "next batch's losses."
            )

    def state_dict(self) -> dict[str, Any]:
        """Committed state as tensors and primitives."""
        return {
            "format": _FORMAT,
            "weighting": type(self.weighting).__name__,
            "names": list(self.names or ()),
            "steps": self.steps,
            "skipped": self.skipped,
            "awaiting": None if self.awaiting is None else list(self.awaiting),
            "state": {key: value.clone() for key, value in (self.state or {}).items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Take over a saved state, or raise and keep the present one."""
        names, state = self.checked(saved, device)
        self.names, self.state = names, state
        self.steps, self.skipped = int(saved["steps"]), int(saved["skipped"])
        self.awaiting = None if saved["awaiting"] is None else tuple(saved["awaiting"])
        self.staged = self.accumulation = None

    def checked(
        self, saved: Mapping[str, Any], device: torch.device
    ) -> tuple[tuple[str, ...] | None, State | None]:
        """Names and state of a checkpoint, once they fit this weighting and these losses."""
        missing = self.state_dict().keys() - saved.keys()
        if missing or saved["format"] != _FORMAT:
            raise BalanceValueError(
                f"Entry `balance` of the state dict should have format {_FORMAT}. Found "
                f"{saved.get('format')!r}{f' without `{min(missing)}`' if missing else ''}. It was "
                "written by another version of moo_balance; remove the entry to start afresh."
            )
        method = type(self.weighting).__name__
        if saved["weighting"] != method:
            raise BalanceValueError(
                f"Entry `balance` of the state dict should come from {method}. Found "
                f'{saved["weighting"]}. Remove the entry (`state_dict.pop("balance")`) to carry '
                "on with the wrapped optimizer's state alone."
            )
        if not saved["names"]:
            return self.names, None
        names = tuple(saved["names"])
        if self.names is not None and set(self.names) != set(names):
            raise BalanceValueError(
                f"Entry `balance` of the state dict should speak of the losses {list(self.names)}. "
                f"Found {list(names)}. Give the losses the names of the run that was saved."
            )
        if not saved["steps"]:
            return names, None
        return names, self._checked_state(saved["state"], names, device)

    def _checked_state(
        self, saved: Mapping[str, Tensor], names: tuple[str, ...], device: torch.device
    ) -> State:
        fresh = self.weighting.init(names, device)
        found = {key: tuple(value.shape) for key, value in saved.items()}
        expected = {key: tuple(value.shape) for key, value in fresh.items()}
        if found != expected:
            raise BalanceValueError(
                f"Entry `balance` of the state dict should hold {expected} for {self.weighting}. "
                f"Found {found}. It was saved with other settings."
            )
        return {key: saved[key].clone().to(value) for key, value in fresh.items()}


def _positions(names: Sequence[str], present: Sequence[str], device: torch.device) -> Tensor | None:
    """Where the present losses stand among the declared ones; None for all of them in order."""
    if tuple(names) == tuple(present):
        return None
    return torch.tensor([names.index(name) for name in present], device=device)


def _take(state: State, index: Tensor | None) -> State:
    if index is None:
        return state
    return {key: value[index] if value.ndim else value for key, value in state.items()}


def _put(state: State, part: State, index: Tensor | None) -> State:
    if index is None:
        return part
    return {
        key: state[key].index_copy(0, index, value) if value.ndim else value
        for key, value in part.items()
    }


def _none_of(*flags: Tensor | None) -> Tensor | None:
    """Is no flag set? None where the host has looked already."""
    found = [flag.any() for flag in flags if flag is not None]
    return ~torch.stack(found).any() if found else None


def _masked(valid: Tensor | None, following: State, before: State) -> State:
    """`following` where the step was valid, decided on the device."""
    if valid is None:
        return following
    return {key: torch.where(valid, value, before[key]) for key, value in following.items()}
