"""EnCodec's balancer on a small codec for synthetic sounds: shares of the gradient at its output.

Losses: absolute error in time, spectra at three resolutions, and features of a frozen network,
which stands for a discriminator. The balancer gives each loss its share of the gradient with
respect to the decoder's output, so the unit of a loss does not matter. Compared are the plain sum
and the best of several static weights, also after the spectral loss has been multiplied by 100.

    python -m examples.recipes.audio_balancer --figure audio.svg
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.recipes import common
from moo_balance import BalancedOptimizer, FixedWeights, GradientNorms, History, Sum, diagnose
from moo_balance.weighting import Weighting

RATE, LENGTH, BATCH = 8000, 512, 8
SHARES = {"time": 0.1, "spectral": 1.0, "features": 0.5}  # of the gradient at the output
TRIALS = ((1.0, 1.0), (1.0, 10.0), (10.0, 1.0), (10.0, 10.0), (100.0, 10.0))


def draw_sounds(count: int) -> Tensor:
    """Plucked notes with overtones and a little noise, shape [count, 1, LENGTH]."""
    seconds = torch.arange(LENGTH) / RATE
    pitch = 110 * 2 ** (torch.rand(count, 1, 1) * 2)
    overtones = torch.arange(1, 7).view(1, 6, 1)
    loudness = torch.rand(count, 6, 1) / overtones
    decay = torch.exp(-seconds * (2 + 20 * torch.rand(count, 1, 1)) * overtones**0.5)
    phase = 2 * math.pi * (pitch * overtones * seconds + torch.rand(count, 6, 1))
    notes = (loudness * decay * phase.sin()).sum(1, keepdim=True)
    return notes / notes.abs().amax(-1, keepdim=True) * 0.8 + 0.01 * torch.randn(count, 1, LENGTH)


class Codec(nn.Module):
    """16 samples as 4 numbers in [-1, 1], to which noise is added in place of rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, 24, 8, 4, 2), nn.ELU(), nn.Conv1d(24, 4, 8, 4, 2), nn.Tanh()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose1d(4, 24, 8, 4, 2), nn.ELU(), nn.Conv1d(24, 24, 5, padding=2),
            nn.ELU(), nn.ConvTranspose1d(24, 1, 8, 4, 2),
        )  # fmt: skip

    def forward(self, sounds: Tensor) -> Tensor:
        code = self.encoder(sounds)
        rounded = code + (torch.rand_like(code) - 0.5) / 8 if self.training else code
        return self.decoder(rounded)


def make_critic() -> nn.Sequential:
    """A frozen network with random weights, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = nn.Sequential(
            nn.Conv1d(1, 16, 15, 2), nn.LeakyReLU(0.2), nn.Conv1d(16, 16, 15, 2), nn.LeakyReLU(0.2)
        )
    return critic.requires_grad_(False)


CRITIC = make_critic()


def spectrum(sounds: Tensor, size: int) -> Tensor:
    window = torch.hann_window(size)
    options = {"hop_length": size // 4, "window": window, "return_complex": True}
    return torch.stft(sounds[:, 0], size, **options).abs()


def compute_losses(output: Tensor, sounds: Tensor, unit: float = 1.0) -> dict[str, Tensor]:
    """All losses are computed from the decoder's output; `unit` multiplies the spectral one."""
    spectral = output.new_zeros(())
    for size in (64, 128, 256):
        mine, target = spectrum(output, size), spectrum(sounds, size)
        logs = (mine + 1e-2).log() - (target + 1e-2).log()
        spectral = spectral + (mine - target).abs().mean() + logs.square().mean().sqrt()
    return {
        "time": (output - sounds).abs().mean(),
        "spectral": unit * spectral,
        "features": (CRITIC(output) - CRITIC(sounds)).abs().mean(),
    }


class Run(NamedTuple):
    codec: Codec
    optimizer: BalancedOptimizer
    history: History
    unit: float


