"""What each method reached on each problem, computed from the runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.worth.arms import NULL
from benchmarks.worth.measure import SMALLEST, Search, Worth, worth
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
        cost: Processor time of a step, in steps of static weights.
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
    def at_equal_time(self) -> Worth:
        """The worth divided by the cost."""
        return self.worth.divided_by(self.cost)

    @property
    def errors(self) -> list[str]:
        """Why runs broke off, each reason once."""
        return list(dict.fromkeys(outcome.error for outcome in self.outcomes if outcome.error))


@dataclass(frozen=True)
class Result:
    """A problem: the search for static weights, and all methods by name."""

    name: str
    search: Search
    lr: float
    seconds: float  # processor time of a step with static weights
    entries: dict[str, Entry]

    def place(self, arm: str) -> float:
        """The position of a method among all, by its mean rank; ties share the mean position."""
        mine = self.entries[arm].rank
        others = [entry.rank for entry in self.entries.values()]
        return 0.5 + sum(rank < mine for rank in others) + sum(rank == mine for rank in others) / 2


@dataclass(frozen=True)
class Summary:
    """A method over problems.

    Args:
        mean: The geometric mean of its worth.
        enough: Problems on which it is worth at least `ENOUGH` trials.
        below_one: Problems on which it is worth less than one trial.
        place: Its mean position among all methods.
        failed: The fraction of runs that failed.
        cost: The geometric mean of its cost.
        problems: How many problems there are.
    """

    mean: float
    enough: int
    below_one: int
    place: float
    failed: float
    cost: float
    problems: int

    @property
    def is_enough(self) -> bool:
        """Whether two thirds of the problems are won, and none is lost."""
        return 3 * self.enough >= 2 * self.problems and self.below_one == 0


def compute(comparison: Comparison) -> dict[str, Result]:
    """The results of each problem whose runs are done, by name."""
    results = {}
    for problem in comparison.plan.problems:
        search = comparison.search(problem)
        # Of runs that took turns with those of the methods: the machine is shared.
        null = comparison.known(comparison.counted(problem, NULL.name))
        seconds = float(np.median([outcome.seconds for outcome in null]))
        entries = {}
        for arm, where in comparison.pairs:
            if where != problem:
                continue
            outcomes = comparison.known(comparison.counted(problem, arm))
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
    """A method over those problems that it can be applied to."""
    present = [result for result in results if arm in result.entries]
    entries = [result.entries[arm] for result in present]
    values = np.array([max(entry.worth.value, SMALLEST) for entry in entries])
    costs = np.array([entry.cost for entry in entries])
    return Summary(
        mean=float(np.exp(np.log(values).mean())),
        enough=int((values >= ENOUGH).sum()),
        below_one=int((values < 1.0).sum()),
        place=float(np.mean([result.place(arm) for result in present])),
        failed=float(np.mean([entry.failed for entry in entries])),
        cost=float(np.exp(np.nanmean(np.log(costs)))) if np.isfinite(costs).any() else math.nan,
        problems=len(entries),
    )


@dataclass(frozen=True)
class SettingComparison:
    """A setting of a method against the method with its defaults, over problems.

    Args:
        better: Problems on which its mean rank is better.
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
    pairs = [
        (result.search, result.entries[setting], result.entries[base])
        for result in results
        if setting in result.entries and base in result.entries
    ]
    better, clearly = 0, []
    for search, mine, other in pairs:
        ranks = search.ranks(mine.scores), search.ranks(other.scores)
        better += ranks[0].mean() < ranks[1].mean()
        same = np.array_equal(*(np.sort(each) for each in ranks))
        found = None if same else stats.ttest_ind(*ranks, equal_var=False)
        clear = found is not None and found.pvalue < 0.05
        clearly.append(float(np.sign(found.statistic)) if clear else 0.0)
    ratios = [mine.worth.value / other.worth.value for _, mine, other in pairs]
    costs = [mine.cost / other.cost for _, mine, other in pairs]
    return SettingComparison(
        better=int(better),
        clearly_better=clearly.count(-1.0),
        clearly_worse=clearly.count(1.0),
        problems=len(pairs),
        ratio=float(np.exp(np.log(ratios).mean())),
        cost=float(np.exp(np.nanmean(np.log(costs)))),
    )


def leave_one_out(results: dict[str, Result], arms: Iterable[str]) -> dict[str, tuple[str, float]]:
    """For each problem, the method that is best on the others, and its worth on this one.

    The best has the largest geometric mean of its worth.
    """
    arms = list(arms)
    chosen = {}
    for name, result in results.items():
        others = [other for key, other in results.items() if key != name]
        common = [arm for arm in arms if all(arm in r.entries for r in results.values())]
        best = max(common, key=lambda arm: summarize(others, arm).mean)
        chosen[name] = (best, result.entries[best].worth.value)
    return chosen
