"""What each method reached on each problem, computed from the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy import stats

from benchmarks.worth.arms import PLAIN
from benchmarks.worth.measure import Floats, Search, Worth, worth
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.runs import Comparison
from benchmarks.worth.training import Outcome

ENOUGH = 8.0
"""A default should be worth this many trials."""


@dataclass(frozen=True)
class Entry:
    """A method on a problem.

    Args:
        outcomes: Its runs, one per seed.
        lr: The learning rate that its pilots chose.
        worth: At equal steps.
        cost: Processor time of a step, in steps of a plain loop; NaN if no run went to its end.
        rank: The mean rank of its scores among the static trials.
        failed: The fraction of runs that broke off or were no better than a trivial solution.
    """

    outcomes: list[Outcome]
    lr: float
    worth: Worth
    cost: float
    rank: float
    failed: float

    @property
    def scores(self) -> list[float]:
        return [outcome.test for outcome in self.outcomes]

    @property
    def median(self) -> float:
        return float(np.median(self.scores))

    @property
    def is_refused(self) -> bool:
        """Whether the method refuses the losses, such as one below its bound, in every run."""
        return all(outcome.error.startswith("BalanceValueError") for outcome in self.outcomes)

    @property
    def errors(self) -> list[str]:
        """Why runs broke off, each reason once."""
        return list(dict.fromkeys(outcome.error for outcome in self.outcomes if outcome.error))


@dataclass(frozen=True)
class Result:
    """A problem: the search for static weights, and all methods by name.

    Args:
        name: The problem.
        search: Its trials.
        lr: The learning rate of the search.
        seconds: Processor time of a step of a plain loop.
        entries: All methods.
    """

    name: str
    search: Search
    lr: float
    seconds: float
    entries: dict[str, Entry]

    def place(self, arm: str) -> float:
        """The position of a method among all, by its mean rank; ties share the mean position."""
        mine = self.entries[arm].rank
        others = [entry.rank for entry in self.entries.values()]
        return 0.5 + sum(rank < mine for rank in others) + sum(rank == mine for rank in others) / 2


Results: TypeAlias = dict[str, Result]


@dataclass(frozen=True)
class Summary:
    """A method over the problems whose losses it takes.

    Args:
        mean: The geometric mean of its worth.
        low: The lower end of the 95 % interval of the mean, over problems (t, of logarithms).
        high: The upper end.
        enough: Problems on which it is worth at least `ENOUGH` trials.
        below_one: Problems on which it is worth less than one trial.
        place: Its mean position among all methods.
        failed: The fraction of runs that failed.
        cost: The geometric mean of its cost.
        problems: How many problems there are.
        refused: Problems whose losses it refuses, which count in no other figure.
    """

    mean: float
    low: float
    high: float
    enough: int
    below_one: int
    place: float
    failed: float
    cost: float
    problems: int
    refused: int

    def is_a_default(self, problems: int) -> bool:
        """Whether two thirds of all problems are won and none is lost, refused or left out."""
        won = 3 * self.enough >= 2 * problems
        return won and self.below_one == 0 and self.problems == problems


def compute(comparison: Comparison) -> Results:
    """The results of each problem, by name. A method without a run is left out."""
    results = {}
    for problem in comparison.plan.problems:
        search = comparison.search(problem)
        # Of runs that took turns with those of the methods: the machine is shared.
        plain = comparison.outcomes(comparison.method_runs(problem, PLAIN.name))
        seconds = float(np.median([outcome.seconds for outcome in plain]))
        entries = {}
        for arm, where in comparison.pairs:
            if where != problem:
                continue
            outcomes = comparison.outcomes(comparison.method_runs(problem, arm))
            if outcomes:
                entries[arm] = _entry(comparison, problem, arm, outcomes, search, seconds)
        lr = comparison.search_rate(problem)
        results[problem] = Result(problem, search, lr, seconds, entries)
    return results


def _entry(
    comparison: Comparison,
    problem: str,
    arm: str,
    outcomes: list[Outcome],
    search: Search,
    seconds: float,
) -> Entry:
    scores = [outcome.test for outcome in outcomes]
    whole = [outcome.seconds for outcome in outcomes if not outcome.error]
    trivial = PROBLEMS[problem].trivial
    return Entry(
        outcomes=outcomes,
        lr=comparison.rate(problem, arm),
        worth=worth(search, scores),
        cost=float(np.median(whole)) / seconds if whole else math.nan,
        rank=float(search.ranks(scores).mean()),
        failed=float(np.mean([not score < trivial for score in scores])),
    )


def summarize(results: Iterable[Result], arm: str) -> Summary:
    """A method over those problems that have results for it."""
    present = [result for result in results if arm in result.entries]
    taken = [result for result in present if not result.entries[arm].is_refused]
    entries = [result.entries[arm] for result in taken]
    worths = np.array([entry.worth.value for entry in entries])
    mean, low, high = _geometric_mean(worths)
    return Summary(
        mean=mean,
        low=low,
        high=high,
        enough=int((worths >= ENOUGH).sum()),
        below_one=int((worths < 1.0).sum()),
        place=float(np.mean([result.place(arm) for result in taken])),
        failed=float(np.mean([entry.failed for entry in entries])),
        cost=_geometric_mean(np.array([entry.cost for entry in entries]))[0],
        problems=len(entries),
        refused=len(present) - len(taken),
    )


def mean_rank(results: Iterable[Result], arm: str) -> tuple[float, float, float]:
    """The mean of a method's ranks over problems, and its 95 % interval over problems."""
    return _mean(np.array([result.entries[arm].rank for result in results]))


