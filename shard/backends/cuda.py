"""NVIDIA GPUs: Triton kernels where they work, recorded decode steps. Never run on hardware; its
kernels are interpreted and compiled for Hopper by the tests."""

import contextlib
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from tessera.shard.backends.base import Backend, Recording
from tessera.shard.backends.fused_attention import FusedAttentionBackend

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether torch finds a CUDA device."""
    return torch.cuda.is_available()


def create(device: torch.device) -> Backend:
    """The backend of one GPU; torch's own operations where the kernels do not work."""
    # For this thread, which is the one that computes: Triton launches on the current device.
    torch.cuda.set_device(device)
    try:
        from tessera.shard.backends.triton_backend import flash_works, kernels_work
        from tessera.shard.backends.triton_cuda import TritonCudaBackend
    except ImportError:
        logger.warning("Triton is not installed: computing with torch's slower operations")
        return CudaBackend(device)
    units = torch.cuda.get_device_properties(device).multi_processor_count
    backend = TritonCudaBackend(device, units)
    if not kernels_work(backend):
        logger.warning("Triton kernels do not work here: computing with torch's slower operations")
        return CudaBackend(device)
    backend.flash = flash_works(device)
    return backend


class CudaDevice:
    """What every backend of such a GPU shares: its memory, time and graphs."""

    name = "cuda"
    runs_ahead = True
    device: torch.device

    @property
    def capability(self) -> tuple[int, int]:
        """What NVIDIA calls the compute capability: (9, 0) is Hopper."""
        return torch.cuda.get_device_capability(self.device)

    def free_memory_bytes(self) -> int:
        """See `Backend.free_memory_bytes`. What torch keeps unused for itself is ours too."""
        free, _total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return free + reserved - torch.cuda.memory_allocated(self.device)

    def used_memory_bytes(self) -> int:
        """See `Backend.used_memory_bytes`: bytes of tensors."""
        return torch.cuda.memory_allocated(self.device)

    def peak_memory_bytes(self) -> int | None:
        """See `Backend.peak_memory_bytes`: bytes of tensors."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak_memory(self) -> None:
        """See `Backend.reset_peak_memory`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        """See `Backend.mark`. Who waits for it sleeps."""
        event = torch.cuda.Event(  # type: ignore[no-untyped-call]
            enable_timing=True, blocking=True
        )
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Backend.wait`."""
        # A thread begins at the first GPU; waiting there would take memory on it.
        with torch.cuda.device(self.device):
            mark.synchronize()

    def elapsed_ns(self, first: torch.cuda.Event, last: torch.cuda.Event) -> int:
        """See `Backend.elapsed_ns`."""
        last.synchronize()
        return int(first.elapsed_time(last) * 1e6)

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        """See `Backend.record`: a CUDA graph, in the memory of the one before it."""
        current, side = torch.cuda.current_stream(), self._recording_stream
        pool = after.pool if isinstance(after, CudaGraph) else torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer block also ends when capturing fails; torch.cuda.graph stays on its stream then.
        with torch.cuda.stream(side):
            side.wait_stream(current)
            work()  # compiles kernels, makes the libraries' workspaces
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            free_before, _total = torch.cuda.mem_get_info(self.device)
            self._capture(graph, pool, side, work)
        current.wait_stream(side)
        torch.cuda.empty_cache()
        free_after, _total = torch.cuda.mem_get_info(self.device)
        return CudaGraph(graph, pool, max(0, free_before - free_after))

    @cached_property
    def _recording_stream(self) -> torch.cuda.Stream:
        """One for all recordings: cuBLAS keeps a workspace of its own for each stream, for good."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _capture(
        self,
        graph: torch.cuda.CUDAGraph,
        pool: Any,
        side: torch.cuda.Stream,
        work: Callable[[], None],
    ) -> None:
        try:
            with torch.cuda.graph(graph, pool=pool, stream=side):
                work()
        except Exception:
            # torch ends a recording that CUDA has given up by half: its allocator would stay as if
            # recording, and fail when it must make room. It complains where there is nothing to do.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
                torch._C._cuda_releasePool(self.device.index, pool)
            raise


class CudaGraph:
    """See `Recording`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any, num_bytes: int) -> None:
        self.graph = graph
        self.pool = pool
        self.num_bytes = num_bytes

    def replay(self) -> None:
        """See `Recording.replay`."""
        self.graph.replay()


class CudaBackend(CudaDevice, FusedAttentionBackend):
    """Reference operations with fused attention. Its steps cannot be recorded."""

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        """See `Backend.record`. These operations wait for lengths on the host."""
        return None
