"""A closure is evaluated again after the step: the same random numbers, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from moo_balance import (
    FAMO,
    BalancedOptimizer,
    BalancedTrajectory,
    BalanceError,
    BalanceValueError,
    NonFiniteError,
)
from moo_balance._hints import add_note
from moo_balance._reevaluation.copies import INTERVAL, Copies
from moo_balance._reevaluation.reachable import find_reachable
from moo_balance._reevaluation.writes import watch_writes
from tests.support.problems import snapshot, whole_state
from tests.support.registry import KINDS, over, over_each_method

pytestmark = pytest.mark.capability("dropout and BatchNorm in methods that observe the step")

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Quantizer(nn.Module):
    """Additive uniform noise, and a running average that is assigned, not updated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros((), dtype=torch.float64))
        self.register_buffer("unused", None)

    def forward(self, x):
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean()
        return x + torch.rand_like(x) - 0.5


class Noisy(nn.Module):
    """Everything that changes when a forward pass runs twice."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Quantizer(), nn.Linear(6, 2)]
        self.body = nn.Sequential(*layers).double()

    def losses(self):
        outputs = self.body(INPUTS) + 0.01 * torch.randn(16, 2, dtype=torch.float64)
        return {"a": outputs[:, 0].square().mean(), "b": (outputs[:, 1] - 1).square().mean()}


def noisy(weighting, lr=0.01):
    torch.manual_seed(0)
    model = Noisy()
    return model, BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=lr), weighting)


def by_step(model, optimizer):
    optimizer.step(model.losses)


def by_backward(model, optimizer):
    optimizer.zero_grad()
    optimizer.backward(model.losses)
    optimizer.step()


over_forms = pytest.mark.parametrize("take", [by_step, by_backward])


@over_forms
@pytest.mark.parametrize(
    "weighting",
    [FAMO(decay=0.0, logit_optimizer="sgd"), BalancedTrajectory(decay=0.0, logit_optimizer="sgd")],
)
def test_the_losses_are_the_same_after_a_step_at_rate_zero(take, weighting):
    model, optimizer = noisy(weighting, lr=0.0)
    seen = []
    evaluate = model.losses
    model.losses = lambda: seen.append(evaluate()) or seen[-1]
    take(model, optimizer)
    first, again = seen
    assert snapshot(first) == snapshot(again)
    assert all(loss.requires_grad for loss in again.values())
    assert optimizer.state_dict()["balance"]["state"]["logits"].tolist() == [0.0, 0.0]


def test_the_losses_differ_in_proportion_to_a_small_step():
    """With other random numbers the difference would not vanish with the learning rate."""

    def change(lr):
        model, optimizer = noisy(FAMO(decay=0.0, logit_optimizer="sgd"), lr=lr)
        by_step(model, optimizer)
        return optimizer.state_dict()["balance"]["state"]["logits"]

    torch.testing.assert_close(change(1e-6), change(1e-5) / 10, rtol=1e-3, atol=0)


@over_forms
@over(lambda method: method.observes or method in KINDS)
def test_a_run_with_closures_is_the_run_that_is_given_the_losses(method, take):
    """The twin observes the losses that the run saw, and never evaluates twice."""
    names = ("a", "b")
    model, optimizer = noisy(method.make(names))
    evaluate, calls = model.losses, []
    model.losses = lambda: calls[-1].append(evaluate()) or calls[-1][-1]
    for _ in range(4):
        calls.append([])
        take(model, optimizer)
    del model.losses
    end = (whole_state(model, optimizer), snapshot(torch.get_rng_state()))

    twin, other = noisy(optimizer.weighting)
    for _, *again in calls:
        other.zero_grad()
        other.backward(twin.losses())
        other.step()
        for losses in again:
            other.observe(losses)
    assert (whole_state(twin, other), snapshot(torch.get_rng_state())) == end


@over_each_method
def test_closures_are_evaluated_again_only_for_observing_methods_and_when_due(method):
    model, optimizer = noisy(method.make(("a", "b")))
    evaluate, count = model.losses, []
    model.losses = lambda: count.append(1) or evaluate()
    for _ in range(6):
        by_step(model, optimizer)
    again = sum(optimizer.weighting.needs(step).observes for step in range(6))
    assert len(count) == 6 + again


@over_forms
def test_a_step_under_no_grad_trains(take):
    """Some trainers call it there."""
    model, optimizer = noisy(FAMO())
    before = snapshot(model.state_dict())
    with torch.no_grad():
        take(model, optimizer)
    assert snapshot(model.state_dict()) != before


def test_losses_of_shape_one_are_balanced_under_no_grad_too():
    model, optimizer = noisy(FAMO(lagged=True))
    losses = {name: loss.reshape(1) for name, loss in model.losses().items()}
    with torch.no_grad():
        optimizer.backward(losses)
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------- what is put back


def buffers_of(model):
    return {name: (id(buffer), snapshot(buffer)) for name, buffer in model.named_buffers()}


def test_an_error_in_the_second_evaluation_leaves_random_numbers_and_buffers_as_they_were():
    model, optimizer = noisy(FAMO())
    after_the_first = []

    def closure():
        losses = model.losses()
        if after_the_first:
            raise KeyError
        after_the_first.append((buffers_of(model), snapshot(torch.get_rng_state())))
        return losses

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert [(buffers_of(model), snapshot(torch.get_rng_state()))] == after_the_first
    assert torch.is_grad_enabled()


class Counter(nn.Module):
    """Counts its calls in a buffer that it may share with others, next to buffers of odd kinds."""

    def __init__(self, count: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("count", count)
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("sparse", torch.eye(2).to_sparse())

    def forward(self):
        self.count += 1
        return self.weight.square()


def test_buffers_of_any_kind_are_put_back():
    count = torch.zeros(())
    first, second = Counter(count), Counter(count)
    before = [id(buffer) for buffer in (*first.buffers(), *second.buffers())]
    params = [*first.parameters(), *second.parameters()]
    optimizer = BalancedOptimizer(torch.optim.SGD(params, lr=0.1), FAMO())
    optimizer.step(lambda: {"a": first(), "b": second()})
    assert float(count) == 2.0
    assert [id(buffer) for buffer in (*first.buffers(), *second.buffers())] == before


def test_buffers_of_modules_in_evaluation_mode_are_put_back():
    counter = Counter(torch.zeros(())).eval()
    optimizer = BalancedOptimizer(torch.optim.SGD(counter.parameters(), lr=0.1), FAMO())
    optimizer.step(lambda: {"a": counter(), "b": 2 * counter()})
    assert float(counter.count) == 2.0


# ---------------------------------------------------------------------- compilers and autocast

ROWS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

over_observing = pytest.mark.parametrize(
    "weighting", [FAMO(), BalancedTrajectory()], ids=["FAMO", "BalancedTrajectory"]
)


class NoisyFloat32(nn.Module):
    """With running statistics and with random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs):
        outputs = self.layers(inputs)
        return {"size": outputs.square().mean(), "error": 10 * (outputs - inputs).square().mean()}


