"""SeparateMoments: one state of the optimizer for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moo_balance.weighting._arguments import check_common, check_names, normalize_preference
from moo_balance.weighting.base import State, Statistics
from moo_balance.weighting.rows import RowWeighting


@dataclass(frozen=True)
class SeparateMoments(RowWeighting):
    r"""Each loss keeps its own state of the wrapped optimizer, and the steps are averaged.

    With :math:`u_i` the step that the wrapped optimizer takes from :math:`\theta` with the gradient
    and the state of one loss,

    .. math:: \theta \leftarrow \theta + \sum_i w_i\, u_i(g_i), \qquad w_i = 1/K

    Adam divides each gradient by the size of the recent ones *of the same loss*, so that no loss
    dominates by its scale: with :class:`~torch.optim.Adam` and :class:`~torch.optim.AdamW` the
    steps do not change, but for epsilon, when a loss is multiplied by a number. Where losses share
    one state, the largest gradient alone sets that size.

    As :math:`\sum_i w_i = 1`, weight decay acts once (with Adam's coupled ``weight_decay``, on each
    loss's moments; :class:`~torch.optim.AdamW` keeps it out of them), and with one loss this is the
    wrapped optimizer, bit for bit. The losses that reach a parameter share its weights among
    themselves: a head has the step of its own loss.

    Coefficients: sum to 1. They make ``.grad``, which hooks, clipping and checks of finite values
    see, but which the steps are not computed from: clipping has no effect here. Micro-batches add
    up within ``accumulate()``.

    A loss may rise.

    Memory: K states of the optimizer, once more during a step, and K gradients between ``backward``
    and ``step``. The states are in the ``"balance"`` entry of ``state_dict()``. That of the wrapped
    optimizer stays as it is; each of them begins with a copy of it, as after a plain run.
    ``torch.distributed.checkpoint`` does not read them into a new optimizer. Step hooks of the
    wrapped optimizer run K times; its options that count steps (schedule-free optimizers) count
    one. SAM and other optimizers with two steps are refused. On an accelerator a step synchronizes.

    Args:
        preference: :math:`w_i` in proportion, by name. Default None, equal (MultiAdam).

    Raises:
        BalanceValueError: `preference` is not positive, or does not fit the losses; from
            :class:`BalancedOptimizer`, when the wrapped optimizer takes two steps.

    Source: Yao et al., *MultiAdam: Parameter-wise Scale-invariant Optimizer for Multiscale Training
    of Physics-informed Neural Networks* (ICML 2023), arXiv 2306.02816, Algorithm 1, there with
    betas of (0.99, 0.99); and *AutoBalance*, arXiv 2510.06684.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, SeparateMoments
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.Adam([w], lr=0.1), SeparateMoments())
        >>> _ = optimizer.backward({"a": w.sum(), "b": 1000 * (w[0] - w[1])})
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.9000, 1.0000])
    """

    steps_apart = True
    leaves_out_satisfied = True

    preference: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_common(self)

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        return super().init(names, device)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        return {"weights": normalize_preference(self.preference, statistics)}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]
