"""What the page shows of variable-rate codecs: the increments, the losses, the curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lic.figures import Drawing, grid, plot_curve
from benchmarks.lic.scores import rate_distortion_loss
from benchmarks.lic.statistics import Difference
from benchmarks.lic.text import table, with_interval
from benchmarks.lic.variable_rate import (
    ALTERNATIVES,
    BEFORE,
    COMPARED,
    DESIGNS,
    LONG,
    PLAIN,
    SINGLE,
    STATIC,
)
from examples.lic.bd import CurveError, compare
from examples.lic.evaluation import Score, mean_score

Data = Mapping[str, Any]
OneRun = Mapping[str, Any]


def section(title: str, data: Data) -> str:
    """What was run, BD-rates, the losses that were minimised, and what was learned."""
    seeds = len(data["runs"])
    return "\n\n".join(
        [
            _setup(data),
            "BD-rate in per cent (less is better), mean over seeds and photographs with the 95 % "
            "t-interval over seeds. The change is the BD-rate over the row above, and for the last "
            f"rows, which replace the plain average of the levels, over *{PLAIN}*:",
            _bd_rates(data),
            "Further BD-rates, of equal budgets and of adaptive against fixed weights:",
            table(
                ("codec", "against", "BD-rate in per cent"),
                ((*pair, with_interval(bd_rate(data, *pair), 1)) for pair in FURTHER),
            ),
            "What is minimised is R + λD at each level; in per cent above (+) or below (−):",
            _losses(data),
            _weights_and_steps(data),
            f"{seeds} seed{'s' * (seeds != 1)}: with so few, only very large differences can be "
            "told from noise, and a short interval is short by chance.",
        ]
    )


FURTHER = [
    *((name, LONG) for name, design in ALTERNATIVES.items() if design.one_level),
    *((balanced, static) for static, balanced in STATIC.items()),
]
"""Pairs that are compared besides those of :data:`COMPARED`."""


def _setup(data: Data) -> str:
    runs, levels, steps = data["runs"], len(data["lambdas"]), data["steps"]
    seconds = sum(run.get("seconds", 0) for by_name in runs.values() for run in by_name.values())
    return (
        f"λ = {', '.join(f'{lmbda:g}' for lmbda in data['lambdas'])}; seeds {', '.join(runs)}; "
        f"held out: {', '.join(_held_out(data))}. Stage 1: {data['start steps']} steps at the "
        f"highest λ. From its checkpoint {steps} steps on all {levels} levels, the first half with "
        "noise for the decoder (stage 2), the second with rounded symbols (stage 3). From the same "
        "checkpoint, with the same crops and as many passes through the codec: "
        f"{levels} single-rate models of {steps} steps each, and one model of {levels * steps} "
        "steps on one random level each. To show what more training would bring: single-rate "
        f"models of {levels * steps} steps each. Training took {seconds / 60:.1f} minutes."
    )


def _held_out(data: Data) -> list[str]:
    runs = next(iter(data["runs"].values()))
    return list(runs[SINGLE]["points"][0]["images"])


def bd_rate(data: Data, test: str, anchor: str, *, between: bool = False) -> Difference | None:
    """BD-rate of `test` over `anchor` in per cent: a mean over photographs, for each seed.

    None if the curves of a photograph cannot be compared, as after a training of seconds.
    """

    def measure(runs: Mapping[str, OneRun], image: str) -> float:
        points = curve(runs[test], image, between=between)
        return compare(points, curve(runs[anchor], image)).rate

    try:
        return _difference(data, measure)
    except CurveError:
        return None


def loss_ratio(data: Data, test: str, anchor: str, lmbda: float) -> Difference:
    """By how many per cent R + λD of `test` lies above that of `anchor`."""

    def loss(run: OneRun, image: str) -> float:
        (score,) = (Score(*p["images"][image]) for p in run["points"] if p["lambda"] == lmbda)
        return rate_distortion_loss(score, lmbda)

    return _difference(
        data, lambda runs, image: 100 * (loss(runs[test], image) / loss(runs[anchor], image) - 1)
    )


def _difference(data: Data, measure: Callable[[Mapping[str, OneRun], str], float]) -> Difference:
    images = _held_out(data)
    return Difference(
        tuple(fmean(measure(runs, image) for image in images) for runs in data["runs"].values())
    )


def curve(run: OneRun, image: str, *, between: bool = False) -> list[Score]:
    """Points of one photograph at the trained levels; with `between`, also at those in between."""
    return [Score(*p["images"][image]) for p in run["points"] if p["trained"] or between]


def _bd_rates(data: Data) -> str:
    rows = []
    for name, above in {BEFORE: SINGLE, LONG: SINGLE, **COMPARED}.items():
        between = name != LONG and with_interval(bd_rate(data, name, SINGLE, between=True), 1)
        change = above != SINGLE and with_interval(bd_rate(data, name, above), 1)
        times = [runs[name].get("ms_per_step") for runs in data["runs"].values()]
        rows.append(
            (
                name,
                with_interval(bd_rate(data, name, SINGLE), 1),
                between or "",
                change or "",
                f"{fmean(times):.0f}" if all(times) else "",
            )
        )
    head = ("codec", "against single-rate models", "with steps in between", "change", "ms per step")
    return table(head, rows)


def _losses(data: Data) -> str:
    pairs = [(name, SINGLE) for name in (LONG, *COMPARED)]
    pairs += [(name, other) for static, name in STATIC.items() for other in (PLAIN, static)]
    lambdas = data["lambdas"]
    rows = (
        (*pair, *(with_interval(loss_ratio(data, *pair, lmbda), 1) for lmbda in lambdas))
        for pair in pairs
    )
    return table(("codec", "over", *(f"λ = {lmbda:g}" for lmbda in lambdas)), rows)


def _weights_and_steps(data: Data) -> str:
    """What was learned for each level, as means over the seeds."""
    rows = [
        (f"*{name}*, mean weight", *_by_level(data, name, lambda run: map(fmean, run["weights"])))
        for name in STATIC.values()
    ]
    steps = _by_level(data, PLAIN, lambda run: run["hyper_steps"])
    head = ("learned", *(f"λ = {lmbda:g}" for lmbda in data["lambdas"]))
    return table(head, [*rows, (f"*{PLAIN}*, step of z", *steps)])


def _by_level(data: Data, name: str, measure: Callable[[OneRun], Iterable[float]]) -> list[str]:
    levels = zip(*(measure(runs[name]) for runs in data["runs"].values()), strict=True)
    return [f"{fmean(values):.2f}" for values in levels]


COLOURS = dict(zip((*DESIGNS, *STATIC), colormaps["tab10"].colors, strict=False))


def figures(title: str, data: Data) -> Iterator[Drawing]:
    """The curves of each seed, and the weights of the levels under MGDA."""
    yield Drawing(
        "variable-rate-curves",
        "Mean over the held-out photographs, a panel for each seed; rings are steps in between.",
        partial(_curves, data["runs"]),
    )
    yield Drawing(
        "variable-rate-weights",
        "The weight of each level's loss under MGDA, mean over seeds, in tenths of a run.",
        partial(_weights, data),
    )


def _curves(seeds: Mapping[str, Mapping[str, OneRun]]) -> Figure:
    figure, axes = grid(1, len(seeds), width=4.6, height=4.6, sharey=True)
    for ax, (seed, runs) in zip(axes, seeds.items(), strict=True):
        for name, colour in {BEFORE: "0.7", **COLOURS}.items():
            _plot(ax, runs[name]["points"], name, colour)
        for name, marker in {SINGLE: "s", LONG: "^"}.items():
            points = [_mean(point) for point in runs[name]["points"]]
            plot_curve(ax, points, marker, color="black", markersize=5, label=name, zorder=4)
        ax.set_title(f"seed {seed}", fontsize="medium")
        ax.set_xlabel("rate (bits per pixel)")
    axes[0].set_ylabel("PSNR (dB)")
    axes[-1].legend(loc="lower right", frameon=False, fontsize="small")
    return figure


def _plot(ax: Axes, points: Sequence[Mapping[str, Any]], label: str, colour: Any) -> None:
    points = sorted(points, key=lambda point: point["lambda"])
    plot_curve(ax, [_mean(p) for p in points], "-", color=colour, linewidth=1, label=label)
    for trained, face in ((True, colour), (False, "white")):
        chosen = [_mean(p) for p in points if p["trained"] is trained]
        plot_curve(ax, chosen, "o", color=colour, markerfacecolor=face, markersize=4)


def _mean(point: Mapping[str, Any]) -> Score:
    return mean_score(point["images"])


def _weights(data: Data) -> Figure:
    lambdas = data["lambdas"]
    figure, axes = grid(1, len(STATIC), width=4.6, height=4.6, sharey=True)
    colours = colormaps["viridis"](np.linspace(0.1, 0.9, len(lambdas)))
    for ax, name in zip(axes, STATIC.values(), strict=True):
        weights = np.mean([runs[name]["weights"] for runs in data["runs"].values()], axis=0)
        position = (np.arange(weights.shape[1]) + 0.5) / weights.shape[1]
        bottoms = np.cumsum(weights, axis=0) - weights
        for lmbda, weight, bottom, colour in zip(lambdas, weights, bottoms, colours, strict=True):
            width = 0.9 / len(position)
            ax.bar(position, weight, width, bottom, color=colour, label=f"λ = {lmbda:g}")
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("part of post-training")
        ax.set_ylim(0, 1)
    axes[0].set_ylabel("weight of the level's loss")
    axes[-1].legend(loc="lower right", fontsize="small")
    return figure
