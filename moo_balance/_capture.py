"""A warning of one loss that holds all the weight while the others no longer fall.

It reads figures that ``log_dict`` has on the host already, so that it costs no synchronization.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from moo_balance._warnings import warn

_SHARE = 0.99
_STEPS = 200
_READINGS = 20
_FALL = 0.01
"""How much of a loss is a fall, from the first half of the readings to the second."""


@dataclass(eq=False)
class CaptureWatch:
    """What was logged since one loss has had nearly all the weight.

    The share of a loss is that of its coefficient relative to the first one that was logged, so
    that units do not matter, and a method whose coefficients stay does not capture anything.

    Args:
        first: The first coefficient of each loss that was logged and not zero.
        name: The loss; None for none.
        since: The step of the first reading.
        others: The values of every other loss that has a coefficient, reading by reading.
        has_warned: Whether there was a warning, of which there is one in a run.
    """

    first: dict[str, float] = field(default_factory=dict)
    name: str | None = None
    since: int = 0
    others: list[dict[str, float]] = field(default_factory=list)
    has_warned: bool = False

    def read(
        self,
        step: int,
        method: str,
        figures: Mapping[str, float],
        constant: Collection[str] = (),
    ) -> None:
        """Take note of what is logged, and warn if it is time to.

        Args:
            step: Steps taken.
            method: The class of the method.
            figures: By key, as ``StepMetrics.as_floats`` gives them.
            constant: Losses that the method does not balance. They do not count.
        """
        if self.has_warned:
            return
        coefficients = _by_name(figures, "coefficient/")
        coefficients = {n: value for n, value in coefficients.items() if n not in constant}
        coefficients = self._relative(coefficients)
        total = sum(map(abs, coefficients.values()))
        largest = max(coefficients, key=lambda name: abs(coefficients[name]), default=None)
        if largest is None or not abs(coefficients[largest]) > _SHARE * total:
            self.name, self.others = None, []
            return
        losses = _by_name(figures, "loss/")
        others = {n: losses[n] for n, value in coefficients.items() if value and n != largest}
        if largest != self.name or (self.others and others.keys() != self.others[0].keys()):
            self.name, self.since, self.others = largest, step, []
        self.others.append(others)
        if len(self.others) < _READINGS or step - self.since < _STEPS:
            return
        if others and not any(map(self._has_fallen, others)):
            self.has_warned = True
            warn(
                f"Loss `{largest}` has had more than {_SHARE:.0%} of the weight for "
                f"{step - self.since} steps, in which no other loss has fallen. If it is easier to "
                f"bring to its bound than the others are to theirs, it captures {method}: give the "
                "others a larger `preference`, or the method a `floor` or a `shift`. If the run "
                "has converged, there is nothing to do."
            )
        self.since, self.others = step, []

    def _relative(self, coefficients: Mapping[str, float]) -> dict[str, float]:
        for name, value in coefficients.items():
            if value:
                self.first.setdefault(name, value)
        return {name: value / self.first.get(name, 1.0) for name, value in coefficients.items()}

    def _has_fallen(self, name: str) -> bool:
        values, half = [reading[name] for reading in self.others], len(self.others) // 2
        before, after = sum(values[:half]) / half, sum(values[half:]) / (len(values) - half)
        return after < before - _FALL * abs(before)


def _by_name(figures: Mapping[str, float], kind: str) -> dict[str, float]:
    return {k.removeprefix(kind): value for k, value in figures.items() if k.startswith(kind)}
