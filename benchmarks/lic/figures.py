"""What the figures have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from PIL import Image

SMOOTHING = 15


@dataclass(frozen=True)
class Drawing:
    """A figure yet to be drawn, the stem of its file name, and what the page says below it."""

    stem: str
    caption: str
    draw: Callable[[], Figure]

    def png(self) -> bytes:
        """A small file, because the figures are kept with the sources: few pixels and colours."""
        drawn, written = BytesIO(), BytesIO()
        self.draw().savefig(drawn, format="png", dpi=90)
        image = Image.open(drawn).convert("RGB").quantize(48)
        image.save(written, format="png", optimize=True)
        return written.getvalue()


def grid(
    rows: int, columns: int, *, width: float, height: float, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` × `columns` axes, each of this size in inches."""
    # Not pyplot's: nothing global, no display, no backend to choose.
    figure = Figure(figsize=(width * columns, height * rows), dpi=100, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_curve(ax: Axes, points: Sequence[Sequence[float]], *style: str, **options: Any) -> None:
    """Draw (bpp, PSNR) points in the order in which they are given."""
    ax.plot(*zip(*points, strict=True), *style, **options)


def label_rd_axes(ax: Axes) -> None:
    """Name the axes of a rate-distortion plane."""
    ax.set_xlabel("rate (bits per pixel)")
    ax.set_ylabel("PSNR (dB)")


def plain_ticks(axis: Axis) -> None:
    """Numbers without powers of ten on a logarithmic axis of little more than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean; the window shrinks at both ends."""
    kernel = np.ones(min(SMOOTHING, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
