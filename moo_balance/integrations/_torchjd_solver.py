"""Weights of TorchJD from a Gramian, and what of TorchJD can be computed from one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moo_balance.errors import BalanceError, BalanceValueError
from moo_balance.integrations._torchjd_state import StateKeeper, find_keepers
from moo_balance.weighting import State

_LOOK_AT_COORDINATES = ("GradDrop", "TrimmedMean", "ExcessMTL", "ExcessMTLWeighting")
_TAKE_TWO_BATCHES = ("MoDoWeighting", "SDMGradWeighting")
_IGNORE_ROTATION = (
    "ConFIG",
    "ConstantWeighting",
    "MeanWeighting",
    "RandomWeighting",
    "SumWeighting",
    "_NashMTLWeighting",
)


class Batch(NamedTuple):
    """A Gramian on the host, of the losses at some of the declared positions, in this order."""

    gramian: Tensor
    position: Tensor
    declared: int

    def with_absent(self) -> Batch:
        """The Gramian of all declared losses, where the absent ones have a gradient of zero."""
        whole = self.gramian.new_zeros(self.declared, self.declared)
        whole[self.position[:, None], self.position] = self.gramian
        return Batch(whole, torch.arange(self.declared), self.declared)


class Solver:
    """Weights from a Gramian, and the state that follows, by a module that is left as it was.

    Attributes:
        name: The class of what the user passed.
        module: What is called.
        takes: What it is called with.
        keepers: Those of its parts that have a state.
        has_primary: Whether one loss, the first, is not like the others.
        has_vector: Whether it has an entry for each declared loss.
    """

    def __init__(self, given: Any, takes: str | None) -> None:
        self.name = type(given).__name__
        self.module = _unwrap(given)
        self.takes = _find_input(self.module, takes)
        self.keepers: list[StateKeeper] = find_keepers(given, self.module)
        parts = {type(part).__name__ for part in self.module.modules()}
        self.has_primary = "PCDWeighting" in parts
        self.has_vector = "ConstantWeighting" in parts

    def __call__(self, batch: Batch, state: State, seed: int) -> tuple[Tensor, State]:
        if self.has_vector and not self.keepers and len(batch.position) < batch.declared:
            weights, _ = self(batch.with_absent(), state, seed)
            return weights[batch.position], state
        gramian = batch.gramian
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for keeper in self.keepers:
                keeper.write(state, gramian, batch.position)
            try:
                weights = self._weigh(gramian)
                for keeper in self.keepers:
                    state = {**state, **keeper.read()}
            finally:
                for keeper in self.keepers:
                    keeper.reset()
        if weights.shape != gramian.shape[:1]:
            raise BalanceValueError(
                f"{self.name} should return one weight for each of {len(gramian)} losses. Found "
                f"shape {tuple(weights.shape)}. Weightings of TorchJD for losses with more than "
                "one dimension do not fit."
            )
        return weights.detach().to(gramian), state

    def _weigh(self, gramian: Tensor) -> Tensor:
        if self.takes == "gramian":
            weights: Tensor = self.module(gramian)
            return weights
        root = GramianRoot(gramian)
        result: Tensor = self.module(root.rows)
        if not isinstance(self.module, aggregation_module().Aggregator):
            return result
        return root.coefficients_of(result)


class GramianRoot:
    """K vectors of K elements that have the inner products of a Gramian.

    Directions below the rounding of the Gramian's entries are left out: in dependent gradients
    they are noise, which a pseudo-inverse would blow up.
    """

    def __init__(self, gramian: Tensor) -> None:
        precise = gramian.to(torch.float64)
        self.norms = precise.diagonal().clamp(min=0.0).sqrt()
        divisors = self.norms.masked_fill(self.norms == 0, torch.inf)
        cosines = precise / divisors[:, None] / divisors
        values, vectors = torch.linalg.eigh((cosines + cosines.T) / 2)
        threshold = len(values) * torch.finfo(gramian.dtype).eps * values[-1]
        roots = torch.where(values > threshold, values, 0.0).sqrt()
        self.inverse = vectors / roots.masked_fill(roots == 0, torch.inf)
        self.divisors = divisors
        self.rows = (self.norms[:, None] * vectors * roots).to(gramian.dtype)

    def coefficients_of(self, direction: Tensor) -> Tensor:
        """The shortest coefficients, in units of the norms, that combine the rows to it."""
        coefficients: Tensor = self.inverse @ direction.to(torch.float64)
        return coefficients / self.divisors


# ---------------------------------------------------------------------- what fits


def aggregation_module() -> Any:
    try:
        return import_module("torchjd.aggregation")
    except ImportError as error:
        raise BalanceError(
            "TorchJD should be installed for `moo_balance.integrations.torchjd`. Found no module "
            "`torchjd.aggregation`. Install it by `pip install 'torchjd>=0.15'`."
        ) from error


def copy_fresh(weighting: Any) -> Any:
    """A copy without state, so that neither the user's instance nor ours changes the other."""
    aggregation = aggregation_module()
    if not isinstance(weighting, (aggregation.Weighting, aggregation.Aggregator)):
        what = weighting.__name__ if isinstance(weighting, type) else type(weighting).__name__
        raise BalanceValueError(
            "Parameter `weighting` should be an instance of a weighting or an aggregator of "
            f"`torchjd.aggregation`, such as `UPGradWeighting()`. Found {what}. Scalarizers work "
            "on losses only: take the method of this package that has the same name."
        )
    fresh = copy.deepcopy(weighting)
    if hasattr(fresh, "reset"):
        fresh.reset()
    return fresh


