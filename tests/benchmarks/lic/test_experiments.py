"""Every experiment finds the gains of a world where they are known."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks.lic.estimator import EstimateError, Point
from benchmarks.lic.experiments import TITLES, full, short, tiny
from benchmarks.lic.experiments.ablations import Ablations, explain
from benchmarks.lic.experiments.cautious import Cautious
from benchmarks.lic.experiments.fine_tuning import NULL, FineTuning
from benchmarks.lic.experiments.from_scratch import (
    CAUTIOUS_SUM,
    FIRST,
    LONGER,
    REPLAY,
    SUM,
    FromScratch,
    cost,
)
from benchmarks.lic.experiments.ladder import Ladder
from benchmarks.lic.experiments.refinement import SGA, LatentRefinement
from benchmarks.lic.experiments.targets import Targets, count_bisections, gap_above
from benchmarks.lic.experiments.variable_rate import SINGLE, VariableRate
from benchmarks.lic.jobs import Train
from benchmarks.lic.regime import Regime
from benchmarks.lic.roundings import TWO_CLASS
from examples.lic.runs import Run
from tests.benchmarks.lic.made_up import World


@pytest.fixture
def regime(tmp_path):
    return Regime({x: tmp_path / f"{x}" for x in (0.002, 0.005, 0.013, 0.035)})


def carry_out(experiment, world):
    """All jobs of an experiment, and its summary in that world."""
    jobs = [job for stage in experiment.jobs(world) for job in stage]
    return jobs, experiment.summarize(world)


def find(summary, name, setting=""):
    (row,) = [r for r in summary["comparisons"] if name == r["name"] and setting in r["setting"]]
    return row


def test_fine_tuning_finds_the_gain_of_each_solution_and_nothing_in_null_pairs(regime):
    world = World({"BalancedTrajectory": -3.0, "AnalyticQP": 2.0})
    _, summary = carry_out(FineTuning(regime, lambdas=(0.0035, 0.013), seeds=6), world)
    for solution, gain in (("Solution 1", -3.0), ("Solution 2", 2.0)):
        for setting in (f"λ 0.0035, {solution}", f"λ 0.013, {solution}"):
            for name in ("against its own mean weights, constant",
                         "against the curve of constant weights"):  # fmt: skip
                row = find(summary, name, setting)
                assert row["mean"] == pytest.approx(gain, abs=0.3)
                assert row["half"] < 0.5
                assert row["holm"] < 0.01
            null = find(summary, f"constant weights, λ′ × {NULL:g} against λ′", setting)
            assert abs(null["mean"]) < 0.3


def test_fine_tuned_runs_of_a_seed_share_all_but_their_weights(regime):
    experiment, world = FineTuning(regime, lambdas=(0.013,), seeds=3, starts=2), World()
    (cell, _) = experiment.cells
    arms = [experiment.balanced(cell, 2, world), experiment.static(cell, 2, 1.0, world)]
    balanced, static = ({**job.run.as_dict(), "weighting": ""} for job in arms)
    assert balanced == static
    start = arms[0].run.start
    assert isinstance(start, Run)
    assert (start.seed, arms[0].run.seed) == (0, 2)
    assert start.lambdas[0] == pytest.approx(0.2 * 0.013, rel=1e-2)
    assert start.start == regime.ladder[0.002]
    values = static_values = arms[1].run.weighting.values
    assert values["distortion"] / values["rate"] == pytest.approx(0.2)
    assert sum(static_values.values()) == pytest.approx(1)


def test_from_scratch_compares_costs_at_equal_lambda(regime):
    world = World({"BalancedTrajectory": -4.0, "Sequential": -2.0, "cautious": 3.0}, noise=0.0)
    experiment = FromScratch(regime, lambdas=(0.0035,))
    jobs, summary = carry_out(experiment, world)
    plain = world[experiment.ending(0, 0.0035, SUM, world)]
    share = fmean(bpp for bpp, _ in plain["images"].values()) / cost(plain, 0.0035)
    expected = {f"{FIRST} against {SUM}": -4.0, f"{FIRST} against {REPLAY}": -2.0,
                f"Solution 2 against {LONGER}": 0.0, f"two phases against {SUM}": -2.0,
                f"{CAUTIOUS_SUM} against {SUM}": 3.0}  # fmt: skip
    for name, gain in expected.items():  # a gain in the rate changes J by the share of the rate
        assert find(summary, name)["mean"] == pytest.approx(share * gain, rel=0.2, abs=1e-6)
    endings = [job for job in jobs if not job.kept]
    assert {job.run.stream for job in endings} == {1000 * seed + 1 for seed in range(6)}
    assert {type(job.run.weighting).__name__ for job in endings} == {"Sum"}
    assert all(job.start.observers == job.start_observers for job in endings)


def test_the_cost_is_the_mean_of_rate_and_scaled_error():
    images = {"a": [0.5, 30.0], "b": [0.25, 20.0]}
    expected = 0.375 + 0.01 * 255**2 * (1e-3 + 1e-2) / 2
    assert cost({"images": images}, 0.01) == pytest.approx(expected)
    with pytest.raises(EstimateError, match="broke off: NaN"):
        cost({"error": "NaN"}, 0.01)


def test_the_plain_sum_gets_the_time_of_the_cheaper_solution(regime):
    class Timed(World):
        def __getitem__(self, job):
            cost = {"Sum": 1.0, "BalancedTrajectory": 1.2, "AnalyticQP": 1.5}
            name = type(job.run.weighting).__name__
            return {**super().__getitem__(job), "step": cost.get(name, 1.0)}

    experiment = FromScratch(regime, steps=1000)
    assert experiment.longer(0.0035, Timed()) == 1200


def test_cautious_adam_is_told_from_the_solution(regime):
    world = World({"cautious": -5.0, "BalancedTrajectory": 1.0})
    tuning = FineTuning(regime, lambdas=(0.0067,), solutions=(FIRST,), seeds=6)
    jobs, summary = carry_out(Cautious(tuning), world)
    expected = {
        "Solution 1 against constant weights, both with Adam": 1.0,
        "Solution 1 against constant weights, both with cautious Adam": 1.0,
        "constant weights, cautious Adam against Adam": -5.0,
        "Solution 1 with cautious Adam against constant weights with Adam": -4.0,
        "Solution 1, how much cautious Adam changes its difference": 0.0,
    }
    for name, gain in expected.items():
        assert find(summary, name)["mean"] == pytest.approx(gain, abs=0.4)
    shared = [job for stage in tuning.jobs(world) for job in stage]
    assert set(map(repr, shared)) <= set(map(repr, jobs))


def test_a_target_that_is_missed_by_one_per_cent_is_reported_so(regime):
    jobs, summary = carry_out(Targets(regime), World(noise=0.0))
    bounded = [job.run.weighting for job in jobs if hasattr(job.run.weighting, "targets")]
    assert len(bounded) == 9
    for row in summary["tables"][0]["rows"]:
        assert row[1] == "+1.00 ± 0.00 %"
        assert row[2] == "1.0 %"


def test_a_run_beyond_the_ladder_has_no_gap_above_it(regime):
    _, summary = carry_out(Targets(regime), World({"Lagrangian": 500.0}))
    assert all("end" in row[3] for row in summary["tables"][0]["rows"])


def test_bisections_are_counted_until_they_come_as_near():
    lambdas, rates = [0.001, 0.01, 0.1], [0.1, 0.3, 0.9]
    assert count_bisections(lambdas, rates, 0.3, 0.01) == 1
    assert count_bisections(lambdas, rates, 0.3 * 3**0.5, 0.01) == 2
    assert count_bisections(lambdas, rates, 0.4, 0.2) < count_bisections(lambdas, rates, 0.4, 0.01)


def test_the_gap_above_a_ladder_is_read_at_the_same_rate():
    ladder = [Point(x, 30 + 2 * x) for x in (-2.0, -1.0, 0.0)]
    assert gap_above(Point(-0.5, 29.4), ladder) == pytest.approx(0.4)
    assert gap_above(Point(0.5, 31.0), ladder) != gap_above(Point(0.5, 31.0), ladder)  # NaN


def test_refinement_and_ladder_report_bd_rates_over_photographs(regime):
    ssl = LatentRefinement(regime).methods()["SGA+: SSL"].relaxation
    _, summary = carry_out(LatentRefinement(regime), World({repr(ssl): -10.0}))
    assert find(summary, "SGA+: SSL against none")["mean"] == pytest.approx(-9.5, abs=0.1)
    assert find(summary, f"SGA+: SSL against {SGA}")["count"] == 2
    assert find(summary, "SGA+: linear against none")["mean"] == pytest.approx(0, abs=0.01)
    assert len(TWO_CLASS) == 4
    _, summary = carry_out(Ladder(regime), World())
    assert find(summary, "the codecs against JPEG")["mean"] == pytest.approx(-18.1, abs=0.3)


def test_variable_rate_finds_the_gain_of_an_increment(regime):
    world = World({"gains+offsets": -2.0, "variable-rate": -3.0, "MGDA": 4.0}, noise=0.0)
    jobs, summary = carry_out(VariableRate(regime), world)
    expected = {
        f"gains against {SINGLE}": 0.0,
        "+ offsets against gains": -2.0,
        "+ step of z against + offsets": -1.0,
        "+ MGDA against + step of z": 4.0,
    }
    for name, gain in expected.items():
        assert find(summary, name)["mean"] == pytest.approx(gain, abs=0.2)
    assert {job.run.recipe.steps for job in jobs} == {400}
    assert {job.run.start for job in jobs} == {regime.ladder[0.035]}


def test_ablations_have_a_row_each_and_say_what_collapses(regime):
    class Broken(World):
        def __getitem__(self, job):
            if isinstance(job, Train) and getattr(job.run.weighting, "shift", 1.0) == 0.0:
                return {"error": "NaN"}
            return super().__getitem__(job)

    _, summary = carry_out(Ablations(regime), Broken())
    rows = {row[0]: row for row in summary["tables"][0]["rows"]}
    assert rows["Solution 2, shift 0"][-1] == "NaN"
    assert rows["Solution 1"][-1] == ""
    assert "no lower bound" in explain("Solution 1, shift 0", 0.7, 12.0, 3.0)
    assert "nothing holds the distortion" in explain("Solution 2, exact", 0.99, 12.0, 3.0)


@pytest.mark.parametrize("make", [full, short, tiny])
def test_all_experiments_are_in_the_order_of_the_page(make, regime):
    assert tuple(make(regime)) == TITLES
