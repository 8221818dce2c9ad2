"""Metrics of one step: losses, weights, coefficients and inner products, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from moo_balance._nonfinite import names_of
from moo_balance.functional._checks import at_least_float32

FEW_LOSSES = 8
"""Up to so many losses the cosine of each pair is listed, 28 of them, by default."""

_ALIGNMENT = "alignment"
_PROJECTED = "gramian/projected"


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """Losses, weights and gradients of one ``backward`` (or ``combined_loss``), by name.

    All values stay on the device they were computed on; :meth:`as_floats` copies them.

    Attributes:
        names: The losses that were present.
        gramian: Inner products of their gradients, shape [K, K] in the order of ``names``; None
            for a method that takes none, or in a step between two refreshes (``every``).
        projected: How much of the Gramian of expected gradients was removed to make it positive
            semidefinite, from 0 to 1 (see ``PerLoss(unbiased=True)``); None for any other Gramian.
    """

    names: tuple[str, ...] = ()
    gramian: Tensor | None = None
    _losses: Tensor | None = None
    _weights: Tensor | None = None
    _coefficients: Tensor | None = None
    _satisfied: Tensor | None = None
    projected: Tensor | None = None

    @property
    def losses(self) -> dict[str, Tensor]:
        """Loss values, 0-d tensors."""
        return self._by_name(self._losses)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The method's own weights, on the simplex unless its docstring says otherwise."""
        return self._by_name(self._weights)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """What multiplied the raw gradients."""
        return self._by_name(self._coefficients)

    @property
    def satisfied(self) -> tuple[str, ...]:
        """The losses that counted as satisfied, and had no part in the balance. Synchronizes.

        Such a loss equals its lower bound, or its gradient counts as zero; its coefficient is 0.
        """
        return names_of(self.names, self._satisfied)

    @property
    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """Cosine similarity of each pair of gradients; empty without a Gramian.

        NaN where a gradient was not finite, as in a step that a loss scaler skips.
        """
        if self.gramian is None:
            return {}
        pairs = combinations(self.names, 2)
        return dict(zip(pairs, self._all_cosines(self.gramian).unbind(), strict=True))

    @property
    def alignment(self) -> Tensor | None:
        r"""How far the gradients point in one direction, from -1 to 1; a 0-d tensor.

        .. math::

            A = 2 \left\| \frac{1}{K} \sum_{k=1}^K \frac{g_k}{\|g_k\|} \right\|^2 - 1
              = \frac{2 (K - 1)}{K} \bar c - \frac{K - 2}{K},

        where :math:`g_k` are the gradients of the :math:`K` losses and :math:`\bar c` is the mean
        of their :attr:`cosines`. For two losses it is their cosine. It is 1 if all gradients have
        the same direction, -1 if the unit gradients cancel, and :math:`2 / K - 1` if the gradients
        are perpendicular to each other, so that scores of different :math:`K` are not comparable.

        A zero gradient counts as in :attr:`cosines`, as perpendicular to all others. NaN if a
        gradient was not finite. None without a Gramian and, as there is no pair, with one loss.

        Source: Wang, Bhartari, Li, Perdikaris, *Gradient Alignment in Physics-informed Neural
        Networks: A Second-Order Optimization Perspective* (NeurIPS 2025), arXiv 2502.00604.
        """
        if self.gramian is None or len(self.names) < 2:
            return None
        return _score_alignment(self._all_cosines(self.gramian), len(self.names))

    def as_dict(self, pairs: bool | None = None) -> dict[str, Tensor]:
        r"""All under flat keys: ``loss/a``, ``weight/a``, ``coefficient/a``, ``cosine/a,b``.

        ``alignment`` is :attr:`alignment`, ``gramian/projected`` is :attr:`projected`, and
        ``satisfied`` is the number of :attr:`satisfied` losses.

        Args:
            pairs: The cosine of each pair (True), or ``cosine/min`` and ``cosine/mean`` over all
                pairs (False). Default None: each pair for up to 8 losses. In the key of a pair a
                comma within a name is written ``\,`` and a backslash ``\\``.
        """
        values = self._flatten(pairs)
        return {} if values is None else dict(zip(self._keys(pairs), values.unbind(), strict=True))

    def as_floats(self, pairs: bool | None = None) -> dict[str, float]:
        """:meth:`as_dict` as numbers, in one copy from the device."""
        values = self._flatten(pairs)
        if values is None:
            return {}
        return dict(zip(self._keys(pairs), values.float().tolist(), strict=True))

    def __repr__(self) -> str:
        """Synchronizes with the device."""
        vectors = {kind: values.tolist() for kind, values in self._vectors().items()}
        columns = [[f"{value:.4g}" for value in values] for values in vectors.values()]
        each = [
            f"{name}: {', '.join(map(' '.join, zip(vectors, row, strict=True)))}"
            for name, *row in zip(self.names, *columns, strict=True)
        ]
        return f"{type(self).__name__}({'; '.join(each)})"

    def __str__(self) -> str:
        """One line for a progress bar, as ``rate 0.31 ×0.62  distortion 0.12 ×0.38  cos -0.4``.

        Each loss with its value and what multiplied its gradient; then the cosine of the gradients,
        or the least and the greatest of all pairs. For more than 8 losses, ranges. Synchronizes.
        """
        vectors = self._vectors()
        losses, factors = vectors.get("loss"), vectors.get("coefficient")
        parts = [] if losses is None else _describe(self.names, losses, factors)
        if self.gramian is not None and len(self.names) > 1:
            cosines = self._all_cosines(self.gramian)
            parts.append(f"cos {_format_range(cosines, '.2g')}")
        return "  ".join(parts)

    def _by_name(self, values: Tensor | None) -> dict[str, Tensor]:
        return {} if values is None else dict(zip(self.names, values.unbind(), strict=True))

    def _vectors(self) -> dict[str, Tensor]:
        """What there is for each loss, by kind."""
        vectors = {
            "loss": self._losses,
            "weight": self._weights,
            "coefficient": self._coefficients,
        }
        return {kind: values for kind, values in vectors.items() if values is not None}

    def _keys(self, pairs: bool | None) -> tuple[str, ...]:
        """The keys of :meth:`as_dict`."""
        listed = self._lists_pairs(pairs)
        keys = _list_keys(self.names, tuple(self._vectors()), self.gramian is not None, listed)
        if self.projected is not None:
            keys = (*keys, _PROJECTED)
        return keys if self._coefficients is None else (*keys, "satisfied")

    def _lists_pairs(self, pairs: bool | None) -> bool:
        """Whether each pair has a key, given the argument of :meth:`as_dict`."""
        return len(self.names) <= FEW_LOSSES if pairs is None else pairs

    def _flatten(self, pairs: bool | None) -> Tensor | None:
        """The values of :meth:`as_dict` as one vector; None if there are none."""
        parts = list(self._vectors().values())
        if self.gramian is not None and len(self.names) > 1:
            cosines = self._all_cosines(self.gramian)
            listed = self._lists_pairs(pairs)
            parts.append(cosines if listed else torch.stack([cosines.amin(), cosines.mean()]))
            parts.append(_score_alignment(cosines, len(self.names)).reshape(1))
        if self.projected is not None:
            parts.append(self.projected.reshape(1))
        count = self._count_satisfied()
        if count is not None:
            parts.append(count.unsqueeze(0))
        if not parts:
            return None
        return torch.cat([part.to(parts[0].device) for part in parts])

    def _count_satisfied(self) -> Tensor | None:
        """How many losses are satisfied; None in a step without coefficients."""
        if self._coefficients is None:
            return None
        if self._satisfied is None:
            return self._coefficients.new_zeros(())
        return self._satisfied.sum().to(self._coefficients)

    def _all_cosines(self, gramian: Tensor) -> Tensor:
        """Cosines of all pairs, in the order of ``itertools.combinations``."""
        count = len(self.names)
        rows, columns = torch.triu_indices(count, count, 1, device=gramian.device)
        return _cosines(gramian, rows, columns)

    def _value(self, key: str) -> Tensor | None:
        """The value under a key of :meth:`as_dict`; None where there is none."""
        if key == "satisfied":
            return self._count_satisfied()
        if key == _ALIGNMENT:
            return self.alignment
        kind, _, name = key.partition("/")
        vector = self._vectors().get(kind)
        if vector is not None:
            return vector[self.names.index(name)] if name in self.names else None
        if key == _PROJECTED:
            return self.projected
        if kind != "cosine" or self.gramian is None or len(self.names) == 1:
            return None
        if name == "min":
            return self._all_cosines(self.gramian).amin()
        if name == "mean":
            return self._all_cosines(self.gramian).mean()
        pair = positions_of_pairs(self.names).get(name)
        return None if pair is None else _cosines(self.gramian, *pair)


