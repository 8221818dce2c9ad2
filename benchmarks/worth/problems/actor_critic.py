"""Advantage actor-critic on cart-poles, with policy, value and entropy as three losses.

The game is CartPole-v1 (Barto, Sutton & Anderson 1983): a reward of 1 for each step, and 500 steps
at most. 128 of them are played at once, 16 steps in each update, as by A2C (arXiv 1602.01783).
Policy and value share one hidden layer. Advantages are not normalised, and the losses are in
natural units: published runs weigh the value by 0.5 and the entropy by 0.01 or less.

The score is 1 minus the share of the 500 steps survived by the greedy policy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.worth.problem import Problem, Training

GAMES = 128
PLAYED = 16
LONGEST = 500
DISCOUNT = 0.98
HIDDEN = 32
LIMITS = np.array([2.4, np.inf, 0.2095, np.inf], dtype=np.float32)


def initial_states(count: int, generator: torch.Generator | None = None) -> np.ndarray:
    return (0.1 * torch.rand(count, 4, generator=generator) - 0.05).numpy()


def move(state: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The states 0.02 s later, after a push of 10 N to the right or to the left."""
    _, speed, angle, turning = state.T
    sine, cosine = np.sin(angle), np.cos(angle)
    push = (np.where(right, 10, -10) + 0.05 * turning**2 * sine) / 1.1
    angular = (9.8 * sine - cosine * push) / (2 / 3 - cosine**2 / 22)
    linear = push - angular * cosine / 22
    return state + 0.02 * np.stack([speed, linear, turning, angular], axis=1, dtype=np.float32)


def is_over(state: np.ndarray) -> np.ndarray:
    return (abs(state) > LIMITS).any(1)


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, HIDDEN)
        self.heads = nn.Linear(HIDDEN, 2)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of a push to the right, and the value."""
        logit, value = self.heads(self.hidden(state).tanh()).unbind(-1)
        return logit, value


class Batch(NamedTuple):
    states: Tensor
    actions: Tensor
    returns: Tensor


class Games:
    """Cart-poles that go on from batch to batch; those that end start again."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.state = initial_states(GAMES)
        self.age = torch.randint(LONGEST, (GAMES,)).numpy()

    @torch.no_grad()
    def play(self) -> Batch:
        states, actions, continues = [], [], []
        for luck in torch.rand(PLAYED, GAMES):
            state = torch.from_numpy(self.state)
            right = luck < self.agent(state)[0].sigmoid()
            states.append(state)
            actions.append(right)
            self.state = move(self.state, right.numpy())
            self.age += 1
            over = is_over(self.state) | (self.age >= LONGEST)
            self.state[over] = initial_states(over.sum())
            self.age[over] = 0
            continues.append(~over)
        following = self.agent(torch.from_numpy(self.state))[1].numpy()
        returns = []
        for goes_on in reversed(continues):
            following = 1 + DISCOUNT * goes_on * following
            returns.append(following)
        targets = torch.from_numpy(np.concatenate(returns[::-1])).float()
        return Batch(torch.cat(states), torch.cat(actions).float(), targets)


def start(seed: int) -> Training:
    agent = Agent()
    games = Games(agent)

    def losses(batch: Batch) -> dict[str, Tensor]:
        logit, value = agent(batch.states)
        advantage = batch.returns - value
        right = logit.sigmoid()
        surprise = nn.functional.binary_cross_entropy_with_logits(
            logit, batch.actions, reduction="none"
        )
        entropy = nn.functional.binary_cross_entropy_with_logits(logit, right)
        return {
            "policy": (advantage.detach() * surprise).mean(),
            "value": advantage.square().mean(),
            "entropy": -entropy,
        }

    @torch.no_grad()
    def failure(first_state: int) -> float:
        state = initial_states(100, torch.Generator().manual_seed(first_state))
        alive, survived = np.ones(100, dtype=bool), 0
        for _ in range(LONGEST):
            logit, _ = agent(torch.from_numpy(state))
            state = move(state, (logit > 0).numpy())
            alive &= ~is_over(state)
            state[~alive] = 0
            survived += alive.sum()
            if not alive.any():
                break
        return 1 - float(survived) / (100 * LONGEST)

    return Training(
        list(agent.parameters()),
        draw=games.play,
        losses=losses,
        validate=lambda: failure(1),
        test=lambda: failure(2),
    )


PROBLEM = Problem(
    title="Actor-critic on cart-poles",
    score="share of the 500 steps not survived",
    start=start,
    loss_names=("policy", "value", "entropy"),
    primary="policy",
    steps=100,
    rates=(3e-3, 1e-2, 3e-2),
    trivial=0.85,
)
