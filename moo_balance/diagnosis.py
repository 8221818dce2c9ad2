"""Measure whether gradients of losses conflict, and where; static weights without a wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.amp import GradScaler

from moo_balance._batch_gradients import measure_batches, multiply, read_inputs
from moo_balance._conflict_figures import estimate_figures
from moo_balance._reports import ConflictReport, SuggestedWeights
from moo_balance.errors import BalanceValueError

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def diagnose(
    losses_fn: Callable[[Any], Mapping[str, Tensor]],
    params: Params,
    batches: Iterable[Any],
    *,
    depth: int = 1,
    level: float = 0.95,
    grad_scaler: GradScaler | None = None,
    process_group: Any = "auto",
) -> ConflictReport:
    r"""Measure norms and angles of the expected gradients of several losses, without training.

    The gradient of a batch is its expectation and noise. Its norm is too long by the noise, and the
    cosine of two of them is pulled towards 0, or towards that of the noise that they share.
    Products of gradients of *different* batches have no such bias. With the gradients
    :math:`g_{k,b}` of loss k in B batches,

    .. math::
        U_{kl} = \frac{1}{B (B - 1)} \sum_{a \ne b} g_{k,a}^\top g_{l,b}, \qquad
        \text{cosine}_{kl} = \frac{U_{kl}}{\sqrt{U_{kk} U_{ll}}}, \qquad
        \text{norm}_k = \sqrt{\max(U_{kk}, 0)}

    where :math:`U_{kl}` has the expectation :math:`E[g_k]^\top E[g_l]`, and the signal-to-noise
    ratio of one batch

    .. math::
        \frac{U_{kk}}{\operatorname{tr} \Sigma_k}, \qquad
        \operatorname{tr} \Sigma_k = \frac{1}{B - 1} \sum_b \lVert g_{k,b} - \bar g_k \rVert^2

    with :math:`\bar g_k` the mean over the batches. Batches should be drawn independently, as from
    a shuffled loader; neither repeated nor consecutive parts of one series, whose common noise
    would count as signal. Where there is no noise, as in training on all data at once, pass the one
    batch three times.

    Intervals are the estimate plus and minus the t quantile of B - 1 degrees of freedom times the
    jackknife's standard error over batches, cut off at -1 and 1. An expected gradient is *above the
    noise* if the interval of :math:`U_{kk}` is above 0. Otherwise, and always with B = 2, the
    interval of a cosine is [-1, 1]. An interval covers the cosine of the expected gradients with
    the probability `level`, over draws of the batches; among many intervals, some miss theirs.
    Simulated at 0.95 with 3 to 16 batches, signal-to-noise ratios of 0.03 to 10 and noise that is
    Gaussian or has heavy tails, independent or in part common to both losses, intervals covered
    between 95 % and, where the noise dominates, 100 %; with a true cosine of 0 at most 2.9 % were
    below 0; and of gradients that were noise only, at most 1.1 % were above the noise.

    The advice follows from the first rule that applies, over all parameters. Losses whose gradient
    is zero in all batches do not count. With fewer than two others the sum stays, and with 2
    batches the advice is to take more.

    1. A cosine is significantly below 0: a method for gradients that conflict, and ``NashMTL`` if
       also two norms above the noise differ by a factor of 10 or more. Of n pairs of losses, a
       cosine counts whose interval at the level 1 - (1 - `level`) / n is below 0 (Bonferroni's
       correction). So where no losses conflict, this advice has a probability of about
       1 - `level` or less, however many they are.
    2. An expected gradient is not above the noise: static weights, or larger batches.
    3. Two norms differ by a factor of 10 or more: ``NashMTL``, or ``GradientNorms(every=10)``.
    4. Otherwise: the sum.

    Nothing is changed: parameters, ``.grad``, buffers such as running statistics, attributes of
    modules, training mode, and the global random generators of torch, NumPy and Python are
    afterwards as they were. For that, pass the model as `params`, or let `losses_fn` refer to it
    directly. Not undone are changes inside a list or dict that an attribute or a batch holds, hooks
    that are added, the state of an optimizer, and draws from a generator of your own.

    Each batch starts from the same buffers. It takes K backward passes for each batch. Memory: the
    gradients of all batches of this rank, at most B·K·P elements in their own dtype; a parameter
    that a loss does not reach takes none. Products are taken in float64, also of gradients in
    float16 or bfloat16 (on Apple's "mps" in float32).

    On several ranks the batches of each are further independent batches, and all ranks return the
    same report. A model in DistributedDataParallel averages no gradients meanwhile.

    Args:
        losses_fn: Computes scalar losses by name from a batch, the same names for each. It may use
            autocast, and should not call ``backward``.
        params: Over which gradients are compared: a module, or an iterable of parameters or of
            names and parameters, such as ``model.named_parameters()``. Frozen ones are left out.
        batches: At least 2 over all ranks, better 8 or more, each passed to `losses_fn` as it is;
            such as ``itertools.islice(loader, 16)``.
        depth: How many levels of submodules are told apart. Default 1, the top level. Parameters of
            the module itself, and at a greater depth of a module that has submodules, are listed by
            their own names; those without names in no module. A parameter that modules share counts
            for the first. Names of wrappers, ``_orig_mod`` and ``module``, are left out.
        level: What intervals cover, in (0, 1). Default 0.95.
        grad_scaler: The scaler of mixed-precision training in float16, whose scale keeps gradients
            from underflow. The report is free of it. It is not updated.
        process_group: The ranks that see different data, as for :class:`BalancedOptimizer`.

    Returns:
        The report. ``print`` shows a table, :meth:`~ConflictReport.to_dict` suits JSON, and
        :meth:`~ConflictReport.plot` draws the cosines of all modules.

    Raises:
        BalanceValueError: An argument does not fit, there are fewer than 2 batches, or a loss is
            not a scalar with a graph.
        NonFiniteError: A loss or a gradient is not finite.
        BalanceError: Another rank could not compute its losses, or has other losses or another
            number of batches.

    Source: U-statistics and their jackknife, Arvesen, *Jackknifing U-statistics*, Annals of
    Mathematical Statistics 40 (1969).

    Example:
        >>> import torch
        >>> from moo_balance import diagnose
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> def losses_fn(batch):
        ...     outputs = model(batch)
        ...     return {"up": (outputs - 1).square().mean(), "down": (outputs + 1).square().mean()}
        >>> report = diagnose(losses_fn, model, [torch.randn(64, 4) for _ in range(8)])
        >>> round(report.pairs["up", "down"].cosine, 1)
        -0.4
    """
    if type(depth) is not int or depth < 1:
        raise BalanceValueError(
            "Parameter `depth` should be a whole number of levels, at least 1. Found "
            f"{depth!r}. Leave it out for the top level."
        )
    if not (isinstance(level, float) and 0.0 < level < 1.0):
        raise BalanceValueError(
            f"Parameter `level` should be between 0 and 1. Found {level!r}. Pass 0.95 for 95 %."
        )
    inputs = read_inputs(losses_fn, params, batches, grad_scaler, process_group)
    measured = measure_batches(inputs, least=2, keep_rows=True)
    names = measured.names
    products = multiply(measured, _labels(inputs.names, depth), inputs)
    figures = estimate_figures(names, reduce(add, products.values()), level)
    modules = {
        label: estimate_figures(names, each, level) for label, each in products.items() if label
    }
    return ConflictReport(len(measured.norms), level, figures.losses, figures.pairs, modules)


def _labels(names: Sequence[str], depth: int) -> list[str]:
    """For each parameter the module that it counts for.

    Its own name if its module is less deep and has submodules, or is the root.
    """
    paths = [[part for part in name.split(".") if part != "_orig_mod"] for name in names]
    if all(path[0] == "module" and path[1:] for path in paths):
        paths = [path[1:] for path in paths]  # names of a model in DistributedDataParallel
    have_submodules = {tuple(path[:k]) for path in paths for k in range(len(path) - 1)} | {()}
    return [
        ".".join(path)
        if len(path) <= depth and tuple(path[:-1]) in have_submodules
        else ".".join(path[:-1][:depth])
        for path in paths
    ]


# ------------------------------------------------------------ static weights


def suggest_weights(
    losses_fn: Callable[[Any], Mapping[str, Tensor]],
    params: Params,
    batches: Iterable[Any],
    *,
    grad_scaler: GradScaler | None = None,
    process_group: Any = "auto",
) -> SuggestedWeights:
    r"""Measure static weights that make losses, or norms of gradients, equal at this point.

    .. math:: w_k = \frac{K\, x_k^{-1}}{\sum_l x_l^{-1}}, \qquad \sum_k w_k = K

    where :math:`x_k` is the mean over the batches of the norm of a batch's gradient of loss k, or
    of the loss itself. They serve a plain loop as well: ``sum(weights[name] * loss ...)``.

    Norms at initialization say little about training: call it after about 100 steps with the plain
    sum, then go on with the weights. It changes nothing, as :func:`diagnose`, and takes K backward
    passes for each batch. Memory: K·P elements.

    Args:
        losses_fn: Computes scalar losses by name from a batch, as for :func:`diagnose`.
        params: Whose gradients are measured, as for :func:`diagnose`; such as one shared layer.
        batches: At least one.
        grad_scaler: The scaler of mixed-precision training in float16.
        process_group: The ranks whose batches count together. All get the same weights.

    Returns:
        The weights of both rules by name. ``print`` shows them as a table,
        :meth:`~SuggestedWeights.to_dict` suits JSON.

    Raises:
        BalanceValueError: An argument does not fit, there is no batch, or the gradient of a loss is
            zero in all batches.
        NonFiniteError: A loss or a gradient is not finite.
        BalanceError: Another rank could not compute its losses, or has others.

    Example:
        >>> import torch
        >>> from moo_balance import suggest_weights
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> weights = suggest_weights(lambda x: {"a": x * w, "b": 3 * x * w}, [w], [1.0, 2.0])
        >>> {name: round(weight, 3) for name, weight in weights.gradient_norms.items()}
        {'a': 1.5, 'b': 0.5}
    """
    inputs = read_inputs(losses_fn, params, batches, grad_scaler, process_group)
    names, losses, norms, _ = measure_batches(inputs, least=1, keep_rows=False)
    mean_norms = dict(zip(names, _mean(norms), strict=True))
    mean_losses = dict(zip(names, _mean(losses), strict=True))
    for name, norm in mean_norms.items():
        if not norm:
            raise BalanceValueError(
                f"The gradient of loss `{name}` should not be zero in all batches. Found zeros. "
                "Leave the loss out of `losses_fn`, or pass parameters that it reaches."
            )
    return SuggestedWeights(
        _invert(mean_norms),
        _invert(mean_losses) if min(mean_losses.values()) > 0 else None,
        mean_norms,
        mean_losses,
    )


def _mean(values: Tensor) -> list[float]:
    """Means over the first dimension; also where the sum would overflow."""
    means: list[float] = (values / len(values)).sum(0).tolist()
    return means


def _invert(values: Mapping[str, float]) -> dict[str, float]:
    """Inverse values that sum to their number."""
    least = min(values.values())
    inverses = {name: least / value for name, value in values.items()}
    return {name: len(values) * each / sum(inverses.values()) for name, each in inverses.items()}
