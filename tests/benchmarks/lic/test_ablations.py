"""Ablations: what is changed and nothing else, and what follows from the records."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from benchmarks.lic.ablations import (
    GAMMAS,
    SOLUTION_1,
    SOLUTION_2,
    SUMS,
    VARIATIONS,
    NotRenormalized,
)
from benchmarks.lic.ablations_page import bd_rates, figures, section
from benchmarks.lic.study import full
from moo_balance import BalancedOptimizer, BalancedTrajectory

ABLATIONS = full().others["Ablations"]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        *((f"γ = {gamma:g}", {"decay"}) for gamma in GAMMAS),
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
    variation = VARIATIONS[title]
    counterpart = VARIATIONS[variation.against]
    mine, other = variation.weighting, counterpart.weighting
    assert type(mine) is type(other)
    assert {f.name for f in fields(mine) if getattr(mine, f.name) != getattr(other, f.name)} == (
        expected
    )
    assert variation.lambdas == counterpart.lambdas
    assert (variation.clip != counterpart.clip) == title.endswith("clipped")


def steps_of(weighting, count=4):
    """Losses and metrics along a few steps on two quadratics."""
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), weighting)
    for _ in range(count):
        losses = optimizer.step(lambda: {"a": (w**2).sum(), "b": 3 * (w - 1).square().sum()})
        yield {name: loss.item() for name, loss in losses.items()}, optimizer.metrics


def test_without_c_coefficients_are_weights_of_logarithms():
    weights = []
    for losses, metrics in steps_of(NotRenormalized()):
        weights.append(float(metrics.weights["a"]))
        for name, loss in losses.items():
            expected = float(metrics.weights[name]) / (loss + 1)
            assert float(metrics.coefficients[name]) == pytest.approx(expected, rel=1e-5)
    assert weights[0] == 0.5
    assert weights[1] != 0.5  # it observes its steps


def test_without_c_the_first_step_is_a_multiple_of_the_solutions():
    (_, with_c), (_, without_c) = (
        next(steps_of(weighting)) for weighting in (BalancedTrajectory(), NotRenormalized())
    )
    ratios = {n: float(without_c.coefficients[n] / with_c.coefficients[n]) for n in ("a", "b")}
    assert ratios["a"] == pytest.approx(ratios["b"])
    assert ratios["a"] < 1


def test_runs_continue_one_checkpoint_but_those_from_scratch():
    for title, variation in VARIATIONS.items():
        run = ABLATIONS.run(variation, 0.01, seed=1)
        assert run.seed == 1
        assert run.recipe.clip == variation.clip
        from_scratch = title.endswith("from scratch")
        assert run.start == (None if from_scratch else replace(ABLATIONS.start, seed=1))
        assert run.recipe.steps == (500 if from_scratch else 200)


def made_up(part, seeds=(0, 1)):
    """Data with all variations on one curve, each with its part of the rate."""
    curve = [(0.1, 25.0), (0.2, 28.0), (0.3, 30.0), (0.4, 31.0), (0.5, 31.5)]
    records = [
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
    return {"start": [0.01, 5], "steps": 3, "steps from scratch": 4, "seeds": list(seeds),
            "records": records}  # fmt: skip


def test_bd_rate_is_against_the_counterpart():
    data = made_up({SOLUTION_1: 0.9, "γ = 0": 0.99})
    assert bd_rates(data["records"], "γ = 0", SOLUTION_1) == pytest.approx([10.0, 10.0])
    assert bd_rates(data["records"], SOLUTION_1, SOLUTION_2) == pytest.approx([-10.0, -10.0])
    assert "| Solution 1 | +10.0 % (+10.0, +10.0) |" in section("Ablations", data)


def test_collapse_is_reported_as_such_and_not_as_a_curve():
    data = made_up({})
    for record in data["records"]:
        if record["title"] == "Solution 2, exact":
            record["scores"] = {"image": [0.006, 16.0] if record["seed"] else [0.4, 11.0]}
    text = section("Ablations", data)
    (row,) = [line for line in text.splitlines() if line.startswith("| Solution 2, exact")]
    assert "| 8 of 8 |" in row
    assert "no curve to compare in 2 of 2 seeds" in row
    assert "Collapsed at some λ: Solution 2, exact." in text


def test_section_and_figure_show_every_variation():
    data = made_up({})
    text = section("Ablations", data)
    assert all(f"| {title} |" in text for title in VARIATIONS)
    (drawing,) = figures("Ablations", data)
    shown = {t.get_text() for ax in drawing.draw().axes for t in ax.get_legend().get_texts()}
    assert shown == set(VARIATIONS) >= {SUMS}
