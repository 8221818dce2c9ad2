"""Ablations: what is changed and nothing else, and the study as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
from torch import nn

from examples.lic import parts
from examples.lic.ablations import report, study
from examples.lic.ablations.variations import (
    GAMMAS,
    SOLUTION_1,
    SOLUTION_2,
    SUMS,
    VARIATIONS,
    NotRenormalized,
)
from examples.lic.images import Photographs
from moo_balance import BalancedOptimizer, BalancedTrajectory


def changed(title):
    """The fields in which a variation's method differs from its counterpart's."""
    mine, other = (VARIATIONS[t].weighting for t in (title, VARIATIONS[title].against))
    assert type(mine) is type(other)
    return {f.name for f in fields(mine) if getattr(mine, f.name) != getattr(other, f.name)}


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        *((f"γ = {gamma:g}", {"decay"}) for gamma in GAMMAS if gamma != 1e-3),
        ("Solution 1, shift 0", {"shift"}),
        ("Solution 1, clipped", set()),
        ("Solution 2, shift 0", {"shift"}),
        ("Solution 2, simplex", {"projection"}),
        ("Solution 2, exact", {"projection"}),
        ("Solution 2, clipped", set()),
        ("Solution 2, clipped, without c", {"renormalize"}),
    ],
)
def test_a_variation_changes_one_thing(title, expected):
    assert changed(title) == expected
    counterpart = VARIATIONS[VARIATIONS[title].against]
    assert VARIATIONS[title].lambdas == counterpart.lambdas
    if title.endswith(" c"):
        assert VARIATIONS[title].clip == counterpart.clip is not None


def steps_of(weighting, count=4):
    """Losses, weights, coefficients and parameters along a few steps on two quadratics."""
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), weighting)
    for _ in range(count):
        losses = optimizer.step(lambda: {"a": (w**2).sum(), "b": 3 * (w - 1).square().sum()})
        yield {k: v.item() for k, v in losses.items()}, optimizer.metrics, w.detach().clone()


def test_without_c_coefficients_are_weights_of_logarithms():
    for losses, balance, _ in steps_of(NotRenormalized()):
        for name, loss in losses.items():
            expected = float(balance.weights[name]) / (loss + 1)
            assert float(balance.coefficients[name]) == pytest.approx(expected, rel=1e-5)


def test_without_c_the_first_step_is_a_multiple_of_the_solutions():
    (_, with_c, _), (_, without_c, _) = (
        next(steps_of(weighting)) for weighting in (BalancedTrajectory(), NotRenormalized())
    )
    ratios = {n: float(without_c.coefficients[n] / with_c.coefficients[n]) for n in ("a", "b")}
    assert ratios["a"] == pytest.approx(ratios["b"])
    assert ratios["a"] < 1


def test_without_c_the_step_is_watched_all_the_same():
    weights = [float(balance.weights["a"]) for _, balance, _ in steps_of(NotRenormalized())]
    assert weights[0] == 0.5
    assert weights[1] != 0.5


@pytest.fixture(scope="module")
def photographs():
    rows = torch.linspace(0, 30, 64).sin()[:, None]
    picture = (127 + 100 * rows).expand(3, 64, 66).to(torch.uint8).contiguous()
    return Photographs({"train": picture}, {"held out": picture.flip(-2)})


@pytest.fixture(scope="module")
def results(tmp_path_factory, photographs):
    folder = tmp_path_factory.mktemp("ablations")
    found = study.run("short", folder, photographs=photographs)
    files = set(folder.rglob("*"))
    assert study.run("short", folder, photographs=photographs) == found
    assert set(folder.rglob("*")) == files
    return json.loads(json.dumps(found))


def test_every_variation_is_trained_for_each_of_its_lambdas(results):
    found = [(r["title"], r["lambda"]) for r in results["records"]]
    assert found == [(t, lmbda) for t, v in VARIATIONS.items() for lmbda in v.lambdas]


def test_section_and_figure_show_every_variation(results):
    text = study.section(results)
    assert all(f"| {title} |" in text for title in VARIATIONS)
    (figure,) = study.figures(results).values()
    shown = {t.get_text() for ax in figure.axes for t in ax.get_legend().get_texts()}
    assert set(VARIATIONS) == shown


def made_up(part, seeds=(0, 1)):
    """Records of all variations on one curve, each with its part of the rate."""
    curve = [(0.1, 25.0), (0.2, 28.0), (0.3, 30.0), (0.4, 31.0), (0.5, 31.5)]
    return [
        {
            "title": title,
            "seed": seed,
            "lambda": lmbda,
            "weight": 0.7,
            "scores": {"image": [part.get(title, 1.0) * bpp, psnr]},
        }
        for seed in seeds
        for title, variation in VARIATIONS.items()
        for lmbda, (bpp, psnr) in zip(variation.lambdas, curve, strict=False)
    ]


def test_bd_rate_is_against_the_counterpart():
    records = made_up({SOLUTION_1: 0.9, "γ = 0": 0.99})
    assert report.compare(records, "γ = 0", SOLUTION_1) == pytest.approx({0: 10.0, 1: 10.0})
    assert report.compare(records, SOLUTION_1, SOLUTION_2) == pytest.approx({0: -10.0, 1: -10.0})
    text = study.section({"plan": asdict(study.Plan()), "records": records})
    assert "| Solution 1 | +10.0 % (+10.0, +10.0) |" in text


def test_collapse_is_reported_as_such_and_not_as_a_curve():
    records = made_up({})
    for record in records:
        if record["title"] == "Solution 2, exact":
            record["scores"] = {"image": [0.006, 16.0] if record["seed"] else [0.4, 11.0]}
    text = study.section({"plan": asdict(study.Plan()), "records": records})
    (row,) = [line for line in text.splitlines() if line.startswith("| Solution 2, exact")]
    assert "| 8 of 8 |" in row
    assert "no curve to compare in 2 of 2 seeds" in row
    assert "Collapsed at some λ: Solution 2, exact." in text


def test_runs_go_on_from_one_checkpoint_but_those_from_scratch():
    plan = study.Plan()
    for title, variation in VARIATIONS.items():
        runs = list(study.runs(variation, plan, 1))
        assert [run.lmbda for run in runs] == list(variation.lambdas)
        assert all(run.start == runs[0].start for run in runs)
        assert (runs[0].start is None) == title.endswith("from scratch")
    (start, *_) = [run.start for run in study.runs(VARIATIONS[SOLUTION_1], plan, 1)]
    assert start.weighting == VARIATIONS[SUMS].weighting


def test_command_line(tmp_path, monkeypatch, capsys, results):
    monkeypatch.setattr(study, "run", lambda *arguments, **options: results)
    assert parts.main(study, "ablations", "About.", ["--quick", "--output", str(tmp_path)]) == 0
    assert str(tmp_path / "ablations.png") in capsys.readouterr().out
