"""What a balanced run is worth, counted in trials of a search for static weights.

python -m benchmarks.worth --short          # three problems, a few methods: minutes
python -m benchmarks.worth --docs docs      # all of them, and the page of the manual: hours
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.worth.arms import NULL, PLAIN
from benchmarks.worth.page import write
from benchmarks.worth.results import compute
from benchmarks.worth.runs import RESULTS, Comparison, Plan
from benchmarks.worth.tables import overview

SHORT = Plan(
    trials=16,
    pilots=4,
    seeds=3,
    null_seeds=12,
    problems=("digits", "equal_tasks", "vlmop2"),
    arms=("Sum", "SumLog", "AnalyticQP", "GradientNorms", "MGDA", NULL.name, PLAIN.name),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="three problems and a few methods")
    parser.add_argument("--steps", type=int, default=None, help="instead of those of each problem")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hours", type=float, default=3.0, help="stop after so long; go on later")
    parser.add_argument("--docs", type=Path, default=None, help="write worth.md into this folder")
    given = parser.parse_args(arguments)
    if given.docs is not None and (given.short or given.steps is not None):
        parser.error("--docs needs all problems and methods, with all of their steps")
    plan = SHORT if given.short else Plan()
    plan = replace(plan, steps=given.steps)
    with tempfile.TemporaryDirectory() as folder:
        # A short run measures anew, and results of few steps are not kept.
        kept = not given.short and given.steps is None
        comparison = Comparison(plan, RESULTS if kept else Path(folder))
        if not comparison.run(given.workers, given.hours):
            print("The time is up. The same command goes on from here.")
            return
        results = compute(comparison)
        print(overview(results))
        if given.docs is not None:
            write(comparison, results, given.docs)


if __name__ == "__main__":
    main()
