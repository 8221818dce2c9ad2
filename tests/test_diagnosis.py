"""Norms and cosines of expected gradients: unbiased, with intervals that cover, and no trace."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from functools import partial, reduce
from itertools import combinations
from operator import add
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import nn

from moo_balance import (
    BalancedOptimizer,
    BalanceValueError,
    ConflictReport,
    FixedWeights,
    LossFigures,
    NonFiniteError,
    diagnose,
    suggest_weights,
)
from moo_balance._batch_gradients import Products, measure_batches, multiply, read_inputs
from moo_balance._conflict_figures import estimate_figures, estimate_squares
from tests.support.noisy import MEANS, NAMES, NoisyLosses, deviation
from tests.support.problems import snapshot

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


class Net(nn.Module):
    """Buffers, random numbers, a head for each loss, and a parameter without use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.25))
        self.heads = nn.ModuleDict({name: nn.Linear(7, 1) for name in NAMES})
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, batch):
        features = self.scale * torch.tanh(self.trunk(batch))
        return {name: head(features).square().mean() for name, head in self.heads.items()}


def draw_batches(count=5, size=6):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


# ---------------------------------------------------------------------- expectation


def products_of(losses: NoisyLosses, count: int) -> Products:
    batches = [losses.batch() for _ in range(count)]
    inputs = read_inputs(lambda batch: batch, losses.params, batches, None, None)
    measured = measure_batches(inputs, 2, keep_rows=True)
    assert measured.names == NAMES
    return reduce(add, multiply(measured, ["x", "y"], inputs).values())


def inner_products(products: Products) -> torch.Tensor:
    """The estimate of those of expected gradients, shape [K, K]."""
    return estimate_squares(products)[0] * products.units.outer(products.units)


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_inner_products_are_unbiased_and_those_of_single_batches_are_not(noise):
    losses = NoisyLosses(seed=1, noise=noise)
    products = [products_of(losses, 4) for _ in range(200)]
    expected = MEANS @ MEANS.T
    estimates = torch.stack([inner_products(each) for each in products])
    assert deviation(estimates, expected) < 4.5
    plain = torch.stack([each.within.mean(0) * each.units.outer(each.units) for each in products])
    assert deviation(plain, expected) > 9


def test_the_trace_of_the_noise_is_unbiased():
    """The noise has the variance 1 in each of 6 coordinates."""
    losses = NoisyLosses(seed=2, noise=1.0)
    traces = []
    for _ in range(200):
        products = products_of(losses, 4)
        figures = estimate_figures(NAMES, products, 0.95)
        squares = inner_products(products).diagonal()
        ratios = torch.tensor([each.signal_to_noise for each in figures.losses.values()])
        traces.append(squares / ratios)
    assert deviation(torch.stack(traces), torch.full((3,), 6.0, dtype=torch.float64)) < 4.5


