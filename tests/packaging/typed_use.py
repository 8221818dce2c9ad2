"""A program that uses every public function, for type checkers to read; the tests run it, too.

Pyright checks it in its strict mode, as it would check the code of a user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import moo_balance as moo
from moo_balance import functional
from moo_balance.engine import Streaming
from moo_balance.integrations import unwrap_optimizer
from moo_balance.weighting import Statistics, Weighting, WeightingOutput

Losses = Mapping[str, Tensor]


class Halves(Weighting):
    """A method of a user's own."""

    def weights(self, statistics: Statistics, state: dict[str, Tensor]) -> WeightingOutput:
        halves = torch.full_like(statistics.losses, 0.5)
        return WeightingOutput(halves, halves, state)


def build() -> tuple[nn.Linear, Callable[[], dict[str, Tensor]]]:
    """A model, and a function that computes its losses."""
    model = nn.Linear(4, 2)
    inputs = torch.randn(8, 4)

    def compute_losses() -> dict[str, Tensor]:
        first, second = (model(inputs) - 1).square().mean(0)
        return {"first": first, "second": second}

    return model, compute_losses


def methods() -> list[Weighting]:
    named: dict[str, float] = {"first": 1.0, "second": 2.0}
    return [
        moo.Sum(),
        moo.FixedWeights(named),
        moo.SumLog(),
        moo.FAMO(lagged=True),
        moo.GradientNorms(every=10),
        moo.Lagrangian({"second": 0.5}),
        moo.MGDA(),
        moo.PCD("first"),
        moo.NashMTL(preference=named),
        moo.GradDrop(),
        moo.SeparateMoments(),
        moo.MovingAverage(moo.MGDA()),
        moo.Rescaled(moo.UPGrad()),
        moo.Sequential([moo.Sum(), moo.MGDA()], [2]),
        moo.WithConstant(moo.Sum(), {"second": 0.1}),
        Halves(),
    ]


def train(weighting: Weighting) -> moo.History:
    """One step in each form."""
    model, compute_losses = build()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = moo.BalancedOptimizer(inner, weighting, shared_params=model, nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    history = moo.History(maxlen=100)
    optimizer.zero_grad()
    optimizer.backward(compute_losses)
    optimizer.step()
    scheduler.step()
    metrics: moo.StepMetrics = optimizer.metrics
    history.append(metrics)
    coefficients: dict[str, Tensor] = metrics.coefficients
    assert list(coefficients) == ["first", "second"]
    return history


def every_form() -> None:
    model, compute_losses = build()
    inner = torch.optim.AdamW(model.parameters())
    optimizer = moo.BalancedOptimizer(inner, moo.FAMO(lagged=True), loss_names=["first", "second"])
    with optimizer.accumulate():
        optimizer.backward(compute_losses())
    optimizer.backward(compute_losses(), last=True)
    optimizer.step()
    optimizer.zero_grad()
    combined: Tensor = optimizer.combined_loss(compute_losses())
    combined.backward()
    optimizer.step()
    optimizer.zero_grad()
    weighted: dict[str, Tensor] = optimizer.weighted_losses(compute_losses())
    torch.stack(list(weighted.values())).sum().backward()
    optimizer.step()
    logged: dict[str, float] = optimizer.log_dict(prefix="balance/")
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert logged
    assert optimizer.balance_state
    assert isinstance(optimizer.weighting, moo.FAMO)
    assert unwrap_optimizer(optimizer) is optimizer


def observe() -> None:
    model, compute_losses = build()
    optimizer = moo.BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), moo.FAMO())
    optimizer.backward(compute_losses())
    optimizer.step()
    optimizer.observe(compute_losses())


def read(history: moo.History, folder: Path) -> None:
    """What a history and the metrics of a step give."""
    history.save(folder / "history")
    loaded = moo.History.load(folder / "history")
    keys: list[str] = loaded.keys()
    steps, values = loaded.series(keys[0])
    improvement: tuple[list[int], list[float]] = loaded.improvement("first")
    assert len(steps) == len(values) == 1
    assert len(improvement[0]) == len(improvement[1])


def without_an_optimizer() -> None:
    model, compute_losses = build()
    metrics: moo.StepMetrics = moo.balanced_backward(
        compute_losses(), model, moo.MGDA(), engine=Streaming()
    )
    products: Tensor = moo.gramian(compute_losses(), model.parameters())
    floats: dict[str, float] = metrics.as_floats()
    tensors: dict[str, Tensor] = metrics.as_dict(pairs=True)
    cosines: dict[tuple[str, str], Tensor] = metrics.cosines
    alignment: Tensor | None = metrics.alignment
    assert floats.keys() <= tensors.keys()
    assert products.shape == (2, 2)
    assert alignment is not None
    assert len(cosines) == 1


def measure() -> None:
    model = nn.Linear(4, 2)

    def losses_fn(batch: Tensor) -> dict[str, Tensor]:
        first, second = (model(batch) - 1).square().mean(0)
        return {"first": first, "second": second}

    batches = [torch.randn(8, 4) for _ in range(3)]
    report: moo.ConflictReport = moo.diagnose(losses_fn, model, batches)
    suggested: moo.SuggestedWeights = moo.suggest_weights(losses_fn, model, batches)
    pair: moo.PairFigures = report.pairs["first", "second"]
    one: moo.LossFigures = report.losses["first"]
    advice: str = report.advice
    assert advice
    assert one.norm >= 0
    assert -1 <= pair.cosine <= 1
    assert suggested.to_dict()
    assert report.to_dict()


def mathematics() -> list[Tensor]:
    """Every function of ``moo_balance.functional``."""
    gramian = torch.tensor([[1.0, -0.2], [-0.2, 2.0]])
    losses = torch.tensor([1.0, 0.5])
    solutions = torch.stack([losses, losses.flip(0)])
    shares = torch.tensor([0.5, 0.5])
    weights = functional.min_norm_weights(gramian)
    scales = functional.gradient_scales(losses, gramian, "l2")
    return [
        weights,
        scales,
        functional.analytic_qp_weights(gramian),
        functional.cosine_similarity(gramian),
        functional.equal_projections(gramian, length="imtl_g"),
        functional.fair_weights(gramian, alpha=2.0),
        functional.kkt_residual(gramian, weights),
        functional.project_dual_cone(gramian, shares),
        functional.project_simplex(losses),
        functional.regularize(gramian, 1e-6),
        functional.rescale(weights, "sum", gramian),
        functional.scale_gramian(gramian, scales),
        functional.set_tchebycheff(solutions, shares, 0.0, 0.1),
        functional.set_tchebycheff_value(solutions, shares, 0.0, 0.1),
        functional.smooth_tchebycheff(losses, shares, 0.0, None, 0.1),
        functional.smooth_tchebycheff_value(losses, shares, 0.0, None, 0.1),
        functional.smooth_tchebycheff_log(losses, shares, None, 0.1),
        functional.smooth_tchebycheff_log_value(losses, shares, None, 0.1),
        functional.tchebycheff(losses, shares, 0.0),
        functional.tchebycheff_value(losses, shares, 0.0),
    ]


def refuse() -> str:
    """Errors have a common class."""
    try:
        moo.FAMO(lr=-1.0)
    except moo.BalanceError as error:
        return str(error)
    return ""
