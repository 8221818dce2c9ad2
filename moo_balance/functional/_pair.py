"""Two gradients as Python's floats, which closed forms take instead of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moo_balance.functional._checks import refuse_nonfinite


class Pair(NamedTuple):
    """Norms of two gradients and the cosine between them, 0 where one of them is zero."""

    first: float
    second: float
    cosine: float


def read_pair(gramian: Tensor) -> Pair:
    """Read a Gramian [2, 2]; refuse what is not finite. Synchronizes on an accelerator."""
    (first, cross), (mirrored, second) = rows = gramian.tolist()
    if not math.isfinite(first / 4 + cross / 4 + mirrored / 4 + second / 4):
        refuse_nonfinite(rows)
    first, second = math.sqrt(max(first, 0.0)), math.sqrt(max(second, 0.0))
    if first == 0.0 or second == 0.0:
        return Pair(first, second, 0.0)
    # Two divisions: the product of two norms may leave the range of a float64.
    cosine = (cross / 2 + mirrored / 2) / first / second
    return Pair(first, second, min(max(cosine, -1.0), 1.0))


def add_multiples(pair: Pair, first: float, second: float, shares: Sequence[float]) -> list[float]:
    """Coefficients of two gradients in a weighted sum of both, corrected.

    The first one got `first` times its norm of the direction of the second, and the second one
    likewise.
    """
    one, other, _ = pair
    if one == 0.0 or other == 0.0:
        return list(shares)
    return [
        shares[0] + shares[1] * second * (other / one),
        shares[1] + shares[0] * first * (one / other),
    ]
