"""Latent refinement as evidence: what it gains, and what matters for the gain.

``run`` computes, ``section`` and ``figures`` show; whatever they say comes from the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from examples.lic import images
from examples.lic.refinement import plots
from examples.lic.refinement.experiment import Experiment, Plan
from examples.lic.refinement.report import section
from examples.lic.training import Recipe

__all__ = ["figures", "run", "section"]

PLANS = {
    "short": Plan(
        lambdas=(0.0025, 0.0067, 0.018),
        balanced=(0.0067,),
        maxima=(0.2,),
        training=Recipe(12, lr=1e-3),
        steps=4,
        crop=64,
    ),
    "full": Plan(),
}

Results = dict[str, Any]


def run(
    scale: Literal["short", "full"],
    folder: Path,
    *,
    photographs: images.Photographs | None = None,
    seed: int = 0,
    say: Callable[[str], object] = lambda text: None,
) -> Results:
    """Refine everything that the plan of that scale asks for.

    Args:
        scale: ``"short"`` only shows that it works; ``"full"`` takes minutes.
        folder: What is done is kept here and not done again.
        photographs: Others than the bundled ones.
        seed: Of weights, crops and noise.
        say: Hears what begins.
    """
    plan = replace(PLANS[scale], seed=seed)
    records = Experiment(photographs or images.bundled(), plan, folder, say)()
    return {"plan": asdict(plan), "records": records}


def figures(results: Results) -> dict[str, Figure]:
    """The rate-distortion plane, and how the loss of the rounded code falls."""
    return {
        "refinement-rate-distortion": plots.rate_distortion_figure(results),
        "refinement-course": plots.course_figure(results),
    }
