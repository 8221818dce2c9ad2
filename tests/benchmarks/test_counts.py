"""What the library promises about memory and waiting, as numbers that are counted, not timed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import workloads
from benchmarks.contestants import Stand
from benchmarks.counts import WAYS, HostLooks, PeakNumbers, held_numbers
from moo_balance import MGDA, BalancedOptimizer
from moo_balance.engine import Problem, Streaming
from tests.support.registry import NAMES, over_methods

META = torch.device("meta")


def looks(weighting, count, **arguments):
    """What the host looks at between the losses and the end of the step."""
    stand = Stand.of(workloads.mlp(count, width=8, depth=1, batch=2), META)
    optimizer = BalancedOptimizer(stand.optimizer, weighting)
    outcome = stand.outcome()
    if arguments.pop("at_features", False):
        arguments["features"] = outcome.features
    with HostLooks() as counted:
        optimizer.backward(named(outcome.losses), **arguments)
        optimizer.step()
        if weighting.observes_step:
            optimizer.observe(named(stand.outcome().losses))
    return counted.looks


def named(losses):
    """By the names that the registry has arguments for; by their own where they are more."""
    names = NAMES if len(losses) <= len(NAMES) else losses
    return dict(zip(names, losses.values(), strict=False))


@over_methods
def test_no_look_at_two_losses_and_at_most_one_at_more(method):
    assert looks(method.make(NAMES[:2]), 2) == []
    assert len(looks(method.make(NAMES), 3)) <= 1


@pytest.mark.parametrize("exact", [False, True])
def test_features_add_no_look(exact):
    assert looks(MGDA(), 2, at_features=True, exact=exact) == []
    assert len(looks(MGDA(), 8, at_features=True, exact=exact)) <= 1


def test_a_look_is_counted():
    value = torch.ones(2, 2, device=META)
    with HostLooks() as counted:
        value.sum().item()
        value.tolist()
        bool(value.sum() > 0)
        value.to("cpu")
    assert len(counted.looks) == 4


# ---------------------------------------------------------------------- numbers that are held

COUNT, WIDTH, BATCH, OUTPUTS = 6, 32, 4, 8
TRUNK = WIDTH * WIDTH + WIDTH
HEAD = WIDTH * OUTPUTS + OUTPUTS
FEATURES = BATCH * WIDTH
SMALL = 12 * COUNT**2
"""Losses, weights, the Gramian and its like."""

HELD = {
    "one gradient per loss": COUNT * (TRUNK + HEAD),
    "at features": COUNT * (FEATURES + HEAD),
    "exact, behind features": COUNT * (TRUNK + HEAD + FEATURES),
}


def held(way, count=COUNT, batch=BATCH):
    make = partial(workloads.mlp, count, width=WIDTH, depth=1, batch=batch)
    stand = Stand.of(make(), torch.device("cpu"))
    return held_numbers(lambda weighting: WAYS[way](weighting)(stand))


@pytest.mark.parametrize("way", HELD)
def test_no_more_is_held_than_rows_that_a_loss_reaches(way):
    activations = 2 * FEATURES  # of the forward pass: the features, which the test itself holds
    assert held(way) <= HELD[way] + activations + SMALL


def test_rows_are_really_counted():
    """Of so many samples that nothing takes less room than the rows themselves."""
    assert held("one gradient per loss", batch=16 * WIDTH) >= HELD["one gradient per loss"]


def test_streaming_holds_no_rows():
    assert held("streaming", 12) <= held("streaming", 3) + 9 * HEAD + SMALL * 4


def test_streaming_holds_the_cotangents_of_one_cut_at_a_time():
    count, width, batch = 32, 512, 128
    stand = Stand.of(workloads.mlp(count, width=width, batch=batch), torch.device("cpu"))
    losses = stand.outcome().losses
    problem = Problem(list(losses), list(losses.values()), stand.params)
    with PeakNumbers() as counted:
        Streaming().linearize(problem).gramian()
    heads = count * (width * OUTPUTS + OUTPUTS)
    pieces = 2 * 2**17  # of them, side by side, and these multiplied
    assert counted.most <= (count + 1) * batch * width + heads + pieces


def test_numbers_are_counted_for_as_long_as_they_are_held():
    with PeakNumbers() as counted:
        kept = torch.ones(10)
        view = kept[:5]
        del kept
        assert counted.now == 10
        del view
        assert counted.now == 0
        torch.ones(3)
    assert counted.most == 10
