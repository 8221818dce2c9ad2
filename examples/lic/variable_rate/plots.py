"""Figures of the variable-rate experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.lic.variable_rate.design import BEFORE, INCREMENTS, LONG, RIVALS, SINGLE, STATIC

Runs = Mapping[str, Mapping[str, Any]]
"""The runs of each seed, by seed and name."""

COLOURS = dict(zip((*INCREMENTS, *RIVALS, *STATIC), colormaps["tab10"].colors, strict=False))


def curves_figure(runs: Runs) -> Figure:
    """The rate-distortion plane, a panel for each seed: rings are steps in between."""
    figure, axes = _figure(len(runs))
    for ax, (seed, by_name) in zip(axes, runs.items(), strict=True):
        _plot_curve(ax, by_name[BEFORE], BEFORE, "0.7")
        for name, colour in COLOURS.items():
            _plot_curve(ax, by_name[name], name, colour)
        for name, marker in {SINGLE: "s", LONG: "^"}.items():
            points = np.array([_mean(point) for point in by_name[name]["points"]])
            ax.plot(*points.T, marker, color="black", markersize=5, label=name, zorder=4)
        ax.set_title(f"seed {seed}", fontsize="medium")
        ax.set_xlabel("rate (bits per pixel)")
    axes[0].set_ylabel("PSNR (dB), mean of the held-out photographs")
    axes[-1].legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def weights_figure(runs: Runs) -> Figure:
    """The weight of each level's loss under MGDA, as a mean over seeds and tenths of a run."""
    figure, axes = _figure(len(STATIC))
    for ax, name in zip(axes, STATIC.values(), strict=True):
        weights = np.mean([by_name[name]["weights"] for by_name in runs.values()], axis=0)
        levels = [p["lambda"] for p in next(iter(runs.values()))[name]["points"] if p["trained"]]
        position = (np.arange(weights.shape[1]) + 0.5) / weights.shape[1]
        bottoms = np.cumsum(weights, axis=0) - weights
        colours = colormaps["viridis"](np.linspace(0.1, 0.9, len(levels)))
        for lmbda, weight, bottom, colour in zip(levels, weights, bottoms, colours, strict=True):
            width = 0.9 / len(position)
            ax.bar(position, weight, width, bottom, color=colour, label=f"λ = {lmbda:g}")
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("part of post-training")
        ax.set_ylim(0, 1)
    axes[0].set_ylabel("weight of the level's loss")
    axes[-1].legend(loc="lower right", fontsize="small")
    return figure


def _plot_curve(ax: Axes, run: Mapping[str, Any], label: str, colour: Any) -> None:
    points = sorted(run["points"], key=lambda point: point["lambda"])
    ax.plot(*np.array([_mean(p) for p in points]).T, "-", color=colour, linewidth=1, label=label)
    for trained, face in ((True, colour), (False, "white")):
        chosen = np.array([_mean(p) for p in points if p["trained"] is trained])
        ax.plot(*chosen.T, "o", color=colour, markerfacecolor=face, markersize=4)


def _mean(point: Mapping[str, Any]) -> tuple[float, ...]:
    """Rate and PSNR, each as a mean over the photographs."""
    return tuple(fmean(axis) for axis in zip(*point["images"].values(), strict=True))


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4.4 * columns + 0.6, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)
