"""What ``diagnose`` and ``suggest_weights`` return, as tables, dicts and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moo_balance._conflict_figures import Figures, LossFigures, PairFigures
from moo_balance.errors import BalanceValueError

Pairs: TypeAlias = Mapping[tuple[str, str], PairFigures]

_FACTOR = 10.0
"""Norms that differ by this factor call for weights."""


@dataclass(frozen=True)
class ConflictReport:
    """What :func:`diagnose` has measured. Prints as a table.

    Attributes:
        batches: How many batches were measured, over all ranks.
        level: What each interval covers, such as 0.95.
        losses: The gradient of each loss over all parameters, by name.
        pairs: The angle of each pair of losses over all parameters, by both names.
        modules: Losses and pairs over the parameters of each module.
    """

    batches: int
    level: float
    losses: Mapping[str, LossFigures]
    pairs: Mapping[tuple[str, str], PairFigures]
    modules: Mapping[str, Figures]

    @property
    def advice(self) -> str:
        """One sentence that follows from the figures by the rules of :func:`diagnose`."""
        present = {name: each for name, each in self.losses.items() if each.batch_norm > 0}
        if len(present) < 2:
            return "Keep the sum: fewer than two losses have a gradient."
        if self.batches < 3:
            return "Take 3 batches or more: two give no interval."
        conflict = self._describe_conflict()
        lengths = _describe_lengths({n: each for n, each in present.items() if each.above_noise})
        if conflict and lengths:
            return (
                "Use NashMTL, for gradients whose lengths differ and which conflict: "
                f"{lengths}, and {conflict}."
            )
        if conflict:
            return (
                f"Use a method for gradients that conflict, such as NashMTL or UPGrad: {conflict}."
            )
        noisy = [f"`{name}`" for name, each in present.items() if not each.above_noise]
        if noisy:
            return (
                "Keep static weights, or use larger batches or more of them: the expected gradient "
                f"of {', '.join(noisy)} cannot be told from noise."
            )
        if lengths:
            return f"Use NashMTL, or GradientNorms(every=10) at less cost: {lengths}."
        return (
            "Keep the sum: no cosine is significantly below 0, and norms differ by less than a "
            f"factor of {_FACTOR:g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists, strings and numbers; None in place of NaN and infinity."""
        return {
            "batches": self.batches,
            "level": self.level,
            **Figures(self.losses, self.pairs).to_dict(),
            "modules": {name: module.to_dict() for name, module in self.modules.items()},
            "advice": self.advice,
        }

    def plot(self, ax: Any = None) -> Any:
        """Draw a heat map of the cosines: a row for each module, a column for each pair of losses.

        The first row is for all parameters. A star marks an interval that does not contain 0.
        Needs matplotlib, which is imported here and nowhere else. Returns the axes.

        Raises:
            BalanceValueError: There is no pair: a single loss was measured.
        """
        if not self.pairs:
            raise BalanceValueError(
                "A heat map of cosines should have at least two losses. Found "
                f"{', '.join(self.losses)}. Return more losses from `losses_fn`."
            )
        import matplotlib.pyplot as plt

        ax = plt.figure().add_subplot() if ax is None else ax
        modules = [(name, module.pairs) for name, module in self.modules.items()]
        labels, rows = zip(("all", self.pairs), *modules, strict=True)
        values = [[each.cosine for each in pairs.values()] for pairs in rows]
        image = ax.imshow(values, cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto")
        ax.figure.colorbar(image, ax=ax, label="cosine of expected gradients")
        ax.set_yticks(range(len(rows)), labels)
        ax.set_xticks(range(len(self.pairs)), [", ".join(pair) for pair in self.pairs])
        for y, pairs in enumerate(rows):
            for x, each in enumerate(pairs.values()):
                if not each.low <= 0.0 <= each.high:
                    ax.text(x, y, "*", ha="center", va="center")
        return ax

    def __str__(self) -> str:
        ranges = [_format_losses(self.losses)]
        if self.pairs:
            ranges.append(_format_pairs([("all", self.pairs), *self._pairs_of_modules()]))
        title = f"{self.batches} batches, intervals of {100 * self.level:g} %"
        return "\n\n".join([title, *ranges, self.advice])

    def _describe_conflict(self) -> str:
        """The pair that is most surely in conflict; empty if none is."""
        conflicts = [pair for pair, each in self.pairs.items() if each.conflict]
        if not conflicts:
            return ""
        one, other = min(conflicts, key=lambda pair: self.pairs[pair].high)
        cosine = self.pairs[one, other].cosine
        return f"the cosine of `{one}` and `{other}` is {cosine:.2f}, significantly below 0"

    def _pairs_of_modules(self) -> Iterator[tuple[str, Pairs]]:
        """Those of which both losses reach the module."""
        for label, module in self.modules.items():
            yield (
                label,
                {
                    pair: each
                    for pair, each in module.pairs.items()
                    if all(module.losses[name].batch_norm > 0 for name in pair)
                },
            )


def _describe_lengths(losses: Mapping[str, LossFigures]) -> str:
    """The longest and the shortest gradient; empty if their norms are alike, or there are none."""
    if not losses:
        return ""
    norms = {name: each.norm for name, each in losses.items()}
    longest, shortest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    if norms[longest] < _FACTOR * norms[shortest]:
        return ""
    ratio = norms[longest] / norms[shortest]
    return f"the gradient of `{longest}` is {ratio:.3g} times as long as that of `{shortest}`"


def _format_losses(losses: Mapping[str, LossFigures]) -> str:
    rows = [
        [
            name,
            f"{each.norm:.3g}",
            f"{each.batch_norm:.3g}",
            f"{each.share:.1%}",
            f"{each.signal_to_noise:.2g}",
            "yes" if each.above_noise else "no",
        ]
        for name, each in losses.items()
    ]
    header = ["loss", "norm", "norm in a batch", "share", "signal/noise", "above noise"]
    return format_table(header, rows)


def _format_pairs(modules: Iterable[tuple[str, Pairs]]) -> str:
    rows = [
        [
            label,
            ", ".join(pair),
            _format_cosine(each.cosine),
            f"{each.low:.2f} … {each.high:.2f}",
            _format_cosine(each.batch_cosine),
        ]
        for label, pairs in modules
        for pair, each in pairs.items()
    ]
    return format_table(["module", "losses", "cosine", "interval", "in a batch"], rows, left=2)


def _format_cosine(cosine: float) -> str:
    return "-" if math.isnan(cosine) else f"{cosine:.2f}"


@dataclass(frozen=True)
class SuggestedWeights:
    """Static weights by two rules, each of which sums to the number K of losses. Prints as a table.

    Attributes:
        gradient_norms: Weights inversely proportional to the norms of the gradients, by name.
        losses: Weights inversely proportional to the losses, by name; None if a mean loss is not
            positive.
        mean_norms: Means over the batches of the norms of a batch's gradients.
        mean_losses: Means over the batches of the losses.
    """

    gradient_norms: Mapping[str, float]
    losses: Mapping[str, float] | None
    mean_norms: Mapping[str, float]
    mean_losses: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As dicts and numbers; None in place of weights that there are not."""
        return {
            name: None if values is None else dict(values) for name, values in vars(self).items()
        }

    def __str__(self) -> str:
        rows = [
            [
                name,
                f"{self.mean_losses[name]:.3g}",
                f"{self.mean_norms[name]:.3g}",
                f"{weight:.3g}",
                "-" if self.losses is None else f"{self.losses[name]:.3g}",
            ]
            for name, weight in self.gradient_norms.items()
        ]
        header = ["loss", "value", "gradient norm", "weight by gradient norms", "weight by losses"]
        return format_table(header, rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width, separated by two spaces.

    Args:
        header: A title for each column.
        rows: The cells.
        left: How many of the first columns are aligned to the left; the others to the right.
    """
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)
