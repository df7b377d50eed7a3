"""The tensor-parallel group: what ranks say to each other during a step.

With one rank every operation returns its input at once; models need no special case.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
COLLECTIVE_TIMEOUT = timedelta(seconds=120)


class Group:
    """Ranks 0..world_size-1 of one model. A rank is a process with one device."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    @classmethod
    def connect(cls, rank: int, world_size: int, device: torch.device, init_method: str) -> "Group":
        """Join the group; blocks until all ranks have.

        Args:
            init_method: `file:///path` on one host, `tcp://host:port` across hosts.

        Raises:
            RuntimeError: torch's, when the others do not come within two minutes.
        """
        if world_size > 1:
            dist.init_process_group(
                BACKENDS[device.type],
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
            )
        return cls(rank, world_size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank; in place where there is more than one."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather_last_dim(self, x_SV: Tensor) -> Tensor | None:
        """The ranks' pieces side by side along the last dimension; None on ranks above 0."""
        if self.world_size == 1:
            return x_SV
        pieces = None
        if self.rank == 0:
            pieces = [torch.empty_like(x_SV) for _ in range(self.world_size)]
        dist.gather(x_SV.contiguous(), pieces, dst=0)
        return torch.cat(pieces, dim=-1) if pieces is not None else None

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank; in place."""
        if self.world_size > 1:
            dist.broadcast(x, src=0)
        return x

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
