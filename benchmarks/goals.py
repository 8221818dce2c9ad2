"""What the library is to reach, as data, and how to read from the results whether it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import memory, solvers
from benchmarks.contestants import FORWARD, LIMIT
from benchmarks.import_time import STATEMENTS
from benchmarks.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.step_cost import RACES
from benchmarks.tables import table

Results = Mapping[str, Any]
Readings = dict[str, float]

STREAMING = "MGDA, streaming"
EXACT = ("MGDA", "MGDA, exact behind features", STREAMING)
LOSS_ONLY = ("Sum", "SmoothTchebycheff", "FAMO, lagged")
SINGLE, ROWS = RACES.values()


@dataclass(frozen=True)
class Goal:
    """A bound on some figures of the results.

    Args:
        path: What is measured.
        text: The bound in words.
        bound: The bound.
        read: The figures by what they belong to; empty if they were not measured.
        why: What a figure beyond the bound is spent on.
        at_least: Is the bound a lower one?
        floor: What nobody could do better than, by the same names as the figures.
        floor_is: What that is.
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
        """How far beyond the bound, as a share of it; not positive where it is reached."""
        share = value / self.bound - 1.0
        return -share if self.at_least else share


def _workloads(results: Results) -> Iterator[dict[str, Any]]:
    yield from results.get("step", {}).get("workloads", [])


def _step(
    title: str, names: Sequence[str], against: str, only: str = "", of: str = ""
) -> Callable[[Results], Readings]:
    """Figures of some contestants, on the models whose name begins so; or of one beside each."""

    def read(results: Results) -> Readings:
        return {
            f"{name}, {workload['name']}": entries[of or name][against][0]
            for workload in _workloads(results)
            if workload["name"].startswith(only)
            for entries in [workload["races"][title]["contestants"]]
            for name in names
            if (of or name) in entries
        }

    return read


def _speedup(
    rivals: Sequence[str],
    counts: Sequence[int] = (),
    only: tuple[str, ...] = ("",),
    own: Sequence[str] = EXACT,
) -> Callable[[Results], Readings]:
    """How many times faster our best exact way is than the best of the rivals."""

    def read(results: Results) -> Readings:
        found = {}
        for workload in _workloads(results):
            entries = workload["races"][ROWS]["contestants"]
            theirs = [entries[name]["x plain"][0] for name in rivals if name in entries]
            ours = [entries[name]["x plain"][0] for name in own if name in entries]
            fits = workload["name"].startswith(only) and (
                not counts or workload["losses"] in counts
            )
            if fits and theirs and ours:
                found[workload["name"]] = min(theirs) / min(ours)
        return found

    return read


def _tenth_of_a_forward_pass(results: Results) -> Readings:
    return {
        f"FAMO, every 10, {workload['name']}": 1.0 + entries[FORWARD]["x plain"][0] / 10
        for workload in _workloads(results)
        for entries in [workload["races"][ROWS]["contestants"]]
        if FORWARD in entries
    }


def _below_limit(results: Results) -> Readings:
    found = {}
    for workload in _workloads(results):
        entries = workload["races"][ROWS]["contestants"]
        if workload["losses"] >= 8:
            ours = (entries[name]["x limit"][0] for name in EXACT if name in entries)
            found[workload["name"]] = min(ours)
    return found


def _streaming_memory(results: Results) -> Readings:
    readings = {}
    for model in results.get("memory", {}).get("models", []):
        above = memory.above_plain(model, STREAMING) if STREAMING in model["contestants"] else None
        if above is not None and model["contestants"][STREAMING]["bytes"] >= memory.MIB:
            readings[model["name"]] = above
    return readings


def _streaming_time(results: Results) -> Readings:
    """Time above the limit, in multiples of what a plain step does behind its forward pass."""
    readings = {}
    for workload in _workloads(results):
        entries = workload["races"][ROWS]["contestants"]
        if STREAMING in entries:
            limit = entries[LIMIT]["x plain"][0]
            backward = 1.0 - entries[FORWARD]["x plain"][0]
            readings[workload["name"]] = (entries[STREAMING]["x plain"][0] - limit) / backward
    return readings


def _latency(count: int) -> Callable[[Results], Readings]:
    def read(results: Results) -> Readings:
        return {
            f"{entry['solver']}, {entry['kind']}": entry["microseconds"]
            for entry in results.get("solvers", {}).get("entries", [])
            if entry["solver"] in (solvers.OURS, solvers.OUR_QP)
            and entry["losses"] == count
            and "microseconds" in entry
        }

    return read


def _gap(results: Results) -> Readings:
    return {
        f"{entry['kind']}, K = {entry['losses']}": entry.get("gap", float("inf"))
        for entry in results.get("solvers", {}).get("entries", [])
        if entry["solver"] == solvers.OURS
    }


def _import(results: Results) -> Readings:
    """What every user pays: the package, the optimizer and a method."""
    found = results.get("imports", {}).get("ours ms", {})
    return {f"`{statement}`": found[statement][0] for statement in STATEMENTS[:2] if found}


