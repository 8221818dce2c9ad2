"""The contract of a method: what is kept, and what follows between two refreshes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from moo_balance import BalancedOptimizer
from moo_balance.weighting import (
    GramianWeighting,
    State,
    Statistics,
    Weighting,
    WeightingOutput,
)
from moo_balance.weighting.base import state_dtype
from tests.support.problems import Scene, SmallModel, momentum, play, train, whole_state
from tests.support.statistics import CPU, assert_near, initial_state, normal, statistics_of, vector


@dataclass(frozen=True)
class SquaredNorms(GramianWeighting):
    """Weights by squared norm; coefficients sum to what the losses say, not to 1."""

    every: int = 1
    solved: list[int] = field(default_factory=list, compare=False)

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        self.solved.append(statistics.step)
        return {"weights": gramian.diagonal() / gramian.diagonal().sum()}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"] * statistics.losses


@dataclass(frozen=True)
class MeanGramian(GramianWeighting):
    """Weights by squared norm of a running mean of Gramians, which is its state [K, K]."""

    every: int = 1

    def init(self, names: tuple[str, ...], device: torch.device) -> State:
        count, dtype = len(names), state_dtype(device)
        return {
            "weights": torch.full((count,), 1.0 / count, dtype=dtype, device=device),
            "mean": torch.zeros(count, count, dtype=dtype, device=device),
            "count": torch.zeros((), dtype=dtype, device=device),
        }

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        count = state["count"] + 1
        mean = state["mean"] + (gramian - state["mean"]) / count
        weights = mean.diagonal() / mean.diagonal().sum()
        return {"weights": weights, "mean": mean, "count": count}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"] / state["weights"].sum()


@dataclass(frozen=True)
class PowerIteration(GramianWeighting):
    """One step of a power iteration on the Gramian, from where the step before ended."""

    def init(self, names: tuple[str, ...], device: torch.device) -> State:
        return {"weights": torch.ones(len(names), dtype=state_dtype(device), device=device)}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        product = gramian @ state["weights"].to(gramian)
        return {"weights": product / product.norm()}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"]


# ---------------------------------------------------------------------- needs


class Plain(Weighting):
    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        return WeightingOutput(statistics.losses, statistics.losses, state)


class Needy(Plain):
    uses_losses = False
    uses_gramian = True
    observes_step = True
    every = 3


def needs(weighting: Weighting) -> tuple[object, ...]:
    return (
        weighting.uses_gramian,
        weighting.uses_losses,
        weighting.observes_step,
        weighting.every,
    )


def test_needs_have_defaults_and_are_overridden_by_attributes_or_fields() -> None:
    assert needs(Plain()) == (False, True, False, 1)
    assert needs(Needy()) == (True, False, True, 3)
    assert needs(SquaredNorms()) == (True, True, False, 1)
    assert needs(SquaredNorms(every=4)) == (True, True, False, 4)


def test_any_finite_loss_is_allowed_by_default() -> None:
    assert Plain().lower_bounds("ab") == [-torch.inf] * 2


# ---------------------------------------------------------------------- what is kept


def test_between_two_refreshes_only_the_coefficients_follow() -> None:
    weighting = SquaredNorms(every=3)
    state = initial_state(weighting, 2)
    for step, losses in enumerate(normal(7, 2)):
        scale = torch.diag(vector((1.0 + step, 1.0)))
        gramian = scale if step % 3 == 0 else None
        answer = weighting.weights(statistics_of(losses, gramian, step), state)
        state = answer.state
        last = 1.0 + step - step % 3
        assert_near(answer.weights, (last / (last + 1), 1 / (last + 1)), 1e-15)
        assert_near(answer.coefficients, answer.weights * losses, 1e-15)
    assert weighting.solved == [0, 3, 6]


def test_nothing_is_renormalized_between_two_refreshes() -> None:
    weighting = SquaredNorms(every=2)
    state = {"weights": vector((0.25, 0.25))}  # a third loss, with weight 0.5, is absent
    answer = weighting.weights(statistics_of((1.0, 1.0), step=1), state)
    assert answer.coefficients.tolist() == [0.25, 0.25]


def test_kept_weights_have_the_precision_of_a_state() -> None:
    weighting = SquaredNorms(every=2)
    statistics = statistics_of((1.0, 1.0), torch.eye(2))
    answer = weighting.weights(statistics, initial_state(weighting, 2))
    assert answer.state["weights"].dtype == state_dtype(CPU)


def test_nothing_is_kept_where_every_step_refreshes() -> None:
    weighting = SquaredNorms()
    assert initial_state(weighting, 2) == {}
    assert weighting.weights(statistics_of((1.0, 1.0), torch.eye(2)), {}).state == {}


def test_a_state_of_shape_k_by_k_is_kept() -> None:
    weighting, scene = MeanGramian(), Scene.random()
    answers = play(weighting, scene)
    products = torch.stack([rows @ rows.T for rows in scene.jacobians])
    for step, answer in enumerate(answers, start=1):
        mean = products[:step].mean(0)
        assert_near(answer.state["mean"], mean, 1e-13)
        assert_near(answer.coefficients, mean.diagonal() / mean.trace(), 1e-13)


def test_a_solve_can_start_from_the_last_solution() -> None:
    weighting, gramian = PowerIteration(), torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    state = initial_state(weighting, 2)
    for step in range(60):
        state = weighting.weights(statistics_of((1.0, 1.0), gramian, step), state).state
    dominant = torch.linalg.eigh(gramian).eigenvectors[:, -1].abs()
    assert_near(state["weights"], dominant, 1e-12)


def setup_with(weighting: Weighting) -> tuple[SmallModel, BalancedOptimizer]:
    model = SmallModel()
    return model, BalancedOptimizer(momentum(model), weighting)


@pytest.mark.parametrize(
    "weighting", [SquaredNorms(every=2), MeanGramian(every=2), PowerIteration()]
)
def test_a_method_of_the_user_resumes_exactly(weighting: GramianWeighting) -> None:
    model, optimizer = setup_with(weighting)
    twin, other = setup_with(weighting)
    train(model, optimizer, range(5))
    train(twin, other, range(3))
    resumed, again = setup_with(weighting)
    resumed.load_state_dict(twin.state_dict())
    again.load_state_dict(other.state_dict())
    train(resumed, again, range(3, 5))
    assert whole_state(resumed, again) == whole_state(model, optimizer)


def test_entries_of_an_absent_loss_keep_their_values_in_a_state_of_shape_k_by_k() -> None:
    model, optimizer = setup_with(MeanGramian())

    def mean_after(batch: int, present: str) -> Tensor:
        train(model, optimizer, [batch], present)
        return optimizer.state_dict()["balance"]["state"]["mean"]

    before = mean_after(0, "abc")
    after = mean_after(1, "ac")
    there = torch.tensor([[True, False, True], [False, False, False], [True, False, True]])
    assert bool((after != before)[there].all())
    assert torch.equal(after[~there], before[~there])


# ---------------------------------------------------------------------- dtypes of a state


@dataclass(frozen=True)
class Mixed(Weighting):
    """A state of several dtypes, which mathematics in float64 would widen."""

    float: torch.dtype = torch.float32

    def init(self, names: tuple[str, ...], device: torch.device) -> State:
        count = len(names)
        return {
            "mean": torch.zeros(count, dtype=self.float, device=device),
            "products": torch.zeros(count, count, dtype=self.float, device=device),
            "count": torch.full((count,), 2**60, dtype=torch.int64, device=device),
            "seen": torch.zeros(count, dtype=torch.bool, device=device),
            "total": torch.zeros((), dtype=self.float, device=device),
        }

    def weights(self, statistics: Statistics, state: State) -> WeightingOutput:
        losses = statistics.losses.double()
        mean = state["mean"].double().lerp(losses, 1 / 3)
        following = {
            "mean": mean,
            "products": state["products"].double().lerp(torch.outer(losses, losses), 1 / 3),
            "count": state["count"] + 1,
            "seen": state["seen"] | (losses > 0),
            "total": state["total"].double() + losses.sum() / 3,
        }
        weights = torch.softmax(mean + state["products"].double().sum(1) / 100, 0)
        return WeightingOutput(weights, weights, following)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_keeps_its_dtypes_where_a_loss_is_absent_and_in_a_resumed_run(
    dtype: torch.dtype,
) -> None:
    batches = [(0, "abc"), (1, "ac"), (2, "abc"), (3, "b"), (4, "abc"), (5, "ab")]

    def run(model: SmallModel, optimizer: BalancedOptimizer, start: int, stop: int) -> None:
        for batch, names in batches[start:stop]:
            train(model, optimizer, [batch], names)

    weighting = Mixed(dtype)
    model, optimizer = setup_with(weighting)
    run(model, optimizer, 0, 6)
    state = optimizer.state_dict()["balance"]["state"]
    expected = {key: value.dtype for key, value in weighting.init(("a", "b", "c"), CPU).items()}
    assert {key: value.dtype for key, value in state.items()} == expected
    assert state["count"].tolist() == [2**60 + 5, 2**60 + 5, 2**60 + 4]
    for split in range(1, 6):
        for form in ("entry", "text"):
            twin, other = setup_with(weighting)
            run(twin, other, 0, split)
            resumed, again = setup_with(weighting)
            resumed.load_state_dict(twin.state_dict())
            if form == "entry":
                again.load_state_dict(other.state_dict())
            else:
                again.load_state_dict(other.optimizer.state_dict())
                again.balance_state.load_state_dict(other.balance_state.state_dict())
            assert whole_state(resumed, again) == whole_state(twin, other)
            run(resumed, again, split, 6)
            assert whole_state(resumed, again) == whole_state(model, optimizer)


@dataclass(frozen=True)
class Partial(SquaredNorms):
    """Keeps more than what `keep` returns."""

    def init(self, names: tuple[str, ...], device: torch.device) -> State:
        return {**super().init(names, device), "count": torch.zeros((), device=device)}

    def keep(self, statistics: Statistics, state: State) -> State:
        return {"weights": state["weights"] / state["weights"].sum()}


def test_entries_that_are_not_returned_between_two_refreshes_stay() -> None:
    model, optimizer = setup_with(Partial(every=2))
    train(model, optimizer, range(4))
    assert set(optimizer.state_dict()["balance"]["state"]) == {"weights", "count"}
