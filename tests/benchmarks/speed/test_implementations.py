"""Every implementation takes the step that its name says, ours and those of other libraries."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.speed import workloads
from benchmarks.speed.implementations import FORWARD, PLAIN, Setup, limit
from benchmarks.speed.peers import AUTOGRAM, AUTOJAC, CHUNKS, MTL
from benchmarks.speed.step_cost import IMPLEMENTATIONS, prepare
from examples.lic import hyperprior
from tests.support.problems import flat_gradient

# A warning of TorchJD's vmap over attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

MAKES = {
    "codec": partial(workloads.codec, 1, channels=4, latent_channels=4),
    "transformer": partial(workloads.transformer, 2, width=8, length=4, batch=2),
    "recurrence": partial(workloads.recurrence, width=8, length=4),
    "PINN": partial(workloads.pinn, 4),
    "MLP": partial(workloads.mlp, 3, width=16, depth=1, batch=4),
    "ResNet": partial(workloads.resnet, 2, batch=2),
}
BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


@pytest.fixture(params=MAKES)
def setup(request, monkeypatch):
    # With noise, two forward passes would have different losses.
    monkeypatch.setattr(hyperprior, "add_noise", lambda values: values)
    with torch.random.fork_rng():
        setup = Setup.create(MAKES[request.param](), torch.device("cpu"))
        # A codec in evaluation mode rounds, which stops gradients.
        setup.model.train(request.param == "codec")
        yield setup


def rows_of(setup):
    """Gradients of all parameters, one row per loss."""
    rows = []
    for loss in setup.outcome().losses.values():
        setup.model.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(flat_gradient(setup.model).double())
    return torch.stack(rows)


def gradient_of(name, setup):
    own = setup.copy()
    BY_NAME[name].build(own)()
    return flat_gradient(own.model).double()


def fits(name, setup):
    return BY_NAME[name].unsupported(setup.workload) is None


def test_every_step_combines_the_gradients_of_the_losses(setup):
    rows = rows_of(setup)
    steps, _ = prepare(IMPLEMENTATIONS, setup)
    assert {PLAIN, "limit", "Sum", "MGDA"} <= set(steps)
    for name in set(steps) - {FORWARD, MTL}:  # MTL gives each head its own loss's gradient
        gradient = gradient_of(name, setup)
        weights = torch.linalg.lstsq(rows.T, gradient[:, None]).solution
        distance = (rows.T @ weights - gradient[:, None]).norm() / gradient.norm()
        assert distance < 1e-4, name


def test_the_limit_is_the_plain_sum(setup):
    own = setup.copy()
    limit(own)()
    torch.testing.assert_close(flat_gradient(own.model).double(), rows_of(setup).sum(0))


@pytest.mark.parametrize("name", [AUTOJAC, CHUNKS, AUTOGRAM])
def test_peers_with_our_solver_take_our_step(setup, name):
    pytest.importorskip("torchjd")
    steps, left_out = prepare([BY_NAME[name]], setup)
    if not steps:
        assert left_out[name].startswith("ValueError: Some modules had a forward pass")
        assert setup.workload.name.startswith(("PINN", "recurrence"))
        return
    ours, theirs = gradient_of("MGDA", setup), gradient_of(name, setup)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_an_implementation_that_is_left_out_has_a_reason(setup):
    steps, left_out = prepare(IMPLEMENTATIONS, setup)
    assert set(steps) | set(left_out) == set(BY_NAME)
    assert all(reason and "\n" not in reason for reason in left_out.values())
    for name in set(left_out):
        assert not fits(name, setup) or BY_NAME[name].third_party


def test_a_library_that_is_not_installed_is_left_out(setup, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BY_NAME[AUTOJAC].unsupported(setup.workload) == "torchjd is not installed"
