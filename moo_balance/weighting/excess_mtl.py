"""ExcessMTL: more weight for losses that are still far from their optimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moo_balance.weighting._arguments import (
    check_common,
    check_names,
    check_range,
    check_whole,
    constant_state,
    values_by_name,
)
from moo_balance.weighting._reduction import Reduction, check_reduction
from moo_balance.weighting._shares import count_others
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting, rows_of


@dataclass(frozen=True)
class ExcessMTL(RowWeighting):
    r"""Robust multi-task learning with excess risks: the losses that can still fall get the weight.

    The excess risk of a loss, its distance to the least value that it could have, is estimated by
    a second-order expansion with the diagonal curvature of AdaGrad, in units of its first value:

    .. math::
        S_i \leftarrow S_i + g_i^2, \qquad
        r_i = \sum \frac{g_i^2}{\sqrt{S_i}}, \qquad
        w_i \propto w_i\, e^{\eta\, r_i / r_i^{(0)}}, \qquad
        d = \sum_i w_i\, g_i

    where :math:`S_i` and the sum are over single coordinates. A loss that cannot be learned, as one
    with noisy labels, has a large value but a small excess risk, and does not take over.

    :math:`r_i^{(0)}` is the mean over the first `warmup_steps` steps of a loss, in which its weight
    stays. The codes add 1e-7 to :math:`S` and to :math:`r^{(0)}`; here a coordinate, or a loss,
    that never had a gradient counts as having none, so that units do not matter. They keep
    :math:`S`; we keep its root, which neither over- nor underflows.

    Coefficients: sum to 1 (K for ``"sum"``).

    A loss may rise.

    Memory: the roots, as large as all gradients, and once more between ``backward`` and ``step``.

    Args:
        lr: :math:`\eta > 0`. Default 0.01 (official code and LibMTL; TorchJD has 1).
        warmup_steps: Steps whose mean is the unit of a loss, a whole number ≥ 1. Default 1
            (official code and LibMTL; the paper, Appendix C.1, has the steps of 3 epochs). In
            TorchJD it is ``n_warmup_steps``, whose 0 applies the first risk in the units of the
            loss.
        reduction: Weights that sum to 1 (``"mean"``) or to K (``"sum"``). Default ``"mean"`` (paper
            and TorchJD; the official code and LibMTL begin with ones).
        preference: Shares at the start, by name. Default None, equal.
        every: Track the gradients and move the weights each n-th step only. Default 1.

    Raises:
        BalanceValueError: A hyper-parameter is out of range, or does not fit the losses.

    Source: He et al., *Robust Multi-Task Learning with Excess Risks* (ICML 2024), Equations 6-9.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, ExcessMTL
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), ExcessMTL(lr=1.0))
        >>> for _ in range(3):
        ...     _ = optimizer.step(lambda: {"a": w[0] ** 2, "b": 0.1 * w[1] ** 2})
        >>> {name: round(float(weight), 2) for name, weight in optimizer.metrics.weights.items()}
        {'a': 0.44, 'b': 0.56}
    """

    keeps = "root"
    uses_total = True
    leaves_out_satisfied = True

    lr: float = 0.01
    warmup_steps: int = 1
    reduction: Reduction = "mean"
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    def __post_init__(self) -> None:
        check_common(self)
        check_range(self, "lr", 0.0, open=True)
        check_whole(self, "warmup_steps", 1)
        check_reduction(self)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        logits = constant_state(0.0, len(names), device)
        if self.preference is not None:
            logits = logits.new_tensor(values_by_name(self.preference, names)).log()
        zeros = constant_state(0.0, len(names), device)
        return {"logits": logits, "counts": zeros, "first": zeros.clone()}

    def track(self, kept: Tensor, gradient: Tensor) -> Tensor:
        return torch.hypot(kept, gradient)

    def summand(self, kept: Tensor, gradient: Tensor) -> Tensor:
        magnitude = gradient.abs()
        return torch.where(kept > 0, magnitude * (magnitude / kept), 0.0)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        risks, counts = rows_of(statistics, self).total, state["counts"]
        assert risks is not None
        risks = risks.to(counts)
        warms_up = counts < self.warmup_steps
        first = torch.where(warms_up, state["first"] + risks / self.warmup_steps, state["first"])
        relative = torch.where(warms_up, 0.0, risks / first)
        logits = state["logits"] + self.lr * relative
        # A loss without a gradient has no unit yet.
        counts = counts + (warms_up & (risks > 0))
        return {"logits": logits, "counts": counts, "first": first, **_weights(statistics, logits)}

    def keep(self, statistics: Statistics, state: State) -> State:
        return _weights(statistics, state["logits"])

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        weights = state["weights"].to(statistics.losses)
        return weights if self.reduction == "mean" else weights * count_others(statistics)


def _weights(statistics: Statistics, logits: Tensor) -> State:
    if statistics.satisfied is not None:
        logits = logits.masked_fill(statistics.satisfied, -torch.inf)
    return {"weights": torch.softmax(logits, 0)}
