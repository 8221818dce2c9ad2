"""`min_norm_weights`: optimality conditions, enumeration of supports, SciPy."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, strategies as st
from scipy.optimize import nnls
from torch import Tensor

from moo_balance.errors import BalanceValueError, ConvergenceError
from moo_balance.functional import (
    _solvers,
    _two,
    analytic_qp_weights,
    cosine_similarity,
    kkt_residual,
    min_norm_weights,
    scale_gramian,
)
from moo_balance.functional._directions import directions
from moo_balance.functional.gramian import share_between_equals
from tests.support.gradients import (
    Operations,
    gramian_of,
    jacobians,
    property_test,
    relative_products,
)

GOLDEN_ROWS = torch.tensor(
    [[1.0, 2.0, 0.0, -1.0], [0.0, -1.0, 1.0, 0.5], [-2.0, 0.5, 0.3, 1.0]], dtype=torch.float64
)
GOLDEN_LOSSES = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)


def by_enumeration(gramian: Tensor) -> Tensor:
    """The slow reference: the best of the minimisers on every support."""
    count = len(gramian)
    best, weights = float("inf"), torch.zeros(count, dtype=torch.float64)
    for size in range(1, count + 1):
        for support in map(list, combinations(range(count), size)):
            block = gramian[support][:, support]
            part = torch.linalg.lstsq(
                block, torch.ones(size, 1, dtype=torch.float64), driver="gelsd"
            ).solution[:, 0]
            part = part / part.sum()
            value = float(part @ block @ part)
            if bool((part >= 0).all()) and value < best:
                best, weights = value, torch.zeros(count, dtype=torch.float64)
                weights[support] = part
    return weights


def by_frank_wolfe(gramian: Tensor, steps: int = 2000) -> tuple[Tensor, float]:
    """Frank-Wolfe with exact line search, and the gap that bounds how much shorter it could be."""
    weights = torch.full((len(gramian),), 1 / len(gramian), dtype=torch.float64)
    for _ in range(steps):
        along = gramian @ weights
        target = int(along.argmin())
        gap = float(weights @ along - along[target])
        curvature = float(weights @ along - 2 * along[target] + gramian[target, target])
        weights = weights * (1 - min(1.0, gap / curvature))
        weights[target] += min(1.0, gap / curvature)
    along = gramian @ weights
    return weights, 2 * float(weights @ along - along.min())


def value(gramian: Tensor, weights: Tensor) -> Tensor:
    return weights @ gramian @ weights


@property_test
@given(jacobians(decades=12.0))
def test_weights_satisfy_the_optimality_conditions_over_24_decades_of_norms(rows):
    weights = min_norm_weights(gramian_of(rows))
    assert float(kkt_residual(gramian_of(rows), weights)) <= 1e-8


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_weights_satisfy_the_optimality_conditions_of_degenerate_gradients(rows):
    weights = min_norm_weights(gramian_of(rows))
    assert float(kkt_residual(gramian_of(rows), weights)) <= 1e-8
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum().item(), 1.0)


@property_test
@given(jacobians(decades=12.0, degenerate=True))
def test_the_combination_conflicts_with_no_gradient(rows):
    weights = min_norm_weights(gramian_of(rows))
    assert float(relative_products(rows, weights).min()) >= -1e-10


@pytest.mark.parametrize("count", [16, 32, 64])
@pytest.mark.parametrize("decades", [0, 12])
@pytest.mark.parametrize("shape", ["wide", "square", "thin", "parallel", "stationary", "opposite"])
def test_weights_satisfy_the_optimality_conditions_of_many_gradients(count, decades, shape):
    generator = torch.Generator().manual_seed(count)
    for _ in range(3):
        width = {"square": count, "thin": count // 4}.get(shape, 2 * count)
        rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
        if shape == "parallel":
            rows = rows[:1] + 1e-7 * rows
        elif shape == "stationary":
            rows = rows - (1 - 1e-7) * rows.mean(dim=0)
        elif shape == "opposite":
            rows = torch.cat([rows[::2], -rows[::2]])
        spread = 2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1
        gramian = gramian_of(rows * 10 ** (decades * spread))
        assert float(kkt_residual(gramian, min_norm_weights(gramian))) <= 1e-8


@property_test
@given(jacobians(counts=(2, 6)))
def test_weights_equal_the_enumeration_of_supports(rows):
    gramian = gramian_of(rows)
    torch.testing.assert_close(
        min_norm_weights(gramian), by_enumeration(gramian), rtol=0, atol=1e-9
    )


@property_test
@given(jacobians(counts=(2, 6), degenerate=True))
def test_the_combination_is_as_short_as_the_enumeration_of_degenerate_supports(rows):
    gramian = gramian_of(rows)
    assume(float(gramian.diagonal().min()) > 0)
    result, best = min_norm_weights(gramian), by_enumeration(gramian)
    scale = (result @ rows.norm(dim=1)).square()
    assert float(value(gramian, result) - value(gramian, best)) <= 1e-12 * float(scale)


@pytest.mark.parametrize("count", [16, 32])
def test_the_combination_lies_within_the_duality_gap_of_frank_wolfe(count):
    rows = torch.randn(
        count, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    gramian = gramian_of(rows + rows[0])
    approximate, gap = by_frank_wolfe(gramian)
    lost = float(value(gramian, approximate) - value(gramian, min_norm_weights(gramian)))
    assert -1e-12 <= lost <= gap
    assert gap < 1e-2 * float(gramian.diagonal().min())


@pytest.mark.parametrize("count", [3, 8, 32, 64])
def test_weights_equal_scipy_on_the_gradients_themselves(count):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 2 * count, dtype=torch.float64, generator=generator)
    rows = rows + 2 * rows[0]
    system = torch.cat([rows.T, torch.ones(1, count, dtype=torch.float64)]).numpy()
    scaled, _ = nnls(system, [0.0] * (2 * count) + [1.0])
    weights = torch.from_numpy(scaled / scaled.sum())
    assert bool((weights == 0).any())
    torch.testing.assert_close(min_norm_weights(gramian_of(rows)), weights, rtol=0, atol=1e-10)


@property_test
@given(jacobians(), st.randoms(use_true_random=False))
def test_permuting_the_gradients_permutes_the_weights(rows, random):
    order = random.sample(range(len(rows)), len(rows))
    torch.testing.assert_close(
        min_norm_weights(gramian_of(rows[order])),
        min_norm_weights(gramian_of(rows))[order],
        rtol=0,
        atol=1e-10,
    )


@property_test
@given(jacobians(decades=2.0), st.integers(-30, 30))
def test_scaling_all_gradients_together_changes_nothing(rows, exponent):
    torch.testing.assert_close(
        min_norm_weights(gramian_of(rows) * 10.0**exponent),
        min_norm_weights(gramian_of(rows)),
        rtol=1e-6,
        atol=1e-10,
    )


@property_test
@given(jacobians(counts=(2, 4)))
def test_a_repeated_gradient_shares_the_weight_of_the_one(rows):
    single = min_norm_weights(gramian_of(rows))
    doubled = min_norm_weights(gramian_of(torch.cat([rows, rows])))
    torch.testing.assert_close(doubled, torch.cat([single, single]) / 2, rtol=0, atol=1e-6)


@property_test
@given(
    jacobians(counts=(3, 12), degenerate=True),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_gradients_that_the_gramian_cannot_tell_apart_share_their_weight(rows, dtype):
    gramian = gramian_of(rows).to(dtype)
    assume(float(gramian.diagonal().min()) > 0)
    result = min_norm_weights(gramian).double()
    wide = gramian.double()
    cosines, norms = cosine_similarity(wide), wide.diagonal().sqrt()
    again = share_between_equals(result, cosines, norms, torch.finfo(dtype).eps)
    torch.testing.assert_close(result, again, rtol=0, atol=1e-6)


@property_test
@given(jacobians(counts=(3, 6), decades=6.0), st.integers(1, 3))
def test_zero_gradients_share_all_the_weight(rows, zeros):
    rows[:zeros] = 0.0
    expected = torch.zeros(len(rows), dtype=torch.float64)
    expected[:zeros] = 1 / zeros
    torch.testing.assert_close(min_norm_weights(gramian_of(rows)), expected)


def test_a_single_gradient_takes_all():
    torch.testing.assert_close(min_norm_weights(torch.tensor([[0.0]])), torch.ones(1))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1.0, 1.0), (3.0, 1.0), (1.0, 0.0)),
        ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)),
        ((1.0, 2.0), (1.0, 2.0), (0.5, 0.5)),
        ((1.0, 2.0), (-2.0, -4.0), (2 / 3, 1 / 3)),
        ((0.0, 0.0), (1.0, 0.0), (1.0, 0.0)),
        ((0.0, 0.0), (0.0, 0.0), (0.5, 0.5)),
        ((1e12, 0.0), (-1e-12, 0.0), (1e-24, 1.0)),
    ],
)
def test_two_gradients(first, second, expected):
    gramian = gramian_of(torch.tensor([first, second], dtype=torch.float64))
    torch.testing.assert_close(
        min_norm_weights(gramian), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (torch.ones(3, dtype=torch.float64), (0.328176, 0.507880, 0.163944)),
        (GOLDEN_ROWS.norm(dim=1), (0.420950, 0.364890, 0.214160)),
        (GOLDEN_LOSSES, (0.111814, 0.881865, 0.006322)),
        (GOLDEN_LOSSES * GOLDEN_ROWS.norm(dim=1), (0.177400, 0.812713, 0.009887)),
    ],
    ids=["none", "l2", "loss", "loss+"],
)
def test_golden_weights(scales, expected):
    weights = min_norm_weights(scale_gramian(gramian_of(GOLDEN_ROWS), scales))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_golden_direction():
    weights = min_norm_weights(gramian_of(GOLDEN_ROWS))
    expected = torch.tensor((0.000289, 0.230445, 0.557063, 0.089707), dtype=torch.float64)
    torch.testing.assert_close(weights @ GOLDEN_ROWS, expected, rtol=0, atol=1e-6)
    assert float(value(gramian_of(GOLDEN_ROWS), weights)) == pytest.approx(0.371471454, abs=1e-9)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_wide(count, dtype):
    rows = torch.randn(count, 9, generator=torch.Generator().manual_seed(0))
    gramian = gramian_of(rows).to(dtype)
    weights = min_norm_weights(gramian)
    assert weights.dtype == torch.float32
    expected = min_norm_weights(gramian.double()).float()
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [5, 8, 64])
def test_a_float32_gramian_may_be_slightly_indefinite(count):
    rows = torch.randn(count, 2, generator=torch.Generator().manual_seed(count))
    gramian = gramian_of(rows)
    assert float(torch.linalg.eigvalsh(gramian.double())[0]) < 0
    residual = kkt_residual(gramian.double(), min_norm_weights(gramian).double())
    assert float(residual) <= 10 * count * torch.finfo(torch.float32).eps


def test_two_gradients_are_weighed_without_reading_a_value():
    # A meta tensor holds no values, so any branch on one would fail.
    assert min_norm_weights(torch.empty(2, 2, device="meta")).shape == (2,)


@property_test
@given(jacobians(counts=(2, 2), decades=12.0, degenerate=True), st.booleans())
def test_two_gradients_are_weighed_alike_on_the_host_and_elsewhere(rows, convex):
    gramian = gramian_of(rows)
    here = _two.weights_of_two(gramian, convex=convex)
    eps = torch.finfo(gramian.dtype).eps
    assert torch.equal(here, _two._on_device(gramian, eps, convex))


@pytest.mark.parametrize("solve", [min_norm_weights, analytic_qp_weights])
def test_two_gradients_take_few_operations(solve):
    """After a backward pass each costs ten microseconds, as its code has left the caches."""
    with Operations() as here:
        solve(torch.eye(2))
    assert len(here.names) <= 4
    gramian = torch.empty(2, 2, device="meta")
    with Operations() as elsewhere:
        solve(gramian)
    assert len(elsewhere.names) <= 20


@pytest.mark.parametrize("count", [3, 10])
def test_more_gradients_take_few_operations_of_torch(count):
    with Operations() as operations:
        min_norm_weights(torch.eye(count))
    assert len(operations.names) <= 8


@pytest.mark.parametrize("count", [2, 3])
def test_weights_have_no_graph(count):
    gramian = torch.eye(count, requires_grad=True)
    assert not min_norm_weights(gramian).requires_grad


@pytest.mark.parametrize(
    ("gramian", "message"),
    [
        (torch.zeros(0, 0), r"square.*Found shape \(0, 0\)"),
        (torch.ones(2, 3), r"square.*Found shape \(2, 3\)"),
        (torch.ones(3), r"square.*Found shape \(3,\)"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "finite.*Found.*nan"),
        (torch.tensor([[float("inf"), 0.0], [0.0, -float("inf")]]), "finite.*Found.*inf"),
        (torch.tensor([[float("nan")]]), "finite.*Found.*nan"),
        (torch.eye(4).index_fill(0, torch.tensor(2), float("nan")), "finite.*Found.*nan"),
        (torch.eye(20).index_fill(1, torch.tensor(9), float("inf")), "finite.*Found.*inf"),
        (torch.diag(torch.tensor([1.0, 1.0, float("inf")])), "finite.*Found.*inf"),
        (torch.diag(torch.tensor([1.0, 1.0, -1.0])), "diagonal.*Found -1"),
        (torch.eye(3) * 2 - torch.ones(3, 3), "positive semidefinite.*eigenvalue -1"),
    ],
)
def test_refuses_a_matrix_that_is_no_gramian(gramian, message):
    with pytest.raises(BalanceValueError, match=message):
        min_norm_weights(gramian)


@pytest.mark.parametrize("count", [2, 3, 5, 12])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1.5e308), (torch.float16, 6e4)])
def test_finite_entries_may_overflow_in_sums(count, dtype, largest):
    gramian = torch.full((count,), largest, dtype=dtype)
    gramian[0] /= 4
    others = 1 / (count + 3)
    expected = torch.tensor([4 * others] + [others] * (count - 1), dtype=torch.float64)
    for solve in (min_norm_weights, analytic_qp_weights):
        result = solve(torch.diag(gramian)).double()
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    opposite = torch.full((2, 2), largest, dtype=dtype) * torch.tensor([[1, -1], [-1, 1]])
    torch.testing.assert_close(min_norm_weights(opposite).tolist(), [0.5, 0.5])


def test_a_wrong_solution_is_never_returned(monkeypatch):
    monkeypatch.setattr(_solvers, "nonnegative_quadratic", lambda matrix, vector: vector)
    gramian = torch.tensor([[1.0, 0.5, 0.0], [0.5, 3.0, 0.0], [0.0, 0.0, 2.0]])
    with pytest.raises(ConvergenceError, match=r"residual of \d\.\d+e-0\d for 3 gradients"):
        min_norm_weights(gramian)


@property_test
@given(jacobians(counts=(3, 12), decades=6.0), st.floats(0.0, 1.0))
def test_the_residual_that_is_verified_is_the_public_one(rows, share):
    gramian = gramian_of(rows)
    weights = share * min_norm_weights(gramian)
    weights[0] += 1.0 - share
    _, norms, cosines = directions(gramian)
    inverse = norms.min() / norms
    result = _solvers._min_norm_residual(cosines, inverse, weights.numpy() / inverse)
    assert result == pytest.approx(float(kkt_residual(gramian, weights)), rel=1e-9, abs=1e-14)


@property_test
@given(jacobians(counts=(3, 6)))
def test_the_residual_shows_a_shift_of_weight(rows):
    gramian = gramian_of(rows)
    weights = 0.9 * min_norm_weights(gramian)
    weights[weights.argmin()] += 0.1
    assert float(kkt_residual(gramian, weights)) > 1e-4


def test_the_residual_is_infinite_where_a_zero_gradient_was_overlooked():
    gramian = torch.diag(torch.tensor([1.0, 0.0]))
    assert float(kkt_residual(gramian, torch.tensor([1.0, 0.0]))) == float("inf")
    assert float(kkt_residual(gramian, torch.tensor([0.0, 1.0]))) == 0.0


def test_the_residual_refuses_weights_of_another_length():
    with pytest.raises(BalanceValueError, match=r"`weights` should have shape \(2,\).*\(3,\)"):
        kkt_residual(torch.eye(2), torch.ones(3))
