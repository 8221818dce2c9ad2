"""Numbers and tables as the page prints them."""

from __future__ import annotations

import math
import re

from benchmarks.markdown import table
from benchmarks.worth.measure import SMALLEST, Worth
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.results import (
    ENOUGH,
    Entry,
    Result,
    Results,
    compare_setting,
    compare_worth,
    leave_one_out,
    summarize,
)

COUNTS = (1, 2, 4, 8, 16, 32)
"""Sizes of a search in the table of a problem."""


def format_number(value: float) -> str:
    """Three digits, or a dash for what is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def format_interval(value: float, low: float, high: float) -> str:
    """A mean with its interval."""
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


def format_trials(value: float, largest: float, cost: float = 1.0) -> str:
    """A number of trials, perhaps divided by a cost; at the ends of the scale it is a bound."""
    bound = "≥ " if value >= 0.999 * largest else "≤ " if value <= 1.001 * SMALLEST else ""
    shown = value / cost
    return f"{bound}{shown:.1f}" if shown >= 1 else f"{bound}{shown:.2f}"


def format_worth(worth: Worth, largest: float) -> str:
    """A worth with its interval."""
    value, low, high = (format_trials(n, largest) for n in (worth.value, worth.low, worth.high))
    return f"{value} [{low}, {high}]"


def format_arm(arm: str) -> str:
    """The name of an arm, as code if it is written as such."""
    return f"`{arm}`" if re.fullmatch(r"\w+(\(.+\))?", arm) else arm


def list_arms(results: Results) -> list[str]:
    """All methods with results, without the plain loop, which costs are compared with."""
    arms = dict.fromkeys(arm for result in results.values() for arm in result.entries)
    return [arm for arm in arms if arm != "plain loop"]


def overview(results: Results) -> str:
    """A table of methods by problems, for the terminal."""
    lines = [["worth in trials [95 %]", *results]]
    for arm in list_arms(results):
        entries = [(result.entries.get(arm), result.search.end) for result in results.values()]
        cells = ["" if entry is None else format_worth(entry.worth, n) for entry, n in entries]
        lines.append([arm, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary_table(results: Results) -> str:
    """All methods over all problems, the best first."""
    summaries = {arm: summarize(results.values(), arm) for arm in list_arms(results)}
    rows = []
    for arm in sorted(summaries, key=lambda arm: -summaries[arm].mean):
        summary = summaries[arm]
        over_sum = compare_worth(results.values(), arm, "Sum")
        rows.append(
            [
                format_arm(arm),
                format_interval(summary.mean, summary.low, summary.high),
                format_interval(*over_sum),
                format_number(summary.mean / summary.cost),
                f"{summary.enough} of {summary.problems}",
                f"{summary.below_one} of {summary.problems}",
                str(summary.refused or ""),
                f"{summary.place:.0f}",
                f"{100 * summary.failed:.0f} %",
                format_number(summary.cost),
            ]
        )
    head = [
        "method",
        "worth [95 % over problems]",
        "over `Sum` [95 %]",
        "at equal time",
        f"at least {ENOUGH:g} trials",
        "below 1",
        "refused",
        "mean place",
        "failed runs",
        "cost of a step",
    ]
    return table(head, rows)


def settings_table(results: Results, bases: dict[str, str]) -> str:
    """Settings of methods against their defaults."""
    rows = []
    for arm, base in sorted(bases.items(), key=lambda item: item[::-1]):
        compared = compare_setting(results.values(), arm, base)
        rows.append(
            [
                format_arm(arm),
                format_arm(base),
                f"{compared.better} of {compared.problems}",
                str(compared.clearly_better),
                str(compared.clearly_worse),
                format_number(compared.ratio),
                format_number(compared.cost),
            ]
        )
    head = ["setting", "against", "better on", "clearly better", "clearly worse"]
    return table([*head, "worth, ratio", "cost, ratio"], rows)


def default_table(results: Results, count: int = 10) -> str:
    """How near the methods that every problem takes come to what a default should be."""
    summaries = {arm: summarize(results.values(), arm) for arm in list_arms(results)}
    everywhere = [arm for arm, s in summaries.items() if s.problems == len(results)]
    best = sorted(everywhere, key=lambda arm: -summaries[arm].mean)[:count]
    rows = []
    for arm in best:
        entries = {name: result.entries[arm] for name, result in results.items()}
        worst = min(entries, key=lambda name: entries[name].worth.value)
        worth = format_worth(entries[worst].worth, results[worst].search.end)
        summary = summaries[arm]
        rows.append(
            [
                format_arm(arm),
                f"{summary.enough} of {len(entries)}",
                str(summary.below_one),
                f"{worst}: {worth}",
                "yes" if summary.is_a_default(len(results)) else "no",
            ]
        )
    head = ["method", f"at least {ENOUGH:g} trials", "below 1", "worst problem"]
    return table([*head, "would do as a default"], rows)


def leave_one_out_table(results: Results) -> str:
    """What would have been chosen without each problem, and its worth there."""
    chosen = leave_one_out(results, list_arms(results))
    rows = [
        [name, format_arm(arm), format_trials(value, results[name].search.end)]
        for name, (arm, value) in chosen.items()
    ]
    return table(["problem left out", "best on the others", "its worth on this one"], rows)


def problem_section(result: Result) -> str:
    """What was measured on a problem."""
    problem, search = PROBLEMS[result.name], result.search
    counts = [count for count in COUNTS if count < len(search)]
    medians = map(format_number, search.median_scores(counts))
    curve = table(
        ["trials", *map(str, counts), f"all {len(search)}"],
        [["median score", *medians, format_number(search.kept)]],
    )
    entries = {arm: entry for arm, entry in result.entries.items() if arm != "plain loop"}
    ordered = sorted(entries.items(), key=lambda item: item[1].rank)
    head = [
        "method",
        "worth [95 %]",
        "at equal time",
        "median score",
        "from … to",
        "÷ that of all trials",
        "failed",
        "learning rate",
    ]
    rows = [_row(arm, entry, search.kept, search.end) for arm, entry in ordered]
    expectation = " Balancing was expected to lose here." if problem.expected_to_lose else ""
    told = ""
    if problem.preference is not None:
        shares = ", ".join(f"{name} {value:.3g}" for name, value in problem.preference.items())
        told = f" Methods with a `preference` are told {shares}."
    intro = (
        f"### {problem.title}\n\n`{result.name}`: losses {', '.join(problem.loss_names)}; score: "
        f"{problem.score}. {problem.steps} steps of {1000 * result.seconds:.1f} ms; learning rate "
        f"of the search {result.lr:g}.{told}{expectation}"
    )
    details = "\n\n".join([table(head, rows), *_errors(entries)])
    folded = f"<details><summary>All methods</summary>\n\n{details}\n\n</details>"
    return "\n\n".join([intro, curve, folded])


def _row(arm: str, entry: Entry, best: float, largest: float) -> list[str]:
    finite = [score for score in entry.scores if math.isfinite(score)]
    ends = f"{format_number(min(finite))} … {format_number(max(finite))}" if finite else "–"
    has_cost = math.isfinite(entry.cost)
    return [
        format_arm(arm),
        format_worth(entry.worth, largest),
        format_trials(entry.worth.value, largest, entry.cost) if has_cost else "–",
        format_number(entry.median),
        ends,
        format_number(entry.median / best if best > 0 else math.nan),
        f"{len(entry.scores) * entry.failed:.0f} of {len(entry.scores)}",
        f"{entry.lr:g}",
    ]


def _errors(entries: dict[str, Entry]) -> list[str]:
    """Why runs broke off, with the methods of each reason; empty if none did."""
    reasons: dict[str, list[str]] = {}
    for arm, entry in entries.items():
        for error in entry.errors:
            # The figure that was found differs from run to run.
            reason = re.sub(r"\s*Found.*", "", error)
            reasons.setdefault(reason, []).append(format_arm(arm))
    if not reasons:
        return []
    lines = [
        f"- {reason} {', '.join(dict.fromkeys(arms))}" for reason, arms in sorted(reasons.items())
    ]
    return ["Runs that broke off:\n\n" + "\n".join(lines)]
