"""A training run as an object: saved between any two steps, it goes on as if it never stopped."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from examples.lic.codec import MeanScaleHyperprior, Reconstruction
from examples.lic.diagnostics import Probe, gradient_cosine, improvement_speeds
from examples.lic.images import RandomCrops
from examples.lic.schedules import Milestones, Plateau
from examples.lic.session import Observer, Recipe, Session
from examples.lic.streams import Crops, CropStream
from examples.lic.weightings import WEIGHTINGS, fixed
from moo_balance import Sum

STEPS = 7


@pytest.fixture
def pictures():
    return [torch.randint(0, 256, (3, 80, 70), dtype=torch.uint8) for _ in range(3)]


def make_session(weighting=None, recipe=None, model=None):
    torch.manual_seed(0)
    return Session(
        MeanScaleHyperprior(8, 8) if model is None else model,
        Sum() if weighting is None else weighting,
        Recipe(STEPS, 1e-3) if recipe is None else recipe,
        lmbda=0.01, seed=1,
    )  # fmt: skip


def make_stream(pictures):
    return CropStream(Crops(pictures, crop=64, seed=0), batch=1)


class Stop(Observer):
    """Ends a run after some steps, as a signal would."""

    def __init__(self, after):
        self._after = after

    def after(self, session):
        if session.taken == self._after:
            raise KeyboardInterrupt


def weights(session):
    return torch.cat([p.detach().flatten() for p in session.model.state_dict().values()])


def saved(session, stream):
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save({"session": session.state_dict(), "stream": stream.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


RECIPES = {
    "milestones": Recipe(STEPS, 1e-3),
    "plateau, ema, clip": Recipe(STEPS, 1e-3, Plateau(2, 0, 0.1), clip=0.5, ema=0.9),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["standard", "solution1", "solution2-smoothed", "random"])
@pytest.mark.parametrize("at", [3, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(name, recipe, at, pictures):
    def start():
        return make_session(WEIGHTINGS[name], RECIPES[recipe]), make_stream(pictures)

    whole, stream = start()
    whole.run(stream)
    stopped, stream = start()
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stream, [Stop(at)])
    state = saved(stopped, stream)
    torch.rand(9)  # another process begins elsewhere in the stream of random numbers
    resumed, stream = start()
    stream.load_state_dict(state["stream"])
    resumed.load_state_dict(state["session"])
    resumed.run(stream)
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), weights(stopped))
    if "ema" in recipe:
        pair = (s.state_dict()["ema"] for s in (resumed, whole))
        assert all(torch.equal(*values) for values in zip(*(e.values() for e in pair), strict=True))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_weighting_trains_the_codec(name, pictures):
    session = make_session(WEIGHTINGS[name], Recipe(2, 1e-3))
    before = weights(session)
    session.run(make_stream(pictures))
    assert weights(session).isfinite().all()
    assert not torch.equal(before, weights(session))


def test_fixed_weights_are_shares(pictures):
    session = make_session(fixed(0.8), Recipe(1, 1e-3))
    session.run(make_stream(pictures))
    coefficients = session.optimizer.metrics.coefficients
    assert coefficients == pytest.approx({"rate": 0.8, "distortion": 0.2})


def test_being_watched_changes_nothing(pictures):
    plain = make_session()
    plain.run(make_stream(pictures))
    watched, probe = make_session(), Probe(every=2)
    watched.run(make_stream(pictures), [probe])
    assert torch.equal(weights(plain), weights(watched))
    assert set(probe.figures) == {"cosine", "speed/rate", "speed/distortion"}


def test_speeds_are_of_the_same_crops_and_noise(pictures):
    """With a learning rate of nearly nothing, nothing improves, although every pass is noisy."""
    session = make_session(recipe=Recipe(1, 1e-30))
    probe = Probe(every=1)
    session.run(make_stream(pictures), [probe])
    assert probe.figures["speed/rate"] == probe.figures["speed/distortion"] == 0
    assert -1 < probe.figures["cosine"] < 1


def test_improvement_speed_is_the_relative_decrease():
    before = {"rate": torch.tensor(0.5), "distortion": torch.tensor(2.0)}
    after = {"rate": torch.tensor(0.45), "distortion": torch.tensor(2.2)}
    assert improvement_speeds(before, after) == pytest.approx({"rate": 0.1, "distortion": -0.1})


def test_cosine_of_two_gradients():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    losses = {"rate": a[0] * 3 + a[1] * 4, "distortion": a[0] * 2 + b.sum() * 0}
    assert gradient_cosine(losses, [a, b]) == pytest.approx(0.6)


def test_the_rate_falls_on_a_plateau_of_the_mean_loss():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = Plateau(every=2, patience=1, factor=0.5).begin(optimizer, 100)
    rates = []
    optimizer.step()
    for loss in [4, 2, 1, 3, 5, 0, 9, 9, 9, 9]:  # means 3, 2, 2.5, 9, 9
        schedule.step(torch.tensor(float(loss)))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 0.5]


def test_the_rate_falls_at_milestones():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Milestones((0.5, 0.75), 0.1).begin(optimizer, 8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(torch.tensor(0.0))
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("clip", "norm"), [(None, 1.0), (1e-3, 1e-3), (math.inf, None)])
def test_gradients_are_normalised_clipped_or_left(clip, norm, pictures):
    session = make_session(recipe=Recipe(1, 1e-3, clip=clip))
    session.run(make_stream(pictures))
    found = nn.utils.get_total_norm([p.grad for p in session.parameters]).item()
    if norm is None:
        assert found > 1.5
    else:
        assert found == pytest.approx(norm, rel=1e-4)


def test_averaged_weights_are_the_mean_they_should_be(pictures):
    session = make_session(recipe=Recipe(2, 1e-2, ema=0.75))
    seen = []

    class Look(Observer):
        def after(self, session):
            seen.append(session.model.z_log_scale.detach().clone())

    session.run(make_stream(pictures), [Look()])
    average = session.state_dict()["ema"]["module.z_log_scale"]
    torch.testing.assert_close(average, 0.75 * seen[0] + 0.25 * seen[1])


class WithQuantiles(nn.Module):
    """A codec with a parameter that only an auxiliary loss reaches, as CompressAI's have."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.bottleneck = nn.Module()
        self.bottleneck.quantiles = nn.Parameter(torch.tensor([4.0]))

    def forward(self, images):
        return Reconstruction(images * self.gain, {"y": 1e4 * self.gain.square()})

    def aux_loss(self):
        return self.bottleneck.quantiles.abs().sum()


def test_quantiles_have_an_optimizer_of_their_own(pictures):
    recipe = Recipe(5, 1e-5, auxiliary_lr=0.1)
    session = make_session(model=WithQuantiles(), recipe=recipe)
    session.run(make_stream(pictures))
    assert session.model.bottleneck.quantiles.item() == pytest.approx(3.5, rel=1e-5)
    assert session.model.gain.item() == pytest.approx(0.5, abs=1e-4)
    state = session.state_dict()
    again = make_session(model=WithQuantiles(), recipe=recipe)
    again.load_state_dict(state)
    assert again.state_dict()["auxiliary"]["state"][0]["step"] == 5


def test_streams_of_the_demo_are_accepted_too(pictures):
    crops = RandomCrops(dict(enumerate(pictures)), crop=64, batch=1, seed=0)
    session = make_session(recipe=Recipe(1, 1e-3))
    session.run(crops)
    assert session.taken == 1