_CHECKS = (
    "Above the plain step are some hundred microseconds of Python, for losses at the door, "
    "coefficients and records, and one more read of all gradients, which NaN must not get past."
)
_LIMIT = (
    "Above the limit are the inner products, the combination and the solver: fixed costs, which "
    "show most where a pass takes a few milliseconds, and rows that have left the cache before "
    "they are combined."
)
GOALS = (
    Goal("loss-only methods", "≤ 1.01 × plain", 1.01, _step(SINGLE, LOSS_ONLY, "x plain"), _CHECKS),
    Goal(
        "FAMO, every 10",
        "≤ 1.03 × plain",
        1.03,
        _step(SINGLE, ["FAMO, every 10"], "x plain"),
        _CHECKS + " Each tenth step adds a forward pass.",
        floor=_tenth_of_a_forward_pass,
        floor_is="a plain step and a tenth of its forward pass",
    ),
    Goal(
        "exact Gramian methods",
        "≤ 1.03 × the limit",
        1.03,
        _step(ROWS, ["AnalyticQP", "MGDA"], "x limit"),
        _LIMIT,
    ),
    Goal(
        "exact Gramian methods, codec",
        "≤ 1.25 × plain",
        1.25,
        _step(ROWS, ["AnalyticQP", "MGDA"], "x plain", only="codec"),
        "What is above the limit is spent as the line before says.",
        floor=_step(ROWS, ["AnalyticQP", "MGDA"], "x plain", only="codec", of=LIMIT),
        floor_is="the limit itself",
    ),
    Goal(
        "features, codec",
        "≤ 1.05 × plain",
        1.05,
        _step(SINGLE, ["MGDA at features"], "x plain", only="codec"),
        "Beside what loss-only methods spend, there are two passes to start in place of one, and "
        "inner products of all features.",
    ),
    *(
        Goal(
            f"beside TorchJD's default, K = {count}",
            f"≥ {bound} × faster",
            bound,
            _speedup([AUTOJAC], [count], ("codec", "ResNet")),
            "Both take K passes through the same convolutions, which neither can leave out.",
            at_least=True,
            floor=_speedup([AUTOJAC], [count], ("codec", "ResNet"), [LIMIT]),
            floor_is="the limit itself",
        )
        for count, bound in ((2, 1.3), (8, 1.6), (32, 2.5))
    ),
    Goal(
        "beside TorchJD's best setting",
        "never slower",
        1.0,
        _speedup([AUTOJAC, CHUNKS, MTL, AUTOGRAM]),
        "Where many small passes are batched into one, operations have less overhead.",
        at_least=True,
    ),
    Goal(
        "exact, K = 8 and 32",
        "below the sequential limit",
        1.0,
        _below_limit,
        "Where layers see more positions than they are wide, as convolutions do, factors would be "
        "dearer than gradients; and rows that are formed one after the other cannot be below it.",
    ),
    Goal(
        "streaming, memory",
        "≤ plain + 1.2 P",
        1.2,
        _streaming_memory,
        "K gradients at the activations of a cut have to be there at the same time, which counts "
        "where a batch has more activations than a layer has parameters; and the graph is kept.",
    ),
    Goal(
        "streaming, time",
        "≤ limit + 1 backward",
        1.0,
        _streaming_time,
        "The weighted pass, the products, and what every method with a Gramian spends beside its "
        "passes; with several portions, autograd is started anew for each of them and each loss.",
    ),
    Goal(
        "solvers, K = 2",
        "≤ 60 µs",
        60.0,
        _latency(2),
        "Reading the Gramian, and making a tensor of the answer.",
    ),
    Goal(
        "solvers, K = 32",
        "≤ 1 ms",
        1000.0,
        _latency(32),
        "Each change of the active set is a factorisation; hard Gramians need more of them.",
    ),
    Goal("solvers, duality gap", "≤ 1e-10", 1e-10, _gap, "Rounding of the Gramian's own entries."),
    Goal(
        "import time",
        "≤ 10 ms",
        10.0,
        _import,
        "Some thirty modules are read, and half of the time goes into making dataclasses.",
    ),
)


def section(results: Results) -> str:
    """Each goal with the figure that is worst, and why those beyond it are."""
    rows, notes = [], []
    for goal in GOALS:
        readings = goal.read(results)
        missed = {name: v for name, v in readings.items() if goal.excess(v) > 0}
        rows.append(
            [goal.path, goal.text, _worst(goal, readings), _verdict(goal, readings, missed)]
        )
        if missed:
            floor = goal.floor(results)
            listed = "; ".join(
                f"{name}: {_figure(value)}"
                + (f" ({_figure(floor[name])})" if name in floor else "")
                for name, value in missed.items()
            )
            brackets = f" In brackets: {goal.floor_is}." if floor else ""
            notes.append(f"- **{goal.path}** ({goal.text}): {listed}. {goal.why}{brackets}")
    parts = [table(["path", "goal", "worst figure", "verdict"], rows)]
    if notes:
        parts += ["Where a goal is missed, by how much and why:", "\n".join(notes)]
    return "\n\n".join(parts)


def _worst(goal: Goal, readings: Readings) -> str:
    if not readings:
        return "–"
    name = max(readings, key=lambda name: goal.excess(readings[name]))
    return f"{_figure(readings[name])} ({name})"


def _verdict(goal: Goal, readings: Readings, missed: Readings) -> str:
    if not readings:
        return "not measured"
    if not missed:
        return "reached"
    most = max(goal.excess(value) for value in missed.values())
    return f"missed by up to {most:.0%} in {len(missed)} of {len(readings)}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if 0.01 < abs(value) < 10 else f"{value:.3g}"
