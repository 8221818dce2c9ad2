"""GradientNorms: weighted gradients of given lengths, the rule that practice uses most."""

from __future__ import annotations

import math
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
    normalize_preference,
    relative_preference,
    values_by_name,
)
from moo_balance.weighting.base import GramianWeighting, State, Statistics, state_dtype


@dataclass(frozen=True)
class GradientNorms(GramianWeighting):
    r"""Scales each gradient to its share of a common length.

    With :math:`n_i` the norm of :math:`g_i`, :math:`\bar n_i` its moving average, shares
    :math:`q_i` and a reference length :math:`\rho`,

    .. math::
        w_i = q_i\,\lambda_i, \qquad
        \lambda_i = \min\Big(\frac{\rho}{\bar n_i + \epsilon + \delta\rho},\ m\Big), \qquad
        d = \sum_i w_i g_i

    =============  ============================================  ==================================
    `reference`    :math:`\rho`                                  :math:`q_i`
    =============  ============================================  ==================================
    ``"mean"``     the mean of :math:`\bar n`                    :math:`p_i`, scaled to mean 1
    ``"total"``    the sum of :math:`\bar n`                     :math:`p_i`, scaled to mean 1
    a loss's name  :math:`\bar n_r` of this loss, whose weight   :math:`p_i / p_r`
                   is exactly 1
    a number       that number                                   :math:`p_i`, scaled to sum 1
    =============  ============================================  ==================================

    Instead of the norms, ``smooth="weights"`` averages :math:`\lambda`. The two differ: an average
    of inverse norms follows the shortest gradients, the inverse of an average the longest.

    Norms are those of the gradients of all parameters, of ``shared_params=`` if the optimizer has
    them (such as one layer), or those at ``features=``. Only the diagonal of the Gramian is used,
    which changes slowly, so that ``every=10`` or more costs little accuracy and makes the method
    nearly free.

    Presets: :meth:`jaxpi`, :meth:`pina`, :meth:`vqgan`, :meth:`encodec`.

    Coefficients: the weighted gradients are together as long as the plain ones (``"mean"``), K
    times that (``"total"``), or as long as a number that was given. A loss with a zero gradient has
    the coefficient 0 and counts in no mean; one that no measurement has met yet has
    :math:`\lambda_i = 1`.

    A loss may rise to first order if there are more than two, or if shares are unequal or norms are
    averaged.

    Args:
        reference: One of the above. A loss is named by its name, other than "mean" and "total".
            Default ``"mean"`` (jaxpi's code; its paper prints, and PINA computes, the total).
        beta: Weight of the past in the moving average, in [0, 1). Default 0.9 (jaxpi; EnCodec has
            0.999, PINA and VQGAN 0). The average starts without bias, as Adam's does (EnCodec), for
            each loss when it is first met.
        smooth: What is averaged: ``"norms"`` (default, EnCodec) or ``"weights"`` (jaxpi).
        initial: :math:`\lambda` from which ``smooth="weights"`` starts, a number or one per name
            (jaxpi: 1), instead of a start without bias. Default None.
        eps: :math:`\epsilon \ge 0`, in units of the norms (VQGAN: 1e-4). Default 0, so that no unit
            matters.
        relative_eps: :math:`\delta \ge 0`, a fraction of the reference (jaxpi: 1e-5). Default 0.
        max_weight: :math:`m > 0`, the largest :math:`\lambda` (VQGAN: 1e4). Default None.
        preference: :math:`p_i > 0` by name. Default None: equal.
        every: Measure each n-th step only. Default 1; jaxpi has 1000.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss.

    Source: Wang et al., *An Expert's Guide to Training Physics-informed Neural Networks*
    (arXiv 2308.08468), Algorithm 1; Esser et al., *Taming Transformers* (CVPR 2021), Eq. 7;
    Défossez et al., *High Fidelity Neural Audio Compression* (TMLR 2023), Eq. 5.

    Example:
        >>> import torch
        >>> from moo_balance import GradientNorms
        >>> from moo_balance.weighting import Statistics
        >>> statistics = Statistics(("a", "b"), torch.ones(2), torch.diag(torch.tensor([1.0, 9.0])))
        >>> rule = GradientNorms()
        >>> state = rule.init(("a", "b"), torch.device("cpu"))
        >>> rule.weights(statistics, state).coefficients
        tensor([2.0000, 0.6667])
    """

    reference: str | float = "mean"
    beta: float = 0.9
    smooth: Literal["norms", "weights"] = "norms"
    initial: FloatOrByName | None = None
    eps: float = 0.0
    relative_eps: float = 0.0
    max_weight: float | None = None
    preference: Mapping[str, float] | None = field(default=None, kw_only=True)
    every: int = 1

    @classmethod
    def jaxpi(
        cls,
        *,
        reference: Literal["mean", "total"] = "mean",
        beta: float = 0.9,
        initial: FloatOrByName = 1.0,
        preference: Mapping[str, float] | None = None,
        every: int = 1000,
    ) -> GradientNorms:
        """The "grad_norm" weights of the jaxpi library: an average of weights, from initial ones.

        ``reference="total"`` is what its paper prints. The library measures after a step, for the
        next one; here the step that measures already uses the result.
        """
        return cls(
            reference,
            beta,
            "weights",
            initial,
            relative_eps=1e-5,
            preference=preference,
            every=every,
        )

    @classmethod
    def pina(
        cls,
        *,
        beta: float = 0.0,
        preference: Mapping[str, float] | None = None,
        every: int = 1,
    ) -> GradientNorms:
        r"""PINA's self-adaptive weights, :math:`\sum_j n_j / n_i`.

        With `beta` they are averaged from 1 on. PINA's NTK weights do so with 0.5, but are
        *proportional* to the norms, against the paper that they cite; these are not. PINA counts
        epochs, `every` counts steps.
        """
        initial = 1.0 if beta else None
        return cls("total", beta, "weights", initial, preference=preference, every=every)

    @classmethod
    def vqgan(
        cls,
        reference: str,
        *,
        preference: Mapping[str, float] | None = None,
        eps: float = 1e-4,
        max_weight: float = 1e4,
        every: int = 1,
    ) -> GradientNorms:
        """VQGAN's adaptive weight of the generator's loss; the loss `reference` keeps weight 1.

        The code measures at the last layer of the decoder: give the optimizer
        ``shared_params=[layer.weight]``. The discriminator's weight of 0.8 is
        ``preference={"nll": 1, "generator": 0.8}``. A loss whose weight should stay 1 and that does
        not reach this layer, such as the codebook's, is added to the reference loss. `eps` is in
        units of the norms: 0 makes the rule independent of them.
        """
        return cls(
            reference, 0.0, eps=eps, max_weight=max_weight, preference=preference, every=every
        )

    @classmethod
    def encodec(
        cls,
        preference: Mapping[str, float] | None = None,
        *,
        total_norm: float = 1.0,
        beta: float = 0.999,
        every: int = 1,
    ) -> GradientNorms:
        """EnCodec's balancer: shares of a total norm that is given.

        The library measures at the decoder's output: pass it as ``features=``. By default it
        averages the norms of the single samples of a batch; this takes the norm over the batch.
        """
        return cls(total_norm, beta, preference=preference, every=every)

    def __post_init__(self) -> None:
        check_common(self)
        if not isinstance(self.reference, str):
            check_range(self, "reference", 0.0, open=True, text="mean")
        check_range(self, "beta", 0.0, below=1.0)
        check_choice(self, "smooth", ("norms", "weights"))
        check_range(self, "eps", 0.0)
        check_range(self, "relative_eps", 0.0)
        if self.max_weight is not None:
            check_range(self, "max_weight", 0.0, open=True)
        if self.initial is not None:
            check_range(self, "initial", 0.0, named=True)
            if self.smooth == "norms":
                raise BalanceValueError(
                    'Parameter `initial` of GradientNorms should come with smooth="weights", '
                    f'which averages weights. Found {self.initial!r} and smooth="norms".'
                )

    leaves_out_satisfied = True

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("preference", self.preference, names, complete=True)
        check_names("initial", self.initial, names, complete=True)
        average = constant_state(0.0, len(names), device)
        weight = constant_state(0.0 if self.initial is None else 1.0, len(names), device)
        if self.initial is not None:
            average = constants_like(values_by_name(self.initial, names), average).clone()
        state = {"average": average, "average_weight": weight}
        if self._reference_loss is not None:
            check_names("reference", {self._reference_loss: 1.0}, names)
            state["reference"] = torch.full((), math.nan, dtype=state_dtype(device), device=device)
        return state

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        norms = gramian.diagonal().to(state["average"].dtype).clamp(min=0.0).sqrt()
        measured = (norms > 0).to(norms.dtype)
        values, counted = norms, measured
        if self.smooth == "weights":
            length = self._reference_length(norms, measured, statistics, state)
            values = self._ratios(norms, length)
            # Not measured either: what refers to a loss that has not been met yet.
            counted = measured * (values < math.inf)
            values = values.nan_to_num()
        rate = counted * (1.0 - self.beta)
        state = {
            **state,
            "average": state["average"].lerp(values, rate),
            "average_weight": state["average_weight"].lerp(counted, rate),
        }
        if self._reference_loss is not None:
            if self.smooth == "norms":
                length = self._reference_length(_debias(state), measured, statistics, state)
            state["reference"] = length
        weights = self._weights(statistics, state, measured)
        return {**state, "weights": weights * measured.to(weights.dtype)}

    def keep(self, statistics: Statistics, state: State) -> State:
        met = state["average_weight"] > 0
        if statistics.satisfied is not None:
            met = met & ~statistics.satisfied
        return {"weights": self._weights(statistics, state, met.to(state["average"].dtype))}

    @property
    def _reference_loss(self) -> str | None:
        """The loss whose norm is the reference, if one is."""
        given = self.reference
        return given if isinstance(given, str) and given not in ("mean", "total") else None

    def _reference_length(
        self, norms: Tensor, counted: Tensor, statistics: Statistics, state: State
    ) -> Tensor:
        """The length that shares refer to, from norms [K]; NaN if it is not known.

        `counted` is 1 for the losses that count, and 0 for others.
        """
        if not isinstance(self.reference, str):
            return norms.new_full((), self.reference)
        if self._reference_loss is not None:
            if self._reference_loss not in statistics.names:
                return state["reference"]
            position = statistics.names.index(self._reference_loss)
            return torch.where(counted[position] > 0, norms[position], state["reference"])
        total = norms.dot(counted)
        return total if self.reference == "total" else total / counted.sum()

    def _ratios(self, norms: Tensor, length: Tensor) -> Tensor:
        if self.eps or self.relative_eps:
            norms = norms + (self.eps + self.relative_eps * length)
        ratios = length / norms
        return ratios if self.max_weight is None else ratios.clamp(max=self.max_weight)

    def _weights(self, statistics: Statistics, state: State, counted: Tensor) -> Tensor:
        ratios = _debias(state)
        if self.smooth == "norms":
            length = self._reference_length(ratios, counted, statistics, state)
            ratios = self._ratios(ratios, length)
        # What has not been met, or refers to what has not been.
        ratios = ratios.masked_fill(state["average_weight"] == 0, 1.0).nan_to_num_(nan=1.0)
        shares = self._shares(statistics)
        if shares is not None:
            ratios = ratios * shares.to(ratios)
        if self._reference_loss in statistics.names:
            ratios[statistics.names.index(self._reference_loss)] = 1.0
        dtype = statistics.losses.dtype
        if dtype != ratios.dtype:
            ratios.clamp_(max=torch.finfo(dtype).max)
        return ratios.to(dtype)

    def _shares(self, statistics: Statistics) -> Tensor | None:
        """What ratios are multiplied by, shape [K]; None for ones."""
        if not isinstance(self.reference, str):
            return normalize_preference(self.preference, statistics)
        if self.preference is None:
            return None
        if self._reference_loss is None:
            return relative_preference(self.preference, statistics)
        whole = self.preference[self._reference_loss]
        values = values_by_name(self.preference, statistics.names)
        return constants_like([value / whole for value in values], statistics.losses)


def _debias(state: State) -> Tensor:
    """The moving averages [K]; 0 for a loss that no measurement has met yet."""
    return (state["average"] / state["average_weight"]).nan_to_num_()
