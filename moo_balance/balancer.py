"""From losses at the door to balanced gradients: what happens inside ``backward``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from moo_balance._distributed import Ranks, StepId
from moo_balance.door import check_attached, check_features, check_losses, check_same
from moo_balance.engine import Engine, Linearization, Problem
from moo_balance.engine.autograd import in_static_graph
from moo_balance.engine.base import stack_losses
from moo_balance.engine.distributed import RowAverager, is_whole
from moo_balance.errors import BalanceError, BalanceValueError, NonFiniteError
from moo_balance.ledger import Accumulation, Ledger, Staged
from moo_balance.reevaluation import Replay
from moo_balance.screening import are_finite, faulty_gradients, faulty_losses
from moo_balance.weighting.base import Statistics, Weighting, state_dtype

Losses = Mapping[str, Tensor]
Features = Tensor | Sequence[Tensor] | None


class Batch(NamedTuple):
    """Losses that were let in: how to differentiate them, and what they are."""

    problem: Problem
    statistics: Statistics


@dataclass(eq=False, repr=False)
class Balancer:
    """Composes weighting, engine and ledger; the one object that BalancedOptimizer is about.

    Everything that changes is in the ledger, in place. So a framework's stand-in for an optimizer
    (Lightning), which shares attributes but not assignments, sees the same as its original.
    """

    optimizer: Optimizer
    engine: Engine
    ledger: Ledger
    measured: Sequence[Tensor] | None
    nonfinite: str
    process_group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Balancer:
        memo[id(self.process_group)] = self.process_group  # a copy belongs to the same ranks
        copies = {f.name: deepcopy(getattr(self, f.name), memo) for f in fields(self)}
        return Balancer(**copies)

    @property
    def weighting(self) -> Weighting:
        """The method."""
        return self.ledger.weighting

    @property
    def params(self) -> list[Tensor]:
        """The parameters that train, as of now."""
        listed = [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad]
        # PyTorch warns of a parameter that stands twice in a group, but takes it.
        return list({id(param): param for param in listed}.values())

    @property
    def device(self) -> torch.device:
        """Where the balance lives until a loss says otherwise."""
        groups = self.optimizer.param_groups
        params = (p for group in groups for p in group["params"] if p.requires_grad)
        return next((p.device for p in params), torch.device("cpu"))

    def admit(
        self,
        losses: Losses,
        scale: Tensor | None = None,
        *,
        retain_graph: bool = False,
        features: Features = None,
    ) -> Batch:
        """Losses at the door; nothing is differentiated yet."""
        self.ledger.check_observed()
        measures = self.measured is not None
        shared = check_features(features, measures, self.ledger.in_window)
        call = "gather" if self.ledger.accumulating else "balance"
        parallel = self._parallel()
        present, vector, statistics = self._values(losses, check_attached, call, parallel)
        params = self.params
        compared = None
        if self.measured is not None:
            chosen = set(map(id, self.measured))
            compared = {k for k, param in enumerate(params) if id(param) in chosen}
        problem = Problem(
            names=statistics.names,
            losses=tuple(present.values()),
            params=params,
            compared=compared,
            scale=scale,
            retain_graph=retain_graph,
            averager=None if parallel is None else parallel.averager,
            features=shared,
            stacked=vector,
        )
        return Batch(problem, statistics)

    def gather(
        self, batch: Batch, replays: Sequence[Replay], scaler: GradScaler | None = None
    ) -> None:
        """One more micro-batch of a window."""
        window = self.ledger.accumulation or Accumulation(scaler=scaler)
        statistics = window.with_losses(batch.statistics)
        unbounded = [-math.inf] * len(statistics.names)  # bounds hold for the window as a whole
        try:
            faulty_losses(statistics, unbounded, type(self.weighting).__name__)
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
        else:
            self._gather_gradients(window, batch.problem, statistics)
        window.take(statistics, replays)
        self.ledger.accumulation = window

    def balance(
        self, batch: Batch, replays: Sequence[Replay], scaler: GradScaler | None = None
    ) -> None:
        """Close the window, or balance a batch of its own, and stage the step."""
        window = self.ledger.accumulation or Accumulation()
        problem, statistics = batch.problem, window.with_losses(batch.statistics)
        if self.weighting.uses_gramian and self.weighting.every > 1:
            self._check_static_graph(problem, "every")
        linearization: Linearization = self.engine.linearize(problem)
        if window.gradients is not None:
            linearization = window.gradients.close(problem)
        staged, coefficients = self._draft(statistics, linearization, problem.scale)
        if not staged.skip:
            if window.gradients is None:
                coefficients = window.settled(statistics, coefficients, problem.names)
            linearization.add_to_grad(coefficients)
        staged.replays, staged.scaler = [*window.replays, *replays], scaler
        self.ledger.staged, self.ledger.accumulation = staged, None

    def combine(self, batch: Batch) -> Tensor:
        """Stage a step whose backward pass somebody else will run."""
        if self.ledger.in_window:
            raise BalanceError(
                "`combined_loss` balances each batch by itself. Found a window of micro-batches. Use "
                "`backward` within `accumulate`, or `combined_loss` outside of it."
            )
        if self.weighting.uses_gramian:
            self._check_static_graph(batch.problem, "combine")
        linearization = self.engine.linearize(batch.problem)
        staged, coefficients = self._draft(batch.statistics, linearization, batch.problem.scale)
        combined = linearization.combined(coefficients)
        staged.combined = True
        self.ledger.staged = staged
        return combined

    def observe(self, losses: Losses) -> None:
        """The losses after a committed step."""
        ledger = self.ledger
        if ledger.awaiting is None:
            ledger.check_stepped()
            return
        same = partial(check_same, expected=ledger.awaiting)
        _, _, statistics = self._values(losses, same, "observe", self._parallel())
        try:
            ledger.observe(statistics, self._faulty_losses(statistics))
        except BalanceValueError as error:
            # The step is behind us. To keep waiting would block the next one for good.
            ledger.awaiting = None
            if self.nonfinite == "raise" or not isinstance(error, NonFiniteError):
                raise

    def is_spoiled(self, staged: Staged) -> bool:
        """Is a gradient not finite, and the step to be skipped for it?

        On the host only, where it costs a look at each; and not of a shard, which one rank alone
        sees.
        """
        if staged.scaler is not None:
            return False  # it has looked
        params = self.params
        if dist.is_available() and dist.is_initialized():
            params = [param for param in params if is_whole(param)]
        if are_finite(param.grad for param in params if param.grad is not None):
            return False
        if self.nonfinite == "raise":
            names = " or ".join(f"`{name}`" for name in staged.present)
            raise NonFiniteError(
                f"The gradient of {names} should be finite. Found NaN or infinity in `.grad`. "
                "Look for a square root or a division at zero, lower the learning rate, or pass "
                'nonfinite="skip" to skip such steps.'
            )
        return True

    def check_drift(self, every: int) -> None:
        """After the first steps, and now and then: do all ranks still hold the same?"""
        parallel, steps = self.ledger.parallel, self.ledger.steps
        if parallel is not None and every and (steps <= 3 or steps % every == 0):
            whole = [param for param in self.params if is_whole(param)]
            parallel.check_drift(whole, self.ledger.state or {}, self.device)

    def _values(
        self,
        losses: Losses,
        check: Callable[[dict[str, Tensor]], None],
        call: str,
        parallel: Ranks | None,
    ) -> tuple[dict[str, Tensor], Tensor, Statistics]:
        """Losses in declared order, side by side, and their values averaged over the ranks."""
        ledger = self.ledger
        present: dict[str, Tensor] = {}
        fault = None
        try:
            present = check_losses(losses, ledger.names)
            check(present)
        except BalanceError as error:
            if parallel is None:
                raise
            fault = error  # the other ranks wait to hear of it
        if parallel is not None:
            device = next(iter(present.values())).device if present else self.device
            dtype = state_dtype(device)
            step_id = StepId(repr(self.weighting), ledger.steps, call)
            means = parallel.synchronize_losses(
                present, ledger.names, step_id, fault, device, dtype
            )
            present = {name: present[name] for name in means}
            values = torch.stack(list(means.values()))
        vector = stack_losses(tuple(present.values()))
        if parallel is None:
            values = vector.detach().to(state_dtype(vector.device))
        return present, vector, Statistics(tuple(present), values, step=ledger.steps)

    def _draft(
        self, statistics: Statistics, linearization: Linearization | None, scale: Tensor | None
    ) -> tuple[Staged, Tensor]:
        """What the step would be, and its coefficients. Nothing has changed yet."""
        ledger, names = self.ledger, statistics.names
        names, state = ledger.opening(names, statistics.losses.device)
        try:
            statistics, faults, overflow = self._evidence(
                statistics, linearization, scale is not None
            )
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
            nothing = torch.zeros_like(statistics.losses)
            return Staged(names, statistics.names, state, skip=True), nothing
        weighted, staged = ledger.draft(statistics, names, state, faults, overflow)
        coefficients = weighted.coefficients
        if staged.valid is not None:
            # A loss scaler looks for NaN and skips the step; zero harms nobody else.
            nothing = torch.full_like(coefficients, 0.0 if scale is None else math.nan)
            coefficients = torch.where(staged.valid, coefficients, nothing)
        ledger.metrics.record(statistics, weighted.weights, coefficients)
        return staged, coefficients

    def _evidence(
        self, statistics: Statistics, linearization: Linearization | None, scaled: bool
    ) -> tuple[Statistics, Tensor | None, Tensor | None]:
        """Losses, and the Gramian if it is due; with flags [K] of what is faulty among them.

        Gradients that overflow under a loss scaler have flags of their own: that is its business.
        """
        faults = self._faulty_losses(statistics)
        if linearization is None or not (self.weighting.uses_gramian and self.ledger.due):
            return statistics, faults, None
        statistics = statistics._replace(gramian=linearization.gramian())
        also = faulty_gradients(statistics, scaled)
        if scaled:
            return statistics, faults, also
        if faults is None or also is None:
            return statistics, also if faults is None else faults, None
        return statistics, faults | also, None

    def _faulty_losses(self, statistics: Statistics) -> Tensor | None:
        bounds = self.weighting.lower_bounds(statistics.names)
        return faulty_losses(statistics, bounds, type(self.weighting).__name__)

    def _gather_gradients(
        self, window: Accumulation, problem: Problem, statistics: Statistics
    ) -> None:
        if self.weighting.uses_losses or self.weighting.uses_gramian:
            if not self.weighting.uses_gramian or self.weighting.every > 1:
                self._check_static_graph(problem, "accumulate")
            gradients = window.gradients or self.engine.window()
            gradients.add(problem)
            window.gradients = gradients
            return
        _, coefficients = self._draft(statistics, None, problem.scale)
        known = window.settled(statistics, coefficients, problem.names)
        self.engine.linearize(problem).add_to_grad(known)

    def _check_static_graph(self, problem: Problem, what: str) -> None:
        """Refuse what DDP's static graph cannot take, in the one step where it shows."""
        if (
            problem.averager is not None
            and self.ledger.steps == 0
            and in_static_graph(problem.losses)
        ):
            raise BalanceError(
                "DistributedDataParallel should not have `static_graph=True` together with "
                f"`{what}` and {type(self.weighting).__name__}: it records its hooks in the first "
                "step, where one gradient per loss bypasses them. Found it. Use "
                "`find_unused_parameters` instead."
            )

    def _parallel(self) -> Ranks | None:
        """The ranks to agree with, if there are several."""
        ledger, group = self.ledger, self.process_group
        if group is None:
            return None
        if not (dist.is_available() and dist.is_initialized()):
            if ledger.parallel is None and group == "auto":
                return None
            raise BalanceError(
                "The process group that this run began with should still be there. Found none. "
                "Step before `destroy_process_group`, or build a new BalancedOptimizer and load "
                "the state dict."
            )
        group = dist.group.WORLD if group == "auto" else group
        if ledger.parallel is None or ledger.parallel.group is not group:
            parallel = Ranks(RowAverager(group))
            if parallel.size == 1:
                return None
            ledger.parallel = parallel
        return ledger.parallel
