"""Numbers, lists and tables as the page prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from benchmarks.lic.statistics import Difference


def with_sign(value: float, digits: int) -> str:
    """A number with its sign, and a real minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def with_interval(difference: Difference | None, digits: int, unit: str = "") -> str:
    """A mean and its interval, or a dash where there is none."""
    if difference is None:
        return "–"
    mean, low, high = difference.interval
    text = f"{with_sign(mean, digits)} {unit}".strip()
    if math.isinf(high):
        return f"{text} (one seed)"
    return f"{text} [{with_sign(low, digits)}, {with_sign(high, digits)}]"


def with_range(values: Sequence[float], digits: int, unit: str) -> str:
    """A mean, and the smallest and the largest value."""
    low, high = (with_sign(end, digits) for end in (min(values), max(values)))
    return f"{with_sign(fmean(values), digits)} {unit} [{low}, {high}]"


def with_values(values: Sequence[float], digits: int, unit: str = "") -> str:
    """A mean, and every value."""
    each = ", ".join(with_sign(value, digits) for value in values)
    return f"{f'{with_sign(fmean(values), digits)} {unit}'.strip()} ({each})"


def join(names: Sequence[str]) -> str:
    """Names as English lists them: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
