"""Exchanges between ranks on one host, through memory they share: microseconds, not a socket's
hundreds of them. `backends/csrc/shared.cpp` has the protocol.

The memory is a memfd that rank 0 makes and the others open through /proc: nothing is left behind
when ranks die, and the size of /dev/shm does not matter.
"""

import logging
import mmap
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_RANKS = 64
LINE = 64  # bytes of a flag
MARK_BYTES = 16
BUFFER_BYTES = 1 << 20  # larger tensors are exchanged in pieces


class SharedExchange:
    """One rank's end of the shared memory. Every rank must make the same calls in the same order.

    All methods raise RuntimeError when a rank does not come in time.
    """

    def __init__(self, region: Tensor, rank: int, world_size: int, timeout_s: float) -> None:
        """`region`: uint8, of at least `region_bytes(world_size)`, zero before the first call."""
        self._region = region
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._number = 0  # of exchanges so far

    @staticmethod
    def is_built() -> bool:
        """Whether the kernels are loaded, as they are once there is a CPU backend."""
        return hasattr(torch.ops.tessera_cpu, "shared_sum")

    @classmethod
    def connect(cls, rank: int, world_size: int, timeout_s: float) -> "SharedExchange | None":
        """Share memory with the ranks of the default process group; None where that fails.

        A collective: all ranks get an exchange, or none does.
        """
        size = region_bytes(world_size)
        mark = os.urandom(MARK_BYTES)
        fd = _make(size, mark) if rank == 0 else None
        told = [None if fd is None else (f"/proc/{os.getpid()}/fd/{fd}", mark)]
        dist.broadcast_object_list(told, src=0)
        region = None if told[0] is None else _map(*told[0], size)
        have = [False] * world_size
        dist.all_gather_object(have, region is not None)
        if fd is not None:
            os.close(fd)
        if region is None or not all(have):
            logger.info("the ranks share no memory; they talk through sockets")
            return None
        return cls(region, rank, world_size, timeout_s)

    def sum(self, x: Tensor) -> None:
        """`x`, contiguous float32 or bfloat16, becomes the sum over ranks, the same on all."""
        self._number = torch.ops.tessera_cpu.shared_sum(x, *self._place())

    def broadcast(self, x: Tensor) -> None:
        """`x`, contiguous, becomes rank 0's."""
        self._number = torch.ops.tessera_cpu.shared_broadcast(x, *self._place())

    def gather(self, x: Tensor) -> Tensor | None:
        """Every rank's `x`, contiguous, stacked [world_size, ...]; None on ranks above 0."""
        shape = (self._world_size if self._rank == 0 else 0, *x.shape)
        pieces = torch.empty(shape, dtype=x.dtype)
        self._number = torch.ops.tessera_cpu.shared_gather(x, pieces, *self._place())
        return pieces if self._rank == 0 else None

    def _place(self) -> tuple[Tensor, int, int, int, float]:
        return self._region, self._rank, self._world_size, self._number, self._timeout_s


def region_bytes(world_size: int) -> int:
    """Flags, and two buffers for each rank."""
    return MAX_RANKS * LINE + 2 * world_size * BUFFER_BYTES


def _make(size: int, mark: bytes) -> int | None:
    """New memory that other processes can open, the mark behind it; None where it cannot be had."""
    try:
        fd = os.memfd_create("tessera")
        os.pwrite(fd, mark, size)
    except (OSError, AttributeError):
        return None
    return fd


def _map(path: str, mark: bytes, size: int) -> Tensor | None:
    """Rank 0's memory; None where it is out of reach, as on another host.

    In another container the path may name something else, hence the mark.
    """
    try:
        with Path(path).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size + MARK_BYTES)
    except (OSError, ValueError):
        return None
    return torch.frombuffer(memory, dtype=torch.uint8) if memory[size:] == mark else None
