"""Time of a step: forward, backward and optimizer, as a multiple of the plain summed step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.settings import Settings
from benchmarks.speed import counts
from benchmarks.speed.implementations import (
    FORWARD,
    LIMIT,
    OURS,
    PLAIN,
    Implementation,
    Setup,
    Step,
    forward,
    limit,
    plain,
)
from benchmarks.speed.peers import PEERS
from benchmarks.speed.tables import spread, table
from benchmarks.speed.timing import Budget, Runner, Spread, interleave, ratios
from benchmarks.speed.workloads import ALL, TINY, Workload

TITLE = "Step cost"
IMPLEMENTATIONS = (
    Implementation(PLAIN, plain),
    Implementation(FORWARD, forward, per_loss=True),
    Implementation(LIMIT, limit, per_loss=True),
    *OURS,
    *PEERS,
)
GROUPS = {False: "one backward pass", True: "gradients of single losses"}
"""Titles of the two groups, by `Implementation.per_loss`."""
BUDGET = Budget(seconds=18.0)


def prepare(
    implementations: Sequence[Implementation], setup: Setup
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps of those that run, each on its own copy, and why the others do not."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for implementation in implementations:
        reason = implementation.unsupported(setup.workload)
        if reason is None:
            try:
                step = implementation.build(setup.copy())
                step()
                steps[implementation.name] = step
            except Exception as error:
                if not implementation.third_party:
                    raise
                reason = first_sentence(error)
        if reason is not None:
            left_out[implementation.name] = reason
    return steps, left_out


def first_sentence(error: Exception) -> str:
    """The error on one line, without explanations and examples."""
    sentence = re.split(r"[.;] | [(]|\n", str(error))[0]
    return f"{type(error).__name__}: {sentence}"


def run(settings: Settings) -> dict[str, Any]:
    makes = TINY if settings.quick else ALL
    return {"workloads": [_measure(make(), settings) for make in makes]}


def _measure(workload: Workload, settings: Settings) -> dict[str, Any]:
    settings.report(workload.name)
    setup = Setup.create(workload, settings.device)
    result: dict[str, Any] = {
        "name": workload.name,
        "losses": workload.count,
        "parameters": sum(p.numel() for p in setup.params),
        "groups": {},
        "left out": {},
    }
    for per_loss, title in GROUPS.items():
        group = [i for i in IMPLEMENTATIONS if i.per_loss == per_loss or i.name == PLAIN]
        steps, left_out = prepare(group, setup)
        result["groups"][title] = _measure_group(group, steps, settings)
        result["left out"].update(left_out)
    return result


def _measure_group(
    group: Sequence[Implementation], steps: dict[str, Step], settings: Settings
) -> dict[str, Any]:
    runners = {i.name: Runner(steps[i.name], i.period) for i in group if i.name in steps}
    budget = Budget(0.0, 1) if settings.quick else BUDGET
    seconds = interleave(runners, budget, settings.synchronize)
    figures = {}
    for name, values in seconds.items():
        figures[name] = {
            "ms": Spread.of([1000 * value for value in values]),
            "x plain": Spread.of(ratios(seconds, name, PLAIN)),
        }
        if LIMIT in seconds:
            figures[name]["x limit"] = Spread.of(ratios(seconds, name, LIMIT))
        if settings.on_gpu:
            figures[name]["gpu"] = counts.on_gpu(steps[name])
    return {"rounds": len(next(iter(seconds.values()))), "implementations": figures}


def section(results: dict[str, Any]) -> str:
    parts = [
        "Time of a step as a multiple of the plain summed step: the median over interleaved "
        "rounds, and in brackets the two quartiles. Forward pass and optimizer (SGD) "
        f"are part of every step. *{LIMIT}*: forward, one pruned `autograd.grad` per loss, their "
        "sum, and the optimizer: the least that exact gradients of single losses cost if they are "
        "taken one after the other. TorchJD uses our solver, so that only the differentiation is "
        "compared; ConFIG and PCGrad include the arithmetic of their own methods."
    ]
    for title in GROUPS.values():
        parts.append(f"### With {title}")
        for family in _families(results["workloads"]):
            parts.append(_group_table(family, title))
    parts.append(_left_out(results["workloads"]))
    return "\n\n".join(part for part in parts if part)


def _families(workloads: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Workloads by table: those that differ only in K share one, and the others share another."""
    families: dict[str, list[dict[str, Any]]] = {}
    for workload in workloads:
        families.setdefault(workload["name"].split(",")[0], []).append(workload)
    single = [members[0] for members in families.values() if len(members) == 1]
    return [group for group in (single, *(m for m in families.values() if len(m) > 1)) if group]


def _group_table(family: list[dict[str, Any]], title: str) -> str:
    groups = [workload["groups"][title]["implementations"] for workload in family]
    heads = [
        f"{w['name']} ({w['parameters']:,} parameters, {w['groups'][title]['rounds']} rounds)"
        for w in family
    ]
    names = [i.name for i in IMPLEMENTATIONS if any(i.name in entries for entries in groups)]
    rows = [[name, *(_cell(entries.get(name)) for entries in groups)] for name in names]
    return table(["× plain", *heads], rows)


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    if figures["x plain"][0] == 1.0 and figures["x plain"][1] == figures["x plain"][2]:
        return f"1 ({figures['ms'][0]:.3g} ms)" + _on_gpu(figures)
    return spread(figures["x plain"]) + _on_gpu(figures)


def _on_gpu(figures: dict[str, Any]) -> str:
    if "gpu" not in figures:
        return ""
    gpu = figures["gpu"]
    return f"; {figures['ms'][0]:.3g} ms, {gpu['kernels']} kernels, {gpu['waits']} waits"


def _left_out(workloads: list[dict[str, Any]]) -> str:
    lines: dict[tuple[str, str], list[str]] = {}
    for workload in workloads:
        for name, reason in workload["left out"].items():
            lines.setdefault((name, reason), []).append(workload["name"])
    if not lines:
        return ""
    listed = []
    for (name, reason), where in lines.items():
        models = "all models" if len(where) == len(workloads) else "; ".join(where)
        listed.append(f"- {name}, on {models}: {reason}")
    return "Left out:\n\n" + "\n".join(listed)


def figures(results: dict[str, Any]) -> dict[str, Any]:
    return {}
