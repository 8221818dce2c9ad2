"""Figures of the study, from its results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from examples.lic.study.analysis import OWN, Curve, Finding, mean_curve

STYLES = {
    "static weights": {"color": "0.35", "linestyle": "-", "marker": "."},
    "standard, equal steps": {"color": "tab:green", "linestyle": "--", "marker": "."},
    "standard, equal time": {"color": "tab:green", "linestyle": "-", "marker": "."},
    OWN: {"color": "tab:purple", "linestyle": "none", "marker": "x"},
    "balanced": {"color": "tab:orange", "linestyle": "none", "marker": "o"},
}
COLOURS = {"Solution 1": "tab:blue", "Solution 2": "tab:orange"}
SMOOTHING = 15
RATE, DISTORTION, PRICE = "rate\n(bpp)", "distortion\n(255² MSE)", "λ′"
LOGARITHMIC = (RATE, DISTORTION, PRICE)


def figures(results: Mapping[str, Any], findings: Sequence[Finding]) -> dict[str, Figure]:
    """All figures by file stem."""
    found = {
        stem("rd", name): rate_distortion(experiment)
        for name, experiment in results["experiments"].items()
        if experiment["seeds"]
    }
    found["bd-rates"] = intervals(findings)
    for name, experiment in results["experiments"].items():
        if any("series" in run for run in _runs(experiment)):
            found[stem("course", name)] = course(experiment)
    return found


def stem(kind: str, experiment: str) -> str:
    """Name of a figure's file, without its ending."""
    return "-".join([kind, *re.findall(r"\w+", experiment)])


def rate_distortion(experiment: Mapping[str, Any]) -> Figure:
    """One panel a solution: mean over photographs; lines of seeds faint, their mean strong."""
    solutions = list(experiment["lambdas"])
    figure, axes = _grid(1, len(solutions), width=4.6, height=3.8, sharey=True)
    for ax, solution in zip(axes, solutions, strict=True):
        units = [unit[solution] for unit in experiment["seeds"].values()]
        for name in [*experiment["rivals"], "balanced"]:
            style = STYLES[name]
            curves = [mean_curve([unit[name]]) for unit in units]
            for curve in curves:
                ax.plot(*zip(*curve, strict=True), **style, alpha=0.25, linewidth=0.7)
            label = solution if name == "balanced" else name
            mean = mean_curve([unit[name] for unit in units])
            ax.plot(*zip(*mean, strict=True), **style, linewidth=1.5, label=label)
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis)
        ax.set_xlabel("rate (bits per pixel)")
        ax.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel("PSNR (dB)")
    return figure


def intervals(found: Sequence[Finding]) -> Figure:
    """Every BD-rate with its interval; to the left of 0 the solution needs fewer bits."""
    rows = [f for f in found if f.rate is not None]
    figure, (ax,) = _grid(1, 1, width=7.5, height=0.8 + 0.26 * len(rows))
    for height, finding in enumerate(reversed(rows)):
        rate, colour = finding.rate, COLOURS[finding.solution]
        ax.plot([rate.low, rate.high], [height, height], color=colour, linewidth=2)
        ax.plot(rate.by_seed, [height] * len(rate.by_seed), "|", color=colour, markersize=7)
        ax.plot(rate.mean, height, "o", color=colour, markersize=5)
    names = [f"{f.experiment}: {f.solution} against {f.rival}" for f in reversed(rows)]
    ax.set_yticks(range(len(rows)), names, fontsize="small")
    ax.axvline(0, color="0.3", linewidth=1)
    ax.set_xlabel("BD-rate (%), 95 % interval; ticks are seeds")
    return figure


def course(experiment: Mapping[str, Any]) -> Figure:
    """Losses, improvement speeds and weights of one seed, each solution beside its own weights."""
    rows = {
        RATE: lambda run: run["series"]["loss/rate"],
        DISTORTION: lambda run: np.array(run["series"]["loss/distortion"]) / run["lambda"],
        "speed of rate": lambda run: speed(run["series"]["loss/rate"], run["steps"]),
        "speed of distortion": lambda run: speed(run["series"]["loss/distortion"], run["steps"]),
        PRICE: _prices,
    }
    solutions = list(experiment["lambdas"])
    figure, axes = _grid(len(rows), len(solutions), width=4.6, height=1.7, sharey="row")
    for column, solution in enumerate(solutions):
        for row, (label, values) in enumerate(rows.items()):
            ax = axes[row * len(solutions) + column]
            for name, width in (("balanced", 1.6), (OWN, 1.0)):
                for run in _with_series(experiment, solution, name):
                    style = {"color": COLOURS[solution] if name == "balanced" else "0.35"}
                    title = f"{solution}, λ = {run['lambda']:g}" if name == "balanced" else name
                    _plot(ax, values(run), run["steps"], linewidth=width, label=title, **style)
            if column == 0:
                ax.set_ylabel(label, fontsize="small")
            if label in LOGARITHMIC:
                ax.set_yscale("log")
                _plain_ticks(ax.yaxis)
        axes[column].legend(frameon=False, fontsize="small")
        ax.set_xlabel("step")
    return figure


def speed(losses: Sequence[float], steps: int) -> np.ndarray:
    """Relative decrease of a loss per step (Eq. 4 of the paper), of its running mean."""
    smooth = smoothed(np.asarray(losses))
    return (smooth[:-1] - smooth[1:]) / smooth[:-1] * len(losses) / steps


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred running mean; the window shrinks at both ends."""
    kernel = np.ones(min(SMOOTHING, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _plain_ticks(axis: Axis) -> None:
    """Numbers without powers of ten on a logarithmic axis of little more than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def _prices(run: Mapping[str, Any]) -> np.ndarray:
    """The λ of the plain sum that the weights amount to."""
    series = run["series"]
    rate, distortion = (np.array(series[f"coefficient/{n}"]) for n in ("rate", "distortion"))
    return run["lambda"] * distortion / rate


def _plot(ax: Axes, values: Sequence[float], steps: int, **style: Any) -> None:
    at = (np.arange(len(values)) + 0.5) * steps / len(values)
    ax.plot(at, smoothed(np.asarray(values)), **style)


def _with_series(experiment: Mapping[str, Any], solution: str, name: str) -> Iterator[Any]:
    for unit in experiment["seeds"].values():
        yield from (run for run in unit[solution].get(name, ()) if "series" in run)


def _runs(experiment: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for unit in experiment["seeds"].values():
        for curves in unit.values():
            for curve in curves.values():
                yield from _curve(curve)


def _curve(curve: Curve) -> Iterator[Mapping[str, Any]]:
    return iter(curve)


def _grid(
    rows: int, columns: int, *, width: float, height: float, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    # A figure of its own, not pyplot's: nothing global, no display, no backend to choose.
    size = (width * columns, height * rows)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes
