"""The figures of the page: worth per method and problem, and the curves of the search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from benchmarks.worth.measure import SMALLEST
from benchmarks.worth.problem import EQUATIONS
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.results import ENOUGH, Results, summarize

COLOURS = {
    "differential equations": "#0072b2",
    "models": "#009e73",
    "a point asked for": "#cc79a7",
    "balancing expected to lose": "#d55e00",
}
# Grey that reads on white and on dark pages, as figures have no background.
INK = "#808080"


def family(problem: str) -> str:
    """The group of a problem, for its colour."""
    if problem in EQUATIONS:
        return "differential equations"
    if PROBLEMS[problem].expected_to_lose:
        return "balancing expected to lose"
    if PROBLEMS[problem].preference is not None or PROBLEMS[problem].targets:
        return "a point asked for"
    return "models"


def draw_worth(results: Results, arms: Sequence[str]) -> Figure:
    """Worth of each method on each problem, with its interval, on a log axis."""
    summaries = {arm: summarize(results.values(), arm) for arm in arms}
    order = sorted(arms, key=lambda arm: summaries[arm].mean)
    # Narrow, so that letters can be read where a page has 400 pixels.
    figure = Figure(figsize=(5.0, 0.48 * len(order) + 1.5), layout="constrained")
    ax = figure.add_subplot()
    largest = max(len(result.search) for result in results.values())
    ax.axvspan(SMALLEST / 2, 1.0, color=INK, alpha=0.15, linewidth=0)
    ax.axvline(ENOUGH, color=INK, linewidth=0.8, linestyle=":")
    for row, arm in enumerate(order):
        present = [name for name, result in results.items() if arm in result.entries]
        present.sort(key=lambda name: list(COLOURS).index(family(name)))
        offsets = np.linspace(0.32, -0.32, len(present)) if len(present) > 1 else [0.0]
        for offset, name in zip(offsets, present, strict=True):
            worth, colour = results[name].entries[arm].worth, COLOURS[family(name)]
            ax.plot([worth.low, worth.high], 2 * [row + offset], color=colour, lw=0.9, alpha=0.6)
            # Arrows at the ends of the scale, where the worth is a bound.
            marker = ">" if worth.value > 0.999 * results[name].search.end else "o"
            marker = "<" if worth.value < 1.001 * SMALLEST else marker
            ax.plot(worth.value, row + offset, marker, color=colour, markersize=3.5)
        ax.plot(2 * [summaries[arm].mean], [row - 0.4, row + 0.4], color=INK, lw=2.5)
    ax.set_xscale("log")
    ax.set_xlim(SMALLEST * 0.8, largest * 1.25)
    ticks = [2.0**k for k in range(-4, int(math.log2(largest)) + 1)]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.set_xlabel("trials of a random search for\nstatic weights that one run is worth")
    handles = [Line2D([], [], color=c, marker="o", ms=4, lw=0.9) for c in COLOURS.values()]
    handles.append(Line2D([], [], color=INK, lw=2.5))
    labels = [*COLOURS, "geometric mean"]
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, frameon=False, labelcolor=INK
    )
    _style(ax)
    ax.tick_params(labelsize=10)
    return figure


def draw_searches(results: Results, arms: Sequence[str]) -> Figure:
    """The median score of a search of N trials, and the medians of a few methods."""
    columns = 3
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(3.1 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    palette = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
    for ax, (name, result) in zip(axes, results.items(), strict=False):
        search = result.search
        counts = np.geomspace(1.0, len(search) / 2, 40)
        ax.plot(counts, search.median_scores(counts), color=INK, lw=2)
        for arm, colour in zip(arms, palette, strict=False):
            if arm in result.entries and math.isfinite(result.entries[arm].median):
                ax.axhline(result.entries[arm].median, color=colour, lw=1, linestyle="--")
        ax.set_xscale("log", base=2)
        if search.test.min() > 0:
            ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_title(name, fontsize=9, color=INK)
        _style(ax)
    for ax in list(figure.axes)[len(results) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], color=INK, lw=2)]
    handles += [Line2D([], [], color=c, lw=1, linestyle="--") for c in palette[: len(arms)]]
    figure.legend(
        handles,
        ["search of N trials", *arms],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
    )
    figure.supxlabel("trials N", color=INK, fontsize=9)
    figure.supylabel("test score (lower is better)", color=INK, fontsize=9)
    return figure


def _style(ax: Axes) -> None:
    ax.tick_params(which="both", colors=INK, labelsize=8)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(INK)


def save(figure: Figure, path: Path) -> None:
    """Write an SVG without a background or a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "worth", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
