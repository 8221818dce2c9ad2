"""What a step costs: forward, backward and optimizer, as a multiple of the plain summed step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks import counts
from benchmarks.contestants import (
    FORWARD,
    LIMIT,
    OWN,
    PLAIN,
    Contestant,
    Stand,
    Step,
    forward,
    limit,
    plain,
)
from benchmarks.peers import PEERS
from benchmarks.settings import Settings
from benchmarks.tables import spread, table
from benchmarks.timing import Patience, Runner, Spread, race, ratios
from benchmarks.workloads import ALL, TINY, Workload

TITLE = "Step cost"
CONTESTANTS = (
    Contestant(PLAIN, plain),
    Contestant(FORWARD, forward, rows=True),
    Contestant(LIMIT, limit, rows=True),
    *OWN,
    *PEERS,
)
RACES = {False: "one backward pass", True: "gradients of single losses"}
PATIENCE = Patience(seconds=18.0)


def prepared(
    contestants: Sequence[Contestant], stand: Stand
) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps of those who can take part, each on its own copy, and why the others cannot."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for contestant in contestants:
        reason = contestant.obstacle(stand.workload)
        if reason is None:
            try:
                step = contestant.build(stand.copy())
                step()
                steps[contestant.name] = step
            except Exception as error:
                if not contestant.of_peer:
                    raise
                reason = first_words(error)
        if reason is not None:
            left_out[contestant.name] = reason
    return steps, left_out


def first_words(error: Exception) -> str:
    """What went wrong, on one line that ends where an explanation or an example begins."""
    words = re.split(r"[.;] | [(]|\n", str(error))[0]
    return f"{type(error).__name__}: {words}"


def run(settings: Settings) -> dict[str, Any]:
    makes = TINY if settings.quick else ALL
    return {"workloads": [_measured(make(), settings) for make in makes]}


def _measured(workload: Workload, settings: Settings) -> dict[str, Any]:
    settings.tell(workload.name)
    stand = Stand.of(workload, settings.device)
    result: dict[str, Any] = {
        "name": workload.name,
        "losses": workload.count,
        "parameters": sum(p.numel() for p in stand.params),
        "races": {},
        "left out": {},
    }
    for rows, title in RACES.items():
        field = [c for c in CONTESTANTS if c.rows == rows or c.name == PLAIN]
        steps, left_out = prepared(field, stand)
        result["races"][title] = _raced(field, steps, settings)
        result["left out"].update(left_out)
    return result


def _raced(
    field: Sequence[Contestant], steps: dict[str, Step], settings: Settings
) -> dict[str, Any]:
    runners = {c.name: Runner(steps[c.name], c.period) for c in field if c.name in steps}
    patience = Patience(0.0, 1) if settings.quick else PATIENCE
    seconds = race(runners, patience, settings.synchronize)
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
    return {"rounds": len(next(iter(seconds.values()))), "contestants": figures}


def section(results: dict[str, Any]) -> str:
    parts = [
        "Time of a step as a multiple of the plain summed step, in the median over interleaved "
        "rounds, and in brackets the range of its middle half. Forward pass and optimizer (SGD) "
        f"are part of every step. *{LIMIT}*: forward, one pruned `autograd.grad` per loss, their "
        "sum, and the optimizer: what exact per-loss gradients cost at least if they are taken one "
        "after the other. TorchJD is given our solver, so that only the differentiation is "
        "compared; ConFIG and PCGrad include the arithmetic of their own methods."
    ]
    for title in RACES.values():
        parts.append(f"### With {title}")
        for family in _families(results["workloads"]):
            parts.append(_race_table(family, title))
    parts.append(_left_out(results["workloads"]))
    return "\n\n".join(part for part in parts if part)


def _families(workloads: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Models that differ in K alone are shown side by side, and the single ones as well."""
    found: dict[str, list[dict[str, Any]]] = {}
    for workload in workloads:
        found.setdefault(workload["name"].split(",")[0], []).append(workload)
    single = [members[0] for members in found.values() if len(members) == 1]
    return [group for group in (single, *(m for m in found.values() if len(m) > 1)) if group]


def _race_table(family: list[dict[str, Any]], title: str) -> str:
    races = [workload["races"][title]["contestants"] for workload in family]
    heads = [
        f"{w['name']} ({w['parameters']:,} parameters, {w['races'][title]['rounds']} rounds)"
        for w in family
    ]
    names = [c.name for c in CONTESTANTS if any(c.name in entries for entries in races)]
    rows = [[name, *(_cell(entries.get(name)) for entries in races)] for name in names]
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
