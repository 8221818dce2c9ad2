"""TorchJD's weightings inside of a BalancedOptimizer, against TorchJD's own training."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moo_balance import MGDA, BalancedOptimizer, BalanceError, BalanceValueError, MovingAverage
from moo_balance.integrations._torchjd_solver import GramianRoot
from moo_balance.integrations.torchjd import TorchJD
from moo_balance.weighting import Statistics, step_generator
from moo_balance.weighting._identity import describe, method_name
from tests.support.problems import (
    SmallModel,
    as_vector,
    assert_same_parameters,
    spoil_gradient,
    train,
    whole_state,
)
from tests.support.registry import NAMES
from tests.support.statistics import assert_near, normal, statistics_of, vector

aggregation = pytest.importorskip("torchjd.aggregation")
autojac = pytest.importorskip("torchjd.autojac")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torchjd")

VECTOR = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

# By name, and how to build it for three losses.
FITTING: dict[str, Callable[[], nn.Module]] = {
    "AlignedMTLWeighting": lambda: aggregation.AlignedMTLWeighting(),
    "AlignedMTL-rmse": lambda: aggregation.AlignedMTL(VECTOR, "rmse"),
    "CAGradWeighting": lambda: aggregation.CAGradWeighting(0.4),
    "CRMOGM-MGDA": lambda: aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(), 0.8),
    "CRMOGM-GradVac": lambda: aggregation.GramianWeightedAggregator(
        aggregation.CRMOGMWeighting(aggregation.GradVacWeighting(), 0.5, VECTOR)
    ),
    "ConFIG": lambda: aggregation.ConFIG(),
    "ConFIG-preference": lambda: aggregation.ConFIG(VECTOR),
    "Constant": lambda: aggregation.Constant(VECTOR),
    "DualProjWeighting": lambda: aggregation.DualProjWeighting(),
    "FairGradWeighting": lambda: aggregation.FairGradWeighting(2.0),
    "GradVac": lambda: aggregation.GradVac(),
    "IMTLGWeighting": lambda: aggregation.IMTLGWeighting(),
    "Krum": lambda: aggregation.Krum(0, 2),
    "MGDAWeighting": lambda: aggregation.MGDAWeighting(),
    "Mean": lambda: aggregation.Mean(),
    "NashMTL": lambda: aggregation.NashMTL(3),
    "PCD": lambda: aggregation.PCD(beta=0.7),
    "PCGradWeighting": lambda: aggregation.PCGradWeighting(),
    "Random": lambda: aggregation.Random(),
    "SumWeighting": lambda: aggregation.SumWeighting(),
    "UPGradWeighting": lambda: aggregation.UPGradWeighting(VECTOR),
}
STATEFUL = ("CRMOGM-MGDA", "CRMOGM-GradVac", "GradVac", "PCD")

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "ExcessMTL": lambda: aggregation.ExcessMTL(),
    "GradDrop": lambda: aggregation.GradDrop(),
    "TrimmedMean": lambda: aggregation.TrimmedMean(1),
    "MoDoWeighting": lambda: aggregation.MoDoWeighting(),
    "SDMGradWeighting": lambda: aggregation.SDMGradWeighting(),
}


def build(name: str) -> nn.Module:
    try:
        return FITTING[name]()
    except ImportError as error:
        pytest.skip(str(error))


fitting = pytest.mark.parametrize("name", FITTING)
stateful = pytest.mark.parametrize("name", STATEFUL)


def descent(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def as_aggregator(given: nn.Module) -> nn.Module:
    """What TorchJD trains with."""
    if isinstance(given, aggregation.Aggregator):
        return given
    if isinstance(given, (aggregation.MeanWeighting, aggregation.SumWeighting)):
        return aggregation.WeightedAggregator(given)
    return aggregation.GramianWeightedAggregator(given)


def setup(name: str, **arguments: Any) -> tuple[SmallModel, BalancedOptimizer]:
    model = SmallModel()
    return model, BalancedOptimizer(descent(model), TorchJD(build(name), **arguments))


# ---------------------------------------------------------------------- what TorchJD does itself


@fitting
def test_training_is_that_of_torchjd(name: str) -> None:
    model, optimizer = setup(name, seed=3)
    twin, aggregator = SmallModel(), as_aggregator(build(name))
    plain = descent(twin)
    for step in range(20):
        train(model, optimizer, [step])
        plain.zero_grad()
        autojac.backward(list(twin.losses(step).values()))
        torch.manual_seed(step_generator(3, step).initial_seed())
        autojac.jac_to_grad(list(twin.parameters()), aggregator)
        plain.step()
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-9)


def test_all_weightings_of_torchjd_fit_or_are_refused() -> None:
    """So that one that is new in TorchJD is noticed."""
    known = {each.partition("-")[0].removesuffix("Weighting") for each in (*FITTING, *REFUSED)}
    given = {each.removesuffix("Weighting") for each in aggregation.__all__}
    assert given - known <= {"", "Aggregator", "GramianWeightedAggregator", "WeightedAggregator"}


# ---------------------------------------------------------------------- what this package does


@fitting
def test_a_resumed_run_is_the_same_bit_for_bit(name: str) -> None:
    whole = setup(name)
    train(*whole, range(6))
    model, optimizer = setup(name)
    train(model, optimizer, range(3))
    other, resumed = setup(name)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    train(other, resumed, range(3, 6))
    assert whole_state(other, resumed) == whole_state(*whole)


@stateful
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_a_copy_trains_on_independently(name: str, duplicate: Callable[[Any], Any]) -> None:
    pair = setup(name)
    train(*pair, range(2))
    twin = duplicate(pair)
    train(*twin, range(2, 5))
    train(*pair, range(2, 5))
    assert whole_state(*twin) == whole_state(*pair)


@stateful
def test_a_skipped_step_leaves_the_state(name: str) -> None:
    model = SmallModel()
    optimizer = BalancedOptimizer(descent(model), TorchJD(build(name)), nonfinite="skip")
    train(model, optimizer, range(2))
    before = whole_state(model, optimizer)
    optimizer.zero_grad()
    optimizer.backward(spoil_gradient(model.losses(2), torch.nan))
    optimizer.step()
    after = whole_state(model, optimizer)
    assert after["model"] == before["model"]
    assert after["optimizer"]["balance"]["state"] == before["optimizer"]["balance"]["state"]


@fitting
def test_nothing_is_drawn_from_the_global_stream(name: str) -> None:
    model, optimizer = setup(name)
    before = torch.get_rng_state()
    train(model, optimizer, range(2))
    assert torch.equal(torch.get_rng_state(), before)


@fitting
def test_the_order_of_the_dict_does_not_matter(name: str) -> None:
    model, optimizer = setup(name)
    twin, other = setup(name)
    train(model, optimizer, range(4))
    for step in range(4):
        other.zero_grad()
        losses = twin.losses(step)
        other.backward({n: losses[n] for n in (NAMES if step == 0 else "cab")})
        other.step()
    assert_same_parameters(twin, model, rtol=1e-7, atol=1e-9)


@stateful
def test_an_absent_loss_keeps_its_part_of_the_state(name: str) -> None:
    model, optimizer = setup(name)
    train(model, optimizer, range(2))
    before = optimizer.state_dict()["balance"]["state"]
    train(model, optimizer, [2], ["a", "b"])
    after = optimizer.state_dict()["balance"]["state"]
    for key, value in before.items():
        if value.ndim:
            assert torch.equal(after[key][2:], value[2:])
    train(model, optimizer, [3])
    assert bool(as_vector(optimizer.metrics.coefficients).isfinite().all())


def test_a_loss_may_appear_later() -> None:
    model = SmallModel()
    weighting = TorchJD(aggregation.CRMOGMWeighting(aggregation.MGDAWeighting(), 0.5))
    optimizer = BalancedOptimizer(descent(model), weighting, loss_names=NAMES)
    train(model, optimizer, [0], ["b", "c"])
    first = optimizer.metrics.coefficients
    train(model, optimizer, [1])
    gramian = optimizer.metrics.gramian
    raw = aggregation.MGDAWeighting()(gramian)
    expected = torch.stack(
        [raw[0], *((first[n] + r) / 2 for n, r in zip("bc", raw[1:], strict=True))]
    )
    assert_near(as_vector(optimizer.metrics.coefficients), expected, 1e-12)


def test_without_its_primary_objective_pcd_changes_nothing() -> None:
    model, optimizer = setup("PCD")
    train(model, optimizer, [0])
    before = optimizer.state_dict()["balance"]["state"]
    train(model, optimizer, [1], ["b", "c"])
    assert as_vector(optimizer.metrics.coefficients).tolist() == [0.0, 0.0]
    after = optimizer.state_dict()["balance"]["state"]
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    "build",
    [
        lambda vector: aggregation.UPGradWeighting(vector),
        lambda vector: aggregation.DualProjWeighting(vector),
        lambda vector: aggregation.AlignedMTLWeighting(vector),
        lambda vector: aggregation.ConstantWeighting(vector),
        lambda vector: aggregation.ConFIG(vector),
    ],
)
def test_vectors_have_entries_of_absent_losses(build: Callable[[Tensor], nn.Module]) -> None:
    whole, part = TorchJD(build(VECTOR)), TorchJD(build(VECTOR[[0, 2]]))
    rows = normal(3, 6)[[0, 2]]
    statistics = Statistics(("a", "c"), torch.ones(2).double(), rows @ rows.T)
    state = whole.init(NAMES, torch.device("cpu"))
    present = {key: value[[0, 2]] if value.ndim else value for key, value in state.items()}
    expected = part.weights(statistics, part.init(("a", "c"), torch.device("cpu"))).weights
    assert_near(whole.weights(statistics, present).weights, expected, 1e-12)


def test_too_few_losses_are_an_error_that_names_them() -> None:
    model, optimizer = setup("Krum")
    train(model, optimizer, [0])
    with pytest.raises(BalanceError, match=r"Krum .* losses \['a', 'c'\]"):
        train(model, optimizer, [1], ["a", "c"])


@pytest.mark.parametrize("name", FITTING)
def test_a_zero_gradient_does_not_stop_a_run(name: str) -> None:
    if name == "Krum":
        pytest.skip("it needs three gradients")
    model, optimizer = setup(name)
    train(model, optimizer, [0])
    for step in (1, 2):
        losses = model.losses(step)
        optimizer.zero_grad()
        optimizer.backward({**losses, "b": losses["b"].detach() + 0.0 * losses["a"]})
        optimizer.step()
        assert float(optimizer.metrics.coefficients["b"]) == 0.0
    train(model, optimizer, [3])
    assert bool(as_vector(optimizer.metrics.coefficients).isfinite().all())


def test_weights_stay_between_two_refreshes() -> None:
    model, optimizer = setup("PCGradWeighting", every=3)
    seen = []
    for step in range(4):
        train(model, optimizer, [step])
        seen.append(as_vector(optimizer.metrics.coefficients))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[3])


@stateful
def test_windows_are_balanced_as_one_batch(name: str) -> None:
    model, optimizer = setup(name)
    twin, other = setup(name)
    for step in range(0, 6, 2):
        optimizer.zero_grad()
        with optimizer.accumulate():
            optimizer.backward(model.losses(step))
        optimizer.backward(model.losses(step + 1))
        optimizer.step()
        other.zero_grad()
        pairs = zip(twin.losses(step).items(), twin.losses(step + 1).values(), strict=True)
        other.backward({name: first + second for (name, first), second in pairs})
        other.step()
    assert_same_parameters(model, twin, rtol=1e-9, atol=1e-10)


def test_other_methods_can_be_put_around_it() -> None:
    model, twin = SmallModel(), SmallModel()
    ours = BalancedOptimizer(descent(model), MovingAverage(TorchJD(build("MGDAWeighting")), 0.8))
    theirs = BalancedOptimizer(descent(twin), TorchJD(build("CRMOGM-MGDA")))
    train(model, ours, range(5))
    train(twin, theirs, range(5))
    assert_same_parameters(model, twin)


def test_the_users_instance_is_neither_changed_nor_followed() -> None:
    given = aggregation.GradVacWeighting(beta=0.5)
    given(torch.eye(3))
    model, twin = SmallModel(), SmallModel()
    optimizer = BalancedOptimizer(descent(model), TorchJD(given))
    state, given.beta = given._phi_t.clone(), 0.1
    train(model, optimizer, range(2))
    assert torch.equal(given._phi_t, state)
    train(twin, BalancedOptimizer(descent(twin), TorchJD(build("GradVac"))), range(2))
    assert_same_parameters(model, twin)


# ---------------------------------------------------------------------- Nash-MTL's state


class NashLike(nn.Module):
    """Stands for TorchJD's solver, which needs packages that may be absent."""

    n_tasks = 3

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.prvs_alpha, self.step, self.ready = torch.ones(self.n_tasks).numpy(), 0.0, 0

    def _init_optim_problem(self) -> None:
        self.ready = self.n_tasks

    def forward(self, matrix: Tensor) -> Tensor:
        if self.step == 0:
            self._init_optim_problem()
        assert self.ready == len(matrix)
        self.step += 1
        norms = matrix.norm(dim=1).double().numpy()
        self.prvs_alpha = 0.5 * self.prvs_alpha + 0.5 / norms + 0.01 * self.step
        return torch.from_numpy(self.prvs_alpha).to(matrix)