def start(weighting: Weighting, seed: int, unit: float = 1.0) -> Run:
    torch.manual_seed(seed)
    codec = Codec()
    optimizer = BalancedOptimizer(torch.optim.Adam(codec.parameters(), lr=3e-3), weighting)
    return Run(codec, optimizer, History(), unit)


def step(run: Run, sounds: Tensor) -> None:
    output = run.codec(sounds)
    losses = compute_losses(output, sounds, run.unit)
    run.optimizer.zero_grad()
    run.optimizer.backward(losses, features=output)
    run.optimizer.step()


def train(weighting: Weighting, seed: int, steps: int, unit: float = 1.0) -> Run:
    run = start(weighting, seed, unit)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, steps)
    for _ in range(steps):
        step(run, draw_sounds(BATCH))
        run.history.append(run.optimizer.metrics)
        schedule.step()
    return run


@torch.no_grad()
def score(codec: Codec, sounds: Tensor) -> tuple[float, float]:
    """Signal-to-noise ratio in dB (higher is better), and log-spectral distance in dB (lower)."""
    output = codec.eval()(sounds)
    codec.train()
    noise = (output - sounds).square().sum(-1)
    ratio = 10 * (sounds.square().sum(-1) / noise).log10().mean()
    decibels = [20 * (spectrum(x, 256) + 1e-2).log10() for x in (output, sounds)]
    distance = (decibels[0] - decibels[1]).square().mean(1).sqrt().mean()
    return float(ratio), float(distance)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 15 if args.quick else 200
    torch.manual_seed(1000)
    validation, test = draw_sounds(64), draw_sounds(64)

    def search() -> Weighting:
        """Of the static weights, those with the best validation score of one run each."""
        trials = [FixedWeights({"time": a, "spectral": 1.0, "features": b}) for a, b in TRIALS]
        scores = [score(train(t, args.seed + 100, steps).codec, validation) for t in trials]
        balance = [ratio - distance for ratio, distance in scores]
        return trials[balance.index(max(balance))]

    best = search()
    print("static weights:", best.values)
    methods: dict[str, Callable[[], Weighting]] = {
        "Sum": Sum,
        f"static, best of {len(TRIALS)}": lambda: best,
        "GradientNorms.encodec": partial(GradientNorms.encodec, SHARES, beta=0.99),
    }
    runs = {}
    for unit in (1.0, 100.0):
        for name, make in methods.items():
            label = name if unit == 1 else f"{name}, spectral × 100"
            runs[label] = [train(make(), seed, steps, unit) for seed in args.seeds]
    scores = {label: [score(run.codec, test) for run in each] for label, each in runs.items()}
    common.print_scores(["method", "SNR, dB", "log-spectral distance, dB"], scores)

    codec = runs["GradientNorms.encodec"][-1].codec
    batches = [draw_sounds(BATCH) for _ in range(8)]
    report = diagnose(lambda sounds: compute_losses(codec(sounds), sounds), codec, batches)
    print(f"\n{report}")
    started = {name: start(make(), 0) for name, make in methods.items()}
    contestants = {name: partial(step, run, batches[0]) for name, run in started.items()}
    times = common.step_times(contestants, 5 if args.quick else 200)
    print(f"\nTime of a step: {times['GradientNorms.encodec']:.2f} of the sum's")
    if args.figure:
        draw(runs["GradientNorms.encodec"][0].history, scores, args.figure)


def draw(history: History, scores: dict[str, list[tuple[float, float]]], path) -> None:
    figure, ((left, middle, right),) = common.make_axes(1, 3)
    common.draw_history(history, left, middle)
    left.set(title="losses, balanced")
    middle.set(title="coefficients, balanced")
    for i, (label, each) in enumerate(scores.items()):
        points = zip(*each, strict=True)
        scaled = "×" in label
        colour = common.COLOURS[i % 3]
        right.plot(*points, "x" if scaled else "o", c=colour, label=None if scaled else label, ms=5)
    right.set(xlabel="SNR, dB", ylabel="log-spectral distance, dB", title="×: spectral loss × 100")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


if __name__ == "__main__":
    main()
