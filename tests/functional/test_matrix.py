from __future__ import annotations

import pytest
import torch
from hypothesis import given

from moo_balance.functional import _host, cosine_similarity, min_norm_weights
from moo_balance.functional._host import directions
from moo_balance.functional._matrix import EPS, Few, Many
from tests.support.gradients import gramian_of, jacobians, property_test

DOUBLE = torch.float64
over_kinds = pytest.mark.parametrize("kind", [Few, Many])


def held(kind, matrix):
    return Few(matrix.tolist()) if kind is Few else Many(matrix.numpy())


def drawn(count, seed=0):
    rows = torch.randn(count, count, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return cosine_similarity(gramian_of(rows)) + 0.01 * torch.eye(count, dtype=DOUBLE)


def vector(count):
    return torch.linspace(-1.0, 2.0, count, dtype=DOUBLE)


@over_kinds
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_products_solutions_and_entries(kind, count):
    matrix, right = drawn(count), vector(count)
    own = held(kind, matrix)
    assert len(own) == count
    assert torch.equal(own.tensor(), matrix)
    assert own.times(right.tolist()) == pytest.approx((matrix @ right).tolist(), abs=1e-14)
    expected = torch.linalg.solve(matrix, right).tolist()
    places = list(range(count))
    assert own.solution(right.tolist(), places) == pytest.approx(expected, rel=1e-9)
    own.pivot()  # from here on a factor may be at hand
    assert own.solution(right.tolist(), places) == pytest.approx(expected, rel=1e-9)


@over_kinds
@pytest.mark.parametrize("places", [[], [3], [0, 2, 5], [1, 2, 3, 4, 6]])
def test_a_solution_on_some_places_is_zero_elsewhere(kind, places):
    matrix, right = drawn(7), vector(7)
    expected = torch.zeros(7, dtype=DOUBLE)
    expected[places] = torch.linalg.solve(matrix[places][:, places], right[places])
    found = held(kind, matrix).solution(right.tolist(), places)
    assert found == pytest.approx(expected.tolist(), rel=1e-9)


@over_kinds
def test_the_smallest_pivot(kind):
    matrix = drawn(6)
    expected = torch.linalg.cholesky(matrix).diagonal().square().min()
    assert held(kind, matrix).pivot() == pytest.approx(float(expected))


@over_kinds
def test_an_indefinite_matrix_has_no_pivot_until_a_ridge_covers_it(kind):
    own = held(kind, torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=DOUBLE))
    assert own.pivot() == 0.0
    ridged = own.ridged(1.5)
    assert ridged.pivot() == pytest.approx(2.5 - 4 / 2.5)
    assert own.tensor().tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert ridged.tensor().tolist() == [[2.5, 2.0], [2.0, 2.5]]


def test_a_part_that_rounding_makes_indefinite_still_has_a_finite_solution():
    rows = [[1.0, 1.0 + EPS, 0.0], [1.0 + EPS, 1.0, 0.0], [0.0, 0.0, 1.0]]
    found = Few(rows).solution([1.0, 0.5, 0.0], [0, 1])
    assert all(abs(entry) < 2 / EPS for entry in found)


@property_test
@given(jacobians(counts=(3, 12), decades=12.0, degenerate=True))
def test_few_and_many_are_read_alike(rows):
    gramian = gramian_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host, "FEW", 99)
        few = directions(gramian)
        patch.setattr(_host, "FEW", 0)
        many = directions(gramian)
    assert (type(few.cosines), type(many.cosines)) == (Few, Many)
    assert (few.squares, few.norms) == (many.squares, many.norms)
    torch.testing.assert_close(few.cosines.tensor(), cosine_similarity(gramian))
    torch.testing.assert_close(many.cosines.tensor(), cosine_similarity(gramian))


@property_test
@given(jacobians(counts=(3, 16), decades=6.0))
def test_few_and_many_are_weighed_alike(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host, "FEW", 99)
        few = min_norm_weights(gramian_of(rows))
        patch.setattr(_host, "FEW", 0)
        many = min_norm_weights(gramian_of(rows))
    torch.testing.assert_close(few, many, rtol=0, atol=1e-10)