def test_the_state_of_nash_mtl_is_kept_outside_of_it() -> None:
    named = type("_NashMTLWeighting", (NashLike, aggregation.Weighting), {})
    weighting, alone = TorchJD(named()), NashLike()
    state = weighting.init(NAMES, torch.device("cpu"))
    for step, rows in enumerate(normal(3, 3, 5)):
        statistics = statistics_of([1.0] * 3, rows @ rows.T, step)
        weights, _, following = weighting.weights(statistics, state)
        again, _, _ = weighting.weights(statistics, state)
        assert torch.equal(weights, again)
        assert_near(weights, alone(rows), 1e-12)
        state = following
    part = {key: value[:2] if value.ndim else value for key, value in state.items()}
    alone.n_tasks, alone.ready, alone.prvs_alpha = 2, 2, part["alpha"].numpy()
    fewer = weighting.weights(statistics_of([1.0] * 2, torch.eye(2).double()), part).weights
    assert_near(fewer, alone(torch.eye(2).double()), 1e-12)


# ---------------------------------------------------------------------- identity


def test_a_description_has_all_hyper_parameters_and_no_address() -> None:
    weighting = TorchJD(aggregation.UPGrad())
    text = describe(weighting)
    assert "norm_eps=0.0001" in text
    assert " at 0x" not in text
    assert text.endswith("takes=None, every=1, seed=0)")
    assert method_name(weighting) == "TorchJD(UPGradWeighting(MeanWeighting))"


