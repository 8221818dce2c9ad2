"""Figures of the rate-distortion plane."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from examples.lic.evaluation import Score

DASHES = ({"color": "0.4", "linestyle": "--"}, {"color": "0.4", "linestyle": ":"})
"""Styles of curves that others are compared with."""


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its axes; not pyplot's, so nothing is global."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def starts_figure(
    starts: Mapping[float, Mapping[str, Score]],
    *,
    markers: Mapping[str, str],
    line: Sequence[str],
    dashed: Mapping[str, Sequence[Score]],
) -> Figure:
    """Runs that share their start: one colour for each start, one marker for each method.

    Lines join only what started from one checkpoint: a curve through the points of all starts
    would credit them with the training of later ones.

    For the λ of each start there are its runs' scores by method. `markers` has the methods to
    draw, `line` those with fixed weights, joined by a line. `dashed` has up to two other curves by
    name, of which the part at these rates is shown.
    """
    figure, (ax,) = new_figure(7.0, 5.0)
    colours = colormaps["viridis"]([0.1 + 0.65 * i / len(starts) for i in range(len(starts))])
    for runs, colour in zip(starts.values(), colours, strict=True):
        curve = sorted(runs[name] for name in line)
        ax.plot(*zip(*curve, strict=True), ".-", color=colour, linewidth=1.2, zorder=1)
        for name, marker in markers.items():
            ax.plot(*runs[name], marker, color=colour, markersize=7, zorder=2)
    _draw_dashed(ax, dashed)
    ax.set_xlabel("rate of the files (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")
    keys = [
        Line2D([], [], marker=marker, label=name, color="0.3", linestyle="none")
        for name, marker in {**markers, "fixed weights": "."}.items()
    ]
    keys += [
        Line2D([], [], label=name, **style) for name, style in zip(dashed, DASHES, strict=False)
    ]
    ax.add_artist(ax.legend(handles=keys, loc="upper left", frameon=False))
    pairs = zip(starts, colours, strict=True)
    keys = [Line2D([], [], color=c, linewidth=3, label=f"λ = {x:.4g}") for x, c in pairs]
    ax.legend(handles=keys, loc="lower right", title="from the codec of", frameon=False)
    return figure


def _draw_dashed(ax: Axes, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw curves next to what is there already, which keeps its limits."""
    limits = {"xlim": ax.get_xlim(), "ylim": ax.get_ylim()}
    for (name, points), style in zip(curves.items(), DASHES, strict=False):
        ax.plot(*zip(*sorted(points), strict=True), zorder=0, label=name, **style)
    ax.set(**limits)


def curves_figure(
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
    *,
    dashed: Collection[str] = (),
) -> Figure:
    """Rate-distortion curves, a panel for each measure of quality.

    Args:
        panels: By the name of the measure: what the points are means over, and the points of each
            curve, (bpp, quality), means over the same images.
        dashed: Names of up to two of the curves, of which the part next to the others is drawn, in
            gray and without markers.
    """
    figure, axes = new_figure(5.5 * len(panels), 4.6, columns=len(panels))
    for ax, (label, (over, curves)) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            if name not in dashed:
                ax.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        _draw_dashed(ax, {name: curves[name] for name in dashed if name in curves})
        ax.set_xlabel("rate of the files (bits per pixel)")
        ax.set_ylabel(label)
        ax.set_title(f"mean of {over}", fontsize="medium")
    axes[0].legend(frameon=False)
    return figure
