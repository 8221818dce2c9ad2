"""Learning-rate annealing: the largest element of one gradient over the mean of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.weighting._arguments import (
    FloatOrByName,
    check_choice,
    check_common,
    check_names,
    check_range,
    constant_state,
    constants_like,
    values_by_name,
)
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting, rows_of


@dataclass(frozen=True)
class LearningRateAnnealing(RowWeighting):
    r"""Scales the mean element of each gradient to the largest one of a reference, on average.

    With :math:`r` the reference loss, such as the residual of a physics-informed network, and
    :math:`\theta` the compared parameters,

    .. math::
        \hat\lambda_i = \frac{\max_\theta |g_r|}{\operatorname{mean}_\theta |g_i|}, \qquad
        \lambda_i \leftarrow \beta\,\lambda_i + (1 - \beta)\,\hat\lambda_i, \qquad
        d = g_r + \sum_{i \ne r} \frac{p_i}{p_r} \lambda_i\, g_i

    That is the paper. The official code divides by the mean of the gradient of the loss *after* it
    was weighted, :math:`\hat\lambda_i / \lambda_i`, so that its weights settle at the square root
    of the paper's ratio: ``form="code"``. Where the ratio is 100, weights settle at 100 with one
    and at 10 with the other; published results are the code's.

    Maximum and mean are over all compared parameters, which all losses should reach; name those by
    ``shared_params=`` where heads belong to single losses. The official code compares the weight
    matrices without the biases, and takes the mean of their means.

    Coefficients: 1 for the reference; the sum is not fixed. A loss with a zero gradient has the
    coefficient 0 and keeps its :math:`\lambda_i`, as all do where the reference is absent. A loss
    may rise to first order.

    Args:
        reference: The name of the reference loss.
        form: ``"paper"`` (default) or ``"code"``.
        beta: Weight of the past, in [0, 1). Default 0.9 (paper, code; PhysicsNeMo has 0.99, with
            means of both gradients).
        initial: :math:`\lambda_i` before the first update, a number or one per name. Default 1
            (code).
        preference: :math:`p_i > 0` by name. Default None: equal (paper).
        every: Update each n-th step only. Default 10 (paper, code). The code updates after a step,
            for the next one; here, as in the paper, the step itself already uses the result.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Wang, Teng, Perdikaris, *Understanding and Mitigating Gradient Flow Pathologies in
    Physics-informed Neural Networks* (SIAM J. Sci. Comput. 2021), arXiv 2001.04536, Algorithm 1;
    code: PredictiveIntelligenceLab/GradientPathologiesPINNs.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, LearningRateAnnealing
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> rule = LearningRateAnnealing("residual", beta=0.0)
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), rule)
        >>> _ = optimizer.backward({"residual": 9 * w[0], "boundary": w.sum()})
        >>> optimizer.metrics.coefficients
        {'residual': tensor(1.), 'boundary': tensor(9.)}
    """

    uses_magnitudes = True
    leaves_out_satisfied = True

    reference: str
    form: Literal["paper", "code"] = "paper"
    beta: float = 0.9
    initial: FloatOrByName = 1.0
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 10

    def __post_init__(self) -> None:
        check_common(self)
        if not isinstance(self.reference, str):
            raise BalanceValueError(
                "Parameter `reference` of LearningRateAnnealing should be the name of a loss. "
                f"Found {self.reference!r}."
            )
        check_choice(self, "form", ("paper", "code"))
        check_range(self, "beta", 0.0, below=1.0)
        check_range(self, "initial", 0.0, open=True, named=True)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("reference", {self.reference: 1.0}, names)
        check_names("initial", self.initial, names, complete=True)
        check_names("preference", self.preference, names, complete=True)
        like = constant_state(0.0, len(names), device)
        return {"lambda": constants_like(values_by_name(self.initial, names), like).clone()}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        rows, ratios = rows_of(statistics, self), state["lambda"]
        assert rows.largest is not None and rows.mean is not None
        mean = rows.mean.to(ratios)
        moving = mean > 0
        if self.reference in statistics.names:
            largest = rows.largest[statistics.names.index(self.reference)].to(ratios)
            if self.form == "code":
                mean = mean * ratios
            new = ratios.lerp((largest / mean).nan_to_num(), 1.0 - self.beta)
            ratios = torch.where(moving & (largest > 0), new, ratios)
        state = {"lambda": ratios}
        weights = self._weights(statistics, state)
        return {**state, "weights": weights * moving.to(weights.dtype)}

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": self._weights(statistics, state)}

    def _weights(self, statistics: Statistics, state: State) -> Tensor:
        names, weights, dtype = statistics.names, state["lambda"], statistics.losses.dtype
        if self.preference is not None:
            whole = self.preference[self.reference]
            shares = [value / whole for value in values_by_name(self.preference, names)]
            weights = weights * constants_like(shares, weights)
        weights = weights.clamp(max=torch.finfo(dtype).max)
        if self.reference in names:
            weights[names.index(self.reference)] = 1.0
        return weights.to(dtype)
