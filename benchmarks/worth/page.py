"""The page of the manual, written from the results and the texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.worth.arms import DECADES, NULL, SUGGEST_FROM, Method, every_arm
from benchmarks.worth.figures import draw_searches, draw_worth, save
from benchmarks.worth.predictions import PREDICTIONS
from benchmarks.worth.results import Results, mean_rank, summarize
from benchmarks.worth.runs import NOISY, SEEDS_OF_PILOTS, Comparison
from benchmarks.worth.tables import (
    default_table,
    leave_one_out_table,
    list_arms,
    problem_section,
    settings_table,
    summary_table,
)

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

IN_SEARCHES = ("Sum", "AnalyticQP", "GradientNorms", "SumLog", "MGDA")
"""The methods of the second figure."""


def write(comparison: Comparison, results: Results, folder: Path) -> None:
    """Write worth.md and its figures into a folder of pages."""
    figures, arms = folder / "figures" / "worth", list_arms(results)
    shown = [arm for arm in SHOWN if arm in arms]
    save(draw_worth(results, shown), figures / "worth.svg")
    save(draw_searches(results, IN_SEARCHES), figures / "searches.svg")
    (folder / "worth.md").write_text(page(comparison, results))


def page(comparison: Comparison, results: Results) -> str:
    """The whole page."""
    parts = [
        "<!-- Written by `python -m benchmarks.worth --docs docs`. -->",
        "# What a balanced run is worth",
        _text("introduction"),
        "![Worth of each method on each problem](figures/worth/worth.svg)",
        _text("findings"),
        "## All methods",
        _text("methods"),
        summary_table(results),
        "## Settings",
        _text("settings"),
        settings_table(results, _bases(results)),
        "## Predictions",
        _text("predictions"),
        _predictions(results),
        "## A default",
        _text("default"),
        default_table(results),
        _text("left_out"),
        leave_one_out_table(results),
        "## What was run, and what was tuned",
        _protocol(comparison, results),
        _environment(comparison),
        "## The searches",
        "![Median score of a search](figures/worth/searches.svg)",
        "## Each problem",
        *map(problem_section, results.values()),
    ]
    return "\n\n".join(parts) + "\n"


def _text(name: str) -> str:
    """A part of the page that is written by hand."""
    return (TEXTS / f"{name}.md").read_text().strip()


def _bases(results: Results) -> dict[str, str]:
    """Settings of a method, and the method with its defaults."""
    arms = every_arm()
    methods = {name: arms[name] for name in list_arms(results)}
    bases = {name: m.variant_of for name, m in methods.items() if isinstance(m, Method)}
    return {name: base for name, base in bases.items() if base in methods}


def _predictions(results: Results) -> str:
    rows = []
    for prediction in PREDICTIONS:
        holds, figures = prediction.check(results)
        rows.append([prediction.statement, "yes" if holds else "no", figures])
    return table(["prediction", "true", "figures"], rows)


def _protocol(comparison: Comparison, results: Results) -> str:
    plan = comparison.plan
    null = summarize(results.values(), NULL.name)
    rank = mean_rank(results.values(), NULL.name)
    many, noisy = len(SEEDS_OF_PILOTS), ", ".join(f"`{name}`" for name in NOISY)
    return _list(
        [
            f"Search: {plan.trials} random trials for each problem. Each weight is log-uniform "
            f"over {DECADES:g} decades; initial weights and batches of the model are drawn anew.",
            f"Methods: {plan.seeds} seeds, with the arguments that are named and otherwise the "
            "defaults. Where an argument has no default, it names a loss as reference or "
            "primary one, or gives the bounds; on problems that ask for a point, methods with a "
            "`preference` are told it.",
            f"Learning rate: one of three. For the search, the one at which four of {plan.pilots} "
            "pilot trials are expected to validate best; for each method, the one at which "
            "pilots rank best by validation score. A pilot has a seed that is not counted; "
            f"there is one at each rate, and {many} on problems where seeds decide most ({noisy}). "
            "Other settings of a method, such as `every=10`, take its rate, and so do methods of "
            "other libraries. Intervals do not contain the choice of rates.",
            "Adam, with a cosine schedule to 0, on one thread. All have the same number of "
            "steps. `MoDo` and `SDMGrad` draw two batches for each step, and suggested weights "
            f"{SUGGEST_FROM} more batches once.",
            "Costs are processor times of a step, relative to a plain loop without the library "
            "that took turns with the methods.",
            f"Random static weights, measured as a method with {plan.null_seeds} seeds, should be "
            f"worth 1: {null.mean:.2f} [{null.low:.2f}, {null.high:.2f}]. Their mean rank among "
            "the trials of the search should be 0.5: {:.3f} [{:.3f}, {:.3f}].".format(*rank),
        ]
    )


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _environment(comparison: Comparison) -> str:
    facts: dict[str, object] = {}
    for store in comparison.stores.values():
        facts |= store.environment
    versions = facts.get("versions")
    listed = versions.items() if isinstance(versions, dict) else ()
    named = ", ".join(f"{name} {version}" for name, version in listed)
    return f"Run on {facts.get('cores')} cores of {facts.get('processor')}, with {named}."