def end_of_run(weighting, prepare=lambda model: model, region=contextlib.nullcontext):
    """All state after four steps of a prepared model, in a region such as autocast."""
    torch.manual_seed(0)
    model = NoisyFloat32()
    prepared = prepare(model)
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting)
    for _ in range(4):
        optimizer.zero_grad()
        with region():
            optimizer.backward(partial(prepared, ROWS))
            optimizer.step()
    return whole_state(model, optimizer)


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.capability("torch.compile")
@over_observing
@pytest.mark.parametrize(
    "compiler",
    [torch.compile, partial(torch.compile, fullgraph=True), compile_in_place],
    ids=["whole", "fullgraph", "in place"],
)
def test_a_compiled_model_is_compiled_once(compiler, weighting):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    assert end_of_run(weighting, partial(compiler, backend=backend)) == end_of_run(weighting)
    assert len(graphs) == 1


@pytest.mark.capability("mixed precision with autocast")
@over_observing
def test_weights_that_autocast_has_cached_do_not_hide_the_step(weighting):
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    uncached = partial(bfloat16, cache_enabled=False)
    assert end_of_run(weighting, region=bfloat16) == end_of_run(weighting, region=uncached)


# ---------------------------------------------------------------------- any model

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two losses of `body`'s outputs."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs=X):
        outputs = self.body(inputs)
        return {"a": outputs.square().mean(), "b": (outputs - 1).square().mean()}


