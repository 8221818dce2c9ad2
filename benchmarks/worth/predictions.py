"""What was predicted, and whether it came true.

The statements were committed before the first counted run of a method. Candidates for a default
were added later, and take no part in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.worth.candidates import CANDIDATES
from benchmarks.worth.problem import EQUATIONS
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.results import Result, Results, summarize


class Prediction(NamedTuple):
    """A statement, and a function that says whether it holds and by which figures."""

    statement: str
    check: Callable[[Results], tuple[bool, str]]


def _methods(result: Result) -> list[str]:
    """Those that the statements are about."""
    return [arm for arm in result.entries if arm not in CANDIDATES and arm != "plain loop"]


def _uncertainty_is_sumlog(results: Results) -> tuple[bool, str]:
    pair = ("UncertaintyWeighting", "SumLog(floor=0)")
    ranks = {name: [r.entries[arm].rank for arm in pair] for name, r in results.items()}
    gaps = {name: abs(one - other) for name, (one, other) in ranks.items()}
    worst = max(gaps, key=lambda name: gaps[name])
    return gaps[worst] < 0.15, f"the largest difference is {gaps[worst]:.2f}, on {worst}"


def _norms_win_on_equations(results: Results) -> tuple[bool, str]:
    chosen = [results[name] for name in EQUATIONS]
    arms = [arm for arm in _methods(chosen[0]) if all(arm in r.entries for r in chosen)]
    means = {arm: summarize(chosen, arm).mean for arm in arms}
    order = sorted(means, key=lambda arm: -means[arm])
    place = 1 + order.index("GradientNorms")
    best = f"{order[0]} ({means[order[0]]:.1f})"
    mine = f"{means['GradientNorms']:.1f}"
    return place <= 3, f"GradientNorms is number {place} with {mine} trials; the best is {best}"


def _search_wins_on_digits(results: Results) -> tuple[bool, str]:
    entries = results["digits"].entries
    best = max(_methods(results["digits"]), key=lambda arm: entries[arm].worth.value)
    value, end = entries[best].worth.value, results["digits"].search.end
    at_least = "at least " if value > 0.999 * end else ""
    return value < 16, f"the best, {best}, is worth {at_least}{value:.0f} trials"


def _sum_wins_where_expected(results: Results) -> tuple[bool, str]:
    outcomes, holds = [], True
    for name, result in results.items():
        if not PROBLEMS[name].expected_to_lose:
            continue
        worths = {arm: result.entries[arm].worth.value for arm in _methods(result)}
        beaten = sum(value > worths["Sum"] for value in worths.values())
        holds &= beaten < len(worths) / 4
        outcomes.append(f"{beaten} of {len(worths)} methods beat it on {name}")
    return holds, "; ".join(outcomes)


def _every_10_keeps_worth(results: Results) -> tuple[bool, str]:
    ratios = []
    for result in results.values():
        for arm, entry in result.entries.items():
            base = arm.removesuffix("(every=10)")
            if base != arm and base in result.entries and not entry.is_refused:
                ratios.append(entry.worth.value / result.entries[base].worth.value)
    middle = float(np.median(ratios))
    return middle > 1 / 1.25, f"the median ratio of worths is {middle:.2f} over {len(ratios)} pairs"


PREDICTIONS = [
    Prediction(
        "UncertaintyWeighting and SumLog, without a floor as it was then, differ by less than "
        "0.15 in mean rank on every problem.",
        _uncertainty_is_sumlog,
    ),
    Prediction(
        "GradientNorms is among the best three methods on the four problems with differential "
        "equations, by the geometric mean of its worth.",
        _norms_win_on_equations,
    ),
    Prediction(
        "No method is worth 16 trials on the digits.",
        _search_wins_on_digits,
    ),
    Prediction(
        "On each problem where balancing is expected to lose, fewer than a quarter of the methods "
        "are worth more than the plain sum.",
        _sum_wins_where_expected,
    ),
    Prediction(
        "With `every=10` a method on a Gramian keeps at least four fifths of its worth, in the "
        "median over methods and problems.",
        _every_10_keeps_worth,
    ),
]
