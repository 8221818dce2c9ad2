"""Cosines and norms of a Gramian on the host."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given

from moo_balance.functional import cosine_similarity
from moo_balance.functional._directions import directions
from tests.support.gradients import gramian_of, jacobians, property_test


@property_test
@given(jacobians(counts=(3, 12), decades=12.0, degenerate=True))
def test_directions_are_the_cosines_and_norms_of_a_gramian(rows):
    gramian = gramian_of(rows)
    squares, norms, cosines = directions(gramian)
    assert np.array_equal(squares, gramian.diagonal().numpy())
    assert np.array_equal(norms, np.sqrt(squares))
    torch.testing.assert_close(torch.from_numpy(cosines), cosine_similarity(gramian))


def test_the_gramian_is_left_as_it_was():
    gramian = torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    directions(gramian).cosines[:] = 0.0
    assert gramian.tolist() == [[4.0, -3.0], [-3.0, 9.0]]