class Codebook(nn.Module):
    """Vector quantization with an exponential moving average, kept as chosen by `hold`."""

    def __init__(self, hold, in_place=True):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        codes = torch.randn(8, 4)
        if hold == "parameter":
            self.codes = nn.Parameter(codes)
        elif hold == "frozen parameter":
            self.codes = nn.Parameter(codes, requires_grad=False)
        else:
            self.register_buffer("codes", codes)
        self.in_place = in_place
        self.updates = 0

    def forward(self, inputs):
        encoded = self.linear(inputs)
        nearest = torch.cdist(encoded, self.codes.detach()).argmin(1)
        codes = self.codes.detach()[nearest]
        with torch.no_grad():
            members = nn.functional.one_hot(nearest, 8).T.float()
            means = members @ encoded / members.sum(1, keepdim=True).clamp(min=1.0)
            if self.in_place:
                self.codes.data.mul_(0.5).add_(means, alpha=0.5)
            else:
                self.codes.data = 0.5 * self.codes.data + 0.5 * means
        self.updates += 1
        return encoded + (codes - encoded).detach() + (encoded - codes).square()


class MomentumEncoder(nn.Module):
    """A second encoder that follows the first, as in momentum contrast."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.key.requires_grad_(False)
        self.register_buffer("queue", torch.randn(4, 32))
        self.register_buffer("start", torch.zeros(1, dtype=torch.long))

    def forward(self, inputs):
        queries = self.query(inputs)
        with torch.no_grad():
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = 0.9 * mine.data + 0.1 * other.data
            keys = self.key(inputs)
        logits = queries @ self.queue.clone() + (queries * keys).sum(1, keepdim=True)
        start = int(self.start)
        self.queue[:, start : start + 16] = keys.T
        self.start[0] = (start + 16) % 32
        return logits


class WithoutModule:
    """Running statistics in a plain object, which no module owns."""

    def __init__(self):
        self.linear, self.mean = nn.Linear(4, 4), torch.zeros(4)
        self.by_name = {"history": [torch.zeros(2, 4)]}

    def parameters(self):
        return self.linear.parameters()

    def __call__(self):
        outputs = self.linear(X)
        self.mean.lerp_(outputs.detach().mean(0), 0.5)
        self.by_name["history"][0][1].add_(self.mean)
        outputs = outputs - self.mean + self.by_name["history"][0][1]
        return {"a": outputs.square().mean(), "b": (outputs - 1).square().mean()}


class Noise(nn.Module):
    """Noise from NumPy, Python and torch, the odd normal numbers included."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        outputs = self.linear(inputs)
        outputs = outputs + torch.from_numpy(np.random.rand(*outputs.shape)).float()
        outputs = outputs * random.gauss(1.0, 0.1) + np.random.randn()
        if random.random() < 0.5:
            outputs = outputs + torch.randn_like(outputs)
        return outputs


class Penalty(nn.Module):
    """A gradient penalty, which differentiates within the loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs=X):
        inputs = inputs.clone().requires_grad_()
        outputs = self.layers(inputs).sum()
        (slope,) = torch.autograd.grad(outputs, inputs, create_graph=True)
        return {"a": (outputs - 1).square(), "b": slope.square().mean()}


class BackwardInside(nn.Module):
    """Trains a critic of its own by a backward pass within the loss."""

    def __init__(self):
        super().__init__()
        self.linear, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)

    def parameters(self, recurse=True):
        return self.linear.parameters(recurse)

    def forward(self, inputs=X):
        outputs = self.linear(inputs)
        self.critic(outputs.detach()).square().mean().backward()
        return {"a": outputs.square().mean(), "b": self.critic(outputs).square().mean() + 1}


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.options = options

    def forward(self, inputs):
        inputs = inputs.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(self.block, inputs, **self.options)


class Tokens(nn.Module):
    """Embeddings that are renormalised in place."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4, max_norm=0.5)

    def forward(self, inputs):
        return self.embedding(torch.arange(16) % 8)


