"""Everybody who takes part does take the step that is asked for, ours and others alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import workloads
from benchmarks.contestants import FORWARD, PLAIN, Stand, limit
from benchmarks.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.step_cost import CONTESTANTS, prepared
from tests.support.problems import flat_gradient

# That of TorchJD's vmap over attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

MAKES = {
    "codec": partial(workloads.codec, 1, channels=4, latent_channels=4),
    "transformer": partial(workloads.transformer, 2, width=8, length=4, batch=2),
    "PINN": partial(workloads.pinn, 4),
    "MLP": partial(workloads.mlp, 3, width=16, depth=1, batch=4),
    "ResNet": partial(workloads.resnet, 2, batch=2),
}
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


@pytest.fixture(params=MAKES)
def stand(request):
    with torch.random.fork_rng():
        stand = Stand.of(MAKES[request.param](), torch.device("cpu"))
        # Noise would make two forward passes two problems.
        stand.model.eval()
        yield stand


def rows_of(stand):
    """Whole gradients, one row per loss."""
    rows = []
    for loss in stand.outcome().losses.values():
        stand.model.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(flat_gradient(stand.model).double())
    return torch.stack(rows)


def gradient_of(name, stand):
    own = stand.copy()
    BY_NAME[name].build(own)()
    return flat_gradient(own.model).double()


def fits(name, stand):
    return BY_NAME[name].obstacle(stand.workload) is None


def test_every_step_combines_the_gradients_of_the_losses(stand):
    rows = rows_of(stand)
    steps, _ = prepared(CONTESTANTS, stand)
    assert {PLAIN, "limit", "Sum", "MGDA"} <= set(steps)
    for name in set(steps) - {FORWARD, MTL}:  # the heads of the latter get gradients of their own
        found = gradient_of(name, stand)
        weights = torch.linalg.lstsq(rows.T, found[:, None]).solution
        distance = (rows.T @ weights - found[:, None]).norm() / found.norm()
        assert distance < 1e-4, name


def test_the_limit_is_the_plain_sum(stand):
    own = stand.copy()
    limit(own)()
    torch.testing.assert_close(flat_gradient(own.model).double(), rows_of(stand).sum(0))


@pytest.mark.parametrize("name", [AUTOJAC, CHUNKS, AUTOGRAM])
def test_peers_with_our_solver_take_our_step(stand, name):
    pytest.importorskip("torchjd")
    steps, left_out = prepared([BY_NAME[name]], stand)
    if not steps:
        assert left_out[name].startswith("ValueError: Some modules had a forward pass")
        assert stand.workload.name.startswith("PINN")
        return
    ours, theirs = gradient_of("MGDA", stand), gradient_of(name, stand)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_who_cannot_take_part_says_why(stand):
    steps, left_out = prepared(CONTESTANTS, stand)
    assert set(steps) | set(left_out) == set(BY_NAME)
    assert all(reason and "\n" not in reason for reason in left_out.values())
    for name in set(left_out):
        assert not fits(name, stand) or BY_NAME[name].of_peer


def test_a_library_that_is_not_installed_is_left_out(stand, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BY_NAME[AUTOJAC].obstacle(stand.workload) == "torchjd is not installed"
