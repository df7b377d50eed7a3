"""Large tensors on large pages.

Attention reads KV blocks in any order. With 4 KiB pages nearly every block starts with a page walk;
with 2 MiB pages long contexts were read 10 to 15 % faster. See admin-guide/mm/transhuge in Linux.
"""

import contextlib
import math
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


CHUNK_BYTES = 64 << 20  # of memory that nobody has written to there is only the address
ALIGNMENT = 64  # a cache line


class HugePages:
    """Memory for tensors that stay, one behind the other: small ones too are on 2 MiB pages."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `torch.empty` on the host. The memory is freed with the last tensor in its chunk."""
        num_bytes = math.prod(size) * dtype.itemsize
        taken = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if num_bytes >= CHUNK_BYTES:
            return empty_on_huge_pages(size, dtype)
        if taken > self._free.numel():
            self._free = empty_on_huge_pages((CHUNK_BYTES,), torch.uint8)
        found, self._free = self._free[:num_bytes], self._free[taken:]
        return found.view(dtype).view(size)


def empty_on_huge_pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the host; on 2 MiB pages where the kernel can give them."""
    num_bytes = math.prod(size) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
