"""The page of the manual: goals, tables and plots, all from the results on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import (
    goals,
    growth,
    import_time,
    memory,
    profiling,
    solvers,
    step_cost,
    two_ranks,
)
from benchmarks.tables import save

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
<!-- written by `make bench`; `python -m benchmarks page` writes it again from the same figures -->

# Benchmarks

What balancing costs, beside the plain loop and beside other libraries. `make bench` measures it
again, in twenty minutes or less on two quiet cores, and `python -m benchmarks --help` tells how to
run a part of it.

Contestants train copies of the same model on the same batch and take turns, in another order each
round, so that whatever slows the machine slows all of them alike. A ratio compares two steps of the
same round. Garbage is collected between rounds, not within."""


def write_results(folder: Path, part: str, surroundings: Any, results: Any) -> dict[str, Any]:
    """Keep a part's figures; returns them as they are read back."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"surroundings": surroundings, "results": results}, indent=1) + "\n"
    unfinished = folder / f".{part}.json"
    unfinished.write_text(text)
    unfinished.replace(folder / f"{part}.json")
    return dict(json.loads(text))


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """All parts that have been measured."""
    return {
        part: json.loads((folder / f"{part}.json").read_text())
        for part in PARTS
        if (folder / f"{part}.json").exists()
    }


def write(measured: Mapping[str, dict[str, Any]], page: Path, pictures: Path) -> None:
    """The page and its pictures."""
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    for part, entry in measured.items():
        for stem, figure in PARTS[part].figures(entry["results"]).items():
            save(figure, pictures / f"{stem}.svg")
    page.write_text(text(measured))


def text(measured: Mapping[str, dict[str, Any]]) -> str:
    """The page, a section for each part that was measured."""
    results = {part: entry["results"] for part, entry in measured.items()}
    parts = [HEAD, "## Goals", goals.section(results)]
    for part, entry in measured.items():
        parts += [f"## {PARTS[part].TITLE}", setting(entry["surroundings"])]
        parts.append(PARTS[part].section(entry["results"]))
    return "\n\n".join(parts) + "\n"


def setting(surroundings: Mapping[str, Any]) -> str:
    """What a part was measured on."""
    found = dict(surroundings)
    machine = f"{found['processor']}, {found['cores']} cores"
    if found["accelerator"]:
        machine = f"{found['accelerator']} beside {machine}"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"{found['threads']} thread" + ("s" if found["threads"] > 1 else "")
    line = f"Measured on {found['date']}: {machine}, {threads}; {versions}."
    if found["quick"]:
        line += " A quick run, which shows that everything runs and nothing else."
    if found["load"] > 0.5 * found["cores"]:
        line += f" The machine was busy (load {found['load']:g}), so the figures are rough."
    return f"*{line}*"
