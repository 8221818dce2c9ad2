"""Results of a comparison that was never run: points on straight lines."""

from __future__ import annotations

import math
from itertools import product

from benchmarks.lic.solutions import BALANCED, BASELINES, OWN

LAMBDAS = (0.0005, 0.001, 0.002, 0.004)
SOLUTIONS = ("Solution 1", "Solution 2")


def line(shift=0.0):
    """Runs on a line of 3 dB an octave, `shift` dB above it."""
    return [
        {
            "lambda": lmbda,
            "steps": 4,
            "effective_lambda": lmbda / 10,
            "milliseconds": 20.0,
            "scores": {
                image: (1000 * lmbda, 40 + 3 * math.log2(lmbda) + shift + better)
                for image, better in (("a", 0.0), ("b", 1.0))
            },
        }
        for lmbda in LAMBDAS
    ]


def curves(own=0.0, rest=0.0):
    """One solution for one seed: so many dB above its own mean weights, and above the rest."""
    return {BALANCED: line(rest), **{name: line() for name in BASELINES}, OWN: line(rest - own)}


def experiment(seeds=3, **shifts):
    """The data of an experiment; the first seed has courses."""
    data = {str(seed): {name: curves(**shifts) for name in SOLUTIONS} for seed in range(seeds)}
    keys = product(("loss", "weight", "coefficient"), ("rate", "distortion"))
    series = {f"{kind}/{name}": [1.0, 0.5, 0.25, 0.125] for kind, name in keys}
    for solution in data["0"].values():
        for name in (BALANCED, OWN):
            solution[name][1]["series"] = series
    return {
        "kind": "solutions",
        "about": "All runs of a seed continue one checkpoint.",
        "steps": 4,
        "lambdas": dict.fromkeys(SOLUTIONS, LAMBDAS),
        "static lambdas": dict.fromkeys(SOLUTIONS, LAMBDAS),
        "baselines": list(BASELINES),
        "start": [0.01, 2],
        "seeds": data,
    }
