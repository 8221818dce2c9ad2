"""An actor-critic agent: losses of either sign, and an entropy bonus that is no objective.

The agent keeps a ball on a beam that it tilts to the left or to the right. The value loss is in
squared units of the return, and the policy loss can be negative. `WithConstant` leaves the entropy
its constant coefficient, and the method inside balances the two objectives.

    python -m examples.recipes.actor_critic --figure agent.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.recipes import common
from moo_balance import (
    BalancedOptimizer,
    FixedWeights,
    GradientNorms,
    History,
    NashMTL,
    WithConstant,
    diagnose,
)
from moo_balance.weighting import Weighting

BALLS, PLAYED, LONGEST, DISCOUNT = 64, 16, 200, 0.97
TRIALS = (0.01, 0.1, 0.5)  # static weights of the value loss; the plain sum is one more trial
ENTROPY = -0.01  # the coefficient that maximizes the entropy a little


class Beam:
    """Many balls on beams: 1 point for each step in which a ball is within 0.2 of the middle."""

    def __init__(self, count: int) -> None:
        self.state = torch.zeros(count, 3)  # place, speed, tilt
        self.age = torch.randint(LONGEST, (count,))
        self._restart(torch.ones(count, dtype=torch.bool))

    def _restart(self, over: Tensor) -> None:
        self.state[over] = torch.rand(int(over.sum()), 3) - 0.5
        self.age[over] = 0

    def move(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Move all balls; returns the rewards, and which games go on."""
        place, speed, tilt = self.state.unbind(1)
        tilt = (tilt + 0.1 * (2.0 * right - 1)).clamp(-0.5, 0.5)
        speed = speed + 0.1 * tilt + 0.02 * torch.randn_like(speed)
        place = place + 0.2 * speed
        self.state = torch.stack([place, speed, tilt], dim=1)
        self.age += 1
        over = (place.abs() > 1) | (self.age >= LONGEST)
        self._restart(over)
        return (place.abs() < 0.2).float(), ~over


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.heads = nn.Linear(32, 2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of a tilt to the right, and the value."""
        logit, value = self.heads(self.trunk(state)).unbind(-1)
        return logit, value


class Batch(NamedTuple):
    states: Tensor
    actions: Tensor
    returns: Tensor


@torch.no_grad()
def play(agent: Agent, beam: Beam) -> tuple[Batch, float]:
    """Some steps of all balls, and the mean reward."""
    states, actions, rewards, lives = [], [], [], []
    for _ in range(PLAYED):
        states.append(beam.state)
        actions.append((torch.rand(BALLS) < agent(beam.state)[0].sigmoid()).float())
        reward, goes_on = beam.move(actions[-1])
        rewards.append(reward)
        lives.append(goes_on.float())
    following, returns = agent(beam.state)[1], []
    for reward, goes_on in zip(rewards[::-1], lives[::-1], strict=True):
        following = reward + DISCOUNT * goes_on * following
        returns.append(following)
    batch = Batch(torch.cat(states), torch.cat(actions), torch.cat(returns[::-1]))
    return batch, torch.stack(rewards).mean().item()


def compute_losses(agent: Agent, batch: Batch) -> dict[str, Tensor]:
    logit, value = agent(batch.states)
    advantage = batch.returns - value
    choice = torch.distributions.Bernoulli(logits=logit)
    return {
        "policy": -(advantage.detach() * choice.log_prob(batch.actions)).mean(),
        "value": advantage.square().mean(),
        "entropy": choice.entropy().mean(),
    }


class Run(NamedTuple):
    rewards: list[float]  # mean reward of each batch
    history: History

    @property
    def score(self) -> float:
        """The mean reward in the last tenth of the training."""
        return mean(self.rewards[-max(1, len(self.rewards) // 10) :])


def start(weighting: Weighting, seed: int) -> tuple[Agent, Beam, BalancedOptimizer]:
    torch.manual_seed(seed)
    agent = Agent()
    adam = torch.optim.Adam(agent.parameters(), lr=5e-3)
    return agent, Beam(BALLS), BalancedOptimizer(adam, weighting)


def train(weighting: Weighting, seed: int, steps: int) -> Run:
    agent, beam, optimizer = start(weighting, seed)
    rewards, history = [], History()
    for _ in range(steps):
        batch, reward = play(agent, beam)
        optimizer.zero_grad()
        optimizer.backward(compute_losses(agent, batch))
        nn.utils.clip_grad_norm_(agent.parameters(), 10.0)
        optimizer.step()
        rewards.append(reward)
        history.append(optimizer.metrics)
    return Run(rewards, history)


def weigh_value(weight: float) -> FixedWeights:
    return FixedWeights({"policy": 1.0, "value": weight, "entropy": ENTROPY})


def average(values: Sequence[float], window: int = 10) -> list[float]:
    """Means of so many consecutive values."""
    return [mean(values[i : i + window]) for i in range(len(values) - window + 1)]


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    figure, ((losses, coefficients, rewards),) = common.make_axes(1, 3)
    for axes, kind, linear in ((losses, "loss", 0.1), (coefficients, "coefficient", 0.01)):
        runs["GradientNorms"][0].history.plot(kind, axes)
        axes.set_yscale("symlog", linthresh=linear)  # either may be negative
    for colour, (name, each) in zip(common.COLOURS, runs.items(), strict=False):
        for run in each:
            label = name if run is each[0] else None
            rewards.plot(average(run.rewards), color=colour, linewidth=0.9, label=label)
    rewards.set(xlabel="step", title="reward, mean of 10 batches")
    rewards.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    common.save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = common.parse(__doc__, arguments)
    steps = 12 if args.quick else 200
    static = {f"value weight {weight:g}": weigh_value(weight) for weight in TRIALS}
    best = max(static, key=lambda name: train(static[name], args.seed, steps).score)
    constants = {"entropy": ENTROPY}
    methods = {
        "Sum": weigh_value(1.0),
        best: static[best],
        "GradientNorms": WithConstant(GradientNorms(every=10), constants),
        "NashMTL": WithConstant(NashMTL(), constants),
    }
    runs = {name: [train(m, seed, steps) for seed in args.seeds] for name, m in methods.items()}

    agent, beam, optimizer = start(methods["Sum"], args.seed)
    for _ in range(steps // 4):
        optimizer.step(partial(compute_losses, agent, play(agent, beam)[0]))
    batches = [play(agent, beam)[0] for _ in range(12)]
    report = diagnose(partial(compute_losses, agent), agent, batches)
    print(f"After {steps // 4} steps with the sum:\n{report}\n")

    timed = {}
    for name, method in methods.items():
        agent, _, optimizer = start(method, args.seed)
        timed[name] = partial(optimizer.step, partial(compute_losses, agent, batches[0]))
    times = common.step_times(timed, rounds=5 if args.quick else 100)
    scores = {name: [(run.score, mean(run.rewards)) for run in each] for name, each in runs.items()}
    header = ["method", "reward at the end", "over the training", "time of a step"]
    common.print_scores(header, scores, times)
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    main()
