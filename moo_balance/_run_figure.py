"""One page that shows a run: a few panels of lines over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 8
"""Of more losses the range is drawn."""
PERPENDICULAR = "alignment if perpendicular"
"""The label of the alignment that perpendicular gradients would have."""

# Colours of Okabe and Ito, told apart with all kinds of colour vision; after these they are dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
# A grey whose contrast is at least 4.4 both on white and on black.
_INK = "#737373"
# Lines that belong to all losses have no colour. Dashes as wide as those of the alignment show that
# it equals the thin line where they do.
_OTHERS = {
    "mean": {"linewidth": 1.6, "marker": "."},
    "min": {"linestyle": (0, (1, 1.2)), "linewidth": 1.6, "marker": "v"},
    "alignment": {"linestyle": (0, (3, 1.5)), "linewidth": 2.4, "marker": "D"},
    PERPENDICULAR: {"linewidth": 0.8, "marker": "_", "markersize": 12},
}
_LONGEST = 28
"""Characters of a name in a legend."""
_FEW_POINTS = 30
"""Up to so many points of a line are marked."""
_RANGES = (("all", 0.15), ("middle half", 0.3))


@dataclass(frozen=True)
class Panel:
    """Lines over the steps.

    Attributes:
        title: What they are.
        labels: The lines: names of losses, or others.
        steps: Shape [T].
        values: Shape [T, lines]; what is not finite is left out.
        single: Further steps and values, which are shown faintly.
        losses: Whether there is a line for each loss, which has the same colour in each panel.
        pairs: The two losses of each line for a pair, which has the colours of both.
        log: Whether the vertical axis is logarithmic, provided that all values are positive.
        limits: Ends of the vertical axis. Default None: those of the values.
        zero: Whether to draw a line at 0.
    """

    title: str
    labels: Sequence[str]
    steps: Tensor
    values: Tensor
    single: tuple[Tensor, Tensor] | None = None
    losses: bool = True
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    log: bool = False
    limits: tuple[float, float] | None = None
    zero: bool = False


def draw(panels: Sequence[Panel], names: Sequence[str], ends: tuple[int, int]) -> Figure:
    """Draw the panels in two columns; the last of an odd number has both.

    Args:
        panels: At least one.
        names: All losses, in the order of their colours.
        ends: The first and the last step.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(9.0, 2.4 * rows + 0.5), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, 2)
    for index, panel in enumerate(panels):
        row, column = divmod(index, 2)
        last = index == len(panels) - 1
        place = grid[row, :] if last and column == 0 else grid[row, column]
        ax = figure.add_subplot(place)
        _draw_panel(ax, panel, names)
        _dress(ax, panel, ends)
    _draw_legend(figure, names)
    return figure


def _draw_panel(ax: Axes, panel: Panel, names: Sequence[str]) -> None:
    if panel.losses and len(names) > MOST_LINES:
        _draw_ranges(ax, panel.steps, panel.values)
        return
    for index, label in enumerate(panel.labels):
        style = _style_of(label, panel, names)
        if panel.single is not None and label != PERPENDICULAR:
            steps, values = panel.single
            faint = {**style, "alpha": 0.25, "linewidth": 0.6, "marker": None}
            ax.plot(*_finite(steps, values[:, index]), **faint)
        points = _finite(panel.steps, panel.values[:, index])
        if len(points[0]) > _FEW_POINTS:
            style["marker"] = None
        ax.plot(*points, **style)
    if not panel.losses and len(panel.labels) > 1:
        handles = [line for line in ax.lines if line.get_alpha() is None]
        _add_legend(ax, handles, panel.labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_ranges(ax: Axes, steps: Tensor, values: Tensor) -> None:
    """The range over the losses, its middle half and the median of each step."""
    values = torch.where(values.isfinite(), values, math.nan)
    present = (~values.isnan()).any(dim=1)
    steps, values = steps[present], values[present]
    if not len(steps):
        return
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=values.dtype)
    low, lower, median, upper, high = torch.nanquantile(values, shares, dim=1).tolist()
    for (_, alpha), ends in zip(_RANGES, ((low, high), (lower, upper)), strict=True):
        ax.fill_between(steps.tolist(), *ends, color=_COLOURS[0], alpha=alpha, linewidth=0)
    marker = "." if len(steps) <= _FEW_POINTS else None
    ax.plot(steps.tolist(), median, color=_COLOURS[0], linewidth=1.6, marker=marker)


def _dress(ax: Axes, panel: Panel, ends: tuple[int, int]) -> None:
    """Title, axes and grid, in colours of their own rather than those of the user's style."""
    from matplotlib.ticker import MaxNLocator

    ax.set_facecolor("white")
    ax.set_title(panel.title, loc="left", fontsize=9, color=_INK)
    ax.set_xlabel("step", fontsize=8, color=_INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    margin = 0.5 + 0.02 * (ends[1] - ends[0])
    ax.set_xlim(ends[0] - margin, ends[1] + margin)
    shown = panel.values if panel.single is None else panel.single[1]
    finite = shown[shown.isfinite()]
    if panel.log and len(finite) and finite.min() > 0:
        ax.set_yscale("log")
    if panel.limits is not None:
        ax.set_ylim(panel.limits)
    if panel.zero:
        ax.axhline(0.0, color=_INK, linewidth=0.8)
    ax.tick_params(which="both", colors=_INK, labelsize=8)
    ax.grid(color=_INK, alpha=0.2, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_INK)


def _draw_legend(figure: Figure, names: Sequence[str]) -> None:
    """Above all panels: the losses or, of many, what the ranges are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if len(names) <= MOST_LINES:
        styles = [{**_style(k), "marker": None} for k in range(len(names))]
        handles: list[Any] = [Line2D([], [], **style) for style in styles]
        labels = list(names)
    else:
        handles = [Patch(color=_COLOURS[0], alpha=alpha, linewidth=0) for _, alpha in _RANGES]
        handles.append(Line2D([], [], color=_COLOURS[0], linewidth=2))
        labels = [f"all {len(names)} losses", _RANGES[1][0], "median"]
    _add_legend(figure, handles, labels, loc="outside upper center", ncols=min(len(labels), 4))


def _add_legend(parent: Any, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    shown = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in labels]
    options = {"frameon": False, "fontsize": 8, **options}
    legend = parent.legend(handles, shown, labelcolor=_INK, **options)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain dollar signs


def _style_of(label: str, panel: Panel, names: Sequence[str]) -> dict[str, Any]:
    """How a line of a panel is drawn."""
    if panel.losses:
        return _style(names.index(label))
    if label not in panel.pairs:
        return {"color": _INK, "markersize": 4, **_OTHERS[label]}
    one, other = (_style(names.index(name))["color"] for name in panel.pairs[label])
    return {
        "color": one,
        "gapcolor": other,
        "linestyle": (0, (3, 3)),
        "linewidth": 1.6,
        "marker": "o",
        "markersize": 5,
        "fillstyle": "left",
        "markerfacecoloralt": other,
        "markeredgewidth": 0,
    }


def _style(index: int) -> dict[str, Any]:
    """How the line of a loss is drawn."""
    dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    colour = _COLOURS[index % len(_COLOURS)]
    return {"color": colour, "linestyle": dashes, "linewidth": 1.6, "marker": "."}


def _finite(steps: Tensor, values: Tensor) -> tuple[list[float], list[float]]:
    kept = values.isfinite()
    return steps[kept].tolist(), values[kept].tolist()
