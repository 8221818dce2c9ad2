"""The variable-rate experiment: equal passes, golden comparisons, a report of any results."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from examples.lic.images import Photographs
from examples.lic.training import Recipe, Trace
from examples.lic.variable_rate import __main__ as cli, experiment, study
from examples.lic.variable_rate.comparing import gap, loss_ratio
from examples.lic.variable_rate.design import BEFORE, LONG, PLAIN, SINGLE, STATIC, Plan
from examples.lic.variable_rate.experiment import fingerprint
from moo_balance import StepMetrics
from moo_balance.weighting import Statistics

PLAN = Plan((0.005, 0.016, 0.05), Recipe(2, 1e-3), Recipe(2, 1e-3), 64, 1, 8, 8)
RATES, PSNRS = (0.1, 0.2, 0.4, 0.8), (24.0, 26.0, 27.5, 28.5)


@pytest.fixture
def photographs():
    picture = torch.linspace(0, 255, 96 * 70).reshape(1, 96, 70).expand(3, -1, -1).to(torch.uint8)
    return Photographs({"train": picture}, {"held out": picture.flip(-1)[:, :64, :64]})


def made_up(**more_bits):
    """Results in which each codec takes `more_bits` per cent more than the single-rate models."""
    lambdas = (0.0035, 0.0085, 0.0205, 0.05)

    def made_up_run(per_cent):
        points = [
            {"lambda": lmbda, "trained": True, "images": {"a": [rate * (1 + per_cent / 100), psnr]}}
            for lmbda, rate, psnr in zip(lambdas, RATES, PSNRS, strict=True)
        ]
        between = {"lambda": 0.03, "trained": False, "images": {"a": [0.5, 28.3]}}
        learned = {"weights": [[0.5, 0.3], [0, 0.1], [0.5, 0.5], [0, 0.1]], "hyper_steps": RATES}
        return {"points": [*points, between], "ms_per_step": 5.0, "seconds": 6.0, **learned}

    names = (BEFORE, SINGLE, LONG, *study.STEPS)
    runs = {name: made_up_run(more_bits.get(name, 0.0)) for name in names}
    plan = {"lambdas": lambdas, "start": {"steps": 7}, "post": {"steps": 3}}
    return {"plan": plan, "held_out": ["a"], "runs": {"0": runs, "1": runs}}


# ------------------------------------------------------------------ the experiment


def test_runs_have_equal_passes_and_one_start_and_are_not_done_again(
    photographs, tmp_path, monkeypatch
):
    balances = []
    results = study.run_plan(
        PLAN, [0], photographs, tmp_path, lambda balance: balances.append(balance.as_floats())
    )
    assert len(balances) == PLAN.steps == 2 + 3 * 2 + 9 * 2 + 5 * 2 + 3 * 2 + 2 * 2
    runs = results["runs"]["0"]
    assert list(runs) == [BEFORE, SINGLE, LONG, *study.STEPS]
    for name in (SINGLE, LONG):
        assert [p["lambda"] for p in runs[name]["points"]] == list(PLAN.lambdas)
    for name in (BEFORE, *study.STEPS):
        levels = {p["lambda"]: p["trained"] for p in runs[name]["points"]}
        assert levels == dict.fromkeys(PLAN.lambdas, True) | dict.fromkeys(PLAN.between, False)
    # First steps from one checkpoint on equal crops and noise: of both single-rate models of the
    # lowest level, and of all that begin each step with it.
    assert len({balances[step]["loss/λ=0.005"] for step in (2, 8, *range(26, 36, 2))}) == 1

    # Fixed weights are the mean of the balanced run's.
    for static, balanced in STATIC.items():
        means = [[sum(parts) / len(parts)] * 2 for parts in runs[balanced]["weights"]]
        torch.testing.assert_close(torch.tensor(runs[static]["weights"]), torch.tensor(means))

    def fail(*args, **kwargs):
        raise AssertionError("was done before")

    monkeypatch.setattr(experiment, "train", fail)
    monkeypatch.setattr(experiment, "post_train", fail)
    again = study.run_plan(PLAN, [0], photographs, tmp_path)
    assert again == results
    with pytest.raises(AssertionError, match="was done before"):
        study.run_plan(replace(PLAN, batch=2), [0], photographs, tmp_path)


def test_levels_in_between_are_geometric_means():
    assert Plan((0.04, 0.01, 0.16)).between == pytest.approx([0.02, 0.08])


def test_weights_are_means_over_tenths_of_a_run():
    trace, balance = Trace(), StepMetrics()
    for step in range(20):
        ones = torch.ones(2)
        coefficients = torch.tensor([step / 19, 1 - step / 19])
        balance.record(Statistics(("λ=0.1", "λ=0.2"), ones, None), ones, coefficients)
        trace.history.append(balance)
    found = experiment.weights_in_parts(trace, [0.1, 0.2])
    assert found[0] == pytest.approx([(4 * part + 1) / 38 for part in range(10)])
    assert found[1] == pytest.approx([1 - weight for weight in found[0]])


def test_fingerprint_tells_names_and_pixels_apart():
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    found = [
        fingerprint(images)
        for images in ({"a": image}, {"a": image.clone()}, {"b": image}, {"a": image.flip(2)})
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


# ------------------------------------------------------------------ what is said


def test_gap_is_the_bd_rate_paired_by_seed_and_photograph():
    results = made_up(**{PLAIN: 10.0})
    assert gap(results, PLAIN, SINGLE).mean == pytest.approx(10)
    assert gap(results, "+ MGDA", PLAIN).mean == pytest.approx(100 * (1 / 1.1 - 1))
    assert gap(results, "+ MGDA", SINGLE).mean == pytest.approx(0)
    assert gap(results, "+ MGDA", SINGLE, between=True).mean < -1  # a better point


def test_loss_ratio_golden_value():
    results = made_up(**{PLAIN: 50.0})
    distortion = 0.05 * 255**2 * 10**-2.85
    expected = 100 * ((1.2 + distortion) / (0.8 + distortion) - 1)
    assert loss_ratio(results, PLAIN, SINGLE, 0.05).mean == pytest.approx(expected)


def test_section_says_what_intervals_allow():
    said = study.section(made_up(**{PLAIN: 10.0, LONG: -20.0}))
    assert f"*a random level a step* against *{LONG}*: more bits, in every seed (+25.0" in said
    assert f"*{PLAIN}* against *+ offsets*: more bits, in every seed (+10.0 [+10.0, +10.0])" in said
    assert f"*+ MGDA* against *{PLAIN}*: fewer bits, in every seed (−9.1 [−9.1, −9.1])" in said
    assert "*+ offsets* against *gains alone*: no difference that can be told from noise" in said
    assert "3 steps on all 4 levels" in said
    assert "Training took 2.2 minutes." in said  # 2 seeds, 11 runs, 6 seconds
    weights = "mean weights: 0.40 at λ = 0.0035, 0.05 at λ = 0.0085, 0.50 at λ = 0.0205, 0.05 at"
    assert weights in said
    assert "learned steps: 0.10 at λ = 0.0035, 0.20 at λ = 0.0085" in said
    assert said.count("\n| ") == 2 + 2 + len(study.STEPS) + 2 + 1 + len(study.STEPS)


def test_curves_that_cannot_be_compared_are_said_and_do_no_harm():
    results = made_up()
    for runs in results["runs"].values():
        for point in runs[PLAIN]["points"]:
            point["images"] = {"a": [0.1, math.pi]}
    said = study.section(results)
    assert f"*{PLAIN}* against *+ offsets*: no BD-rate" in said
    assert f"| {PLAIN} | – | – | – | 5 |" in said


def test_figures_show_every_seed_and_both_kinds_of_mgda():
    curves, weights = study.figures(made_up()).values()
    assert [ax.get_title() for ax in curves.axes] == ["seed 0", "seed 1"]
    assert [ax.get_title() for ax in weights.axes] == ["+ MGDA", "MGDA, unit gradients"]


# ------------------------------------------------------------------ the command


def test_command_writes_report_figures_and_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "SHORT", PLAN)
    for index in range(2):
        Image.effect_noise((70, 66), 40 + index).save(tmp_path / f"{index}.png")
    options = ["--quick", "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main(options) == 0
    printed = capsys.readouterr().out
    assert "Converted to 8-bit RGB" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert study.section(results) in printed
    for stem in study.figures(results):
        with Image.open(tmp_path / "out" / f"{stem}.png") as figure:
            assert min(figure.size) > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "error: nowhere is not a folder."),
        (["--eval-images", "nowhere"], "--eval-images needs --images"),
        (["--lambdas", "0.1", "-1"], "should be positive, found -1"),
        (["--lambdas", "0.1", "0.2", "0.1"], "--lambdas should be three or more different ones"),
        (["--steps", "many"], "invalid int value: 'many'"),
    ],
)
def test_bad_options_end_with_a_sentence_and_code_2(options, message, capsys, tmp_path):
    try:
        code = cli.main([*options, "--quick", "--output", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_named(tmp_path, capsys, monkeypatch, photographs):
    monkeypatch.setattr(study, "SHORT", PLAN)
    monkeypatch.setattr(cli, "_photographs", lambda options, crop: photographs)
    (tmp_path / "file").touch()
    assert cli.main(["--quick", "--output", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
