"""The experiments of each setting, and what runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from platform import python_version
from typing import Any

import torch

import moo_balance
from benchmarks.lic.ablations import Ablations
from benchmarks.lic.engine import Engine, Experiment
from benchmarks.lic.jobs import SUM
from benchmarks.lic.refinement import LatentRefinement
from benchmarks.lic.scores import crop_center
from benchmarks.lic.solutions import OWN, STATIC, Comparison
from benchmarks.lic.tuning import StepCosts, Tuned, Tuning
from benchmarks.lic.variable_rate import VariableRate
from benchmarks.settings import processor
from examples.lic.images import Photographs
from examples.lic.runs import Run
from examples.lic.training import Recipe

Results = dict[str, Any]
Regime = Callable[..., Comparison]
"""A comparison that only lacks what tuning finds."""

BOTH = ("Solution 1", "Solution 2")
FINE_TUNED = {"Solution 1": (0.0009, 0.005, 0.06, 0.7), "Solution 2": (0.0009, 0.0035, 0.025, 0.2)}
# The plain sums of both solutions have λ in common; such runs are made once.
SUMS = {"Solution 1": (6e-5, 2e-4, 6e-4, 2e-3), "Solution 2": (2e-4, 6e-4, 2e-3, 6e-3)}
# From scratch, λ hardly changes where Solution 1 ends, at the lowest rates of all.
SCRATCH = {"Solution 1": (0.0018, 0.5), "Solution 2": (0.0018, 0.02, 0.2)}
SCRATCH_SUMS = {"Solution 1": (2e-5, 5e-5, 2e-4, 6e-4), "Solution 2": (5e-5, 2e-4, 6e-4, 2e-3)}

CONTINUED = (
    "All runs of a seed continue one standard checkpoint, so that no curve gains from the longer "
    "training of another."
)
FAR = (
    "As fine-tuned, but the checkpoint was trained with a λ far above those that the balanced runs "
    "then move to."
)
RANDOM = "All runs of a seed begin with the same random weights."
LONGER = "As from scratch, with more steps, and the learning rate that was tuned for fewer."


@dataclass(frozen=True)
class Setting:
    """All experiments of a study.

    Args:
        costs: How the cost of a step is measured.
        tuning: By the title of the regime that it is done for.
        regimes: For each entry of `tuning`, the comparisons that share what it finds, by title.
        others: Further experiments, by title.
        side: Of the middle of the held-out photographs that is scored; None for all of it.
    """

    costs: StepCosts
    tuning: Mapping[str, Tuning]
    regimes: Mapping[str, Mapping[str, Regime]]
    others: Mapping[str, Experiment]
    side: int | None = None

    @property
    def titles(self) -> list[str]:
        """Of all experiments, in order."""
        return [title for family in self.regimes.values() for title in family] + list(self.others)

    def crop(self, photographs: Photographs) -> Photographs:
        """The photographs as this setting scores them."""
        if self.side is None:
            return photographs
        held_out = photographs.held_out.items()
        return replace(
            photographs, held_out={n: crop_center(image, self.side) for n, image in held_out}
        )

    def run(self, engine: Engine, chosen: Sequence[str]) -> Iterator[Results]:
        """Do the chosen experiments; yield the results so far after each."""
        run = next(iter(self.tuning.values())).template
        results: Results = {"about": about(engine, run), "experiments": {}}
        if any(title in family for family in self.regimes.values() for title in chosen):
            results |= {"seconds per step": engine.collect(self.costs), "tuning": {}}
        for name, family in self.regimes.items():
            if not set(family) & set(chosen):
                continue
            results["tuning"][name] = engine.collect(self.tuning[name])
            tuned = _read_tuning(results, name)
            for title in [title for title in family if title in chosen]:
                results["experiments"][title] = engine.collect(family[title](tuned=tuned))
                yield results
        for title in [title for title in self.others if title in chosen]:
            results["experiments"][title] = engine.collect(self.others[title])
            yield results


def _read_tuning(results: Results, name: str) -> Tuned:
    best, costs = results["tuning"][name]["cells"][0], results["seconds per step"]
    slower = max(costs[solution] for solution in BOTH)
    return Tuned(best["lr"], best["clip"], slower / costs["standard"])


def about(engine: Engine, run: Run) -> Results:
    """Machine, versions and images; no host names."""
    packages = ("torch", "numpy", "scipy", "bjontegaard")
    versions = {"Python": python_version(), **{name: version(name) for name in packages}}
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "processor": processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "workers": engine.workers,
        "versions": {**versions, "moo_balance": moo_balance.__version__},
        "trained on": list(engine.photographs.train),
        "held out": list(engine.photographs.held_out),
        "crop": run.crop,
        "widths": [int(width) for width in run.arch.split(",")],
        "batch": run.batch,
    }


def _run(
    lmbda: float, steps: int, arch: str = "24,32", crop: int = 128, batch: int = 2, **options: Any
) -> Run:
    """A run of the plain sum."""
    recipe = Recipe(steps, lr=1e-3, clip="unit")
    return Run(arch, (lmbda,), SUM, recipe, crop=crop, batch=batch, **options)


def full() -> Setting:
    """An hour and a half on two busy cores, or less."""
    start, far = _run(0.013, 1500), _run(0.1, 1500)
    fine_tuned, scratch = _run(0.0012, 400, start=start), _run(0.0006, 600)
    tuning_seed, clips = 100, ("unit", 1.0, 5.0)
    tuning_start = replace(start, seed=tuning_seed)
    few = (STATIC, OWN)
    longer = {name: lambdas[1:2] for name, lambdas in SCRATCH.items()}
    return Setting(
        costs=StepCosts(start, rounds=40),
        tuning={
            "Fine-tuned": Tuning(
                replace(fine_tuned, seed=tuning_seed, start=tuning_start),
                (2.5e-4, 5e-4, 1e-3, 2e-3), clips,
            ),
            "From scratch": Tuning(replace(scratch, seed=tuning_seed), (1e-3, 2e-3), clips),
        },
        regimes={
            "Fine-tuned": {
                "Fine-tuned": partial(
                    Comparison, CONTINUED, fine_tuned,
                    lambdas=FINE_TUNED, static_lambdas=SUMS, seeds=range(3),
                ),
                "Far from balance": partial(
                    Comparison, FAR, replace(fine_tuned, start=far),
                    lambdas=FINE_TUNED, static_lambdas=SUMS, seeds=range(3), baselines=few,
                ),
            },
            "From scratch": {
                "From scratch": partial(
                    Comparison, RANDOM, scratch,
                    lambdas=SCRATCH, static_lambdas=SCRATCH_SUMS, seeds=range(4),
                ),
                "From scratch, longer": partial(
                    Comparison, LONGER, _run(0.0006, 1800),
                    lambdas=longer, static_lambdas=SCRATCH_SUMS, seeds=range(3), baselines=few,
                ),
            },
        },
        others={
            "Ablations": Ablations(start, steps=200, steps_from_scratch=500, seeds=range(2)),
            "Variable rate": VariableRate(
                _run(0.05, 1500), (0.0035, 0.0085, 0.0205, 0.05), steps=300, seeds=range(2)
            ),
            "Latent refinement": LatentRefinement(_run(0.0025, 1000)),
        },
    )  # fmt: skip


def tiny() -> Setting:
    """Seconds: everything once, on a codec and photographs too small to find anything out."""
    start = _run(0.01, 2, arch="4,6", crop=64, batch=1)
    fine_tuned = replace(start, start=start)
    lambdas = dict.fromkeys(BOTH, (0.001, 0.01, 0.1))
    return Setting(
        costs=StepCosts(start, rounds=1),
        tuning={"Fine-tuned": Tuning(fine_tuned, (1e-3,), ("unit", 1.0))},
        regimes={
            "Fine-tuned": {
                "Fine-tuned": partial(
                    Comparison, CONTINUED, fine_tuned,
                    lambdas=lambdas, static_lambdas=lambdas, seeds=range(1),
                )
            }
        },
        others={
            "Ablations": Ablations(
                start, steps=1, steps_from_scratch=1, seeds=range(1), points=1
            ),
            "Variable rate": VariableRate(start, (0.001, 0.003, 0.01), steps=2, seeds=range(1)),
            "Latent refinement": LatentRefinement(
                start, (0.01, 0.02, 0.04), base=0.02, others=(), balanced=(0.02,), maxima=(0.2,),
                steps=2, side=64,
            ),
        },
        side=64,
    )  # fmt: skip
