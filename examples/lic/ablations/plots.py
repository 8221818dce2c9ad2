"""Curves of the ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.lic.ablations.report import curve
from examples.lic.ablations.variations import (
    CLIPPED_1,
    CLIPPED_2,
    SCRATCH_1,
    SCRATCH_2,
    SOLUTION_1,
    SOLUTION_2,
    SUMS,
    VARIATIONS,
)

PANELS = {
    "γ of Solution 1": (SUMS, SOLUTION_1, *(t for t in VARIATIONS if t.startswith("γ"))),
    "Solution 1": (SUMS, *(t for t in VARIATIONS if t.startswith(SOLUTION_1) and t != SCRATCH_1)),
    "Solution 2": (SUMS, *(t for t in VARIATIONS if t.startswith(SOLUTION_2) and t != SCRATCH_2)),
    "swapped": (SOLUTION_1, SOLUTION_2, SCRATCH_1, SCRATCH_2),
}
STYLES = {SUMS: "s-", SOLUTION_1: "o-", SOLUTION_2: "o-", CLIPPED_1: "x-", CLIPPED_2: "x-"}


def curves_figure(results: Mapping[str, Any]) -> Figure:
    """A panel for each question, one line for each variation and seed."""
    # A figure of its own, not pyplot's: nothing global, no display, no backend to choose.
    figure = Figure(figsize=(11, 9), dpi=150, layout="constrained")
    grid = figure.subplots(2, 2)
    for ax, (panel, titles) in zip(grid.flat, PANELS.items(), strict=True):
        for index, title in enumerate(titles):
            _plot(ax, results, title, f"C{index}")
        ax.set_title(panel)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize="small", loc="best")
        ax.set_xlabel("rate (bits per pixel)")
        ax.set_ylabel("PSNR (dB)")
    return figure


def _plot(ax: Axes, results: Mapping[str, Any], title: str, colour: str) -> None:
    for seed in results["plan"]["seeds"]:
        points = sorted(curve(results["records"], title, seed))
        label = title if seed == results["plan"]["seeds"][0] else None
        style = STYLES.get(title, ".--")
        ax.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1)