def simulate(cosine: float, ratio: float, count: int, shared: float, seed: int):
    """Products of two losses whose gradients have length 1, and noise of trace 1 / ratio."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(2, 30, dtype=torch.float64)
    means[0, 0], means[1, :2] = 1.0, torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    draw = torch.randn(count, 3, 30, generator=generator, dtype=torch.float64)
    noise = shared**0.5 * draw[:, :1] + (1 - shared) ** 0.5 * draw[:, 1:]
    rows = means + noise / (30 * ratio) ** 0.5
    return products_from(rows)


def products_from(rows: torch.Tensor) -> Products:
    """Of gradients [B, K, P]."""
    return Products(rows @ rows.sum(0).T, rows @ rows.mT, torch.ones(rows.shape[1]).double())


@pytest.mark.parametrize("cosine", [-0.5, 0.0, 0.8])
@pytest.mark.parametrize(
    ("ratio", "count", "shared"), [(0.1, 8, 0.6), (1.0, 4, 0.0), (1.0, 16, 0.6), (10.0, 8, 0.0)]
)
def test_intervals_cover_what_they_say(ratio, count, cosine, shared):
    """At least 95 %, and not much more where the noise is small."""
    pairs = [
        estimate_figures("ab", simulate(cosine, ratio, count, shared, seed), 0.95).pairs["a", "b"]
        for seed in range(300)
    ]
    covered = sum(pair.low <= cosine <= pair.high for pair in pairs) / len(pairs)
    assert covered >= 0.92  # the standard error of 0.95 is 0.013
    if ratio == 10.0:
        assert covered <= 0.99
        if cosine < 0:
            assert all(pair.high < 0 for pair in pairs)


@pytest.mark.parametrize("count", [3, 4, 16])
def test_pure_noise_is_seldom_above_the_noise(count):
    figures = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(count, 2, 30, generator=generator, dtype=torch.float64)
        figures.append(estimate_figures("ab", products_from(rows), 0.95).losses["a"].above_noise)
    assert sum(figures) / len(figures) < 0.04


@pytest.mark.parametrize("count", [8, 16])
def test_many_losses_that_do_not_conflict_are_seldom_said_to(count):
    """Ten of them: single intervals below 0 are common among 45 pairs."""
    names, single, advised = "abcdefghij", [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, 10, 50, generator=generator, dtype=torch.float64)
        products = products_from(torch.eye(10, 50, dtype=torch.float64) + noise / 50**0.5)
        figures = estimate_figures(names, products, 0.95)
        report = ConflictReport(count, 0.95, figures.losses, figures.pairs, {})
        single.append(any(pair.high < 0 for pair in figures.pairs.values()))
        advised.append("conflict" in report.advice)
    assert sum(single) / 200 > 0.5
    assert sum(advised) / 200 <= 0.05


def test_noise_pulls_cosines_of_single_batches_to_zero():
    pairs = [
        estimate_figures("ab", simulate(0.8, 0.3, 16, 0.0, seed), 0.95).pairs["a", "b"]
        for seed in range(50)
    ]
    assert sum(pair.batch_cosine for pair in pairs) / 50 < 0.4
    assert sum(pair.cosine for pair in pairs) / 50 == pytest.approx(0.8, abs=0.08)


# ---------------------------------------------------------------------- against the slow twin


def naive_rows(model, batches, params):
    """Gradients [B, K, P] by one call for each."""
    rows = []
    for batch in batches:
        losses = copy.deepcopy(model)
        own = [dict(losses.named_parameters())[name] for name in params]
        row = []
        for name in NAMES:
            torch.manual_seed(1)
            gradients = torch.autograd.grad(losses(batch)[name], own, allow_unused=True)
            filled = [
                torch.zeros_like(p) if g is None else g for p, g in zip(own, gradients, strict=True)
            ]
            row.append(torch.cat([g.reshape(-1) for g in filled]))
        rows.append(torch.stack(row))
    return torch.stack(rows).double()


def naive_square(rows, k, j):
    pairs = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if a != b]
    return sum(float(rows[a, k] @ rows[b, j]) for a, b in pairs) / len(pairs)


def naive_cosine(rows, k, j):
    norms = naive_square(rows, k, k), naive_square(rows, j, j)
    return naive_square(rows, k, j) / math.sqrt(norms[0] * norms[1])


def check_against_twin(figures, rows):
    count = len(rows)
    left_out = [torch.cat([rows[:b], rows[b + 1 :]]) for b in range(count)]
    quantile = student.ppf(0.975, count - 1)

    def error(estimates):
        mean = sum(estimates) / count
        return math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in estimates))

    norms = [math.sqrt(max(naive_square(rows, k, k), 0.0)) for k in range(3)]
    above = []
    for k, name in enumerate(NAMES):
        found = figures.losses[name]
        trace = float(torch.cov(rows[:, k].T).diagonal().sum())
        square = naive_square(rows, k, k)
        above.append(square > quantile * error([naive_square(rest, k, k) for rest in left_out]))
        assert found.norm == pytest.approx(norms[k], rel=1e-6)
        assert found.batch_norm == pytest.approx(float(rows[:, k].norm(dim=1).mean()))
        assert found.share == pytest.approx(norms[k] / sum(norms), rel=1e-6)
        assert found.signal_to_noise == pytest.approx(square / trace, rel=1e-6)
        assert found.above_noise == above[k]
    for k, j in combinations(range(3), 2):
        found = figures.pairs[NAMES[k], NAMES[j]]
        single = torch.nn.functional.cosine_similarity(rows[:, k], rows[:, j], dim=1)
        assert found.batch_cosine == pytest.approx(float(single.mean()))
        if min(naive_square(rows, k, k), naive_square(rows, j, j)) > 0:
            cosine = naive_cosine(rows, k, j)
            assert found.cosine == pytest.approx(max(-1.0, min(1.0, cosine)), rel=1e-6)
        if above[k] and above[j]:
            margin = quantile * error([naive_cosine(rest, k, j) for rest in left_out])
            assert found.low == pytest.approx(max(-1.0, cosine - margin), rel=1e-6)
            assert found.high == pytest.approx(min(1.0, cosine + margin), rel=1e-6)
        else:
            assert (found.low, found.high) == (-1.0, 1.0)
        wide = student.ppf(1 - 0.025 / 3, count - 1)
        known = above[k] and above[j]
        assert found.conflict == (known and cosine + wide * margin / quantile < 0)


def assert_same(found, expected):
    """Up to rounding."""
    for one, other in ((found.losses, expected.losses), (found.pairs, expected.pairs)):
        assert one.keys() == other.keys()
        for key, figures in one.items():
            assert vars(figures) == pytest.approx(vars(other[key]), rel=1e-9, nan_ok=True)


def without_dropout():
    model = Net()
    model.trunk[2].p = 0.0
    return model


@pytest.mark.parametrize(("size", "known"), [(6, False), (200, True)])
def test_figures_equal_those_of_the_slow_twin(size, known):
    model, batches = without_dropout(), draw_batches(size=size)
    report = diagnose(model, model, batches)
    names = [name for name, _ in model.named_parameters()]
    check_against_twin(report, naive_rows(model, batches, names))
    assert report.batches == 5
    assert list(report.modules) == ["scale", "trunk", "heads", "unused"]
    trunk = [name for name in names if name.startswith("trunk")]
    check_against_twin(report.modules["trunk"], naive_rows(model, batches, trunk))
    assert all(each.above_noise for each in report.losses.values()) == known


@pytest.mark.parametrize("length", [1, 3, 1000])
def test_chunks_of_any_length_give_the_same(length, monkeypatch):
    model, batches = without_dropout(), draw_batches()
    expected = diagnose(model, model, batches)
    monkeypatch.setattr("moo_balance._batch_gradients.chunk_size", lambda param: 15 * length)
    found = diagnose(model, model, batches)
    assert_same(found, expected)


def test_depth_tells_submodules_apart():
    model = without_dropout()
    report = diagnose(model, model, draw_batches(), depth=2)
    modules = ["scale", "trunk.0", "trunk.1", "heads.a", "heads.b", "heads.c", "unused"]
    assert list(report.modules) == modules
    squares = sum(module.losses["a"].norm ** 2 for module in report.modules.values())
    assert squares == pytest.approx(report.losses["a"].norm ** 2)
    wrapped = {f"module.{name}": param for name, param in model.named_parameters()}
    assert list(diagnose(model, wrapped.items(), draw_batches(), depth=2).modules) == modules
    compiled = torch.compile(model, backend="eager")
    assert list(diagnose(model, compiled, draw_batches()).modules) == [
        "scale",
        "trunk",
        "heads",
        "unused",
    ]


def test_parameters_of_a_module_that_has_submodules_keep_their_own_names():
    model = without_dropout()
    model.trunk.register_parameter("gain", nn.Parameter(torch.ones((), dtype=torch.float64)))
    labels = {}
    for depth in (1, 2, 3):
        labels[depth] = list(diagnose(model, model, draw_batches(), depth=depth).modules)
    assert labels[1] == ["scale", "trunk", "heads", "unused"]
    assert labels[2][:4] == ["scale", "trunk.gain", "trunk.0", "trunk.1"]
    assert labels[3] == labels[2]


def test_a_module_called_all_does_not_hide_the_whole_model():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    model = nn.ModuleDict({"all": nn.Linear(5, 1), "other": nn.Linear(5, 1)}).double()

    def losses_fn(batch):
        total = model["all"](batch) + model["other"](batch).square()
        return {"a": total.mean(), "b": total.square().mean()}

    report = diagnose(losses_fn, model, draw_batches())
    rows = [line.split()[0] for line in str(report).split("\n\n")[2].splitlines()]
    assert rows == ["module", "all", "all", "other"]
    ax = report.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", "all", "other"]
    values = ax.images[0].get_array()
    assert values[0, 0] == pytest.approx(report.pairs["a", "b"].cosine)
    pyplot.close("all")


def test_parameters_may_come_with_or_without_names():
    model, batches = without_dropout(), draw_batches()
    whole = diagnose(model, model, batches)
    named = diagnose(model, model.named_parameters(), batches)
    plain = diagnose(model, list(model.parameters()), batches)
    assert str(named) == str(whole)
    assert_same(plain, whole)
    assert plain.modules == {}
    trunk = diagnose(model, model.trunk, batches)
    assert_same(trunk, whole.modules["trunk"])
    assert list(trunk.modules) == ["0", "1"]


# ---------------------------------------------------------------------- leaves no trace


class Stateful(nn.Module):
    """Writes buffers and attributes, and draws from all generators."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.calls = 0

    def forward(self, batch):
        batch.mul_(2.0)
        self.seen += 1.0
        self.calls += 1
        noise = random.random() + np.random.random()
        return {name: self.seen * loss + noise for name, loss in self.net(batch).items()}