def _unwrap(given: Any) -> Any:
    """The weighting inside of an aggregator, or inside of one that computes a Gramian first."""
    if isinstance(given, aggregation_module().WeightedAggregator):
        given = given.weighting
    while getattr(getattr(given, "fn", None), "__name__", "") == "compute_gramian":
        given = given.weighting
    return given


def _find_input(module: Any, takes: str | None) -> str:
    """What a weighting or an aggregator takes, if that can be made from a Gramian."""
    while type(module).__name__ == "CRMOGMWeighting":
        module = module.weighting
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & set(_LOOK_AT_COORDINATES):
        raise _refusal(module, "looks at single coordinates of gradients")
    if names & set(_TAKE_TWO_BATCHES):
        raise _refusal(module, "takes inner products between the gradients of two batches")
    if names & set(_IGNORE_ROTATION):
        return "jacobian"
    if takes is not None and not (takes == "gramian" and "Aggregator" in names):
        return takes
    annotations = {
        getattr(argument, "__name__", str(argument))
        for cls in type(module).__mro__
        for base in getattr(cls, "__orig_bases__", ())
        for argument in getattr(base, "__args__", ())
    }
    if "PSDMatrix" in annotations:
        return "gramian"
    if "PSDTensor" in annotations:
        raise _refusal(module, "takes generalized Gramians")
    raise BalanceValueError(
        f"Parameter `takes` should say what {type(module).__name__} takes, which is not known: "
        '"gramian" or, if it does not depend on the choice of coordinates, "jacobian", as all '
        f"aggregators. Found {takes!r}."
    )


def _refusal(module: Any, reason: str) -> BalanceValueError:
    return BalanceValueError(
        "Parameter `weighting` should be computed from the Gramian of one batch. Found "
        f"{type(module).__name__}, which {reason}. Look for a method of the same name in "
        "`moo_balance`."
    )


def explain(error: Exception, name: str, present: Sequence[str], position: Tensor) -> BalanceError:
    return BalanceError(
        f"TorchJD's {name} should be able to weight the losses {list(present)}. Found: {error} "
        f"These are losses {position.tolist()} of the declared ones, in the order of the first "
        "batch or of `loss_names=[…]`; a vector of TorchJD's has one entry for each."
    )
