"""Other libraries' steps, each as its own documentation has it.

TorchJD is given our solver for its weights, so that all that differs is how gradients are taken.
The two others come with a method of their own, whose arithmetic is part of their step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contestants import Contestant, Stand, Step
from benchmarks.workloads import Workload
from moo_balance.functional import min_norm_weights


def _aggregator() -> torch.nn.Module:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

    class MinNorm(Weighting):
        def forward(self, gramian: Tensor, /) -> Tensor:
            return min_norm_weights(gramian)

    return GramianWeightedAggregator(MinNorm())


def autojac(chunk_size: int | None) -> Callable[[Stand], Step]:
    """TorchJD's Jacobian: by ``vmap`` over all losses at once, or over so many at a time."""

    def build(stand: Stand) -> Step:
        from torchjd.autojac import backward, jac_to_grad

        aggregator, params = _aggregator(), stand.params

        def step() -> None:
            stand.optimizer.zero_grad()
            losses = list(stand.outcome().losses.values())
            backward(losses, parallel_chunk_size=chunk_size)
            jac_to_grad(params, aggregator)
            stand.optimizer.step()

        return step

    return build


def mtl_backward(stand: Stand) -> Step:
    """TorchJD's Jacobian of the trunk alone, behind features; heads get their own gradients."""
    from torchjd import autojac

    aggregator, trunk = _aggregator(), list(stand.model.trunk.parameters())

    def step() -> None:
        stand.optimizer.zero_grad()
        outcome = stand.outcome()
        autojac.mtl_backward(list(outcome.losses.values()), features=outcome.features)
        autojac.jac_to_grad(trunk, aggregator)
        stand.optimizer.step()

    return step


def autogram(stand: Stand) -> Step:
    """TorchJD's Gramian by hooks on modules, and then a weighted backward."""
    from torchjd.autogram import Engine

    # Losses are means over the batch, so no dimension of them belongs to single samples.
    engine = Engine(stand.model, batch_dim=None)

    def step() -> None:
        stand.optimizer.zero_grad()
        losses = torch.stack(list(stand.outcome().losses.values()))
        gramian = engine.compute_gramian(losses)
        losses.backward(min_norm_weights(gramian))
        stand.optimizer.step()

    return step


def conflictfree(stand: Stand) -> Step:
    """ConFIG, one backward per loss."""
    from conflictfree.grad_operator import ConFIGOperator
    from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    operator, model = ConFIGOperator(), stand.model

    def step() -> None:
        losses = list(stand.outcome().losses.values())
        gradients = []
        for k, loss in enumerate(losses):
            stand.optimizer.zero_grad()
            loss.backward(retain_graph=k < len(losses) - 1)
            gradients.append(get_gradient_vector(model, none_grad_mode="zero"))
        direction = operator.calculate_gradient(gradients)
        apply_gradient_vector(model, direction, none_grad_mode="zero", zero_grad_mode="pad_value")
        stand.optimizer.step()

    return step


def pcgrad(stand: Stand) -> Step:
    """PCGrad of pytorch_optimizer, a wrapper around the optimizer."""
    from pytorch_optimizer import PCGrad

    optimizer = PCGrad(stand.optimizer, reduction="sum")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.pc_backward(list(stand.outcome().losses.values()))
        optimizer.step()

    return step


def _missing(library: str) -> str | None:
    there = importlib.util.find_spec(library) is not None
    return None if there else f"{library} is not installed"


def _peer(
    name: str, library: str, build: Callable[[Stand], Step], heads: bool = False
) -> Contestant:
    def obstacle(workload: Workload) -> str | None:
        if heads and not workload.has_heads:
            return "its losses do not part into a trunk and one head each"
        return _missing(library)

    return Contestant(name, build, rows=True, obstacle=obstacle, of_peer=True)


AUTOJAC, CHUNKS, MTL, AUTOGRAM = (
    "TorchJD autojac, default",
    "TorchJD autojac, chunks of 1",
    "TorchJD mtl_backward",
    "TorchJD autogram",
)

PEERS = (
    _peer(AUTOJAC, "torchjd", autojac(None)),
    _peer(CHUNKS, "torchjd", autojac(1)),
    _peer(MTL, "torchjd", mtl_backward, heads=True),
    _peer(AUTOGRAM, "torchjd", autogram),
    _peer("conflictfree, ConFIG", "conflictfree", conflictfree),
    _peer("pytorch_optimizer, PCGrad", "pytorch_optimizer", pcgrad),
)
