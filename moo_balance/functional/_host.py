"""A Gramian on the host, as the exact solvers read it."""

from __future__ import annotations

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from moo_balance.functional._checks import check_finite, refuse_entries
from moo_balance.functional._matrix import FEW, Few, Many, Matrix, Vector
from moo_balance.functional.gramian import cosine_similarity


class Directions(NamedTuple):
    """The gradients apart from their lengths: squared norms as they were found, norms, cosines."""

    squares: Vector
    norms: Vector
    cosines: Matrix


def directions(gramian: Tensor) -> Directions:
    """Read a square Gramian, with one copy to the host; refuse what is not finite.

    As in :func:`~moo_balance.functional.cosine_similarity`, a zero gradient has cosine 0.
    """
    if len(gramian) > FEW:
        host = gramian.detach().to("cpu", torch.float64)
        check_finite(host)
        squares = host.diagonal().tolist()
        return Directions(squares, _norms(squares), Many(cosine_similarity(host).numpy()))
    rows = finite_rows(gramian)
    squares = [row[i] for i, row in enumerate(rows)]
    norms = _norms(squares)
    return Directions(squares, norms, Few(_cosines(rows, norms)))


def finite_rows(gramian: Tensor) -> list[Vector]:
    """The entries of a small Gramian, refused unless all are finite."""
    rows: list[Vector] = gramian.tolist()
    # The sum of finite entries may overflow, so it only says when all is well.
    if not math.isfinite(sum(map(sum, rows))) and not all(map(math.isfinite, chain(*rows))):
        refuse_entries(rows)
    return rows


def _norms(squares: Vector) -> Vector:
    return [math.sqrt(square) if square > 0.0 else 0.0 for square in squares]


def _cosines(rows: list[Vector], norms: Vector) -> list[Vector]:
    divisors = [norm or math.inf for norm in norms]
    cosines = [[1.0] * len(rows) for _ in rows]
    for i, row in enumerate(rows):
        for j in range(i):
            # Halved before the sum, and divided twice, so that nothing leaves the range of floats.
            cosine = (0.5 * row[j] + 0.5 * rows[j][i]) / divisors[i] / divisors[j]
            if not -1.0 <= cosine <= 1.0:
                cosine = math.copysign(1.0, cosine)
            cosines[i][j] = cosines[j][i] = cosine
    return cosines