def numpy_state():
    _, key, position, *_ = np.random.get_state()
    return key.tolist(), position


@pytest.mark.parametrize("measure", [diagnose, suggest_weights])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_restored(measure, training):
    model = Stateful().train(training)
    model.net.heads["b"].bias.requires_grad_(False)
    sum(model(draw_batches()[0]).values()).backward()
    before = {name: param.grad for name, param in model.named_parameters()}
    flags = [param.requires_grad for param in model.parameters()]
    state = snapshot(model.state_dict()), snapshot(dict(before))
    generators = torch.get_rng_state(), random.getstate(), numpy_state()
    batches = draw_batches()
    measure(model, model, batches)
    assert snapshot(batches) == snapshot(draw_batches())
    assert state == (snapshot(model.state_dict()), snapshot(dict(before)))
    assert all(param.grad is before[name] for name, param in model.named_parameters())
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(module.training == training for module in model.modules())
    assert model.calls == 1
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy_state() == generators[2]


def test_all_is_restored_after_an_error():
    model = Stateful()
    batches = [*draw_batches(), torch.randn(2, 5).double()]
    state, generator = snapshot(model.state_dict()), torch.get_rng_state()

    def losses_fn(batch):
        losses = model(batch)
        if len(batch) == 2:
            raise RuntimeError("broken")
        return losses

    with pytest.raises(RuntimeError, match="broken"):
        diagnose(losses_fn, model, batches)
    assert snapshot(model.state_dict()) == state
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(param.grad is None for param in model.parameters())


