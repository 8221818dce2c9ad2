"""From losses to a staged step: losses -> Gramian -> weights -> ``.grad``.

Read :meth:`Balancer.backward` and what it calls from top to bottom, then ``_stepping.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from operator import is_not
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from moo_balance._accumulation import Accumulation
from moo_balance._checkpoint import Checkpoint, save_checkpoint, validate_checkpoint
from moo_balance._distributed import Ranks, StepId, check_static_graph, find_ranks
from moo_balance._grad_scaler import Scaling
from moo_balance._nonfinite import (
    Flags,
    flag_gradients,
    flag_losses,
    is_on_cpu,
    mask_coefficients,
    replace_nonfinite,
    select_state,
    unite,
)
from moo_balance._record import Record, Staged
from moo_balance._reevaluation import Reevaluation, evaluate
from moo_balance._reevaluation.copies import KnownWrites
from moo_balance._rows import look_at_rows, separate_rows
from moo_balance._satisfied import among_declared, among_present, count_satisfied, weigh
from moo_balance._two_step import check_no_scaling, check_not_apart, has_two_steps
from moo_balance._validation import (
    Given,
    check_combination,
    check_no_closure,
    check_whole_rows,
    read_features,
    read_losses,
    weighted_on_ranks_error,
)
from moo_balance.engine import Engine, Linearization, Problem
from moo_balance.engine.autograd import hooked_positions, node_hook_positions
from moo_balance.engine.base import is_distributed, node_hooks_error, stack_losses, weigh_losses
from moo_balance.errors import NonFiniteError
from moo_balance.monitor import StepMetrics
from moo_balance.weighting._identity import describe, lagged_form
from moo_balance.weighting.base import Needs, Statistics, Weighting, state_dtype
from moo_balance.weighting.fixed import FixedWeights, Sum

Losses: TypeAlias = Mapping[str, Tensor]
Closure: TypeAlias = Callable[[], Losses]
Features: TypeAlias = Tensor | Sequence[Tensor] | None


class Batch(NamedTuple):
    """One batch: its losses as a problem for the engine, and their values for the method."""

    problem: Problem
    statistics: Statistics
    scaling: Scaling | None
    reevaluations: Sequence[Reevaluation]


@dataclass(eq=False, repr=False)
class Balancer:
    """The one object of a BalancedOptimizer that acts. What it remembers is in its record.

    Lightning copies the ``__dict__`` of an optimizer once. Therefore a BalancedOptimizer keeps
    nothing else that changes: an assignment to one of its own attributes would not reach the copy.
    """

    optimizer: Optimizer
    weighting: Weighting
    engine: Engine
    shared_params: Sequence[Tensor] | None
    nonfinite: str
    process_group: Any
    max_skips: int | None
    check_ranks_every: int
    record: Record
    ranks: Ranks | None = field(default=None, init=False)
    inspected: dict[Tensor, bool] = field(default_factory=dict, init=False)
    last_params: Sequence[Tensor] = field(default=(), init=False)
    node_hooks: Sequence[int] = field(default=(), init=False)
    known_writes: KnownWrites = field(default_factory=KnownWrites, init=False)
    checked: tuple[Weighting | None, int] = field(default=(None, 0), init=False)

    def __post_init__(self) -> None:
        self.method = type(self.weighting).__name__
        self.description = describe(self.weighting)
        self.lagged = lagged_form(self.weighting)
        self._needs = 0, self.weighting.needs(0)
        self.two_steps = has_two_steps(self.optimizer)
        # Whether several calls of `backward` give the same as one with all of their losses.
        self.adds_up = type(self.weighting) in (FixedWeights, Sum)

    def __getstate__(self) -> dict[str, Any]:
        # Process groups can be neither copied nor pickled; the others concern the parameters of
        # this object, not those of a copy.
        return {**self.__dict__, "ranks": None, "inspected": {}, "last_params": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Balancer:
        memo[id(self.process_group)] = self.process_group  # a copy belongs to the same ranks
        copy: Balancer = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__getstate__(), memo))
        return copy

    @property
    def params(self) -> list[Tensor]:
        """The parameters that train, as of now, each once."""
        groups = self.optimizer.param_groups
        # PyTorch warns of a parameter that stands twice in a group, but takes it.
        return list({id(p): p for g in groups for p in g["params"] if p.requires_grad}.values())

    @property
    def all_params(self) -> list[Tensor]:
        """The parameters of the wrapped optimizer, frozen ones included, each once."""
        groups = self.optimizer.param_groups
        return list(dict.fromkeys(param for group in groups for param in group["params"]))

    @property
    def device(self) -> torch.device:
        """Where the state lives until a loss says otherwise."""
        return next((param.device for param in self.params), torch.device("cpu"))

    @property
    def needs(self) -> Needs:
        """What the method needs in the step that comes next, or is being taken."""
        steps = self.record.steps
        if self._needs[0] != steps:
            self._needs = steps, self.weighting.needs(steps)
        return self._needs[1]

    # ------------------------------------------------------------ backward

    def backward(
        self,
        losses: Losses | Closure,
        scaling: Scaling | None,
        retain_graph: bool,
        features: Features | Callable[[], Features],
    ) -> Losses:
        """Balance a batch and stage the step, or add a micro-batch to the open window."""
        if self.record.window is not None:
            self.drop_cleared_window(self.record.window)
        reevaluations: list[Reevaluation] = []
        if callable(losses):
            losses, reevaluations = self.make_repeatable(losses)
        given, batch = self.prepare(losses, scaling, features, retain_graph, reevaluations)
        if self.record.accumulating:
            self._add_micro_batch(batch)
        else:
            self.balance(batch)
        return given

    def prepare(
        self,
        losses: Losses | Closure,
        scaling: Scaling | None = None,
        features: Features | Callable[[], Features] = None,
        retain_graph: bool = False,
        reevaluations: Sequence[Reevaluation] = (),
        combined: bool = False,
    ) -> tuple[Losses, Batch]:
        """The losses as given, and the batch; nothing is differentiated yet."""
        record, needs = self.record, self.needs
        read = partial(self._read_batch, losses, scaling, features, combined, needs)
        call = "accumulate" if record.accumulating else "backward"
        given, stacked, values = self.read(read, call)
        params, compared = self.params, None  # which the closure may have frozen
        takes_rows = self._takes_rows(params)
        if self.shared_params is not None:
            shared = set(map(id, self.shared_params))
            compared = [k for k, param in enumerate(params) if id(param) in shared]
        names = tuple(given.losses)
        problem = Problem(
            names=names,
            losses=tuple(given.losses.values()),
            params=params,
            compared=compared,
            scale=None if scaling is None else scaling.factor(stacked.device),
            retain_graph=retain_graph,
            averager=self.ranks.averager if self.ranks is not None and takes_rows else None,
            features=given.features,
            stacked=stacked,
            node_hooks=self._find_node_hooks(params) if takes_rows else (),
            whole_rows=needs.rows is not None,
            measured=needs.gramian,
            independent=type(needs.method).__name__ if needs.independent else "",
        )
        statistics = Statistics(names, values, step=record.steps)
        return given.returned, Batch(problem, statistics, scaling, reevaluations)

    def _read_batch(
        self,
        losses: Losses | Closure,
        scaling: Scaling | None,
        features: Features | Callable[[], Features],
        combined: bool,
        needs: Needs,
    ) -> Given:
        """Evaluate and validate a batch. What one rank alone may refuse is refused here."""
        record = self.record
        record.check_same_scale(scaling)
        record.check_observed(self.method, self.lagged)
        if self.two_steps:
            check_no_scaling(self.optimizer, scaling)
            check_not_apart(self.optimizer, needs.rows)
        if combined:
            record.check_no_window()
            check_no_closure(losses)
        returned = cast(Losses, evaluate(losses)) if callable(losses) else losses
        if callable(features):
            features = features()
        read: tuple[Tensor, ...] = ()
        if needs.rows is not None:
            check_whole_rows(needs.rows, self.engine, features is not None)
        if features is not None:
            read = read_features(features, self.shared_params is not None, record.in_window)
        present = read_losses(returned, record.names)
        if self.ranks is not None:
            params = self.params
            if self._takes_rows(params) and self._find_node_hooks(params):
                raise node_hooks_error("several ranks, which average gradients")
        if not combined and not self.adds_up:
            record.warn_of_separate_losses(present)
        return Given(present, read, returned)

    def _takes_rows(self, params: Sequence[Tensor]) -> bool:
        """Whether gradients are kept, in place of ordinary backward passes.

        They are for a Gramian, and in most windows: one whose coefficients are known beforehand
        keeps them only for hooks of parameters, which get the sum of its gradients.
        """
        window, needs = self.record.window, self.needs
        if needs.compares:
            return True
        if not self.record.in_window:
            return False
        if needs.losses:
            return True
        if window is not None and window.gradients is not None:
            return True
        if window is not None and window.coefficients is not None:
            return False  # it has begun with ordinary passes
        # Ranks must decide alike, and may have other hooks.
        return self.ranks is None and bool(
            hooked_positions(params) or self._find_node_hooks(params)
        )

    def _find_node_hooks(self, params: Sequence[Tensor]) -> Sequence[int]:
        """Positions of parameters whose graph nodes have hooks.

        To look for them in every step would take up to a twentieth of it. Nodes with hooks are
        kept alive by those who registered them, so each parameter is inspected once.
        """
        known = self.last_params
        if len(params) != len(known) or any(map(is_not, params, known)):
            groups = self.optimizer.param_groups
            kept = {p: self.inspected.get(p) for group in groups for p in group["params"]}
            new = [param for param in params if kept.get(param) is None]
            hooked = node_hook_positions(new)
            self.inspected = {p: has for p, has in kept.items() if has is not None}
            self.inspected.update({param: k in hooked for k, param in enumerate(new)})
            self.last_params = params
            self.node_hooks = [k for k, param in enumerate(params) if self.inspected[param]]
        return self.node_hooks

    def read(self, read: Callable[[], Given], call: str) -> tuple[Given, Tensor, Tensor]:
        """What a call is given; its losses as one vector [K]; their means over the ranks [K].

        Args:
            read: Returns what this rank was given. If it raises, the other ranks raise, too.
            call: One of ``_distributed.CALLS``.
        """
        if self._may_have_ranks():
            self.ranks = find_ranks(self.process_group, self.ranks)
        if self.ranks is None:
            given = read()
            stacked = stack_losses(tuple(given.losses.values()))
            return given, stacked, stacked.detach().to(state_dtype(stacked.device))
        trainable = self.ranks.digest_trainable(self.optimizer.param_groups)
        step_id = StepId(self.description, self.record.steps, call, trainable)
        given, values = self.ranks.read_losses(read, self.record.names, step_id, self.device)
        return given, stack_losses(tuple(given.losses.values())), values

    def balance(self, batch: Batch) -> None:
        """Balance a batch or a closing window, write ``.grad``, and stage the step."""
        problem, statistics, scaling, reevaluations = batch
        window = self.record.window
        if window is not None:
            statistics = window.sum_losses(statistics)
            reevaluations = window.close_reevaluations(reevaluations)
        if window is not None and window.gradients is not None:
            linearization = window.gradients.close(problem)
        else:
            linearization = self.engine.linearize(problem)
        staged = self._weigh(statistics, linearization, scaling is not None)
        coefficients = staged.coefficients
        if window is not None:
            if window.gradients is None and not staged.skip:
                coefficients = window.select_coefficients(statistics, coefficients, problem.names)
            window.remove_mark()
        if not staged.skip:
            linearization.add_to_grad(coefficients)
        staged.reevaluations, staged.scaling = reevaluations, scaling
        if problem.params:
            staged.watched = (problem.params[0], problem.params[0]._version)
        self.record.stage(staged)

    def _weigh(
        self, statistics: Statistics, linearization: Linearization | None, scaled: bool
    ) -> Staged:
        """Compute the weights. Nothing changes yet, except the counts of faults.

        Args:
            statistics: The losses.
            linearization: Where a Gramian comes from; None if none is wanted.
            scaled: Whether the gradients carry a loss scale.
        """
        record, weighting, present = self.record, self.weighting, statistics.names
        needs = self.needs
        names, device = record.names or present, statistics.losses.device
        state = weighting.init(names, device) if record.state is None else record.state
        try:
            statistics, flags = self.measure(statistics, linearization, scaled, needs)
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
            nothing = torch.zeros_like(statistics.losses)
            metrics = StepMetrics(present, None, statistics.losses)
            return Staged(names, present, state, nothing, metrics, skip=True)
        measured = statistics
        valid = flags.are_clear()
        if valid is not None:
            statistics = self.mask(statistics, flags, valid, scaled, needs)
        satisfied = flags.satisfied
        if record.satisfied is not None and not needs.gramian and needs.method.uses_gramian:
            # What is kept of the last solution knows nothing of them.
            satisfied = unite(satisfied, among_present(record.satisfied, names, present, device))
        rows = None
        if needs.rows is not None:
            statistics, rows = look_at_rows(
                needs.rows,
                linearization,
                statistics,
                record.rows_of(needs.method),
                valid,
                satisfied,
            )
        weights, coefficients, following = weigh(
            weighting, statistics, satisfied, names, state, needs
        )
        if valid is not None:
            following = select_state(valid, following, state)
            coefficients = mask_coefficients(valid, coefficients, scaled)
        separate = None
        if needs.rows is not None and needs.rows.steps_apart:
            separate = separate_rows(linearization, present, coefficients, valid, satisfied)
        projected = None if linearization is None else linearization.projected
        metrics = StepMetrics(
            present,
            measured.gramian,
            measured.losses,
            weights,
            coefficients,
            _satisfied=satisfied,
            projected=projected,
        )
        if satisfied is not None or record.satisfied is not None:
            satisfied = among_declared(satisfied, record.satisfied, names, present)
        return Staged(
            names=names,
            present=present,
            state=following,
            coefficients=coefficients,
            metrics=metrics,
            valid=valid,
            observes=needs.observes,
            method=needs.method,
            satisfied=satisfied,
            rows=rows,
            separate=separate,
        )

    def measure(
        self,
        statistics: Statistics,
        linearization: Linearization | None,
        scaled: bool,
        needs: Needs,
    ) -> tuple[Statistics, Flags]:
        """Check the losses, and compute the Gramian if it is due.

        Raises:
            NonFiniteError: On the CPU without a scaler: a loss or a gradient is not finite.
            BalanceValueError: On the CPU: a loss is below its bound.
        """
        bounds = needs.method.lower_bounds(statistics.names)
        flags = flag_losses(statistics, bounds, needs.method, scaled)
        if linearization is None or not needs.gramian:
            return statistics, flags
        gramian = linearization.gramian()
        at_bound = flags.satisfied
        flags = flag_gradients(flags, statistics.names, gramian, scaled)
        if flags.satisfied is not at_bound:
            counting = count_satisfied(needs.method, statistics.names, flags.satisfied, at_bound)
            flags = flags._replace(satisfied=counting)
        losses = statistics.losses.to(gramian.dtype)
        statistics = statistics._replace(losses=losses, gramian=gramian)
        return statistics, flags

    def mask(
        self, statistics: Statistics, flags: Flags, valid: Tensor, scaled: bool, needs: Needs
    ) -> Statistics:
        """Count what is flagged for a later report, and make the statistics safe to compute with.

        What overflows under a loss scaler is not reported: the scaler handles it.
        """
        reportable = flags.union()
        if scaled:
            reportable = flags.losses
            if reportable is not None:
                reportable = reportable & statistics.losses.isfinite()
        if reportable is not None:
            self.record.faults.add(statistics.names, reportable)
        bounds = needs.method.lower_bounds(statistics.names)
        return replace_nonfinite(statistics, bounds, valid)

    # ------------------------------------------------------------ accumulation

    def _add_micro_batch(self, batch: Batch) -> None:
        """Add a micro-batch to the window; open one if there is none."""
        window = self.record.window or Accumulation(scaling=batch.scaling)
        statistics = window.sum_losses(batch.statistics)
        try:
            if is_on_cpu(statistics.losses):
                # Only finite values are needed here: bounds hold for the window as a whole.
                unbounded = [-math.inf] * len(statistics.names)
                flag_losses(statistics, unbounded, self.needs.method, batch.scaling is not None)
        except NonFiniteError:
            if self.nonfinite == "raise":
                raise
        else:
            self._add_gradients(window, batch, statistics)
        window.add(statistics, batch.reevaluations)
        window.set_mark(batch.problem.params)
        self.record.window = window

    def _add_gradients(self, window: Accumulation, batch: Batch, statistics: Statistics) -> None:
        problem = batch.problem
        if self._takes_rows(problem.params):
            if not self.needs.compares:
                self._check_static_graph(problem)
            gradients = window.gradients or self.engine.window()
            gradients.add(problem)
            window.gradients = gradients
            return
        # The coefficients are known beforehand: one ordinary backward pass, nothing to keep.
        coefficients = self._weigh(statistics, None, batch.scaling is not None).coefficients
        known = window.select_coefficients(statistics, coefficients, problem.names)
        self.engine.linearize(problem).add_to_grad(known)

    def drop_cleared_window(self, window: Accumulation) -> None:
        """Give the window up if its gradients were cleared without a call of ``zero_grad`` here."""
        if window.is_cleared():
            self.record.drop_window()

    # ------------------------------------------------------------ combined loss

    def combined_loss(self, losses: Losses, scaling: Scaling | None, features: Features) -> Tensor:
        """Stage a step whose backward pass the caller runs, on the scalar returned here."""
        batch = self._prepare_combined(losses, scaling, features)
        linearization = self.engine.linearize(batch.problem)
        staged = self._weigh(batch.statistics, linearization, scaling is not None)
        combined = linearization.combined(staged.coefficients)
        self._stage_combined(staged, [combined])
        return combined

    def weighted_losses(
        self, losses: Losses, scaling: Scaling | None, features: Features
    ) -> dict[str, Tensor]:
        """Stage a step whose backward pass the caller runs, on the sum of what is returned here."""
        if self._may_have_ranks() and find_ranks(self.process_group, self.ranks) is not None:
            raise weighted_on_ranks_error()
        check_combination(self.needs.rows)
        batch = self._prepare_combined(losses, scaling, features)
        problem = batch.problem._replace(retain_graph=True)
        linearization = self.engine.linearize(problem)
        staged = self._weigh(batch.statistics, linearization, scaling is not None)
        pairs = zip(problem.losses, staged.coefficients.unbind(), strict=True)
        with torch.enable_grad():
            terms = [weigh_losses(loss, coefficient) for loss, coefficient in pairs]
        self._stage_combined(staged, terms)
        return dict(zip(problem.names, terms, strict=True))

    def _prepare_combined(
        self, losses: Losses, scaling: Scaling | None, features: Features
    ) -> Batch:
        if self.record.window is not None:
            self.drop_cleared_window(self.record.window)
        return self.prepare(losses, scaling, features, combined=True)[1]

    def _stage_combined(self, staged: Staged, roots: Sequence[Tensor]) -> None:
        """Stage a step that counts once a backward pass has come to one of these scalars."""
        attached = [root for root in roots if root.requires_grad]
        staged.combined, staged.differentiated = True, not attached
        for root in attached:
            root.register_hook(staged.mark_differentiated)  # type: ignore[no-untyped-call]
        self.record.stage(staged)

    # ------------------------------------------------------------ second evaluation

    def make_repeatable(
        self, closure: Callable[[], Any]
    ) -> tuple[Callable[[], Any], list[Reevaluation]]:
        """A closure to evaluate, and how to evaluate it again if the method observes the step."""
        if not self.needs.observes:
            return closure, []
        reevaluation = Reevaluation(closure, self.params, self.known_writes)
        return reevaluation.first, [reevaluation]

    # ------------------------------------------------------------ ranks

    def _may_have_ranks(self) -> bool:
        """Whether there is, was, or should be a process group.

        False in an ordinary process, which then uses no part of ``_distributed.py``.
        """
        given = self.process_group is not None and self.process_group != "auto"
        return given or self.ranks is not None or is_distributed()

    def _check_static_graph(self, problem: Problem) -> None:
        if problem.averager is not None and self.record.steps == 0:
            check_static_graph(problem.losses, self.method)

    def check_ranks(self, ranks: Ranks) -> None:
        """Compare the ranks after the first three steps with a method, and every so many."""
        steps, every = self.record.steps, self.check_ranks_every
        method = self.weighting.needs(steps - 1).method
        if method is not self.checked[0]:  # it may average gradients where that before did not
            self.checked = method, steps
        if every and (steps - self.checked[1] < 3 or steps % every == 0):
            ranks.check_drift(self.params, self.record.state or {}, self.device)

    # ------------------------------------------------------------ checkpoints

    def save(self) -> dict[str, Any]:
        """The ``"balance"`` entry of a checkpoint."""
        return save_checkpoint(self.record, self.weighting, self.all_params)

    def validate(self, saved: object) -> Checkpoint:
        """Read such an entry, or raise; nothing changes."""
        return validate_checkpoint(saved, self.record, self.weighting, self.all_params, self.device)
