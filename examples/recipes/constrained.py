"""A classifier whose rates of acceptance may differ by at most 0.1: a bound in place of a weight.

Synthetic applicants of two groups. The label depends on four features, two of which are higher in
the second group, so a classifier accepts more of it. The losses are the cross-entropy and the gap
between the mean scores of the groups. A static weight of the gap leads to some gap; `Lagrangian`
takes the gap and finds the weight.

    python -m examples.recipes.constrained --figure constrained.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.recipes import common
from moo_balance import BalancedOptimizer, FixedWeights, History, Lagrangian, Sum
from moo_balance.weighting import Weighting

BOUNDS = (0.05, 0.1, 0.15)
WEIGHTS = (0.1, 0.2, 0.4, 0.8)


class People(NamedTuple):
    features: Tensor  # [N, 4]
    second_group: Tensor  # [N], boolean
    label: Tensor  # [N], 0 or 1


class Run(NamedTuple):
    trained_gap: float
    gap: float  # on held-out people
    cross_entropy: float
    accuracy: float  # %
    history: History


def draw_people(count: int, seed: int) -> People:
    generator = torch.Generator().manual_seed(seed)
    second_group = torch.rand(count, generator=generator) < 0.4
    features = torch.randn(count, 4, generator=generator)
    features[:, :2] += second_group[:, None]
    score = features[:, 0] + features[:, 1] * features[:, 2] + features[:, 3] - 0.5
    label = torch.rand(count, generator=generator) < (1.5 * score).sigmoid()
    return People(features, second_group, label.float())


def compute_losses(model: nn.Module, people: People) -> dict[str, Tensor]:
    logit = model(people.features)[:, 0]
    score = logit.sigmoid()
    gap = score[people.second_group].mean() - score[~people.second_group].mean()
    task = nn.functional.binary_cross_entropy_with_logits(logit, people.label)
    return {"task": task, "gap": gap.abs()}


def start(weighting: Weighting, seed: int) -> tuple[nn.Module, BalancedOptimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    return model, BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), weighting)


def train(weighting: Weighting, seed: int, steps: int) -> Run:
    people, held_out = draw_people(2000, seed), draw_people(8000, 1000 + seed)
    model, optimizer = start(weighting, seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-3)
    history = History()
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(compute_losses(model, people))
        optimizer.step()
        schedule.step()
        history.append(optimizer.metrics)
    with torch.no_grad():
        trained, held = compute_losses(model, people), compute_losses(model, held_out)
        right = ((model(held_out.features)[:, 0] > 0) == held_out.label.bool()).float().mean()
    numbers = trained["gap"], held["gap"], held["task"], 100 * right
    return Run(*(number.item() for number in numbers), history)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, front),) = common.make_axes(1, 3)
    for colour, bound in zip(common.COLOURS, BOUNDS, strict=False):
        history = runs[f"bound {bound:g}"][0].history
        losses.plot(*history.series("loss/gap"), color=colour, linewidth=0.7)
        losses.axhline(bound, color=colour, linewidth=0.8, linestyle="--")
        coefficients.plot(*history.series("weight/gap"), color=colour, linewidth=0.7)
        front.axvline(bound, color=colour, linewidth=0.8, linestyle="--")
    losses.set(xlabel="step", ylabel="gap", title="gap in training")
    coefficients.set(xlabel="step", title="multiplier of the gap")
    for name, seeds in runs.items():
        bounded = name.startswith("bound")
        colour = common.COLOURS[BOUNDS.index(float(name.split()[1]))] if bounded else common.INK
        points = [run.trained_gap for run in seeds], [run.cross_entropy for run in seeds]
        label = name if bounded else "static weights" if name == "Sum" else None
        front.scatter(*points, color=colour, s=22, marker="o" if bounded else "x", label=label)
    front.set(xlabel="gap in training", title="cross-entropy, held out")
    front.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 20 if args.quick else 800
    methods: dict[str, Weighting] = {"Sum": Sum()}
    for weight in WEIGHTS:
        methods[f"weight {weight:g}"] = FixedWeights({"task": 1.0, "gap": weight})
    for bound in BOUNDS:
        methods[f"bound {bound:g}"] = Lagrangian({"gap": bound}, objective="task")
    runs = {
        name: [train(rule, seed, steps) for seed in args.seeds] for name, rule in methods.items()
    }

    people = draw_people(2000, args.seed)
    started = {name: start(methods[name], args.seed) for name in ("Sum", f"bound {BOUNDS[0]:g}")}
    times = common.step_times(
        {
            name: partial(optimizer.step, partial(compute_losses, model, people))
            for name, (model, optimizer) in started.items()
        },
        rounds=5 if args.quick else 200,
    )
    header = ["method", "gap in training", "gap, held out", "cross-entropy", "accuracy, %"]
    scores = {name: [run[:4] for run in seeds] for name, seeds in runs.items()}
    common.print_scores(header, scores)
    _, bounded = times.values()
    print(f"A step with `Lagrangian` takes {bounded:.2f} times as long as one of the sum.")
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
