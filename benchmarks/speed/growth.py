"""Time and memory of a step against the number of losses and of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.settings import Settings
from benchmarks.speed.implementations import LIMIT, PLAIN, Setup
from benchmarks.speed.memory import BY_NAME, MIB, Job, measure_all
from benchmarks.speed.peers import AUTOJAC, CHUNKS
from benchmarks.speed.step_cost import prepare
from benchmarks.speed.tables import loglog, table
from benchmarks.speed.timing import Budget, Runner, Spread, interleave
from benchmarks.speed.workloads import Workload, mlp

TITLE = "Growth"
NAMES = (PLAIN, LIMIT, "MGDA", "MGDA at features", "MGDA, streaming", AUTOJAC, CHUNKS)
LOSSES = (2, 4, 8, 16, 32, 64)
WIDTHS = (180, 576, 1825, 5772)
"""Three square layers each: 1e5, 1e6, 1e7 and 1e8 parameters."""

BUDGET = Budget(seconds=8.0, min_rounds=3, max_rounds=30)
AXES = {"losses": "number of losses K", "parameters": "number of parameters P"}


def run(settings: Settings) -> dict[str, Any]:
    counts = LOSSES[:2] if settings.quick else LOSSES
    width = 16 if settings.quick else 512
    widths = (8, 16) if settings.quick else WIDTHS
    by_losses = [partial(mlp, count, width=width) for count in counts]
    by_parameters = [partial(mlp, 4, width=width, batch=16) for width in widths]
    return {
        "losses": [_measure(make, settings) for make in by_losses],
        "parameters": [_measure(make, settings) for make in by_parameters],
    }


def _measure(make: Callable[[], Workload], settings: Settings) -> dict[str, Any]:
    names = NAMES[:4] if settings.quick else NAMES
    setup = Setup.create(make(), settings.device)
    settings.report(f"{setup.workload.name}, {sum(p.numel() for p in setup.params):,} parameters")
    size = sum(p.numel() * p.element_size() for p in setup.params)
    result: dict[str, Any] = {
        "losses": setup.workload.count,
        "parameters": sum(p.numel() for p in setup.params),
        "implementations": {name: {} for name in names},
    }
    # Each implementation holds parameters and gradients; the running one also holds K rows twice.
    required = size * (2 * len(names) + 2 * setup.workload.count + 2)
    available = _available(settings)
    if required > available:
        result["left out"] = (
            f"needs {required / MIB:.0f} MiB of {available / MIB:.0f} MiB that are available"
        )
        return result
    for name, seconds in _times(setup, names, settings).items():
        result["implementations"][name]["seconds"] = Spread.of(seconds)
    del setup
    measured = names[:1] if settings.quick else names
    peaks = measure_all([Job(make, name, settings) for name in measured])
    for name, entry in zip(measured, peaks, strict=True):
        result["implementations"][name].update(entry)
    return result


def _times(setup: Setup, names: tuple[str, ...], settings: Settings) -> dict[str, list[float]]:
    steps, _ = prepare([BY_NAME[name] for name in names], setup)
    runners = {name: Runner(step) for name, step in steps.items()}
    budget = Budget(0.0, 1) if settings.quick else BUDGET
    return interleave(runners, budget, settings.synchronize)


def _available(settings: Settings) -> float:
    if settings.on_gpu:
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


def curves(results: dict[str, Any], axis: str, figure: str) -> dict[str, dict[float, float]]:
    """Each implementation's figure, by the value of the axis."""
    lines: dict[str, dict[float, float]] = {}
    for point in results[axis]:
        for name, entry in point["implementations"].items():
            if figure in entry:
                value = entry[figure][0] if figure == "seconds" else entry[figure]
                lines.setdefault(name, {})[point[axis]] = value
    return lines


def section(results: dict[str, Any]) -> str:
    fixed = {
        "losses": f"{results['losses'][0]['parameters']:,} parameters and more with each head",
        "parameters": f"K = {results['parameters'][0]['losses']}",
    }
    parts = ["A trunk of linear layers with K heads; one step, as in the tables of step cost."]
    for axis, label in AXES.items():
        parts.append(f"### Against the {label}")
        parts.append(
            f"With {fixed[axis]}. Milliseconds per step; peak memory in MiB, above that before it:"
        )
        parts.append(_table(results, axis))
        parts += [_left_out(point, axis) for point in results[axis] if "left out" in point]
        parts += [
            f"![{what} against the {label}](figures/benchmarks/{stem}.svg)"
            for stem, (own, _, what) in _PLOTS.items()
            if own == axis
        ]
    return "\n\n".join(parts)


def _table(results: dict[str, Any], axis: str) -> str:
    times, peaks = curves(results, axis, "seconds"), curves(results, axis, "peak")
    values = [point[axis] for point in results[axis]]
    rows = [
        [name, *(_cell(times[name].get(at), peaks.get(name, {}).get(at)) for at in values)]
        for name in times
    ]
    return table([AXES[axis], *(f"{value:,}" for value in values)], rows)


def _cell(seconds: float | None, peak: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1000 * seconds:.3g}" + ("" if peak is None else f"; {peak / MIB:.0f}")


def _left_out(point: dict[str, Any], axis: str) -> str:
    return f"Left out at {point[axis]:,} {axis}: {point['left out']}."


_PLOTS = {
    "growth_losses_time": ("losses", "seconds", "Time of a step"),
    "growth_losses_memory": ("losses", "peak", "Peak memory"),
    "growth_parameters_time": ("parameters", "seconds", "Time of a step"),
    "growth_parameters_memory": ("parameters", "peak", "Peak memory"),
}


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {
        stem: loglog(
            curves(results, axis, figure),
            AXES[axis],
            "seconds per step" if figure == "seconds" else "bytes above those before the step",
            base=2 if axis == "losses" else 10,
        )
        for stem, (axis, figure, _) in _PLOTS.items()
    }
