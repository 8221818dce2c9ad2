"""Markdown tables and log-log plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Mapping[float, float]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned in the source."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def spread(values: Sequence[float]) -> str:
    """Median, and the two quartiles in brackets."""
    middle, low, high = values
    digits = 3 if middle < 2 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def loglog(curves: Mapping[str, Curve], x_label: str, y_label: str, base: int = 10) -> Figure:
    """A plot with one line per curve, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), marker in zip(curves.items(), "osv^D<>ph*", strict=False):
        axes.plot(list(curve), list(curve.values()), marker=marker, markersize=4, label=name)
    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def save(figure: Any, path: Any) -> None:
    """Save a small picture; the same figures give the same file."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
