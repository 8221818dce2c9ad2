"""The page of the manual, written from the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.worth.arms import DECADES, every_arm
from benchmarks.worth.figures import Results, draw_searches, draw_worth, expected_scores, save
from benchmarks.worth.measure import SMALLEST, Worth
from benchmarks.worth.predictions import PREDICTIONS
from benchmarks.worth.problems import PROBLEMS
from benchmarks.worth.results import (
    ENOUGH,
    Entry,
    Result,
    compare_setting,
    leave_one_out,
    summarize,
)
from benchmarks.worth.runs import Comparison

TEXTS = Path(__file__).parent / "texts"

SHOWN = (
    "Sum",
    "random static weights",
    "suggested static weights",
    "SumLog",
    "FAMO(lagged=True)",
    "UncertaintyWeighting",
    "AnalyticQP",
    "GradientNorms",
    "GradNorm",
    "MGDA",
    "NashMTL",
    "PCGrad",
    "ConFIG",
)
"""The methods of the first figure: the ones that people know. Tables have all."""

COUNTS = (1, 2, 4, 8, 16, 32)


def write(comparison: Comparison, results: Results, folder: Path) -> None:
    """Write worth.md and its figures into a folder of pages."""
    figures = folder / "figures" / "worth"
    save(draw_worth(results, present(results, SHOWN)), figures / "worth.svg")
    curves = ("Sum", "AnalyticQP", "GradientNorms", "SumLog", "MGDA")
    save(draw_searches(results, present(results, curves)), figures / "searches.svg")
    (folder / "worth.md").write_text(page(comparison, results))


def present(results: Results, arms: Sequence[str]) -> list[str]:
    """Those that at least one problem has results for."""
    return [arm for arm in arms if any(arm in result.entries for result in results.values())]


def page(comparison: Comparison, results: Results) -> str:
    """The whole page."""
    plan = comparison.plan
    settings = _bullets(
        [
            f"Search: {plan.trials} random trials for each problem, each weight log-uniform over "
            f"{DECADES:g} decades, weights and initial weights of the model drawn anew.",
            f"Methods: {plan.seeds} seeds each, with the arguments that are named and otherwise "
            "the defaults.",
            f"Learning rate: of three. For the search, the one at which four of {plan.pilots} "
            "pilot trials are expected to validate best; for each method, the one with the best "
            "validation score in one pilot run each, with a seed that is not counted. Other "
            "settings of a method, such as `every=10`, take its rate.",
            "Adam, with a cosine schedule to 0, on one thread; each side has the same number of "
            "steps.",
        ]
    )
    parts = [
        "<!-- Written by `python -m benchmarks.worth --docs docs`. -->\n\n# What a balanced run is "
        "worth",
        (TEXTS / "introduction.md").read_text().strip(),
        "![Worth of each method on each problem](figures/worth/worth.svg)",
        (TEXTS / "findings.md").read_text().strip(),
        "## All methods\n\n" + _summary(results),
        "## Settings\n\n"
        + (TEXTS / "settings.md").read_text().strip()
        + "\n\n"
        + _settings(results),
        "## Predictions\n\nWritten down before the full run.\n\n" + _predictions(results),
        "## A default\n\n"
        + (TEXTS / "default.md").read_text().strip()
        + "\n\n"
        + _leave_one_out(results),
        "## What was run, and what was tuned\n\n" + settings + "\n\n" + _environment(comparison),
        "## The searches\n\n![Expected score of a search](figures/worth/searches.svg)",
        "## Each problem",
        *(_problem(result) for result in results.values()),
    ]
    return "\n\n".join(parts) + "\n"


def number(value: float, digits: int = 3) -> str:
    """A score as the tables print it."""
    if math.isinf(value):
        return "–"
    return f"{value:.{digits}g}"


def trials(value: float, largest: float) -> str:
    """A number of trials; the ends of the scale are bounds."""
    if value >= 0.999 * largest:
        return f"≥ {largest:g}"
    if value <= 1.001 * SMALLEST:
        return f"≤ 1/{1 / SMALLEST:g}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def interval(worth: Worth, largest: float) -> str:
    """A worth with its interval."""
    low, high = (trials(end, largest) for end in (worth.low, worth.high))
    return f"{trials(worth.value, largest)} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _all_arms(results: Results) -> list[str]:
    return list(dict.fromkeys(arm for result in results.values() for arm in result.entries))


def overview(results: Results) -> str:
    """A table of methods by problems, for the terminal."""
    rows = []
    for arm in _all_arms(results):
        cells = []
        for result in results.values():
            entry = result.entries.get(arm)
            cells.append("" if entry is None else interval(entry.worth, len(result.search)))
        rows.append([arm, *cells])
    head = ["worth in trials [95 %]", *results]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _summary(results: Results) -> str:
    summaries = {arm: summarize(results.values(), arm) for arm in _all_arms(results)}
    rows = []
    for arm in sorted(summaries, key=lambda arm: -summaries[arm].mean):
        summary = summaries[arm]
        rows.append(
            [
                _code(arm),
                number(summary.mean),
                number(summary.mean / summary.cost),
                f"{summary.enough} of {summary.problems}",
                f"{summary.below_one} of {summary.problems}",
                f"{summary.place:.0f}",
                f"{100 * summary.failed:.0f} %",
                number(summary.cost),
            ]
        )
    head = [
        "method",
        "worth, geometric mean",
        "at equal time",
        f"at least {ENOUGH:g} trials",
        "below 1",
        "mean place",
        "failed runs",
        "cost of a step",
    ]
    return table(head, rows)


def _code(arm: str) -> str:
    plain = arm.endswith("weights") or (arm.endswith(")") and "(" in arm and " (" in arm)
    return arm if plain else f"`{arm}`"


def _settings(results: Results) -> str:
    rows = []
    for arm, base in sorted(_bases(results).items(), key=lambda item: item[::-1]):
        found = compare_setting(results.values(), arm, base)
        rows.append(
            [
                _code(arm),
                _code(base),
                f"{found.better} of {found.problems}",
                str(found.clearly_better),
                str(found.clearly_worse),
                number(found.ratio),
                number(found.cost),
            ]
        )
    head = [
        "setting",
        "against",
        "better on",
        "clearly better",
        "clearly worse",
        "worth, ratio",
        "cost, ratio",
    ]
    return table(head, rows)


def _bases(results: Results) -> dict[str, str]:
    """Settings of a method, and the method with its defaults."""
    bases = {arm: getattr(made, "tuned_as", None) for arm, made in every_arm().items()}
    bases |= {'MGDA("l2")': "MGDA", 'MGDA("log")': "MGDA"}
    bases["SmoothTchebycheff(log=True)"] = "SmoothTchebycheff"
    arms = _all_arms(results)
    return {arm: base for arm, base in bases.items() if arm in arms and base in arms}


def _predictions(results: Results) -> str:
    rows = []
    for prediction in PREDICTIONS:
        holds, figures = prediction.check(results)
        rows.append([prediction.statement, "yes" if holds else "no", figures])
    return table(["prediction", "true", "figures"], rows)


def _leave_one_out(results: Results) -> str:
    chosen = leave_one_out(results, _all_arms(results))
    rows = [
        [name, _code(arm), trials(value, len(results[name].search))]
        for name, (arm, value) in chosen.items()
    ]
    head = ["problem left out", "best on the others", "its worth on this one"]
    return table(head, rows)


def _environment(comparison: Comparison) -> str:
    facts = {}
    for store in comparison.stores.values():
        facts.update(store.environment)
    versions = facts.get("versions", {})
    assert isinstance(versions, dict)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Run on {facts.get('cores')} cores of {facts.get('processor')}, with {listed}."


def _problem(result: Result) -> str:
    problem = PROBLEMS[result.name]
    largest = len(result.search)
    found = expected_scores(result, list(map(float, COUNTS)))  # type: ignore[arg-type]
    curve = table(
        ["trials", *map(str, COUNTS), f"best of {largest}"],
        [["median score", *(number(score) for score in found), number(result.search.best())]],
    )
    best = result.search.best()
    entries = sorted(result.entries.items(), key=lambda item: item[1].rank)
    rows = [_row(arm, entry, best, largest) for arm, entry in entries]
    head = [
        "method",
        "worth [95 %]",
        "at equal time",
        "median score",
        "from … to",
        "÷ best static",
        "failed",
        "learning rate",
    ]
    expectation = " Balancing was expected to lose here." if problem.expected_to_lose else ""
    intro = (
        f"### {problem.title}\n\n`{result.name}`: losses {', '.join(problem.loss_names)}; score: "
        f"{problem.score}. {problem.steps} steps of {1000 * result.seconds:.1f} ms; learning rate "
        f"of the search {result.lr:g}.{expectation}"
    )
    reasons = sorted(
        {f"{_code(arm)}: {reason}" for arm, entry in entries for reason in entry.errors}
    )
    broken = "" if not reasons else "\n\nRuns that broke off:\n\n" + _bullets(reasons)
    return f"{intro}\n\n{curve}\n\n{table(head, rows)}{broken}"


def _row(arm: str, entry: Entry, best: float, largest: int) -> list[str]:
    finite = [score for score in entry.scores if math.isfinite(score)]
    ends = f"{number(min(finite))} … {number(max(finite))}" if finite else "–"
    ratio = entry.median / best if best > 0 else math.inf
    return [
        _code(arm),
        interval(entry.worth, largest),
        "–" if math.isnan(entry.cost) else trials(entry.at_equal_time.value, math.inf),
        number(entry.median),
        ends,
        number(ratio),
        f"{sum(1 for _ in entry.scores) * entry.failed:.0f} of {len(entry.scores)}",
        f"{entry.lr:g}",
    ]
