"""What jobs measure, and the methods that only experiments use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.lic.cautious_adam import CautiousAdam
from benchmarks.lic.engine import Costs, Engine, make_pool
from benchmarks.lic.jobs import PARTS, Context, ScoreFormat, Train, score_crops
from benchmarks.lic.regime import Regime
from benchmarks.lic.store import Store
from benchmarks.lic.weightings import NotRenormalized, fixed_ratio, low_rate_first, replay
from moo_balance import AnalyticQP, BalancedTrajectory, FixedWeights, Sum
from moo_balance.weighting import Statistics
from tests.support.codecs import random_codec

REGIME = Regime({}, arch="mbt2018-mean:4,6", crop=64, batch=1, amp=False)


@pytest.fixture(scope="module")
def context():
    return Context(None, 64, 64)


def engine(folder, context, pool=None):
    said = []
    return Engine(Store(folder / "results"), context, folder, pool, said.append), said


class Runs:
    """An experiment of these stages."""

    def __init__(self, *stages):
        self.stages = stages

    def jobs(self, results):
        yield from self.stages

    def summarize(self, results):
        return {"results": [results[job] for stage in self.stages for job in stage]}


def test_there_are_eight_photographs_of_the_size_wanted(context):
    assert len(context.photographs) == 8
    assert {image.shape for image in context.photographs.values()} == {(3, 64, 64)}


def test_a_run_is_scored_with_its_mean_weights_and_leaves_no_checkpoint(tmp_path, context):
    job = Train(REGIME.run(0.01, AnalyticQP(), 4, 1e-3), on_crops=True)
    made, _ = engine(tmp_path, context)
    made.run("one", Runs([job]))
    result = made[job]
    assert set(result["images"]) == set(context.photographs)
    assert sum(result["coefficients"]) == pytest.approx(1)
    assert sum(result["weights"]) == pytest.approx(1)
    assert all(value > 0 for value in (result["step"], result["seconds"], *result["crops"]))
    assert not list(tmp_path.glob("*.pt"))


def test_a_start_is_trained_once_kept_and_made_again_if_it_is_lost(tmp_path, context):
    start = Train(REGIME.run(0.01, BalancedTrajectory(), 2, 1e-3), scored=False, kept=True)
    jobs = [
        Train(REGIME.run(0.01, weighting, 1, 1e-3, start=start.run))
        for weighting in (Sum(), AnalyticQP())
    ]
    made, said = engine(tmp_path, context)
    made.run("one", Runs(jobs))
    assert len(said) == 3
    assert len(made[start]["course"]) == 2
    (kept,) = tmp_path.rglob("*.pt")
    before = made[jobs[0]]["images"]

    kept.unlink()
    (tmp_path / "results" / "one.json").unlink()
    made, said = engine(tmp_path, context)
    made.run("one", Runs(jobs))
    assert made[jobs[0]]["images"] == before

    made, said = engine(tmp_path, context)
    made.run("one", Runs(jobs))
    assert not said


def test_several_processes_find_the_same(tmp_path, context):
    jobs = [ScoreFormat("jpeg", quality) for quality in (20, 60)]
    one, _ = engine(tmp_path / "one", context)
    one.run("one", Runs(jobs))
    pool = make_pool(2, context)
    two, _ = engine(tmp_path / "two", context, pool)
    two.run("one", Runs(jobs))
    pool.shutdown()
    assert [one[job]["images"] for job in jobs] == [two[job]["images"] for job in jobs]


def test_a_run_that_breaks_off_is_a_result(tmp_path, context):
    job = Train(REGIME.run(0.01, Sum(), 3, 1e30))
    made, _ = engine(tmp_path, context)
    made.run("one", Runs([job]))
    assert "should be finite" in made[job]["error"]


def test_costs_are_those_of_what_is_missing_each_once(tmp_path, context, monkeypatch):
    monkeypatch.setattr(Costs, "_time", lambda self, job: 3.0)  # a second a step
    jobs = [Train(REGIME.run(0.01, Sum(), steps, 1e-3), scored=False) for steps in (3, 4)]
    made, _ = engine(tmp_path, context)
    costs = Costs(made)
    assert [costs.estimate(Runs(jobs[:1])), costs.estimate(Runs(jobs))] == [3, 4]
    made.run("one", Runs(jobs[:1]))
    assert Costs(made).estimate(Runs(jobs)) == 4


def test_crops_lie_evenly_from_one_edge_to_the_other():
    image = torch.zeros(3, 64, 192, dtype=torch.uint8)
    image[:, :, 128:] = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    model = random_codec().eval()
    blank, noisy = (score_crops(model, [image[:, :, k : k + 64]], 64) for k in (0, 128))
    assert blank.bpp < score_crops(model, [image], 64).bpp < noisy.bpp


def test_jpeg_costs_more_bits_at_a_higher_quality(context):
    low, high = (ScoreFormat("jpeg", quality)(context, None)["images"] for quality in (10, 80))
    assert all(low[name].bpp < high[name].bpp for name in low)
    assert all(low[name].psnr < high[name].psnr for name in low)


def test_cautious_adam_masks_and_enlarges_the_step_of_adam():
    torch.manual_seed(0)
    plain, cautious = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    adams = [torch.optim.Adam([p], lr=0.1) for p in (plain, cautious)]
    CautiousAdam().begin(SimpleNamespace(optimizer=SimpleNamespace(optimizer=adams[1])))
    for _ in range(5):
        gradient, before = torch.randn(50), [p.detach().clone() for p in (plain, cautious)]
        for parameter, adam in zip((plain, cautious), adams, strict=True):
            parameter.grad = gradient.clone()
            adam.step()
        update = plain.detach() - before[0]
        kept = update * gradient < 0
        expected = before[1] + update * kept * (50 / kept.sum())
        torch.testing.assert_close(cautious.detach(), expected)
    assert not kept.all()


def test_an_observer_makes_the_adam_of_a_run_cautious(tmp_path, context):
    run = REGIME.run(0.01, AnalyticQP(), 3, 1e-2, ema=None)
    jobs = [Train(run), Train(run, (CautiousAdam(),)), Train(run, (CautiousAdam(largest=1.0),))]
    made, _ = engine(tmp_path, context)
    made.run("one", Runs(jobs))
    rates = {tuple(image[0] for image in made[job]["images"].values()) for job in jobs}
    assert len(rates) == 3


def test_a_replay_has_the_coefficients_of_each_part_in_its_steps():
    course = [[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]]
    weighting = replay(course, 6)
    for step in range(6):
        statistics = Statistics(("rate", "distortion"), torch.ones(2), step=step)
        output = weighting.weights(statistics, {})
        assert output.coefficients.tolist() == pytest.approx(course[step // 2])


def test_the_schedule_begins_with_a_quarter_of_lambda():
    statistics = Statistics(("rate", "distortion"), torch.ones(2))
    schedule = low_rate_first(10)
    early, late = (schedule.weights(statistics._replace(step=k), {}).coefficients for k in (4, 5))
    assert (early.tolist(), late.tolist()) == ([1.0, 0.25], [1.0, 1.0])


def test_fixed_weights_have_the_ratio_wanted_and_sum_to_one():
    values = fixed_ratio(0.25).values
    assert values == pytest.approx({"rate": 0.8, "distortion": 0.2})


def test_without_c_the_coefficients_of_solution_1_are_not_scaled():
    statistics = Statistics(("rate", "distortion"), torch.tensor([1.0, 3.0]))
    weighting = NotRenormalized()
    state = weighting.init(statistics.names, torch.device("cpu"))
    output = weighting.weights(statistics, state)
    torch.testing.assert_close(output.coefficients, output.weights / torch.tensor([2.0, 4.0]))


def test_a_course_is_averaged_over_equal_parts(tmp_path, context):
    weights = FixedWeights({"rate": 0.9, "distortion": 0.1})
    job = Train(REGIME.run(0.01, weights, 3, 1e-3), scored=False, kept=True)
    made, _ = engine(tmp_path, context)
    made.run("one", Runs([job]))
    assert made[job]["course"] == [pytest.approx([0.9, 0.1])] * min(3, PARTS)
