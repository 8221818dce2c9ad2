"""TorchJD: its weightings, and the aggregators that amount to one, as methods of this package."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moo_balance.errors import BalanceError, BalanceValueError
from moo_balance.integrations._torchjd_state import StateKeeper, find_keepers
from moo_balance.weighting import GramianWeighting, State, Statistics, step_generator
from moo_balance.weighting._arguments import check_choice, check_whole
from moo_balance.weighting._identity import describe

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


@dataclass(frozen=True, eq=False)
class TorchJD(GramianWeighting):
    """A weighting or an aggregator of TorchJD, inside of ``BalancedOptimizer``.

    What it gets from TorchJD are K weights, computed from the Gramian. Everything else is that of
    this package: absent losses, windows, ranks, loss scalers, skipped steps, checkpoints, any
    engine, ``every``. So what looks at single coordinates of gradients (GradDrop, TrimmedMean,
    ExcessMTL) or takes two batches (MoDo, SDMGrad) is refused; this package has methods of its own
    for these, and for most of the others.

    A weighting that takes a Jacobian but does not depend on the choice of coordinates (ConFIG,
    NashMTL, the constant ones) gets a square root of the Gramian, [K, K], in its place. What it
    returns is the combination of K rows with the same inner products.

    The state of PCD, GradVac, NashMTL and CRMOGM is kept outside of them, as tensors of the
    balance: it is committed by a step, saved, and follows the present losses. Random numbers are
    drawn from `seed` and the number of the step, not from the global stream. Losses are passed on
    in the order in which they were first declared, whatever the order of the dict: the first one
    is PCD's primary objective, without which all weights are 0, and vectors of preferences have one
    entry for each. Where such a vector has entries for absent losses, these pass for gradients of
    zero.

    TorchJD computes on the host, in the dtype of the Gramian.

    Coefficients: TorchJD's weights.

    Args:
        weighting: An instance of a class of ``torchjd.aggregation``. It is copied, without the
            state that it may have; of an aggregator, the weighting inside of it.
        takes: What a class of your own takes, ``"gramian"`` or, if it does not depend on the
            choice of coordinates, ``"jacobian"``. Default None: as TorchJD's annotations say.
        every: Solve each n-th step only, and keep the weights in between. Default 1.
        seed: Seed of random draws, a whole number ≥ 0. Default 0.

    Raises:
        BalanceError: TorchJD is not installed.
        BalanceValueError: `weighting` cannot be computed from a Gramian, or keeps a state that is
            not known here.

    Example:
        >>> import torch
        >>> from torchjd.aggregation import MGDAWeighting
        >>> from moo_balance import BalancedOptimizer
        >>> from moo_balance.integrations.torchjd import TorchJD
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.1), TorchJD(MGDAWeighting()))
        >>> _ = optimizer.backward({"a": w[0], "b": w[1]})
        >>> w.grad
        tensor([0.5000, 0.5000])
    """

    weighting: Any
    takes: Literal["gramian", "jacobian"] | None = None
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "takes", (None, "gramian", "jacobian"))
        check_whole(self, "every", 1)
        check_whole(self, "seed", 0)
        solver = _Solver(_fresh_copy(self.weighting), self.takes)
        object.__setattr__(self, "weighting", solver.module)
        object.__setattr__(self, "_solver", solver)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchJD) and describe(self) == describe(other)

    def __hash__(self) -> int:
        return hash(describe(self))

    def init(self, names: Sequence[str], device: torch.device) -> State:
        solver: _Solver = self._solver  # type: ignore[attr-defined]
        state = {
            "position": torch.arange(len(names), device=device),
            "declared": torch.tensor(len(names), device=device),
        }
        for keeper in solver.keepers:
            state.update(keeper.init(len(names), device))
        return {**state, **super().init(names, device)}

    def solve(self, statistics: Statistics, gramian: Tensor, state: State) -> State:
        solver: _Solver = self._solver  # type: ignore[attr-defined]
        host = {key: value.cpu() for key, value in state.items()}
        position, declared = host.pop("position"), int(host.pop("declared"))
        # As they were declared, whatever the order of the dict.
        order = position.argsort()
        if solver.has_primary and int(position[order[0]]) > 0:
            return {"weights": torch.zeros_like(gramian[0])}
        batch = _Batch(gramian.detach().cpu()[order][:, order], position[order], declared)
        kept = {key: _select(value, order) for key, value in host.items()}
        seed = step_generator(self.seed, statistics.step).initial_seed()
        try:
            weights, kept = solver(batch, kept, seed)
        except (ValueError, RuntimeError, IndexError) as error:
            raise _explain(error, solver.name, statistics.names, position) from error
        back = order.argsort()
        result = {key: _select(value, back).to(state[key]) for key, value in kept.items()}
        return {**result, "weights": weights[back].to(gramian)}

    def coefficients(self, statistics: Statistics, state: State) -> Tensor:
        return state["weights"].to(statistics.losses.dtype)


class _Batch(NamedTuple):
    """A Gramian on the host, of the losses at some of the declared positions, in this order."""

    gramian: Tensor
    position: Tensor
    declared: int

    def with_absent(self) -> _Batch:
        """The Gramian of all declared losses, where the absent ones have a gradient of zero."""
        whole = self.gramian.new_zeros(self.declared, self.declared)
        whole[self.position[:, None], self.position] = self.gramian
        return _Batch(whole, torch.arange(self.declared), self.declared)


class _Solver:
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

    def __call__(self, batch: _Batch, state: State, seed: int) -> tuple[Tensor, State]:
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
        if not isinstance(self.module, _aggregation().Aggregator):
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


def _aggregation() -> Any:
    try:
        return import_module("torchjd.aggregation")
    except ImportError as error:
        raise BalanceError(
            "TorchJD should be installed for `moo_balance.integrations.torchjd`. Found no module "
            "`torchjd.aggregation`. Install it by `pip install 'torchjd>=0.15'`."
        ) from error


def _fresh_copy(weighting: Any) -> Any:
    """A copy without state, so that neither the user's instance nor ours changes the other."""
    aggregation = _aggregation()
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
    if isinstance(given, _aggregation().WeightedAggregator):
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


def _select(value: Tensor, order: Tensor) -> Tensor:
    """The entries of a state in another order, along each dimension of K."""
    for dim in range(value.ndim):
        value = value.index_select(dim, order)
    return value


def _explain(error: Exception, name: str, present: Sequence[str], position: Tensor) -> BalanceError:
    return BalanceError(
        f"TorchJD's {name} should be able to weight the losses {list(present)}. Found: {error} "
        f"These are losses {position.tolist()} of the declared ones, in the order of the first "
        "batch or of `loss_names=[…]`; a vector of TorchJD's has one entry for each."
    )
