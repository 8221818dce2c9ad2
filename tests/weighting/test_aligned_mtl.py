"""Aligned-MTL against the singular value decomposition of the gradients themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from moo_balance import AlignedMTL
from tests.support.gradients import gramian_of, jacobians, property_test
from tests.support.oracle import coefficients_of, largest_deviation
from tests.support.statistics import assert_near, names, normal, vector

TWO = vector([-4, 1, 1, 6, 1, 1]).reshape(2, 3)
THREE = vector([1, 2, 0, -1, 0, -1, 1, 0.5, -2, 0.5, 0.3, 1]).reshape(3, 4)
SCALES = ["min", "median", "rmse"]


def common_square(squares: Tensor, scale: str) -> Tensor:
    """What the squared singular values are set to."""
    return {"min": squares.min(), "median": squares.median(), "rmse": squares.mean()}[scale]


def by_svd(rows: Tensor, scale: str = "min") -> Tensor:
    """The aligned gradients, from a decomposition of the gradients, without their Gramian."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    kept = values > 1e-7 * values.max()
    common = common_square(values[kept].square(), scale).sqrt()
    return common * left[:, kept] @ right[kept]


def transformation(rows: Tensor, scale: str = "min") -> Tensor:
    """B, a row for each preference that names one loss almost alone."""
    count = len(rows)
    shares = torch.eye(count).double() + 0.5
    found = [
        coefficients_of(
            AlignedMTL(
                scale,
                "mean",
                preference=dict(zip(names(count), share.tolist(), strict=True)),
            ),
            gramian_of(rows),
        )
        for share in shares / shares.sum(1)
    ]
    return torch.linalg.solve(shares / shares.sum(1, keepdim=True), torch.stack(found))


def test_golden_values() -> None:
    mean = AlignedMTL(reduction="mean")
    assert_near(coefficients_of(mean, gramian_of(TWO)) @ TWO, (0.213279, 0.967333, 0.967333), 1e-6)
    expected = (-0.101423, 0.287998, 0.443170, 0.099234)
    assert_near(coefficients_of(mean, gramian_of(THREE)) @ THREE, expected, 1e-6)
    total = coefficients_of(AlignedMTL(), gramian_of(THREE))
    assert_near(total, (0.863248, 1.154381, 0.583759), 1e-6)
    values = torch.linalg.eigvalsh(gramian_of(THREE))
    assert_near(values, (0.898429, 4.234751, 8.456820), 1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_it_agrees_with_torchjd(scale: str) -> None:
    peer = pytest.importorskip("torchjd.aggregation").AlignedMTLWeighting(None, scale)
    assert largest_deviation(AlignedMTL(scale, "mean"), peer) < 1e-12
    # Both lose as many digits as the Gramian is ill-conditioned.
    assert largest_deviation(AlignedMTL(scale, "mean"), peer, decades=1.0) < 1e-9


@pytest.mark.parametrize("scale", SCALES)
@property_test
@given(rows=jacobians())
def test_coefficients_are_those_of_the_singular_value_decomposition(
    scale: str, rows: Tensor
) -> None:
    found = coefficients_of(AlignedMTL(scale), gramian_of(rows)) @ rows
    expected = by_svd(rows, scale).sum(0)
    assert_near(found, expected, 1e-7 * float(expected.norm()))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_aligned_gradients_are_orthogonal_and_equally_long(scale: str, count: int) -> None:
    rows = normal(count, 8, seed=count)
    balanced, gramian = transformation(rows, scale), gramian_of(rows)
    common = common_square(torch.linalg.eigvalsh(gramian), scale)
    identity = torch.eye(count).double()
    assert_near(balanced, balanced.T, 1e-12)
    assert_near(balanced @ gramian @ balanced / common, identity, 1e-11)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_dependent_gradients_are_aligned_in_their_span(scale: str, count: int) -> None:
    rank = max(1, count - 2)
    rows = normal(count, rank, seed=1) @ normal(rank, 7, seed=2)
    expected = by_svd(rows, scale).sum(0)
    for dtype, accuracy in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        single = rows.to(dtype)
        found = coefficients_of(AlignedMTL(scale), gramian_of(single)).double() @ rows
        assert_near(found, expected, accuracy * float(expected.norm()))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [2, 4])
