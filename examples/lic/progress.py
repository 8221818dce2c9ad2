"""How far a loop is: a bar on a terminal, a line of text now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines, where there is no terminal."""


class Meter:
    """Counts up to `total`, on standard error.

    Where that is no terminal, such as in a log file, it prints a line every `seconds` and one at
    the end.

    Args:
        title: What is being done.
        total: The last count, positive.
        unit: What is counted.
        count: So many are done already.
        seconds: Between two lines.
    """

    def __init__(
        self, title: str, total: int, unit: str, *, count: int = 0, seconds: float = SECONDS
    ) -> None:
        self._title, self._total, self._unit, self._count = title, total, unit, count
        self._seconds, self._printed = seconds, time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=count, desc=title, unit=unit, mininterval=1, miniters=1
            )

    def update(self, describe: Callable[[], str] = str) -> None:
        """Count one more; `describe` is called only if its text is about to be shown."""
        self._count += 1
        if self._bar is not None:
            if self._bar.update():  # it was drawn
                self._bar.set_postfix_str(describe())
        elif self._count == self._total or time.monotonic() >= self._printed + self._seconds:
            self._printed = time.monotonic()
            text = f"{self._title}: {self._unit} {self._count} of {self._total}, {describe()}"
            print(text.removesuffix(", "), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar, complete or not."""
        if self._bar is not None:
            self._bar.close()
