"""Random sequences of calls on two ranks end where one process ends on the joined batches.

A seed decides on a sequence, which both ranks play, each on its share of every batch. In some
calls one rank is wrong: then both must raise, and nothing may have changed on either.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from moo_balance import BalancedOptimizer, BalanceError
from tests.fuzz.amounts import IS_DRAWN_ANEW, over_amounts
from tests.support.distributed import Net, assert_same_on_all_ranks, parameters, share
from tests.support.problems import snapshot
from tests.support.registry import KINDS, NAMES, Method

LENGTH = 8
FAULTS = ("nan", "detached", "absent", "empty", "unknown", "no mapping", "error", "frozen")
OBSERVED_FAULTS = ("empty", "unknown", "no mapping")


class NamedNet(Net):
    """Computes nothing that the losses of a batch do not need, and keeps its features."""

    def forward(self, batch: Tensor, names: Sequence[str] = NAMES) -> list[Tensor]:
        self.features = self.trunk(batch[:, :5])
        heads = [head for name, head in zip(NAMES, self.heads, strict=True) if name in names]
        return [head(self.features) for head in heads]


def losses_of(model: nn.Module, batch: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Positive losses by name, each a mean over the batch."""
    return {
        name: 3.0 ** NAMES.index(name) * ((output - batch[:, 5:]).square().mean() + 0.1)
        for name, output in zip(names, model(batch, names), strict=True)
    }


class Side:
    """A model and its optimizer: this rank's, or the one that sees the joined batches."""

    def __init__(self, method: Method, wrapper: dict[str, Any] | None, alone: bool) -> None:
        self.net, self.alone = NamedNet(), alone
        self.model = self.net if wrapper is None or alone else DDP(self.net, **wrapper)
        self.weighting = method.make(NAMES)
        self.optimizer = self._wrap()

    def _wrap(self) -> BalancedOptimizer:
        plain = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        group = None if self.alone else "auto"
        return BalancedOptimizer(
            plain, self.weighting, loss_names=NAMES, process_group=group, nonfinite="raise"
        )

    def losses(self, batch: int, names: Sequence[str]) -> dict[str, Tensor]:
        return losses_of(self.model, share(batch, alone=self.alone), names)

    def picture(self) -> Any:
        """All that a refused call must not change."""
        grads = [p.grad for p in self.net.parameters()]
        return snapshot([parameters(self.net), grads, self.optimizer.state_dict()])

    # ------------------------------------------------------------ calls

    def step(
        self,
        form: str,
        batches: Sequence[int],
        names: Sequence[Sequence[str]],
        mistake: tuple[str, int] | None = None,
    ) -> None:
        """One step on a window of micro-batches, of which there may be one only.

        Args:
            form: How the losses are passed.
            batches: Their numbers.
            names: The losses of each.
            mistake: A fault, and the rank which makes it when it observes the step.
        """
        optimizer, last = self.optimizer, len(batches) - 1
        if form == "features" and all(not p.requires_grad for p in self.net.trunk.parameters()):
            form = "losses"
        if form == "step":
            optimizer.step(lambda: self.losses(batches[last], names[last]))
            return
        optimizer.zero_grad()
        for position in range(last):
            with optimizer.accumulate():
                self._backward(form, batches[position], names[position])
        self._backward(form, batches[last], names[last])
        optimizer.step()
        present = [name for name in NAMES if any(name in each for each in names)]
        if self.weighting.observes_step and form != "closure":
            self._observe(batches, names, present, mistake)

    def _backward(self, form: str, batch: int, names: Sequence[str]) -> None:
        optimizer = self.optimizer
        if form == "closure":
            optimizer.backward(lambda: self.losses(batch, names))
        elif form == "combined":
            optimizer.combined_loss(self.losses(batch, names)).backward()
        elif form == "features":
            optimizer.backward(self.losses(batch, names), features=self.net.features)
        else:
            optimizer.backward(self.losses(batch, names))

    def _observe(
        self,
        batches: Sequence[int],
        names: Sequence[Sequence[str]],
        present: Sequence[str],
        mistake: tuple[str, int] | None,
    ) -> None:
        total: dict[str, Any] = dict.fromkeys(present, 0.0)
        with torch.no_grad():
            for batch, each in zip(batches, names, strict=True):
                for name, loss in self.losses(batch, each).items():
                    total[name] = total[name] + loss
        if mistake is not None and not self.alone:
            before, is_wrong = self.picture(), dist.get_rank() == mistake[1]
            with pytest.raises(BalanceError):
                self.optimizer.observe(spoil(total, mistake[0]) if is_wrong else total)
            assert self.picture() == before
        self.optimizer.observe(total)

    def change(self, lr: float, frozen: set[int]) -> None:
        """Set the learning rate, and which parameters of the heads train."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for position, param in enumerate(self.net.trunk.parameters()):
            param.requires_grad_(position not in frozen)

    def reload(self) -> None:
        """Go on with another optimizer and a checkpoint."""
        saved = self.optimizer.state_dict()
        self.optimizer = self._wrap()
        self.optimizer.load_state_dict(saved)

    def call_wrongly(self, fault: str, rank: int, batch: int, form: str) -> None:
        """A call that one rank gets wrong, and all must refuse."""
        is_wrong = dist.get_rank() == rank
        names = NAMES[1:] if fault == "absent" and is_wrong else NAMES
        weight = self.net.trunk[0].weight
        if fault == "frozen" and is_wrong:
            weight.requires_grad_(not weight.requires_grad)
        self.optimizer.zero_grad()
        before = self.picture()

        def losses() -> Any:
            values = self.losses(batch, names)
            return spoil(values, fault) if is_wrong else values

        expected = Exception if fault == "error" and is_wrong else BalanceError
        with pytest.raises(expected):
            self._call(form, losses, is_wrong)
        assert self.picture() == before
        if fault == "frozen" and is_wrong:
            weight.requires_grad_(not weight.requires_grad)

    def _call(self, form: str, losses: Callable[[], Any], is_wrong: bool) -> None:
        optimizer = self.optimizer
        if form == "step":
            optimizer.step(losses)
        elif form == "closure":
            optimizer.backward(losses)
        elif form == "accumulate":
            with optimizer.accumulate():
                optimizer.backward(losses)
        elif form == "combined":
            optimizer.combined_loss(losses())
        else:
            optimizer.backward(losses(), features=torch.ones(3) if is_wrong else self.net.features)


def spoil(losses: dict[str, Tensor], fault: str) -> Any:
    if fault == "nan":
        return {**losses, "b": losses["b"] * torch.nan}
    if fault == "detached":
        return {**losses, "b": losses["b"].detach()}
    if fault == "error":
        raise ValueError("the user's own")
    others = {"empty": {}, "unknown": {**losses, "zzz": torch.ones(())}, "no mapping": None}
    return others.get(fault, losses)


# ------------------------------------------------------------ sequences


def play(seed: int) -> None:
    """Play the sequence of a seed on this rank's share and on the joined batches."""
    draw = random.Random(seed)
    method = draw.choice(KINDS)
    wrappers: list[dict[str, Any] | None] = [{"find_unused_parameters": True}]
    if method.gramian:
        wrappers.append(None)
    ranks, alone = (
        Side(method, wrapper, alone)
        for wrapper in [draw.choice(wrappers)]
        for alone in (False, True)
    )
    for _ in range(LENGTH):
        play_one(draw, method, ranks, alone)
        own = parameters(ranks.net), ranks.optimizer.state_dict()["balance"]
        expected = parameters(alone.net), alone.optimizer.state_dict()["balance"]
        assert_same_on_all_ranks(own)
        torch.testing.assert_close(own[0], expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            own[1]["state"], expected[1]["state"], rtol=1e-7, atol=1e-8, equal_nan=True
        )
        assert {**own[1], "state": None} == {**expected[1], "state": None}


