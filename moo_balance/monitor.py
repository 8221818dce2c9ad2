"""Metrics of the last step, and of a whole run."""

from __future__ import annotations

import html
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moo_balance import _history_file
from moo_balance._hints import name_nearest
from moo_balance._run_figure import PERPENDICULAR, Panel, draw
from moo_balance._step_metrics import FEW_LOSSES, StepMetrics, positions_of_pairs
from moo_balance.errors import BalanceValueError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History", "StepMetrics"]

_FEW_PAIRED = 4
"""Up to so many losses a figure shows the cosine of each pair, 6 of them."""
_WINDOWS = 40
"""Into so many windows a figure divides a run, at most twice as many, to draw their means."""


class History:
    """Metrics of many steps, kept on the device and copied to the host when they are read.

    A step keeps its losses, weights and coefficients, 3K elements, and with a Gramian K² more, on
    the device and in the dtype of the step. On the CPU this was measured as 0.5 KiB for 3 losses
    and 14 KiB for 50 in float32, so that a long run of many losses should give `maxlen`.

    Args:
        maxlen: Keep only so many of the last steps. Default None: all.

    Raises:
        BalanceValueError: `maxlen` is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> from moo_balance import BalancedOptimizer, History, Sum
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = BalancedOptimizer(torch.optim.SGD([w], lr=0.25), Sum())
        >>> history = History()
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     _ = optimizer.backward({"a": w**2, "b": w**2})
        ...     optimizer.step()
        ...     history.append(optimizer.metrics)
        >>> history.series("loss/a")
        ([0, 1], [1.0, 0.0])
        >>> history.improvement("a")
        ([1], [1.0])
    """

    def __init__(self, maxlen: int | None = None) -> None:
        if maxlen is not None and (type(maxlen) is not int or maxlen < 1):
            raise BalanceValueError(
                "Parameter `maxlen` should be a whole number of steps, at least 1, or None for "
                f"all. Found {maxlen!r}."
            )
        self._steps: deque[StepMetrics] = deque(maxlen=maxlen)
        self._appended = 0

    def append(self, metrics: StepMetrics) -> None:
        """Add the metrics of one step.

        Raises:
            BalanceValueError: They are no metrics, or those from before the first ``backward``.
        """
        if not isinstance(metrics, StepMetrics):
            raise BalanceValueError(
                "Parameter `metrics` should be the `metrics` of a BalancedOptimizer. Found "
                f"{type(metrics).__name__}. Call `history.append(optimizer.metrics)`."
            )
        if not metrics.names:
            raise BalanceValueError(
                "Parameter `metrics` should be those of a step. Found none: no `backward` has come "
                "since the optimizer was made, or loaded a state. Call "
                "`history.append(optimizer.metrics)` after `optimizer.step()`."
            )
        self._steps.append(metrics)
        self._appended += 1

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        count = len(self)
        bound = "" if self._steps.maxlen is None else f", maxlen={self._steps.maxlen}"
        return f"{type(self).__name__}({count} step{'s' * (count != 1)}{bound})"

    def _repr_html_(self) -> str:
        """A table of the first and last value of up to 8 losses, for notebooks. Synchronizes."""
        names = self._loss_names()
        head = ("", "first loss", "last loss", "last coefficient")
        rows = {name: self._ends(name) for name in names[:FEW_LOSSES]}
        cells = [f"<tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>"]
        cells += [
            f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{x:.4g}</td>' for x in values)}</tr>"
            for name, values in rows.items()
        ]
        more = len(names) - len(rows)
        note = f"<p>and {more} more losses</p>" if more else ""
        table = f"<table>{''.join(cells)}</table>" if rows else ""
        return f"<p>{html.escape(repr(self))}</p>{table}{note}"

    # ------------------------------------------------------------ values

    def keys(self, pairs: bool | None = None) -> list[str]:
        """All keys that a step has, in order of appearance; `pairs` as in ``log_dict``."""
        return list(dict.fromkeys(key for step in self._steps for key in step._keys(pairs)))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have `key`, counted from 0, the first that was added, and its values.

        Raises:
            BalanceValueError: No step has it. An empty history returns empty lists.
        """
        values = {index: step._value(key) for index, step in enumerate(self._steps, self._first)}
        present = {index: value for index, value in values.items() if value is not None}
        if not present:
            self._check_empty("key", key, self.keys())
            return [], []
        device = next(iter(present.values())).device
        stacked = torch.stack([value.to(device) for value in present.values()])
        return list(present), stacked.cpu().double().tolist()

    def improvement(self, name: str, window: int = 1) -> tuple[list[int], list[float]]:
        r"""Relative decrease of a loss from one step to the next.

        .. math:: r_t = \frac{L_{t-1} - L_t}{|L_{t-1}|}

        No unit; at most 1 for a loss that stays positive, negative where the loss rises. Methods of
        log losses, as ``FAMO``, seek equal values. Also the batch changes from step to step; over
        windows of many steps this noise averages out.

        Args:
            name: A loss.
            window: Take the mean loss of each so many steps in place of :math:`L_t`, at least 1;
                steps at the end that do not fill a window are left out. Default 1.

        Returns:
            The steps t, each the last of its window, and the values. Left out are the first window,
            those in which the loss is absent or not finite in all steps, whose successor is
            compared with their predecessor, and those after a mean of 0.

        Raises:
            BalanceValueError: No step has the loss, or `window` is not a whole number of at least
                1. An empty history returns empty lists.

        Source: Zhang, Duan, Huang, Zhu, *Balanced Rate-Distortion Optimization in Learned Image
        Compression* (CVPR 2025), arXiv 2502.20161, equation 4; there for one batch before and
        after the step.
        """
        if type(window) is not int or window < 1:
            raise BalanceValueError(
                "Parameter `window` should be a whole number of steps, at least 1. "
                f"Found {window!r}."
            )
        names = self._loss_names()
        if name not in names:
            self._check_empty("name", name, names)
            return [], []
        present, losses = self.series(f"loss/{name}")
        table = torch.full((len(self._steps), 1), math.nan, dtype=torch.float64)
        table[torch.tensor(present) - self._first, 0] = torch.tensor(losses, dtype=torch.float64)
        decreases = _relative_decreases(_window_means(table, window))[:, 0]
        rows = (~decreases.isnan()).nonzero()[:, 0]
        steps = self._first + (rows + 1) * window - 1
        return steps.tolist(), decreases[rows].tolist()

    def to_pandas(self, pairs: bool | None = None) -> Any:
        """All values as a ``pandas.DataFrame`` with a row for each step and a column for each key.

        The index counts steps from 0, the first that was added. NaN where a step has no such value.
        Copies from the device once for each set of keys. Needs pandas, which is imported here.

        Args:
            pairs: As in ``log_dict``.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _import("pandas", "to_pandas")
        keys = self.keys(pairs)
        table = self._table(keys, pairs)
        steps = pandas.RangeIndex(self._first, self._appended, name="step")
        return pandas.DataFrame(table.numpy(), index=steps, columns=keys)

    # ------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all steps to one file, which :meth:`load` reads back; values are kept exactly.

        The file holds tensors, names and numbers (``torch.load(path, weights_only=True)``).

        Args:
            path: Where; an existing file is replaced.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> from moo_balance import History
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     History(maxlen=10).save(f"{folder}/run.pt")
            ...     print(History.load(f"{folder}/run.pt"))
            History(0 steps, maxlen=10)
        """
        _history_file.save(path, self._steps, self._appended)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` has written. Tensors are on the CPU; later steps may be added.

        Args:
            path: The file.

        Raises:
            OSError: The file cannot be read.
            BalanceValueError: It is no file of :meth:`save`, or damaged.
        """
        steps, appended = _history_file.load(path)
        history = cls(steps.maxlen)
        history._steps, history._appended = steps, appended
        return history

    # ------------------------------------------------------------ figures

    def plot(self, kind: str = "weight", ax: Any = None) -> Any:
        """Draw all series of a kind (``"loss"``, ``"weight"``, ``"coefficient"``, ``"cosine"``).

        ``"alignment"`` and ``"satisfied"`` have one series each. ``"improvement"`` is the relative
        :meth:`improvement` of each loss, over windows of which a run has up to 80. Needs
        matplotlib, which is imported here. Returns the axes; without `ax` they are in a new figure
        of pyplot's.

        Raises:
            BalanceValueError: No step has a series of that kind.
            ImportError: matplotlib is not installed.
        """
        window = self._window()
        if kind == "improvement":
            lines = {name: self.improvement(name, window) for name in self._loss_names()}
            label = f"relative improvement in {_count_steps(window)}"
        else:
            keys = [key for key in self.keys() if _kind(key) == kind]
            lines = {key.removeprefix(f"{kind}/"): self.series(key) for key in keys}
            label = kind
        if not lines:
            kinds = dict.fromkeys(map(_kind, self.keys()))
            self._check_empty("kind", kind, (*kinds, "improvement"))
        if ax is None:
            ax = _import("matplotlib.pyplot", "plot").figure().add_subplot()
        for name, series in lines.items():
            ax.plot(*series, label=name.replace("$", r"\$"))
        ax.set_xlabel("step")
        ax.set_ylabel(label)
        if lines:
            # Matplotlib lists no label with an underscore at its start, as lines without one have.
            named = [
                line for line in ax.lines if not re.fullmatch(r"_child\d+", str(line.get_label()))
            ]
            others = [each for each in ax.get_legend_handles_labels()[0] if each not in named]
            handles = [*others, *named]
            ax.legend(handles, [each.get_label() for each in handles])
        return ax

    def figure(self) -> Figure:
        """Draw the run on one page: losses, their relative improvement, weights and coefficients.

        With a Gramian also the cosines, a line in the colours of both losses for each pair of up to
        4, and otherwise the least and the mean; and of at least three gradients the alignment, with
        the level 2 / K - 1 that it has where the K gradients are perpendicular. One line for each
        of up to 8 losses; above, the range over the losses, of which the middle half is darker, and
        the median. Steps without a finite value are left out. In a run of more than 80
        steps the lines are means over windows, with the single steps faint in the background. Axes
        of losses and coefficients are logarithmic where all values are positive. Colours are told
        apart with all kinds of colour vision, and on a white and a dark page.

        Returns:
            A ``matplotlib.figure.Figure`` that is not registered with pyplot: it is shown by
            ``figure.savefig("run.png")``, or as the result of a notebook's cell.

        Raises:
            BalanceValueError: The history is empty.
            ImportError: matplotlib is not installed.
        """
        names = self._loss_names()
        if not names:
            raise BalanceValueError(
                "A figure should have at least one step with losses. Found none. Call "
                "`history.append(optimizer.metrics)` after each step."
            )
        _import("matplotlib.figure", "figure")
        return draw(self._panels(names), names, (self._first, self._appended - 1))

    def _panels(self, names: list[str]) -> list[Panel]:
        """What :meth:`figure` draws, in order."""
        window, listed = self._window(), len(names) <= _FEW_PAIRED
        keys = [*self.keys(listed), PERPENDICULAR]
        table = torch.column_stack([self._table(keys[:-1], listed), self._perpendicular()])
        means = _window_means(table, window)
        steps = self._first + torch.arange(len(table))
        lasts = steps[window - 1 :: window]

        def panel(title: str, *kinds: str, **style: Any) -> Panel:
            chosen = [i for kind in kinds for i, key in enumerate(keys) if _kind(key) == kind]
            single = (steps, table[:, chosen]) if window > 1 else None
            labels = [keys[i].removeprefix(f"{title}/") for i in chosen]
            middles = lasts - (window - 1) / 2
            return Panel(title, labels, middles, means[:, chosen], single, **style)

        losses = panel("loss", "loss", log=True)
        decreases = Panel(
            f"relative improvement in {_count_steps(window)}",
            losses.labels,
            lasts,
            _relative_decreases(losses.values),
            zero=True,
        )
        factors = [panel("weight", "weight"), panel("coefficient", "coefficient", log=True)]
        if _are_equal(*factors):
            factors = [replace(factors[1], title="weight = coefficient")]
        kinds = ("cosine", "alignment", PERPENDICULAR) if len(names) > 2 else ("cosine",)
        pairs = self._pairs() if listed else {}
        cosines = panel(
            "cosine", *kinds, limits=(-1.05, 1.05), losses=False, pairs=pairs, zero=True
        )
        others = (decreases, *factors, cosines)
        return [losses, *(each for each in others if each.values.isfinite().any())]

    # ------------------------------------------------------------ helpers

    @property
    def _first(self) -> int:
        """The number of the first step that is kept."""
        return self._appended - len(self._steps)

    def _loss_names(self) -> list[str]:
        """All losses, in order of appearance."""
        return list(dict.fromkeys(name for step in self._steps for name in step.names))

    def _window(self) -> int:
        """Over how many steps figures average."""
        return max(1, len(self._steps) // _WINDOWS)

    def _table(self, keys: Sequence[str], pairs: bool | None) -> Tensor:
        """Values of all steps in float64, shape [steps, keys]; NaN where there is none."""
        positions: dict[tuple[str, ...], list[int]] = {}
        steps = list(self._steps)
        for position, step in enumerate(steps):
            positions.setdefault(step._keys(pairs), []).append(position)
        table = torch.full((len(steps), len(keys)), math.nan, dtype=torch.float64)
        columns = {key: column for column, key in enumerate(keys)}
        for present, rows in positions.items():
            flat = [steps[row]._flatten(pairs) for row in rows]
            vectors = [vector for vector in flat if vector is not None]
            if vectors:
                stacked = torch.stack([vector.to(vectors[0].device) for vector in vectors])
                places = torch.tensor([columns[key] for key in present])
                table[torch.tensor(rows)[:, None], places] = stacked.cpu().double()
        return table

    def _pairs(self) -> dict[str, tuple[str, str]]:
        """The two losses of each pair, by its label in a key."""
        return {
            label: (names[j], names[k])
            for names in dict.fromkeys(step.names for step in self._steps)
            for label, (j, k) in positions_of_pairs(names).items()
        }

    def _perpendicular(self) -> Tensor:
        """The alignment of each step if its gradients were perpendicular; NaN where there is none.

        Its K changes with the losses that are absent.
        """
        levels = [
            2 / len(step.names) - 1
            if step.gramian is not None and len(step.names) > 1
            else math.nan
            for step in self._steps
        ]
        return torch.tensor(levels, dtype=torch.float64)

    def _ends(self, name: str) -> list[float]:
        """First and last value of a loss, and the last coefficient; NaN where there is none."""
        present = [step for step in self._steps if name in step.names]
        first, last = present[0].losses, present[-1].losses
        factors = present[-1].coefficients
        ends = (first.get(name), last.get(name), factors.get(name))
        return [math.nan if value is None else float(value) for value in ends]

    def _check_empty(self, argument: str, value: str, known: Iterable[str]) -> None:
        """Refuse a key or kind that no step has, unless there is no step yet."""
        if self._steps:
            raise BalanceValueError(
                f"Parameter `{argument}` should be one of {', '.join(map(repr, known))}. "
                f"Found {value!r}.{name_nearest(value, known)}"
            )


def _kind(key: str) -> str:
    """What a series is of, as in ``"loss/rate"``."""
    return key.partition("/")[0]


def _window_means(values: Tensor, window: int) -> Tensor:
    """Means of the finite values of each column over whole windows of rows; NaN where none is."""
    whole = len(values) // window
    windows = values[: whole * window].reshape(whole, window, values.shape[1])
    return torch.where(windows.isfinite(), windows, math.nan).nanmean(dim=1)


def _relative_decreases(values: Tensor) -> Tensor:
    """Of each column, from the row before that has a value; NaN where there is none."""
    decreases = torch.full_like(values, math.nan)
    for column, result in zip(values.unbind(1), decreases.unbind(1), strict=True):
        rows = (~column.isnan()).nonzero()[:, 0]
        before, after = column[rows[:-1]], column[rows[1:]]
        result[rows[1:]] = torch.where(before == 0, math.nan, (before - after) / before.abs())
    return decreases


def _are_equal(left: Panel, right: Panel) -> bool:
    """Whether two panels show the same values."""
    same = left.labels == right.labels
    return same and torch.allclose(left.values, right.values, equal_nan=True)


def _count_steps(count: int) -> str:
    return "one step" if count == 1 else f"{count} steps"


def _import(module: str, method: str) -> Any:
    """A module that is no requirement of the package."""
    package = module.partition(".")[0]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(
            f"History.{method} needs {package}, which is not installed. Install it, for example "
            f"with `pip install {package}`.",
            name=package,
        ) from error
    return import_module(module)
