"""How often the intervals of ``diagnose`` cover, simulated with gradients that are known.

    python -m benchmarks.coverage

Two losses have expected gradients of length 1 and noise whose spectrum decays. In half of the
settings it has heavy tails; in half of them 60 % of its variance is common to both losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from moo_balance import Figures
from moo_balance._batch_gradients import Products
from moo_balance._conflict_figures import estimate_figures

COUNTS = (3, 4, 8, 16)
RATIOS = (0.03, 0.1, 0.3, 1.0, 10.0)
COSINES = (-0.5, 0.0, 0.8)
SHARED = (0.0, 0.6)
SIZE = 50


class Setting(NamedTuple):
    """What is drawn.

    Args:
        count: Batches of a report.
        ratio: Signal-to-noise ratio of a batch; 0 for gradients that are only noise.
        cosine: Cosine of the expected gradients.
        shared: Part of the noise variance that is common to both losses.
        heavy: Whether the noise of a batch is multiplied by a random number of its own.
        correlation: Correlation of the noise of consecutive batches.
    """

    count: int
    ratio: float
    cosine: float = 0.0
    shared: float = 0.0
    heavy: bool = False
    correlation: float = 0.0


class Shares(NamedTuple):
    """Shares of the reports, from 0 to 1.

    Args:
        cover: The interval contains the cosine.
        empty: It is [-1, 1], and says nothing.
        below: It is below 0.
        above: The first gradient is above the noise.
    """

    cover: float
    empty: float
    below: float
    above: float


def draw(setting: Setting, generator: torch.Generator) -> Tensor:
    """Gradients of the two losses in each batch, shape [B, 2, SIZE]."""
    shape = (setting.count, 3, SIZE)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if setting.heavy:
        factors = torch.empty(setting.count, 3, 1, dtype=torch.float64)
        noise *= factors.exponential_(generator=generator) / 2**0.5
    rho = setting.correlation
    for before, after in pairwise(noise):
        after.mul_((1 - rho**2) ** 0.5).add_(before, alpha=rho)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    spectrum = torch.arange(1, SIZE + 1, dtype=torch.float64)[order].rsqrt()
    noise = noise * spectrum / spectrum.norm()
    shared = setting.shared
    noise = shared**0.5 * noise[:, :1] + (1 - shared) ** 0.5 * noise[:, 1:]
    if not setting.ratio:
        return noise
    means = torch.zeros(2, SIZE, dtype=torch.float64)
    means[0, 0], means[1, 0] = 1.0, setting.cosine
    means[1, 1] = (1 - setting.cosine**2) ** 0.5
    return means + noise / setting.ratio**0.5


def figures_of(rows: Tensor, level: float = 0.95) -> Figures:
    """What ``diagnose`` reports of gradients of K losses in B batches, shape [B, K, P]."""
    count = rows.shape[1]
    products = Products(rows @ rows.sum(0).T, rows @ rows.mT, torch.ones(count).double())
    return estimate_figures([f"loss {k}" for k in range(count)], products, level)


def measure(setting: Setting, reports: int) -> Shares:
    """Simulate reports of one setting."""
    generator = torch.Generator().manual_seed(7)
    outcomes = []
    for _ in range(reports):
        figures = figures_of(draw(setting, generator))
        (pair,) = figures.pairs.values()
        outcomes.append(
            Shares(
                cover=pair.low <= setting.cosine <= pair.high,
                empty=(pair.low, pair.high) == (-1.0, 1.0),
                below=pair.high < 0,
                above=figures.losses["loss 0"].above_noise,
            )
        )
    return Shares(*(sum(column) / reports for column in zip(*outcomes, strict=True)))


def settings(ratio: float, counts: Sequence[int]) -> Iterator[Setting]:
    for count, cosine, shared, heavy in product(counts, COSINES, SHARED, (False, True)):
        yield Setting(count, ratio, cosine, shared, heavy)


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def report(reports: int, counts: Sequence[int] = COUNTS, ratios: Sequence[float] = RATIOS) -> str:
    """The table of the manual, and the sentences around it, as text."""
    lines = [
        row(["signal/noise", "intervals that cover", *(f"[-1, 1] with {n}" for n in counts)]),
        row(["---"] * (2 + len(counts))),
    ]
    below = 0.0
    for ratio in ratios:
        found = {setting: measure(setting, reports) for setting in settings(ratio, counts)}
        covers = [shares.cover for shares in found.values()]
        below = max(below, *(shares.below for s, shares in found.items() if s.cosine == 0))
        empty = [[shares.empty for s, shares in found.items() if s.count == n] for n in counts]
        means = [f"{sum(each) / len(each):.0%}" for each in empty]
        lines.append(row([f"{ratio:g}", f"{min(covers):.1%} … {max(covers):.1%}", *means]))
    noise = [
        measure(Setting(count, 0.0, shared=shared, heavy=heavy), reports).above
        for count, shared, heavy in product(counts, SHARED, (False, True))
    ]
    dependent = Setting(12, 1.0, correlation=0.5)
    lines += [
        f"below 0 with a true cosine of 0: at most {below:.1%}",
        f"above the noise, of gradients that are only noise: at most {max(noise):.1%}",
        f"12 batches whose noise is correlated by 0.5 from one to the next: "
        f"{measure(dependent, reports).cover:.0%} cover, and of gradients that are only noise "
        f"{measure(dependent._replace(ratio=0.0), reports).above:.0%} are above it",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reports", type=int, default=1000)
    print(report(parser.parse_args().reports))