@fitting
def test_equal_configurations_are_equal_before_and_after_training(name: str) -> None:
    one, other = TorchJD(build(name)), TorchJD(build(name))
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    model = SmallModel()
    train(model, BalancedOptimizer(descent(model), one), range(2))
    assert one == other
    assert one != TorchJD(build(name), seed=1)
    assert one != MGDA()


def test_hyper_parameters_are_compared() -> None:
    assert TorchJD(aggregation.GradVac(0.4)) != TorchJD(aggregation.GradVac(0.5))
    assert TorchJD(aggregation.GradVac(0.5)) == TorchJD(aggregation.GradVacWeighting(0.5))
    assert TorchJD(aggregation.Constant(VECTOR)) != TorchJD(aggregation.Constant(2 * VECTOR))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_a_gramian_is_refused(name: str) -> None:
    for takes in (None, "jacobian"):
        with pytest.raises(BalanceValueError, match=f"`weighting` .* {name.partition('-')[0]}"):
            TorchJD(REFUSED[name](), takes=takes)


class OfGramian(aggregation.Weighting):
    def forward(self, gramian: Tensor, /) -> Tensor:
        return gramian.diagonal().rsqrt()


class OfJacobian(aggregation.Aggregator):
    def forward(self, matrix: Tensor, /) -> Tensor:
        return (matrix / matrix.norm(dim=1, keepdim=True)).sum(0)


