"""Run experiments on learned image compression, and write the page of their results.

    python -m benchmarks.lic --workers 2 --docs docs          # all of them
    python -m benchmarks.lic --workers 2 --docs docs --short  # smaller
    python -m benchmarks.lic --only fine_tuning targets
    python -m benchmarks.lic --estimate                       # what the rest will cost
    python -m benchmarks.lic --page-only --docs docs
    python -m benchmarks.lic --quick                          # seconds, to see that it works

What was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.lic import experiments, page
from benchmarks.lic.engine import Costs, Engine, Experiment, make_pool
from benchmarks.lic.estimator import EstimateError
from benchmarks.lic.experiments import TITLES
from benchmarks.lic.jobs import SIDE, Context
from benchmarks.lic.regime import Regime, shipped_ladder
from benchmarks.lic.store import Store, StoreError
from examples.lic.options import FAULTS, describe, number

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/lic-report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen experiments and write their page; returns the exit code."""
    chosen = _parse(arguments)
    try:
        if not chosen.page_only:
            _run(chosen)
        if not chosen.estimate and chosen.docs is not None:
            print(page.write(chosen.results, chosen.docs))
    except (StoreError, EstimateError, *FAULTS) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _run(chosen: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if chosen.quick:
        regime = experiments.tiny_regime(chosen.runs / "ladder")
        plan, side = experiments.tiny(regime), regime.crop
    else:
        regime = Regime(shipped_ladder())
        plan, side = (experiments.short if chosen.short else experiments.full)(regime), SIDE
    context = Context(chosen.images, regime.crop, side)
    begin = time.monotonic()

    def say(line: str) -> None:
        print(f"{(time.monotonic() - begin) / 60:6.1f} min  {line}", file=sys.stderr, flush=True)

    pool = make_pool(chosen.workers, context)
    engine = Engine(Store(chosen.results), context, chosen.runs / "checkpoints", pool, say)
    if not chosen.quick:
        _print_costs(engine, {name: plan[name] for name in chosen.only}, chosen.workers)
    if not chosen.estimate:
        for name in chosen.only:
            engine.run(name, plan[name])
    if pool is not None:
        pool.shutdown()


def _print_costs(engine: Engine, plan: dict[str, Experiment], workers: int) -> None:
    """From steps that are timed now, on a machine that may be busier or idler later."""
    costs, total = Costs(engine), 0.0
    for name, experiment in plan.items():
        minutes = costs.estimate(experiment) / 60
        total += minutes
        print(f"{name:<15}{minutes:7.1f} CPU-minutes missing", flush=True)
    print(f"{'all':<15}{total:7.1f}, {total / workers:.0f} min with {workers} workers", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny experiments, to see that it works")
    add("--short", action="store_true", help="smaller batches, fewer steps and seeds")
    add("--only", nargs="+", choices=TITLES, default=TITLES, metavar="NAME",
        help=f"some of {', '.join(TITLES)}")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="train on this folder, not on bundled images")
    add("--workers", type=number(int), metavar="N", default=1, help="processes (%(default)s)")
    add("--docs", type=Path, metavar="DIR", help="write the page and its figures into this folder")
    add("--page-only", action="store_true", help="run nothing, write the page of the results")
    add("--estimate", action="store_true", help="run nothing, print what is missing in CPU time")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help=f"for JSON files ({RESULTS.name} next to the code)",
    )
    add("--runs", type=Path, metavar="DIR", default=RUNS, help="for checkpoints (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.runs = chosen.runs / "quick"
    if chosen.results is None:
        chosen.results = chosen.runs / "results" if chosen.quick else RESULTS
    return chosen


if __name__ == "__main__":
    sys.exit(main())
