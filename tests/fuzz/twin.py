"""The naive twin of a BalancedOptimizer with SGD: every call written from the mathematics.

It shares nothing with the library but the formulas of a weighting (``weights`` and ``observe``).
Gradients are taken loss by loss, and everything is kept by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moo_balance import BalanceError
from moo_balance.weighting import Needs, State, Statistics, Weighting
from tests.fuzz.mathematics import (
    Repeat,
    Row,
    Sums,
    combine,
    gramian_of,
    merge,
    rows_of,
    select,
)

Hook = Callable[[Tensor], Tensor]

MOMENTUM = 0.9


class Refused(Exception):  # noqa: N818
    """The library must raise a BalanceError here, and change nothing."""


class Failed(Exception):  # noqa: N818
    """The library must raise here, once it has changed what the twin has changed."""


@dataclass
class Stage:
    """What the next step will make true."""

    names: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    state: State = field(default_factory=dict)
    repeats: list[Repeat | None] = field(default_factory=list)
    skip: bool = False
    scaled: bool = False
    combined: bool = False
    satisfied: set[str] = field(default_factory=set)


class Twin:
    """The state of a run, and what each call makes of it."""

    def __init__(
        self,
        model: nn.Module,
        weighting: Weighting,
        lr: float,
        names: tuple[str, ...] | None = None,
        nonfinite: str = "raise",
        shared: set[int] | None = None,
        allows_windows: bool = True,
    ) -> None:
        self.model, self.weighting, self.lr, self.nonfinite = model, weighting, lr, nonfinite
        self.shared, self.allows_windows = shared, allows_windows
        self.names, self.state = names, None
        self.steps = self.skipped = 0
        self.awaiting: tuple[str, ...] | None = None
        self.satisfied: set[str] = set()
        self.window: Sums | None = None
        self.staged: Stage | None = None
        self.coefficients: dict[str, float] = {}
        self.velocity: dict[int, Tensor] = {}
        self.hooks: dict[int, list[Hook]] = {}
        self.log: list[tuple[int, Tensor]] = []
        self.observed: set[int] = set()

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def needs(self) -> Needs:
        return self.weighting.needs(self.steps)

    # ------------------------------------------------------------ backward

    def read(
        self,
        losses: Mapping[str, Tensor],
        features: Tensor | None = None,
        scale: float | None = None,
        repeat: Repeat | None = None,
        accumulating: bool = False,
    ) -> Sums:
        """Differentiate a batch, after all that can be refused without it."""
        if self.awaiting is not None:
            raise Refused("observe is due")
        known = losses if self.names is None else self.names
        if not losses or not set(losses) <= set(known):
            raise Refused("unknown losses")
        if not all(loss.requires_grad for loss in losses.values()):
            raise Refused("no graph")
        in_window = accumulating or self.window is not None
        if features is not None and (
            not features.requires_grad or self.shared is not None or in_window
        ):
            raise Refused("features do not fit")
        values = {name: losses[name].detach() for name in known if name in losses}
        sums = Sums(values, rows_of(losses, self.params), [repeat], scaled=scale is not None)
        if features is not None:
            sums.at_features = rows_of(losses, [features])
        return sums

    def check_scale(self, scaled: bool) -> None:
        """Gradients that are added up are of one scale."""
        earlier = self.window or self.staged
        if earlier is None or (isinstance(earlier, Stage) and earlier.combined):
            return
        if earlier.scaled != scaled:
            raise Refused("another scale")

    def backward(self, batch: Sums, scale: float | None = None) -> None:
        """Balance the batch, or the window that it closes."""
        self.check_scale(batch.scaled)
        sums = batch if self.window is None else self.window.plus(batch)
        staged, coefficients = self.weigh(sums)
        if coefficients is not None:
            rows = sums.rows
            if self.window is not None and not self.keeps_rows(self.window):
                rows = batch.rows  # those of earlier micro-batches are in `.grad` already
                self._check_known(sums, coefficients)
            self.deliver(combine(rows, coefficients), scale or 1.0)
        self.coefficients = coefficients or {}
        self.staged, self.window = staged, None

    def keeps_rows(self, window: Sums) -> bool:
        """Whether gradients are delivered when the window closes, rather than one by one.

        Where coefficients are known beforehand that is for the sake of hooks, which see one sum.
        """
        if self.needs.compares or self.needs.losses or window.is_kept:
            return True
        hooked = {*self.hooks, *self.observed}
        trained = {k for k, param in enumerate(self.params) if param.requires_grad}
        return window.coefficients is None and bool(hooked & trained)

    def accumulate(self, batch: Sums, scale: float | None = None) -> None:
        """Add a micro-batch to the window."""
        self.check_scale(batch.scaled)
        sums = (self.window or Sums()).plus(batch)
        if not sums.is_finite() and not sums.scaled:
            if self.nonfinite == "raise":
                raise Refused("not finite")
            self.window = sums
            return
        if self.keeps_rows(sums):
            if not self.allows_windows:
                raise Refused("no windows")
            sums.is_kept = True
        else:
            _, coefficients = self.weigh(sums)
            assert coefficients is not None
            self._check_known(sums, coefficients)
            self.deliver(combine(batch.rows, coefficients), scale or 1.0)
            sums.coefficients = coefficients
        self.window = sums

    def _check_known(self, sums: Sums, coefficients: dict[str, float]) -> None:
        """Coefficients that earlier micro-batches were given must still hold."""
        before = (self.window or sums).coefficients or {}
        # Those of a step that a scaler will skip are NaN.
        changed = [name for name in before if coefficients[name] != before[name]]
        if any(math.isfinite(coefficients[name]) for name in changed):
            raise Refused("a loss joins the window")

    def weigh(self, sums: Sums) -> tuple[Stage, dict[str, float] | None]:
        """The step to stage, and the coefficients; None for a step to skip."""
        present = tuple(sums.losses)
        names = self.names or present
        state = self.initial_state(names) if self.state is None else self.state
        skipped = Stage(names, present, state, skip=not sums.scaled, scaled=sums.scaled)
        if not sums.is_finite():
            return self._skip(skipped)
        values = torch.stack(list(sums.losses.values()))
        satisfied = self.at_bounds(present, values)
        gramian = None
        if self.needs.gramian:
            compared = set(range(len(self.params))) if self.shared is None else self.shared
            gramian = gramian_of(sums.at_features or sums.rows, present, compared)
            if not bool(gramian.diagonal().isfinite().all()):
                return self._skip(skipped)
            zero = [name for name, q in zip(present, gramian.diagonal(), strict=True) if q == 0]
            if self.needs.method.uses_gramian:
                satisfied |= set(zero)
        elif self.needs.method.uses_gramian:
            satisfied |= self.satisfied & set(present)
        others = tuple(name for name in present if name not in satisfied)
        coefficients = dict.fromkeys(present, 0.0)
        if others:
            chosen = [present.index(name) for name in others]
            if gramian is not None:
                gramian = gramian[chosen][:, chosen]
            statistics = Statistics(others, values[chosen], gramian, self.steps)
            output = self.weighting.weights(statistics, select(state, names, others))
            state = merge(state, output.state, names, others)
            coefficients |= dict(zip(others, output.coefficients.tolist(), strict=True))
        staged = Stage(names, present, state, sums.repeats, scaled=sums.scaled)
        staged.satisfied = (self.satisfied - set(present)) | satisfied
        return staged, coefficients

    def at_bounds(self, present: tuple[str, ...], values: Tensor) -> set[str]:
        """The losses that equal their lower bound; none may be below."""
        bounds = torch.tensor(self.needs.method.lower_bounds(present))
        if bool((values < bounds).any()):
            raise Refused("below its bound")
        marks = (values == bounds).tolist()
        return {name for name, mark in zip(present, marks, strict=True) if mark}

    def initial_state(self, names: tuple[str, ...]) -> State:
        try:
            return self.weighting.init(names, torch.device("cpu"))
        except BalanceError as error:
            raise Refused(str(error)) from error

    def _skip(self, staged: Stage) -> tuple[Stage, dict[str, float] | None]:
        if staged.scaled:  # the scaler finds the NaN
            return staged, dict.fromkeys(staged.present, math.nan)
        if self.nonfinite == "raise":
            raise Refused("not finite")
        return staged, None

    def combined(self, batch: Sums, factor: float) -> None:
        """Stage a step, and run the backward pass of `factor` times its scalar."""
        if self.window is not None:
            raise Refused("a window is open")
        self.check_scale(batch.scaled)
        staged, coefficients = self.weigh(batch)
        staged.combined, staged.repeats, staged.scaled = True, [], False
        if coefficients is not None:
            self.deliver(combine(batch.rows, coefficients), factor)
        self.coefficients = coefficients or {}
        self.staged = staged

    def deliver(self, total: Row, factor: float) -> None:
        """Write to ``.grad`` what the hooks of the parameters make of it."""
        for position, gradient in total.items():
            param, gradient = self.params[position], gradient * factor
            for hook in self.hooks.get(position, ()):
                gradient = hook(gradient)
            param.grad = gradient if param.grad is None else param.grad + gradient
            if position in self.observed:
                self.log.append((position, param.grad.clone()))

    # ------------------------------------------------------------ steps

    def step(self, unscaled: bool = False) -> bool:
        """Take the step. Returns whether the losses are to be evaluated again.

        Args:
            unscaled: It is taken by a scaler, which has removed the scale.
        """
        if self.window is not None:
            raise Refused("a window is open")
        staged = self.staged
        if staged is None:
            if self.lr != 0.0:
                raise Refused("nothing to step on")
            self.descend()
            return False
        if staged.skip:
            self.staged, self.skipped = None, self.skipped + 1
            return False
        if staged.scaled != unscaled and not staged.combined:
            raise Refused("the gradients carry a scale")
        if not staged.scaled and not self.has_finite_gradients():
            if self.nonfinite == "raise":
                raise Refused("a gradient is not finite")
            self.staged, self.skipped = None, self.skipped + 1
            return False
        self.descend()
        observes = self.needs.observes
        self.names, self.state, self.staged = staged.names, staged.state, None
        self.satisfied = staged.satisfied
        self.steps += 1
        if observes:
            self.awaiting = staged.present
        return observes and bool(staged.repeats) and None not in staged.repeats

    def has_finite_gradients(self) -> bool:
        grads = [p.grad for p in self.params if p.requires_grad and p.grad is not None]
        return all(bool(grad.isfinite().all()) for grad in grads)

    def descend(self) -> None:
        """SGD with momentum."""
        with torch.no_grad():
            for position, param in enumerate(self.params):
                if param.grad is not None:
                    before = self.velocity.get(position, torch.zeros_like(param))
                    self.velocity[position] = MOMENTUM * before + param.grad
                    param -= self.lr * self.velocity[position]

    def observe(self, losses: Mapping[str, Tensor]) -> None:
        """Give the method the losses after the step."""
        if self.awaiting is None:
            staged = self.staged
            if staged is not None and not (staged.scaled or staged.combined):
                raise Refused("no step was taken")
            return
        if set(losses) != set(self.awaiting):
            raise Refused("other losses")
        names, present = self.names, tuple(n for n in self.names if n in losses)
        values = torch.stack([losses[name].detach() for name in present])
        satisfied = self.satisfied | self.at_bounds(present, values)
        self.awaiting = None
        others = tuple(name for name in present if name not in satisfied)
        if others:
            chosen = [present.index(name) for name in others]
            part = select(self.state, names, others)
            statistics = Statistics(others, values[chosen], step=self.steps)
            after = self.weighting.observe(statistics, part)
            self.state = merge(self.state, after, names, others)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad(set_to_none)
        self.window = None
        self.staged = None  # the backward pass of a combined loss has run
