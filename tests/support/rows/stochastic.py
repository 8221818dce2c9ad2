"""Rows of the methods for stochastic gradients."""

from __future__ import annotations

from tests.support.method import Facts, Method, Refusal

METHODS: list[Method] = []

# The argument at fault comes last. `unfit` ones are shown the names "a" and "b".
REFUSALS: list[Refusal] = []

FACTS: dict[str, Facts] = {}