class InPlaceInput(nn.Module):
    """Normalizes its input in place, where the caller sees it."""

    def __init__(self):
        super().__init__()
        self.linear, self.inputs = nn.Linear(4, 4), X.clone()

    def forward(self, _):
        return self.linear(self.inputs.mul_(0.5).add_(0.25))


class Inference(nn.Module):
    """Buffers made in inference mode, one of them written there."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.inference_mode():
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("scale", torch.ones(4))

    def forward(self, inputs):
        with torch.inference_mode():
            self.count += 1
        return self.linear(inputs) * self.scale.clone() + float(self.count)


class ReadStatistics(nn.Module):
    """Running statistics that training mode reads, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, inputs):
        outputs = self.linear(inputs) + self.norm.running_mean.sin()
        return self.norm(outputs) * self.norm.running_var.mean()


class CountedInNumpy(nn.Module):
    """A buffer that is written without PyTorch's knowledge."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("usage", torch.zeros(4))

    def forward(self, inputs):
        self.usage.numpy()[0] += 1
        return self.linear(inputs) + self.usage.clone()


class SometimesNormal(nn.Module):
    """Draws one normal number at a time, of which NumPy keeps the second."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.linear(inputs) + float(np.random.randn())


class Resized(nn.Module):
    """A cache that grows, and one that is exchanged."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("cache", torch.ones(2))
        self.other = [torch.ones(3)]

    def forward(self, inputs):
        scale = self.cache.sum() + self.other[0].sum()
        self.cache.resize_(self.cache.numel() + 1).fill_(0.5)
        self.other[0].set_(torch.full((2,), 7.0))
        return self.linear(inputs) * scale


def transformer(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 2).train(training)


def linear_with(norm):
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.jit.script(linear_with(nn.BatchNorm1d(4)))


SPECTRAL = nn.utils.parametrizations.spectral_norm

MODELS = {
    "batch norm": lambda: Model(linear_with(nn.BatchNorm1d(4))),
    "cumulative batch norm": lambda: Model(linear_with(nn.BatchNorm1d(4, momentum=None))),
    "batch norm in evaluation": lambda: Model(linear_with(nn.BatchNorm1d(4)).eval()),
    "batch norm whose statistics are read": lambda: Model(ReadStatistics()),
    "scripted": lambda: Model(scripted()),
    "buffer written by NumPy": lambda: Model(CountedInNumpy()),
    "noise from NumPy": lambda: Model(SometimesNormal()),
    "dropout": lambda: Model(linear_with(nn.Dropout(0.5))),
    "transformer": lambda: Model(transformer(True)),
    "transformer in evaluation": lambda: Model(transformer(False)),
    "spectral norm": lambda: Model(nn.Sequential(SPECTRAL(nn.Linear(4, 4)))),
    "old spectral norm": lambda: Model(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)))),
    "embedding": lambda: Model(Tokens()),
    "codebook": lambda: Model(Codebook("buffer")),
    "codebook, assigned": lambda: Model(Codebook("buffer", in_place=False)),
    "codebook in a parameter": lambda: Model(Codebook("parameter")),
    "codebook in a frozen parameter": lambda: Model(Codebook("frozen parameter")),
    "codebook in a parameter, assigned": lambda: Model(Codebook("parameter", in_place=False)),
    "momentum encoder": lambda: Model(MomentumEncoder()),
    "no module": WithoutModule,
    "noise": lambda: Model(Noise()),
    "gradient penalty": Penalty,
    "backward inside": BackwardInside,
    "checkpointed": lambda: Model(Checkpointed(use_reentrant=False)),
    "checkpointed, reentrant": lambda: Model(Checkpointed(use_reentrant=True)),
    "input in place": lambda: Model(InPlaceInput()),
    "inference mode": lambda: Model(Inference()),
    "resized": lambda: Model(Resized()),
    "lazy": lambda: Model(nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())),
    "instance norm": lambda: Model(
        nn.Sequential(
            nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
        )
    ),
    "compiled": lambda: compiled("aot_eager"),
    "compiled, with breaks": lambda: compiled("aot_eager", pause=True),
    "inductor": lambda: compiled("inductor"),
}


class Compiled(nn.Module):
    """What a compiler has to keep apart: running statistics, noise, codebooks of both kinds.

    What compiled code writes into a parameter is unknown in the first step.
    """

    def __init__(self, pause, writes_parameter):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("codes", torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.pause, self.writes_parameter = pause, writes_parameter

    def forward(self, inputs):
        outputs = self.drop(self.norm(self.linear(inputs)))
        outputs = outputs + self.codes + self.frozen
        if self.pause:
            torch._dynamo.graph_break()
        with torch.no_grad():
            self.codes.mul_(0.9).add_(0.1 * outputs.detach().mean(0))
            if self.writes_parameter:
                self.frozen.data.mul_(0.5)
        return outputs


def compiled(backend, pause=False):
    torch.compiler.reset()
    return torch.compile(Model(Compiled(pause, backend != "inductor")), backend=backend)


def parametrize_models():
    marks = {"inductor": [pytest.mark.slow, pytest.mark.capability("torch.compile")]}
    return [pytest.param(make, id=id, marks=marks.get(id, [])) for id, make in MODELS.items()]


over_models = pytest.mark.parametrize("make", parametrize_models())


def trace_of(model):
    """All that a forward pass might change."""
    attributes = [
        {name: snapshot(value) if isinstance(value, torch.Tensor) else id(value)}
        for module in ([model] if not isinstance(model, nn.Module) else model.modules())
        for name, value in vars(module).items()
    ]
    tensors = (
        {"mean": model.mean, "history": model.by_name["history"][0]}
        if isinstance(model, WithoutModule)
        else dict([*model.named_parameters(), *model.named_buffers()])
    )
    grads = [None if each.grad is None else snapshot(each.grad) for each in tensors.values()]
    streams = snapshot(torch.get_rng_state()), random.getstate(), str(np.random.get_state())
    ids = [id(tensor) for tensor in tensors.values()]
    return attributes, ids, snapshot(tensors), grads, streams


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning", "ignore::DeprecationWarning")
@over_models
def test_at_rate_zero_the_second_evaluation_sees_the_same_and_leaves_nothing(make):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    np.random.randn()  # leaves the second of a pair of normal numbers
    model = make()
    model()  # lazy modules, and a compiler, are ready
    weighting = BalancedTrajectory(decay=0.0, logit_optimizer="sgd")
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), weighting)
    for _ in range(7):
        optimizer.zero_grad()
        seen = []

        def closure():
            losses = model()
            seen.append({name: float(loss.detach()) for name, loss in losses.items()})  # noqa: B023
            return losses

        optimizer.backward(closure)
        end = trace_of(model)
        optimizer.step()
        assert trace_of(model) == end
        first, again = seen
        assert first == again
    assert optimizer.state_dict()["balance"]["state"]["logits"].tolist() == [0.0, 0.0]


def test_autocast_around_the_first_evaluation_is_that_of_the_second():
    torch.manual_seed(0)
    model, seen = nn.Linear(8, 2), []

    def closure():
        outputs = model(torch.ones(4, 8))
        seen.append(outputs.dtype)
        return {"a": outputs.square().mean(), "b": (outputs - 1).square().mean()}

    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), FAMO())
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.backward(closure)
    optimizer.step()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_what_a_closure_refers_to_is_not_computed():
    """A dead reference, and a mapping that computes its elements."""

    class Rows(Mapping):
        def __getitem__(self, key):
            raise OSError("closed")

        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            return 3

    class Thing:
        pass

    thing = Thing()
    dead, rows = weakref.proxy(thing), Rows()
    del thing
    many = [[number] * 50 for number in range(1000)]
    model = nn.Linear(2, 2)

    def closure():
        return model, dead, rows, many

    assert find_reachable(closure).modules == [model]


# ---------------------------------------------------------------------- errors


class InterruptionError(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


def another(losses):
    return {"a": losses["a"], "c": losses["b"]}


def fail(error, *arguments):
    def change(_):
        raise error(*arguments)

    return change


WRONG = {
    "a user's error": (fail(KeyError, "x"), KeyError),
    "out of memory": (fail(torch.OutOfMemoryError, "x"), torch.OutOfMemoryError),
    "interrupt": (fail(InterruptionError), InterruptionError),
    "other names": (another, BalanceValueError),
    "a missing loss": (lambda losses: {"a": losses["a"]}, BalanceValueError),
    "nothing": (lambda _: None, BalanceValueError),
    "no loss": (lambda _: {"a": "high", "b": "low"}, BalanceValueError),
    "not finite": (lambda losses: {**losses, "b": losses["b"] / 0.0}, NonFiniteError),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@over_forms
@pytest.mark.parametrize(("change", "error"), WRONG.values(), ids=WRONG)
def test_an_error_in_the_second_evaluation_says_so_and_does_not_block_the_run(
    change, error, take, micro_batches
):
    if micro_batches == 2 and take is by_step:
        pytest.skip("`step` takes one batch")
    model, optimizer = noisy(FAMO())
    calls = []

    def closure():
        calls.append(None)
        losses = model.losses()
        return losses if len(calls) <= micro_batches else change(losses)

    weight = snapshot(model.body[0].weight)
    if take is by_backward:
        for _ in range(micro_batches - 1):
            with optimizer.accumulate():
                optimizer.backward(closure)
        optimizer.backward(closure)
    after = buffers_of(model), snapshot(torch.get_rng_state())
    with pytest.raises(error) as caught:
        optimizer.step(closure if take is by_step else None)
    if take is by_backward:
        assert (buffers_of(model), snapshot(torch.get_rng_state())) == after
    (note,) = caught.value.__notes__
    assert note.startswith("The step was taken.")
    assert "FAMO goes on" in note
    assert snapshot(model.body[0].weight) != weight
    assert optimizer.state_dict()["balance"]["steps"] == 1
    assert optimizer.state_dict()["balance"]["awaiting"] is None
    optimizer.observe(model.losses())  # nothing waits for it
    take(model, optimizer)
    assert optimizer.state_dict()["balance"]["steps"] == 2


def test_what_is_given_to_observe_may_be_corrected():
    model, optimizer = noisy(FAMO())
    optimizer.backward(model.losses())
    optimizer.step()
    before = snapshot(optimizer.state_dict()["balance"]["state"])
    with pytest.raises(BalanceValueError, match="none of the declared ones"):
        optimizer.observe(another(model.losses()))
    with pytest.raises(BalanceError, match="needs the losses"):
        optimizer.backward(model.losses())
    optimizer.observe(model.losses())
    assert snapshot(optimizer.state_dict()["balance"]["state"]) != before


def test_a_note_without_add_note():
    """As in Python 3.10."""

    class OldError(Exception):
        add_note = property()

    error = OldError()
    add_note(error, "one")
    add_note(error, "two")
    assert error.__notes__ == ["one", "two"]


# ---------------------------------------------------------------------- observe, checkpoints


@pytest.mark.parametrize("overflow_at", [0, 1])
def test_observe_after_a_step_that_the_scaler_has_skipped_does_nothing(overflow_at):
    model, optimizer = noisy(FAMO())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(), grad_scaler=scaler)
        if step == overflow_at:
            model.body[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        before = snapshot(optimizer.state_dict()["balance"]["state"])
        optimizer.observe(model.losses())
        after = snapshot(optimizer.state_dict()["balance"]["state"])
        assert (after == before) == (step == overflow_at)
    assert optimizer.state_dict()["balance"]["steps"] == 2


def test_observe_after_a_first_step_that_was_skipped_does_nothing():
    model, _ = noisy(FAMO())
    optimizer = BalancedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), FAMO(), nonfinite="skip"
    )
    optimizer.backward({name: loss / 0.0 for name, loss in model.losses().items()})
    with pytest.raises(BalanceError, match="should follow `step`"):
        optimizer.observe(model.losses())
    optimizer.step()
    optimizer.observe(model.losses())
    assert optimizer.state_dict()["balance"]["steps"] == 0


@pytest.mark.filterwarnings("ignore:FAMO continues with other arguments")
def test_a_checkpoint_that_waits_does_not_block_a_method_that_observes_nothing():
    model, optimizer = noisy(FAMO())
    optimizer.backward(model.losses())
    optimizer.step()
    state = optimizer.state_dict()
    model, other = noisy(FAMO())
    other.load_state_dict(state)
    with pytest.raises(BalanceError, match="needs the losses"):
        other.backward(model.losses())
    model, other = noisy(FAMO(lagged=True))
    with pytest.warns(UserWarning, match="lagged=True"):
        other.load_state_dict(state)
    other.backward(model.losses())


def test_observe_may_be_repeated_after_a_loss_below_its_bound():
    model, optimizer = noisy(FAMO())
    losses = model.losses()
    optimizer.backward(losses)
    optimizer.step()
    with pytest.raises(BalanceError, match="should be at least 0"):
        optimizer.observe({name: -1 - loss.detach() for name, loss in losses.items()})
    with pytest.raises(BalanceError, match="needs the losses"):
        optimizer.backward(model.losses())
    optimizer.observe(losses)
    optimizer.backward(model.losses())


# ---------------------------------------------------------------------- threads


def test_a_second_evaluation_leaves_other_threads_alone():
    """Another thread trains a BatchNorm model, and runs modules, while this one evaluates again."""
    other, inputs = nn.BatchNorm1d(4), torch.randn(8, 4)
    inside, done = threading.Event(), threading.Event()
    counts = []

    def train():
        inside.wait(10)
        for _ in range(5):
            other(inputs)
        counts.append(int(other.num_batches_tracked))
        done.set()

    model, optimizer = noisy(FAMO())
    calls = []

    def closure():
        losses = model.losses()
        calls.append(None)
        if len(calls) == 2:
            inside.set()
            assert done.wait(10)
        return losses

    thread = threading.Thread(target=train)
    thread.start()
    optimizer.step(closure)
    thread.join()
    twin = nn.BatchNorm1d(4)
    for _ in range(5):
        twin(inputs)
    assert counts == [5]
    assert snapshot(other.state_dict()) == snapshot(twin.state_dict())


def test_two_threads_train_with_methods_that_observe_the_step():
    """Each run, without random numbers, ends as it does alone."""

    def train(results, name):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(name)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator))
        model = Model(model)
        optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FAMO())
        for _ in range(20):
            optimizer.step(partial(model, X))
        results[name] = whole_state(model, optimizer)

    alone, together = {}, {}
    for name in (1, 2):
        train(alone, name)
    threads = [threading.Thread(target=train, args=(together, name)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# ---------------------------------------------------------------------- what is written


def test_a_method_that_is_called_directly_is_seen():
    """As a Lightning module's ``training_step``, past ``nn.Module.__call__``."""

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("level", torch.zeros(()))

        def training_step(self):
            outputs = self.linear(X)
            self.level = self.level + 1
            return {"a": outputs.square().mean(), "b": outputs.abs().mean()}

    model = Direct()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FAMO())
    for step in range(3):
        optimizer.step(lambda: model.training_step())
        assert float(model.level) == step + 1


