"""Random convex quadratics: a step does what the method promises, a run ends in the Pareto set.

L_k(x) = (x - a_k)' A_k (x - a_k) / 2 + o_k with A_k positive definite and o_k > 0, so that the
curvature bounds what a step may undo, and the Pareto set is where the convex hull of the gradients
holds zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from moo_balance import FAMO, MGDA, AnalyticQP, BalancedOptimizer
from moo_balance.functional import min_norm_weights
from moo_balance.weighting import Weighting

NAMES = tuple("abcdefgh")


@dataclass(frozen=True)
class Quadratics:
    """K bowls in P dimensions."""

    hessians: Tensor  # [K, P, P]
    minima: Tensor  # [K, P]
    offsets: Tensor  # [K]

    @staticmethod
    def random(seed: int, count: int, width: int, spread: float = 0.0) -> Quadratics:
        """Curvatures of 0.2 … 2 times 10 to the power of up to `spread`."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rotations = torch.linalg.qr(normal(count, width, width)).Q
        curvatures = 0.2 + 1.8 * torch.sigmoid(normal(count, 1, width))
        scales = 10 ** (spread * torch.tanh(normal(count, 1, 1)))
        hessians = rotations * (scales * curvatures) @ rotations.mT
        return Quadratics(hessians, 2 * normal(count, width), normal(count).exp() + 0.1)

    def losses(self, point: Tensor) -> dict[str, Tensor]:
        away = point - self.minima
        values = torch.einsum("kp,kpq,kq->k", away, self.hessians, away) / 2 + self.offsets
        return dict(zip(NAMES, values.unbind(), strict=False))

    def values(self, point: Tensor) -> Tensor:
        return torch.stack(list(self.losses(point.detach()).values()))

    def jacobian(self, point: Tensor) -> Tensor:
        return torch.einsum("kpq,kq->kp", self.hessians, point.detach() - self.minima)

    @property
    def steepest(self) -> float:
        """The largest curvature of all."""
        return float(torch.linalg.eigvalsh(self.hessians).max())

    def distance_to_pareto(self, point: Tensor) -> float:
        """Length of the shortest combination of gradients, relative to the longest gradient."""
        jacobian = self.jacobian(point)
        shortest = min_norm_weights(jacobian @ jacobian.T) @ jacobian
        return float(shortest.norm() / jacobian.norm(dim=1).max())


def start(width: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1000 + seed)
    return nn.Parameter(4 * torch.randn(width, generator=generator, dtype=torch.float64))


def direction(weighting: Weighting, problem: Quadratics, point: nn.Parameter) -> Tensor:
    """The balanced gradient, through the optimizer."""
    point.grad = None
    optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=1.0), weighting)
    optimizer.backward(problem.losses(point))
    return point.grad


COMMON_DESCENT = [MGDA(), MGDA("log"), AnalyticQP("exact"), AnalyticQP("exact", renormalize=False)]
over_common_descent = pytest.mark.parametrize("weighting", COMMON_DESCENT, ids=repr)
seeds, counts, widths = st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8)
spreads = st.floats(0.0, 3.0)


@over_common_descent
@given(seeds, counts, widths, spreads)
@settings(max_examples=40, deadline=None)
def test_the_direction_conflicts_with_no_gradient(
    weighting: Weighting, seed: int, count: int, width: int, spread: float
) -> None:
    problem, point = Quadratics.random(seed, count, width, spread), start(width, seed)
    along = direction(weighting, problem, point)
    jacobian = problem.jacobian(point)
    lengths = jacobian.norm(dim=1)
    assert (jacobian @ along >= -1e-9 * lengths * lengths.max()).all()


@over_common_descent
@given(seeds, counts, widths, st.floats(0.0, 2.0))
@settings(max_examples=40, deadline=None)
def test_a_small_step_decreases_every_loss_unless_it_cannot(
    weighting: Weighting, seed: int, count: int, width: int, spread: float
) -> None:
    problem, point = Quadratics.random(seed, count, width, spread), start(width, seed)
    if problem.distance_to_pareto(point) < 1e-3:
        return
    along = direction(weighting, problem, point)
    # L(x - t d) = L - t g.d + t^2 d'Ad / 2 < L for all t < 2 g.d / (steepest |d|^2).
    gain = float((problem.jacobian(point) @ along).min())
    step = gain / (problem.steepest * float(along.square().sum()))
    assert step > 0
    before = problem.values(point)
    assert (problem.values(point - step * along) < before).all()


@given(seeds, st.integers(2, 5), st.integers(5, 8), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_analytic_qp_is_the_explicit_inverse(
    seed: int, count: int, width: int, spread: float
) -> None:
    problem, point = Quadratics.random(seed, count, width, spread), start(width, seed)
    gaps = problem.values(point) + 1
    log_jacobian = problem.jacobian(point) / gaps[:, None]
    inverse = torch.linalg.inv(log_jacobian @ log_jacobian.T)
    weights = torch.softmax(inverse.sum(1) / inverse.sum(), 0)
    expected = weights @ log_jacobian / (weights / gaps).sum()
    actual = direction(AnalyticQP(), problem, point)
    condition = float(torch.linalg.cond(log_jacobian)) ** 2
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-13 * condition * float(expected.norm())
    )


@given(seeds, st.integers(2, 4), st.integers(2, 5))
@settings(max_examples=10, deadline=None)
def test_mgda_ends_on_the_pareto_set_and_no_loss_ever_rises(
    seed: int, count: int, width: int
) -> None:
    problem, point = Quadratics.random(seed, count, width), start(width, seed)
    optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=1 / problem.steepest), MGDA())
    values = problem.values(point)
    for _ in range(100):
        optimizer.step(lambda: problem.losses(point))
        now = problem.values(point)
        # A loss at its own minimum counts as satisfied, and the others are free to raise it.
        free = torch.tensor([name in optimizer.metrics.satisfied for name in NAMES[:count]])
        assert (free | (now <= values + 1e-12 * (1 + values))).all()
        values = now
    assert problem.distance_to_pareto(point) < 0.02


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "weighting",
    [FAMO(), FAMO(decay=0.0), FAMO(logit_optimizer="sgd", lr=1.0), AnalyticQP(), MGDA("log")],
    ids=["FAMO", "FAMO-no-decay", "FAMO-sgd", "AnalyticQP", "MGDA-log"],
)
def test_runs_on_two_quadratics_end_on_the_pareto_set(weighting: Weighting, seed: int) -> None:
    problem, point = Quadratics.random(seed, 2, 3), start(3, seed)
    before = problem.distance_to_pareto(point)
    optimizer = BalancedOptimizer(torch.optim.SGD([point], lr=0.2), weighting)
    for _ in range(300):
        optimizer.step(lambda: problem.losses(point))
    assert problem.distance_to_pareto(point) < 0.02 < before
