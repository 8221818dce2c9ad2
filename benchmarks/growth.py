"""Time and memory of a step against the number of losses and of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.contestants import LIMIT, PLAIN, Stand
from benchmarks.memory import BY_NAME, MIB, Job, measured
from benchmarks.peers import AUTOJAC, CHUNKS
from benchmarks.settings import Settings
from benchmarks.step_cost import prepared
from benchmarks.tables import loglog, table
from benchmarks.timing import Patience, Runner, Spread, race
from benchmarks.workloads import Workload, mlp

TITLE = "Growth"
NAMES = (PLAIN, LIMIT, "MGDA", "MGDA at features", "MGDA, streaming", AUTOJAC, CHUNKS)
LOSSES = (2, 4, 8, 16, 32, 64)
WIDTHS = (180, 576, 1825, 5772)
"""Three square layers each: 1e5, 1e6, 1e7 and 1e8 parameters."""

PATIENCE = Patience(seconds=8.0, fewest=3, most=30)
AXES = {"losses": "number of losses K", "parameters": "number of parameters P"}


def run(settings: Settings) -> dict[str, Any]:
    counts = LOSSES[:2] if settings.quick else LOSSES
    width = 16 if settings.quick else 512
    widths = (8, 16) if settings.quick else WIDTHS
    against_losses = [partial(mlp, count, width=width) for count in counts]
    against_parameters = [partial(mlp, 4, width=width, batch=16) for width in widths]
    return {
        "losses": [_measured(make, settings) for make in against_losses],
        "parameters": [_measured(make, settings) for make in against_parameters],
    }


def _measured(make: Callable[[], Workload], settings: Settings) -> dict[str, Any]:
    names = NAMES[:4] if settings.quick else NAMES
    stand = Stand.of(make(), settings.device)
    settings.tell(f"{stand.workload.name}, {sum(p.numel() for p in stand.params):,} parameters")
    size = sum(p.numel() * p.element_size() for p in stand.params)
    result: dict[str, Any] = {
        "losses": stand.workload.count,
        "parameters": sum(p.numel() for p in stand.params),
        "contestants": {name: {} for name in names},
    }
    # Each contestant holds its parameters and gradients, and the one whose turn it is K rows twice.
    wanted = size * (2 * len(names) + 2 * stand.workload.count + 2)
    available = _available(settings)
    if wanted > available:
        result["left out"] = f"{wanted / MIB:.0f} MiB wanted, {available / MIB:.0f} MiB there"
        return result
    for name, seconds in _times(stand, names, settings).items():
        result["contestants"][name]["seconds"] = Spread.of(seconds)
    del stand
    found = measured([Job(make, name, settings) for name in names[:: 4 if settings.quick else 1]])
    for name, entry in zip(names, found, strict=False):
        result["contestants"][name].update(entry)
    return result


def _times(stand: Stand, names: tuple[str, ...], settings: Settings) -> dict[str, list[float]]:
    steps, _ = prepared([BY_NAME[name] for name in names], stand)
    runners = {name: Runner(step) for name, step in steps.items()}
    patience = Patience(0.0, 1) if settings.quick else PATIENCE
    return race(runners, patience, settings.synchronize)


def _available(settings: Settings) -> float:
    if settings.on_gpu:
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return float(psutil.virtual_memory().available)


def curves(results: dict[str, Any], axis: str, figure: str) -> dict[str, dict[float, float]]:
    """For each contestant, its figure against the axis."""
    found: dict[str, dict[float, float]] = {}
    for point in results[axis]:
        for name, entry in point["contestants"].items():
            if figure in entry:
                value = entry[figure][0] if figure == "seconds" else entry[figure]
                found.setdefault(name, {})[point[axis]] = value
    return found


def section(results: dict[str, Any]) -> str:
    fixed = {
        "losses": f"{results['losses'][0]['parameters']:,} parameters and more with each head",
        "parameters": f"K = {results['parameters'][0]['losses']}",
    }
    parts = ["A trunk of linear layers with K heads; one step, as in the tables above."]
    for axis, label in AXES.items():
        parts.append(f"### Against the {label}")
        parts.append(f"With {fixed[axis]}. Milliseconds per step; peak memory in MiB above rest:")
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
    places = [point[axis] for point in results[axis]]
    rows = [
        [name, *(_cell(times[name].get(at), peaks.get(name, {}).get(at)) for at in places)]
        for name in times
    ]
    return table([AXES[axis], *(f"{place:,}" for place in places)], rows)


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
            "seconds per step" if figure == "seconds" else "bytes above rest",
            base=2 if axis == "losses" else 10,
        )
        for stem, (axis, figure, _) in _PLOTS.items()
    }
