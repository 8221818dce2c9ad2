"""Metrics of the last step, and of a whole run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from moo_balance.functional import cosine_similarity


@dataclass(frozen=True, eq=False)
class StepMetrics:
    """Losses, weights and gradients of one ``backward`` (or ``combined_loss``), by name.

    All values stay on the device they were computed on; :meth:`as_floats` copies them.

    Attributes:
        names: The losses that were present.
        gramian: Inner products of their gradients, shape [K, K] in the order of ``names``; None
            for a method that takes none, or in a step between two refreshes (``every``).
    """

    names: tuple[str, ...] = ()
    gramian: Tensor | None = None
    _losses: Tensor | None = None
    _weights: Tensor | None = None
    _coefficients: Tensor | None = None

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
    def cosines(self) -> dict[tuple[str, str], Tensor]:
        """Cosine similarity of each pair of gradients; empty without a Gramian.

        NaN where a gradient was not finite, as in a step that a loss scaler skips.
        """
        if self.gramian is None:
            return {}
        nonfinite = ~self.gramian.diagonal().isfinite()
        masked = nonfinite[:, None] | nonfinite
        cosines = cosine_similarity(self.gramian.masked_fill(masked, 0.0))
        cosines = cosines.masked_fill(masked, math.nan)
        pairs = combinations(range(len(self.names)), 2)
        return {(self.names[j], self.names[k]): cosines[j, k] for j, k in pairs}

    def as_dict(self) -> dict[str, Tensor]:
        """All under flat keys: ``loss/a``, ``weight/a``, ``coefficient/a``, ``cosine/a,b``."""
        flat = {}
        for kind, values in (
            ("loss", self.losses),
            ("weight", self.weights),
            ("coefficient", self.coefficients),
        ):
            flat.update({f"{kind}/{name}": value for name, value in values.items()})
        flat.update({f"cosine/{a},{b}": value for (a, b), value in self.cosines.items()})
        return flat

    def as_floats(self) -> dict[str, float]:
        """:meth:`as_dict` as numbers, in one copy from the device."""
        return to_floats(self.as_dict())

    def _by_name(self, values: Tensor | None) -> dict[str, Tensor]:
        return {} if values is None else dict(zip(self.names, values.unbind(), strict=True))


class History:
    """Metrics of many steps, kept on the device and copied to the host when they are read.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, History, Sum
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.25), Sum())
        >>> history = History()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     _ = optimizer.backward({"a": w**2, "b": w**2})
        ...     optimizer.step()
        ...     history.append(optimizer.metrics)
        >>> history.series("loss/a")
        ([0, 1], [1.0, 0.0])
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, Tensor]] = []

    def append(self, metrics: StepMetrics) -> None:
        """Add the metrics of one step."""
        self._steps.append(metrics.as_dict())

    def __len__(self) -> int:
        return len(self._steps)

    def keys(self) -> list[str]:
        """All keys that a step has, in order of appearance."""
        return list(dict.fromkeys(key for step in self._steps for key in step))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have `key`, counted from 0, and its values."""
        present = {index: step[key] for index, step in enumerate(self._steps) if key in step}
        values = to_floats({str(index): value for index, value in present.items()})
        return list(present), list(values.values())

    def plot(self, kind: str = "weight", ax: Any = None) -> Any:
        """Draw all series of a kind (``"loss"``, ``"weight"``, ``"coefficient"``, ``"cosine"``).

        Needs matplotlib, which is imported here and nowhere else. Returns the axes.
        """
        import matplotlib.pyplot as plt

        ax = plt.figure().add_subplot() if ax is None else ax
        for key in self._keys_of(kind):
            ax.plot(*self.series(key), label=key.removeprefix(f"{kind}/"))
        ax.set_xlabel("step")
        ax.set_ylabel(kind)
        ax.legend()
        return ax

    def _keys_of(self, kind: str) -> Iterator[str]:
        return (key for key in self.keys() if key.startswith(f"{kind}/"))


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as floats, copied from the device at once."""
    if not values:
        return {}
    device = next(iter(values.values())).device
    stacked = torch.stack([value.to(device).float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))
