"""Variable rate: equal passes, golden differences, a section for any results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.lic.study import full
from benchmarks.lic.variable_rate import BEFORE, COMPARED, LONG, PLAIN, SINGLE, STATIC
from benchmarks.lic.variable_rate_page import bd_rate, figures, loss_ratio, section

STUDY = full().others["Variable rate"]
LAMBDAS = tuple(STUDY.lambdas)
RATES, PSNRS = (0.1, 0.2, 0.4, 0.8), (24.0, 26.0, 27.5, 28.5)


def made_up(**more_bits):
    """Data in which codecs take `more_bits` per cent more than the single-rate models."""

    def run(per_cent):
        points = [
            {"lambda": lmbda, "trained": True, "images": {"a": [rate * (1 + per_cent / 100), psnr]}}
            for lmbda, rate, psnr in zip(LAMBDAS, RATES, PSNRS, strict=True)
        ]
        between = {"lambda": 0.03, "trained": False, "images": {"a": [0.5, 28.3]}}
        learned = {"weights": [[0.5, 0.3], [0, 0.1], [0.5, 0.5], [0, 0.1]], "hyper_steps": RATES}
        return {"points": [*points, between], "ms_per_step": 5.0, "seconds": 6.0, **learned}

    names = (BEFORE, SINGLE, LONG, *COMPARED)
    runs = {name: run(more_bits.get(name, 0.0)) for name in names}
    return {"lambdas": LAMBDAS, "start steps": 7, "steps": 3, "runs": {"0": runs, "1": runs}}


def test_runs_have_equal_passes_one_start_and_equal_crops():
    jobs = STUDY._jobs(seed=1)
    assert list(jobs) == [BEFORE, SINGLE, LONG, *COMPARED]
    start = replace(STUDY.start, seed=1)
    for name, (first, *_) in list(jobs.items())[1:]:
        assert first.run.start == start
        assert first.run.stream == 1001
        passes = sum(
            job.run.recipe.steps * (1 if job.run.one_level else len(job.run.lambdas))
            for job in jobs[name]
        )
        assert passes == STUDY.steps * len(LAMBDAS) * (len(LAMBDAS) if name == LONG else 1)
    for static, balanced in STATIC.items():
        assert jobs[static][0].weights_of == jobs[balanced][0]
        assert jobs[static][0].run == jobs[PLAIN][0].run


def test_levels_in_between_are_geometric_means():
    assert replace(STUDY, lambdas=(0.04, 0.01, 0.16)).between == pytest.approx([0.02, 0.08])


def test_differences_have_golden_values():
    data = made_up(**{PLAIN: 50.0})
    assert bd_rate(data, PLAIN, SINGLE).by_seed == pytest.approx([50.0, 50.0])
    assert bd_rate(data, "+ MGDA", PLAIN).by_seed == pytest.approx([100 * (1 / 1.5 - 1)] * 2)
    assert bd_rate(data, "+ MGDA", SINGLE).by_seed == pytest.approx([0, 0])
    assert max(bd_rate(data, "+ MGDA", SINGLE, between=True).by_seed) < -1  # a better point
    distortion = 0.05 * 255**2 * 10**-2.85
    expected = 100 * ((1.2 + distortion) / (0.8 + distortion) - 1)
    assert loss_ratio(data, PLAIN, SINGLE, 0.05).by_seed == pytest.approx([expected] * 2)


def test_section_has_rates_losses_and_what_was_learned():
    text = section("Variable rate", made_up(**{PLAIN: 10.0, LONG: -20.0}))
    assert "| + step of z | +10.0 [+10.0, +10.0] |" in text
    assert f"| one random level per step | {LONG} | +25.0 [+25.0, +25.0] |" in text
    assert "3 steps on all 4 levels" in text
    assert "Training took 2.2 minutes." in text  # 2 seeds, 11 runs, 6 seconds
    assert "| *+ MGDA*, mean weight | 0.40 | 0.05 | 0.50 | 0.05 |" in text
    assert "| *+ step of z*, step of z | 0.10 | 0.20 | 0.40 | 0.80 |" in text


def test_curves_that_cannot_be_compared_have_a_dash():
    data = made_up()
    for runs in data["runs"].values():
        for point in runs[PLAIN]["points"]:
            point["images"] = {"a": [0.1, math.pi]}
    assert f"| {PLAIN} | – | – | – | 5 |" in section("Variable rate", data)


def test_figures_show_every_seed_and_both_kinds_of_mgda():
    curves, weights = (drawing.draw() for drawing in figures("Variable rate", made_up()))
    assert [ax.get_title() for ax in curves.axes] == ["seed 0", "seed 1"]
    assert [ax.get_title() for ax in weights.axes] == ["+ MGDA", "MGDA, unit gradients"]
