"""Adam on K numbers against torch.optim.Adam."""

from __future__ import annotations

import torch
from torch import nn

from moo_balance.weighting._adam import adam, init_adam
from tests.support.statistics import CPU, assert_near, normal

ALL = torch.tensor([True, True, True])


def test_updates_are_those_of_the_adam_of_torch() -> None:
    parameter = nn.Parameter(normal(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    values, state = parameter.detach().clone(), init_adam(3, CPU)
    for step in range(50):
        parameter.grad = normal(3, seed=step)
        optimizer.step()
        values, state = adam(values, normal(3, seed=step), ALL, state, lr=0.1)
        assert_near(values, parameter.detach(), 1e-12)


def test_an_absent_loss_counts_its_own_updates() -> None:
    values, state = normal(3), init_adam(3, CPU)
    late, its_state = values[2:].clone(), init_adam(1, CPU)
    for step in range(10):
        present = torch.tensor([True, True, step >= 4])
        gradient = normal(3, seed=step) * present
        values, state = adam(values, gradient, present, state, lr=0.1)
        if step >= 4:
            late, its_state = adam(late, gradient[2:], ALL[:1], its_state, lr=0.1)
    assert_near(values[2:], late, 1e-15)
