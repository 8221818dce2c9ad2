"""What the page shows of variable-rate codecs: the increments, the losses, the curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lic.figures import Drawing, grid, plot_curve
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
from examples.lic.evaluation import Score, mean_score, rate_distortion_loss

Data = Mapping[str, Any]
OneRun = Mapping[str, Any]


def section(title: str, data: Data) -> str:
    """What was run, the increments, the losses that were minimised, and what can be said."""
    return "\n\n".join((_setup(data), _increments(data), _losses(data), _details(data)))


def _held_out(data: Data) -> list[str]:
    runs = next(iter(data["runs"].values()))
    return list(runs[SINGLE]["points"][0]["images"])


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

    def measure(runs: Mapping[str, OneRun], image: str) -> float:
        own, other = (
            rate_distortion_loss(_score(runs[name], image, lmbda), lmbda) for name in (test, anchor)
        )
        return 100 * (own / other - 1)

    return _difference(data, measure)


def _difference(data: Data, measure: Callable[[Mapping[str, OneRun], str], float]) -> Difference:
    images = _held_out(data)
    return Difference(
        tuple(fmean(measure(runs, image) for image in images) for runs in data["runs"].values())
    )


def curve(run: OneRun, image: str, *, between: bool = False) -> list[Score]:
    """Points of one photograph at the trained levels; with `between`, also at those in between."""
    return [Score(*p["images"][image]) for p in run["points"] if p["trained"] or between]


def _score(run: OneRun, image: str, lmbda: float) -> Score:
    (score,) = (Score(*p["images"][image]) for p in run["points"] if p["lambda"] == lmbda)
    return score


def _increments(data: Data) -> str:
    rows = [_row(data, BEFORE), _row(data, LONG)]
    rows += [_row(data, name, above) for name, above in COMPARED.items()]
    head = (
        "codec", "against single-rate models", "with steps in between", "change", "ms per step",
    )  # fmt: skip
    return (
        "BD-rate in per cent (less is better), mean over seeds and photographs with the 95 % "
        "t-interval over seeds. The change is the BD-rate over the row above, and for the last "
        f"rows, which replace the plain average of the levels, over *{PLAIN}*:\n\n"
        + table(head, rows)
    )


def _row(data: Data, name: str, above: str = SINGLE) -> tuple[str, ...]:
    times = [runs[name].get("ms_per_step") for runs in data["runs"].values()]
    return (
        name,
        with_interval(bd_rate(data, name, SINGLE), 1),
        "" if name == LONG else with_interval(bd_rate(data, name, SINGLE, between=True), 1),
        "" if above == SINGLE else with_interval(bd_rate(data, name, above), 1),
        f"{fmean(times):.0f}" if all(times) else "",
    )


def _losses(data: Data) -> str:
    lambdas = data["lambdas"]
    rows = [
        (name, *(with_interval(loss_ratio(data, name, SINGLE, x), 1) for x in lambdas))
        for name in (LONG, *COMPARED)
    ]
    return (
        "What is minimised is R + λD at each level; in per cent above (+) or below (−) the "
        "single-rate models:\n\n" + table(("codec", *(f"λ = {x:g}" for x in lambdas)), rows)
    )


def _details(data: Data) -> str:
    pairs = list(COMPARED.items())
    # As many steps in all, for all levels together and not for one.
    pairs += [(name, LONG) for name, design in ALTERNATIVES.items() if design.one_level]
    pairs += [(balanced, static) for static, balanced in STATIC.items()]
    seeds = len(data["runs"])
    lines = [
        *(f"*{name}* against *{other}*: {verdict(bd_rate(data, name, other))}."
          for name, other in pairs),
        *_learned(data),
        f"{seeds} seed{'s' * (seeds != 1)}: with so few, only very large differences can be told "
        "from noise.",
    ]  # fmt: skip
    return "\n".join(f"- {line}" for line in lines)


def _learned(data: Data) -> Iterator[str]:
    """What the methods chose, and what came of it at each level."""
    for static, name in STATIC.items():
        weights = _by_level(data, name, lambda run: [fmean(row) for row in run["weights"]])
        yield f"*{name}*, mean weights: {weights}."
        for anchor in (PLAIN, static):
            ratios = {x: loss_ratio(data, name, anchor, x) for x in data["lambdas"]}
            shown = ", ".join(f"{with_interval(r, 1)} at λ = {x:g}" for x, r in ratios.items())
            yield f"*{name}*, R + λD over *{anchor}* in per cent: {shown}."
    yield f"*{PLAIN}*, learned steps: {_by_level(data, PLAIN, lambda run: run['hyper_steps'])}."


def _by_level(data: Data, name: str, measure: Callable[[OneRun], Sequence[float]]) -> str:
    """What a run has for each level, as a mean over the seeds."""
    levels = zip(*(measure(runs[name]) for runs in data["runs"].values()), strict=True)
    named = zip(data["lambdas"], levels, strict=True)
    return ", ".join(f"{fmean(values):.2f} at λ = {lmbda:g}" for lmbda, values in named)


def verdict(difference: Difference | None) -> str:
    """What an interval allows one to say."""
    if difference is None:
        return "no BD-rate, some curves hardly overlap or do not rise"
    words = {-1: "fewer bits", 0: "no difference that can be told from noise", 1: "more bits"}
    return f"{words[difference.sign()]} ({with_interval(difference, 1)})"


COLOURS = dict(zip((*DESIGNS, *STATIC), colormaps["tab10"].colors, strict=False))


def figures(title: str, data: Data) -> Iterator[Drawing]:
    """The curves of each seed, and the weights of the levels under MGDA."""
    yield Drawing(
        "variable-rate-curves",
        "Mean over the held-out photographs, a panel for each seed; rings are steps in between.",
        _curves(data["runs"]),
    )
    yield Drawing(
        "variable-rate-weights",
        "The weight of each level's loss under MGDA, mean over seeds, in tenths of a run.",
        _weights(data),
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
