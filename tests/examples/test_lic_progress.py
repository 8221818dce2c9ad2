"""Progress of loops: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from examples.lic.progress import Meter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_with_the_description(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    meter = Meter("lambda-0.01", 4, "step", count=1)
    meter._bar.mininterval = 0
    meter.update(lambda: "0.31 bpp")
    meter.close()
    last = sys.stderr.getvalue().split("\r")[-1]
    assert last.startswith("lambda-0.01:  50%")
    assert "2/4" in last
    assert "0.31 bpp" in last


@pytest.mark.parametrize(("seconds", "counts"), [(0, [2, 3, 4]), (1e9, [4])])
def test_elsewhere_there_is_a_line_now_and_then_and_at_the_end(seconds, counts, capsys):
    meter, described = Meter("Images", 4, "image", count=1, seconds=seconds), []
    for k in range(3):
        meter.update(lambda k=k: described.append(k) or f"number {k}")
    meter.close()
    expected = [f"Images: image {count} of 4, number {count - 2}" for count in counts]
    assert capsys.readouterr().err.splitlines() == expected
    assert len(described) == len(counts)
