"""The two entropy models of a hyperprior: probabilities of the symbols of ``z`` and of ``y``.

Formulas, parameters and state dict keys are those of CompressAI 1.2.8, except that differences of
distribution functions are taken in the lower tail, where they keep their digits.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.lic.gdn import LowerBound

SCALE_FLOOR = 0.11
"""Smallest standard deviation of the Gaussian model; below it every symbol is zero anyway."""

LIKELIHOOD_FLOOR = 1e-9
"""Smallest probability of a symbol; bounds its cost at 30 bits and keeps the logarithm finite."""

TAIL_MASS = 1e-9
"""What lies outside the outer quantiles of :class:`EntropyBottleneck`, both sides together."""

INITIAL_SCALE = 10.0
"""Width of a fresh :class:`EntropyBottleneck`'s distributions; its outer quantiles start there."""

FILTERS = (1, 3, 3, 3, 3, 1)
"""Units of each layer of :class:`EntropyBottleneck`'s network, input and output included."""


class _EntropyModel(nn.Module):
    """A module with the buffers that CompressAI's entropy models have in their state dicts.

    The tables of its coder depend on the parameters and would be out of date after training: here
    they are always empty, and its ``update()`` fills them.
    """

    tables = dict.fromkeys(("_offset", "_quantized_cdf", "_cdf_length"), torch.int32)

    def __init__(self) -> None:
        super().__init__()
        self.likelihood_lower_bound = LowerBound(LIKELIHOOD_FLOOR)
        for name, dtype in self.tables.items():
            self.register_buffer(name, torch.empty(0, dtype=dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.tables:
            if prefix + name in state_dict:
                state_dict[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class EntropyBottleneck(_EntropyModel):
    r"""A distribution of its own for each channel, given by its distribution function.

    .. math::
        F(x) = \sigma(f_5 \circ \dots \circ f_1(x)), \qquad
        f_k(x) = u + \tanh(a_k) \odot \tanh(u), \quad u = \mathrm{softplus}(H_k)\, x + b_k

    without the :math:`\tanh` in the last layer (Ballé et al., ICLR 2018, arXiv 1802.01436,
    appendix 6.1). :math:`H_k`, :math:`b_k` and :math:`a_k` are ``matrices``, ``biases`` and
    ``factors``. ``quantiles`` ``[N, 1, 3]`` are fitted to F by :meth:`loss` and reached by nothing
    else: the points below which it has a mass of :data:`TAIL_MASS` / 2, ½ and 1 − TAIL_MASS / 2.

    Args:
        channels: Number `N` of distributions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = list(pairwise(FILTERS))
        scale = INITIAL_SCALE ** (1 / len(layers))
        self.matrices = nn.ParameterList(
            torch.full((channels, out, into), math.log(math.expm1(1 / scale / out)))
            for into, out in layers
        )
        self.biases = nn.ParameterList(torch.rand(channels, out, 1) - 0.5 for _, out in layers)
        self.factors = nn.ParameterList(torch.zeros(channels, out, 1) for _, out in layers[:-1])
        outer = torch.tensor([-INITIAL_SCALE, 0.0, INITIAL_SCALE])
        self.quantiles = nn.Parameter(outer.repeat(channels, 1, 1))
        logit = math.log(2 / TAIL_MASS - 1)
        self.register_buffer("target", torch.tensor([-logit, 0.0, logit]))

    @property
    def medians(self) -> Tensor:
        """The fitted medians ``[N, 1, 1]``, around which latents are rounded."""
        return self.quantiles[:, :, 1:2]

    def loss(self) -> Tensor:
        """The auxiliary loss: how far, in logits, the quantiles are from their masses; 0-d."""
        return (self._logits(self.quantiles, fixed=True) - self.target).abs().sum()

    def forward(self, values: Tensor, step: Tensor | float = 1.0) -> Tensor:
        """Probability of the interval of width `step` around each value ``[B, N, H, W]``."""
        batch, channels, height, width = values.shape
        rows = values.transpose(0, 1).reshape(channels, 1, -1)
        likelihood = self.likelihood_lower_bound(self._mass(rows, step))
        return likelihood.view(channels, batch, height, width).transpose(0, 1)

    def probabilities(self, largest: int, step: Tensor | float = 1.0) -> Tensor:
        """Probabilities ``[N, 2 · largest + 1]`` of ``median + k · step``, |k| ≤ `largest`."""
        medians = self.medians
        symbols = torch.arange(-largest, largest + 1, dtype=medians.dtype, device=medians.device)
        return self._mass(medians + step * symbols, step)[:, 0]

    def _mass(self, rows: Tensor, step: Tensor | float) -> Tensor:
        """F(x + step / 2) − F(x − step / 2) of rows ``[N, 1, n]``."""
        ends = torch.cat([rows - step / 2, rows + step / 2], dim=-1)
        lower, upper = self._logits(ends).chunk(2, dim=-1)
        # σ(u) − σ(l) = σ(−l) − σ(−u): of the two, the one whose terms are small.
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        return sign * (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower))

    def _logits(self, rows: Tensor, *, fixed: bool = False) -> Tensor:
        """Logits of F at rows ``[N, 1, n]``; no gradient reaches F if it is `fixed`."""
        with torch.autocast(rows.device.type, enabled=False):
            for layer, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
                matrix, bias = (p.detach() if fixed else p for p in (matrix, bias))
                rows = functional.softplus(matrix) @ rows + bias
                if layer < len(self.factors):
                    factor = self.factors[layer]
                    rows = rows + torch.tanh(factor.detach() if fixed else factor) * rows.tanh()
            return rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Older checkpoints of CompressAI call matrices.0 _matrix0.
        old = {"_matrix": "matrices", "_bias": "biases", "_factor": "factors"}
        for name in [key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)]:
            if name[:-1] in old:
                new = f"{prefix}{old[name[:-1]]}.{name[-1]}"
                state_dict[new] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class GaussianConditional(_EntropyModel):
    """A zero-mean Gaussian with a scale of its own for each value.

    Scales below :data:`SCALE_FLOOR` are replaced by it.
    """

    tables = _EntropyModel.tables | {"scale_table": torch.float32}

    def __init__(self) -> None:
        super().__init__()
        self.lower_bound_scale = LowerBound(SCALE_FLOOR)
        self.register_buffer("scale_bound", torch.tensor([SCALE_FLOOR]))

    def forward(self, centered: Tensor, scale: Tensor) -> Tensor:
        """Probability of the unit interval around each value, minus its mean."""
        distance, scale = centered.abs(), self.lower_bound_scale(scale)
        # By symmetry both ends may be moved to the lower tail, where the difference keeps its
        # digits.
        mass = _normal_cdf((0.5 - distance) / scale) - _normal_cdf((-0.5 - distance) / scale)
        return self.likelihood_lower_bound(mass)


def _normal_cdf(values: Tensor) -> Tensor:
    # torch.special.ndtr is 1 + erf, which loses the lower tail.
    return 0.5 * torch.erfc(values * -(2**-0.5))
