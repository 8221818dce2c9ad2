"""What every test starts from: one thread, a known seed, properties without a clock."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tests.support.capability_plugin"]

torch.set_num_threads(1)
settings.register_profile("moo", deadline=None, derandomize=True, max_examples=12, database=None)
settings.load_profile("moo")


@pytest.fixture(autouse=True)
def _seeded():
    # Not torch.manual_seed: it notes a traceback for each kind of accelerator, thousands of times.
    torch.default_generator.manual_seed(0)
