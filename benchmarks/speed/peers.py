"""Steps of other libraries, each as its own documentation shows it.

TorchJD uses our solver for its weights, so that only the way to take gradients differs. The other
two bring a method of their own, whose arithmetic is part of their step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.implementations import Implementation, Setup, Step
from benchmarks.speed.workloads import Workload
from moo_balance.functional import min_norm_weights


def _aggregator() -> torch.nn.Module:
    from torchjd.aggregation import GramianWeightedAggregator, Weighting

    class MinNorm(Weighting):
        def forward(self, gramian: Tensor, /) -> Tensor:
            return min_norm_weights(gramian)

    return GramianWeightedAggregator(MinNorm())


def autojac(chunk_size: int | None) -> Callable[[Setup], Step]:
    """TorchJD's Jacobian: by ``vmap`` over all losses at once, or over `chunk_size` at a time."""

    def build(setup: Setup) -> Step:
        from torchjd.autojac import backward, jac_to_grad

        aggregator, params = _aggregator(), setup.params

        def step() -> None:
            setup.optimizer.zero_grad()
            losses = list(setup.outcome().losses.values())
            backward(losses, parallel_chunk_size=chunk_size)
            jac_to_grad(params, aggregator)
            setup.optimizer.step()

        return step

    return build


def mtl_backward(setup: Setup) -> Step:
    """TorchJD's Jacobian of the trunk only; each head gets its own loss's gradient."""
    from torchjd import autojac

    aggregator, trunk = _aggregator(), list(setup.model.trunk.parameters())

    def step() -> None:
        setup.optimizer.zero_grad()
        outcome = setup.outcome()
        autojac.mtl_backward(list(outcome.losses.values()), features=outcome.features)
        autojac.jac_to_grad(trunk, aggregator)
        setup.optimizer.step()

    return step


def autogram(setup: Setup) -> Step:
    """TorchJD's Gramian by hooks on modules, and then a weighted backward."""
    from torchjd.autogram import Engine

    # Losses are means over the batch, so none of their dimensions is a batch dimension.
    engine = Engine(setup.model, batch_dim=None)

    def step() -> None:
        setup.optimizer.zero_grad()
        losses = torch.stack(list(setup.outcome().losses.values()))
        gramian = engine.compute_gramian(losses)
        losses.backward(min_norm_weights(gramian))
        setup.optimizer.step()

    return step


def conflictfree(setup: Setup) -> Step:
    """ConFIG, one backward per loss."""
    from conflictfree.grad_operator import ConFIGOperator
    from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    operator, model = ConFIGOperator(), setup.model

    def step() -> None:
        losses = list(setup.outcome().losses.values())
        gradients = []
        for k, loss in enumerate(losses):
            setup.optimizer.zero_grad()
            loss.backward(retain_graph=k < len(losses) - 1)
            gradients.append(get_gradient_vector(model, none_grad_mode="zero"))
        direction = operator.calculate_gradient(gradients)
        apply_gradient_vector(model, direction, none_grad_mode="zero", zero_grad_mode="pad_value")
        setup.optimizer.step()

    return step


def pcgrad(setup: Setup) -> Step:
    """PCGrad of pytorch_optimizer, a wrapper around the optimizer."""
    from pytorch_optimizer import PCGrad

    optimizer = PCGrad(setup.optimizer, reduction="sum")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.pc_backward(list(setup.outcome().losses.values()))
        optimizer.step()

    return step


def _missing(library: str) -> str | None:
    installed = importlib.util.find_spec(library) is not None
    return None if installed else f"{library} is not installed"


def _peer(
    name: str, library: str, build: Callable[[Setup], Step], heads: bool = False
) -> Implementation:
    def unsupported(workload: Workload) -> str | None:
        if heads and not workload.has_heads:
            return "the model is not a trunk with one head per loss"
        return _missing(library)

    return Implementation(name, build, per_loss=True, unsupported=unsupported, third_party=True)


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