class Counting(OfGramian):
    def reset(self) -> None:
        pass


class Flat(OfGramian):
    def forward(self, gramian: Tensor, /) -> Tensor:
        return gramian


@pytest.mark.parametrize(("cls", "takes"), [(OfGramian, "gramian"), (OfJacobian, "jacobian")])
def test_a_class_of_the_user_says_what_it_takes(cls: type[nn.Module], takes: Any) -> None:
    with pytest.raises(BalanceValueError, match=f"`takes` .* {cls.__name__}"):
        TorchJD(cls())
    weighting = TorchJD(cls(), takes)
    rows = vector([3.0, 4.0, 0.0, 0.5]).view(2, 2)
    statistics = Statistics(("a", "b"), torch.ones(2), rows @ rows.T)
    state = weighting.init(("a", "b"), torch.device("cpu"))
    assert_near(weighting.weights(statistics, state).weights, (0.2, 2.0), 1e-12)


def test_other_refusals() -> None:
    with pytest.raises(BalanceValueError, match=r"`weighting`.*Found UPGradWeighting"):
        TorchJD(aggregation.UPGradWeighting)
    with pytest.raises(BalanceValueError, match=r"`weighting`.*Scalarizers"):
        TorchJD("UPGrad")
    with pytest.raises(BalanceValueError, match=r"no state.*Counting"):
        TorchJD(Counting(), "gramian")
    with pytest.raises(BalanceValueError, match="`takes`"):
        TorchJD(OfJacobian(), "gramian")
    with pytest.raises(BalanceValueError, match="`takes`"):
        TorchJD(OfGramian(), "matrix")
    with pytest.raises(BalanceValueError, match="`every`"):
        TorchJD(aggregation.Mean(), every=0)
    with pytest.raises(BalanceValueError, match="`seed`"):
        TorchJD(aggregation.Mean(), seed=-1)
    weighting = TorchJD(Flat(), "gramian")
    with pytest.raises(BalanceError, match="one weight for each"):
        weighting.weights(
            statistics_of([1.0], torch.eye(1)), weighting.init("a", torch.device("cpu"))
        )


def test_a_missing_torchjd_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given = aggregation.Mean()
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(BalanceError, match="pip install 'torchjd"):
        TorchJD(given)


# ---------------------------------------------------------------------- the root of a Gramian


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_root_has_the_inner_products_and_combines_to_its_directions(dtype: torch.dtype) -> None:
    rows = torch.stack(
        [vector((1, 2, 0)), vector((2, 4, 0)), vector((0, 0, 0)), vector((1e-6, 0, 1e6))]
    )
    gramian = (rows @ rows.T).to(dtype)
    root = GramianRoot(gramian)
    assert root.rows.dtype == dtype
    scale = gramian.diagonal().sqrt()
    close = 1e-5 if dtype == torch.float32 else 1e-12
    assert bool(((root.rows @ root.rows.T - gramian).abs() <= close * scale[:, None] * scale).all())
    direction = root.rows[1] + 2 * root.rows[3]
    coefficients = root.coefficients_of(direction)
    assert float(coefficients[2]) == 0.0
    combined = coefficients.to(dtype) @ root.rows
    assert_near(combined, direction, close * float(direction.norm()))
