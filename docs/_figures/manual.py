"""The figures of the manual, drawn from what the library computes.

    python -m docs._figures.manual

Each figure is an SVG in ``docs/figures/manual`` that holds its own data as its description, so that
a test can compare them with what the library computes now. Figures have a white background and
read on dark pages, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Wedge

import moo_balance as mb
from examples import multitask
from moo_balance.weighting import Weighting

FOLDER = Path(__file__).parents[1] / "figures" / "manual"

INK, FAINT = "#333333", "#d9d9d9"
FIRST, SECOND, RESULT, GREEN = "#0072b2", "#d55e00", "#000000", "#009e73"
TASKS = {"digit": FIRST, "parity": GREEN, "reconstruction": SECOND}
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "moo_balance",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 5.6  # inches: at 400 pixels a letter of 10 points is 10 pixels high

Data = dict[str, Any]
Gradients = tuple[tuple[float, float], tuple[float, float]]


# ------------------------------------------------------------------ two gradients in a plane


def balance(weighting: Weighting, gradients: Gradients, values: Mapping[str, float]) -> Data:
    """What one `backward` does with two linear losses of these gradients and values."""
    point = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = mb.BalancedOptimizer(torch.optim.SGD([point], lr=1.0), weighting)
    rows = torch.tensor(gradients, dtype=torch.float64)
    slopes = (rows @ point).unbind()
    losses = {
        name: slope + value for slope, (name, value) in zip(slopes, values.items(), strict=True)
    }
    optimizer.backward(losses)
    return {
        "coefficients": [float(c) for c in optimizer.metrics.coefficients.values()],
        "gramian": (rows @ rows.T).tolist(),
        "direction": point.grad.tolist(),
    }


def draw_arrow(ax: Axes, vector: tuple[float, float], colour: str, width: float) -> None:
    style = {"color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    head = "-|>,head_width=0.26,head_length=0.5"
    ax.annotate("", vector, (0, 0), arrowprops={"arrowstyle": head, **style})


def draw_plane(
    ax: Axes, gradients: Gradients, direction: list[float], length: float, reach: float
) -> None:
    """Both gradients, the direction at a given length, and the cone in which no loss rises."""
    angles = [float(torch.atan2(*torch.tensor(g).flip(0).unbind())) for g in gradients]
    low, high = sorted(180 / torch.pi * angle for angle in angles)
    cone = Wedge((0, 0), reach, high - 90, low + 90, color=GREEN, alpha=0.16, linewidth=0)
    ax.add_patch(cone)
    norm = float(torch.tensor(direction).norm())
    for gradient, colour in zip(gradients, (FIRST, SECOND), strict=True):
        draw_arrow(ax, gradient, colour, 2.2)
    draw_arrow(ax, tuple(length * x / norm for x in direction), RESULT, 1.8)
    ax.set_aspect("equal")
    ax.axis("off")


# ------------------------------------------------------------------ how a step goes

STEP_GRADIENTS: Gradients = ((1.6, 0.4), (-0.3, 0.8))
STEP_LOSSES = {"rate": 0.9, "distortion": 0.4}


def measure_step() -> Data:
    """Losses, Gramian, coefficients and gradient of one step of NashMTL."""
    return balance(mb.NashMTL(), STEP_GRADIENTS, STEP_LOSSES)


def draw_step(data: Data) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.4))
    boxes = {1: (0.02, 0.57), 2: (0.56, 0.57), 3: (0.56, 0.03), 4: (0.02, 0.03)}
    axes = {k: figure.add_axes((*corner, 0.42, 0.36)) for k, corner in boxes.items()}
    titles = ("losses by name", "Gramian", "a coefficient each", "the sum in .grad")
    for ax, (number, title) in zip(axes.values(), enumerate(titles, 1), strict=True):
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
        ax.spines[["right", "top"]].set_visible(True)
        for spine in ax.spines.values():
            spine.set_color(FAINT)
        ax.set_title(f"{number}  {title}", fontsize=11, fontweight="bold", loc="left")
    figure.text(0.37, 0.5, "step()", va="center", family="monospace")
    _write_losses(axes[1])
    _write_matrix(axes[2], data["gramian"])
    _write_coefficients(axes[3], data["coefficients"])
    _draw_gradient(axes[4], data["direction"])
    for tail, head in (
        ((0.45, 0.75), (0.55, 0.75)),
        ((0.77, 0.56), (0.77, 0.47)),
        ((0.55, 0.21), (0.45, 0.21)),
        ((0.35, 0.40), (0.35, 0.56)),
    ):
        figure.add_artist(
            FancyArrowPatch(
                tail,
                head,
                transform=figure.transFigure,
                arrowstyle="-|>",
                mutation_scale=14,
                color=INK,
            )
        )
    return figure


def _write_losses(ax: Axes) -> None:
    for y, colour, (name, value) in zip(
        (0.66, 0.34), (FIRST, SECOND), STEP_LOSSES.items(), strict=True
    ):
        ax.text(0.1, y, name, color=colour, va="center", fontsize=12)
        ax.text(0.9, y, f"{value:.2f}", color=colour, va="center", ha="right", fontsize=12)


def _write_matrix(ax: Axes, gramian: list[list[float]]) -> None:
    for row, y in enumerate((0.62, 0.32)):
        for column, x in enumerate((0.35, 0.7)):
            value = gramian[row][column]
            colour = INK if row != column else (FIRST, SECOND)[row]
            ax.text(x, y, f"{value:.2f}".replace("-", "−"), color=colour, ha="center", fontsize=12)
    for x, inward in ((0.14, 0.2), (0.9, 0.84)):
        ax.plot([inward, x, x, inward], [0.82, 0.82, 0.22, 0.22], color=INK, linewidth=1.2)


def _write_coefficients(ax: Axes, coefficients: list[float]) -> None:
    largest = max(coefficients)
    for y, value, colour, name in zip(
        (0.66, 0.24), coefficients, (FIRST, SECOND), STEP_LOSSES, strict=True
    ):
        ax.barh(y, 0.6 * value / largest, height=0.16, left=0.06, color=colour)
        ax.text(0.06, y + 0.11, name, color=colour, va="bottom")
        ax.text(0.1 + 0.6 * value / largest, y, f"× {value:.2f}", color=colour, va="center")


def _draw_gradient(ax: Axes, direction: list[float]) -> None:
    inner = ax.inset_axes((0.02, 0.02, 0.96, 0.96))
    draw_plane(inner, STEP_GRADIENTS, direction, float(torch.tensor(direction).norm()), 1.55)
    inner.set(xlim=(-0.75, 2.0), ylim=(-0.3, 1.7))


# ------------------------------------------------------------------ what methods do

GEOMETRIES: dict[str, Gradients] = {
    "aligned": ((1.35, 0.05), (0.32, 0.5)),
    "in conflict": ((1.35, 0.05), (-0.55, 0.45)),
    "lengths apart": ((1.5, 0.0), (-0.06, 0.3)),
}
DIRECTIONS: dict[str, Weighting] = {
    "Sum": mb.Sum(),
    "CAGrad": mb.CAGrad(),
    "PCGrad, UPGrad": mb.UPGrad(),
    "AlignedMTL": mb.AlignedMTL(),
    "MGDA": mb.MGDA(),
    "AnalyticQP": mb.AnalyticQP(),
    "GradientNorms": mb.GradientNorms(),
    "NashMTL, ConFIG": mb.NashMTL(),
}


def measure_directions() -> Data:
    """The direction of each method for each pair of gradients, at length 1; both losses are 1."""
    measured: Data = {}
    for method, weighting in DIRECTIONS.items():
        for geometry, gradients in GEOMETRIES.items():
            found = balance(weighting, gradients, {"first": 1.0, "second": 1.0})["direction"]
            norm = sum(x * x for x in found) ** 0.5
            measured[f"{method}: {geometry}"] = [x / norm for x in found]
    return measured


def draw_directions(data: Data) -> Figure:
    figure = Figure(figsize=(WIDTH, 10.4))
    axes = figure.subplots(len(DIRECTIONS), len(GEOMETRIES))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.925, 0.04, 0.12)
    for row, method in zip(axes, DIRECTIONS, strict=True):
        for ax, (geometry, gradients) in zip(row, GEOMETRIES.items(), strict=True):
            draw_plane(ax, gradients, data[f"{method}: {geometry}"], 0.85, 1.0)
            ax.set(xlim=(-0.8, 1.6), ylim=(-0.5, 1.02))
        row[0].set_title(method, fontsize=10.5, fontweight="bold", loc="left", pad=3)
    for ax, geometry in zip(axes[0], GEOMETRIES, strict=True):
        ax.text(0.5, 1.25, geometry, transform=ax.transAxes, ha="center", fontsize=11)
    handles = [
        Line2D([], [], color=FIRST, linewidth=2.4, label="first gradient"),
        Line2D([], [], color=SECOND, linewidth=2.4, label="second"),
        Line2D([], [], color=RESULT, linewidth=1.8, label="direction"),
        Patch(color=GREEN, alpha=0.2, label="no loss rises"),
    ]
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=4,
        frameon=False,
        fontsize=9.5,
        handlelength=1.1,
        columnspacing=1.1,
        handletextpad=0.4,
    )
    return figure


# ------------------------------------------------------------------ a conflict report


def draw_batch(digits: multitask.Digits) -> multitask.Digits:
    chosen = torch.randint(len(digits.labels), (64,))
    return multitask.Digits(digits.images[chosen], digits.labels[chosen])


def measure_report() -> Data:
    """Cosines and intervals on the model of ``examples/multitask.py`` after 100 plain steps."""
    with torch.random.fork_rng():
        digits, _ = multitask.load()
        model = multitask.train(mb.Sum(), digits, steps=100, seed=0)
        batches = [draw_batch(digits) for _ in range(32)]
        report = mb.diagnose(partial(multitask.losses, model), model.trunk, batches)
    rows = {"all": report.pairs} | {name: module.pairs for name, module in report.modules.items()}
    return {
        row: {", ".join(names): [pair.cosine, pair.low, pair.high] for names, pair in pairs.items()}
        for row, pairs in rows.items()
    }


def draw_report(data: Data) -> Figure:
    labels = {"all": "whole\ntrunk", "0": "first\nlayer", "2": "second\nlayer"}
    columns = [f"{first}\n{second}" for first, second in combinations(TASKS, 2)]
    cells = [list(pairs.values()) for pairs in data.values()]
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    ax = figure.add_subplot()
    image = ax.imshow(
        [[cosine for cosine, *_ in row] for row in cells],
        cmap="RdBu",
        vmin=-1,
        vmax=1,
        aspect="auto",
    )
    ax.set_xticks(range(3), columns)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(data)), [labels[row] for row in data])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for y, row in enumerate(cells):
        for x, (cosine, low, high) in enumerate(row):
            sure = not low <= 0.0 <= high
            ink = "white" if abs(cosine) > 0.6 else INK
            weight = "bold" if sure else "normal"
            value, interval = f"{cosine:.2f}", f"{low:.2f} … {high:.2f}"
            style = {"ha": "center", "color": ink}
            ax.text(
                x,
                y - 0.02,
                value.replace("-", "−"),
                va="bottom",
                fontsize=13,
                fontweight=weight,
                **style,
            )
            ax.text(x, y + 0.08, interval.replace("-", "−"), va="top", fontsize=9.5, **style)
    figure.colorbar(image, ax=ax, ticks=[-1, 0, 1], pad=0.02, label="cosine")
    return figure


# ------------------------------------------------------------------ a run

STEPS, WINDOW = 200, 10


def measure_run() -> Data:
    """Losses and coefficients of two runs of the same model, as means of ten steps."""
    return {
        name: record(method) for name, method in {"Sum": mb.Sum(), "NashMTL": mb.NashMTL()}.items()
    }


def record(weighting: Weighting) -> Data:
    """Train the model of ``examples/multitask.py``; series of the history by key."""
    history = mb.History()
    with torch.random.fork_rng():
        digits, _ = multitask.load()
        torch.manual_seed(0)
        model = multitask.ThreeHeads()
        optimizer = mb.BalancedOptimizer(torch.optim.Adam(model.parameters(), lr=5e-3), weighting)
        for _ in range(STEPS):
            optimizer.step(partial(multitask.losses, model, draw_batch(digits)))
            history.append(optimizer.metrics)
    return {
        f"{kind}/{task}": average(history.series(f"{kind}/{task}")[1])
        for kind in ("loss", "coefficient")
        for task in TASKS
    }


def average(series: list[float]) -> list[float]:
    return torch.tensor(series).unflatten(0, (-1, WINDOW)).mean(1).tolist()


def draw_run(data: Data) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(WINDOW // 2, STEPS, WINDOW)
    for task, colour in TASKS.items():
        start = data["Sum"][f"loss/{task}"][0]
        for run, style in (("Sum", "--"), ("NashMTL", "-")):
            series = [value / start for value in data[run][f"loss/{task}"]]
            above.plot(steps, series, style, color=colour, linewidth=1.8)
        below.plot(steps, data["NashMTL"][f"coefficient/{task}"], color=colour, linewidth=1.8)
    for ax in (above, below):
        ax.set_yscale("log")
        ax.grid(axis="y", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    above.set_ylabel("loss / first loss of the sum")
    below.set(ylabel="coefficient\n(NashMTL)", xlabel="step", xlim=(0, STEPS))
    styles = {"NashMTL": "-", "Sum": "--"}
    figure.legend(
        handles=[Line2D([], [], color=c, linewidth=2.2, label=task) for task, c in TASKS.items()]
        + [Line2D([], [], color=INK, linestyle=s, label=run) for run, s in styles.items()],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        fontsize=9.5,
        handlelength=1.4,
        columnspacing=1.0,
        handletextpad=0.4,
    )
    return figure


# ------------------------------------------------------------------ writing and reading


class Drawing(NamedTuple):
    """How a figure gets its data, how it is drawn, and how exactly the data should be the same."""

    measure: Callable[[], Data]
    draw: Callable[[Data], Figure]
    tolerance: float


# A training amplifies rounding, which differs between machines.
FIGURES = {
    "step": Drawing(measure_step, draw_step, 1e-3),
    "directions": Drawing(measure_directions, draw_directions, 1e-3),
    "report": Drawing(measure_report, draw_report, 0.05),
    "run": Drawing(measure_run, draw_run, 0.3),
}


def shorten(data: Any) -> Any:
    """The same data with five digits."""
    if isinstance(data, dict):
        return {key: shorten(value) for key, value in data.items()}
    return [shorten(value) for value in data] if isinstance(data, list) else float(f"{data:.5g}")


def write(name: str, data: Data, folder: Path = FOLDER) -> Path:
    """Draw the data, and store them in the picture's description."""
    data = shorten(data)
    path = folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        figure = FIGURES[name].draw(data)
        metadata = {"Date": None, "Description": json.dumps(data, ensure_ascii=False)}
        figure.savefig(path, metadata=metadata)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
    return path


def read(name: str) -> Data:
    """The data that a picture was drawn from."""
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    return json.loads(unescape(re.search(r"(?s)<dc:description>(.*?)</dc:description>", text)[1]))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, drawing in FIGURES.items():
        print(write(name, drawing.measure()))
