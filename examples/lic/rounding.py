"""Soft rounding of a latent, as stochastic Gumbel annealing does it: SGA and SGA+.

A real number is relaxed to a random mixture of the integers around it. A *score* says how likely an
integer is at a given distance; the mixture is a sample of the Gumbel-softmax over the scores, and
as its temperature falls it becomes one integer, the nearest with ever greater certainty.

Sources: Yang, Bamler & Mandt (NeurIPS 2020, arXiv 2006.04240) for SGA; Perugachi-Diaz, Gansekoele
& Bhulai (NeurIPS 2024, arXiv 2401.17789) for SGA+.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

Score: TypeAlias = Callable[[Tensor], Tensor]
"""Log-probability, up to a constant, of an integer at a distance d ≥ 0; falls with d."""

TINY = 1e-6
"""The least probability of an integer."""


@dataclass(frozen=True)
class Atanh:
    r"""SGA: :math:`-\operatorname{artanh} d`, with :math:`d \le 1 - 10^{-5}`.

    Its probability has an infinite slope at the integers, which is what SGA+ does away with.
    """

    def __call__(self, distance: Tensor) -> Tensor:
        return -distance.clamp(max=1 - 1e-5).atanh()


@dataclass(frozen=True)
class ScaledLogit:
    r"""Sigmoid-scaled logit, SSL(a): :math:`n \log \sigma(-a \operatorname{logit} u)`, u = r d / w.

    Args:
        a: With 1 the probability is the distance to the other integer; more comes closer to
            rounding, and is steep in the middle.
        slope: r.
        power: n.
        width: w, the largest distance there is.
    """

    a: float = 2.3
    slope: float = 1.0
    power: float = 1.0
    width: float = 1.0

    def __call__(self, distance: Tensor) -> Tensor:
        logit = torch.logit(self.slope * distance / self.width, eps=1e-5)
        return self.power * functional.logsigmoid(-self.a * logit).clamp(min=math.log(TINY))


@dataclass(frozen=True)
class Rounding:
    """The integers that a latent may become, and how likely each is.

    With 2 `classes` these are the integers below and above; with 3, the nearest and its neighbours.
    """

    score: Score
    classes: int = 2

    def candidates(self, values: Tensor) -> Tensor:
        """The integers ``[classes, *values.shape]``, without a gradient."""
        below = values.detach().floor() if self.classes == 2 else values.detach().round() - 1
        return torch.stack([below + k for k in range(self.classes)])

    def probabilities(self, values: Tensor) -> Tensor:
        """Probabilities ``[classes, *values.shape]`` at temperature 1; they sum to 1."""
        return self.score((values - self.candidates(values)).abs()).softmax(0)

    def sample(self, values: Tensor, temperature: float) -> Tensor:
        """Draw a soft rounding of ``values`` from torch's global generator.

        The temperature enters twice: it sharpens the probabilities, and it hardens the sample.
        """
        candidates = self.candidates(values)
        scores = self.score((values - candidates).abs())
        gumbel = -torch.empty_like(scores).exponential_().log()
        shares = ((scores / temperature + gumbel) / temperature).softmax(0)
        return (shares * candidates).sum(0)


SGA = Rounding(Atanh())
SGA_PLUS = Rounding(ScaledLogit())
"""The best of its paper's probabilities, with the a = 2.3 of its tables."""

PUBLISHED_STEPS = 2000
"""Iterations of both papers."""


@dataclass(frozen=True)
class Annealing:
    r"""The temperature of step t: :math:`\min(\tau_{max}, \tau_0\, e^{-c (t - t_0)})`.

    Args: `maximum` τ_max > 0, `start` τ₀ > 0, `rate` c ≥ 0 per step, `delay` t₀ in steps.
    """

    maximum: float = 1.0
    start: float = 1.0
    rate: float = 1e-3
    delay: int = 0

    def __call__(self, step: int) -> float:
        return min(self.maximum, self.start * math.exp(-self.rate * (step - self.delay)))


SGA_ANNEALING = Annealing(maximum=0.5, start=0.5, delay=700)
SGA_PLUS_ANNEALING = Annealing()


@dataclass(frozen=True)
class Gumbel:
    """Soft rounding that hardens from step to step."""

    rounding: Rounding
    annealing: Annealing = SGA_PLUS_ANNEALING

    def __call__(self, values: Tensor, step: int) -> Tensor:
        return self.rounding.sample(values, self.annealing(step))
