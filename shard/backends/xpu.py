"""Intel GPUs by torch.xpu: IPEX's kernels where it is installed beside its torch, else Triton's,
else torch's own operations. Never run on hardware; the tests run it on a simulated device."""

import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tessera.shard.backends.base import Backend, Recording
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.ipex_version import ipex_fits
from tessera.shard.gumbel import draw

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether torch finds a XPU device."""
    return torch.xpu.is_available()


def create(device: torch.device) -> Backend:
    """The backend of one GPU: the fastest one whose kernels give the right results on it."""
    torch.xpu.set_device(device)  # of this thread, which is the one that computes
    return _with_ipex(device) or _with_triton(device) or XpuBackend(device)


def _with_ipex(device: torch.device) -> Backend | None:
    if not ipex_fits("xpu"):
        return None
    from tessera.shard.backends import ipex

    return ipex.working_backend(device)


def _with_triton(device: torch.device) -> Backend | None:
    try:
        from tessera.shard.backends.triton_backend import kernels_work
        from tessera.shard.backends.triton_xpu import TritonXpuBackend
    except ImportError:
        logger.warning("Triton is not installed: computing with torch's slower operations")
        return None
    units = torch.xpu.get_device_properties(device).gpu_subslice_count
    backend = TritonXpuBackend(device, units)
    if kernels_work(backend):
        return backend
    logger.warning("Triton kernels do not work here: computing with torch's slower operations")
    return None


class XpuDevice:
    """What every backend of such a GPU shares: its memory and time."""

    name = "xpu"
    runs_ahead = True
    device: torch.device

    def free_memory_bytes(self) -> int:
        """See `Backend.free_memory_bytes`. What torch keeps unused for itself is ours too."""
        free, _total = torch.xpu.mem_get_info(self.device)
        reserved = torch.xpu.memory_reserved(self.device)
        return free + reserved - torch.xpu.memory_allocated(self.device)

    def used_memory_bytes(self) -> int:
        """See `Backend.used_memory_bytes`: bytes of tensors."""
        return torch.xpu.memory_allocated(self.device)

    def peak_memory_bytes(self) -> int | None:
        """See `Backend.peak_memory_bytes`: bytes of tensors."""
        return torch.xpu.max_memory_allocated(self.device)

    def reset_peak_memory(self) -> None:
        """See `Backend.reset_peak_memory`."""
        torch.xpu.reset_peak_memory_stats(self.device)

    @cached_property
    def _has_float64(self) -> bool:
        has_it = bool(torch.xpu.get_device_properties(self.device).has_fp64)
        if not has_it:
            logger.warning("%s has no float64: the processor draws sampled tokens", self.device)
        return has_it

    def draw(self, scores_RV: Tensor, keys_R: Tensor) -> Tensor:
        """See `Backend.draw`. Waits where the device has no float64: the numbers are the same."""
        if self._has_float64:
            drawn_R: Tensor = super().draw(scores_RV, keys_R)  # type: ignore[misc]
            return drawn_R
        return draw(scores_RV.cpu(), keys_R.cpu()).to(self.device)

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        torch.xpu.synchronize(self.device)

    @cached_property
    def _measures_time(self) -> bool:
        """Whether its events tell the time between them; it depends on driver and compiler."""
        try:
            first, last = self._event(), self._event()
            last.synchronize()
            first.elapsed_time(last)
        except RuntimeError:
            logger.warning("events of %s tell no time: each step waits for its stages", self.device)
            return False
        return True

    def _event(self) -> torch.xpu.Event:
        event = torch.xpu.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.xpu.current_stream(self.device))
        return event

    def mark(self) -> Any:
        """See `Backend.mark`. Waits for the device where its events tell no time."""
        if self._measures_time:
            return self._event()
        self.synchronize()
        return time.perf_counter_ns()

    def wait(self, mark: Any) -> None:
        """See `Backend.wait`."""
        if self._measures_time:
            mark.synchronize()

    def elapsed_ns(self, first: Any, last: Any) -> int:
        """See `Backend.elapsed_ns`."""
        if not self._measures_time:
            return int(last - first)
        self.wait(last)
        return int(first.elapsed_time(last) * 1e6)

    def record(self, work: Callable[[], None], after: Recording | None) -> Recording | None:
        """See `Backend.record`. torch can record here too; without hardware nobody has tried."""
        return None


class XpuBackend(XpuDevice, FusedAttentionBackend):
    """Reference operations with fused attention."""
