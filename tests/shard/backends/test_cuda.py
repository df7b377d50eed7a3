"""What the backend of NVIDIA GPUs asks of torch.cuda, with stand-ins for what needs a GPU."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tessera.shard.backends import cuda
from tessera.shard.backends.cuda import CudaBackend, CudaDevice, CudaGraph

DEVICE = torch.device("cuda", 0)
MIB = 1 << 20


class Event:
    """A moment of a device whose clock moves on by itself, a millisecond for each event."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool, blocking: bool) -> None:
        assert enable_timing and blocking
        self.log: list[str] = []

    def record(self) -> None:
        Event.now_ms += 1.5
        self.at_ms = Event.now_ms

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, other: "Event") -> float:
        assert other.log  # who asks has waited
        return other.at_ms - self.at_ms


class Driver:
    """Streams, graphs and memory; says in which order they were used."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.free = 1000 * MIB
        self.current = self.stream()
        self.device: object = None
        self.pools: list[object] = []  # of each recording
        self.streams: list[object] = []  # on which something was done aside
        self.underway: list[object] = []  # pools that memory is taken from

    def stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    @contextlib.contextmanager
    def using(self, stream: SimpleNamespace) -> Iterator[None]:
        self.log.append("aside")
        self.streams.append(stream)
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def at(self, device: object) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    @contextlib.contextmanager
    def capturing(self, graph: "Graph", pool: object, stream: SimpleNamespace) -> Iterator[None]:
        """As torch's, which does nothing more where the work has failed."""
        self.log.append("capture")
        self.pools.append(pool)
        self.underway.append(pool)
        before, self.current = self.current, stream
        yield
        self.current = before
        self.free -= 5 * MIB
        self.end(0, pool)

    def end(self, device: int, pool: object) -> None:
        if pool not in self.underway:
            raise RuntimeError("not currently recording")
        self.underway.remove(pool)


class Graph:
    def __init__(self) -> None:
        self.replayed = 0

    def replay(self) -> None:
        self.replayed += 1


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    stand_ins = {
        "set_device": lambda device: None,
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda device: (driver.free, 2000 * MIB),
        "memory_reserved": lambda device: 300 * MIB,
        "memory_allocated": lambda device: 100 * MIB,
        "max_memory_allocated": lambda device: 250 * MIB,
        "reset_peak_memory_stats": lambda device: driver.log.append("reset"),
        "synchronize": lambda device: driver.log.append("synchronize"),
        "empty_cache": lambda: None,
        "current_stream": lambda: driver.current,
        "device": driver.at,
        "Stream": lambda device: driver.stream(),
        "stream": driver.using,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph_pool_handle": object,
        "graph": driver.capturing,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    monkeypatch.setattr("torch._C._cuda_endAllocateToPool", driver.end)
    monkeypatch.setattr(
        "torch._C._cuda_releasePool", lambda device, pool: driver.log.append("release")
    )
    return driver


class Recording(CudaDevice):
    """Of the device alone: the operations do not matter here."""

    def __init__(self) -> None:
        self.device = DEVICE


def test_memory_that_torch_keeps_unused_is_free(driver: Driver) -> None:
    device = Recording()
    assert device.free_memory_bytes() == (1000 + 300 - 100) * MIB
    assert device.used_memory_bytes() == 100 * MIB
    assert device.peak_memory_bytes() == 250 * MIB
    device.reset_peak_memory()
    device.synchronize()
    assert driver.log == ["reset", "synchronize"]
    assert device.capability == (9, 0)


def test_marks_are_events_that_are_waited_for(driver: Driver) -> None:
    device = Recording()
    first, last = device.mark(), device.mark()
    assert device.elapsed_ns(first, last) == 1_500_000
    waited_at = []
    first.synchronize = lambda: waited_at.append(driver.device)  # type: ignore[method-assign]
    device.wait(first)  # any thread may, and a new one is at the first device
    assert waited_at == [DEVICE]


def test_work_is_done_once_aside_before_it_is_captured(driver: Driver) -> None:
    device = Recording()
    first = device.record(lambda: driver.log.append("work"), None)
    assert isinstance(first, CudaGraph)
    order = [entry for entry in driver.log if entry in ("aside", "work", "capture")]
    assert order == ["aside", "work", "capture", "work"]
    assert first.num_bytes == 5 * MIB
    first.replay()
    assert first.graph.replayed == 1  # type: ignore[attr-defined]


def test_recordings_share_the_memory_of_the_one_before(driver: Driver) -> None:
    device = Recording()
    first = device.record(lambda: None, None)
    device.record(lambda: None, first)
    other = device.record(lambda: None, None)
    assert isinstance(first, CudaGraph) and isinstance(other, CudaGraph)
    assert driver.pools == [first.pool, first.pool, other.pool]
    assert first.pool is not other.pool
    assert all(stream is driver.streams[0] for stream in driver.streams)


def test_a_recording_that_fails_leaves_nothing_behind(driver: Driver) -> None:
    def work() -> None:
        if driver.underway:
            raise RuntimeError("operation not permitted when stream is capturing")

    device, before = Recording(), driver.current
    with pytest.raises(RuntimeError, match="not permitted"):
        device.record(work, None)
    assert driver.current is before
    assert not driver.underway and driver.log[-1] == "release"


def test_what_fails_after_a_recording_has_ended_is_told(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def capturing(*_: object, **__: object) -> Iterator[None]:
        yield
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torch.cuda.graph", capturing)
    with pytest.raises(RuntimeError, match="out of memory"):
        Recording().record(lambda: None, None)
    assert "release" not in driver.log  # torch has ended it


def test_without_triton_torchs_operations_compute_on_the_gpu(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in list(sys.modules):
        if name.startswith("tessera.shard.backends.triton_"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        backend = cuda.create(DEVICE)
    assert type(backend) is CudaBackend
    assert backend.device == DEVICE and backend.runs_ahead
    assert backend.record(lambda: None, None) is None
    assert "Triton is not installed" in caplog.text


def test_kernels_that_do_not_work_are_not_used(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = SimpleNamespace(kernels_work=lambda backend: False, flash_works=lambda device: True)
    own = SimpleNamespace(TritonCudaBackend=lambda device, units: SimpleNamespace(units=units))
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_backend", kernels)
    monkeypatch.setitem(sys.modules, "tessera.shard.backends.triton_cuda", own)
    with caplog.at_level(logging.WARNING):
        assert type(cuda.create(DEVICE)) is CudaBackend
    assert "do not work here" in caplog.text
    kernels.kernels_work = lambda backend: True
    used = cuda.create(DEVICE)
    assert used.units == 132 and used.flash  # type: ignore[attr-defined]
