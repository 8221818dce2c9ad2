"""What the recipes share: arguments, a table, step times, and figures."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from moo_balance import FixedWeights, History

# Grey that reads on white and on dark pages, as figures have no background.
INK = "#808080"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of every recipe; `seeds` has the seed of each run, one with ``--quick``."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps and one seed: seconds")
    parser.add_argument("--seed", type=int, default=0, help="the first of three seeds")
    parser.add_argument("--figure", type=Path, help="write the figure to this SVG or PNG file")
    parsed = parser.parse_args(arguments)
    parsed.seeds = range(parsed.seed, parsed.seed + (1 if parsed.quick else 3))
    torch.set_num_threads(1)  # the networks are too small to share
    if parsed.quick:
        print("With --quick there are too few steps to compare methods; the page has the results.")
    return parsed


def missing_package(error: ModuleNotFoundError, command: str) -> SystemExit:
    """Say on stderr how to install what is missing, and return an exit with status 2, to raise."""
    print(f"{error}. Install it by `{command}`.", file=sys.stderr)
    return SystemExit(2)


def split_digits(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's 1797 digits in random parts: images [N, 64] of 0 … 16, and labels [N]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return list(zip(*(part[order].split(sizes) for part in parts), strict=True))


def search_weights(
    names: Sequence[str], count: int, seed: int, score: Callable[[FixedWeights], float]
) -> FixedWeights:
    """Of random static weights those with the least score; they are printed.

    They are from 0.01 to 100, uniform in the logarithm.
    """
    generator = torch.Generator().manual_seed(seed)
    exponents = 4 * torch.rand(count, len(names), generator=generator) - 2
    rows = (10**exponents).tolist()
    best = min((FixedWeights(dict(zip(names, row, strict=True))) for row in rows), key=score)
    print("static weights:", {name: f"{value:.2g}" for name, value in best.values.items()})
    return best


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows of text and numbers; the first column is aligned to the left."""
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for row in (header, *cells):
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *rest)))


def mean_and_range(values: Sequence[float]) -> str:
    """The mean over seeds, and the least and the largest value."""
    mean = statistics.mean(values)
    return f"{mean:.3g} ({min(values):.3g} … {max(values):.3g})"


def print_scores(
    header: Sequence[str],
    scores: Mapping[str, Sequence[Sequence[float]]],
    times: Mapping[str, float] | None = None,
) -> None:
    """Print :func:`mean_and_range` of each score over the runs of each method.

    `scores` has for each method a row for each run; `times` adds a column after them.
    """
    rows = []
    for name, runs in scores.items():
        columns = map(mean_and_range, zip(*runs, strict=True))
        rows.append([name, *columns, *([times[name]] if times else [])])
    print_table(header, rows)


def step_times(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each step, relative to that of ``"Sum"``, which has to be among them.

    The steps take turns, so that all meet the same load.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return relative_medians(times, "Sum")


def relative_medians(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Medians, divided by that of one of them."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: value / medians[reference] for name, value in medians.items()}


def print_step_times(steps: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """Print :func:`step_times` in one line."""
    times = step_times(steps, rounds)
    print("\nTimes of a step:", ", ".join(f"{k} {ratio:.2f}" for k, ratio in times.items()))


def make_axes(rows: int, columns: int, size: tuple[float, float] = (3.2, 2.6)):
    """A figure and its axes, a list of rows; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_history(history: History, losses, coefficients, method: str = "") -> None:
    """Draw losses and coefficients on logarithmic axes, with the method's name in the titles."""
    for axes, kind in ((losses, "loss"), (coefficients, "coefficient")):
        history.plot(kind, axes)
        axes.set_yscale("log")
        if method:
            axes.set_title(f"{kind}, {method}")


def draw_scores(axes, scores: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw the first score of each run as a dot, a second one as a square, in a row per method."""
    for row, each in enumerate(scores.values()):
        for place, values in enumerate(zip(*each, strict=True)):
            rows = [row + 0.2 * place] * len(values)
            axes.plot(values, rows, "os"[place], ms=5, color=f"C{row}")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()


def use_few_ticks(axis) -> None:
    """On a logarithmic axis over few powers of 10, number 1, 2 and 5 times each of them only."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure, path: Path) -> None:
    """Give all axes colours that read on white and on dark pages, and write the file."""
    import matplotlib

    for axes in figure.axes:
        axes.tick_params(which="both", colors=INK, labelsize=8)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set(color=INK, fontsize=9)
        axes.spines[:].set_color(INK)
        for line in axes.lines:
            line.set_linewidth(min(line.get_linewidth(), 1))
        if legend := axes.get_legend():
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set(color=INK, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "recipes", "svg.fonttype": "none"}):
        figure.savefig(path, transparent=True, dpi=110, metadata=metadata)
