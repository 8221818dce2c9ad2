"""The exceptions raised by moo_balance; every one derives from :class:`BalanceError`."""

from __future__ import annotations

__all__ = ["BalanceError", "BalanceValueError", "ConvergenceError", "NonFiniteError"]


class BalanceError(Exception):
    """Base of every error that moo_balance raises on purpose: catch this one to catch them all."""


class BalanceValueError(BalanceError, ValueError):
    """An argument, a loss or a configuration is at fault.

    The message names it, the value found, and what to do.
    """


class NonFiniteError(BalanceValueError):
    """A loss, or the gradient of a loss, is NaN or infinite; the message names it."""


class ConvergenceError(BalanceError, ArithmeticError):
    """A solver stopped short of its tolerance; the message states the residual that was left."""
