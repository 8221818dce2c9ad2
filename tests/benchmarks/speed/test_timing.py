"""Interleaved timing is fair, and a ratio compares steps of the same round."""

from __future__ import annotations

import gc
import itertools

import pytest

from benchmarks.speed import timing
from benchmarks.speed.timing import Budget, Runner, Spread, interleave, latency, ratios


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by what each step says it takes."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def takes(clock, *durations):
    """A step that takes these seconds in turn, again and again."""
    cycle = itertools.cycle(durations)

    def step():
        clock[0] += next(cycle)

    return step


def test_each_runner_has_one_turn_in_each_round(clock):
    turns = []

    def runner(name):
        def step():
            turns.append(name)
            clock[0] += 1.0

        return Runner(step)

    seconds = interleave({name: runner(name) for name in "abc"}, Budget(0.0, 5))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    rounds = [turns[k : k + 3] for k in range(6, len(turns), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


def test_short_steps_are_repeated_in_a_turn_by_whole_periods(clock):
    runners = {
        "short": Runner(takes(clock, 0.001)),
        "long": Runner(takes(clock, 1.0)),
        "periodic": Runner(takes(clock, 1.0, *[0.1] * 9), period=10),
    }
    seconds = interleave(runners, Budget(0.0, 2))
    assert seconds["short"] == pytest.approx([0.001] * 2)
    assert seconds["long"] == pytest.approx([1.0] * 2)
    assert seconds["periodic"] == pytest.approx([0.19] * 2)


def test_measuring_ends_when_the_budget_is_spent(clock):
    seconds = interleave(
        {"a": Runner(takes(clock, 1.0))}, Budget(seconds=4.5, min_rounds=2, max_rounds=100)
    )
    assert len(seconds["a"]) == 5
    seconds = interleave({"a": Runner(takes(clock, 1.0))}, Budget(seconds=1000.0, max_rounds=8))
    assert len(seconds["a"]) == 8


def test_ratios_are_taken_within_a_round():
    seconds = {"plain": [1.0, 4.0, 2.0], "ours": [2.0, 8.0, 5.0]}
    assert ratios(seconds, "ours", "plain") == [2.0, 2.0, 2.5]


def test_the_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)


def test_garbage_is_not_collected_within_a_turn(clock):
    enabled = []
    interleave({"a": Runner(lambda: enabled.append(gc.isenabled()))}, Budget(0.0, 2))
    latency(lambda: enabled.append(gc.isenabled()), 0.0)
    assert not any(enabled)
    assert gc.isenabled()
