"""Goals of the library as data, and whether the results reach them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.speed import readings
from benchmarks.speed.implementations import LIMIT
from benchmarks.speed.methods import BUDGETS
from benchmarks.speed.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.speed.readings import ONE_PASS, PER_LOSS, Readings, Results, speedup, step_cost
from benchmarks.speed.tables import table

LOSS_ONLY = ("Sum", "SmoothTchebycheff", "FAMO, lagged")


@dataclass(frozen=True)
class Goal:
    """A bound on some figures of the results.

    Args:
        path: What is measured.
        text: The bound in words.
        bound: The bound.
        read: Reads the figures by what they belong to; empty if they were not measured.
        why: Where the time or memory beyond the bound goes.
        at_least: Whether the bound is a lower one.
        floor: Reads the best figures that are possible, by the same names.
        floor_is: What the floor is, in words.
    """

    path: str
    text: str
    bound: float
    read: Callable[[Results], Readings]
    why: str
    at_least: bool = False
    floor: Callable[[Results], Readings] = lambda results: {}
    floor_is: str = ""

    def excess(self, value: float) -> float:
        """How far a figure is beyond the bound, as a share of it; at most 0 if it is reached."""
        share = value / self.bound - 1.0
        return -share if self.at_least else share


_CHECKS = (
    "Above the plain step are some hundred microseconds of Python, for validating losses, for "
    "coefficients and records, and one more read of all gradients, to detect NaN."
)
_LIMIT = (
    "Above the limit are the inner products, the combination and the solver: fixed costs, which "
    "show most where a pass takes a few milliseconds, and rows that have left the cache before "
    "they are combined."
)
GOALS = (
    Goal(
        "loss-only methods",
        "≤ 1.01 × plain",
        1.01,
        step_cost(ONE_PASS, LOSS_ONLY, "x plain"),
        _CHECKS,
    ),
    Goal(
        "FAMO, every 10",
        "≤ 1.03 × plain",
        1.03,
        step_cost(ONE_PASS, ["FAMO, every 10"], "x plain"),
        _CHECKS + " Each tenth step adds a forward pass.",
        floor=readings.plain_and_tenth_of_forward,
        floor_is="a plain step and a tenth of its forward pass",
    ),
    Goal(
        "exact Gramian methods",
        "≤ 1.03 × the limit",
        1.03,
        step_cost(PER_LOSS, ["AnalyticQP", "MGDA"], "x limit"),
        _LIMIT,
    ),
    Goal(
        "exact Gramian methods, codec",
        "≤ 1.25 × plain",
        1.25,
        step_cost(PER_LOSS, ["AnalyticQP", "MGDA"], "x plain", prefix="codec"),
        "The goal before this one says what the time above the limit is spent on.",
        floor=step_cost(PER_LOSS, ["AnalyticQP", "MGDA"], "x plain", prefix="codec", of=LIMIT),
        floor_is="the limit itself",
    ),
    Goal(
        "features, codec",
        "≤ 1.05 × plain",
        1.05,
        step_cost(ONE_PASS, ["MGDA at features"], "x plain", prefix="codec"),
        "In addition to the costs of loss-only methods, there are two backward passes to start "
        "instead of one, and inner products of all features.",
    ),
    *(
        Goal(
            f"compared with TorchJD's default, K = {count}",
            f"≥ {bound} × faster",
            bound,
            speedup([AUTOJAC], [count], ("codec", "ResNet")),
            "Both take K passes through the same convolutions, which neither can leave out.",
            at_least=True,
            floor=speedup([AUTOJAC], [count], ("codec", "ResNet"), [LIMIT]),
            floor_is="the limit itself",
        )
        for count, bound in ((2, 1.3), (8, 1.6), (32, 2.5))
    ),
    Goal(
        "compared with TorchJD's best setting",
        "never slower",
        1.0,
        speedup([AUTOJAC, CHUNKS, MTL, AUTOGRAM]),
        "Where many small passes are batched into one, operations have less overhead.",
        at_least=True,
    ),
    Goal(
        "exact Gramian methods, K = 8 and 32",
        "below the sequential limit",
        1.0,
        readings.below_limit,
        "Where layers see more positions than they are wide, as convolutions do, factors would "
        "cost more than gradients; and rows that are computed one after the other cannot cost less "
        "than the limit.",
    ),
    Goal(
        "streaming, memory",
        "≤ plain + 1.2 P",
        1.2,
        readings.streaming_memory,
        "K gradients at the activations of a cut have to exist at the same time, which counts "
        "where a batch has more activations than a layer has parameters; and the graph is kept.",
    ),
    Goal(
        "streaming, time",
        "≤ limit + 1 backward",
        1.0,
        readings.streaming_time,
        "The weighted pass, the products, and the other costs of every method with a Gramian. "
        "With several segments, autograd is started anew for each segment and each loss.",
    ),
    Goal(
        "solvers, K = 2",
        "≤ 60 µs",
        60.0,
        readings.solver_latency(2),
        "Reading the Gramian, and making a tensor of the answer.",
    ),
    Goal(
        "solvers, K = 32",
        "≤ 1 ms",
        1000.0,
        readings.solver_latency(32),
        "Each change of the active set is a factorisation; hard Gramians need more of them.",
    ),
    Goal(
        "solvers, duality gap",
        "≤ 1e-10",
        1e-10,
        readings.duality_gap,
        "Rounding of the Gramian's own entries.",
    ),
    *(
        Goal(
            f"methods with a Gramian, K = {count}",
            text,
            BUDGETS[count],
            readings.method_latency(count),
            "States are read from tensors and written to new ones; iterations of a method that has "
            "no closed form.",
        )
        for count, text in ((2, "≤ 60 µs"), (32, "≤ 2 ms"))
    ),
    Goal(
        "import time",
        "≤ 25 ms",
        25.0,
        readings.import_time,
        "All modules are read, and half of the time goes into making dataclasses.",
    ),
)


def section(results: Results) -> str:
    """A table with each goal's worst figure, and the reasons for those that are missed."""
    rows, notes = [], []
    for goal in GOALS:
        figures = goal.read(results)
        missed = {name: v for name, v in figures.items() if goal.excess(v) > 0}
        rows.append([goal.path, goal.text, _worst(goal, figures), _verdict(goal, figures, missed)])
        if missed:
            notes.append(_note(goal, missed, goal.floor(results)))
    parts = [table(["path", "goal", "worst figure", "verdict"], rows)]
    if notes:
        parts += ["Where a goal is missed, by how much and why:", "\n".join(notes)]
    return "\n\n".join(parts)


def _note(goal: Goal, missed: Readings, floor: Readings) -> str:
    listed = "; ".join(
        f"{name}: {_figure(value)}" + (f" ({_figure(floor[name])})" if name in floor else "")
        for name, value in missed.items()
    )
    brackets = f" In brackets: {goal.floor_is}." if floor else ""
    return f"- **{goal.path}** ({goal.text}): {listed}. {goal.why}{brackets}"


def _worst(goal: Goal, figures: Readings) -> str:
    if not figures:
        return "–"
    name = max(figures, key=lambda name: goal.excess(figures[name]))
    return f"{_figure(figures[name])} ({name})"


def _verdict(goal: Goal, figures: Readings, missed: Readings) -> str:
    if not figures:
        return "not measured"
    if not missed:
        return "reached"
    most = max(goal.excess(value) for value in missed.values())
    return f"missed by up to {most:.0%} in {len(missed)} of {len(figures)}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if 0.01 < abs(value) < 10 else f"{value:.3g}"
