"""Intel GPUs, first version: torch's own operations. Never run on hardware."""

from typing import Any

import torch

from tessera.shard.backends.fused_attention import FusedAttentionBackend


def available() -> bool:
    """Whether torch finds a XPU device."""
    return torch.xpu.is_available()


def create(device: torch.device) -> "XpuBackend":
    """The backend of one GPU."""
    return XpuBackend(device)


class XpuBackend(FusedAttentionBackend):
    """Reference operations with fused attention; memory as torch.xpu counts it."""

    name = "xpu"

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

    def synchronize(self) -> None:
        """See `Backend.synchronize`."""
        torch.xpu.synchronize(self.device)

    def mark(self) -> Any:
        """See `Backend.mark`. This one waits: the host's clock is the only one tried."""
        self.synchronize()
        return super().mark()
