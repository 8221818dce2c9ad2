"""Optimizers that are not in torch.optim and have methods of their own, small and faithful."""

from __future__ import annotations

import torch


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): `eval` swaps the average in, `train` the iterate."""

    beta = 0.9

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "train_mode": True, "k": 0})

    def _swap(self, training, weight):
        for group in self.param_groups:
            if group["train_mode"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = training

    def train(self):
        self._swap(True, 1 - self.beta)

    def eval(self):
        self._swap(False, 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (self.beta * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), in the form that most projects copy."""

    def __init__(self, params, base, rho=0.05, **arguments):
        super().__init__(params, {"rho": rho, **arguments})
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norms = [p.grad.norm() for g in self.param_groups for p in g["params"]]
        norm = torch.stack(norms).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
