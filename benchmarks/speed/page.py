"""Writes the page docs/benchmarks.md: goals, tables and plots, from the results on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.speed import (
    goals,
    growth,
    import_time,
    memory,
    profiling,
    solvers,
    step_cost,
    two_ranks,
)
from benchmarks.speed.tables import save

PARTS: dict[str, ModuleType] = {
    "step": step_cost,
    "memory": memory,
    "growth": growth,
    "solvers": solvers,
    "ranks": two_ranks,
    "profile": profiling,
    "imports": import_time,
}

HEAD = """\
<!-- written by `make bench`, and from the same figures by `python -m benchmarks.speed page` -->

# Benchmarks

What balancing costs, compared with the plain loop and with other libraries. `make bench` measures
it again, in twenty minutes or less on two quiet cores, and `python -m benchmarks.speed --help`
lists its parts.

All implementations train copies of the same model on the same batch and take turns, in another
order each round, so that a slow machine slows all of them alike. A ratio compares two steps of the
same round. Garbage is collected only between rounds."""


def write_results(folder: Path, part: str, environment: Any, results: Any) -> dict[str, Any]:
    """Save a part's figures; return them as they are read back."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "results": results}, indent=1) + "\n"
    unfinished = folder / f".{part}.json"
    unfinished.write_text(text)
    unfinished.replace(folder / f"{part}.json")
    return dict(json.loads(text))


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the figures of all parts that have been measured."""
    return {
        part: json.loads((folder / f"{part}.json").read_text())
        for part in PARTS
        if (folder / f"{part}.json").exists()
    }


def write(measured: Mapping[str, dict[str, Any]], page: Path, pictures: Path) -> None:
    """Write the page and its plots."""
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    for part, entry in measured.items():
        for stem, figure in PARTS[part].figures(entry["results"]).items():
            save(figure, pictures / f"{stem}.svg")
    page.write_text(text(measured))


def text(measured: Mapping[str, dict[str, Any]]) -> str:
    """The page: a section for each part that was measured."""
    results = {part: entry["results"] for part, entry in measured.items()}
    parts = [HEAD, "## Goals", goals.section(results)]
    for part, entry in measured.items():
        parts += [f"## {PARTS[part].TITLE}", setting(entry["environment"])]
        parts.append(PARTS[part].section(entry["results"]))
    return "\n\n".join(parts) + "\n"


def setting(environment: Mapping[str, Any]) -> str:
    """One line: the machine and the versions that a part was measured on."""
    machine = f"{environment['processor']}, {environment['cores']} cores"
    if environment["accelerator"]:
        machine = f"{environment['accelerator']} with {machine}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    threads = f"{environment['threads']} thread" + ("s" if environment["threads"] > 1 else "")
    line = f"Measured on {environment['date']}: {machine}, {threads}; {versions}."
    if environment["quick"]:
        line += " A quick run, which only shows that everything runs."
    if environment["load"] > 0.5 * environment["cores"]:
        line += f" The machine was busy (load {environment['load']:g}), so the figures are rough."
    return f"*{line}*"
