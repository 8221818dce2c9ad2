"""A VQGAN-style autoencoder of digits, with the adaptive adversarial weight of VQGAN.

Losses: absolute error, error of edges, codebook and, after a warm-up, a generator's loss against a
discriminator with an optimizer of its own. The adversarial weight is the ratio of gradient norms at
the decoder's last layer (GradientNorms.vqgan), compared with the plain sum and static weights. The
score is the Fréchet distance (rFID) between features of held-out digits and their reconstructions.

    python -m examples.recipes.vqgan --figure vqgan.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from examples.recipes import common
from moo_balance import BalancedOptimizer, FixedWeights, GradientNorms, History, Sum, diagnose
from moo_balance.weighting import Weighting

CODES, WIDTH, BATCH, TRIALS = 16, 32, 64, (0.003, 0.01, 0.03, 0.1, 0.3)


class Autoencoder(nn.Module):
    """An 8 × 8 image as 2 × 2 codes of 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, WIDTH, 4, 2, 1), nn.ReLU(), nn.Conv2d(WIDTH, 4, 4, 2, 1)
        )
        self.codebook = nn.Parameter(torch.randn(CODES, 4))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, WIDTH, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(WIDTH, WIDTH, 4, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstructions, and the loss of the codebook."""
        latent = self.encoder(images).movedim(1, -1)
        code = self.codebook[torch.cdist(latent.flatten(0, 2), self.codebook).argmin(1)]
        code = code.view_as(latent)
        codebook = (code - latent.detach()).square().mean()
        commitment = (code.detach() - latent).square().mean()
        passed = latent + (code - latent).detach()  # straight-through gradient
        images = self.last(self.decoder(passed.movedim(-1, 1))).sigmoid()
        return images, codebook + 0.25 * commitment


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def compute_losses(
    model: Autoencoder, judge: nn.Module, images: Tensor, adversarial: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of the autoencoder, and its reconstructions for the discriminator's own step."""
    fake, codebook = model(images)
    pairs = zip(edges(fake), edges(images), strict=True)
    nll = (fake - images).abs().mean() + sum((a - b).abs().mean() for a, b in pairs)
    losses = {"nll": nll + codebook}  # the codebook's loss does not reach the last layer
    if adversarial:
        losses["generator"] = -judge(fake).mean()
    return losses, fake.detach()


class Run(NamedTuple):
    model: Autoencoder
    judge: nn.Module
    optimizer: BalancedOptimizer
    history: History


def start(weighting: Weighting, seed: int) -> tuple[Run, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Autoencoder()
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    optimizer = BalancedOptimizer(
        torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.9)),
        weighting,
        loss_names=("nll", "generator"),
        shared_params=[model.last.weight],
    )
    for_judge = torch.optim.Adam(judge.parameters(), lr=2e-3, betas=(0.5, 0.9))
    return Run(model, judge, optimizer, History()), for_judge


def step(run: Run, for_judge: torch.optim.Optimizer, images: Tensor, adversarial: bool) -> None:
    run.optimizer.zero_grad()
    losses, fake = compute_losses(run.model, run.judge, images, adversarial)
    run.optimizer.backward(losses)
    run.optimizer.step()
    if adversarial:
        for_judge.zero_grad()  # after the generator's backward, which may write here
        (relu(1 - run.judge(images)).mean() + relu(1 + run.judge(fake)).mean()).backward()
        for_judge.step()


def train(weighting: Weighting, seed: int, steps: int, images: Tensor) -> Run:
    run, for_judge = start(weighting, seed)
    for i in range(steps):
        batch = images[torch.randint(len(images), (BATCH,))]
        step(run, for_judge, batch, adversarial=i >= steps // 4)
        run.history.append(run.optimizer.metrics)
    return run


@cache
@torch.enable_grad()
def features() -> nn.Module:
    """The features of a trained classifier of digits, for the score."""
    torch.manual_seed(0)
    images, labels = common.split_digits(1077, 720)[0]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16), nn.Tanh())
    head = nn.Linear(16, 10)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(head(net(images / 16)), labels).backward()
        optimizer.step()
    return net


@torch.no_grad()
def score(model: Autoencoder, images: Tensor) -> tuple[float, float]:
    """The Fréchet distance, and the mean absolute error in grey values 0 … 16."""
    fake = model(images)[0]
    real_features, fake_features = (features()(x) for x in (images, fake))
    real, other = real_features.T.cov(), fake_features.T.cov()
    roots = torch.linalg.eigvals(real @ other).sqrt().real.sum()
    shift = (real_features.mean(0) - fake_features.mean(0)).square().sum()
    distance = shift + real.trace() + other.trace() - 2 * roots
    return float(distance), 16 * float((fake - images).abs().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 40 if args.quick else 600
    parts = common.split_digits(1077, 360, 360)
    training, validation, test = (images.view(-1, 1, 8, 8) / 16 for images, _ in parts)

    def validate(trial: Weighting) -> float:
        return score(train(trial, args.seed + 100, steps, training).model, validation)[0]

    trials = [FixedWeights({"nll": 1.0, "generator": weight}) for weight in TRIALS]
    best = min(trials, key=validate)
    methods = {
        "no discriminator": FixedWeights({"nll": 1.0, "generator": 0.0}),
        "Sum": Sum(),
        f"static, {best.values['generator']}, best of {len(TRIALS)}": best,
    }
    for share in (0.8, 0.2):
        method = GradientNorms.vqgan("nll", preference={"nll": 1.0, "generator": share})
        methods[f"GradientNorms.vqgan, {share}"] = method
    runs = {name: [train(m, s, steps, training) for s in args.seeds] for name, m in methods.items()}
    scores = {name: [score(run.model, test) for run in each] for name, each in runs.items()}
    common.print_scores(["method", "rFID", "error, grey values"], scores)

    adaptive = "GradientNorms.vqgan, 0.8"
    last = runs[adaptive][-1]
    batches = [training[torch.randint(len(training), (BATCH,))] for _ in range(8)]
    report = diagnose(lambda x: compute_losses(last.model, last.judge, x)[0], last.model, batches)
    print(f"\n{report}")
    contestants = {
        name: partial(step, *start(methods[name], 0), batches[0], True)
        for name in ("Sum", adaptive)
    }
    times = common.step_times(contestants, 5 if args.quick else 200)
    print(f"\nTime of a step, discriminator included: {times[adaptive]:.2f} of the sum's")
    if args.figure:
        draw(runs, test, args.figure)


def draw(runs: dict[str, list[Run]], test: Tensor, path) -> None:
    figure, ((left, right),) = common.make_axes(1, 2, size=(4.4, 3.2))
    for name, (run, *_) in runs.items():
        if not name.startswith("no "):
            steps, values = run.history.series("coefficient/generator")
            left.plot(steps, values, label=name, lw=1)
    left.set(yscale="log", xlabel="step", ylabel="weight of the generator's loss")
    left.legend()
    with torch.no_grad():
        pictures = [test[:8], *(each[0].model(test[:8])[0] for each in runs.values())]
    strip = torch.cat([torch.cat(list(p[:, 0]), 1) for p in pictures])
    right.imshow(strip.numpy(), cmap="gray", interpolation="nearest")
    for i in range(1, len(pictures)):
        right.axhline(8 * i - 0.5, color=common.INK)
    right.set_xticks([])
    right.set_yticks([8 * i + 3.5 for i in range(len(pictures))], ["original", *runs])
    common.save_figure(figure, path)


if __name__ == "__main__":
    main()
