"""The gradients of a Gramian apart from their lengths, as the exact solvers read them."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moo_balance.functional._checks import refuse_nonfinite, relative_scales

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


class Directions(NamedTuple):
    """Squared norms [K] as they were given, norms [K] and cosines [K, K], in float64."""

    squares: Array
    norms: Array
    cosines: Array


def directions(gramian: Tensor, scales: Tensor | None = None) -> Directions:
    """Read a square Gramian, with one copy to the host; refuse what is not finite.

    With `scales`, norms are those of the gradients divided by them, up to a common factor.
    As in :func:`~moo_balance.functional.cosine_similarity`, a zero gradient has cosine 0.
    """
    gramian = gramian.detach()
    if scales is not None and not gramian.is_cpu:  # both in one copy
        both = torch.cat([gramian, scales.detach()[None]]).to("cpu", torch.float64)
        gramian, scales = both[:-1], both[-1]
    host: Array = gramian.to("cpu", torch.float64).numpy()
    if not np.isfinite(host).all():
        refuse_nonfinite(host.tolist())
    squares = host.diagonal()
    norms = np.sqrt(np.maximum(squares, 0.0))
    divisors = norms if norms.all() else np.where(norms == 0.0, np.inf, norms)
    cosines = host / divisors[:, None] / divisors
    cosines = np.minimum(np.maximum((cosines + cosines.T) / 2, -1.0), 1.0)
    cosines.ravel()[:: len(cosines) + 1] = 1.0
    if scales is not None:
        norms = norms * relative_scales(scales).to("cpu", torch.float64).numpy()
    return Directions(squares, norms, cosines)
