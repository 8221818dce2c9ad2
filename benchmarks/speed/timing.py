"""Interleaved timing: steps take turns, so that a slow machine slows all of them alike."""

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

TURN_SECONDS = 0.02
"""A turn should last this long: a shorter step is taken several times in a row."""

MAX_IN_A_ROW = 10

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
class Budget:
    """How long to measure: so many seconds, within these numbers of rounds."""

    seconds: float
    min_rounds: int = 7
    max_rounds: int = 200


def interleave(
    runners: Mapping[str, Runner],
    budget: Budget,
    synchronize: Callable[[], None] = lambda: None,
    in_a_row: int | None = None,
) -> dict[str, list[float]]:
    """Seconds per step of each runner in each round, in another order each round.

    A first round warms up and decides how many steps make a turn; it is not counted. The ranks of
    a process group must all take the same number: for them `in_a_row` sets it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names, shuffle = list(runners), random.Random(0).shuffle
    with _without_garbage_collection():
        repeats = {name: _choose_repeats(runners[name], synchronize) for name in names}
        if in_a_row is not None:
            repeats = dict.fromkeys(names, in_a_row)
        start = time.perf_counter()
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
                break
            shuffle(names)
            for name in names:
                seconds[name].append(_time_turn(runners[name], repeats[name], synchronize))
            gc.collect()
    return seconds


def _time_turn(runner: Runner, repeats: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        runner.step()
    synchronize()
    return (time.perf_counter() - start) / repeats


def _choose_repeats(runner: Runner, synchronize: Callable[[], None]) -> int:
    """Return the number of steps of one turn, a multiple of the period."""
    for _ in range(2):
        took = _time_turn(runner, runner.period, synchronize)
    periods = max(1, min(MAX_IN_A_ROW, round(TURN_SECONDS / max(took, 1e-9))) // runner.period)
    return periods * runner.period


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect garbage only between rounds, and never objects that existed before."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def ratios(seconds: Seconds, name: str, to: str) -> list[float]:
    """Ratios of two runners within each round, so that a slow moment of the machine cancels."""
    return [own / other for own, other in zip(seconds[name], seconds[to], strict=True)]


def latency(call: Callable[[], object], max_seconds: float = 0.2, max_calls: int = 300) -> float:
    """Median seconds of a short call."""
    values: list[float] = []
    with _without_garbage_collection():
        call()
        start = time.perf_counter()
        while len(values) < max_calls and (not values or time.perf_counter() - start < max_seconds):
            begin = time.perf_counter()
            call()
            values.append(time.perf_counter() - begin)
    return median(values)
