"""What the report asks of this part: run the experiment, tell what it found, draw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal

from matplotlib.figure import Figure

from examples.lic import images
from examples.lic.bd import Interval
from examples.lic.images import Photographs
from examples.lic.training import Recipe
from examples.lic.variable_rate import plots
from examples.lic.variable_rate.comparing import Results, Run, gap, loss_ratio
from examples.lic.variable_rate.design import (
    BEFORE,
    INCREMENTS,
    LONG,
    PLAIN,
    RIVALS,
    SINGLE,
    STATIC,
    Plan,
)
from examples.lic.variable_rate.experiment import Experiment
from moo_balance import StepMetrics

SHORT = Plan((0.005, 0.016, 0.05), Recipe(200, lr=4e-3), Recipe(20, lr=1e-3), 64, 2, 8, 8)
STUDIES: dict[str, tuple[Plan, Sequence[int]]] = {"short": (SHORT, (0,)), "full": (Plan(), (0, 1))}
"""Plan and seeds of each scale: seconds, and minutes on one idle thread."""

STEPS = {
    **{name: above for above, name in pairwise([SINGLE, *INCREMENTS])},
    **dict.fromkeys([*RIVALS, *STATIC], PLAIN),
}
"""What each codec is compared with, besides the single-rate models."""


def run(scale: Literal["short", "full"], folder: Path) -> Results:
    """Run the experiment on the bundled photographs, or what of it is not in `folder` yet."""
    return run_plan(*STUDIES[scale], images.bundled(), folder)


def run_plan(
    plan: Plan,
    seeds: Sequence[int],
    photographs: Photographs,
    folder: Path,
    on_step: Callable[[StepMetrics], object] = lambda balance: None,
) -> Results:
    """The same with a plan and photographs of one's own; at least one seed."""
    runs = {str(seed): Experiment(photographs, plan, seed, folder, on_step)() for seed in seeds}
    return {"plan": asdict(plan), "held_out": list(photographs.held_out), "runs": runs}


def section(results: Results) -> str:
    """What was run, the incremental table, the losses that were minimised, and what both say."""
    return "\n\n".join(
        (_setup(results), _increments(results), _losses(results), _verdicts(results))
    )


def figures(results: Results) -> dict[str, Figure]:
    """The curves of each seed, and the weights of the levels under MGDA."""
    return {
        "variable-rate-curves": plots.curves_figure(results["runs"]),
        "variable-rate-weights": plots.weights_figure(results["runs"]),
    }


def _setup(results: Results) -> str:
    plan, runs = results["plan"], results["runs"]
    levels, post = len(plan["lambdas"]), plan["post"]["steps"]
    seconds = sum(run.get("seconds", 0) for by_name in runs.values() for run in by_name.values())
    return (
        f"λ = {', '.join(f'{lmbda:g}' for lmbda in plan['lambdas'])}; seeds "
        f"{', '.join(runs)}; held out: {', '.join(results['held_out'])}. Stage 1: "
        f"{plan['start']['steps']} steps at the highest λ. From its checkpoint {post} steps on "
        f"all {levels} levels, the first half with noise for the decoder (stage 2), the other "
        f"with rounded symbols (stage 3). The rivals from the same checkpoint, with the same crops "
        f"and as many passes through the codec: {levels} single-rate models of {post} steps each, "
        f"and one model of {levels * post} steps on a random level. To show what more training "
        f"would bring: single-rate models of {levels * post} steps each. Training took "
        f"{seconds / 60:.1f} minutes."
    )


def _increments(results: Results) -> str:
    rows = [_row(results, BEFORE), _row(results, LONG)]
    rows += [_row(results, name, above) for name, above in STEPS.items()]
    return (
        "BD-rate in per cent (less is better), mean and 95 % bootstrap interval over seeds and "
        "photographs. The change is the BD-rate over the row above, and of the last rows, which "
        f"replace the plain average of the levels, over *{PLAIN}*:\n\n"
        "| codec | against single-rate models | with steps in between | change | ms a step |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(rows)
    )


def _row(results: Results, name: str, above: str = SINGLE) -> str:
    cells = [
        name,
        shown(gap(results, name, SINGLE)),
        "" if name == LONG else shown(gap(results, name, SINGLE, between=True)),
        "" if above == SINGLE else shown(gap(results, name, above)),
        _milliseconds(results, name),
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(results: Results, name: str) -> str:
    times = [runs[name].get("ms_per_step") for runs in results["runs"].values()]
    return f"{fmean(times):.0f}" if all(times) else ""


def _losses(results: Results) -> str:
    lambdas = results["plan"]["lambdas"]
    lines = [
        "What is minimised is R + λD at each level; in per cent above (+) or below (−) the "
        "single-rate models:\n",
        f"| codec | {' | '.join(f'λ = {lmbda:g}' for lmbda in lambdas)} |",
        "| --- |" + " --- |" * len(lambdas),
    ]
    for name in (LONG, *STEPS):
        cells = [shown(loss_ratio(results, name, SINGLE, lmbda)) for lmbda in lambdas]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _verdicts(results: Results) -> str:
    pairs = list(STEPS.items())
    # As many steps in all, shared among the levels instead of spent on one.
    pairs += [(name, LONG) for name, design in RIVALS.items() if design.one_level]
    pairs += [(balanced, static) for static, balanced in STATIC.items()]
    seeds = len(results["runs"])
    lines = [
        *(
            f"*{name}* against *{other}*: {verdict(gap(results, name, other))}."
            for name, other in pairs
        ),
        *_learned(results),
        f"All from {seeds} seed{'s' * (seeds != 1)} and {len(results['held_out'])} held-out "
        "images: intervals from so few are too narrow rather than too wide.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _learned(results: Results) -> Iterator[str]:
    """What the methods chose, and what came of it at each level."""
    for static, name in STATIC.items():
        weights = _by_level(results, name, lambda run: [fmean(part) for part in run["weights"]])
        yield f"*{name}*, mean weights: {weights}."
        yield from (_loss_ratios(results, name, other) for other in (PLAIN, static))
    yield f"*{PLAIN}*, learned steps: {_by_level(results, PLAIN, lambda run: run['hyper_steps'])}."


def _loss_ratios(results: Results, name: str, anchor: str) -> str:
    lambdas = results["plan"]["lambdas"]
    ratios = {lmbda: loss_ratio(results, name, anchor, lmbda) for lmbda in lambdas}
    shares = ", ".join(f"{shown(ratio)} at λ = {lmbda:g}" for lmbda, ratio in ratios.items())
    return f"*{name}*, R + λD over *{anchor}* in per cent: {shares}."


def _by_level(results: Results, name: str, measure: Callable[[Run], Sequence[float]]) -> str:
    """What a run has for each level, as a mean over the seeds."""
    levels = zip(*(measure(runs[name]) for runs in results["runs"].values()), strict=True)
    named = zip(results["plan"]["lambdas"], levels, strict=True)
    return ", ".join(f"{fmean(values):.2f} at λ = {lmbda:g}" for lmbda, values in named)


def verdict(interval: Interval | None) -> str:
    """What an interval allows to be said."""
    if interval is None:
        return "no BD-rate, some curves hardly overlap or do not rise"
    words = {-1: "fewer bits, in every seed", 0: "no difference that can be told from noise"}
    words[1] = "more bits, in every seed"
    return f"{words[interval.sign()]} ({shown(interval)})"


def shown(interval: Interval | None) -> str:
    """An interval as text, with a minus sign that is one."""
    if interval is None:
        return "–"
    text = f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
    return text.replace("-", "−")
