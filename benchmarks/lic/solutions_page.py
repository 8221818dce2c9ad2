"""What the page shows of one regime of training: differences, operating points, figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lic.figures import Drawing, grid, plain_ticks, plot_curve, smooth
from benchmarks.lic.findings import Finding, compare_all
from benchmarks.lic.solutions import BALANCED, EQUAL_STEPS, EQUAL_TIME, OWN, STATIC
from benchmarks.lic.statistics import mean_curve
from benchmarks.lic.text import table, with_interval

Data = Mapping[str, Any]

WORDS = {-1: "better", 0: "not distinguishable", 1: "worse", None: "too few seeds"}
"""By :attr:`Finding.verdict`."""

STYLES = {
    STATIC: {"color": "0.35", "linestyle": "-", "marker": "."},
    EQUAL_STEPS: {"color": "tab:green", "linestyle": "--", "marker": "."},
    EQUAL_TIME: {"color": "tab:green", "linestyle": "-", "marker": "."},
    OWN: {"color": "tab:purple", "linestyle": "none", "marker": "x"},
    BALANCED: {"color": "tab:orange", "linestyle": "none", "marker": "o"},
}
COLOURS = {"Solution 1": "tab:blue", "Solution 2": "tab:orange"}

RD_CAPTION = "Rate and PSNR, mean over the photographs; single seeds faint, their mean strong."
COURSE_CAPTION = (
    "Losses, improvement speeds (relative decrease per step) and λ′; running means of one seed, "
    "each solution next to its own mean weights held constant."
)


def section(title: str, data: Data) -> str:
    """The comparisons and the operating points of one regime."""
    findings = list(compare_all({title: data}))
    head = ("", "against", "PSNR at equal rate [95 %]", "p", "BD-rate [95 %]", "overlap", "verdict")
    return "\n\n".join(
        [
            data["about"],
            table(head, map(_row, findings)),
            *_refusals(findings),
            "Operating points: the λ of each solution, and λ′, that of the plain sum with the "
            "coefficients to which the run settled. Means over seeds and photographs.",
            table(("", "λ", "λ′", "bpp", "PSNR / dB"), _operating_points(data)),
        ]
    )


def _row(finding: Finding) -> tuple[str, ...]:
    p = "–" if finding.gap is None else f"{finding.gap.p:.2g}"
    overlap = f"{finding.overlap:.0%}" if finding.rate else "–"
    return (
        finding.solution,
        finding.baseline,
        with_interval(finding.gap, 2, "dB"),
        p,
        with_interval(finding.rate, 1, "%"),
        overlap,
        WORDS[finding.verdict],
    )


def _refusals(findings: Sequence[Finding]) -> Iterator[str]:
    refused = [f for f in findings if f.refusal]
    if refused:
        yield (
            f"{len(refused)} comparisons have no BD-rate, because the curves of a seed cannot be "
            f"compared. An example: *{refused[0].refusal}*"
        )


def _operating_points(data: Data) -> Iterator[tuple[str, ...]]:
    for solution, lambdas in data["lambdas"].items():
        curves = [curves[solution][BALANCED] for curves in data["seeds"].values()]
        means = mean_curve(curves)
        for index, lmbda in enumerate(lambdas):
            effective = fmean(curve[index]["effective_lambda"] for curve in curves)
            bpp, psnr = means[index]
            yield solution, f"{lmbda:g}", f"{effective:.2g}", f"{bpp:.3f}", f"{psnr:.2f}"


def figures(title: str, data: Data) -> Iterator[Drawing]:
    """The rate-distortion plane, and the course of one seed where it was kept."""
    yield Drawing(stem("rd", title), RD_CAPTION, partial(_rate_distortion, data))
    if any(_drawn(data, solution, OWN) for solution in data["lambdas"]):
        yield Drawing(stem("course", title), COURSE_CAPTION, partial(_course, data))


def stem(kind: str, title: str) -> str:
    """The name of a figure's file, without its ending."""
    return "-".join([kind, *re.findall(r"\w+", title.lower())])


def intervals(findings: Sequence[Finding]) -> Drawing:
    """Every PSNR difference with its interval; to the right of 0 the solution is better."""
    caption = "PSNR above the baseline at equal rate, with t-intervals over seeds."
    return Drawing("differences", caption, partial(_intervals, findings))


