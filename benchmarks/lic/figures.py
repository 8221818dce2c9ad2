"""The figures of the page, from the summaries of experiments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from examples.lic.plots import new_figure


def draw_forest(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """All differences with their intervals, by experiment; null pairs are hollow."""
    rows = [(title, row) for title, rows in groups.items() for row in rows]
    figure, (ax,) = new_figure(9.0, 1.0 + 0.24 * (len(rows) + len(groups)))
    y, labels = 0, []
    for title, comparisons in groups.items():
        labels.append((y, title))
        for row in comparisons:
            y -= 1
            color, fill = ("0.45", "white") if row["null"] else ("C0", "C0")
            half = row["half"] if math.isfinite(row["half"]) else 0.0
            ax.errorbar(row["mean"], y, xerr=half, fmt="o", color=color, markerfacecolor=fill,
                        markersize=4, capsize=2, linewidth=1)  # fmt: skip
            labels.append((y, f"{row['setting']}: {row['name']}"))
        y -= 1
    ax.axvline(0, color="0.3", linewidth=0.8)
    positions, texts = zip(*labels, strict=True)
    ax.set_yticks(positions, texts, fontsize=6)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in groups else "normal")
    ax.set_ylim(y, 1)
    ax.set_xlabel("bits in per cent at equal PSNR; negative: fewer")
    return figure


def draw_curves(curves: Mapping[str, Iterable[Sequence[float]]]) -> Figure:
    """Mean PSNR over the geometric mean of the rate, for each curve of ``(ln R, PSNR)``."""
    figure, (ax,) = new_figure(6.0, 4.2)
    for name, points in curves.items():
        rates, psnrs = zip(*sorted(map(tuple, points)), strict=True)
        ax.plot([math.exp(rate) for rate in rates], psnrs, "o-", markersize=4, label=name)
    ax.set_xscale("log")
    ax.set_xlabel("rate (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")
    ax.legend(frameon=False)
    return figure
