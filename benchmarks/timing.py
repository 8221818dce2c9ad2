"""Races: contestants take turns, so that whatever slows the machine slows all of them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

TURN = 0.02
"""Seconds that a turn should last: a step that is over sooner is taken several times in a row."""

MOST_IN_A_ROW = 10

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Runner:
    """A step, and the number of steps after which it repeats itself."""

    step: Callable[[], object]
    period: int = 1


class Spread(NamedTuple):
    """Median and quartiles."""

    middle: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        return Spread(float(middle), float(low), float(high))


@dataclass(frozen=True)
class Patience:
    """How long a race goes on: for so many seconds, but not below or above these rounds."""

    seconds: float
    fewest: int = 7
    most: int = 200


def race(
    runners: Mapping[str, Runner],
    patience: Patience,
    synchronize: Callable[[], None] = lambda: None,
    in_a_row: int | None = None,
) -> dict[str, list[float]]:
    """Seconds per step of each runner in each round, in another order each round.

    A first round, which warms up, tells how many steps make a turn; it is not counted. Ranks of a
    process group must not each find out for themselves: for them `in_a_row` says it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names, shuffle = list(runners), random.Random(0).shuffle
    with _undisturbed():
        repeats = {name: _repeats(runners[name], synchronize) for name in names}
        if in_a_row is not None:
            repeats = dict.fromkeys(names, in_a_row)
        start = time.perf_counter()
        for turn in range(patience.most):
            if turn >= patience.fewest and time.perf_counter() - start > patience.seconds:
                break
            shuffle(names)
            for name in names:
                seconds[name].append(_turn(runners[name], repeats[name], synchronize))
            gc.collect()
    return seconds


def _turn(runner: Runner, repeats: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        runner.step()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _repeats(runner: Runner, synchronize: Callable[[], None]) -> int:
    """Steps of one turn, whole periods of them."""
    for _ in range(2):
        took = _turn(runner, runner.period, synchronize)
    periods = max(1, min(MOST_IN_A_ROW, round(TURN / max(took, 1e-9))) // runner.period)
    return periods * runner.period


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection but when it is asked for, and then of nothing that was there before."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def ratios(seconds: Seconds, name: str, to: str) -> list[float]:
    """Round by round, so that a slow moment of the machine cancels."""
    return [own / other for own, other in zip(seconds[name], seconds[to], strict=True)]


def latency(call: Callable[[], object], most_seconds: float = 0.2, most: int = 300) -> float:
    """Median seconds of a call that is short and stands alone."""
    values: list[float] = []
    with _undisturbed():
        call()
        start = time.perf_counter()
        while len(values) < most and (not values or time.perf_counter() - start < most_seconds):
            begin = time.perf_counter()
            call()
            values.append(time.perf_counter() - begin)
    return median(values)