def test_a_model_that_is_named_through_its_python_module_is_restored(monkeypatch):
    net = ModuleType("net")
    net.model = Stateful()
    monkeypatch.setitem(globals(), "net", net)
    state = snapshot(net.model.state_dict())
    diagnose(net_losses, net.model.parameters(), draw_batches())
    assert snapshot(net.model.state_dict()) == state
    assert net.model.calls == 0


def net_losses(batch):
    return net.model(batch)  # noqa: F821  # set by the test


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("measure", [diagnose, suggest_weights])
def test_a_scripted_model(measure):
    plain = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    scripted = torch.jit.script(copy.deepcopy(plain))
    state = snapshot(scripted.state_dict())

    def losses_fn(model, batch):
        outputs = model(batch)
        return {"a": outputs[:, 0].exp().mean(), "b": (outputs[:, 1] - 1).square().mean()}

    found = measure(partial(losses_fn, scripted), scripted, draw_batches())
    assert str(found) == str(measure(partial(losses_fn, plain), plain, draw_batches()))
    assert snapshot(scripted.state_dict()) == state


def test_each_batch_starts_from_the_same_buffers_and_draws_other_numbers():
    model = Stateful().eval()
    seen, noise = [], []

    def losses_fn(batch):
        losses = model(batch)
        seen.append(float(model.seen))
        noise.append(float(torch.rand(())))
        return losses

    diagnose(losses_fn, model, draw_batches())
    assert seen == [1.0] * 5
    assert len(set(noise)) == 5


def test_no_hook_runs_and_each_loss_is_differentiated_once():
    passes, seen = [], []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes.append(None)
            return gradient

    model = Net()
    model.scale.register_hook(seen.append)
    model.scale.register_post_accumulate_grad_hook(seen.append)

    def losses_fn(batch):
        return {name: Count.apply(loss) for name, loss in model(batch).items()}

    diagnose(losses_fn, model, draw_batches(4))
    assert len(passes) == 4 * 3
    assert not seen


def test_it_works_under_no_grad_and_within_checkpoints():
    model, batches = without_dropout(), draw_batches()
    expected = diagnose(model, model, batches)
    with torch.no_grad():
        assert str(diagnose(model, model, batches)) == str(expected)
    for reentrant in (False, True):
        net = without_dropout()
        state = snapshot(net.state_dict())

        def losses_fn(batch, net=net, reentrant=reentrant):
            run = torch.utils.checkpoint.checkpoint
            features = run(net.trunk, batch.requires_grad_(), use_reentrant=reentrant)
            features = net.scale * torch.tanh(features)
            return {name: head(features).square().mean() for name, head in net.heads.items()}

        report = diagnose(losses_fn, net, [batch.clone() for batch in batches])
        assert str(report) == str(expected)
        assert snapshot(net.state_dict()) == state
        assert all(param.grad is None for param in net.parameters())


# ---------------------------------------------------------------------- special gradients


def linear(rows, params):
    """Losses with these gradients, by name."""
    return {name: (row * params[0]).sum() for name, row in rows.items()}


def noisy_rows(count=8, noise=0.01, **means):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: torch.tensor(mean) + noise * torch.randn(len(mean), generator=generator)
            for name, mean in means.items()
        }
        for _ in range(count)
    ]


def report_of(**arguments) -> ConflictReport:
    param = nn.Parameter(torch.zeros(2))
    return diagnose(lambda rows: linear(rows, [param]), [param], noisy_rows(**arguments))


def test_a_loss_given_twice_has_cosine_one():
    param = nn.Parameter(torch.zeros(2))

    def losses_fn(rows):
        loss = (rows["a"] * param).sum()
        return {"a": loss, "b": loss}

    report = diagnose(losses_fn, [param], noisy_rows(a=[1.0, 0.0], noise=0.3))
    pair = report.pairs["a", "b"]
    close((pair.cosine, pair.low, pair.high, pair.batch_cosine), (1.0,) * 4)
    assert report.losses["a"].share == 0.5


def test_equal_batches_have_no_noise():
    report = report_of(a=[1.0, 0.0], b=[-3.0, 4.0], noise=0.0)
    assert report.losses["b"] == LossFigures(5.0, 5.0, 5 / 6, math.inf, True)
    pair = report.pairs["a", "b"]
    close((pair.cosine, pair.low, pair.high), (-0.6,) * 3)
    assert report.to_dict()["losses"]["a"]["signal_to_noise"] is None


