"""Figures of the rate-distortion plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.lic.evaluation import Score


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its axes; not pyplot's, so nothing is global."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def starts_figure(
    starts: Mapping[float, Mapping[str, Score]], *, markers: Mapping[str, str], line: Sequence[str]
) -> Figure:
    """Runs that share their start: one colour for each start, one marker for each method.

    Lines join only what started from one checkpoint: a curve through the points of all starts
    would credit them with the training of later ones.

    For the λ of each start there are its runs' scores by method. `markers` has the methods to
    draw, `line` those with fixed weights, joined by a line.
    """
    figure, (ax,) = new_figure(7.0, 5.0)
    colours = colormaps["viridis"]([0.1 + 0.65 * i / len(starts) for i in range(len(starts))])
    for runs, colour in zip(starts.values(), colours, strict=True):
        curve = sorted(runs[name] for name in line)
        ax.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.2, zorder=1)
        for name, marker in markers.items():
            ax.plot(*runs[name], marker, color=colour, markersize=7, zorder=2)
    ax.set_xlabel("rate (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")
    keys = [
        Line2D([], [], marker=marker, label=name, color="0.3", linestyle="none")
        for name, marker in {**markers, "fixed weights": "."}.items()
    ]
    ax.add_artist(ax.legend(handles=keys, loc="upper left", frameon=False))
    pairs = zip(starts, colours, strict=True)
    keys = [Line2D([], [], color=c, linewidth=3, label=f"λ = {x:g}") for x, c in pairs]
    ax.legend(handles=keys, loc="lower right", title="from the checkpoint", frameon=False)
    return figure


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]], title: str
) -> Figure:
    """Points (bpp, PSNR, MS-SSIM) of each curve, PSNR and MS-SSIM in a panel each."""
    figure, (left, right) = new_figure(11.0, 4.6, columns=2)
    for name, points in curves.items():
        bpp, psnr, similarity = zip(*sorted(points), strict=True)
        left.plot(bpp, psnr, "o-", label=name)
        if None not in similarity:
            right.plot(bpp, similarity, "o-", label=name)
    for ax, label in ((left, "PSNR (dB)"), (right, "MS-SSIM")):
        ax.set_xlabel("rate of the files (bits per pixel)")
        ax.set_ylabel(label)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure
