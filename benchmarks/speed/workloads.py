"""The models that are measured, and the losses of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.lic.hyperprior import MeanScaleHyperprior

Losses = dict[str, Tensor]


class Outcome(NamedTuple):
    """Losses by name, and the features that all of them share."""

    losses: Losses
    features: Sequence[Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, and a batch on which it has K losses.

    Args:
        name: Its name in the tables.
        count: K.
        build: Makes the model.
        draw: Makes a batch.
        forward: Losses and shared features of a model on a batch.
        has_features: Whether all losses are computed from common features.
        has_heads: Whether these features divide the model into a trunk and one head per loss.
    """

    name: str
    count: int
    build: Callable[[], nn.Module]
    draw: Callable[[], tuple[Tensor, ...]]
    forward: Callable[[nn.Module, tuple[Tensor, ...]], Outcome]
    has_features: bool = True
    has_heads: bool = True


class Heads(nn.Module):
    """A trunk, and K heads with one loss each."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)


def heads_forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Outcome:
    inputs, *targets = batch
    features = model.trunk(inputs)
    losses = {
        f"task {k}": (k + 1.0) * nn.functional.mse_loss(head(features), target)
        for k, (head, target) in enumerate(zip(model.heads, targets, strict=True))
    }
    return Outcome(losses, [features])


def mlp(count: int, width: int = 512, depth: int = 3, batch: int = 128) -> Workload:
    """A shared trunk of linear layers with `count` small heads."""

    def build() -> nn.Module:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        return Heads(nn.Sequential(*layers), [nn.Linear(width, 8) for _ in range(count)])

    def draw() -> tuple[Tensor, ...]:
        return torch.randn(batch, width), *(torch.randn(batch, 8) for _ in range(count))

    return Workload(f"MLP, K = {count}", count, build, draw, heads_forward)


class Residual(nn.Module):
    """Two convolutions with a skip connection; the first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.skip(x))


def resnet(count: int, batch: int = 32) -> Workload:
    """A small residual network on images of 32 x 32 with `count` heads."""

    def build() -> nn.Module:
        trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        return Heads(trunk, [nn.Linear(64, 8) for _ in range(count)])

    def draw() -> tuple[Tensor, ...]:
        return torch.rand(batch, 3, 32, 32), *(torch.randn(batch, 8) for _ in range(count))

    return Workload(f"ResNet, K = {count}", count, build, draw, heads_forward)


class Encoder(nn.Module):
    """A small transformer encoder over learned positions."""

    def __init__(self, tokens: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embedding(tokens) + self.position)


def transformer(count: int = 4, width: int = 128, length: int = 32, batch: int = 8) -> Workload:
    """A transformer of two layers with a head of 8 outputs per position for each loss."""

    def build() -> nn.Module:
        return Heads(Encoder(1000, length, width, 2), [nn.Linear(width, 8) for _ in range(count)])

    def draw() -> tuple[Tensor, ...]:
        tokens = torch.randint(1000, (batch, length))
        return tokens, *(torch.randn(batch, length, 8) for _ in range(count))

    return Workload(f"transformer, K = {count}", count, build, draw, heads_forward)


class Recurrence(nn.Module):
    """One weight that is used once for each element of a sequence; the output is the last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, sequence: Tensor) -> Tensor:
        state = torch.zeros_like(sequence[0])
        for element in sequence:
            state = torch.tanh(self.layer(state) + element)
        return state


def recurrence(count: int = 2, width: int = 704, length: int = 200, batch: int = 4) -> Workload:
    """A long recurrence with `count` heads on its last state; its weight has 0.5 M elements."""

    def build() -> nn.Module:
        return Heads(Recurrence(width), [nn.Linear(width, 8) for _ in range(count)])

    def draw() -> tuple[Tensor, ...]:
        sequence = torch.randn(length, batch, width)
        return sequence, *(torch.randn(batch, 8) for _ in range(count))

    return Workload(f"recurrence, K = {count}", count, build, draw, heads_forward)


class Field(nn.Module):
    """u(t, x) as a network, for the heat equation on [0, 1]²."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, points: Tensor) -> Tensor:
        return self.layers(points)


def pinn_forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Outcome:
    with torch.enable_grad():  # the equation takes derivatives, also in evaluation
        return _pinn_outcome(model, *batch)


def _pinn_outcome(model: nn.Module, interior: Tensor, boundary: Tensor, start: Tensor) -> Outcome:
    points = interior.detach().requires_grad_()
    value = model(points)
    (first,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), points, create_graph=True)
    residual = first[:, 0] - 0.1 * second[:, 1]
    initial = torch.sin(torch.pi * start[:, 1:])
    losses = {
        "equation": residual.square().mean(),
        "boundary": model(boundary).square().mean(),
        "start": (model(start) - initial).square().mean(),
    }
    return Outcome(losses, [])


def pinn(batch: int = 512) -> Workload:
    """A physics-informed network: equation, boundary and start, each with a pass of its own."""

    def draw() -> tuple[Tensor, ...]:
        interior, boundary, start = torch.rand(batch, 2), torch.rand(128, 2), torch.rand(128, 2)
        boundary[:, 1], start[:, 0] = boundary[:, 1].round(), 0.0
        return interior, boundary, start

    return Workload("PINN, K = 3", 3, Field, draw, pinn_forward, False, False)


def codec_forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Outcome:
    (images,) = batch
    features: list[Tensor] = []
    hook = model.g_a.register_forward_hook(lambda _m, _i, out: features.append(out))
    output = model(images)
    hook.remove()
    distortion = 0.0067 * 255**2 * nn.functional.mse_loss(output.images, images)
    return Outcome({"rate": output.bpp(), "distortion": distortion}, features)


def codec(
    batch: int = 8, side: int = 64, channels: int = 24, latent_channels: int = 32
) -> Workload:
    """The learned image codec of the examples, whose losses share the latent."""

    def draw() -> tuple[Tensor, ...]:
        return (torch.rand(batch, 3, side, side),)

    def build() -> MeanScaleHyperprior:
        model = MeanScaleHyperprior(channels, latent_channels)
        # Quantiles have a loss of their own, and here are no parameters.
        quantiles = model.entropy_bottleneck.quantiles.detach()
        del model.entropy_bottleneck.quantiles
        model.entropy_bottleneck.register_buffer("quantiles", quantiles)
        return model

    return Workload("codec, K = 2", 2, build, draw, codec_forward, has_heads=False)


ALL: tuple[Callable[[], Workload], ...] = (
    codec,
    transformer,
    recurrence,
    pinn,
    *(partial(mlp, count) for count in (2, 8, 32)),
    *(partial(resnet, count) for count in (2, 8, 32)),
)

TINY: tuple[Callable[[], Workload], ...] = (
    partial(codec, 1, channels=4, latent_channels=4),
    partial(pinn, 4),
    partial(mlp, 3, width=16, depth=1, batch=4),
)
"""Tiny models, to check that everything runs."""
