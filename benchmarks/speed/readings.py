"""Reads the figures that goals bound from the results on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.speed import memory, solvers
from benchmarks.speed.implementations import FORWARD, LIMIT
from benchmarks.speed.import_time import STATEMENTS
from benchmarks.speed.step_cost import GROUPS

Results = Mapping[str, Any]
Readings = dict[str, float]
"""Figures by what they belong to; empty if they were not measured."""

STREAMING = "MGDA, streaming"
GRAMIAN = ("MGDA", STREAMING)
ONE_PASS, PER_LOSS = GROUPS.values()


def _workloads(results: Results) -> Iterator[dict[str, Any]]:
    yield from results.get("step", {}).get("workloads", [])


def _per_loss_group(results: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each workload with the figures of the group that takes gradients of single losses."""
    for workload in _workloads(results):
        yield workload, workload["groups"][PER_LOSS]["implementations"]


def step_cost(
    group: str, names: Sequence[str], relative_to: str, prefix: str = "", of: str = ""
) -> Callable[[Results], Readings]:
    """Return a reader of step times.

    Args:
        group: Title of the implementations' group.
        names: Implementations.
        relative_to: "x plain" or "x limit".
        prefix: Only workloads whose name starts with it.
        of: Read this implementation's figure in place of each one's own.
    """

    def read(results: Results) -> Readings:
        return {
            f"{name}, {workload['name']}": entries[of or name][relative_to][0]
            for workload in _workloads(results)
            if workload["name"].startswith(prefix)
            for entries in [workload["groups"][group]["implementations"]]
            for name in names
            if (of or name) in entries
        }

    return read


def speedup(
    others: Sequence[str],
    counts: Sequence[int] = (),
    prefixes: tuple[str, ...] = ("",),
    ours: Sequence[str] = GRAMIAN,
) -> Callable[[Results], Readings]:
    """Return a reader of how many times faster our best way is than the best of the others."""

    def read(results: Results) -> Readings:
        readings = {}
        for workload, entries in _per_loss_group(results):
            theirs = [entries[name]["x plain"][0] for name in others if name in entries]
            own = [entries[name]["x plain"][0] for name in ours if name in entries]
            fits = workload["name"].startswith(prefixes) and (
                not counts or workload["losses"] in counts
            )
            if fits and theirs and own:
                readings[workload["name"]] = min(theirs) / min(own)
        return readings

    return read


def plain_and_tenth_of_forward(results: Results) -> Readings:
    return {
        f"FAMO, every 10, {workload['name']}": 1.0 + entries[FORWARD]["x plain"][0] / 10
        for workload, entries in _per_loss_group(results)
        if FORWARD in entries
    }


def below_limit(results: Results) -> Readings:
    readings = {}
    for workload, entries in _per_loss_group(results):
        if workload["losses"] >= 8:
            times = (entries[name]["x limit"][0] for name in GRAMIAN if name in entries)
            readings[workload["name"]] = min(times)
    return readings


def streaming_memory(results: Results) -> Readings:
    """Peak above the plain step, in multiples of the parameters' memory, for models of a MiB up."""
    readings = {}
    for model in results.get("memory", {}).get("models", []):
        entry = model["implementations"].get(STREAMING, {})
        above = memory.above_plain(model, STREAMING)
        if above is not None and entry["bytes"] >= memory.MIB:
            readings[model["name"]] = above
    return readings


def streaming_time(results: Results) -> Readings:
    """Time above the limit, in multiples of what a plain step takes after its forward pass."""
    readings = {}
    for workload, entries in _per_loss_group(results):
        if STREAMING in entries:
            limit = entries[LIMIT]["x plain"][0]
            backward = 1.0 - entries[FORWARD]["x plain"][0]
            readings[workload["name"]] = (entries[STREAMING]["x plain"][0] - limit) / backward
    return readings


def solver_latency(count: int) -> Callable[[Results], Readings]:
    def read(results: Results) -> Readings:
        return {
            f"{entry['solver']}, {entry['kind']}": entry["microseconds"]
            for entry in results.get("solvers", {}).get("entries", [])
            if entry["solver"] in (solvers.OUR_MIN_NORM, solvers.OUR_QP)
            and entry["losses"] == count
            and "microseconds" in entry
        }

    return read


def method_latency(count: int) -> Callable[[Results], Readings]:
    """Return a reader of the microseconds that each method with a Gramian takes."""

    def read(results: Results) -> Readings:
        measured = results.get("solvers", {}).get("methods", {}).get("entries", [])
        return {
            entry["method"]: entry["microseconds"] for entry in measured if entry["losses"] == count
        }

    return read


def duality_gap(results: Results) -> Readings:
    return {
        f"{entry['kind']}, K = {entry['losses']}": entry.get("gap", float("inf"))
        for entry in results.get("solvers", {}).get("entries", [])
        if entry["solver"] == solvers.OUR_MIN_NORM
    }


def import_time(results: Results) -> Readings:
    measured = results.get("imports", {}).get("ours ms", {})
    return {f"`{name}`": measured[name][0] for name in STATEMENTS if name in measured}
