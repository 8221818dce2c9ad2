"""Losses at the door: one place that says what is wrong with them, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moo_balance.errors import BalanceValueError


def check_losses(losses: object, declared: Sequence[str] | None) -> dict[str, Tensor]:
    """The losses as 0-d tensors in declared order, or an error that names the odd one out."""
    if not isinstance(losses, Mapping) or not losses:
        raise _no_losses(losses)
    for name, loss in losses.items():
        if not (isinstance(name, str) and name):
            raise _odd_name(name)
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            raise _odd_loss(name, loss)
    if declared is not None and tuple(losses) != tuple(declared):
        check_declared(losses, declared)
        losses = {name: losses[name] for name in declared if name in losses}
    return {name: _scalar(loss) for name, loss in losses.items()}


def check_declared(names: Mapping[str, object] | Sequence[str], declared: Sequence[str]) -> None:
    """Refuse a name that was never declared."""
    for name in names:
        if name not in declared:
            raise BalanceValueError(
                f"Loss `{name}` was never declared. Found {_listed(declared)} so far. The first "
                "call declares the names; give `loss_names=[…]` to BalancedOptimizer if some losses "
                "come later."
            )


def check_same(losses: Mapping[str, Tensor], expected: Sequence[str]) -> None:
    """Refuse another set of losses than the one that the step was taken on."""
    if set(losses) != set(expected):
        raise BalanceValueError(
            f"Parameter `losses` should hold the losses of the last backward, {_listed(expected)}. "
            f"Found {_listed(list(losses))}."
        )


def check_attached(losses: Mapping[str, Tensor]) -> None:
    """Refuse a loss that no graph leads back from."""
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise BalanceValueError(
                f"Loss `{name}` should be attached to a graph. Found a tensor that requires no "
                "gradient. Was it detached, turned into a number, or computed under no_grad?"
            )


def check_features(
    features: Tensor | Sequence[Tensor] | None, measured: bool, in_window: bool
) -> tuple[Tensor, ...]:
    """The features as a tuple, empty for None, or an error that says what is wrong with them."""
    if features is None:
        return ()
    found = (features,) if isinstance(features, Tensor) else tuple(features)
    odd = [f for f in found if not isinstance(f, Tensor) or not f.requires_grad]
    if odd or not found:
        seen = _described(odd[0]) if odd else "none"
        raise BalanceValueError(
            "Parameter `features` should be a tensor that the losses are computed from, with a "
            f"graph, or several. Found {seen}. Pass what the shared part of the model put out."
        )
    if in_window:
        raise BalanceValueError(
            "Parameter `features` should be left out where micro-batches are gathered: their "
            "features are gone before the weights are known. Found it within `accumulate()`."
        )
    if measured:
        raise BalanceValueError(
            "Parameter `features` should not come together with `shared_params=` of BalancedOptimizer: "
            "inner products are taken over the one or the other. Found both. Leave out one."
        )
    return found


def _scalar(loss: Tensor) -> Tensor:
    if not loss.ndim:
        return loss  # a view is one more node to differentiate
    with torch.enable_grad():  # `backward` works under no_grad, as a plain one does
        return loss.reshape(())


def _no_losses(losses: object) -> BalanceValueError:
    if isinstance(losses, Mapping):
        return BalanceValueError(
            "Parameter `losses` should hold at least one loss. Found none. "
            "Skip the call for a batch without losses."
        )
    return BalanceValueError(
        "Parameter `losses` should be a mapping from a name to a scalar tensor. "
        f'Found {type(losses).__name__}. Write `{{"rate": rate, "distortion": distortion}}`.'
    )


def _odd_name(name: object) -> BalanceValueError:
    return BalanceValueError(
        f"Parameter `losses` should have non-empty strings as names. Found {name!r}."
    )


def _odd_loss(name: str, loss: object) -> BalanceValueError:
    if not isinstance(loss, Tensor):
        return BalanceValueError(
            f"Loss `{name}` should be a scalar tensor. Found {type(loss).__name__} ({loss!r}). "
            "Do not call `.item()` on a loss that is to be balanced."
        )
    if loss.numel() != 1:
        return BalanceValueError(
            f"Loss `{name}` should be a scalar. Found shape {tuple(loss.shape)}. Reduce it, for "
            "example with `.mean()`."
        )
    return BalanceValueError(
        f"Loss `{name}` should be a real floating-point tensor. Found {loss.dtype}."
    )


def _described(feature: object) -> str:
    if isinstance(feature, Tensor):
        return f"one of shape {tuple(feature.shape)} that requires no gradient"
    return f"{type(feature).__name__}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