def test_a_zero_gradient_has_no_angle_and_no_part_in_the_advice():
    report = report_of(a=[1.0, 0.0], b=[1.0, 0.1], zero=[0.0, 0.0], noise=0.0)
    zero = report.losses["zero"]
    assert (zero.norm, zero.batch_norm, zero.share, zero.above_noise) == (0.0, 0.0, 0.0, False)
    assert math.isnan(zero.signal_to_noise)
    pair = report.pairs["a", "zero"]
    assert math.isnan(pair.cosine)
    assert math.isnan(pair.batch_cosine)
    assert (pair.low, pair.high) == (-1.0, 1.0)
    assert report.advice.startswith("Keep the sum: no cosine")
    assert "-" in str(report)


def test_no_gradient_at_all():
    report = report_of(a=[0.0, 0.0], b=[0.0, 0.0], noise=0.0)
    assert report.losses["a"].share == 0.0
    assert report.advice == "Keep the sum: fewer than two losses have a gradient."


def test_a_single_loss():
    report = report_of(a=[1.0, 0.0])
    assert report.pairs == {}
    assert report.losses["a"].share == 1.0
    assert "fewer than two" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(BalanceValueError, match="at least two losses"):
        report.plot()


def test_two_batches_give_no_interval():
    report = report_of(a=[1.0, 0.0], b=[-1.0, 0.0], count=2)
    pair = report.pairs["a", "b"]
    assert pair.cosine == pytest.approx(-1.0, abs=0.01)
    assert (pair.low, pair.high) == (-1.0, 1.0)
    assert report.advice == "Take 3 batches or more: two give no interval."


def test_one_batch_given_three_times_has_intervals_of_no_width():
    report = report_of(a=[1.0, 0.0], b=[-3.0, 4.0], noise=0.0, count=3)
    close((report.pairs["a", "b"].low, report.pairs["a", "b"].high), (-0.6, -0.6))
    assert "conflict" in report.advice


def test_parameters_without_a_gradient_count_for_nothing():
    model, batches = without_dropout(), draw_batches()
    report = diagnose(model, model, batches)
    assert all(each.batch_norm == 0.0 for each in report.modules["unused"].losses.values())
    assert "unused" not in str(report)
    model.requires_grad_(False)
    model.trunk.requires_grad_(True)
    frozen = diagnose(model, model, batches)
    assert_same(frozen, report.modules["trunk"])
    assert list(frozen.modules) == ["trunk"]


def test_sparse_and_complex_gradients():
    table = nn.Embedding(6, 3, sparse=True)
    dense = copy.deepcopy(table)
    dense.sparse = False
    batches = [torch.tensor([k, k + 1, 1]) for k in range(4)]

    def losses_fn(model, batch):
        return {"a": model(batch).sum(), "b": model(batch[:2]).square().sum()}

    found = diagnose(partial(losses_fn, table), table, batches)
    assert found == diagnose(partial(losses_fn, dense), dense, batches)
    number = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
    report = diagnose(lambda x: {"a": x * number.real.sum()}, [number], [1.0, 2.0, 3.0])
    assert report.losses["a"].norm == pytest.approx(math.sqrt(11 / 3 * 2))


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_in_bfloat16(outside):
    model = without_dropout().float()
    batches = [batch.float() for batch in draw_batches(8)]
    expected = diagnose(model, model, batches)

    def losses_fn(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        found = diagnose(model if outside else losses_fn, model, batches)
    for name in NAMES:
        assert found.losses[name].norm == pytest.approx(expected.losses[name].norm, rel=0.05)
    assert found.pairs["a", "b"].cosine == pytest.approx(expected.pairs["a", "b"].cosine, abs=0.05)


def test_parameters_in_bfloat16_are_multiplied_in_float64():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 4000, generator=generator).bfloat16() + 1 for _ in range(4)]
    param = nn.Parameter(torch.zeros(4000, dtype=torch.bfloat16))

    def losses_fn(batch):
        return {name: (row.float() * param).sum() for name, row in zip("ab", batch, strict=True)}

    report = diagnose(losses_fn, [param], rows)
    exact = torch.stack(rows).double()
    assert report.losses["a"].norm == pytest.approx(math.sqrt(naive_square(exact, 0, 0)), rel=1e-9)
    assert report.pairs["a", "b"].cosine == pytest.approx(naive_cosine(exact, 0, 1), rel=1e-9)


@pytest.mark.parametrize("measure", [diagnose, suggest_weights])
def test_a_loss_scale_keeps_float16_from_underflow(measure):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    rows = noisy_rows(a=[1e-7, 2e-8], b=[-1e-7, 1e-7], noise=1e-8)

    def losses_fn(batch):
        return {name: (row * param.float()).sum() for name, row in batch.items()}

    exact = torch.stack([torch.stack(list(batch.values())) for batch in rows]).double()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    state = scaler.state_dict()
    found = measure(losses_fn, [param], rows, grad_scaler=scaler)
    assert scaler.state_dict() == state
    if measure is diagnose:
        assert found.pairs["a", "b"].cosine == pytest.approx(naive_cosine(exact, 0, 1), abs=1e-2)
        norm = math.sqrt(naive_square(exact, 0, 0))
        assert found.losses["a"].norm == pytest.approx(norm, rel=1e-2)
    else:
        norm = float(exact[:, 0].norm(dim=1).mean())
        assert found.mean_norms["a"] == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-30, 1e30, 1e155, 1e300])
def test_gradients_of_any_length(scale):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    plain = noisy_rows(a=[1.0, 0.5], b=[-1.0, 2.0])
    scaled = [{"a": scale * row["a"].double(), "b": row["b"]} for row in plain]
    reports = [
        diagnose(lambda rows: linear(rows, [param]), [param], each) for each in (plain, scaled)
    ]
    expected, found = (report.pairs["a", "b"] for report in reports)
    assert vars(found) == pytest.approx(vars(expected))
    expected, found = (report.losses["a"] for report in reports)
    assert found.norm == pytest.approx(expected.norm * scale)
    assert found.batch_norm == pytest.approx(expected.batch_norm * scale)
    assert found.signal_to_noise == pytest.approx(expected.signal_to_noise)
    assert found.above_noise
    weights = suggest_weights(lambda rows: linear(rows, [param]), [param], scaled)
    assert weights.mean_norms["a"] == pytest.approx(found.batch_norm)
    assert sum(weights.gradient_norms.values()) == pytest.approx(2.0)
    products = [weights.gradient_norms[name] * weights.mean_norms[name] for name in "ab"]
    assert products[0] == pytest.approx(products[1])


# ---------------------------------------------------------------------- advice and output


def test_the_advice_follows_from_the_first_rule_that_applies():
    noise = report_of(a=[1.0, 0.0], b=[-0.01, 0.0], noise=0.3)
    assert noise.advice.startswith("Keep static weights, or use larger batches")
    assert "`b`" in noise.advice
    assert "`a`" not in noise.advice
    conflict = report_of(a=[5.0, 0.0], b=[-1.0, 1.0])
    assert conflict.advice.startswith("Use a method for gradients that conflict")
    assert "times as long" not in conflict.advice
    lengths = report_of(a=[10.0, 0.0], b=[0.0, 0.9])
    assert lengths.advice.startswith("Use NashMTL, or GradientNorms(every=10)")
    assert "the gradient of `a` is 11" in lengths.advice
    assert report_of(a=[3.0, 0.0], b=[0.0, 1.0]).advice.startswith("Keep the sum: no cosine")


def test_the_advice_names_lengths_before_a_conflict():
    report = report_of(a=[100.0, 0.0], b=[-1.0, 1.0])
    assert report.advice.startswith("Use NashMTL, for gradients whose lengths differ and which")
    ratio = report.losses["a"].norm / report.losses["b"].norm
    lengths = f"the gradient of `a` is {ratio:.3g} times as long as that of `b`, and the cosine of"
    assert lengths in report.advice
    assert report.advice.endswith("is -0.71, significantly below 0.")
    noise = report_of(a=[100.0, 0.0], b=[-100.0, 0.0], c=[0.0, 0.1], noise=1.0)
    assert not noise.losses["c"].above_noise
    assert "times as long" not in noise.advice  # the norm of `c` is not known


def test_a_conflict_is_advised_next_to_a_loss_that_is_only_noise():
    means = {"a": [1.0, 0.0], "b": [-1.0, 0.0]}
    report = report_of(**means, c=[0.0, 0.0], noise=0.1)
    assert not report.losses["c"].above_noise
    assert report.advice.startswith("Use a method for gradients that conflict")
    assert "`c`" not in report.advice


def test_every_advice_is_one_sentence():
    for means in ([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 50.0], [-50.0, 0.0]):
        advice = report_of(a=[1.0, 0.0], b=means, noise=1e-3).advice
        assert advice.count(". ") == 0
        assert advice.endswith(".")


def test_the_report_as_text_and_as_a_dict():
    model = without_dropout()
    report = diagnose(model, model, draw_batches())
    text = str(report)
    assert text.splitlines()[0] == "5 batches, intervals of 95 %"
    assert text.splitlines()[-1] == report.advice
    assert all(len(line) <= 100 for line in text.splitlines()[:-1])
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["losses"]["a"]["norm"] == report.losses["a"].norm
    assert values["modules"]["trunk"]["pairs"][0]["losses"] == ["a", "b"]
    assert values["advice"] == report.advice


