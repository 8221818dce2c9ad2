"""Time of each phase and operation of a step, by ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.settings import Settings
from benchmarks.speed.implementations import Setup, balanced_step
from benchmarks.speed.tables import table
from benchmarks.speed.workloads import TINY, Workload, codec, mlp, resnet
from moo_balance import MGDA
from moo_balance.engine import Engine, Linearization, PerLoss, Problem
from moo_balance.weighting import State, Statistics, Weighting, WeightingOutput

TITLE = "Where the time goes"
MAKES: tuple[Callable[[], Workload], ...] = (
    codec,
    *(partial(mlp, k) for k in (2, 8, 32)),
    partial(resnet, 8),
)
STEPS, MAX_OPERATIONS = 10, 8
FORWARD, GRAMIAN, WEIGHTS, COMBINE = "forward", "gradients and Gramian", "weights", "combination"
_PASS = "autograd::engine::evaluate_function"
_STEP, _OPTIMIZER = "whole step", "Optimizer.step#SGD.step"


class _Marked(Linearization):
    """Marks the phases for the profiler."""

    def __init__(self, inner: Linearization) -> None:
        self.inner = inner

    def gramian(self) -> Tensor:
        with record_function(GRAMIAN):
            return self.inner.gramian()

    def add_to_grad(self, coefficients: Tensor) -> None:
        with record_function(COMBINE):
            self.inner.add_to_grad(coefficients)

    def combined(self, coefficients: Tensor) -> Tensor:
        return self.inner.combined(coefficients)


@dataclass(frozen=True)
class _MarkedEngine(Engine):
    inner: Engine

    def linearize(self, problem: Problem) -> Linearization:
        return _Marked(self.inner.linearize(problem))


@dataclass(frozen=True)
class _MarkedWeighting(Weighting):
    uses_gramian = True
    inner: Weighting

    def init(self, names: Sequence[str], device: torch.device) -> State:
        return self.inner.init(names, device)

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        with record_function(WEIGHTS):
            return self.inner.weights(statistics, state)


def _marked_forward(workload: Workload) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        with record_function(FORWARD):
            return workload.forward(*arguments)

    return forward


def run(settings: Settings) -> dict[str, Any]:
    makes = TINY[-1:] if settings.quick else MAKES
    steps = 2 if settings.quick else STEPS
    return {"steps": steps, "models": [_profile(make(), settings, steps) for make in makes]}


def _profile(workload: Workload, settings: Settings, steps: int) -> dict[str, Any]:
    settings.report(workload.name)
    marked = replace(workload, forward=_marked_forward(workload))
    setup = Setup.create(marked, settings.device)
    step = balanced_step(_MarkedWeighting(MGDA()), engine=_MarkedEngine(PerLoss()))(setup)
    for _ in range(3):
        step()
    settings.synchronize()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                step()
        settings.synchronize()
    averages = {event.key: event for event in profiler.key_averages()}
    total = averages[_STEP].cpu_time_total / 1000 / steps
    return {
        "name": workload.name,
        "ms": total,
        "phases": _phases(averages, total, steps),
        "operations": _operations(averages, steps),
    }


def _phases(averages: dict[str, Any], total: float, steps: int) -> dict[str, float]:
    """Milliseconds per step of each phase; phases do not overlap."""

    def spent(*keys: str) -> float:
        return sum(averages[k].cpu_time_total for k in keys if k in averages) / 1000 / steps

    # A model may differentiate in its own forward pass; then this is more than the losses took.
    passes = spent(*(key for key in averages if key.startswith(_PASS)))
    phases = {
        FORWARD: spent(FORWARD),
        "differentiation of the losses": min(passes, spent(GRAMIAN)),
        "inner products": max(spent(GRAMIAN) - passes, 0.0),
        WEIGHTS: spent(WEIGHTS),
        COMBINE: spent(COMBINE),
        "the optimizer": spent(_OPTIMIZER),
    }
    return {**phases, "validation and records": total - sum(phases.values())}


def _operations(averages: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The operations with the largest own time, without that of their callees."""
    events = [event for key, event in averages.items() if key.startswith("aten::")]
    events.sort(key=lambda event: -event.self_cpu_time_total)
    return [
        {
            "name": event.key.removeprefix("aten::"),
            "ms": event.self_cpu_time_total / 1000 / steps,
            "calls": event.count / steps,
        }
        for event in events[:MAX_OPERATIONS]
    ]


def section(results: dict[str, Any]) -> str:
    models = results["models"]
    phases = [
        [name, *(f"{m['phases'][name]:.2f} ({m['phases'][name] / m['ms']:.0%})" for m in models)]
        for name in models[0]["phases"]
    ]
    parts = [
        f"A step of MGDA over {results['steps']} steps under `torch.profiler`, milliseconds of the "
        "host per step and their share. The profiler itself slows small operations down, so the "
        "share of validation and records is overestimated.",
        table(["", *(f"{m['name']} ({m['ms']:.1f} ms)" for m in models)], phases),
        "The operations with the largest own time:",
    ]
    rows = [
        [model["name"], ", ".join(_operation(entry) for entry in model["operations"])]
        for model in models
    ]
    return "\n\n".join([*parts, table(["", "ms per step (calls)"], rows)])


def _operation(entry: dict[str, Any]) -> str:
    return f"`{entry['name']}` {entry['ms']:.2f} ({entry['calls']:.0f})"


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
