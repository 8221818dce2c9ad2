"""Figures of the refinement study."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.lic.evaluation import mean_score
from examples.lic.refinement.experiment import loss
from examples.lic.refinement.report import scores, select

STYLES = {
    ("curve", "none"): ("0.45", "s-", "no refinement"),
    ("curve", "straight-through"): ("tab:orange", "^-", "straight-through"),
    ("curve", "SGA+"): ("tab:blue", "o-", "SGA+, each by its codec"),
    ("one codec", "SGA+"): ("tab:blue", "x--", "SGA+, all by one codec"),
    ("balanced", "Solution 1"): ("tab:red", "P", "balanced, Solution 1"),
    ("balanced", "Solution 2"): ("tab:green", "D", "balanced, Solution 2"),
}


def rate_distortion_figure(results: Mapping[str, Any]) -> Figure:
    """Means over the held-out photographs; lines join what differs in λ alone."""
    figure, ax = _figure()
    for (group, name), (colour, style, label) in STYLES.items():
        records = select(results["records"], group=group, name=name)
        points = sorted(mean_score(scores(record)) for record in records)
        ax.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=7)
    ax.set_xlabel("rate (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")
    ax.legend(frameon=False, loc="lower right")
    return figure


def course_figure(results: Mapping[str, Any]) -> Figure:
    """The loss of the code as it would be sent, step by step, for the codec in the middle."""
    base = results["plan"]["base"]
    figure, ax = _figure()
    chosen = [
        *select(results["records"], group="curve", name="straight-through", trained=base),
        *select(results["records"], group="probability"),
    ]
    for record in chosen:
        if not record["name"].endswith("integers"):
            late = record["name"].endswith("cut off")
            ax.plot(*_course(record), ":" if late else "-", label=record["name"])
    ax.set_xlabel("step")
    ax.set_ylabel("R + λD of the rounded code")
    ax.legend(frameon=False, fontsize="small")
    return figure


def _course(record: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    courses = [image["course"] for image in record["images"].values()]
    means = [fmean(loss(c[step], record["lambda"]) for c in courses) for step in courses[0]]
    return [int(step) for step in courses[0]], means


def _figure() -> tuple[Figure, Axes]:
    # A figure of its own, not pyplot's: nothing global, no display, no backend to choose.
    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    ax = figure.subplots()
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax
