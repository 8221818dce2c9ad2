"""Kinds of models: compiled, checkpointed, tied, recurrent, frozen in part, with state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from moo_balance import BalancedOptimizer, BalanceError
from tests.support.problems import snapshot, sum_losses, whole_state
from tests.support.registry import METHODS, NAMES, over_each_method, over_some

FEATURES = 6


def batch_of(number, count=8):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(count, 4, FEATURES + 1, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """Three heads on a trunk of any kind, which takes and gives sequences [N, T, F]."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(FEATURES, 1) for _ in NAMES)
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                start = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(start / 2)

    def forward(self, batch):
        features = self.trunk(batch[..., :FEATURES])
        return [head(features) for head in self.heads]

    def losses(self, batch, run=None):
        outputs = self(batch) if run is None else run(batch)
        return {
            name: 10.0**k * ((outputs[k] - k * batch[..., FEATURES:]).square().mean() + 0.1)
            for k, name in enumerate(NAMES)
        }


def plain():
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.last = plain(), nn.Linear(FEATURES, FEATURES)
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant:
            x = x.requires_grad_()
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class Tied(nn.Module):
    """One weight for two layers."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(FEATURES, FEATURES, bias=False)
        self.outward = nn.Linear(FEATURES, FEATURES, bias=False)
        self.outward.weight = self.inward.weight

    def forward(self, x):
        return self.outward(torch.tanh(self.inward(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        return self.inner(self.inner(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(FEATURES, FEATURES, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.norm = plain(), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.before(x))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.5, self.training) + 0.1 * torch.randn_like(x))


def frozen():
    trunk = plain()
    trunk[0].requires_grad_(False)
    return trunk


def parametrized():
    return nn.Sequential(weight_norm(nn.Linear(FEATURES, FEATURES)), nn.Tanh())


TRUNKS = {
    "plain": plain,
    "activation checkpointing": lambda: Checkpointed(False),
    "activation checkpointing, reentrant": lambda: Checkpointed(True),
    "tied weights": Tied,
    "modules used twice": Twice,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "BatchNorm": Normalized,
    "dropout and noise": Noisy,
    "frozen parameters": frozen,
    "parametrizations": parametrized,
}

over_trunks = pytest.mark.parametrize(
    "trunk",
    [pytest.param(name, marks=pytest.mark.capability(name)) for name in TRUNKS if name != "plain"],
)


# ---------------------------------------------------------------------- forms of a step


def by_closure(optimizer, *batches):
    optimizer.step(lambda: sum_losses(batch() for batch in batches))


def by_combined_loss(optimizer, *batches):
    optimizer.zero_grad()
    optimizer.combined_loss(sum_losses(batch() for batch in batches)).backward()
    optimizer.step()


def by_window(optimizer, *batches):
    optimizer.zero_grad()
    for batch in batches[:-1]:
        with optimizer.accumulate():
            optimizer.backward(batch)
    optimizer.backward(batches[-1])
    optimizer.step()


LR = 1e-4  # at 1e-2 ConFIG, which lengthens short gradients to the sum of all, diverges


def run(method, net, way, steps=4, forward=None):
    """Train, and note the metrics and the state of the random stream after each step."""
    optimizer = BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=LR), method.make(NAMES))
    notes = []
    for step in range(steps):
        torch.manual_seed(step)
        numbers = (2 * step, 2 * step + 1)
        way(optimizer, *(lambda n=n: net.losses(batch_of(n), forward) for n in numbers))
        balance = optimizer.metrics
        notes.append((balance.coefficients, balance.gramian, torch.get_rng_state()))
    return notes


def train_naively(net, notes):
    """The slow obvious twin: backward of the weighted sum; and check the Gramians on the way."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for step, (coefficients, gramian, stream) in enumerate(notes):
        torch.manual_seed(step)
        losses = sum_losses(net.losses(batch_of(n)) for n in (2 * step, 2 * step + 1))
        assert torch.equal(stream, torch.get_rng_state())
        if gramian is not None:
            rows = torch.stack([flat(net, loss) for loss in losses.values()])
            torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-12)
        optimizer.zero_grad()
        sum(coefficients[name] * loss for name, loss in losses.items()).backward()
        optimizer.step()


def flat(net, loss):
    """A gradient in one vector, made by ``backward``, which all kinds of graphs support."""
    net.zero_grad()
    loss.backward(retain_graph=True)
    pairs = [(p, p.grad) for p in net.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def assert_same_model(net, twin):
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-10, atol=1e-12)


