"""Carries a study out: tuning first, then every seed of every experiment, then the other parts."""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from examples.lic.images import bundled
from examples.lic.store import cached
from examples.lic.study.experiments import SOLUTIONS, Experiment, Unit
from examples.lic.study.laboratory import SUM, Laboratory, Run
from examples.lic.study.scales import Family, Scale
from examples.lic.study.tuning import Tuned, step_costs, tune_standard

PARTS = {
    "Ablations": "examples.lic.ablations.study",
    "Variable rate": "examples.lic.variable_rate.study",
    "Latent refinement": "examples.lic.refinement.study",
}
"""The example's other parts with evidence to show. Each module has ``run``, ``section`` and
``figures``."""

T = TypeVar("T")
Results = dict[str, Any]


@dataclass(frozen=True)
class Conduct:
    """A study in a folder: what is finished there is not done again.

    Args:
        scale: What to run.
        folder: Where results are kept.
        workers: Processes, each with one thread.
        on_progress: Hears the results so far whenever something has ended.
    """

    scale: Scale
    folder: Path
    workers: int = 1
    on_progress: Callable[[Results], object] = lambda results: None

    def __call__(self) -> Results:
        """All results."""
        torch.set_num_threads(1)
        laboratory = Laboratory(bundled(), self.folder / "runs")
        results: Results = {"about": about(self.scale, laboratory, self.workers)}
        results["seconds per step"] = cached(
            self.folder, {"what": "step costs", "rounds": self.scale.cost_rounds},
            partial(self._costs, laboratory),
        )  # fmt: skip
        results["tuning"] = dict(self._each(self._tuning_jobs(laboratory)))
        results["experiments"] = {e.name: plan(e) for f in self._families() for e in f.experiments}
        results["parts"] = {}
        units = self._unit_jobs(laboratory, results)
        for (experiment, seed), curves in self._each(units):
            results["experiments"][experiment]["seeds"][str(seed)] = curves
            self.on_progress(results)
        for title, module in PARTS.items() if self.scale.parts else ():
            folder = self.folder / module.split(".")[-2]
            results["parts"][title] = import_module(module).run(self.scale.parts, folder)
            self.on_progress(results)
        return results

    def _families(self) -> list[Family]:
        return list(self.scale.families.values())

    def _costs(self, laboratory: Laboratory) -> dict[str, float]:
        weightings = {"standard": SUM, **SOLUTIONS}
        options = {"rounds": self.scale.cost_rounds, "shape": self.scale.shape}
        return step_costs(laboratory.photographs, weightings, **options)

    def _tuning_jobs(self, laboratory: Laboratory) -> dict[str, Callable[[], Any]]:
        return {
            name: partial(tune, laboratory, family) for name, family in self.scale.families.items()
        }

    def _unit_jobs(
        self, laboratory: Laboratory, results: Results
    ) -> dict[tuple[str, int], Callable[[], Any]]:
        costs = results["seconds per step"]
        slower = max(costs[name] for name in SOLUTIONS) / costs["standard"]
        units = {}
        for name, family in self.scale.families.items():
            best = results["tuning"][name][0]
            tuned = Tuned(best["lr"], best["clip"], slower)
            for e in family.experiments:
                units |= {(e.name, s): Unit(laboratory, e, tuned, s) for s in e.seeds}
        # What matters most first: a study that is stopped early has it.
        first = [family.experiments[0].name for family in self._families()]
        return {key: unit for key, unit in units.items() if key[0] in first} | units

    def _each(self, jobs: Mapping[Any, Callable[[], T]]) -> Iterator[tuple[Any, T]]:
        if self.workers == 1:
            yield from ((key, job()) for key, job in jobs.items())
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,))
        try:
            futures = {pool.submit(job): key for key, job in jobs.items()}
            yield from ((futures[done], done.result()) for done in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def tune(laboratory: Laboratory, family: Family) -> list[dict[str, Any]]:
    """The cells that were tried, the best first."""
    experiment, grid = family.experiments[0], family.grid
    unit = Unit(laboratory, experiment, Tuned(grid.lrs[0], None, 1.0), grid.seed)
    return tune_standard(laboratory, unit.run(SUM, grid.price, scored_on="train"), grid)


def plan(experiment: Experiment) -> Results:
    return {**asdict(experiment), "seeds": {}, "planned seeds": list(experiment.seeds)}


def about(scale: Scale, laboratory: Laboratory, workers: int) -> Results:
    """Setup, machine and versions; no host names."""
    photographs = laboratory.photographs
    packages = ("torch", "numpy", "scipy", "bjontegaard", "moo-balance")
    run = Run(SUM, 1.0, 1, 1.0, **scale.shape)
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "workers": workers,
        "versions": {
            "Python": platform.python_version(), **{name: version(name) for name in packages},
        },
        "trained on": list(photographs.train),
        "held out": list(photographs.held_out),
        "crop": run.crop,
        "widths": run.widths,
        "batch": run.batch,
    }  # fmt: skip


def processor() -> str:
    """The model's name as Linux tells it; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
