"""The experiments, one in each module: dataclasses of sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.lic.engine import Experiment
from benchmarks.lic.experiments.ablations import Ablations
from benchmarks.lic.experiments.cautious import Cautious
from benchmarks.lic.experiments.fine_tuning import FineTuning
from benchmarks.lic.experiments.from_scratch import FIRST, FromScratch
from benchmarks.lic.experiments.ladder import Ladder
from benchmarks.lic.experiments.refinement import LatentRefinement
from benchmarks.lic.experiments.targets import Targets
from benchmarks.lic.experiments.variable_rate import VariableRate
from benchmarks.lic.regime import Regime
from examples.lic import architectures
from examples.lic.checkpoint import save_codec

TITLES = ("ladder", "fine_tuning", "targets", "cautious", "refinement", "from_scratch",
          "ablations", "variable_rate")  # fmt: skip
"""The experiments by name, in the order in which they run and stand on the page."""


def full(regime: Regime) -> dict[str, Experiment]:
    """As long as the questions ask for: hours."""
    few, early = {"seeds": 6}, replace(regime, crop=128, batch=4)
    experiments = (
        Ladder(regime),
        FineTuning(regime),
        Targets(regime),
        Cautious(FineTuning(regime, lambdas=(0.0067,), solutions=(FIRST,), **few)),
        LatentRefinement(regime),
        FromScratch(early, **few),
        Ablations(regime),
        VariableRate(regime),
    )
    return dict(zip(TITLES, experiments, strict=True))


def short(regime: Regime) -> dict[str, Experiment]:
    """The same questions with half of the batch, fewer steps, and six seeds."""
    regime = replace(regime, batch=1)
    tuning = {"seeds": 6, "pilot_steps": 300, "start_steps": 500, "steps": 300}
    early = replace(regime, arch="mbt2018-mean:16,24", crop=128, batch=4)
    scratch = {"seeds": 6, "steps": 1000, "cooling": 300}
    experiments = (
        Ladder(regime),
        FineTuning(regime, **tuning),
        Targets(regime),
        Cautious(FineTuning(regime, lambdas=(0.0067,), solutions=(FIRST,), **tuning)),
        LatentRefinement(regime),
        FromScratch(early, **scratch),
        Ablations(regime, steps=300),
        VariableRate(regime, steps=300),
    )
    return dict(zip(TITLES, experiments, strict=True))


def tiny(regime: Regime) -> dict[str, Experiment]:
    """Everything once, on codecs too small to find anything out."""
    tuning = {"seeds": 1, "pilot_steps": 1, "start_steps": 1, "steps": 1}
    scratch = {"seeds": 1, "steps": 2, "cooling": 1}
    experiments = (
        Ladder(regime, qualities=(5, 20, 60)),
        FineTuning(regime, lambdas=(0.01,), **tuning),
        Targets(regime, targets=1, seeds=1, steps=1),
        Cautious(FineTuning(regime, lambdas=(0.01,), solutions=(FIRST,), **tuning)),
        LatentRefinement(regime, steps=1, side=64),
        FromScratch(regime, lambdas=(0.01,), **scratch),
        Ablations(regime, seeds=1, steps=1),
        VariableRate(regime, seeds=1, steps=1),
    )
    return dict(zip(TITLES, experiments, strict=True))


def tiny_regime(folder: Path) -> Regime:
    """Untrained codecs of a few channels, written to a folder."""
    arch, ladder = "mbt2018-mean:4,6", {}
    for lmbda in (0.003, 0.01, 0.03):
        torch.manual_seed(int(1e4 * lmbda))
        ladder[lmbda] = folder / f"lambda-{lmbda}.safetensors"
        model = architectures.build(arch)
        save_codec(ladder[lmbda], model, {"arch": arch, "lambdas": [lmbda]})
    return Regime(ladder, arch=arch, crop=64, batch=1)
