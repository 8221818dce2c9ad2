"""Gradients, losses and scales near the ends of float64's range, and far apart from each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, strategies as st

from moo_balance import MGDA, AnalyticQP, SumLog
from moo_balance.errors import BalanceValueError
from moo_balance.functional import (
    analytic_qp_weights,
    cosine_similarity,
    kkt_residual,
    min_norm_weights,
    project_dual_cone,
    scale_gramian,
    set_tchebycheff,
    set_tchebycheff_value,
    smooth_tchebycheff,
    smooth_tchebycheff_log,
    smooth_tchebycheff_log_value,
    smooth_tchebycheff_value,
    tchebycheff,
)
from moo_balance.functional._checks import relative_scales
from moo_balance.weighting import Statistics
from moo_balance.weighting._arguments import log_coefficients
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.naive_rows import NaiveRows
from tests.support.registry import Method, over_all_methods
from tests.support.statistics import statistics_of, vector

over_solvers = pytest.mark.parametrize("solve", [min_norm_weights, analytic_qp_weights])
exponents = st.floats(-145.0, 145.0)


def assert_near(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@over_solvers
@property_test
@given(jacobians(counts=(2, 6)), exponents)
def test_weights_do_not_depend_on_the_length_of_all_gradients(solve, rows, exponent):
    gramian = gramian_of(rows)
    assert_near(solve(gramian * 10**exponent * 10**exponent), solve(gramian))


@property_test
@given(jacobians(counts=(2, 6)), exponents)
def test_views_and_projections_do_not_depend_on_it_either(rows, exponent):
    gramian, start = gramian_of(rows), rows[:, 0]
    scaled = gramian * 10**exponent * 10**exponent
    assert_near(cosine_similarity(scaled), cosine_similarity(gramian))
    assert_near(project_dual_cone(scaled, start), project_dual_cone(gramian, start), 1e-7)
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    assert_near(kkt_residual(scaled, weights), kkt_residual(gramian, weights))


@over_solvers
@property_test
@given(jacobians(counts=(2, 6)), st.data())
def test_scales_that_undo_lengths_leave_the_weights(solve, rows, data):
    """However far apart they are, and in whatever unit."""
    draw = [data.draw(st.floats(-70.0, 70.0)) for _ in rows]
    lengths, unit = vector(10**exponent for exponent in draw), 10 ** data.draw(exponents)
    gramian = gramian_of(rows)
    longer = gramian * lengths[:, None] * lengths
    assert_near(solve(longer, lengths * unit), solve(gramian), 1e-8)


@over_solvers
@property_test
@given(jacobians(counts=(2, 6), decades=2.0))
def test_scales_are_those_of_the_scaled_gramian(solve, rows):
    scales = torch.linspace(0.1, 7.0, len(rows), dtype=torch.float64)
    gramian = gramian_of(rows)
    assert_near(solve(gramian, scales), solve(scale_gramian(gramian, scales)), 1e-8)


@over_solvers
@pytest.mark.parametrize("count", [2, 3])
def test_a_scale_of_zero_counts_as_a_zero_gradient(solve, count):
    scales = torch.ones(count)
    scales[0] = 0.0
    gramian = torch.eye(count) + 0.1
    expected = torch.eye(count)[0]
    torch.testing.assert_close(solve(gramian, scales), expected)
    torch.testing.assert_close(solve(gramian, torch.zeros(count)), torch.full((count,), 1 / count))


@over_solvers
def test_scales_match_the_gramian(solve):
    for count in (1, 2, 3):
        with pytest.raises(BalanceValueError, match=r"`scales` should have shape \(\d,\)"):
            solve(torch.eye(count), torch.ones(count + 1))


@over_solvers
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_scales_are_numbers_that_are_not_negative(solve, count, value):
    scales = torch.ones(count)
    scales[0] = value
    with pytest.raises(BalanceValueError, match="`scales` should not be negative"):
        solve(torch.eye(count), scales)


@property_test
@given(st.lists(st.floats(0.0, 1e300), min_size=1, max_size=5))
def test_factors_are_alike_on_the_host_and_elsewhere(values):
    class Elsewhere(torch.Tensor):
        is_cpu = False  # type: ignore[assignment]

    scales = vector(values)
    elsewhere = relative_scales(scales.as_subclass(Elsewhere)).as_subclass(torch.Tensor)
    torch.testing.assert_close(elsewhere, relative_scales(scales), rtol=1e-15, atol=0.0)


@over_solvers
def test_scales_of_two_gradients_are_not_read_elsewhere(solve):
    scales = torch.empty(2, device="meta")
    assert solve(torch.empty(2, 2, device="meta"), scales).shape == (2,)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("tiny", [1e-315, 1e-200, 1e-100])
def test_a_tiny_loss_counts_where_gradients_conflict(count, tiny):
    """Of the direction it makes up a good part, although its weight is next to nothing."""
    gramian = torch.eye(count, dtype=torch.float64)
    gramian[0, 1] = gramian[1, 0] = -0.5

    def coefficients(loss):
        losses = vector([loss, 1.0, 0.5][:count])
        return MGDA(normalize="log").weights(statistics_of(losses, gramian), {}).coefficients

    if count == 2:
        assert_near(coefficients(tiny), vector([1 / 3, 2 / 3]), 1e-6)
    assert_near(coefficients(tiny), coefficients(1e-9), 1e-6)
    assert float(coefficients(tiny)[0]) > 0.1


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("tiny", [0.0, 5e-324, 1e-315, 1e-300])
def test_coefficients_of_tiny_losses(tiny):
    for weights, losses, expected in [
        ([0.5, 0.5], [tiny, 1.0], [1.0, 0.0]),
        ([0.5, 0.5], [tiny, tiny], [0.5, 0.5]),
        ([0.0, 1.0], [tiny, 1e300], [0.0, 1.0]),
        ([1.0, 0.0], [1e300, tiny], [1.0, 0.0]),
    ]:
        found = log_coefficients(vector(weights), vector(losses))
        assert found.tolist() == pytest.approx(expected, rel=1e-15, abs=1e-290)


@property_test
@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(-3.0, 3.0)), min_size=2), exponents)
def test_coefficients_do_not_depend_on_the_unit_of_all_losses(pairs, exponent):
    weights = vector(weight for weight, _ in pairs)
    losses = vector(10**digits for _, digits in pairs)
    expected = weights / losses / (weights / losses).sum()
    assert_near(log_coefficients(weights, losses * 10**exponent), expected, 1e-12)


def test_smooth_maxima_of_huge_losses_are_those_of_the_maximum():
    losses, preference = vector([1e300, 2e300, 1.0]), vector([0.5, 0.25, 0.25])
    expected = tchebycheff(losses, preference, 0.0)
    assert expected.tolist() == [0.25, 0.125, 0.0]
    assert_near(smooth_tchebycheff(losses, preference, 0.0, None, 1e-20), expected)
    assert float(smooth_tchebycheff_value(losses, preference, 0.0, None, 1e-20)) == 5e299


def test_logs_of_tiny_losses_over_a_huge_nadir():
    losses, preference = vector([1e-200, 2e-200]), vector([0.5, 0.5])
    for nadir in (1e200, vector([1e200, 1e200])):
        found = smooth_tchebycheff_log(losses, preference, nadir, 1.0)
        assert_near(found / found.sum(), vector([0.5, 0.5]))
        value = smooth_tchebycheff_log_value(losses, preference, nadir, 1.0)
        assert float(value) == pytest.approx(2 * (math.log(3.0) - 400 * math.log(10.0)))


LOSSES = [(1e-300, 1.0), (1e-300, 1e300), (1e300, 1e299), (1e-300, 1e-300)]
NORMS = [(1e-150, 1.0), (1e150, 1e-150), (1e150, 1e150)]


def is_beyond_range(method: Method, losses: tuple[float, ...], norms: tuple[float, ...]) -> bool:
    """Whether what the method divides or multiplies by itself is no float64."""
    if method.id == "MGDA-loss+":  # the product of a loss and a norm
        return 1e300 in losses and 1e150 in norms
    if method.id.startswith("DBMTL"):  # the gradient of a log loss
        return 1e-300 in losses
    if method.id == "MoCo-loss":  # the square of a loss
        return 1e300 in losses
    return False


@over_all_methods
def test_every_method_gives_finite_weights(method: Method):
    names = ("a", "b")
    weighting = method.make(names)
    for losses, norms in itertools.product(LOSSES, NORMS):
        if is_beyond_range(method, losses, norms):
            continue
        lengths = vector(norms)
        gramian = vector([1.0, -0.5, -0.5, 1.0]).view(2, 2) * lengths[:, None] * lengths
        rows = vector([1.0, 0.0, -0.5, 0.75**0.5]).view(2, 2) * lengths[:, None]
        state, naive = weighting.init(names, torch.device("cpu")), NaiveRows(weighting)
        for step in range(3):
            seen = gramian if weighting.needs(step).gramian else None
            statistics = Statistics(names, vector(losses), seen, step)
            told = naive.tell(statistics, rows)
            weights, coefficients, state = weighting.weights(told, state)
            if method.observes:
                state = weighting.observe(statistics._replace(losses=vector(losses) / 2), state)
            assert weights.isfinite().all()
            assert coefficients.isfinite().all()
            assert not any(value.isinf().any() for value in state.values())


@pytest.mark.parametrize("method", [SumLog(), AnalyticQP(shift=0.0), MGDA(normalize="log")])
def test_a_loss_below_the_normal_range_writes_no_nan(method):
    gramian = torch.eye(2, dtype=torch.float64)
    result = method.weights(statistics_of([1e-315, 1.0], gramian), {})
    assert result.coefficients.isfinite().all()
    assert float(result.coefficients.sum()) == pytest.approx(1.0)


def test_no_smoothing_is_too_small_for_any_loss():
    """The coefficients are those of the maximum: with ties, with a nadir, and in float32."""
    for dtype, huge in ((torch.float64, 1e300), (torch.float32, 1e30)):
        preference = torch.tensor([0.5, 0.25, 0.25], dtype=dtype)
        for values in ([huge, 4 * huge, 1.0], [-huge, huge, 0.0], [2.0, 4.0, 1.0], [1.0] * 3):
            losses = torch.tensor(values, dtype=dtype)
            expected = tchebycheff(losses, preference, 0.0)
            for mu in (1e-300, 5e-324, 1e-46):
                found = smooth_tchebycheff(losses, preference, 0.0, None, mu)
                assert found.dtype == dtype
                assert_near(found, expected, 1e-6)
                value = smooth_tchebycheff_value(losses, preference, 0.0, None, mu)
                assert float(value) == pytest.approx(float((preference * losses).max()))
                ranged = smooth_tchebycheff(losses, preference, 0.0, 1e-10, mu)
                assert_near(ranged * 1e-10, expected, 1e-6)


def test_a_huge_smoothing_gives_the_weighted_sum():
    for dtype in (torch.float64, torch.float32):
        preference = torch.tensor([0.75, 0.25], dtype=dtype)
        found = smooth_tchebycheff(
            torch.tensor([1e30, 3.0], dtype=dtype), preference, 0, None, 1e300
        )
        assert_near(found, preference / 2, 1e-6)


@pytest.mark.parametrize("mu", [1e-300, 5e-324])
def test_sets_of_solutions_take_any_smoothing(mu):
    for dtype, huge in ((torch.float64, 1e300), (torch.float32, 1e30)):
        losses = torch.tensor([[0.0, huge, 1.0], [huge, 0.5, 2.0]], dtype=dtype)
        found = set_tchebycheff(losses, torch.ones(3, dtype=dtype), 0.0, mu)
        assert found.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
        assert float(set_tchebycheff_value(losses, torch.ones(3, dtype=dtype), 0.0, mu)) == 1.0
