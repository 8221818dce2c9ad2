"""What the second evaluation must not stumble over: compilers, and autocast's memory."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch import nn

from moo_balance import FAMO, BalancedOptimizer, BalancedTrajectory
from tests.support.problems import snapshot

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
STEPS = 4

over_watching = pytest.mark.parametrize(
    "weighting", [FAMO(), BalancedTrajectory()], ids=["FAMO", "BalancedTrajectory"]
)


class Noisy(nn.Module):
    """With running statistics and with random numbers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, inputs):
        outputs = self.layers(inputs)
        return {"size": outputs.square().mean(), "error": 10 * (outputs - inputs).square().mean()}


def trained(weighting, prepare=lambda model: model, around=contextlib.nullcontext):
    """Everything after a few steps: `prepare` the model, and stay in the region `around` it."""
    torch.manual_seed(0)
    model = Noisy()
    prepared = prepare(model)
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), weighting)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with around():
            optimizer.backward(partial(prepared, INPUTS))
            optimizer.step()
    return snapshot({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def in_place(model, backend):
    model.compile(backend=backend)
    return model


@pytest.mark.capability("torch.compile")
@over_watching
@pytest.mark.parametrize(
    "compiled",
    [torch.compile, partial(torch.compile, fullgraph=True), in_place],
    ids=["whole", "fullgraph", "in place"],
)
def test_a_compiled_model_is_compiled_once_for_each_kind_of_pass(compiled, weighting):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    assert trained(weighting, partial(compiled, backend=backend)) == trained(weighting)
    assert len(graphs) == 2


def test_calls_are_as_before():
    call = nn.Module.__call__
    trained(FAMO())
    assert nn.Module.__call__ is call


@pytest.mark.capability("mixed precision with autocast")
@over_watching
def test_an_open_autocast_region_does_not_hide_the_step(weighting):
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    fresh = partial(bfloat16, cache_enabled=False)
    assert trained(weighting, around=bfloat16) == trained(weighting, around=fresh)