def _intervals(findings: Sequence[Finding]) -> Figure:
    rows = [f for f in findings if f.gap is not None][::-1]
    figure, (ax,) = grid(1, 1, width=7.5, height=0.8 + 0.26 * len(rows))
    for height, finding in enumerate(rows):
        by_seed, (mean, low, high) = finding.gap.by_seed, finding.gap.interval
        colour = COLOURS[finding.solution]
        if len(by_seed) > 1:
            ax.plot([low, high], [height, height], color=colour, linewidth=2)
        ax.plot(by_seed, [height] * len(by_seed), "|", color=colour, markersize=7)
        ax.plot(mean, height, "o", color=colour, markersize=5)
    names = [f"{f.experiment}: {f.solution} against {f.baseline}" for f in rows]
    ax.set_yticks(range(len(rows)), names, fontsize="small")
    ax.axvline(0, color="0.3", linewidth=1)
    ax.set_xlabel("PSNR at equal rate (dB), 95 % interval; ticks are seeds")
    return figure


def _rate_distortion(data: Data) -> Figure:
    solutions = list(data["lambdas"])
    figure, axes = grid(1, len(solutions), width=4.6, height=3.8, sharey=True)
    for ax, solution in zip(axes, solutions, strict=True):
        seeds = [curves[solution] for curves in data["seeds"].values()]
        for name in [*data["baselines"], BALANCED]:
            style = STYLES[name]
            for curves in seeds:
                plot_curve(ax, mean_curve([curves[name]]), **style, alpha=0.25, linewidth=0.7)
            label = solution if name == BALANCED else name
            mean = mean_curve([curves[name] for curves in seeds])
            plot_curve(ax, mean, **style, linewidth=1.5, label=label)
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
        ax.set_xlabel("rate (bits per pixel)")
        ax.legend(frameon=False, fontsize="small")
    axes[0].set_ylabel("PSNR (dB)")
    return figure


def _course(data: Data) -> Figure:
    solutions = list(data["lambdas"])
    figure, axes = grid(len(ROWS), len(solutions), width=4.6, height=1.7, sharey="row")
    for column, solution in enumerate(solutions):
        for row, (label, values) in enumerate(ROWS.items()):
            ax = axes[row * len(solutions) + column]
            for name, width in ((BALANCED, 1.6), (OWN, 1.0)):
                for run in _drawn(data, solution, name):
                    title = f"{solution}, λ = {run['lambda']:g}" if name == BALANCED else name
                    colour = COLOURS[solution] if name == BALANCED else "0.35"
                    _plot(ax, values(run), run["steps"], linewidth=width, label=title, color=colour)
            if column == 0:
                ax.set_ylabel(label, fontsize="small")
            if not label.startswith("speed"):
                ax.set_yscale("log")
                plain_ticks(ax.yaxis)
        axes[column].legend(frameon=False, fontsize="small")
        ax.set_xlabel("step")
    return figure


def _plot(ax: Axes, values: Sequence[float], steps: int, **style: Any) -> None:
    at = (np.arange(len(values)) + 0.5) * steps / len(values)
    ax.plot(at, smooth(np.asarray(values)), **style)


def _drawn(data: Data, solution: str, name: str) -> list[Data]:
    """The runs whose course was kept."""
    seeds = data["seeds"].values()
    return [
        run for curves in seeds for run in curves[solution].get(name, ()) if "series" in run
    ]  # fmt: skip


def _loss(run: Data, name: str) -> np.ndarray:
    return np.array(run["series"][f"loss/{name}"])


def _speed(run: Data, name: str) -> np.ndarray:
    """Relative decrease of a loss per step (Eq. 4 of the paper), of its running mean."""
    losses = smooth(_loss(run, name))
    return (losses[:-1] - losses[1:]) / losses[:-1] * len(losses) / run["steps"]


def _effective_lambda(run: Data) -> np.ndarray:
    rate, distortion = (
        np.array(run["series"][f"coefficient/{name}"]) for name in ("rate", "distortion")
    )
    return run["lambda"] * distortion / rate


ROWS: Mapping[str, Callable[[Data], np.ndarray]] = {
    "rate\n(bpp)": lambda run: _loss(run, "rate"),
    "distortion\n(255² MSE)": lambda run: _loss(run, "distortion") / run["lambda"],
    "speed of rate": lambda run: _speed(run, "rate"),
    "speed of distortion": lambda run: _speed(run, "distortion"),
    "λ′": _effective_lambda,
}
"""The rows of the figure of a run's course."""
