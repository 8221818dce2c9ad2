"""What a weighting is: frozen hyper-parameters, and a state that is passed as a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moo_balance.functional._checks import widest_dtype

if TYPE_CHECKING:
    from moo_balance.weighting.rows import RowStatistics, RowWeighting

state_dtype = widest_dtype
"""The dtype of state tensors on a device: float64 where the device has it."""

State: TypeAlias = dict[str, Tensor]
"""What a weighting keeps from one step to the next: tensors of shape ``()``, ``[K]`` or ``[K, K]``,
each in the dtype that ``init`` gave it; the methods of the package use float64 (float32 on Apple's
"mps"). A dimension of K entries has one entry per loss, in the order of the names given to
``init``; a 0-d tensor belongs to all losses. ``BalancedOptimizer`` relies on this to save and move
every state, and to select the entries of the losses that are present, whichever method it belongs
to."""


class Statistics(NamedTuple):
    """What a weighting may use in one step.

    Args:
        names: The K losses that are present, in the order of the tensors below.
        losses: Their values, shape [K], detached and unscaled. Their dtype is that of `gramian` in
            a step that has one, else float64 (float32 on Apple's "mps").
        gramian: Inner products of their gradients, shape [K, K], in the dtype of the losses; None
            for a method that does not use it, or in a step between two refreshes (``every``). With
            ``uses_independent_batches`` an unbiased estimate, whose eigenvalues may be negative.
        step: Number of steps that have been committed so far; in ``observe``, with the one that is
            observed.
        rows: What a method that looks at single coordinates of gradients asks for, in a step with a
            Gramian; None for any other.
        satisfied: Which losses to leave out, as booleans [K], on an accelerator and for a method
            with ``leaves_out_satisfied``; their values are harmless, and their rows of `gramian`
            zero. None elsewhere, where they have been left out before.
    """

    names: tuple[str, ...]
    losses: Tensor
    gramian: Tensor | None = None
    step: int = 0
    rows: RowStatistics | None = None
    satisfied: Tensor | None = None


class WeightingOutput(NamedTuple):
    """The result of a weighting.

    ``weights`` [K] are the method's own (on the simplex unless its docstring says otherwise),
    ``coefficients`` [K] multiply the raw gradients, ``state`` is what to keep once the step has
    been taken.
    """

    weights: Tensor
    coefficients: Tensor
    state: State


class Needs(NamedTuple):
    """What a method needs in one step.

    Args:
        method: Whose lower bounds hold.
        compares: Whether the method compares gradients, in this step or between two refreshes.
        gramian: Whether it gets a Gramian in this step.
        losses: Whether its coefficients depend on the losses of this step.
        observes: Whether it needs the losses on the same batch after this step.
        rows: What looks at single coordinates of the gradients in this step; None for nothing.
        independent: Whether its Gramian should hold products of gradients of different batches
            only.
    """

    method: Weighting
    compares: bool
    gramian: bool
    losses: bool
    observes: bool
    rows: RowWeighting | None = None
    independent: bool = False


class Weighting(ABC):
    """Turns losses, and a Gramian where the method uses one, into K coefficients.

    Subclasses are frozen dataclasses, one per published method. They never call ``backward`` and
    never see a parameter. A new one gives :meth:`weights`, and :meth:`init` if it has a state;
    ``BalancedOptimizer`` then saves, resumes, slices and distributes it like any other.

    Five properties say what the method needs. A subclass overrides them by a class attribute
    (``uses_losses = False``), a field with a default (``every: int = 1``) or a property. A method
    whose needs change from step to step overrides :meth:`needs` instead.
    """

    @property
    def uses_gramian(self) -> bool:
        """Whether :meth:`weights` needs inner products of gradients."""
        return False

    @property
    def uses_losses(self) -> bool:
        """Whether the coefficients of a step depend on the losses of the same step.

        Where they do not, gradient accumulation needs no gradient per loss.
        """
        return True

    @property
    def observes_step(self) -> bool:
        """Whether :meth:`observe` needs the losses on the same batch after the step."""
        return False

    @property
    def uses_independent_batches(self) -> bool:
        """Whether the Gramian should hold products of gradients of different batches only.

        It is then an unbiased estimate of the Gramian of the expected gradients, symmetric but
        perhaps not positive semidefinite. The batches are the micro-batches of a window, or the
        ranks of a data-parallel run; a step with one batch is refused.
        """
        return False

    @property
    def every(self) -> int:
        """Recompute the Gramian, or re-evaluate the losses, only every n-th step."""
        return 1

    def needs(self, step: int) -> Needs:
        """What the method needs in the step that follows `step` committed ones."""
        due, compares = step % self.every == 0, self.uses_gramian
        observes, independent = self.observes_step and due, self.uses_independent_batches
        gramian = compares and due
        return Needs(self, compares, gramian, self.uses_losses, observes, independent=independent)

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        """What each loss must not be below; minus infinity where any finite value is allowed.

        A loss that is equal to it counts as satisfied: the method is called without it.
        """
        return [-torch.inf] * len(names)

    @property
    def bound_reason(self) -> str:
        """What the method does that needs the bound, as the error message says after its name."""
        return "works with its distance to that bound"

    @property
    def bound_advice(self) -> str:
        """What to do about a loss that is below its bound, as the error message ends."""
        return "Give a loss that stays above."

    @property
    def constant_losses(self) -> Collection[str]:
        """The losses with a constant coefficient, which the method does not balance.

        They have no bound, and never count as satisfied: their gradients may be zero over the
        parameters that are compared, and not elsewhere.
        """
        return ()

    @property
    def leaves_out_satisfied(self) -> bool:
        """Whether the method itself leaves out what ``statistics.satisfied`` marks.

        On an accelerator the host does not know which losses count as satisfied. If this is True,
        the method is called with all losses and this mask: the others must get what they would get
        without the marked ones, for which anything may be returned. If not, the host reads the
        mask, which synchronizes, and the method is called without them, as on the CPU.
        """
        return False

    def init(self, names: Sequence[str], device: torch.device) -> State:
        """The state before the first step. Raises where a named argument does not fit `names`."""
        return {}

    @abstractmethod
    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        """Weights and coefficients for this step, and the state that follows it."""

    def observe(self, statistics: Statistics, state: State) -> State:
        """The state, given the losses re-evaluated on the same batch after the step."""
        return state


class GramianWeighting(Weighting):
    """A weighting that solves a problem on the Gramian, perhaps only every n-th step.

    A refresh is a step with a Gramian: ``solve`` gives ``{"weights": [K]}`` and whatever else
    ``coefficients`` should know. Between two refreshes ``coefficients`` follows the losses, and
    gets what was kept of the last solution.

    What is kept is what :meth:`Weighting.init` has an entry for: the weights where ``every`` is
    above 1, NaN for a loss that no solution has had yet. A method that keeps more, or starts each
    solve from the last solution, overrides it. Entries keep the dtype that ``init`` gave them.
    """

    @property
    def uses_gramian(self) -> bool:
        return True

    @abstractmethod
    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        """Solve for this step: ``{"weights": [K]}``, and more for :meth:`coefficients`.

        `state` is what was kept of the solution before. Entries that are not returned stay.
        """

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        """What multiplies the raw gradients, shape [K], given the (last) solution: the weights.

        ``statistics.gramian`` may be None here.
        """
        return state["weights"]

    def keep(self, statistics: Statistics, state: State) -> State:
        """The solution in a step between two refreshes: unchanged.

        A method whose weights sum to 1 restores that here, as a loss may be absent. The weights are
        for this step; those of the solution stay kept. Of a loss that no solution has had yet they
        are 0 in `state`. Entries that are not returned stay.
        """
        return state

    def init(self, names: Sequence[str], device: torch.device) -> State:
        if self.every == 1:
            return {}
        dtype = state_dtype(device)
        return {"weights": torch.full((len(names),), torch.nan, dtype=dtype, device=device)}

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        if statistics.gramian is None:
            return self._reuse(statistics, state)
        solution = {**state, **self.solve(statistics, statistics.gramian, state)}
        kept = {key: solution[key].to(value.dtype) for key, value in state.items()}
        return WeightingOutput(solution["weights"], self.coefficients(statistics, solution), kept)

    def _reuse(self, statistics: Statistics, state: State) -> WeightingOutput:
        """A step between two refreshes. Those after it may have losses that this one lacks."""
        solution = state
        if "weights" in state:
            solution = {**state, "weights": state["weights"].nan_to_num(nan=0.0)}
        solution = {**solution, **self.keep(statistics, solution)}
        following = {**solution, "weights": state.get("weights", solution["weights"])}
        kept = {key: following[key].to(value.dtype) for key, value in state.items()}
        return WeightingOutput(solution["weights"], self.coefficients(statistics, solution), kept)
