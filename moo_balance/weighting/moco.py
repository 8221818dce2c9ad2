"""MoCo: the min-norm direction of gradients that are averaged over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.functional._projected_descent import projected_descent
from moo_balance.weighting._arguments import (
    advise,
    check_choice,
    check_common,
    check_names,
    check_range,
    constants_like,
    values_by_name,
)
from moo_balance.weighting._shares import initial_weights, present_weights
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting, rows_of


@dataclass(frozen=True)
class MoCo(RowWeighting):
    r"""Multi-objective gradient correction: averaged gradients, and weights that learn on them.

    Each loss has a tracked gradient :math:`y_i` (zero at the start), a row of :math:`Y`, and the
    weights take one projected gradient step towards the min-norm point of these rows:

    .. math::
        Y &\leftarrow \beta\,Y + (1 - \beta)\,G \\
        \lambda &\leftarrow \Pi_\Delta\big(\lambda - \gamma\,(Y Y^\top + \rho I)\,\lambda\big),
        \qquad d = Y^\top \lambda

    Weights that are solved for on the gradients of one batch, as :class:`MGDA` does, depend on the
    very noise that they are multiplied by, which biases the direction; tracked gradients remove
    that. :math:`\Pi_\Delta` is the projection (LibMTL takes a softmax, which pulls all weights
    towards equal ones: with two losses none exceeds 0.73).

    Coefficients: sum to 1. They multiply the tracked gradients, not those of the batch.

    A loss may rise: tracked gradients lag, and the weights approach their solution slowly.

    Memory: :math:`Y`, as large as all gradients, and once more between ``backward`` and ``step``.

    Args:
        beta: :math:`\beta \in [0, 1)`, the weight of the past. Default 0.5 (LibMTL, which lets the
            weight of the present, 0.5, shrink with the step; the official code has 0.01 for NYUv2
            and 0.95, growing with the epoch, for Cityscapes).
        lr: :math:`\gamma > 0`. Default 0.1 (official code; LibMTL starts from it).
        rho: :math:`\rho \ge 0`, which pulls towards equal weights. Default 0 (LibMTL).
        length: Track the gradients as they are (``"gradient"``), or each rescaled to the value of
            its loss as its length, :math:`L_i\,g_i / \lVert g_i \rVert` (``"loss"``). Default
            ``"gradient"`` (paper; the official code and LibMTL rescale). As :math:`\gamma` has
            the unit of an inverse squared gradient, rescaling makes it comparable between models.
        preference: How much each loss should improve in proportion to the others, by name: the
            weights are those of the rows :math:`y_i / p_i`, from :math:`\lambda \propto p_i^2` on,
            and the coefficients :math:`\lambda_i / p_i`, divided by their sum. Default None, equal.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses; from
            ``backward``, when a loss is negative with ``length="loss"``.

    Source: Fernando et al., *Mitigating Gradient Bias in Multi-objective Learning: A Provably
    Convergent Approach* (ICLR 2023), Algorithm 1.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, MoCo
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), MoCo(beta=0.0, lr=0.01))
        >>> _ = optimizer.backward({"a": w[0] ** 2, "b": 2 * w[1] ** 2})
        >>> {name: round(float(weight), 3) for name, weight in optimizer.metrics.weights.items()}
        {'a': 0.53, 'b': 0.47}
    """

    keeps = "tracked"
    combines = "kept"
    leaves_out_satisfied = True

    beta: float = 0.5
    lr: float = 0.1
    rho: float = 0.0
    length: Literal["gradient", "loss"] = "gradient"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "beta", 0.0, below=1.0)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "rho", 0.0)
        check_choice(self, "length", ("gradient", "loss"))

    bound_reason = "takes it as the length of its gradient"

    @property
    def bound_advice(self) -> str:
        return advise(self, '`length="gradient"`')

    def lower_bounds(self, names: Sequence[str]) -> list[float]:
        return [0.0] * len(names) if self.length == "loss" else super().lower_bounds(names)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        preference = self.preference and {name: p**2 for name, p in self.preference.items()}
        return {"learned": initial_weights(preference, names, device)}

    def row_factors(self, statistics: Statistics) -> Tensor | None:
        if self.length == "gradient":
            return None
        assert statistics.gramian is not None
        norms = statistics.gramian.diagonal().sqrt()
        return torch.where(norms > 0, statistics.losses / norms, 0.0)

    def track(self, kept: Tensor, gradient: Tensor) -> Tensor:
        return kept.lerp(gradient, 1.0 - self.beta)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        tracked = rows_of(statistics, self).gramian
        assert tracked is not None
        weights, mass = present_weights(state["learned"], statistics.satisfied)
        tracked = tracked.to(weights)
        if self.preference is not None:
            inverse = self._inverse_preference(statistics.names, weights)
            tracked = tracked * inverse.unsqueeze(1) * inverse
        following = projected_descent(
            tracked,
            torch.zeros_like(weights),
            weights,
            self.lr,
            ridge=self.rho,
            left_out=statistics.satisfied,
        )
        # The present losses share what they hold; that of absent ones is kept for them.
        return {"weights": following, "learned": following * mass}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        weights = state["weights"]
        if self.preference is not None:
            weights = weights * self._inverse_preference(statistics.names, weights)
            weights = weights / weights.sum()
        return weights.to(statistics.losses)

    def _inverse_preference(self, names: Sequence[str], like: Tensor) -> Tensor:
        """In proportion to the mean of all losses, so that a step does not depend on the unit."""
        assert self.preference is not None
        mean = sum(self.preference.values()) / len(self.preference)
        return constants_like([mean / p for p in values_by_name(self.preference, names)], like)