def play_one(draw: random.Random, method: Method, ranks: Side, alone: Side) -> None:
    """One call or a few that belong together, drawn alike on all ranks."""
    kind = draw.choice(["step", "step", "step", "window", "wrong", "change", "reload"])
    batch = draw.randrange(100)
    if kind == "wrong":
        form, fault = (
            draw.choice(["step", "closure", "accumulate", "combined"]),
            draw.choice(FAULTS),
        )
        if method.gramian and draw.random() < 0.2:
            form, fault = "features", "features"
        if fault in ("error", "no mapping") and form in ("step", "combined"):
            form = "closure"  # those would be a trainer's own closure, and an error outside
        ranks.call_wrongly(fault, draw.randrange(2), batch, form)
        ranks.optimizer.zero_grad()
        alone.optimizer.zero_grad()
    elif kind == "change":
        frozen = set(draw.choices([0, 1], k=draw.randrange(3))) if draw.random() < 0.5 else set()
        lr = draw.choice([0.001, 0.01])
        for side in (ranks, alone):
            side.change(lr, frozen)
    elif kind == "reload":
        for side in (ranks, alone):
            side.reload()
    else:
        count = draw.randint(2, 3) if kind == "window" else 1
        forms = (
            ["closure", "losses"] if kind == "window" else ["step", "closure", "losses", "combined"]
        )
        forms += ["features"] if kind == "step" and method.gramian else []
        form, names = draw.choice(forms), [draw_names(draw) for _ in range(count)]
        mistake = (draw.choice(OBSERVED_FAULTS), draw.randrange(2)) if draw.random() < 0.3 else None
        for side in (ranks, alone):
            side.step(form, range(batch, batch + count), names, mistake)


def draw_names(draw: random.Random) -> list[str]:
    some = [name for name in NAMES if draw.random() < 0.7]
    return some if some and draw.random() < 0.5 else list(NAMES)


@over_amounts(few=5)
def test_sequences_of_calls(examples: int) -> None:
    start = [secrets.randbelow(2**40) if IS_DRAWN_ANEW else 0]
    dist.broadcast_object_list(start)
    for seed in range(start[0], start[0] + examples):
        try:
            play(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
