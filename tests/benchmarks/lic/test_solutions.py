"""Solutions 1 and 2 against their baselines: which runs, and what follows from their points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.lic.findings import compare_all, compare_seeds
from benchmarks.lic.jobs import SUM
from benchmarks.lic.solutions import BALANCED, BASELINES, EQUAL_STEPS, EQUAL_TIME, OWN, STATIC
from benchmarks.lic.solutions_page import section
from benchmarks.lic.study import tiny
from benchmarks.lic.tuning import Tuned, Tuning
from tests.benchmarks.lic.made_up import LAMBDAS, SOLUTIONS, curves, experiment

TUNED = Tuned(2e-3, 5.0, 1.4)


def comparison():
    return tiny().regimes["Fine-tuned"]["Fine-tuned"](tuned=TUNED)


def test_runs_of_a_seed_are_paired_and_each_baseline_has_what_it_needs():
    made = comparison()
    jobs = made.curves("Solution 2", seed=3)
    assert list(jobs) == [BALANCED, *BASELINES]
    for run in (job.run for curve in jobs.values() for job in curve):
        assert (run.seed, run.start.seed, run.start.recipe.steps) == (3, 3, 2)
        assert run.recipe.lr == TUNED.lr
        assert run.stream == jobs[BALANCED][0].run.stream

    def settings(name):
        return {(job.run.recipe.clip, job.run.recipe.steps) for job in jobs[name]}

    assert settings(BALANCED) == settings(STATIC) == settings(OWN) == {("unit", 2)}
    assert settings(EQUAL_STEPS) == {(5.0, 2)}
    assert settings(EQUAL_TIME) == {(5.0, 3)}
    assert {repr(job.run.weighting) for job in jobs[STATIC]} == {repr(SUM)}
    assert [job.weights_of for job in jobs[OWN]] == jobs[BALANCED]
    assert [job.run.lambdas[0] for job in jobs[OWN]] == list(made.lambdas["Solution 2"])


def test_read_keeps_effective_lambda_and_the_courses_that_are_drawn():
    made = replace(comparison(), seeds=(5, 6))

    def result(job):
        coefficients = {"rate": 0.8, "distortion": 0.2}
        (lmbda,) = job.run.lambdas
        return {"lambda": lmbda, "steps": 2, "scores": {"a": [0.1, 30.0]}, "milliseconds": 9.0,
                "mean_coefficients": coefficients, "series": {"loss/rate": [1.0]}}  # fmt: skip

    data = made.read(result)
    kept = [
        (seed, name, run["lambda"])
        for seed, solutions in data["seeds"].items()
        for name, runs in solutions["Solution 1"].items()
        for run in runs
        if "series" in run
    ]
    assert kept == [("5", BALANCED, 0.01), ("5", OWN, 0.01)]
    point = data["seeds"]["6"]["Solution 2"][BALANCED][2]
    assert (point["lambda"], point["effective_lambda"]) == (0.1, pytest.approx(0.025))


def test_tuning_ranks_cells_by_the_loss_on_training_photographs():
    rates = {(1e-3, "unit"): 0.3, (1e-3, 1.0): 0.2, (2e-3, "unit"): 0.1, (2e-3, 1.0): 0.4}
    template = tiny().tuning["Fine-tuned"].template
    tuning = Tuning(template, (1e-3, 2e-3), ("unit", 1.0))

    def result(job):
        assert job.scored_on == "train"
        return {"scores": {"a": [rates[job.run.recipe.lr, job.run.recipe.clip], 30.0]}}

    cells = tuning.read(result)["cells"]
    assert [(cell["lr"], cell["clip"]) for cell in cells] == sorted(rates, key=rates.get)
    assert cells[0]["loss"] == pytest.approx(0.1 + template.lambdas[0] * 255**2 * 1e-3)


@pytest.mark.parametrize(("shift", "rate"), [(0.5, -10.91), (-0.5, 12.25)])
def test_findings_recover_a_known_shift(shift, rate):
    seeds = [curves(own=shift, rest=shift)] * 3
    for baseline in (STATIC, OWN):
        result = compare_seeds("x", "Solution 1", baseline, seeds)
        assert result.rate.by_seed == pytest.approx([rate] * 3, abs=0.01)
        assert result.gap.by_seed == pytest.approx([shift] * 3, abs=0.01)
        assert result.verdict == -math.copysign(1, shift)
        assert not result.refusal


def test_own_weights_at_another_rate_are_compared_along_the_static_curve():
    moved = curves(rest=0.5)
    along = 0.3 * math.log2(1.1)  # a tenth more bits on a line of 3 dB an octave
    for run in moved[OWN]:
        scores = run["scores"].items()
        run["scores"] = {name: (1.1 * bpp, psnr + 10 * along) for name, (bpp, psnr) in scores}
    inside = {name: runs[:-1] if name in (BALANCED, OWN) else runs for name, runs in moved.items()}
    result = compare_seeds("x", "Solution 1", OWN, [inside] * 3)
    assert result.gap.by_seed == pytest.approx([0.0] * 3, abs=1e-6)


def test_curves_apart_have_no_rate_and_it_is_said_why():
    result = compare_seeds("x", "Solution 1", STATIC, [curves(rest=99.0)] * 3)
    assert result.rate is None
    assert "should overlap in PSNR" in result.refusal


def test_short_curves_are_judged_by_psnr_and_two_seeds_not_at_all():
    short = {name: runs[1:3] if name in (BALANCED, OWN) else runs
             for name, runs in curves(rest=0.5).items()}  # fmt: skip
    result = compare_seeds("x", "Solution 1", STATIC, [short] * 3)
    assert (result.rate, result.verdict) == (None, -1)
    assert compare_seeds("x", "Solution 1", STATIC, [short] * 2).verdict is None


def test_a_seed_that_disagrees_takes_the_verdict_away():
    seeds = [curves(rest=shift) for shift in (2, 2, 2, -0.5)]
    assert compare_seeds("x", "Solution 1", STATIC, seeds[:3]).verdict == -1
    assert compare_seeds("x", "Solution 1", STATIC, seeds).verdict == 0


def test_the_section_has_every_comparison_and_operating_point():
    data = experiment(rest=0.5)
    assert len(list(compare_all({"Fine-tuned": data}))) == len(SOLUTIONS) * len(BASELINES)
    text = section("Fine-tuned", data)
    assert ("| Solution 2 | standard, equal time | +0.50 dB [+0.50, +0.50] | 0 | −10.9 % "
            "[−10.9, −10.9] | 89% | better |") in text  # fmt: skip
    assert f"| Solution 1 | {LAMBDAS[1]:g} | {LAMBDAS[1] / 10:.2g} | 1.000 | 11.10 |" in text