def test_a_tensor_is_copied_once_and_new_tensors_are_not():
    reports = []
    old = torch.zeros(4)
    with watch_writes(lambda tensor, effect: reports.append((tensor, effect.reshapes))):
        new = torch.zeros(4)
        new += 1
        new[1:].mul_(2)
        torch.add(new, 1, out=new)
        nn.functional.dropout(new, 0.5)
        old[0] = 1
        torch.add(new, 1, out=old)
        old.data.t_()
    addresses = [(tensor.data_ptr(), reshapes) for tensor, reshapes in reports]
    assert addresses == [
        (old.data_ptr(), False),
        (old.data_ptr(), False),
        (old.data_ptr(), True),
    ]
    copies = Copies()
    copies.add(old[1:])
    copies.add(old[:2])
    assert len(copies.storages) == 1


def test_what_a_known_model_writes_is_rarely_watched(monkeypatch):
    watched = []

    def watch(report):
        watched.append(None)
        return watch_writes(report)

    monkeypatch.setattr("moo_balance._reevaluation.copies.watch_writes", watch)
    model, optimizer = noisy(FAMO())
    for _ in range(30):
        by_step(model, optimizer)
    # Two first evaluations; the second ones of steps 1 to 4, 10, 20 and 30.
    assert len(watched) == 9
    watched.clear()
    model.body[1].eval()  # what it writes may change
    by_step(model, optimizer)
    assert len(watched) == 1


