"""What the library promises about memory and synchronization, counted instead of timed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.speed import workloads
from benchmarks.speed.counts import MODES, HostSyncs, PeakElements, held_elements
from benchmarks.speed.implementations import Setup
from moo_balance import MGDA, BalancedOptimizer
from moo_balance.engine import Problem, Streaming
from tests.support.registry import NAMES, over

META = torch.device("meta")


def syncs(weighting, count, at_features=False):
    """Reads of the host between the losses and the end of the step."""
    setup = Setup.create(workloads.mlp(count, width=8, depth=1, batch=2), META)
    optimizer = BalancedOptimizer(setup.optimizer, weighting)
    outcome = setup.outcome()
    features = outcome.features if at_features else None
    with HostSyncs() as counted:
        optimizer.backward(rename(outcome.losses), features=features)
        optimizer.step()
        if weighting.observes_step:
            optimizer.observe(rename(setup.outcome().losses))
    return counted.syncs


def rename(losses):
    """Rename the losses as the registry's rows expect; more losses keep their own names."""
    names = NAMES if len(losses) <= len(NAMES) else losses
    return dict(zip(names, losses.values(), strict=False))


@over(lambda method: not method.id.startswith("GradDrop"))  # "meta" draws nothing
def test_two_losses_do_not_synchronize_and_more_do_at_most_once(method):
    """One more, and one with two losses, where a method does not leave out satisfied losses."""
    if method.host_reads is not None:
        assert len(syncs(method.make(NAMES), 3)) <= method.host_reads
        return
    reads_mask = int(not method.make(NAMES).leaves_out_satisfied)
    assert len(syncs(method.make(NAMES[:2]), 2)) <= 2 * reads_mask
    assert len(syncs(method.make(NAMES), 3)) <= 1 + reads_mask


def test_features_add_no_synchronization():
    assert syncs(MGDA(), 2, at_features=True) == []
    assert len(syncs(MGDA(), 8, at_features=True)) <= 1


def test_each_read_of_the_host_is_counted():
    value = torch.ones(2, 2, device=META)
    with HostSyncs() as counted:
        value.sum().item()
        value.tolist()
        bool(value.sum() > 0)
        value.to("cpu")
    assert len(counted.syncs) == 4


# ---------------------------------------------------------------------- elements that are held

COUNT, WIDTH, BATCH, OUTPUTS = 6, 32, 4, 8
TRUNK = WIDTH * WIDTH + WIDTH
HEAD = WIDTH * OUTPUTS + OUTPUTS
FEATURES = BATCH * WIDTH
SMALL = 12 * COUNT**2
"""Losses, weights, the Gramian and its like."""

HELD = {
    "one gradient per loss": COUNT * (TRUNK + HEAD),
    "at features": COUNT * (FEATURES + HEAD),
}


def held(mode, count=COUNT, batch=BATCH):
    make = partial(workloads.mlp, count, width=WIDTH, depth=1, batch=batch)
    setup = Setup.create(make(), torch.device("cpu"))
    return held_elements(lambda weighting: MODES[mode](weighting)(setup))


@pytest.mark.parametrize("mode", HELD)
def test_only_gradients_of_what_a_loss_reaches_are_held(mode):
    activations = 2 * FEATURES  # of the forward pass: the features, which the test itself holds
    assert held(mode) <= HELD[mode] + activations + SMALL


def test_rows_are_counted():
    """With so many samples that no other representation of the rows is smaller."""
    assert held("one gradient per loss", batch=16 * WIDTH) >= HELD["one gradient per loss"]


def test_streaming_holds_no_rows():
    assert held("streaming", 12) <= held("streaming", 3) + 9 * HEAD + SMALL * 4


def test_streaming_holds_the_cotangents_of_one_cut_at_a_time():
    count, width, batch = 32, 512, 128
    setup = Setup.create(workloads.mlp(count, width=width, batch=batch), torch.device("cpu"))
    losses = setup.outcome().losses
    problem = Problem(list(losses), list(losses.values()), setup.params)
    with PeakElements() as counted:
        Streaming().linearize(problem).gramian()
    heads = count * (width * OUTPUTS + OUTPUTS)
    pieces = 2 * 2**17  # chunks of them, stacked, and their products
    assert counted.peak <= (count + 1) * batch * width + heads + pieces


def test_elements_are_counted_as_long_as_they_are_held():
    with PeakElements() as counted:
        kept = torch.ones(10)
        view = kept[:5]
        del kept
        assert counted.now == 10
        del view
        assert counted.now == 0
        torch.ones(3)
    assert counted.peak == 10