@over_trunks
@over_some("FixedWeights", "SumLog", "AnalyticQP")
@pytest.mark.parametrize(
    "way", [by_closure, by_combined_loss, by_window], ids=lambda way: way.__name__
)
def test_every_kind_of_model_takes_the_weighted_step(trunk, method, way):
    net = Net(TRUNKS[trunk]())
    twin = copy.deepcopy(net)
    train_naively(twin, run(method, net, way))
    assert_same_model(net, twin)


@over_trunks
@over_some("FAMO-adam")
@pytest.mark.parametrize("way", [by_closure, by_window], ids=lambda way: way.__name__)
def test_a_second_evaluation_changes_no_kind_of_model(trunk, method, way):
    """Running statistics are updated once a step, and the random stream is put back."""
    net = Net(TRUNKS[trunk]())
    twin = copy.deepcopy(net)
    train_naively(twin, run(method, net, way))
    assert_same_model(net, twin)


# ---------------------------------------------------------------------- compiled


@pytest.fixture(scope="module")
def compiled():
    """Compiled once for all methods: forward, backward, and a forward pass without a graph."""
    torch.compiler.reset()
    net = Net(plain())
    start = copy.deepcopy(net.state_dict())
    forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    method = next(row for row in METHODS if row.id == "FAMO-adam")
    with torch._functorch.config.patch(donated_buffer=False):
        run(method, net, by_window, forward=forward)

    def fresh():
        net.load_state_dict(start)
        net.zero_grad()
        return net, forward

    return fresh


@pytest.mark.capability("torch.compile")
@over_each_method
def test_a_compiled_model_trains_as_it_does_uncompiled(method, compiled):
    for way in (by_closure if method.observes else by_combined_loss, by_window):
        net, forward = compiled()
        twin = Net(plain())
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(method, net, way, forward=forward)
        run(method, twin, way)
        assert_same_model(net, twin)


def compiled_run(method, net, forward, steps=2):
    optimizer = BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), method.make(NAMES))
    for step in range(steps):
        optimizer.step(lambda: net.losses(batch_of(step), forward))  # noqa: B023
    return net


def compiled_net(backend, trunk=plain):
    torch.compiler.reset()
    net = Net(trunk())
    return net, torch.compile(net, backend=backend)


@over_some("AnalyticQP", "MGDA-none")
def test_donated_buffers_are_refused_with_the_setting_that_helps(method):
    """A model that was compiled for single passes writes over what the other K - 1 need."""
    net, forward = compiled_net("aot_eager")
    sum(net.losses(batch_of(0), forward).values()).backward()
    net.zero_grad()
    optimizer = BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), method.make(NAMES))
    before = whole_state(net, optimizer)
    with pytest.raises(BalanceError, match=r"`torch\._functorch\.config\.donated_buffer = False`"):
        optimizer.backward(net.losses(batch_of(0), forward))
    assert whole_state(net, optimizer) == before

    with torch._functorch.config.patch(donated_buffer=False):
        net, forward = compiled_net("aot_eager")
        sum(net.losses(batch_of(0), forward).values()).backward()
        compiled_run(method, net, forward)
    assert_same_model(net, compiled_run(method, Net(plain()), None))


SCRIPT_METHOD = "ignore:.*torch.jit.script_method.*:DeprecationWarning"  # of inductor itself


@pytest.mark.slow
@pytest.mark.filterwarnings(SCRIPT_METHOD)
@over_some("Sum", "FAMO-adam", "AnalyticQP", "MGDA-every")
@pytest.mark.parametrize("trunk", [plain, Normalized], ids=lambda trunk: trunk.__name__)
def test_inductor(method, trunk):
    """The compiler that torch.compile takes by default."""
    with torch._functorch.config.patch(donated_buffer=False):
        net, forward = compiled_net("inductor", trunk)
        compiled_run(method, net, forward, steps=4)
    twin = compiled_run(method, Net(trunk()), None, steps=4)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings(SCRIPT_METHOD)
@over_some("FAMO-no-decay")
def test_inductor_repeats_its_random_numbers_in_the_second_evaluation(method):
    net, forward = compiled_net("inductor", Noisy)
    optimizer = BalancedOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), method.make(NAMES))
    seen = []
    for step in range(3):
        optimizer.step(lambda: seen.append(net.losses(batch_of(step), forward)) or seen[-1])  # noqa: B023
    for first, again in zip(seen[::2], seen[1::2], strict=True):
        assert snapshot(again) == snapshot({name: loss.detach() for name, loss in first.items()})
