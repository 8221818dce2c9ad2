"""Figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.lic.comparison import BALANCED, RIVALS, STANDARD, Rung
from examples.lic.training import Trace

MARKERS = {STANDARD: "s", "Solution 1": "o", "Solution 2": "^"}
COLOURS = {STANDARD: "0.45", "Solution 1": "tab:blue", "Solution 2": "tab:orange"}


def rate_distortion_figure(rungs: Sequence[Rung]) -> Figure:
    """The rate-distortion plane: one colour per checkpoint, one marker per method.

    Lines join the fixed weights that started from one checkpoint, and nothing else: a curve
    through the balanced points of all rungs would credit them with the training of later rungs.
    """
    figure, axes = _figure(7.0, 5.0)
    (ax,) = axes
    colours = _rung_colours(len(rungs))
    for rung, colour in zip(rungs, colours, strict=True):
        curve = sorted(rung.runs[name].mean for name in (STANDARD, *RIVALS))
        ax.plot(*zip(*curve, strict=True), "-", color=colour, linewidth=1.2, zorder=1)
        for rival in RIVALS:
            ax.plot(*rung.runs[rival].mean, ".", color=colour, markersize=7, zorder=2)
        ax.plot(*rung.start.mean, "x", color=colour, markersize=7, zorder=2)
        for name, marker in MARKERS.items():
            point = rung.runs[name].mean
            ax.plot(*point, marker, color=colour, markersize=9, markeredgecolor="white", zorder=3)
    ax.set_xlabel("rate (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")
    ax.set_title(f"Mean of {len(rungs[0].start.scores)} held-out photographs")

    methods = [_key(marker, name) for name, marker in MARKERS.items()]
    methods += [_key(".", "fixed weights", line="-"), _key("x", "checkpoint")]
    first = ax.legend(handles=methods, loc="upper left", frameon=False)
    ax.add_artist(first)
    starts = [
        Line2D([], [], color=colour, linewidth=3, label=f"λ = {rung.lmbda:g}")
        for rung, colour in zip(rungs, colours, strict=True)
    ]
    ax.legend(handles=starts, loc="lower right", title="from the checkpoint", frameon=False)
    return figure


def weights_figure(rungs: Sequence[Rung]) -> Figure:
    """Weights over time: one column per checkpoint; the method's own above, the result below."""
    figure, axes = _figure(3.2 * len(rungs) + 1.0, 5.4, rows=2, columns=len(rungs))
    rows = {
        "weight": "weight of the rate",
        "coefficient": "share of ∇rate in the\nbalanced gradient",
    }
    for row, (kind, label) in enumerate(rows.items()):
        for column, rung in enumerate(rungs):
            ax = axes[row * len(rungs) + column]
            for name in (STANDARD, *BALANCED):
                _plot_share(ax, rung.runs[name].trace, kind, name)
            ax.set_ylim(0, 1)
            if row == 0:
                ax.set_title(f"from the checkpoint of λ = {rung.lmbda:g}", fontsize="medium")
            else:
                ax.set_xlabel("step")
            if column == 0:
                ax.set_ylabel(label)
    axes[0].legend(loc="lower left", frameon=False)
    return figure


def _plot_share(ax: Axes, trace: Trace, kind: str, name: str) -> None:
    steps, rate = trace.history.series(f"{kind}/rate")
    _, distortion = trace.history.series(f"{kind}/distortion")
    share = np.array(rate) / (np.array(rate) + np.array(distortion))
    ax.plot(steps, share, color=COLOURS[name], linewidth=0.6, alpha=0.35)
    ax.plot(steps, _running_mean(share), color=COLOURS[name], linewidth=1.8, label=name)


def _running_mean(values: np.ndarray, width: int = 31) -> np.ndarray:
    """Centred mean; the window shrinks at both ends, so that no point is made up."""
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _rung_colours(count: int) -> list[tuple[float, ...]]:
    return [tuple(colormaps["viridis"](x)) for x in np.linspace(0.1, 0.75, count)]


def _key(marker: str, label: str, line: str = "none") -> Line2D:
    return Line2D([], [], marker=marker, color="0.3", linestyle=line, label=label, markersize=8)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    # A figure of its own, not pyplot's: nothing global, no display, no backend to choose.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)