class Late(nn.Module):
    """Begins to write after some steps: into a buffer, a plain tensor, or ``.data``."""

    def __init__(self, begin):
        super().__init__()
        self.begin = begin
        self.linear = nn.Linear(4, 4)
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("other", torch.zeros(()))
        self.plain = torch.zeros(())
        self.held = [torch.zeros(())]

    def forward(self, inputs):
        self.begin -= 1
        if self.begin < 0:
            self.level += 1
            self.other.data.add_(1)
            self.plain.add_(1)
            self.held[0].add_(1)
        return self.linear(inputs)


def test_writes_that_begin_late():
    late = Late(begin=12)
    model = Model(late)
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FAMO())
    for step in range(40):
        optimizer.step(model)
        assert float(late.level) == max(0, step - 11)
        assert float(late.plain) == float(late.level)
    assert float(late.other) == float(late.held[0]) == float(late.level)


def test_writes_that_begin_late_and_are_not_counted_are_missed_for_a_few_steps():
    late = Late(begin=12)
    del late.level
    late.level = 0
    model = Model(late)
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), FAMO())
    for _ in range(40):
        optimizer.step(model)
    assert late.level == 28
    assert 28 <= float(late.other) < 28 + INTERVAL


def test_batches_that_are_changed_in_place_are_put_back_and_freed():
    model = Model(nn.Linear(4, 4))
    weighting = BalancedTrajectory(decay=0.0, logit_optimizer="sgd")
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), weighting)
    references = []
    for _ in range(6):
        batch = X.clone()
        references.append(weakref.ref(batch))
        optimizer.step(lambda batch=batch: model(batch.mul_(0.5)))
        assert torch.equal(batch, X / 2)
    batch = None
    gc.collect()
    assert optimizer.state_dict()["balance"]["state"]["logits"].tolist() == [0.0, 0.0]
    assert all(reference() is None for reference in references)


def test_modules_are_found_through_what_a_closure_refers_to():
    one, two = nn.Linear(1, 1), nn.Sequential(nn.ReLU())

    class Trainer:
        def __init__(self):
            self.parts = {"model": [one]}

        def loss(self):
            return GLOBAL(two)

    def outer():
        return (lambda: GLOBAL)()

    def modules(closure):
        return find_reachable(closure).modules

    assert modules(one.forward) == [one]
    assert modules(partial(print, two, key=one)) == [two, two[0], one]
    assert set(modules(Trainer().loss)) == {one, two, two[0], GLOBAL}
    assert modules(outer) == [GLOBAL]
    assert find_reachable(lambda: None) == ([], [])
    one.plain = torch.zeros(1)
    (tensor, plain) = find_reachable(partial(one, {"x": [X]})).tensors
    assert tensor is X
    assert plain is one.plain


GLOBAL = nn.Tanh()
