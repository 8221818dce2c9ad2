"""Soft rounding: probabilities as published, samples that harden, gradients that stay finite."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.lic.roundings import THREE_CLASS, TWO_CLASS, Linear, StraightThrough
from examples.lic.refine import within
from examples.lic.rounding import (
    PUBLISHED_STEPS,
    SGA_ANNEALING,
    SGA_PLUS_ANNEALING,
    Annealing,
    Gumbel,
    Rounding,
    ScaledLogit,
)

EVERY = [
    *(pytest.param(r, id=name) for name, r in TWO_CLASS.items()),
    *(pytest.param(r, id=f"{name}-3") for name, r in THREE_CLASS.items()),
]

# At 0.3, for the integers in rising order; by the formulas, in double precision, without torch.
GOLDEN_TWO = {
    "atanh": (0.63593893, 0.36406107),
    "linear": (0.7, 0.3),
    "cosine": (0.79389263, 0.20610737),
    "SSL": (0.87531411, 0.12468589),
}
GOLDEN_THREE = {
    "linear": (0.0, 0.77124127, 0.22875873),
    "cosine": (9e-8, 0.72222055, 0.27777936),
    "SSL": (0.01841849, 0.65065871, 0.3309228),
}


@pytest.fixture
def values():
    torch.manual_seed(0)
    return 4 * torch.randn(2000, dtype=torch.float64)


@pytest.mark.parametrize(
    ("roundings", "golden"), [(TWO_CLASS, GOLDEN_TWO), (THREE_CLASS, GOLDEN_THREE)]
)
def test_probabilities_are_the_published_ones(roundings, golden):
    value = torch.tensor(0.3, dtype=torch.float64)
    computed = {name: r.probabilities(value).tolist() for name, r in roundings.items()}
    assert computed == {name: pytest.approx(p, abs=2e-7) for name, p in golden.items()}


@pytest.mark.parametrize("rounding", EVERY)
def test_probabilities_sum_to_one_and_prefer_the_nearest(rounding, values):
    probabilities = rounding.probabilities(values)
    assert probabilities.shape == (rounding.classes, *values.shape)
    torch.testing.assert_close(probabilities.sum(0), torch.ones_like(values))
    likeliest = rounding.candidates(values).gather(0, probabilities.argmax(0)[None])[0]
    assert torch.equal(likeliest, values.round())


@pytest.mark.parametrize("rounding", EVERY)
def test_probabilities_are_symmetric_and_have_period_one(rounding, values):
    probabilities = rounding.probabilities(values)
    torch.testing.assert_close(rounding.probabilities(-values), probabilities.flip(0))
    torch.testing.assert_close(rounding.probabilities(values + 3), probabilities)


@pytest.mark.parametrize("rounding", TWO_CLASS.values(), ids=TWO_CLASS)
def test_an_integer_is_itself_and_a_half_is_either(rounding):
    assert rounding.probabilities(torch.tensor(3.0))[0] > 0.99
    torch.testing.assert_close(rounding.probabilities(torch.tensor(2.5)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("rounding", THREE_CLASS.values(), ids=THREE_CLASS)
def test_three_integers_leave_the_far_one_a_chance(rounding):
    below, nearest, above = rounding.probabilities(torch.tensor(2.2))
    assert nearest > above > below > 0
    at_integer = rounding.probabilities(torch.tensor(2.0))
    assert at_integer[0] == at_integer[2]


def test_scaled_logit_goes_from_linear_to_rounding(values):
    linear = Rounding(Linear()).probabilities(values)
    torch.testing.assert_close(Rounding(ScaledLogit(a=1.0)).probabilities(values), linear)
    # No further than 1e-6, the least probability there is.
    sharp = Rounding(ScaledLogit(a=1e5)).probabilities(values[(values % 1 - 0.5).abs() > 1e-3])
    assert sharp.max(0).values.min() > 1 - 1e-5


@pytest.mark.parametrize("rounding", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_and_around_integers(rounding, dtype):
    steps = torch.tensor([0.0, 1e-12, 1e-7, 1e-5, 1e-3, 0.25, 0.5], dtype=dtype)
    values = torch.cat([steps, -steps, 1 + steps, 1 - steps, 1e4 + steps]).requires_grad_()
    for temperature in (1.0, 0.1):
        sample = rounding.sample(values, temperature)
        assert sample.isfinite().all()
        (gradient,) = torch.autograd.grad(sample.sum(), values)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("rounding", EVERY)
def test_samples_become_roundings_as_the_temperature_falls(rounding, values):
    decided = values[(values % 1 - 0.5).abs() > 0.05]
    torch.testing.assert_close(rounding.sample(decided, 0.01), decided.round(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rounding", EVERY)
def test_samples_choose_integers_as_often_as_their_sharpened_probabilities_say(rounding):
    """The temperature enters twice; the first time it takes probabilities to the power of 1/τ."""
    torch.manual_seed(0)
    value = torch.full((40_000,), 0.3, dtype=torch.float64)
    expected = rounding.probabilities(value[:1])[:, 0] ** 2
    expected /= expected.sum()
    rounded = rounding.sample(value, 0.5).round()
    # A soft sample lies nearest to its likeliest candidate where there are two of them.
    if rounding.classes == 2:
        assert (rounded == 1).double().mean().item() == pytest.approx(expected[1].item(), abs=0.01)
    low, high = rounding.candidates(value)[0], rounding.candidates(value)[-1]
    assert ((low <= rounded) & (rounded <= high)).all()


def test_samples_follow_the_seed():
    relaxation, values = Gumbel(TWO_CLASS["SSL"]), torch.linspace(-2, 2, 50)
    torch.manual_seed(1)
    first, second = relaxation(values, 10), relaxation(values, 10)
    torch.manual_seed(1)
    assert torch.equal(relaxation(values, 10), first)
    assert not torch.equal(first, second)


def test_straight_through_rounds_with_the_gradient_of_the_identity():
    values = torch.tensor([0.4, 1.6], requires_grad=True)
    rounded = StraightThrough()(values, 0)
    (gradient,) = torch.autograd.grad((rounded * torch.tensor([2.0, 3.0])).sum(), values)
    assert rounded.tolist() == [0.0, 2.0]
    assert gradient.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("annealing", "golden"),
    [
        (SGA_ANNEALING, {0: 0.5, 700: 0.5, 1700: 0.5 / math.e, 2000: 0.13626590}),
        (SGA_PLUS_ANNEALING, {0: 1.0, 500: 0.60653066, 2000: 0.13533528}),
        (Annealing(maximum=0.5), {0: 0.5, 693: 0.5, 694: 0.49957382}),
    ],
)
def test_temperatures_are_the_published_ones(annealing, golden):
    assert {step: annealing(step) for step in golden} == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("annealing", [SGA_ANNEALING, SGA_PLUS_ANNEALING])
def test_a_shorter_course_passes_the_same_temperatures(annealing):
    short = within(annealing, PUBLISHED_STEPS // 4)
    assert [short(t) for t in range(0, 501, 50)] == pytest.approx(
        [annealing(4 * t) for t in range(0, 501, 50)]
    )
