"""Commands that have to end with a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def check_refusal(
    command: Callable[[], int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with exit code 2 and the message on standard error, and no traceback."""
    try:
        code = command()
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
