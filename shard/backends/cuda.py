"""NVIDIA GPUs, first version: torch's own operations. Never run on hardware."""

import torch

from tessera.shard.backends.fused_attention import FusedAttentionBackend


def available() -> bool:
    """Whether torch finds a CUDA device."""
    return torch.cuda.is_available()


def create(device: torch.device) -> "CudaBackend":
    """The backend of one GPU."""
    return CudaBackend(device)


class CudaBackend(FusedAttentionBackend):
    """Reference operations with fused attention; memory as torch.cuda counts it."""

    name = "cuda"

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