def test_the_plot_has_a_row_for_each_module():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    model = without_dropout()
    report = diagnose(model, model, draw_batches())
    ax = report.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", *report.modules]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a, b", "a, c", "b, c"]
    own = pyplot.figure().add_subplot()
    assert report.plot(ax=own) is own
    values = own.images[0].get_array()
    assert values[0, 0] == pytest.approx(report.pairs["a", "b"].cosine)
    pyplot.close("all")


def test_a_report_cannot_be_changed():
    report = report_of(a=[1.0, 0.0])
    with pytest.raises(AttributeError):
        report.level = 0.5


# ---------------------------------------------------------------------- static weights


def test_weights_are_inverse_and_sum_to_the_number_of_losses():
    param = nn.Parameter(torch.tensor([1.0, 2.0]))

    def losses_fn(x):
        return {"a": x * param.sum(), "b": 5 * x * param[1], "c": (x * param).square().sum()}

    found = suggest_weights(losses_fn, [param], [1.0, 3.0])
    norms = {"a": 2 * 2**0.5, "b": 10.0, "c": 5**0.5 * 2 * 5}
    losses = {"a": 6.0, "b": 20.0, "c": 25.0}
    assert found.mean_norms == pytest.approx(norms)
    assert found.mean_losses == pytest.approx(losses)
    for weights, values in ((found.gradient_norms, norms), (found.losses, losses)):
        assert sum(weights.values()) == pytest.approx(3.0)
        products = [weights[name] * values[name] for name in values]
        assert products == pytest.approx([products[0]] * 3)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values == {name: dict(each) for name, each in vars(found).items()}
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("loss ")
    optimizer = BalancedOptimizer(
        torch.optim.SGD([param], 0.1), FixedWeights(dict(found.gradient_norms))
    )
    optimizer.backward(losses_fn(1.0))


def test_losses_that_are_not_positive_have_no_weights_by_losses():
    param = nn.Parameter(torch.tensor(1.0))
    found = suggest_weights(lambda x: {"a": x * param, "b": -param}, [param], [1.0])
    assert found.losses is None
    assert found.to_dict()["losses"] is None
    assert found.gradient_norms == {"a": 1.0, "b": 1.0}
    assert str(found).splitlines()[1].endswith("-")


def test_norms_equal_those_of_diagnose():
    model, batches = without_dropout(), draw_batches()
    report, found = diagnose(model, model, batches), suggest_weights(model, model, batches)
    for name in NAMES:
        assert found.mean_norms[name] == pytest.approx(report.losses[name].batch_norm)


# ---------------------------------------------------------------------- bad input

PARAM = nn.Parameter(torch.ones(2))


