"""Lagrangian: minimise a loss subject to upper bounds on others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError
from moo_balance.weighting._arguments import (
    check_flag,
    check_mapping,
    check_names,
    check_range,
    constant_state,
    constants_like,
    copy_mappings,
    is_number,
)
from moo_balance.weighting.base import State, Statistics, Weighting, WeightingOutput, state_dtype

Target: TypeAlias = float | Mapping[int, float]
"""A number, or one from each of these steps on."""


@dataclass(frozen=True)
class Lagrangian(Weighting):
    r"""Minimise a loss subject to upper bounds on others: targets in place of weights.

    "Distortion as small as possible with at most 0.2 bpp" is

    .. code-block:: python

        Lagrangian(objective="distortion", targets={"rate": 0.2})

    The problem :math:`\min f` subject to :math:`L_i \le t_i`, with :math:`f = \sum_j w_j L_j`, is
    solved by the augmented Lagrangian with one ascent step on the multipliers in each step. With
    the moving averages :math:`\bar L_i` and :math:`F` of the losses and of
    :math:`\sum_j |w_j L_j|`,

    .. math::
        v_i &= \frac{\bar L_i - t_i}{|t_i|}, \qquad
        \lambda_i = \frac{F}{|t_i|} \max\!\big(0,\ \mu_i + \kappa\, [v_i]_{-1}^{1}\big), \qquad
        d \propto \sum_j w_j\, g_j + \sum_i \lambda_i\, g_i \\
        \mu_i &\leftarrow \max\!\big(0,\ \mu_i + \eta\,\tilde v_i\big), \qquad
        \tilde v_i = \max(v_i, -1)\ \text{ if } v_i \le 1, \quad 1 / v_i\ \text{ if } v_i > 1

    * Where the run settles :math:`v_i = 0`, or :math:`\lambda_i = 0` and :math:`v_i < 0`:
      :math:`\lambda` are the multipliers of the Karush-Kuhn-Tucker conditions. That of a slack
      bound is exactly 0.
    * :math:`\kappa` damps: without it losses and multipliers oscillate. It acts as a quadratic
      penalty on the violation, and as the proportional part of a PI controller, which is the same.
    * No unit matters: violations are relative, and multipliers are in units of :math:`F / |t_i|`,
      where :math:`F` counts as at least a thousandth of its largest value so far: an objective that
      has gone to zero does not free the bounds.
      Scaling the objective, or a loss with its target, changes no direction. A target of 0 is
      compared with the first value of its loss instead. The objective should not be zero at the
      solution: add a constant to one that changes its sign.
    * No wind-up: far above its target a loss adds little to :math:`\mu`, so that multipliers do not
      pile up in the many steps which a run needs to come close at all. If no point satisfies the
      bounds, multipliers grow slowly, and in the end only violated losses count.

    The multipliers of a step follow from losses of the steps before it, and are updated with its
    own losses, as they were before the step. So they do not correlate with the noise of its batch,
    and gradient accumulation needs no gradient per loss. In the first step only the objective
    counts. An absent loss keeps its multiplier.

    *A target that changes*: ``targets={"rate": {0: 0.5, 10_000: 0.2}}`` is 0.5, and 0.2 once 10,000
    steps have been taken. Or load a checkpoint into an optimizer with other targets, which warns
    and continues with the multipliers.

    Coefficients: with `renormalize` divided by :math:`\sum_j w_j + \sum_i \lambda_i`, hence they
    sum to 1 (to less in a batch without any part of the objective, whose :math:`\sum_j w_j` counts
    as 1); without it :math:`w` and :math:`\lambda` themselves. The weights reported are :math:`w`
    and :math:`\lambda` in either case. Where the objective is tiny next to a violated loss steps
    are short, as with every method whose coefficients sum to 1. A loss may rise: one below its
    target is free to.

    Args:
        targets: :math:`t_i` by name, or ``{step: t_i, ...}`` with an entry for step 0.
        objective: The loss to minimise, or several with weights :math:`w_j > 0` by name; it may
            have a target, too. Default None: the sum of all losses that have no target. Where each
            loss has one, any point within the bounds will do, and the coefficients of the first
            step are 0.
        lr: :math:`\eta > 0`. Default 0.01: one step changes :math:`\mu` by no more, so it suits
            runs of thousands of steps. On random quadratics with gradient descent and Adam, with
            noise and without, 0.003 was slow, and 0.03 won where a run takes hundreds of steps.
            (Published values are for violations in their own unit, and differ from problem to
            problem.)
        damping: :math:`\kappa \ge 0`. Default 1: a violation of 100 % weighs as much, in relative
            terms, as the objective. In the same runs 0 oscillated, and 3 was slow with this `lr`.
        beta: Weight of the past in the moving averages. Default 0.9; 0.99 lagged so much that
            multipliers oscillated.
        renormalize: Divide by the sum. Default True: large multipliers then do not multiply the
            learning rate. Without it gradient descent diverged in a quarter of the runs that
            started far from their targets, and Adam took thousands of steps to forget the first
            gradients.

    Raises:
        BalanceValueError: A hyper-parameter is out of range or names no loss, or a loss has neither
            a target nor a part in the objective.

    Source: projected dual ascent and the augmented Lagrangian are textbook material. For deep
    learning: Ramirez et al., *Position: Adopt Constraints Over Penalties in Deep Learning* (2025),
    arXiv 2505.20628; Sohrabi et al., *On PI Controllers for Updating Lagrange Multipliers in
    Constrained Optimization* (ICML 2024); Ramirez & Lacoste-Julien, *Dual Optimistic Ascent (PI
    Control) is the Augmented Lagrangian Method in Disguise* (2025), arXiv 2509.22500. Relative
    violations and their reduction far from the target are of this package.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, Lagrangian
        >>> bits = torch.nn.Parameter(torch.tensor([3.0, 3.0]))
        >>> variances = torch.tensor([4.0, 1.0])
        >>> weighting = Lagrangian(objective="distortion", targets={"rate": 2.0})
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([bits], lr=0.5), weighting)
        >>> for _ in range(1000):
        ...     optimizer.zero_grad()
        ...     distortion = (variances * 4**-bits).sum()
        ...     _ = optimizer.backward({"rate": bits.sum(), "distortion": distortion})
        ...     optimizer.step()
        >>> bits.detach()  # 2 bits in all; equal distortions
        tensor([1.5000, 0.5000])
    """

    uses_losses = False

    targets: Mapping[str, Target]
    objective: str | Mapping[str, float] | None = None
    lr: float = 0.01
    damping: float = 1.0
    beta: float = 0.9
    renormalize: bool = True

    def __post_init__(self) -> None:
        self._copy_targets()
        copy_mappings(self)
        if self.objective is not None and not isinstance(self.objective, str):
            check_mapping(self, "objective", low=0.0, open=True)
        check_range(self, "lr", 0.0, open=True)
        check_range(self, "damping", 0.0)
        check_range(self, "beta", 0.0, below=1.0)
        check_flag(self, "renormalize")

    def init(self, names: Sequence[str], device: torch.device) -> State:
        check_names("targets", self.targets, names)
        objective = self.objective
        if objective is not None:
            mapping = {objective: 1.0} if isinstance(objective, str) else objective
            check_names("objective", mapping, names)
            check_names("objective", {**mapping, **self.targets}, names, complete=True)
        count, dtype = len(names), state_dtype(device)
        return {
            "integral": constant_state(0.0, count, device),
            "mean": constant_state(math.nan, count, device),
            "first": constant_state(math.nan, count, device),
            "scale": torch.full((), math.nan, dtype=dtype, device=device),
            "largest_scale": torch.zeros((), dtype=dtype, device=device),
        }

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        names, losses = statistics.names, statistics.losses.to(state["mean"])
        objective = constants_like(self._objective_weights(names), losses)
        targets = constants_like(self._targets_at(names, statistics.step), losses)
        first = torch.where(state["first"].isnan(), losses.abs(), state["first"])
        units = _choose_units(targets, first)

        multipliers = self._multipliers((state["mean"] - targets) / units, state) / units
        largest = torch.finfo(statistics.losses.dtype).max / (2 * len(names))
        multipliers = multipliers.clamp(max=largest)
        weights = objective + multipliers
        coefficients = weights
        if self.renormalize:
            # Next to an absent objective a small multiplier stays small.
            total = sum(self._objective_weights(names)) or 1.0
            coefficients = weights / (total + multipliers.sum())

        mean = self._average(state["mean"], losses)
        integral = state["integral"] + self.lr * _reduce((mean - targets) / units)
        scale = state["scale"]
        if any(self._objective_weights(names)):
            scale = self._average(scale, (objective * losses).abs().sum())
        integral = integral.clamp(min=0.0)
        following = {
            "integral": integral,
            "mean": mean,
            "first": first,
            "scale": scale,
            "largest_scale": torch.fmax(state["largest_scale"], scale),
        }
        dtype = statistics.losses.dtype
        return WeightingOutput(weights.to(dtype), coefficients.to(dtype), following)

    def _multipliers(self, violations: Tensor, state: State) -> Tensor:
        """The multipliers times their units, from violations that are NaN before the first loss."""
        proportional = self.damping * violations.clamp(-1.0, 1.0).nan_to_num(0.0)
        # Where the objective has gone to zero a bound needs a unit all the same.
        scale = torch.maximum(state["scale"], _LEAST_SCALE * state["largest_scale"])
        return (state["integral"] + proportional).clamp(min=0.0) * scale.nan_to_num(1.0)

    def _average(self, before: Tensor, value: Tensor) -> Tensor:
        return torch.where(before.isnan(), value, before.lerp(value, 1.0 - self.beta))

    def _objective_weights(self, names: Sequence[str]) -> list[float]:
        if self.objective is None:
            return [float(name not in self.targets) for name in names]
        if isinstance(self.objective, str):
            return [float(name == self.objective) for name in names]
        return [float(self.objective.get(name, 0.0)) for name in names]

    def _targets_at(self, names: Sequence[str], step: int) -> list[float]:
        """The targets in force after so many steps; infinity for a loss without one."""
        targets = []
        for name in names:
            target = self.targets.get(name, math.inf)
            if isinstance(target, Mapping):
                target = target[max(start for start in target if start <= step)]
            targets.append(float(target))
        return targets

    def _copy_targets(self) -> None:
        """Copy the mapping of targets and those in it, and refuse what is no target."""
        if not isinstance(self.targets, Mapping):
            check_mapping(self, "targets")
        copied: dict[str, Target] = {}
        for name, target in self.targets.items():
            steps = target if isinstance(target, Mapping) else {0: target}
            valid = all(_is_step(step) and _is_finite(value) for step, value in steps.items())
            if not valid or 0 not in steps:
                raise BalanceValueError(
                    f"Parameter `targets[{name!r}]` of Lagrangian should be a finite number, or "
                    "map steps to finite numbers, one of them step 0. "
                    f"Found {target!r}."
                )
            copied[name] = dict(target) if isinstance(target, Mapping) else target
        object.__setattr__(self, "targets", copied)


_LEAST_SCALE = 1e-3
"""The least unit of a multiplier, relative to the largest one that it has had."""


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _choose_units(targets: Tensor, first: Tensor) -> Tensor:
    """What a violation is relative to: the target; where it is 0 the first loss, or else 1."""
    units = torch.where(targets == 0, first, targets.abs())
    return torch.where(units == 0, 1.0, units)


def _reduce(violations: Tensor) -> Tensor:
    """Relative violations as the integral counts them: less again from above 1 on."""
    far = 1.0 / violations.clamp(min=1.0)
    return torch.where(violations > 1.0, far, violations.clamp(min=-1.0)).nan_to_num(-1.0)