def _cosines(gramian: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """:func:`~moo_balance.functional.cosine_similarity` of some pairs only.

    NaN where a gradient is not finite.
    """
    gramian = at_least_float32(gramian)
    squares = gramian.diagonal()
    norms = squares.clamp(min=0.0).sqrt()
    norms = norms.masked_fill(norms == 0, math.inf).masked_fill(~squares.isfinite(), math.nan)
    left, right = norms[rows], norms[columns]
    # Both triangles, which may differ by rounding.
    cosines = gramian[rows, columns] / left / right + gramian[columns, rows] / right / left
    return (cosines / 2).clamp(-1.0, 1.0)


def _score_alignment(cosines: Tensor, count: int) -> Tensor:
    """:attr:`StepMetrics.alignment` of `count` gradients, from the cosines of all pairs."""
    # In this form the score of two gradients is their cosine bit for bit.
    score = cosines.mean() * (2 * (count - 1) / count) - (count - 2) / count
    return score.clamp(-1.0, 1.0)


def _describe(names: tuple[str, ...], losses: Tensor, factors: Tensor | None) -> list[str]:
    """The losses and what multiplied their gradients, each, or the ranges of many."""
    if len(names) > FEW_LOSSES:
        parts = [f"{len(names)} losses {_format_range(losses, '.3g')}"]
        return parts if factors is None else [f"{parts[0]} ×{_format_range(factors, '.2g')}"]
    parts = [f"{name} {loss:.3g}" for name, loss in zip(names, losses.tolist(), strict=True)]
    if factors is None:
        return parts
    return [f"{part} ×{c:.2g}" for part, c in zip(parts, factors.tolist(), strict=True)]


def _format_range(values: Tensor, digits: str) -> str:
    """The least and the greatest value, or the only one."""
    low, high = values.amin().item(), values.amax().item()
    return f"{low:{digits}}" if len(values) == 1 else f"{low:{digits}} to {high:{digits}}"


@lru_cache(maxsize=8)
def _list_keys(
    names: tuple[str, ...], kinds: tuple[str, ...], cosines: bool, pairs: bool
) -> tuple[str, ...]:
    keys = [f"{kind}/{name}" for kind in kinds for name in names]
    if cosines and len(names) > 1:
        labels = positions_of_pairs(names) if pairs else ("min", "mean")
        keys += [f"cosine/{label}" for label in labels]
        keys.append(_ALIGNMENT)
    return tuple(keys)


@lru_cache(maxsize=8)
def positions_of_pairs(names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Positions of each pair, under a label that no other pair has."""
    escaped = [name.replace("\\", "\\\\").replace(",", "\\,") for name in names]
    pairs = combinations(range(len(names)), 2)
    return {f"{escaped[j]},{escaped[k]}": (j, k) for j, k in pairs}
