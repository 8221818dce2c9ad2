"""Balance inside PINA: its solver, Trainer, scheduler and logging, with our coefficients.

Poisson's equation on the unit square, PINA's own `Poisson2DSquareProblem`: the residual inside, and
u = 0 on the boundary. PINA multiplies each loss by a weight, and reduces the list to one scalar by
its `aggregator`; here the aggregator is `combined_loss`. Compared are PINA's weightings with two
methods of ours, by the relative L2 error against the exact solution.

    pip install pina-mathlab
    python -m examples.recipes.pina_poisson --figure poisson.svg
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from examples.recipes import common
from moo_balance import BalancedOptimizer, GradientNorms, NashMTL
from moo_balance.weighting import Weighting

try:
    from pina import LabelTensor, Trainer
    from pina.model import FeedForward
    from pina.optim import TorchOptimizer, TorchScheduler
    from pina.problem.zoo import Poisson2DSquareProblem
    from pina.solver import PhysicsInformedSingleModelSolver as PINN
    from pina.weighting import (
        BaseWeighting,
        NeuralTangentKernelWeighting,
        ScalarWeighting,
        SelfAdaptiveWeighting,
    )

    from examples.recipes._lightning import QUIET, Recorder, silence, step_times_of_runs
    from moo_balance.integrations.lightning import combined_loss
except ModuleNotFoundError as error:
    raise common.missing_package(error, "pip install pina-mathlab") from error

TRIALS = (10.0, 100.0, 1000.0)  # static weights of the boundary; the plain sum is one more trial


class BalancedTorchOptimizer(TorchOptimizer):
    """PINA's `TorchOptimizer`, whose optimizer balances."""

    def __init__(self, optimizer_class: type, weighting: Weighting, **settings: object) -> None:
        super().__init__(optimizer_class, **settings)
        self.weighting = weighting

    def hook(self, parameters: object) -> None:
        super().hook(parameters)
        self._optimizer_instance = BalancedOptimizer(self._optimizer_instance, self.weighting)


class BalancedWeighting(BaseWeighting):
    """Leaves PINA's weights at 1, and combines the losses by the solver's optimizer."""

    def __init__(self) -> None:
        super().__init__(aggregator=self.combine)

    def update_weights(self, losses: dict[str, Tensor]) -> dict[str, float]:
        self.names = list(losses)
        return dict.fromkeys(losses, 1.0)

    def combine(self, losses: Tensor) -> Tensor:
        losses = losses.as_subclass(Tensor).flatten()
        if not self.solver.trainer.training:
            return losses.sum()
        named = dict(zip(self.names, losses.unbind(), strict=True))
        return combined_loss(self.solver, named)


class Run(NamedTuple):
    solver: PINN
    error: float
    recorder: Recorder


# What `PINN` is given: PINA's weighting, and the optimizer.
Method = Callable[[], tuple[BaseWeighting, TorchOptimizer]]


def pina(weighting: BaseWeighting) -> tuple[BaseWeighting, TorchOptimizer]:
    return weighting, TorchOptimizer(torch.optim.Adam, lr=5e-3)


def ours(weighting: Weighting) -> tuple[BaseWeighting, TorchOptimizer]:
    return BalancedWeighting(), BalancedTorchOptimizer(torch.optim.Adam, weighting, lr=5e-3)


def train(method: Method, seed: int, steps: int) -> Run:
    torch.manual_seed(seed)
    problem = Poisson2DSquareProblem()
    problem.discretise_domain(400, "random", domains="D")
    problem.discretise_domain(80, "random", domains="boundary")
    weighting, optimizer = method()
    solver = PINN(
        problem,
        FeedForward(2, 1, layers=[20, 20]),
        optimizer=optimizer,
        scheduler=TorchScheduler(CosineAnnealingLR, T_max=steps, eta_min=5e-4),
        weighting=weighting,
    )
    recorder = Recorder()
    trainer = Trainer(
        solver,
        max_epochs=steps,  # one batch, of all points
        accelerator="cpu",
        callbacks=[recorder],
        **QUIET,
    )
    trainer.train()
    return Run(solver, relative_error(solver), recorder)


@torch.no_grad()
def relative_error(solver: PINN) -> float:
    side = torch.linspace(0, 1, 51)
    grid = LabelTensor(torch.cartesian_prod(side, side), ["x", "y"])
    exact = solver.problem.solution(grid).tensor
    return float((solver(grid).tensor - exact).norm() / exact.norm())


def draw(run: Run, runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, errors),) = common.make_axes(1, 3)
    common.draw_history(run.recorder.history, losses, coefficients, "NashMTL")
    common.draw_scores(
        errors, {name: [(run.error,) for run in each] for name, each in runs.items()}
    )
    errors.set(title="relative error", xscale="log")
    common.use_few_ticks(errors.xaxis)
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    silence()
    steps = 8 if args.quick else 400
    static = {f"boundary {w:g}": partial(weigh_boundary, w) for w in TRIALS}
    scores = {name: train(each, args.seed, steps).error for name, each in static.items()}
    best = min(scores, key=scores.__getitem__)
    methods: dict[str, Method] = {
        "sum": lambda: pina(ScalarWeighting(1.0)),
        best: static[best],
        "PINA's NTK": lambda: pina(NeuralTangentKernelWeighting()),
        "PINA's SelfAdaptive": lambda: pina(SelfAdaptiveWeighting()),
        "GradientNorms": lambda: ours(GradientNorms(every=10)),
        "NashMTL": lambda: ours(NashMTL()),
    }
    runs = {
        name: [train(each, seed, steps) for seed in args.seeds] for name, each in methods.items()
    }
    short = {
        name: lambda each=each: train(each, args.seed, 15).recorder
        for name, each in methods.items()
    }
    times = step_times_of_runs(short, rounds=1 if args.quick else 8)
    errors = {name: [(run.error,) for run in each] for name, each in runs.items()}
    common.print_scores(["method", "relative error", "time of a step"], errors, times)
    if args.figure:
        draw(runs["NashMTL"][0], runs, args.figure)


def weigh_boundary(weight: float) -> tuple[BaseWeighting, TorchOptimizer]:
    return pina(ScalarWeighting({"boundary": weight}))


if __name__ == "__main__":
    main()