def _mean(values: Floats) -> tuple[float, float, float]:
    """A mean and its 95 % interval (t); of one value the interval is a point."""
    middle, margin = float(values.mean()), 0.0
    if len(values) > 1:
        margin = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return middle, middle - margin, middle + margin


def _geometric_mean(values: Floats) -> tuple[float, float, float]:
    """The geometric mean of those that are not NaN, and its 95 % interval."""
    logs = np.log(values[np.isfinite(values)])
    if not len(logs):
        return math.nan, math.nan, math.nan
    middle, low, high = map(math.exp, _mean(logs))
    return middle, low, high


@dataclass(frozen=True)
class SettingComparison:
    """A setting of a method against the method with its defaults, over problems.

    Args:
        better: Problems on which its mean rank is better; equal ones do not count.
        clearly_better: Those on which the 95 % interval of the difference (Welch) is on one side.
        clearly_worse: The same on the other side.
        problems: How many problems there are.
        ratio: Its worth over that of the defaults, geometric mean.
        cost: Its cost over that of the defaults, geometric mean.
    """

    better: int
    clearly_better: int
    clearly_worse: int
    problems: int
    ratio: float
    cost: float


def compare_setting(results: Iterable[Result], setting: str, base: str) -> SettingComparison:
    """A setting against the defaults, where both have results."""
    both = [r for r in results if setting in r.entries and base in r.entries]
    pairs = [(r.search, r.entries[setting], r.entries[base]) for r in both]
    pairs = [(s, mine, o) for s, mine, o in pairs if not (mine.is_refused or o.is_refused)]
    better, signs = 0, []
    for search, mine, other in pairs:
        better += mine.rank < other.rank
        ranks = search.ranks(mine.scores), search.ranks(other.scores)
        signs.append(_welch_sign(*ranks))
    costs = [mine.cost / other.cost for _, mine, other in pairs]
    return SettingComparison(
        better=better,
        clearly_better=signs.count(-1.0),
        clearly_worse=signs.count(1.0),
        problems=len(pairs),
        ratio=compare_worth(both, setting, base)[0],
        cost=_geometric_mean(np.array(costs))[0],
    )


def compare_worth(results: Iterable[Result], arm: str, other: str) -> tuple[float, float, float]:
    """The ratio of two methods' worths: geometric mean over problems, and its 95 % interval."""
    both = [r.entries for r in results if arm in r.entries and other in r.entries]
    both = [e for e in both if not (e[arm].is_refused or e[other].is_refused)]
    return _geometric_mean(np.array([e[arm].worth.value / e[other].worth.value for e in both]))


def _welch_sign(first: Floats, second: Floats) -> float:
    """-1 or 1 if the mean of the first is clearly smaller or larger (Welch, 95 %), else 0."""
    squares = np.array([ranks.var(ddof=1) / len(ranks) for ranks in (first, second)])
    difference = first.mean() - second.mean()
    if squares.sum() < 1e-12:
        return float(np.sign(np.round(difference, 6)))
    counts = np.array([len(first), len(second)])
    freedom = squares.sum() ** 2 / (squares**2 / (counts - 1)).sum()
    margin = stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum())
    return float(np.sign(difference)) if abs(difference) > margin else 0.0


def leave_one_out(results: Results, arms: Iterable[str]) -> dict[str, tuple[str, float]]:
    """For each problem, the method that is best on the others, and its worth on this one.

    The best has the largest geometric mean of its worth, among those that no problem refuses.
    """
    usable = [
        arm
        for arm in arms
        if all(arm in r.entries and not r.entries[arm].is_refused for r in results.values())
    ]
    chosen = {}
    for name, result in results.items():
        others = [other for key, other in results.items() if key != name]
        best = max(usable, key=lambda arm: summarize(others, arm).mean)
        chosen[name] = (best, result.entries[best].worth.value)
    return chosen
