"""``floor``: log methods whose distances never vanish, whatever the unit of a loss."""

from __future__ import annotations

import pytest
import torch

from moo_balance import FAMO, AnalyticQP, SumLog
from tests.support.statistics import initial_state, statistics_of, vector

METHODS = [
    lambda floor=0.0: SumLog(floor=floor),
    FAMO,
    lambda **arguments: AnalyticQP("exact", shift=0.0, **arguments),
]


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_largest_distance_so_far_is_added(renormalize: bool) -> None:
    method = SumLog(bounds=1.0, floor=0.5, renormalize=renormalize)
    state = initial_state(method, 2)
    for losses, added in (
        ((3.0, 2.0), (1.0, 0.5)),
        ((2.0, 9.0), (1.0, 4.0)),
        ((1.5, 1.1), (1.0, 4.0)),
    ):
        _, coefficients, state = method.weights(statistics_of(losses), state)
        expected = 1.0 / (vector(losses) - 1.0 + vector(added))
        expected = expected / expected.sum() if renormalize else expected
        torch.testing.assert_close(coefficients, expected)


@pytest.mark.parametrize("make", METHODS[:2])
def test_a_loss_that_all_but_vanishes_leaves_the_other_its_share(make) -> None:
    shares = []
    for floor in (0.0, 0.1):
        method = make(floor=floor)
        state = initial_state(method, 2)
        for step, value in enumerate((1.0, 1e-3, 1e-9)):
            statistics = statistics_of((value, 1.0), step=step)
            _, coefficients, state = method.weights(statistics, state)
        shares.append(float(coefficients[1]))
    assert shares[0] <= 1e-6
    assert shares[1] >= 0.05


@pytest.mark.parametrize("make", METHODS)
def test_without_a_floor_nothing_is_kept_for_it(make) -> None:
    assert "floor" not in initial_state(make(), 2)
    assert "floor" in initial_state(make(floor=0.1), 2)


def test_the_distance_after_the_step_has_the_floor_of_the_step() -> None:
    """A loss that stays has not moved, though the distance is another with every floor."""
    method = FAMO(floor=0.5)
    state = initial_state(method, 2)
    _, _, state = method.weights(statistics_of((1.0, 2.0)), state)
    after = method.observe(statistics_of((0.5, 2.0), step=1), state)
    assert after["logits"][1].item() == 0.0
    assert after["floor"].tolist() == [1.0, 2.0]
