"""The random generators from which a forward pass draws without being given one."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch


class RandomState:
    """The state of torch's generators of the CPU and of the devices in use, and of Python's."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in set(devices)
            if device.type not in ("cpu", "meta")
        }
        self._python = random.getstate()

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self._python)

    @property
    def devices(self) -> list[torch.device]:
        """The devices whose generators are held."""
        return list(self._devices)


class NumpyState:
    """The state of NumPy's global generator, if NumPy is imported.

    ``numpy.random.get_state`` takes as long as ten operators. So a plain copy of the default
    generator's memory is made as well, which tells whether numbers were drawn.

    Args:
        exact: Whether to hold what the plain copy lacks: the second of two normal numbers that are
            drawn at once. Always held for a generator other than the default one.
    """

    _BYTES = 4 * (624 + 1)  # key and position of MT19937

    def __init__(self, exact: bool) -> None:
        self._random: Any = getattr(sys.modules.get("numpy"), "random", None)
        self._address = self._find_memory()
        self._memory = ctypes.string_at(self._address, self._BYTES) if self._address else b""
        self._state: Any = None
        if self._random is not None and (exact or not self._address):
            self._state = self._random.get_state(legacy=False)

    def _find_memory(self) -> int:
        """Address of the default generator's memory; 0 if there is none, or another generator."""
        generator = getattr(self._random, "get_bit_generator", lambda: None)()
        if generator is None or not isinstance(generator, self._random.MT19937):
            return 0
        address: int = generator.ctypes.state_address
        return address

    def has_changed(self) -> bool:
        """Whether numbers were drawn since; True if that is unknown."""
        if self._random is None:
            return False
        if not self._address or self._address != self._find_memory():
            return True
        if ctypes.string_at(self._address, self._BYTES) != self._memory:
            return True
        if self._state is None:
            return False
        now = self._random.get_state(legacy=False)
        return any(now.get(key) != self._state.get(key) for key in ("has_gauss", "gauss"))

    def restore(self) -> None:
        """Set the generator back to this state, if it has changed."""
        if self._random is None or not self.has_changed():
            return
        if self._state is not None:
            self._random.set_state(self._state)
        elif self._address == self._find_memory():
            ctypes.memmove(self._address, self._memory, self._BYTES)
