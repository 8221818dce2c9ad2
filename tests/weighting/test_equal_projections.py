"""ConFIG and IMTLG: published figures, two other implementations, and what their lengths do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moo_balance import IMTLG, ConFIG
from tests.support.gradients import gramian_of
from tests.support.oracle import coefficients_of, deviation, largest_deviation, random_jacobians
from tests.support.statistics import assert_near, initial_state, statistics_of, vector

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)


def direction(weighting: ConFIG | IMTLG, rows: Tensor) -> Tensor:
    return coefficients_of(weighting, gramian_of(rows)) @ rows


def test_golden_values() -> None:
    assert_near(direction(IMTLG(), TWO), (0.076697, 1.0, 1.0), 1e-6)
    assert_near(direction(ConFIG(), TWO), (0.158809, 2.070607, 2.070607), 1e-6)
    expected = (-0.026585, 0.289063, 0.533811, 0.083605)
    assert_near(direction(IMTLG(), THREE), expected, 1e-6)
    expected = (-0.084511, 0.918908, 1.696943, 0.265774)
    assert_near(direction(ConFIG(), THREE), expected, 1e-6)
    weights = coefficients_of(IMTLG(), gramian_of(THREE))
    assert_near(weights, (0.338433, 0.479058, 0.182509), 1e-6)
    assert_near(THREE @ (weights @ THREE) / THREE.norm(dim=1), [0.191034] * 3, 1e-6)


def test_one_is_a_multiple_of_the_other() -> None:
    assert_near(direction(ConFIG(), THREE) / direction(IMTLG(), THREE), [3.179] * 4, 1e-3)


def test_the_weights_of_two_losses() -> None:
    first, second = TWO.norm(dim=1).tolist()
    expected = vector((second, first)) / (first + second)
    assert_near(coefficients_of(IMTLG(), gramian_of(TWO)), expected, 1e-15)


def test_the_length_of_config_is_the_sum_of_projections() -> None:
    for rows in random_jacobians(20, decades=1.0):
        along = direction(ConFIG(), rows)
        assert float(along.norm()) == pytest.approx(float((rows @ along).sum() / along.norm()))


def test_config_agrees_with_two_others() -> None:
    peer = pytest.importorskip("torchjd.aggregation").ConFIG()
    official = pytest.importorskip("conflictfree.grad_operator").ConFIGOperator()
    # Its weights are of the default dtype.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for rows in (rows for decades in (0.0, 3.0) for rows in random_jacobians(decades=decades)):
            along = direction(ConFIG(), rows)
            for other in (peer(rows), official.calculate_gradient(rows)):
                assert float((along - other).norm() / other.norm()) < 1e-12
    finally:
        torch.set_default_dtype(default)


def test_a_preference_is_that_of_torchjd() -> None:
    peer = pytest.importorskip("torchjd.aggregation").ConFIG(vector((1.0, 2.0, 4.0)))
    along = direction(ConFIG(preference={"a": 1.0, "b": 2.0, "c": 4.0}), THREE)
    assert_near(along, peer(THREE), 1e-12)
    projections = THREE @ along / THREE.norm(dim=1)
    assert_near(projections / projections[0], (1.0, 2.0, 4.0), 1e-12)


def test_imtlg_agrees_with_torchjd() -> None:
    peer = pytest.importorskip("torchjd.aggregation").IMTLGWeighting()
    assert largest_deviation(IMTLG(), peer) < 1e-12


def test_imtlg_agrees_with_torchjd_or_is_shorter_or_does_not_turn() -> None:
    """Norms apart make sums of weights that are small or negative before they are scaled."""
    peer = pytest.importorskip("torchjd.aggregation").IMTLGWeighting()
    limited = turned = 0
    for rows in random_jacobians(decades=1.0):
        coefficients, published = coefficients_of(IMTLG(), gramian_of(rows)), peer(gramian_of(rows))
        along = coefficients @ rows
        longest = float(rows.norm(dim=1).max())
        assert float((rows @ along).min()) > 0.0
        assert float(along.norm()) <= longest * (1 + 1e-12)
        if float(coefficients.sum()) == pytest.approx(1.0, abs=1e-12):
            assert deviation(rows, coefficients, published) < 1e-10
        else:
            limited += 1
            cosine = torch.cosine_similarity(along, published @ rows, dim=0).item()
            assert abs(cosine) == pytest.approx(1.0, abs=1e-9)
            assert cosine < 0 or float((published @ rows).norm()) > longest
            turned += cosine < 0
    assert limited > turned > 0


def test_a_sum_of_weights_that_passes_zero_neither_explodes_nor_turns() -> None:
    """The published weights of these gradients have a pole at a third norm of 1."""
    cosines = vector([1.0, -0.5, 0.0, -0.5, 1.0, 0.8, 0.0, 0.8, 1.0]).reshape(3, 3)
    lengths = torch.linalg.solve(cosines, torch.ones(3).double())
    assert float(lengths[2]) < 0 < float(lengths[:2].min())
    pole = float(-lengths[2] / lengths[:2].sum())
    before = None
    for third in torch.linspace(0.9 * pole, 1.1 * pole, 41).tolist():
        norms = vector([1.0, 1.0, third])
        gramian = cosines * norms * norms[:, None]
        coefficients = coefficients_of(IMTLG(), gramian)
        assert float((gramian @ coefficients).min()) > 0.0
        assert float(coefficients @ gramian @ coefficients) <= max(1.0, third) ** 2 * (1 + 1e-12)
        if before is not None:
            assert float((coefficients - before).abs().max()) < 0.2
        before = coefficients


def test_dependent_gradients_may_conflict() -> None:
    """More losses than parameters: least squares stand for the equation."""
    conflicts = 0
    for seed in range(50):
        rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double()
        conflicts += bool((rows @ direction(ConFIG(), rows) < 0).any())
    assert conflicts > 0


def test_every_keeps_the_coefficients() -> None:
    weighting = ConFIG(every=2)
    first = weighting.weights(
        statistics_of((1.0, 2.0, 3.0), gramian_of(THREE)), initial_state(weighting, 3)
    )
    later = weighting.weights(statistics_of((3.0, 2.0, 1.0), step=1), first.state)
    assert torch.equal(later.coefficients, first.coefficients)
