"""The problems, one file each; `PROBLEMS` finds them by the names of their files."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.worth.problem import Problem

PROBLEMS: dict[str, Problem] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").PROBLEM
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
}
