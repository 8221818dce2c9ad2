"""What a step did to the two losses: the angle between their gradients, and how fast each fell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from examples.lic.session import Observer, Session, random_state, set_random_state
from moo_balance.functional import cosine_similarity


class Probe(Observer):
    r"""Looks into every n-th step; :attr:`figures` holds what the last look showed.

    ``cosine``: of the angle between the gradients of rate and distortion, over all parameters.
    ``speed/rate`` and ``speed/distortion``: the improvement speed of the paper's Eq. 4,

    .. math:: s_i = \frac{L_{i,t} - L_{i,t+1}}{L_{i,t}}

    of the same crops under the same noise before and after the step: what the step has gained.

    It costs two forward and two backward passes, sees the crops of its own process alone, and
    leaves the random streams as they were, so that a run does not depend on being watched.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.figures: dict[str, float] = {}
        self._images: Tensor | None = None
        self._noise: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}

    def before(self, session: Session, images: Tensor) -> None:
        if (session.taken + 1) % self.every:
            return
        self._images, self._noise = images, random_state(session.device)
        self._losses = self._evaluate(session)
        self.figures = {"cosine": gradient_cosine(self._losses, session.parameters)}

    def after(self, session: Session) -> None:
        if self._images is None:
            return
        with torch.no_grad():
            speeds = improvement_speeds(self._losses, self._evaluate(session))
        self.figures.update({f"speed/{name}": speed for name, speed in speeds.items()})
        self._images = None

    def _evaluate(self, session: Session) -> dict[str, Tensor]:
        assert self._images is not None
        now = random_state(session.device)
        set_random_state(self._noise, session.device)
        try:
            # Not through a data-parallel wrapper: other ranks are not called.
            return session.bare_objective(self._images)
        finally:
            set_random_state(now, session.device)


def gradient_cosine(losses: Mapping[str, Tensor], parameters: list[torch.nn.Parameter]) -> float:
    """Cosine of the angle between the gradients of two losses; 0 if one has none."""
    rows = [
        torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses.values()
    ]
    flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    return cosine_similarity(flat @ flat.T)[0, 1].item()


def improvement_speeds(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float]:
    """Relative decrease of each loss; negative where it rose."""
    return {name: ((loss - after[name]) / loss).item() for name, loss in before.items()}
