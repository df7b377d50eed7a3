"""What torch.xpu offers the backend, on the simulated device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.shard.backends.simulated_device import pin_memory, simulated_device

FREE_BYTES, TOTAL_BYTES = 3 << 30, 4 << 30
RESERVED_BYTES, ALLOCATED_BYTES = 1 << 20, 1 << 18
COMPUTE_UNITS = 4


class SimulatedEvent:
    """A point in time: the simulated device is never behind the host."""

    tells_time = True

    def __init__(self, enable_timing: bool = False) -> None:
        self._enable_timing = enable_timing
        self._at_ns = 0

    def record(self, stream: object) -> None:
        assert stream == simulated_device().device
        self._at_ns = time.perf_counter_ns()

    def synchronize(self) -> None:
        simulated_device().note_wait("event")

    def elapsed_time(self, end_event: "SimulatedEvent") -> float:
        if not (self.tells_time and self._enable_timing and self._at_ns):
            raise RuntimeError("events of this driver tell no time")
        return (end_event._at_ns - self._at_ns) / 1e6


def _synchronize(device: torch.device) -> None:
    simulated_device().note_wait("synchronize")


STAND_INS = {
    "Event": SimulatedEvent,
    "current_stream": lambda device: device,
    "get_device_properties": lambda device: SimpleNamespace(
        gpu_subslice_count=COMPUTE_UNITS, has_fp64=simulated_device().has_float64
    ),
    "is_available": lambda: True,
    "max_memory_allocated": lambda device: ALLOCATED_BYTES,
    "mem_get_info": lambda device: (FREE_BYTES, TOTAL_BYTES),
    "memory_allocated": lambda device: ALLOCATED_BYTES,
    "memory_reserved": lambda device: RESERVED_BYTES,
    "reset_peak_memory_stats": lambda device: None,
    "set_device": lambda device: None,
    "synchronize": _synchronize,
}


@contextmanager
def simulated_xpu() -> Iterator[torch.device]:
    """In the block, torch.xpu speaks of the simulated device and memory can be pinned."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, stand_in in STAND_INS.items():
            monkeypatch.setattr(f"torch.xpu.{name}", stand_in)
        pin_memory(monkeypatch)
        yield simulated_device().device
