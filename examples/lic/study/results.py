"""The results of a study in one small file, which the page is written from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.lic.store import StoreError, atomically
from examples.lic.study.analysis import OWN

DIGITS = 5
"""Significant digits that are kept."""


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results atomically, rounded, and with few of the runs' courses."""
    text = json.dumps(rounded(without_most_series(results)), separators=(",", ":"))
    # A line for each run, so that two versions of the file can be compared.
    text = text.replace('{"lambda"', '\n{"lambda"') + "\n"
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def load(path: Path) -> dict[str, Any]:
    """Read them back.

    Raises:
        StoreError: When there is no such file, or it holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"about", "tuning", "experiments", "parts"} - set(results):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} holds no results of a study ({error}). Run it first.") from error
    return results


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def without_most_series(results: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the courses that figures show: one balanced run a solution, and its own mean weights."""
    experiments = {}
    for name, experiment in results["experiments"].items():
        seeds = {
            seed: {
                solution: {
                    rival: [
                        run if _shown(experiment, seed, rival, index) else _bare(run)
                        for index, run in enumerate(curve)
                    ]
                    for rival, curve in curves.items()
                }
                for solution, curves in unit.items()
            }
            for seed, unit in experiment["seeds"].items()
        }
        experiments[name] = {**experiment, "seeds": seeds}
    return {**results, "experiments": experiments}


def _shown(experiment: Mapping[str, Any], seed: str, rival: str, index: int) -> bool:
    first = seed == str(experiment["planned seeds"][0])
    return first and index == 1 and rival in ("balanced", OWN) and len(experiment["rivals"]) > 2


def _bare(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "series"}
