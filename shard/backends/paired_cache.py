"""A cache laid out as the CPU kernels' products of bfloat16 pairs want it (csrc/kernels.h).

Sixteen positions of a head lie together, in pairs: keys and values are multiplied where they are.
"""

import torch

from tessera.shard.backends.base import CacheShape

Sizes = tuple[int, ...]

POSITIONS = 16  # that lie together


def can_be_paired(shape: CacheShape) -> bool:
    """Whether a cache of these sizes and dtype can have the layout."""
    return (
        shape.dtype == torch.bfloat16
        and shape.block_size % POSITIONS == 0
        and shape.head_size % POSITIONS == 0
    )


def paired_sizes(shape: CacheShape, num_blocks: int) -> tuple[Sizes, Sizes]:
    """Of keys [B, K, P / 16, H / 2, 16, 2] and values [B, K, P / 16, 8, H, 2] of a layer."""
    parts = (num_blocks, shape.num_kv_heads, shape.block_size // POSITIONS)
    keys = (*parts, shape.head_size // 2, POSITIONS, 2)
    return keys, (*parts, POSITIONS // 2, shape.head_size, 2)