def good(batch):
    return {"a": batch * PARAM.sum()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses_fn": {"a": PARAM}}, "`losses_fn` should be a function"),
        ({"losses_fn": lambda batch: PARAM.sum()}, "`losses_fn` should return a mapping.*Tensor"),
        (
            {"losses_fn": lambda batch: [PARAM.sum(), PARAM.sum()]},
            r'Found list\. Return `\{"first": losses\[0\], "second": losses\[1\]\}`\.',
        ),
        ({"losses_fn": lambda batch: {}}, "`losses_fn` should return a mapping.*Found none"),
        ({"losses_fn": lambda batch: {"a": 1.0}}, "Loss `a` should be a scalar tensor"),
        (
            {"losses_fn": lambda batch: {"a": PARAM}},
            r"Loss `a` should be a scalar. Found shape \(2",
        ),
        ({"losses_fn": lambda batch: {"a": PARAM.sum().detach()}}, "Loss `a` should be attached"),
        (
            {"losses_fn": lambda batch: {"a": PARAM.sum(), "b": torch.zeros(())}},
            r"`b` = tensor\(0.\) for batch 0, .* Pass batches that have all losses",
        ),
        ({"losses_fn": lambda batch: {"a": None}}, "`a` = None for batch 0"),
        (
            {
                "losses_fn": lambda batch: {
                    "a": PARAM.sum(),
                    **({"b": PARAM.sum()} if batch else {}),
                }
            },
            "Found `a`, `b` for batch 1 and `a` for batch 0. Pass batches that have all losses",
        ),
        ({"params": PARAM}, "`params` should be a module.*Found Parameter"),
        ({"params": [1.0]}, "`params` should be a module.*Found 1.0"),
        ({"params": []}, "`params` should be a module.*Found none that requires"),
        ({"params": [torch.ones(2)]}, "Found none that requires a gradient"),
        ({"params": [PARAM * 2]}, "Found the result of an operation"),
        ({"params": nn.Linear(2, 2, device="meta")}, "`params` .* Found one on the device 'meta'"),
        ({"params": nn.LazyLinear(2)}, "Call the model once first"),
        ({"batches": np.ones(3)}, "`batches` should be an iterable of batches. Found ndarray"),
        ({"batches": torch.ones(3)}, "`batches` should be an iterable of batches. Found Tensor"),
        ({"batches": 3}, "`batches` should be an iterable of batches. Found int"),
        ({"batches": {"a": 1}}, "`batches` should be an iterable of batches. Found dict"),
        ({"batches": [0.0]}, "`batches` should hold at least 2. Found 1"),
        ({"batches": iter(())}, "`batches` should hold at least 2. Found 0"),
        ({"depth": 0}, "`depth` should be a whole number.*Found 0"),
        ({"depth": True}, "`depth` should be a whole number.*Found True"),
        ({"level": 95}, "`level` should be between 0 and 1. Found 95"),
        ({"level": 1.0}, "`level` should be between 0 and 1. Found 1.0"),
        ({"grad_scaler": 2.0}, "`grad_scaler` should be a torch.amp.GradScaler.*Found float"),
        ({"process_group": "all"}, "`process_group` should be 'auto', None"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(BalanceValueError, match=message):
        diagnose(**{"losses_fn": good, "params": [PARAM], "batches": [0.0, 1.0], **arguments})
    assert PARAM.grad is None


@pytest.mark.parametrize("measure", [diagnose, suggest_weights])
def test_gradients_that_are_not_finite_are_refused_by_name(measure):
    def losses_fn(batch):
        return {"a": PARAM.sum(), "b": (PARAM - batch).sqrt().sum()}

    with pytest.raises(NonFiniteError, match=r"gradient of loss `b`.*in batch 1"):
        measure(losses_fn, [PARAM], [0.5, 1.0, 0.5])


@pytest.mark.parametrize("measure", [diagnose, suggest_weights])
def test_losses_that_are_not_finite_are_refused_by_name(measure):
    with pytest.raises(NonFiniteError, match=r"Loss `b` should be finite. Found nan in batch 1"):
        measure(lambda x: {"a": PARAM.sum(), "b": PARAM.sum() + x}, [PARAM], [1.0, math.nan, 1.0])


def test_models_that_their_first_call_completes_are_refused_before_anything_runs():
    model = nn.Sequential(nn.Linear(5, 2), nn.LazyBatchNorm1d(affine=False))
    calls = []

    def losses_fn(batch):
        calls.append(batch)
        return {"a": model(batch).square().mean()}

    batches = [batch.float() for batch in draw_batches()]
    with pytest.raises(BalanceValueError, match=r"Found LazyBatchNorm1d.*Call the model once"):
        diagnose(losses_fn, model[0], batches)
    assert not calls
    model(batches[0])
    diagnose(losses_fn, model, batches)


def test_a_graph_that_is_used_twice_is_explained():
    shared = (PARAM * 2).square().sum()

    def losses_with_backward(batch):
        loss = PARAM.square().sum()
        loss.backward()
        return {"a": loss}

    for losses_fn in (lambda batch: {"a": batch * shared}, losses_with_backward):
        with pytest.raises(RuntimeError, match="second time") as caught:
            diagnose(losses_fn, [PARAM], [1.0, 2.0])
        assert "inside `losses_fn`" in caught.value.__notes__[-1]
    assert PARAM.grad is None


def test_the_loss_scale_is_float32_whatever_the_default():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)  # above the range of float16
    expected = diagnose(good, [PARAM], [1.0, 2.0, 4.0])
    torch.set_default_dtype(torch.float16)
    try:
        assert diagnose(good, [PARAM], [1.0, 2.0, 4.0], grad_scaler=scaler) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_need_a_batch_and_gradients():
    with pytest.raises(BalanceValueError, match="at least 1"):
        suggest_weights(good, [PARAM], [])
    with pytest.raises(BalanceValueError, match="loss `a` should not be zero in all batches"):
        suggest_weights(good, [PARAM], [0.0])


# ---------------------------------------------------------------------- the page of the manual


def test_the_page_shows_what_its_example_prints(capsys):
    text = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text()
    namespace = {}
    with torch.random.fork_rng():
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            exec(block, namespace)
    shown = "".join(re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    number = r"-?\d+\.\d+"
    printed = capsys.readouterr().out
    assert re.sub(number, "", printed).split() == re.sub(number, "", shown).split()
    found, expected = (list(map(float, re.findall(number, each))) for each in (printed, shown))
    assert found == pytest.approx(expected, rel=0.2, abs=0.1)  # rounding grows in training


def test_losses_without_a_gradient_do_not_change_the_advice():
    """The more pairs are compared, the surer a conflict has to be; theirs are not compared."""
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    batches = [torch.randn(64, 4) for _ in range(8)]

    def losses(shift, count, batch):
        output = model(batch)
        flat = {f"flat {k}": 0.0 * output.sum() for k in range(count)}
        return {
            "up": (output - shift).square().mean(),
            "down": (output + shift).square().mean(),
        } | flat

    found = []
    for step in range(30):
        reports = (diagnose(partial(losses, 0.03 * step, k), model, batches) for k in (0, 8))
        one, other = (report.pairs["up", "down"].conflict for report in reports)
        assert one == other
        found.append(one)
    assert set(found) == {True, False}
