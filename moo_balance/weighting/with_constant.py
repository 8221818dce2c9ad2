"""WithConstant: any method, with constant coefficients for terms that are not objectives."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moo_balance._hints import add_note
from moo_balance.errors import BalanceValueError
from moo_balance.functional._checks import constant_vector
from moo_balance.weighting._arguments import (
    check_mapping,
    check_names,
    constants_like,
    copy_mappings,
    values_by_name,
)
from moo_balance.weighting._entries import replace_entries, select_along, select_entries
from moo_balance.weighting._identity import method_name, with_nested
from moo_balance.weighting._wrapping import (
    WrappingWeighting,
    as_inner,
    check_weighting,
    inner_state,
)
from moo_balance.weighting.base import Needs, State, Statistics, Weighting, WeightingOutput
from moo_balance.weighting.rows import RowWeighting


@dataclass(frozen=True)
class WithConstant(WrappingWeighting):
    r"""Any method, and losses with a constant coefficient that it does not balance.

    .. math:: d = \sum_{i \in B} c_i\, g_i + \sum_{j \notin B} v_j\, g_j

    with the coefficients :math:`c` of the method, which sees only the losses of :math:`B`: their
    names, values and inner products of gradients. It is for terms that are no objectives: weight
    decay as a term, an entropy bonus, an auxiliary regularizer. These may be negative, whatever the
    method needs of the others.

    A constant is relative to the coefficients of the method, which need not sum to K: a constant
    that suits the plain sum is too large by a factor of K around a method whose coefficients sum
    to 1. Around :class:`Rescaled`, ``WithConstant(Rescaled(...), ...)``, constants keep the meaning
    that they have in the plain sum. A method *around* this one (:class:`MovingAverage`,
    :class:`Rescaled`) would change the constants, too.

    In a step without any loss of the method only the constants count. A constant term never counts
    as satisfied (``metrics.satisfied``).

    Coefficients: those of the method, and the constants. The weights reported are likewise. A
    balanced loss may rise, as constant terms may pull against it.

    Args:
        weighting: The method, such as ``NashMTL()``; none that looks at single coordinates of
            gradients or keeps them (``GradDrop``, ``MoCo``, ``SeparateMoments`` and others).
        constants: :math:`v_j` by name, any finite numbers; every loss without one is balanced.

    Raises:
        BalanceValueError: `weighting` is no method, or one of those; a constant is not finite; a
            name is none of the losses, or all of them have constants.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, MGDA, WithConstant
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> method = WithConstant(MGDA(), {"entropy": -0.01})
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), method)
        >>> _ = optimizer.backward({"a": w[0], "b": 2 * w[1], "entropy": w.sum()})
        >>> {name: round(float(c), 2) for name, c in optimizer.metrics.coefficients.items()}
        {'a': 0.8, 'b': 0.2, 'entropy': -0.01}
    """

    weighting: Weighting
    constants: Mapping[str, float]

    def __post_init__(self) -> None:
        check_weighting(self, "weighting", self.weighting)
        copy_mappings(self)
        check_mapping(self, "constants")
        for method in with_nested(self.weighting):
            if isinstance(method, RowWeighting):
                raise BalanceValueError(
                    "Parameter `weighting` of WithConstant should be a method that knows gradients "
                    f"by their inner products. Found {method_name(self.weighting)}, which looks at "
                    "single coordinates or keeps gradients. Add the term to one of the losses."
                )

    # ------------------------------------------------------------ needs and bounds

    def needs(self, step: int) -> Needs:
        needs = self.weighting.needs(step)
        return needs._replace(method=self._around(needs.method))

    def _around(self, method: Weighting) -> WithConstant:
        """The same around the method of a phase; one object for each, by which ranks know it."""
        if method is self.weighting:
            return self
        known = self._phases.get(id(method))
        if known is None or known.weighting is not method:  # as in a copy, where ids are others
            known = self._phases[id(method)] = replace(self, weighting=method)
        return known

    @cached_property
    def _phases(self) -> dict[int, WithConstant]:
        return {}

    @property
    def constant_losses(self) -> Collection[str]:
        return {*self.constants, *self.weighting.constant_losses}

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        bounds = iter(self.weighting.lower_bounds(self._without_constants(names)))
        return [-math.inf if name in self.constants else next(bounds) for name in names]

    @property
    def bound_reason(self) -> str:
        inner = type(self.weighting).__name__
        return f"passes it to {inner}, which {self.weighting.bound_reason}"

    @property
    def bound_advice(self) -> str:
        return self.weighting.bound_advice

    @property
    def leaves_out_satisfied(self) -> bool:
        return self.weighting.leaves_out_satisfied

    def _without_constants(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in self.constants]

    # ------------------------------------------------------------ steps

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("constants", self.constants, names)
        balanced = self._without_constants(names)
        if not balanced:
            raise BalanceValueError(
                "Parameter `constants` of WithConstant should leave a loss to be balanced. Found "
                "a constant for each. If the first batch lacks the others, declare all of them by "
                "`loss_names=[…]` of BalancedOptimizer; if there are none, use FixedWeights."
            )
        positions = _index([name not in self.constants for name in names], device)
        try:
            inner = self.weighting.init(balanced, device)
        except BalanceValueError as error:
            hidden = ", ".join(f"`{name}`" for name in self.constants)
            add_note(error, f"WithConstant hides {hidden} from {method_name(self.weighting)}.")
            raise
        count = len(names)
        full = {k: value.new_zeros((count,) * value.ndim) for k, value in inner.items()}
        return as_inner(replace_entries(full, inner, positions))

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        values = values_by_name(self.constants, statistics.names)
        constants = constants_like(values, statistics.losses)
        if not self._without_constants(statistics.names):
            return WeightingOutput(constants.clone(), constants.clone(), state)
        seen, positions = self._select(statistics)
        before = inner_state(state)
        weights, coefficients, inner = self.weighting.weights(
            seen, select_entries(before, positions)
        )
        return WeightingOutput(
            constants.to(weights.dtype).index_copy(0, positions, weights),
            constants.to(coefficients.dtype).index_copy(0, positions, coefficients),
            {**state, **as_inner(replace_entries(before, inner, positions))},
        )

    def observe(self, statistics: Statistics, state: State) -> State:
        if not self._without_constants(statistics.names):
            return state
        seen, positions = self._select(statistics)
        before = inner_state(state)
        inner = self.weighting.observe(seen, select_entries(before, positions))
        return {**state, **as_inner(replace_entries(before, inner, positions))}

    def _select(self, statistics: Statistics) -> tuple[Statistics, Tensor]:
        """What the method sees of a step, and the positions of its losses."""
        names, losses = statistics.names, statistics.losses
        positions = _index([name not in self.constants for name in names], losses.device)
        gramian, satisfied = statistics.gramian, statistics.satisfied
        seen = statistics._replace(
            names=tuple(self._without_constants(names)),
            losses=losses[positions],
            gramian=None if gramian is None else select_along(gramian, positions),
            satisfied=None if satisfied is None else satisfied[positions],
        )
        return seen, positions


def _index(marks: Sequence[bool], device: torch.device) -> Tensor:
    """Positions of what is marked, on the device; cached, as copying to a device synchronizes."""
    positions = tuple(float(k) for k, mark in enumerate(marks) if mark)
    return constant_vector(positions, torch.int64, device)