def test_orthogonal_gradients_of_one_length_stay_as_they_are(scale: str, count: int) -> None:
    """All eigenvalues are equal, so that any basis is one of eigenvectors."""
    rows = 3 * torch.linalg.qr(normal(6, count)).Q.T
    assert_near(coefficients_of(AlignedMTL(scale), gramian_of(rows)), [1.0] * count, 1e-14)


@property_test
@given(jacobians(counts=(2, 6), degenerate=True), st.randoms(use_true_random=False))
def test_the_order_of_losses_does_not_matter(rows: Tensor, random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for scale in SCALES:
        straight = coefficients_of(AlignedMTL(scale), gramian_of(rows))
        crossed = coefficients_of(AlignedMTL(scale), gramian_of(rows[order]))
        assert_near(crossed, straight[order], 1e-7 * max(1.0, float(straight.abs().max())))


def test_one_of_two_losses_may_rise() -> None:
    rows = vector([10, 0, -1, 0.1]).reshape(2, 2)
    slopes = rows @ (coefficients_of(AlignedMTL(), gramian_of(rows)) @ rows)
    assert slopes.min() < 0


@pytest.mark.parametrize("count", [2, 3])
def test_a_preference_is_the_share_of_an_aligned_gradient(count: int) -> None:
    rows, shares = THREE[:count], vector([1.0, 2.0, 5.0][:count])
    preference = dict(zip("abc", shares.tolist(), strict=False))
    expected = shares / shares.sum() @ by_svd(rows)
    for reduction, whole in (("mean", 1), ("sum", count)):
        weighting = AlignedMTL(reduction=reduction, preference=preference)
        assert_near(coefficients_of(weighting, gramian_of(rows)) @ rows, whole * expected, 1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_a_common_factor_does_not_matter(scale: str, count: int, exponent: int) -> None:
    gramian = gramian_of(THREE[:count])
    plain = coefficients_of(AlignedMTL(scale), gramian)
    assert_near(coefficients_of(AlignedMTL(scale), gramian * 10.0 ** (2 * exponent)), plain, 1e-12)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_norms_sixty_decades_apart_only_the_longest_counts(count: int) -> None:
    factors = 10.0 ** torch.linspace(-30, 30, count, dtype=torch.float64)
    rows = normal(count, 7) * factors[:, None]
    found = coefficients_of(AlignedMTL(), gramian_of(rows))
    assert bool(found.isfinite().all())
    assert_near(found @ rows / rows[-1].norm(), rows[-1] / rows[-1].norm(), 1e-9)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_zero_gradient_changes_nothing_for_the_others(count: int) -> None:
    rows = torch.cat([THREE, THREE.flip(1)])[: count - 1]
    padded = torch.cat([rows[:1], torch.zeros(1, 4).double(), rows[1:]])
    found = coefficients_of(AlignedMTL(), gramian_of(padded))
    assert found[1].item() == pytest.approx(0.0, abs=1e-12)
    expected = coefficients_of(AlignedMTL(), gramian_of(rows))
    assert_near(torch.cat([found[:1], found[2:]]), expected, 1e-12)
    zeros = torch.zeros(count, count, dtype=torch.float64)
    assert coefficients_of(AlignedMTL(), zeros).tolist() == [1.0] * count


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cosine", [-1.0, -0.999, 0.0, 0.3, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("length", [1.0, 1e-3, 1e-7, 1e-9])
def test_the_closed_form_for_two_is_the_decomposition(
    scale: str, cosine: float, length: float
) -> None:
    """A third gradient of zero asks for the decomposition."""
    gramian = torch.zeros(3, 3, dtype=torch.float64)
    gramian[:2, :2] = vector([1, length * cosine, length * cosine, length**2]).reshape(2, 2)
    closed = coefficients_of(AlignedMTL(scale), gramian[:2, :2])
    # Between the two thresholds of rank lies no case of these.
    decomposed = coefficients_of(AlignedMTL(scale), gramian)[:2]
    rows = vector([1, 0, length * cosine, length * (1 - cosine**2) ** 0.5]).reshape(2, 2)
    assert_near(decomposed @ rows, closed @ rows, 1e-6)
